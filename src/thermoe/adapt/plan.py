"""What to do with a batch before it is read: learn from it or not, in how many steps, and whether to judge then.

Without a cap on joules every batch is learned from in all its parts. With one, what is at hand is spent at once, on as
many parts as it pays for: steps on a part of each batch keep up with the text, and hear sooner when they went too far,
than all the steps of every fourth batch, and cost as much. A verdict costs as much as several steps, so that it waits
until it is about enough of them to be worth it.

Shape letters: B sequences, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thermoe.adapt.judging import SHADOW_TOKENS, forwards_bound_j, judge_rows
from thermoe.adapt.learning_parts import parts_of
from thermoe.adapt.reading import Batch, HeldRows, rows_interact
from thermoe.adapt.safeguards import REJECTS_TO_REST
from thermoe.adapt.stream_state import StreamState
from thermoe.adapt.update import Live

#: Under a cap, what is judged has cost at least so many times what the verdict may cost.
JUDGED_WORTH = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with a batch.

    Args:
        why_not: why nothing is learned from it, or ``None``.
        parts: sequences of each step; ``None`` is one step, with the graph of the forward that scores.
        judges: whether the update is judged at once, where there is text to judge it by.
    """

    why_not: str | None = None
    parts: list[list[int]] | None = None
    judges: bool = True


def plan(live: Live, state: StreamState, batch: Batch, weights: Tensor, counted: Tensor, steps: int, seed: str) -> Plan:
    """Return what to do with a batch.

    Args:
        live: the adapter's parts.
        state: of the text.
        batch: that comes.
        weights: float32 (B, S - 1), what is learned from; 0 where it is held back.
        counted: bool (B, S - 1), what is held back and counts.
        steps: most steps.
        seed: of the parts.
    """
    if not bool((weights > 0).any()):
        return Plan("every weight is 0: there is nothing to learn from")
    if state.batches <= state.cool_until:
        left = state.cool_until - state.batches + 1
        return Plan(f"cooling down after {REJECTS_TO_REST} rejections: {left} batches to go")
    due = 0 if state.update_batch is None else state.update_batch + state.cadence.interval
    if state.batches < due and state.chunk is None:
        return Plan(state.cadence.reason)
    parts: list[list[int]] | None = None
    if live.objective.needs_graph and not live.min_tokens and steps > 1:
        parts = parts_of(weights, steps, seed)
        parts = parts if len(parts) > 1 else None
    judge_j = _judge_bound_j(live, state, batch, weights, counted)
    return _within(live, state, batch, parts, judge_j)


def shadow_bound_j(live: Live, batch: Batch) -> float:
    """Return the most joules of a look at what the trained routers would have scored."""
    rows, length = batch.input_ids.shape
    if not rows_interact(live.routers()):
        rows = min(rows, -(-SHADOW_TOKENS // (length - 1)))
    return live.account.costs.bound_j(rows * length)


def _judge_bound_j(live: Live, state: StreamState, batch: Batch, weights: Tensor, counted: Tensor) -> float:
    """Return the most joules of a verdict after this batch; 0 where there will be none."""
    guards = live.safeguards
    collected = 0 if state.chunk is None else state.chunk[2]
    if not guards.judge or (live.min_tokens and collected + int((weights > 0).sum()) < live.min_tokens):
        return 0.0
    fresh, earlier = judge_rows(state, guards)
    fresh = [*fresh, HeldRows.of(state.batches, batch, counted, evidence=True)]
    if sum(one.tokens for one in fresh) < max(guards.judge_tokens, state.judge_at):
        return 0.0
    if state.base is None and not rows_interact(live.routers()):
        # Of this batch the state before is known from its scores, so that it runs once, beside the others.
        return forwards_bound_j(live, fresh, 1) + forwards_bound_j(live, earlier, 2)
    return forwards_bound_j(live, [*fresh, *earlier], 2)


def _within(live: Live, state: StreamState, batch: Batch, parts: list[list[int]] | None, judge_j: float) -> Plan:
    """Return the largest plan that there is credit for."""
    bucket, costs = live.account.bucket, live.account.costs
    rows, length = batch.input_ids.shape
    if bucket.frac is None:
        return Plan(None, parts)
    # An update leaves enough for a look at what it led to.
    shadow_j, asked_j = (shadow_bound_j(live, batch) if live.safeguards.shadow else 0.0), 0.0
    for count in range(1 if parts is None else len(parts), 0, -1):
        if parts is None:
            update_j = live.objective.bound_j(costs, rows, length)
        else:
            update_j = 2 * costs.bound_j(sum(map(len, parts[:count])) * length, forwards=count)
        judges = max(0.0, state.waiting_j) + update_j >= JUDGED_WORTH * judge_j
        asked_j = update_j + (judge_j if judges else 0.0) + shadow_j
        if bucket.allows(asked_j):
            return Plan(None, None if parts is None else parts[:count], judges)
    return Plan(f"no credit: an update may cost {asked_j:.3g} J, and the bucket holds {bucket.level_j or 0:.3g} J")
