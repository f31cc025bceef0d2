"""Reads batches for an adapter: scores, learns, judges.

Shape letters: B sequences, S positions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thermoe.adapt.adapter_settings import chosen_layers
from thermoe.adapt.judging import SHADOW_TOKENS, Judged, Known, judge_update, shadow
from thermoe.adapt.learning_bucket import Cadence
from thermoe.adapt.learning_parts import choices, of_rows
from thermoe.adapt.learning_report import AdaptStep
from thermoe.adapt.objectives import LearnBatch
from thermoe.adapt.plan import Plan, plan, shadow_bound_j
from thermoe.adapt.reading import (
    Batch,
    HeldRows,
    HeldText,
    RouterInput,
    hold_back,
    inside_percentiles,
    record_inputs,
    rows_interact,
    some_rows,
    token_nll,
)
from thermoe.adapt.safeguards import CHEAP_FRAC, COOL_DOWN, OFTEN, REJECTS_TO_REST, Paired, cusum
from thermoe.adapt.stream_state import Learned, StreamState
from thermoe.adapt.streams import Streams
from thermoe.adapt.text_memory import profile
from thermoe.adapt.update import Live, Outcome, Part, Parts, update


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSettings:
    """How batches are read; see `RouterAdapter`."""

    lr: float
    layers: str | Sequence[int | str]
    percentiles: tuple[float, float] | None
    held_frac: float
    min_gain_per_j: float | None
    steps: int
    learn_on: str
    by_text: bool
    seed: int


@dataclass(frozen=True, slots=True, eq=False)
class _Scored:
    """A batch with its scores: nll (B, S - 1) with or without a graph, and masks on its device."""

    batch: Batch
    nll: Tensor
    real: Tensor
    counted: Tensor
    weights: Tensor
    seen: Mapping[str, RouterInput]
    sequence_nll: Tensor
    tokens: Tensor
    served_j: float

    def step(self, reason: str | None, verdict: str = "skipped") -> AdaptStep:
        """Return the record of a batch that changed nothing."""
        return AdaptStep(self.sequence_nll, False, reason, 0.0, self.tokens, verdict)  # type: ignore[arg-type]


class Learner:
    """Scores and learns, one batch at a time, with the state of one stream at a time.

    Args:
        live: fast weights, optimiser, objective, account and safeguards.
        settings: how batches are read.

    Attributes:
        streams: what was learned of which text.
    """

    def __init__(self, live: Live, settings: ReadSettings) -> None:
        self.live, self.settings = live, settings
        self.streams = Streams(live, settings.lr, self._new_state)
        self._start_j = 0.0

    @property
    def state(self) -> StreamState:
        """State of the present text of the present stream."""
        return self.streams.present.state

    def _new_state(self) -> StreamState:
        held = HeldText(self.live.safeguards.judge_tokens_most)
        return StreamState(held, Cadence(self.settings.min_gain_per_j))

    # -- one batch -----------------------------------------------------------------------------------------------------

    def score(self, batch: Batch, reason: str) -> AdaptStep:
        """Score a batch and change nothing, not even a counter."""
        with torch.no_grad():
            nll, _ = token_nll(self.live.model, batch.input_ids, batch.mask)
        return self._scored(batch, nll, torch.zeros_like(batch.real), batch.weights, {}).step(reason)

    def read(self, batch: Batch) -> AdaptStep:
        """Score a batch, then learn from it where that is due and paid for."""
        undo = self.streams.turn_to(profile(batch.input_ids, batch.mask)) if self.settings.by_text else None
        live, state, ledger = self.live, self.state, self.live.account.ledger
        live.forwards.begin()
        state.batches += 1
        state.held.move_to(batch.input_ids.device)
        self._start_j = ledger.energy_j
        step = self._read(batch, undo)
        learning_j = ledger.energy_j - self._start_j
        state.waiting_j += learning_j
        state.skipped += step.verdict == "skipped"
        return replace(
            step,
            learning_j=learning_j,
            provenance=live.account.costs.provenance,
            stream=self.streams.name,
            text=self.streams.present.at,
        )

    def _read(self, batch: Batch, undo: Callable[[], None] | None) -> AdaptStep:
        live, state, bucket = self.live, self.state, self.live.account.bucket
        held = hold_back(batch, self.settings.held_frac, self._seed("held"))
        weights, counted = batch.weights.masked_fill(held, 0), held & (batch.weights > 0)
        planned = plan(live, state, batch, weights, counted, self.settings.steps, self._seed("parts"))
        learns = planned.why_not is None
        try:
            with (
                torch.set_grad_enabled(learns and live.objective.needs_graph and planned.parts is None),
                record_inputs(live.fast if learns else {}, standardise=not state.standardised) as seen,
            ):
                nll, vocabulary = token_nll(live.model, batch.input_ids, batch.mask)
        except BaseException:  # a sequence too long, say, or no memory: the batch was never read
            state.batches -= 1
            if undo is not None:
                undo()
            raise
        state.standardised = state.standardised or learns
        scored = self._scored(batch, nll, counted, weights, seen)
        if bucket.earns_scoring:
            bucket.earn(scored.served_j)
        predicted = int(scored.tokens.sum())
        state.waiting_tokens += predicted
        mean_nll = float(scored.sequence_nll.double().sum()) / predicted
        if not math.isfinite(mean_nll):
            return self._reset(scored, "the loss is not finite")
        guessing = math.log(vocabulary)
        changed = mean_nll < guessing and state.cadence.note_score(mean_nll)
        if changed:  # what was found out on other text says little of this one
            state.held.first, state.cool_until, state.rejects_in_row = state.batches, 0, 0
        if bool(scored.counted.any()):
            # Text that is read no better than by guessing is no evidence of anything.
            evidence = float(nll.detach()[scored.counted].mean()) < guessing
            state.held.add(HeldRows.of(state.batches, batch, scored.counted, evidence=evidence))
        found = self._shadow(scored, changed)
        if found is not None and found[1]:
            state.cadence.note_shift("the trained routers had become the better ones")
            return replace(self._reset(scored, f"the trained routers are better: {found[0]}"), shadow=found[0])
        step = self._learn(scored, planned) if planned.why_not is None else scored.step(planned.why_not)
        return step if found is None else replace(step, shadow=found[0])

    def _scored(
        self, batch: Batch, nll: Tensor, counted: Tensor, weights: Tensor, seen: Mapping[str, RouterInput]
    ) -> _Scored:
        served_j = self.live.account.costs.last_forward_j(batch.tokens)
        real, counted, weights = (value.to(nll.device) for value in (batch.real, counted, weights))
        flat = nll.detach() if batch.mask is None else torch.where(real, nll.detach(), 0)
        if self.settings.percentiles is not None:
            weights = inside_percentiles(nll.detach(), weights, *self.settings.percentiles)
        return _Scored(batch, nll, real, counted, weights, seen, flat.sum(-1), real.sum(-1), served_j)

    # -- learning ------------------------------------------------------------------------------------------------------

    def _seed(self, use: str) -> str:
        streams = self.streams
        return f"{self.settings.seed}/{streams.name}/{streams.present.at}/{self.state.batches}/{use}"

    def _learn(self, scored: _Scored, planned: Plan) -> AdaptStep:
        live, state, batch = self.live, self.state, scored.batch
        since_s, known, first = live.account.ledger.clock.now_s(), {}, state.base is None
        if first:
            state.base, state.base_batch = Learned.of(live.fast, live.optimizer, live.objective), state.batches - 1
            if not rows_interact(live.routers()):  # else the rows to be judged were scored with others beside them
                known = {state.batches: scored.nll.detach()[scored.counted]}
        if state.layers is None:
            state.layers = chosen_layers(self.settings.layers, live.fast, scored.seen)
        paid: list[tuple[int, Tensor]] = []
        given = self._whole(scored) if planned.parts is None else self._given(scored, planned.parts, paid)
        before = state.base if first else Learned.of(live.fast, live.optimizer, live.objective)
        assert before is not None
        try:
            outcome = update(live, state, given, scored.seen, scored.counted, scored.real)
        except BaseException:  # memory that ran out between two parts, say: what they taught goes, what they took stays
            before.restore(live.fast, live.optimizer, live.objective)
            state.base = None if first else state.base
            if paid:
                live.account.spend("update", batch.tokens, 2 * live.account.costs.joules(paid), since_s)
            raise
        if live.objective.needs_graph:  # a backward to the activations costs as much as the forward did
            joules = scored.served_j if planned.parts is None else 2 * live.account.costs.joules(paid)
            live.account.spend("update", batch.tokens, joules, since_s)
        if outcome.broken:
            return self._reset(scored, outcome.reason or "")
        if not outcome.moved:
            if first and not outcome.collected:
                state.base = None
            return scored.step(outcome.reason, "collected" if outcome.collected else "skipped")
        state.updates += 1
        state.update_batch = state.batches
        return self._follow(self._verdict(known, planned.judges), scored, outcome)

    def _all_of(self, scored: _Scored) -> LearnBatch:
        batch, state = scored.batch, self.state
        return LearnBatch(
            self.live.model,
            {name: self.live.fast[name] for name in state.layers or ()},
            batch.input_ids,
            batch.mask,
            scored.nll,
            scored.weights,
            zlib.crc32(self._seed("objective").encode()),
            self.live.account,
        )

    def _whole(self, scored: _Scored) -> Parts:
        """Yield the whole batch as one part, with the graph of the forward that scored it."""
        batch = self._all_of(scored)
        yield Part(self.live.objective.learn(batch), batch.weights, scored.seen)

    def _given(self, scored: _Scored, parts: Sequence[Sequence[int]], paid: list[tuple[int, Tensor]]) -> Parts:
        """Yield the parts of a batch, each read when it is its turn; note the work of their forwards in ``paid``."""
        live, batch, whole = self.live, scored.batch, self._all_of(scored)
        chosen, learn_on = None, self.settings.learn_on
        turn = self.state.batches if len(parts) == 1 else 0
        if rows_interact(live.routers()):
            chosen = choices(live.model, (batch.input_ids.shape[0], batch.input_ids.shape[1]))
        for number, members in enumerate(parts):
            rows = torch.tensor(members, device=batch.input_ids.device)
            weights = scored.weights[rows.to(scored.weights.device)]
            if self.settings.percentiles is not None and not bool((weights > 0).any()):
                continue  # percentiles, which are known only now, left nothing of it
            free = learn_on == "unsteered" or (learn_on == "both" and (number + turn) % 2 == 1)
            ids = batch.input_ids[rows]
            mask = None if batch.mask is None else batch.mask[rows]
            tokens = ids.numel() if mask is None else int(mask.sum())
            part = replace(whole, input_ids=ids, attention_mask=mask, weights=weights)
            with live.account.aside(tokens) as cost:
                proposal, seen = live.forwards.learn(part, None if chosen is None else of_rows(chosen, rows), free=free)
                cost.counts = live.forwards.counts
            paid += cost.forwards
            yield Part(proposal, weights, seen)

    def _verdict(self, known: Known, judges: bool) -> Judged:
        state, guards = self.state, self.live.safeguards
        if not guards.judge:
            return Judged("accepted", "nothing is judged", None, None, None)
        held = sum(rows.tokens for rows in state.held.since(state.mark))
        enough = max(guards.judge_tokens, state.judge_at)
        if held < enough:
            return Judged("deferred", f"{held} of {enough} held-back tokens for a verdict", None, None, None)
        if not judges:
            return Judged("deferred", "a verdict costs too much yet for what it is about", None, None, None)
        judged = judge_update(self.live, state, known)
        # What could not be told is asked again when there is clearly more to tell it by.
        state.judge_at = min(2 * enough, guards.judge_tokens_most) if judged.verdict == "deferred" else 0
        return judged

    def _follow(self, judged: Judged, scored: _Scored, outcome: Outcome) -> AdaptStep:
        """Do what the verdict asks for."""
        live, state = self.live, self.state
        live.account.ledger.note_verdict(judged.verdict)
        reason = None if judged.verdict == "accepted" else judged.reason
        step = replace(
            scored.step(reason, judged.verdict),
            learned=judged.verdict != "rejected",
            change_norm=0.0 if judged.verdict == "rejected" else outcome.change_norm,
            judged=judged.paired,
            cost_ratio=judged.cost_ratio,
            kl=outcome.kl,
        )
        if judged.verdict == "deferred":
            state.deferred += 1
            return step
        gain = 0.0
        if judged.verdict == "accepted":
            state.accepted += 1
            state.rejects_in_row = 0
            gain = 0.0 if judged.paired is None else max(0.0, -judged.paired.mean) * state.waiting_tokens
        else:
            assert state.base is not None
            state.rejected += 1
            state.rejects_in_row += 1
            state.base.restore(live.fast, live.optimizer, live.objective)
            live.optimizer.lr /= 2
            state.last_move = None
            step = replace(step, kl=None, reason=f"undone: {judged.reason}")
        here_j = live.account.ledger.energy_j - self._start_j
        if judged.paired is not None:
            state.cadence.note_verdict(gain, state.waiting_j + here_j)
        state.waiting_j, state.waiting_tokens, state.base = -here_j, 0, None
        if state.rejects_in_row >= REJECTS_TO_REST:
            # What was rejected is undone already. What was accepted before goes on paying, and whether it does is for
            # the shadow to say: a reset here threw 0.15 nats per token away on interleaved text.
            state.rejects_in_row, state.cool_until = 0, state.batches + COOL_DOWN
            reason = f"{step.reason}; {REJECTS_TO_REST} in a row: no update for {COOL_DOWN} batches"
            step = replace(step, reason=reason)
        return step

    def _shadow(self, scored: _Scored, changed: bool) -> tuple[Paired | None, bool] | None:
        """Score the trained routers beside the adapted ones where that is due; return what was found, and the alarm."""
        live, state, guards = self.live, self.state, self.live.safeguards
        bucket, batch = live.account.bucket, scored.batch
        often = min(OFTEN, guards.shadow_every)
        since = state.batches - state.shadow_batch
        if not guards.shadow or not (changed or since >= often) or not self.is_moved():
            return None
        most_j = shadow_bound_j(live, batch)
        cheap = bucket.frac is None or most_j <= CHEAP_FRAC * (bucket.level_j or 0.0)
        due = changed or cheap or state.cusum > 0 or since >= guards.shadow_every
        if not due or not bucket.allows(most_j):
            return None
        counted = scored.real
        if not rows_interact(live.routers()):  # else the whole batch has to run as it was scored, and all of it judges
            chosen = some_rows(batch, SHADOW_TOKENS, self._seed("shadow"))
            counted = counted & chosen.to(counted.device).unsqueeze(-1)
        found = shadow(live, HeldRows.of(state.batches, batch, counted, evidence=True), scored.nll.detach()[counted])
        state.shadows += 1
        state.shadow_batch, state.shadow_nats = state.batches, None if found is None else found.mean
        state.cusum, alarm = cusum(state.cusum, found)
        return found, alarm

    def is_moved(self) -> bool:
        """Whether any fast weight is not 0."""
        return any(bool(p.detach().any()) for fast in self.live.fast.values() for p in fast.parameters())

    def _reset(self, scored: _Scored, reason: str) -> AdaptStep:
        self.streams.reset_text()
        self.state.resets += 1
        return scored.step(f"{reason}; the fast weights were reset", "reset")
