"""What the routers learn from: an objective turns one batch into gradients of the fast weights, or moves them itself.

The adapter does the rest for every objective alike: it keeps the state of before, takes the optimiser's step where
there are gradients, pulls back, holds the trust region, judges, and restores all of it, the objective's own state
included.

Shape letters: B sequences, S positions, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from thermoe.adapt.learning_costs import LearningAccount, LearningCosts
from thermoe.registry import Registry
from thermoe.routers.fast_weights import FastWeights


@dataclass(frozen=True, slots=True, eq=False)
class LearnBatch:
    """What an objective gets.

    Args:
        model: the model, with its fast weights in place.
        fast: by dotted layer name, the fast weights that may move; those of other layers must be left alone.
        input_ids: int64 (B, S).
        attention_mask: bool (B, S), or ``None`` when every token is real.
        nll: float32 (B, S - 1), nats of each predicted token in the state that scored it; has a graph to the fast
            weights where the objective asked for one.
        weights: float32 (B, S - 1) of at least 0: what each predicted token counts. 0 where it is held back for the
            judge, padding, or generated; nothing may be learned from it then. At least one is above 0.
        seed: another one for each batch, the same ones in a repeated run.
        account: where forwards of the objective's own are made and paid.
    """

    model: nn.Module
    fast: Mapping[str, FastWeights]
    input_ids: Tensor
    attention_mask: Tensor | None
    nll: Tensor
    weights: Tensor
    seed: int
    account: LearningAccount

    @property
    def rows(self) -> Tensor:
        """Bool (B,): sequences with a token to learn from."""
        return (self.weights > 0).any(-1)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that may move, layer by layer."""
        return [p for fast in self.fast.values() for p in fast.parameters()]


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """What an objective made of a batch.

    Args:
        gradients: one per parameter of the batch, of the mean loss per unit of weight; ``None`` where the objective
            moved the fast weights itself, or where there is nothing to move.
        weight: the sum of the weights behind it; gradients of several batches are averaged by it.
        reason: why there is nothing to learn, or ``None`` where there is.
        loss: what the gradients are of, a scalar; nothing is learned where it is not finite.
    """

    gradients: list[Tensor] | None
    weight: Tensor | float
    reason: str | None = None
    loss: Tensor | None = None


class Objective(Protocol):
    """How to learn from a batch. One is made per adapter; streams of the adapter share it and exchange its state.

    Attributes:
        needs_graph: whether it takes gradients of what was scored, so that a forward has to keep its graph. Such an
            objective is asked once per part of a batch, others once per batch.
        recordable: whether `learn` does the same to every batch and waits for nothing, so that a CUDA graph can hold
            it: no draws by the seed, no state of its own, no forwards. Missing is no.
    """

    needs_graph: bool

    def bound_j(self, costs: LearningCosts, batch_size: int, length: int) -> float:
        """Return the most joules that learning from B sequences of S tokens can cost."""

    def learn(self, batch: LearnBatch) -> Proposal:
        """Return the gradients, or move the fast weights; work other than the backward is paid at ``batch.account``."""

    def reset(self) -> None:
        """Forget what was learned, as the fast weights are set back to 0."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state beside the fast weights; it must not change when learning goes on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` returned."""


class MakesObjective(Protocol):
    """How an objective is made; raises a RoutingError for a model that it does not fit."""

    def __call__(self, model: nn.Module, *, seed: int) -> Objective:
        """Return an objective for ``model``."""


OBJECTIVES: Registry[MakesObjective] = Registry("objective", "thermoe.objectives")


@OBJECTIVES.register("next_token")
class NextToken:
    """The next-token loss of text that was given: a prompt, or what is teacher-forced.

    Selection is piecewise constant, so the gradient reaches a router through the combine weights of the experts it
    chose. The scoring forward's graph is used; what is learned costs one backward to the activations more.
    """

    needs_graph = True
    recordable = True

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        del model, seed  # it fits every model, and draws nothing

    def bound_j(self, costs: LearningCosts, batch_size: int, length: int) -> float:
        """Return the joules of a forward in which every expert is opened."""
        return costs.bound_j(batch_size * length)

    def learn(self, batch: LearnBatch) -> Proposal:
        """Return the gradients of the weighted mean of the nats per token."""
        with torch.enable_grad():
            weight = batch.weights.sum()
            loss = (batch.nll * batch.weights).sum() / weight
        if not loss.requires_grad:
            return Proposal(None, weight, "no token used an expert")
        # A layer in which no token used an expert has no part in the loss.
        gradients = torch.autograd.grad(loss, batch.parameters(), materialize_grads=True)
        return Proposal(list(gradients), weight, loss=loss.detach())

    def reset(self) -> None:
        """Do nothing: there is no state."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""
