"""One training of a study: a small model, one cure, one start, one seed.

The balanced start is the fresh model. In the collapsed start the norm before each MoE layer gets a constant component
along a unit vector u, all router rows are made orthogonal to u, and the rows of the first k experts then get a
component along u that gives them a lead of `offset_nats` on every token.

Shape letters: B sequences, S positions, E experts, D model width.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.compare.small_model import lr_at, new_model, optimizer_of, train_step
from thermoe.compare.study_spec import StudyArm, StudySpec
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.moe.stats import StatsAccumulator, routing_stats

#: Size of the constant component of the norm's output, in standard deviations of one coordinate.
_SHIFT = 4.0


@dataclass(frozen=True, slots=True)
class Trial:
    """What a worker is told.

    Args:
        spec: the study.
        arm: the way to train.
        start: balanced or collapsed.
        seed: of the weights, the order of the data and the noise.
    """

    spec: StudySpec
    arm: StudyArm
    start: str
    seed: int


@torch.no_grad()
def set_start(model: nn.Module, start: str, offset_nats: float, seed: int) -> None:
    """Put a fresh `moe` frame into a balanced or collapsed start; see the module."""
    if start == "balanced":
        return
    generator = torch.Generator().manual_seed(seed)
    for block in model.transformer.h:  # type: ignore[union-attr]
        router = block.mlp.router
        direction = torch.randn(router.hidden_size, generator=generator)
        direction = direction / direction.norm()
        block.ln_2.bias += _SHIFT * direction
        router.weight -= (router.weight @ direction).unsqueeze(-1) * direction
        router.weight[: router.top_k] += offset_nats / _SHIFT * direction


def run_trial(trial: Trial, train: Tensor, heldout: Tensor) -> list[dict[str, Any]]:
    """Train and return a row per validation; the last one is the result.

    Args:
        trial: what to train.
        train: int64 (R, S), training rows.
        heldout: int64 (R', S), held-out rows.
    """
    spec, arm = trial.spec, trial.arm
    torch.manual_seed(trial.seed)
    model = new_model(spec, trial.seed, router=arm.router, router_options=arm.options)
    set_start(model, trial.start, spec.offset_nats, trial.seed)
    optimizer = optimizer_of(model, spec)
    generator = torch.Generator().manual_seed(trial.seed)
    rows = [{"step": 0, "tokens": 0, **evaluate(model, heldout, spec.batch_size), "train_loss": None}]
    rows[0]["effective_experts_training"] = None
    spent_s = 0.0
    for step in range(1, spec.steps + 1):
        begun = time.perf_counter()
        batch = train[torch.randint(0, train.shape[0], (spec.batch_size,), generator=generator)]
        loss = train_step(model, optimizer, batch, arm.balance, lr_at(step - 1, spec))
        spent_s += time.perf_counter() - begun
        if step % spec.eval_every == 0 or step == spec.steps:
            in_training = [routing_stats(decision) for decision in collect_routing(model).values()]
            row = {"step": step, "tokens": step * batch.numel(), **evaluate(model, heldout, spec.batch_size)}
            row["train_loss"] = loss
            row["effective_experts_training"] = min(s.effective_experts for s in in_training if s is not None)
            row["tokens_per_s"] = step * batch.numel() / spent_s
            rows.append(row)
            if not math.isfinite(loss):
                break
    return rows


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor, batch_size: int) -> dict[str, Any]:
    """Return held-out loss and routing statistics, with the routing of evaluation (noise off)."""
    model.eval()
    sums = [StatsAccumulator() for _ in moe_layers(model)]
    total = 0.0
    for batch in rows.split(batch_size):
        total += float(model(batch, labels=batch).loss) * batch.shape[0]
        for accumulator, decision in zip(sums, collect_routing(model).values(), strict=True):
            accumulator.add(decision)
    stats = [found for accumulator in sums if (found := accumulator.result()) is not None]
    dead = [s.dead_experts for s in stats]
    return {
        "nll": total / rows.shape[0],
        "effective_experts": min(s.effective_experts for s in stats),
        "max_vio": max(s.max_vio for s in stats),
        "dead_experts": None if None in dead else sum(d for d in dead if d is not None),
        "token_entropy": sum(s.token_entropy for s in stats) / len(stats),
        "load": [[round(share, 5) for share in s.load] for s in stats],
    }
