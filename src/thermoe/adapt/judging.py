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
from thermoe.adapt.reading import HeldRows, rows_interact
from thermoe.adapt.safeguards import NOISY_SE, Paired, Safeguards, Verdict, judge
from thermoe.adapt.stream_state import Learned, StreamState, copy_of, write
from thermoe.adapt.update import Live
from thermoe.moe.layer import routed_modules
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights

#: Tokens of a batch on which the shadow looks at both routers.
SHADOW_TOKENS = 1024
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
def held_nll(live: Live, rows: Sequence[HeldRows], kind: LearningKind) -> tuple[list[Tensor], float]:
    """Return the nats (N,) of the tokens that count, for each of ``rows``, and the modelled joules of the forwards."""
    found: list[Tensor | None] = [None] * len(rows)
    energy_j = 0.0
    for places in _shared(live, rows):
        ids = torch.cat([rows[i].input_ids for i in places])
        masks = [rows[i].mask for i in places]
        mask = None
        if any(one is not None for one in masks):
            mask = torch.cat(
                [torch.ones_like(rows[i].input_ids).bool() if (m := rows[i].mask) is None else m for i in places]
            )
        with live.account.forward(kind, sum(rows[i].forward_tokens for i in places)) as paid:
            nll = live.forwards.nll(ids, mask)
            paid.counts = live.forwards.counts
        assert paid.energy_j is not None
        energy_j += paid.energy_j
        for i, part in zip(places, nll.split([len(rows[i].input_ids) for i in places]), strict=True):
            found[i] = part[rows[i].counted.to(nll.device)].detach()
    return [one for one in found if one is not None], energy_j


def _shared(live: Live, rows: Sequence[HeldRows]) -> list[list[int]]:
    """Return which of ``rows`` share a forward: all of one length, for that opens every expert once.

    Where sequences that are routed together interact, no more of them than a batch that is served has. They stand for
    the batches that they come from: as many of the same text, from which as many experts are opened.
    """
    interact = rows_interact(live.routers())
    groups: dict[int, list[list[int]]] = {}
    for place, one in enumerate(rows):
        of_length = groups.setdefault(one.input_ids.shape[1], [[]])
        most = max(one.together, *(rows[i].together for i in of_length[-1])) if of_length[-1] else one.together
        if interact and sum(rows[i].rows for i in of_length[-1]) + one.rows > most and of_length[-1]:
            of_length.append([])
        of_length[-1].append(place)
    return [places for of_length in groups.values() for places in of_length]


def forwards_bound_j(live: Live, rows: Sequence[HeldRows], states: int) -> float:
    """Return the most joules that so many states can cost on these rows."""
    if not rows:
        return 0.0
    tokens = sum(one.forward_tokens for one in rows)
    return live.account.costs.bound_j(states * tokens, forwards=states * len(_shared(live, rows)))


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


#: By batch number, the nats of the counted tokens in the base state, where the same rows would be routed alike.
Known = Mapping[int, Tensor]


def judge_update(live: Live, state: StreamState, known: Known) -> Judged:
    """Compare the present fast weights with those of the base on held-back text.

    Args:
        live: the adapter's parts.
        state: of the stream; it has a base.
        known: what is known of the base state already.
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
        if more and live.account.bucket.allows(forwards_bound_j(live, more, 2)):
            sides += _differences(live, state.base, more, known)
            verdict, reason, pooled, old = _weigh(sides, fresh, wider, guards)
    ratio = sides.cost_ratio
    if verdict == "accepted" and ratio is not None and ratio > 1 + COST_TOLERANCE:
        verdict, reason = "rejected", f"it costs {100 * (ratio - 1):.1f} % more joules per token on held-back text"
    return Judged(verdict, reason, pooled, old, ratio)


@dataclass(frozen=True, slots=True, eq=False)
class _Sides:
    """Differences (N,) by batch number, after minus before, and joules of the rows on which both states ran."""

    differences: dict[int, Tensor]
    after_j: float
    before_j: float

    def __add__(self, other: _Sides) -> _Sides:
        together = self.differences | other.differences
        return _Sides(together, self.after_j + other.after_j, self.before_j + other.before_j)

    @property
    def cost_ratio(self) -> float | None:
        return self.after_j / self.before_j if self.before_j else None


def _differences(live: Live, base: Learned, rows: Sequence[HeldRows], known: Known) -> _Sides:
    old, new = [one for one in rows if one.batch not in known], [one for one in rows if one.batch in known]
    after_old, after_j = held_nll(live, old, "judge")
    after_new, _ = held_nll(live, new, "judge")
    with in_state(live, base):
        before, before_j = held_nll(live, old, "judge")
    found = {one.batch: a - b for one, a, b in zip(old, after_old, before, strict=True)}
    found |= {one.batch: a - known[one.batch] for one, a in zip(new, after_new, strict=True)}
    return _Sides(found, after_j, before_j)


def _weigh(
    sides: _Sides, fresh: Sequence[HeldRows], earlier: Sequence[HeldRows], guards: Safeguards
) -> tuple[Verdict, str, Paired | None, Paired | None]:
    old = [sides.differences[rows.batch] for rows in earlier]
    new = [sides.differences[rows.batch] for rows in fresh]
    pooled = Paired.of(torch.cat([*old, *new])) if old or new else None
    before = Paired.of(torch.cat(old)) if old else None
    verdict, reason = judge(pooled, before, enough=guards.judge_tokens, most=guards.judge_tokens_most)
    return verdict, reason, pooled, before


def shadow(live: Live, rows: HeldRows, known: Tensor) -> Paired | None:
    """Return how much worse the adapted routers are than the trained ones, in nats per token.

    Args:
        live: the adapter's parts, in the state that scored the batch.
        rows: of that batch; it was scored before anything was learned from it, so that all of it judges.
        known: the nats (N,) of their counted tokens when it was scored.
    """
    with without_fast(live.model, live.fast):
        trained = held_nll(live, [rows], "shadow")[0][0]
    return Paired.of(known - trained)
