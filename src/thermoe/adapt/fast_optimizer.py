"""The optimisers of fast weights: AdamW for all, or Muon for matrices and AdamW for biases.

Muon (orthogonalised momentum, for updates from large chunks as in arXiv 2505.23884) takes steps of the size of
AdamW's, so that a step size means the same to both.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.errors import UnknownNameError

OPTIMIZERS = ("adamw", "muon")


class FastOptimizer:
    """One step at a time on given gradients, with a state that can be taken out and put back bit for bit.

    Args:
        parameters: fast weights.
        kind: "adamw" or "muon".
        lr: step size.

    Raises:
        UnknownNameError: no such optimiser.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], kind: str, lr: float) -> None:
        if kind not in OPTIMIZERS:
            raise UnknownNameError.of("optimizer", str(kind), OPTIMIZERS, where="adapt.optimizer")
        self.parameters, self.kind = list(parameters), kind
        matrices = [p for p in self.parameters if kind == "muon" and p.ndim == 2]
        vectors = [p for p in self.parameters if kind != "muon" or p.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = []
        if vectors:
            self._parts.append(torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0))
        if matrices:
            self._parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))

    @property
    def lr(self) -> float:
        """Step size."""
        return float(self._parts[0].param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = value

    def step(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Take one step; parameters that are not named stay as they are, and so do their moments."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        try:
            for part in self._parts:
                part.step()
        finally:
            for parameter in parameters:
                parameter.grad = None

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors that the optimisers keep."""
        states = (state for part in self._parts for state in part.state.values())
        return [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def state_dict(self) -> list[dict[str, Any]]:
        """Return a copy of moments and step size."""
        return [copy.deepcopy(part.state_dict()) for part in self._parts]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take up a copy of what `state_dict` returned."""
        for part, one in zip(self._parts, state, strict=True):
            part.load_state_dict(copy.deepcopy(one))
