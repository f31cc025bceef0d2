"""Test-time training of the routers: each batch is scored, then the fast weights take one step on its next-token loss.

The order is prequential, score before learning, so that the reported loss is never that of text already learned from.
Only fast weights (`routers/fast_weights.py`) move: no other parameter gets a gradient or an optimiser state. Selection
is piecewise constant, so the gradient reaches the router through the combine weights of the chosen experts. After a
step the fast weights are multiplied by `anchor`, which pulls them back to the trained router (decay as in dynamic
evaluation, arXiv 1904.08378); a loss or gradient that is not finite resets them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.errors import ConfigError, RoutingError
from thermoe.evaluation import check_token_ids, sequence_nll
from thermoe.moe.layer import routed_modules
from thermoe.moe.offload import readable
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights


@dataclass(frozen=True, slots=True)
class AdaptStep:
    """One batch: what it scored before learning, and what learning did.

    Args:
        sequence_nll: float32 (B,), nats per sequence, scored before the update.
        learned: whether the fast weights moved.
        reason: why not, when they did not.
        change_norm: Euclidean norm of the change of all fast weights; 0 when nothing moved.
    """

    sequence_nll: Tensor
    learned: bool
    reason: str | None
    change_norm: float


class RouterAdapter:
    """Adapts the routers of a model to the text it reads; a context manager that leaves the model as it was.

    Args:
        model: a causal language model with MoE layers.
        lr: step size of AdamW on the fast weights.
        anchor: factor on the fast weights after each step, in (0, 1]; 1 is no pull.
        max_grad_norm: gradients are scaled down to this norm.
        family: of the fast weights: "full", "bias", "mix" or "low_rank"; see `routers/fast_weights.py`.

    Raises:
        RoutingError: the model has no MoE layer, or is being adapted already.
        ConfigError: ``lr``, ``anchor`` or ``max_grad_norm`` is outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-2,
        anchor: float = 0.9,
        max_grad_norm: float = 1.0,
        family: str = "full",
    ) -> None:
        for name, value, fits, accepted, usual in (
            ("lr", lr, lambda x: 0 <= x < math.inf, "a finite number of at least 0", 1e-2),
            ("anchor", anchor, lambda x: 0 < x <= 1, "a number above 0 and at most 1", 0.9),
            ("max_grad_norm", max_grad_norm, lambda x: 0 < x < math.inf, "a finite number above 0", 1.0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
                raise ConfigError(
                    f"{name} is {value!r}", where=f"adapt.{name}", accepted=accepted, fix=f"leave it at {usual}"
                )
        self.model = model
        self.lr, self.anchor, self.max_grad_norm = lr, anchor, max_grad_norm
        self.updates = 0
        self.resets = 0
        self._routers = self._attach(family)
        # Offloaded weights are other objects after every forward; none is learned from, frozen or not.
        self._frozen = {p for p in model.parameters() if p.requires_grad and not p.is_meta} - set(self.parameters())
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        self._optimizer = self._new_optimizer()

    def _attach(self, family: str) -> dict[str, Router]:
        routers = {name: layer.router for name, layer in routed_modules(self.model) if isinstance(layer.router, Router)}
        if not routers:
            raise RoutingError(
                "the model has no MoE layer whose router could learn",
                where=type(self.model).__name__,
                accepted="a model with thermoe routers",
                fix="convert it first: thermoe.convert_to_moe(model)",
            )
        for name, router in routers.items():
            if router.fast is not None:
                raise RoutingError(
                    "the router has fast weights already",
                    where=name,
                    accepted="one adapter per model at a time",
                    fix="close the first adapter",
                )
        for router in routers.values():
            with readable(router):
                router.fast = FastWeights.of(router.weight, family)
        return routers

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)

    def parameters(self) -> list[nn.Parameter]:
        """Return every fast weight, layer by layer."""
        return [p for router in self._routers.values() if router.fast is not None for p in router.fast.parameters()]

    def score_and_learn(self, input_ids: Tensor) -> AdaptStep:
        """Score int64 (B, S) token ids with the present fast weights, then learn from them.

        Raises:
            ConfigError: these are no token ids (B, S) with S of at least 2, so that there is none to predict.
            RoutingError: the adapter is closed.
        """
        check_token_ids(input_ids, where="input_ids")
        if not self.parameters():
            raise RoutingError(
                "the adapter is closed",
                where="RouterAdapter.score_and_learn",
                accepted="an adapter inside its with block",
                fix="make a new RouterAdapter",
            )
        with torch.enable_grad():
            logits = self.model(input_ids).logits
            nll = sequence_nll(logits, input_ids)
            loss = nll.sum() / (input_ids.shape[0] * (input_ids.shape[1] - 1))
            scored = nll.detach()
            if not bool(torch.isfinite(loss)):
                return self._refuse(scored, "the loss is not finite")
            if not loss.requires_grad:
                return AdaptStep(scored, False, "no token used an expert", 0.0)
            parameters = self.parameters()
            # A layer in which no token used an expert has no part in the loss.
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not bool(torch.isfinite(norm)):
            return self._refuse(scored, "the gradient is not finite")
        scale = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        before = [p.detach().clone() for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * scale
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(self.anchor)
            change = torch.nn.utils.get_total_norm([p - b for p, b in zip(parameters, before, strict=True)])
        moved = float(change)
        self.updates += moved > 0
        return AdaptStep(scored, moved > 0, None if moved > 0 else "the step was zero", moved)

    def _refuse(self, scored: Tensor, reason: str) -> AdaptStep:
        self.reset()
        self.resets += 1
        return AdaptStep(scored, False, f"{reason}; the fast weights were reset", 0.0)

    def reset(self) -> None:
        """Return to the trained router exactly, and forget the optimiser's moments."""
        for router in self._routers.values():
            if router.fast is not None:
                router.fast.reset()
        self._optimizer = self._new_optimizer()

    def state_dict(self) -> dict[str, Any]:
        """Return fast weights, optimiser state and counters."""
        return {
            "fast": {
                name: router.fast.state_dict() for name, router in self._routers.items() if router.fast is not None
            },
            "optimizer": self._optimizer.state_dict(),
            "updates": self.updates,
            "resets": self.resets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state returned by `state_dict`."""
        for name, fast in state["fast"].items():
            module = self._routers[name].fast
            assert module is not None
            module.load_state_dict(fast)
        self._optimizer.load_state_dict(state["optimizer"])
        self.updates, self.resets = state["updates"], state["resets"]

    def close(self) -> None:
        """Take the fast weights off; the model is as it was before. May be called twice."""
        mine = {id(router.fast) for router in self._routers.values() if router.fast is not None}
        present = [layer.router for _, layer in routed_modules(self.model)]  # set_router hands fast weights on
        for router in [*self._routers.values(), *present]:
            if isinstance(router, Router) and id(router.fast) in mine:
                router.fast = None
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = set()

    def __enter__(self) -> RouterAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
