"""A router with state of its own, tiny trainings, and ways to cut them short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.layer import moe_layers
from thermoe.routers.topk import TopKRouter
from thermoe.testing import random_tokens, tiny_moe
from thermoe.training.loop import Outcome, train_language_model
from thermoe.training.settings import TrainSettings

ROWS = random_tokens(14, 16)
HELD = random_tokens(5, 16, seed=7)


class BiasedRouter(TopKRouter):
    """Top-k with a bias of the selection that follows the load after each step, as loss-free balancing has.

    `bias` is saved with the model; `seen`, the load since the last step, and `steps` are not.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.bias: Tensor
        self.seen: Tensor
        self.average: Tensor
        self.register_buffer("bias", torch.zeros(self.num_experts))
        self.register_buffer("seen", torch.zeros(self.num_experts), persistent=False)
        self.register_buffer("average", torch.zeros(self.num_experts), persistent=False)
        self.observed = 0

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return self._limit(self._rank(logits + self.bias), probabilities, context)

    def observe(self, decision: RoutingDecision) -> None:
        assert not decision.logits.requires_grad
        self.seen += decision.counts
        self.observed += 1

    def after_step(self) -> None:
        self.average.mul_(0.9).add_(0.1 * self.seen)
        self.bias += 0.05 * torch.sign(self.average.mean() - self.average)
        self.seen.zero_()


def biased_moe(seed: int = 0, **options: Any) -> PreTrainedModel:
    """Return `tiny_moe` with routers of the kind above; top_k is 3."""
    model = tiny_moe(seed, top_k=3, **options)
    for _, layer in moe_layers(model):
        old = layer.router
        assert isinstance(old, TopKRouter)
        new = BiasedRouter(old.hidden_size, old.num_experts, old.top_k, **old.options())
        new.load_state_dict(old.state_dict(), strict=False)
        layer.router = new
    return model


def routers(model: nn.Module) -> list[Any]:
    return [layer.router for _, layer in moe_layers(model)]


def interrupt_at(step: int) -> Callable[[int], None]:
    def on_step(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return on_step


def settings(**changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "steps": 10,
        "batch_size": 4,
        "lr": 3e-3,
        "warmup_steps": 1,
        "log_every": 2,
        "save_every": 0,
        "balance": {"switch": 0.3, "z_loss": 0.05},
        **changes,
    }
    return TrainSettings(**fields)


def train(model: nn.Module, folder: Path, rows: Tensor = ROWS, **changes: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    """Train and return the outcome and every row."""
    names = ("on_step", "resume", "validation", "distiller", "energy", "own_losses", "report_to", "keep_checkpoint")
    options = {name: changes.pop(name) for name in names if name in changes}
    written: list[dict[str, Any]] = []
    outcome = train_language_model(
        model,
        rows,
        settings(**changes),
        checkpoint_dir=folder / "checkpoints",
        write=lambda kind, step, fields: written.append({"kind": kind, "step": step, **fields}),
        **options,
    )
    return outcome, written


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
