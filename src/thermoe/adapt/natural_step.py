"""Natural-gradient steps for fast weights: as far in every direction of the input as moves the logits alike.

A correction M phi(x) + delta is linear in its features, so that a step S moves the logits of a token by S [phi, 1], on
average by tr(S A S^T) with A the second moment of [phi, 1]. The steepest step for its size in *logits* is G A^-1, G the
gradient (Amari 1998; the input factor of K-FAC, arXiv 1503.05671). Hidden states are far from isotropic: AdamW, to
which every coordinate is worth a step of the same length, moves the logits mostly along a few large directions. A is
damped by its mean eigenvalue, so that small directions are not blown up; what is larger is found once per text, on the
first tokens that are learned from, as a few eigenvectors, which is all that has to be kept. The size of a step
follows the gradient's own, averaged per expert, as in Adam.

Shape letters: L layers, T tokens, E experts, C features and one for delta, R directions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thermoe.routers.fast_weights import FastWeights

#: Directions larger than the mean that are kept, and what the search for them takes beside.
DIRECTIONS, SPARE, PASSES = 64, 8, 4
#: Averaging of steps and of their sizes.
BETAS = (0.9, 0.999)
#: The gradient of an expert that no token used is what rounding leaves of 0, and would be blown up to a whole step. An
#: expert stays where the size of its gradient is at most this, as a share of the largest in its layer or in nats.
ROUNDING_FRAC, ROUNDING = 1e-4, 1e-9
#: What a step writes to, and what a layer keeps; the rest of a state is shared by its copies.
MOMENTS = ("mean", "square")
KEPT = ("count", *MOMENTS, "damping", "vectors", "added")


class NaturalStep:
    """The optimiser of all fast weights of a model, layer by layer.

    Args:
        fast: by layer name.
        lr: the root mean square of a step, per expert and whitened feature.
    """

    def __init__(self, fast: Mapping[str, FastWeights], lr: float) -> None:
        self.fast, self.lr = dict(fast), lr
        self.state: dict[str, dict[str, Any]] = {}

    def wants(self, name: str) -> bool:
        """Whether the next step of a layer needs its features: the first of a text does."""
        return name not in self.state

    @torch.no_grad()
    def step(self, names: Sequence[str], gradients: Sequence[Tensor], features: Mapping[str, Tensor]) -> None:
        """Take one step.

        Args:
            names: of the layers that move.
            gradients: of their parameters, layer by layer, as `FastWeights.parameters` orders them.
            features: by layer name, (T, C - 1), of the tokens that are learned from; of the layers that `wants` asks
                for.
        """
        at = 0
        alike: dict[Any, list[tuple[FastWeights, dict[str, Any], Tensor]]] = defaultdict(list)
        for name in names:
            count = sum(1 for _ in self.fast[name].parameters())
            delta_E, *matrix = gradients[at : at + count]
            at += count
            if name not in self.state and name not in features:
                continue  # the layer did not run, so that there is no gradient either
            gradient_EC = torch.cat([*matrix, delta_E.unsqueeze(1)], 1)
            if name not in self.state:
                self.state[name] = {
                    "count": 0,
                    "mean": torch.zeros_like(gradient_EC),
                    "square": torch.zeros_like(gradient_EC[:, :1]),
                    **_directions(features[name]),
                }
            state = self.state[name]
            if state["mean"].device != gradient_EC.device:  # the model was moved
                state |= {k: v.to(gradient_EC.device) for k, v in state.items() if isinstance(v, Tensor)}
            state["count"] += 1
            kind = gradient_EC.shape, state["vectors"].shape, state["count"], gradient_EC.device
            alike[kind].append((self.fast[name], state, gradient_EC))
        for layers in alike.values():
            self._move([fast for fast, _, _ in layers], [s for _, s, _ in layers], torch.stack([g for *_, g in layers]))

    def _move(self, fasts: Sequence[FastWeights], states: Sequence[Mapping[str, Any]], gradient_LEC: Tensor) -> None:
        """Move layers of one shape that have taken as many steps: they are small, and one launch does for all."""
        count = states[0]["count"]
        damping, vectors, added, mean, square = (
            torch.stack([state[key] for state in states]) for key in ("damping", "vectors", "added", "mean", "square")
        )
        along = torch.bmm(gradient_LEC, vectors) * added.unsqueeze(1)
        natural = gradient_LEC / damping.view(-1, 1, 1) + torch.bmm(along, vectors.mT)
        mean.lerp_(natural, 1 - BETAS[0])
        square.lerp_((natural * gradient_LEC).mean(2, keepdim=True), 1 - BETAS[1])
        torch._foreach_copy_([state["mean"] for state in states], list(mean.unbind()))
        torch._foreach_copy_([state["square"] for state in states], list(square.unbind()))
        size = (square / (1 - BETAS[1] ** count)).sqrt()
        unused = size <= (ROUNDING_FRAC * size.amax((1, 2), keepdim=True)).clamp(min=ROUNDING)  # NaN has to be seen
        move = torch.where(unused, 0, self.lr / (1 - BETAS[0] ** count) * mean / size.clamp(min=ROUNDING))
        deltas: list[Tensor] = [fast.delta for fast in fasts]
        torch._foreach_sub_(deltas, list(move[..., -1].unbind()))
        matrices: list[Tensor] = [fast.matrix for fast in fasts if fast.matrix is not None]
        if matrices:
            torch._foreach_sub_(matrices, list(move[..., :-1].unbind()))

    def state_tensors(self) -> list[Tensor]:
        """Return the tensors that are kept."""
        return [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]

    def state_dict(self) -> dict[str, Any]:
        """Return step size, a copy of the moments, and the directions, which never change once they are found."""
        return {"lr": self.lr, "layers": {name: _copied(state) for name, state in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a copy of what `state_dict` returned, on the devices of the layers.

        Raises:
            KeyError, ValueError: it is of other layers, or of layers of other shapes; nothing is changed then.
        """
        lr, layers = float(state["lr"]), {}
        for name, one in state["layers"].items():
            fast, copied = self.fast[name], _copied(one)
            columns = 1 + (0 if fast.matrix is None else fast.matrix.shape[1])
            if copied["mean"].shape != (fast.num_experts, columns) or copied["vectors"].shape[0] != columns:
                raise ValueError(f"the moments of {name} are of another shape")
            device = fast.delta.device
            layers[name] = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in copied.items()}
        self.lr, self.state = lr, layers


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: state[key].clone() if key in MOMENTS else state[key] for key in KEPT}


def _directions(features: Tensor) -> dict[str, Tensor]:
    """Return the damping and the eigenvectors (C, R) of the second moment, with what they add to a product."""
    x_TC = torch.cat([features.detach().float(), features.new_ones(features.shape[0], 1)], 1)
    tokens, width = x_TC.shape
    damping = x_TC.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    many = min(DIRECTIONS + SPARE, width, tokens)
    # The same directions in every run: the search for the largest begins with seeded ones.
    start = torch.randn(width, many, generator=torch.Generator().manual_seed(0)).to(x_TC.device)
    found = torch.linalg.qr(start)[0]
    for _ in range(PASSES):
        found = torch.linalg.qr(x_TC.T @ (x_TC @ found))[0]
    seen = x_TC @ found
    values, within = torch.linalg.eigh(seen.T @ seen / tokens)
    values, vectors = values[-DIRECTIONS:].clamp(min=0), (found @ within)[:, -DIRECTIONS:]
    return {"damping": damping, "vectors": vectors, "added": 1 / (values + damping) - 1 / damping}
