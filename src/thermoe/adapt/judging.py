"""The judge and the shadow: forwards over held-back text in two states of the routers, and what follows from them.

Both states run under the same routing policy at the same price, rows in the same groups, so that they differ in
nothing but the fast weights. Every forward here serves nobody and is paid from the bucket.

Shape letters: H rows, S positions, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thermoe.adapt.learning_work import LearningKind
from thermoe.adapt.reading import HeldRows, HeldText, token_nll
from thermoe.adapt.safeguards import NOISY_SE, Paired, Safeguards, Verdict, judge
from thermoe.adapt.stream_state import Learned, StreamState, copy_of, write
from thermoe.adapt.update import Live
from thermoe.moe.layer import routed_modules
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights

#: Tokens on which the shadow looks at both routers.
SHADOW_TOKENS = 512
#: Joules per token that an update may add on held-back text: states are compared at the same cost.
COST_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict on an update.

    Args:
        verdict: accepted, rejected or deferred.
        reason: in words.
        paired: after minus before, over all held-back tokens that are evidence; ``None`` when there are none.
        earlier: those among them from before what was learned from.
        cost_ratio: modelled joules of the judged forwards, after over before; ``None`` where only one state ran.
    """

    verdict: Verdict
    reason: str
    paired: Paired | None
    earlier: Paired | None
    cost_ratio: float | None


@contextmanager
def without_fast(model: nn.Module, fast: Mapping[str, FastWeights]) -> Iterator[None]:
    """Take fast weights off while the context is open: the trained routers, bit for bit."""
    taken = []
    for name, module in routed_modules(model):
        if name in fast and isinstance(module.router, Router) and module.router.fast is fast[name]:
            taken.append(name)
            module.router.fast = None
    try:
        yield
    finally:
        for name, module in routed_modules(model):  # the routers may have been swapped inside
            if name in taken and isinstance(module.router, Router):
                module.router.fast = fast[name]


@contextmanager
def in_state(live: Live, learned: Learned) -> Iterator[None]:
    """Run with the fast weights of another state while the context is open."""
    now = copy_of(live.fast)
    write(live.fast, learned.fast)
    try:
        yield
    finally:
        write(live.fast, now)


@torch.no_grad()
def held_nll(live: Live, rows: HeldRows, kind: LearningKind) -> tuple[Tensor, float]:
    """Return the nats (N,) of the tokens that count in ``rows``, and the modelled joules of the forward."""
    with live.account.forward(kind, rows.forward_tokens) as paid:
        nll, _ = token_nll(live.model, rows.input_ids, rows.mask)
    assert paid.energy_j is not None
    return nll[rows.counted.to(nll.device)].detach(), paid.energy_j


def judge_rows(state: StreamState, safeguards: Safeguards) -> tuple[list[HeldRows], list[HeldRows]]:
    """Return the rows that a verdict looks at now: the latest since the base, and the latest before it.

    No more of them than a verdict asks for: rows pile up while an update waits for credit, and if all were judged, what
    it may cost would grow as fast as the bucket fills.
    """
    enough, fresh, held = max(safeguards.judge_tokens, state.judge_at), [], 0
    for rows in reversed(state.held.since(state.mark)):
        if held >= enough:
            break
        fresh.append(rows)
        held += rows.tokens if rows.evidence else 0
    return fresh[::-1], state.held.before(state.mark, safeguards.judge_tokens)


def judge_bound_j(live: Live, fresh: Sequence[HeldRows], earlier: Sequence[HeldRows]) -> float:
    """Return the most joules that judging these rows can cost: two forwards for each."""
    rows = [*fresh, *earlier]
    if not rows:
        return 0.0
    return live.account.costs.bound_j(2 * sum(one.forward_tokens for one in rows), forwards=2 * len(rows))


def judge_update(live: Live, state: StreamState, known: Mapping[int, Tensor]) -> Judged:
    """Compare the present fast weights with those of the base on held-back text.

    Args:
        live: the adapter's parts.
        state: of the stream; it has a base.
        known: by batch number, the nats of the counted tokens in the base state, where they are known already.
    """
    assert state.base is not None
    guards = live.safeguards
    fresh, earlier = judge_rows(state, guards)
    fresh = [rows for rows in fresh if rows.evidence]
    sides = _differences(live, state.base, [*fresh, *earlier], known)
    verdict, reason, pooled, old = _weigh(sides, fresh, earlier, guards)
    noisy = pooled is not None and pooled.se is not None and pooled.se > NOISY_SE
    if verdict == "deferred" and noisy and guards.judge_tokens_most > guards.judge_tokens:
        wider = state.held.before(state.mark, guards.judge_tokens_most)
        more = [rows for rows in wider if rows not in earlier]
        if more and live.account.bucket.allows(judge_bound_j(live, [], more)):
            sides |= _differences(live, state.base, more, known)
            verdict, reason, pooled, old = _weigh(sides, fresh, wider, guards)
    both = [(after, before) for _, after, before in sides.values() if before is not None]
    ratio = sum(after for after, _ in both) / sum(before for _, before in both) if both else None
    if verdict == "accepted" and ratio is not None and ratio > 1 + COST_TOLERANCE:
        verdict, reason = "rejected", f"it costs {100 * (ratio - 1):.1f} % more joules per token on held-back text"
    return Judged(verdict, reason, pooled, old, ratio)


_Sides = dict[int, tuple[Tensor, float, float | None]]


def _differences(live: Live, base: Learned, rows: Sequence[HeldRows], known: Mapping[int, Tensor]) -> _Sides:
    """Return, by batch number, after minus before, joules after, and joules before where that ran."""
    after = {one.batch: held_nll(live, one, "judge") for one in rows}
    before: dict[int, tuple[Tensor, float]] = {}
    unknown = [one for one in rows if one.batch not in known]
    if unknown:
        with in_state(live, base):
            before = {one.batch: held_nll(live, one, "judge") for one in unknown}
    found: _Sides = {}
    for batch, (nll, energy_j) in after.items():
        if batch in before:
            found[batch] = nll - before[batch][0], energy_j, before[batch][1]
        else:
            found[batch] = nll - known[batch], energy_j, None
    return found


def _weigh(
    sides: _Sides, fresh: Sequence[HeldRows], earlier: Sequence[HeldRows], guards: Safeguards
) -> tuple[Verdict, str, Paired | None, Paired | None]:
    old = [sides[rows.batch][0] for rows in earlier]
    new = [sides[rows.batch][0] for rows in fresh]
    pooled = Paired.of(torch.cat([*old, *new])) if old or new else None
    before = Paired.of(torch.cat(old)) if old else None
    verdict, reason = judge(pooled, before, enough=guards.judge_tokens, most=guards.judge_tokens_most)
    return verdict, reason, pooled, before


def shadow_rows(held: HeldText) -> list[HeldRows]:
    """Return the rows of a shadow: the latest that are evidence, so many tokens; without any, the last."""
    if not held.rows:
        return []
    return held.before(held.rows[-1].batch, SHADOW_TOKENS) or [held.rows[-1]]


def shadow(live: Live, rows: Sequence[HeldRows]) -> Paired | None:
    """Return how much worse the adapted routers are than the trained ones, in nats per token."""
    adapted = [held_nll(live, one, "shadow")[0] for one in rows]
    with without_fast(live.model, live.fast):
        trained = [held_nll(live, one, "shadow")[0] for one in rows]
    return Paired.of(torch.cat(adapted) - torch.cat(trained)) if adapted else None
