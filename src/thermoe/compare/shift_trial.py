"""The two kinds of work of a shift study: train the model of a seed and set its prices; read the stream with one arm.

Every arm scores a batch before it learns from it, and all arms read the same batches of a given order.

Shape letters: B sequences, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.compare.decode_cost import Choices, DecodeCost, choices_of
from thermoe.compare.dynamic_evaluation import DynamicEvaluation
from thermoe.compare.shift_spec import ORDERS, SEGMENTS, ShiftArm, ShiftSpec
from thermoe.compare.small_model import lr_at, new_model, optimizer_of, train_step
from thermoe.energy.cost_model import CostModel
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import routed_modules
from thermoe.results import save_whole
from thermoe.routers.swap import set_router
from thermoe.sensitivity import measure_sensitivity

#: Halvings of the search for a price, and where it looks, in multiples of the mean sensitivity.
BISECTIONS, LOWEST, HIGHEST = 12, 1e-4, 1e2


@dataclass(frozen=True, slots=True)
class ShiftTexts:
    """Token rows (R, S) by text: to train on, and what is read; the rows of a segment follow each other."""

    train: Mapping[str, Tensor]
    stream: Mapping[str, Tensor]
    calibration: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """What an arm says of a batch: nats per sequence (B,) before learning, and what learning did and cost."""

    nll: Tensor
    learned: bool = False
    verdict: str = "nothing learns"
    reason: str | None = None
    learning_j: float = 0.0
    reads_again: bool = False


def stream_of(spec: ShiftSpec, texts: ShiftTexts, order: str) -> list[tuple[str, int, Tensor]]:
    """Return (segment, number within it, rows (B, S)) of every batch, segment after segment or one of each in turn."""
    batches = [
        (segment, number, texts.stream[segment][number * spec.decoded : (number + 1) * spec.decoded])
        for segment, _ in SEGMENTS
        for number in range(spec.segment_batches)
    ]
    return batches if order == ORDERS[0] else sorted(batches, key=lambda batch: batch[1])


def train_model(spec: ShiftSpec, seed: int, texts: ShiftTexts) -> tuple[PreTrainedModel, float]:
    """Train the model of a seed on prose and Python; returns it with its last training loss."""
    torch.manual_seed(seed)
    model = new_model(spec, seed)
    optimizer = optimizer_of(model, spec)
    generator = torch.Generator().manual_seed(seed)
    python = round(spec.python_frac * spec.batch_size)
    balance = {"switch": spec.balance} if spec.balance else {}
    loss = 0.0
    for step in range(spec.steps):
        parts = [
            texts.train[name][torch.randint(0, len(texts.train[name]), (count,), generator=generator)]
            for name, count in (("prose", spec.batch_size - python), ("python", python))
        ]
        loss = train_step(model, optimizer, torch.cat(parts), balance, lr_at(step, spec))
    return model.eval(), loss


@torch.no_grad()
def _chosen(model: nn.Module, rows: Tensor, batch: int) -> list[Choices]:
    with choices_of(model) as take:
        found = []
        for part in rows[: len(rows) // batch * batch].split(batch):
            model(part, use_cache=False)
            found.append(take())
    return found


def set_policy(model: nn.Module, cost: DecodeCost, sensitivity: Mapping[str, list[float]], price: float | None) -> None:
    """Give the model top-k routing, or the priced router at ``price`` nats per unit of relative cost."""
    set_router(model, "topk")
    if price is None:
        return
    set_router(model, "priced", price=price, benefit="distortion", group_by_position=True)
    for row, (name, module) in enumerate(routed_modules(model)):
        router: Any = module.router
        router.set_costs(*cost.table.relative(row, router.num_experts))
        router.set_sensitivity(sensitivity[name])


def calibrate(spec: ShiftSpec, model: nn.Module, rows: Tensor) -> dict[str, Any]:
    """Return sensitivities, the budget in joules per token, and the price of each arm with a budget.

    The budget is what decoding costs apart from the experts, plus `budget_frac` of what they cost with top-k. An arm
    that learns leaves room for its bucket: its price is set for budget / (1 + bucket).

    Args:
        spec: the study.
        model: trained.
        rows: int64 (R, S) of the texts trained on, which no arm reads.
    """
    cost = DecodeCost(model, CostModel.prior())
    sensitivity = {name: values.tolist() for name, values in measure_sensitivity(model, rows, batch_size=8).items()}
    mean = sum(map(sum, sensitivity.values())) / sum(map(len, sensitivity.values()))

    def joules(price: float | None) -> tuple[float, float]:
        set_policy(model, cost, sensitivity, price)
        chosen = _chosen(model, rows, spec.decoded)
        tokens = sum(part.sequences * part.positions for part in chosen)
        return sum(map(cost.decode_j, chosen)) / tokens, sum(map(cost.routing_j, chosen)) / tokens

    free, routing = joules(None)
    budget = free - (1 - spec.budget_frac) * routing
    prices: dict[str, float] = {}
    for name in spec.arms:
        arm = spec.definitions[name]
        if not arm.budget:
            continue
        target = budget / (1 + (arm.bucket or 0.0)) if arm.learns != "nothing" else budget
        low, high = math.log(LOWEST * mean), math.log(HIGHEST * mean)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if joules(math.exp(middle))[0] > target else (low, middle)
        prices[name] = math.exp(high)
    set_router(model, "topk")
    return {"sensitivity": sensitivity, "prices": prices, "free_j_per_token": free, "routing_j_per_token": routing,
            "budget_j_per_token": budget, "provenance": cost.provenance}  # fmt: skip


@contextmanager
def reader_of(
    spec: ShiftSpec, arm: ShiftArm, model: nn.Module, cost: DecodeCost
) -> Iterator[tuple[Callable[[Tensor], Reading], Callable[[float, float], None]]]:
    """Yield a function that reads a batch, and one that is told the joules of decoding it and of reading it again."""
    if arm.learns == "nothing":

        @torch.no_grad()
        def score(rows: Tensor) -> Reading:
            return Reading(sequence_nll(model(rows, use_cache=False).logits, rows))

        yield score, lambda *_: None
    elif arm.learns == "routers":
        guards = Safeguards(kl_cap=spec.adapt_kl_cap, anchor=spec.adapt_anchor)
        with RouterAdapter(
            model, lr=spec.adapt_lr, family=spec.adapt_family, safeguards=guards, bucket=arm.bucket,
            cost_model=CostModel.prior(),
        ) as adapter:  # fmt: skip
            adapter.bucket.earns_scoring = False  # what is served is decoding, and told below

            def learn(rows: Tensor) -> Reading:
                step = adapter.score_and_learn(rows)
                worked = step.learning_j > 0
                return Reading(step.sequence_nll, step.learned, step.verdict, step.reason, step.learning_j, worked)

            def told(served_j: float, again_j: float) -> None:
                adapter.bucket.earn(served_j)
                adapter.bucket.spend(again_j)

            yield learn, told
    else:
        with DynamicEvaluation(model, lr=spec.all_lr) as rival:
            yield lambda rows: Reading(rival.score_and_learn(rows), True, "learned"), lambda *_: None


def read_stream(
    spec: ShiftSpec, arm: ShiftArm, order: str, model: nn.Module, calibrated: Mapping[str, Any], texts: ShiftTexts
) -> list[dict[str, Any]]:
    """Return a row per batch, in the order read; the model is left with top-k routing and its trained weights."""
    cost = DecodeCost(model, CostModel.prior())
    set_policy(model, cost, calibrated["sensitivity"], calibrated["prices"][arm.name] if arm.budget else None)
    rows: list[dict[str, Any]] = []
    try:
        with reader_of(spec, arm, model, cost) as (read, served), choices_of(model) as take:
            for at, (segment, number, batch) in enumerate(stream_of(spec, texts, order)):
                found = read(batch)
                chosen = take()
                served_j = cost.decode_j(chosen)
                again_j = cost.forward_j(chosen) if found.reads_again else 0.0
                learning_j = cost.all_weights_j(chosen) if arm.learns == "all" else found.learning_j + again_j
                served(served_j, again_j)
                rows.append(
                    {
                        "segment": segment, "number": number, "at": at, "tokens": batch.numel() - len(batch),
                        "sequence_nll": found.nll.tolist(), "learned": found.learned, "verdict": found.verdict,
                        "reason": found.reason, "served_j": served_j, "learning_j": learning_j,
                        "energy_provenance": cost.provenance, "distinct_experts": chosen.distinct_experts,
                        "experts_per_token": chosen.experts_per_token,
                    }
                )  # fmt: skip
    finally:
        set_router(model, "topk")
    return rows


def train_and_save(spec: ShiftSpec, seed: int, texts: ShiftTexts, folder: Path) -> dict[str, Any]:
    """Train the model of a seed into ``folder``; returns what a run folder keeps of it."""
    model, loss = train_model(spec, seed, texts)
    calibrated = calibrate(spec, model, texts.calibration)
    save_whole(folder, model.save_pretrained)
    return {"train_loss": loss, "parameters": sum(p.numel() for p in model.parameters()), **calibrated}


def read_saved(
    spec: ShiftSpec, arm: str, order: str, texts: ShiftTexts, folder: Path, calibrated: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Load the model of a seed and read the stream with one arm."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return read_stream(spec, spec.definitions[arm], order, model, calibrated, texts)
