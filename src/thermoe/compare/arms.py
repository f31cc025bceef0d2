"""The arms of a comparison: each turns the prepared models into something that scores batches in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.compare.spec import CompareSpec
from thermoe.evaluation import sequence_nll
from thermoe.registry import Registry
from thermoe.routers.swap import set_router


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all arms share."""

    spec: CompareSpec
    dense: nn.Module
    moe: nn.Module
    price: float


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model as one arm runs it.

    Args:
        model: the live model.
        score: maps int64 (B, S) to the nats of each sequence (B,), scored before anything is learned from it.
        learning_passes: extra forward-equivalents that learning costs per batch.
    """

    model: nn.Module
    score: Callable[[Tensor], Tensor]
    learning_passes: float = 0.0


@dataclass(frozen=True, slots=True)
class Arm:
    """A named way to run the model.

    Args:
        title: for tables and figures.
        description: one sentence in plain words.
        against: the arm it is compared with; ``None`` for the first.
        open: context manager from the prepared models to a scorer; leaves the models as they were.
    """

    title: str
    description: str
    against: str | None
    open: Callable[[Prepared], AbstractContextManager[Scorer]]


ARMS: Registry[Arm] = Registry("arm", "thermoe.arms")


def _frozen(model: nn.Module) -> Scorer:
    @torch.no_grad()
    def score(batch: Tensor) -> Tensor:
        return sequence_nll(model(batch).logits, batch)

    return Scorer(model, score)


@contextmanager
def _dense(prepared: Prepared) -> Iterator[Scorer]:
    yield _frozen(prepared.dense)


@contextmanager
def _baseline(prepared: Prepared) -> Iterator[Scorer]:
    yield _frozen(prepared.moe)


@contextmanager
def _priced(prepared: Prepared) -> Iterator[Scorer]:
    replaced = set_router(prepared.moe, "priced", price=prepared.price, k_min=prepared.spec.price.k_min)
    try:
        yield _frozen(prepared.moe)
    finally:
        set_router(prepared.moe, replaced)


@contextmanager
def _adapting(prepared: Prepared) -> Iterator[Scorer]:
    settings = prepared.spec.adapt
    # The arm is what one step at every batch does; what it costs is counted beside, so nothing caps or judges it.
    with RouterAdapter(
        prepared.moe,
        lr=settings.lr,
        anchor=settings.anchor,
        family=settings.family,
        optimizer="adamw",
        steps=1,
        by_text=False,
        safeguards=Safeguards.none(),
        held_frac=0.0,
        bucket=None,
    ) as adapter:
        # The graph of the scoring forward is used for learning, so a step costs one backward to the activations more.
        yield Scorer(prepared.moe, lambda batch: adapter.score_and_learn(batch).sequence_nll, learning_passes=1.0)


@contextmanager
def _adapted(prepared: Prepared) -> Iterator[Scorer]:
    with _priced(prepared), _adapting(prepared) as scorer:
        yield scorer


ARMS.register("dense")(
    Arm("Dense GPT-2", "The model before conversion: every neuron works on every token.", None, _dense)
)
ARMS.register("baseline")(
    Arm(
        "MoE, baseline router",
        "The converted model with top-k routing and a capacity per expert in training; the same number of experts for "
        "every token.",
        "dense",
        _baseline,
    )
)
ARMS.register("priced")(
    Arm(
        "MoE, energy-aware router",
        "The same weights; an expert is used only when its benefit exceeds a fixed price on what it costs.",
        "baseline",
        _priced,
    )
)
ARMS.register("adapted")(
    Arm(
        "MoE, energy-aware + test-time training",
        "The same weights and the same price; after each batch has been scored, the routers alone learn from it.",
        "priced",
        _adapted,
    )
)
ARMS.register("baseline_adapted")(
    Arm(
        "MoE, baseline + test-time training",
        "Baseline routing without a price; after each batch has been scored, the routers alone learn from it.",
        "baseline",
        _adapting,
    )
)
