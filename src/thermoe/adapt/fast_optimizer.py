"""The optimisers of fast weights: natural-gradient steps, AdamW, or Muon for matrices and AdamW for biases.

Muon (orthogonalised momentum, for updates from large chunks as in arXiv 2505.23884) takes steps of the size of
AdamW's, so that a step size means the same to both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thermoe.adapt.natural_step import NaturalStep
from thermoe.errors import UnknownNameError
from thermoe.routers.fast_weights import FastWeights

OPTIMIZERS = ("natural", "adamw", "muon")


class FastOptimizer:
    """One step at a time on given gradients, with a state that can be taken out and put back bit for bit.

    Args:
        fast: fast weights by layer name.
        kind: "natural", "adamw" or "muon".
        lr: step size.

    Raises:
        UnknownNameError: no such optimiser.
    """

    def __init__(self, fast: Mapping[str, FastWeights], kind: str, lr: float) -> None:
        if kind not in OPTIMIZERS:
            raise UnknownNameError.of("optimizer", str(kind), OPTIMIZERS, where="adapt.optimizer")
        self.fast, self.kind = dict(fast), kind
        self._natural = NaturalStep(fast, lr) if kind == "natural" else None
        self._parts: list[torch.optim.Optimizer] = []
        if self._natural is not None:
            return
        parameters = [p for one in fast.values() for p in one.parameters()]
        matrices = [p for p in parameters if kind == "muon" and p.ndim == 2]
        vectors = [p for p in parameters if kind != "muon" or p.ndim != 2]
        if vectors:
            self._parts.append(torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0))
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))

    @property
    def lr(self) -> float:
        """Step size."""
        return self._natural.lr if self._natural is not None else float(self._parts[0].param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        if self._natural is not None:
            self._natural.lr = value
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = value

    def wants(self, name: str) -> bool:
        """Whether the next step of a layer needs its features."""
        return self._natural is not None and self._natural.wants(name)

    def step(self, names: Sequence[str], gradients: Sequence[Tensor], features: Mapping[str, Tensor]) -> None:
        """Take one step; layers that are not named stay as they are, and so do their moments.

        Args:
            names: of layers.
            gradients: of their parameters, layer by layer.
            features: by layer name, (T, C), what the matrices were applied to where something is learned; of the layers
                that `wants` asks for.
        """
        if self._natural is not None:
            self._natural.step(names, gradients, features)
            return
        parameters = [p for name in names for p in self.fast[name].parameters()]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        try:
            for part in self._parts:
                if any(v.device != p.device for p, s in part.state.items() for k, v in s.items() if k != "step"):
                    part.load_state_dict(part.state_dict())  # the model was moved; this moves them after it
                part.step()
        finally:
            for parameter in parameters:
                parameter.grad = None

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors that the optimisers keep."""
        if self._natural is not None:
            return self._natural.state_tensors()
        states = (state for part in self._parts for state in part.state.values())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def state_dict(self) -> list[dict[str, Any]]:
        """Return a copy of moments and step size."""
        if self._natural is not None:
            return [self._natural.state_dict()]
        return [copy.deepcopy(part.state_dict()) for part in self._parts]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take up a copy of what `state_dict` returned."""
        if self._natural is not None:
            (own,) = state
            self._natural.load_state_dict(own)
            return
        for part, one in zip(self._parts, state, strict=True):
            part.load_state_dict(copy.deepcopy(one))
