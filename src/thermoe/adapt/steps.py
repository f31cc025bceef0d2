"""What ran between two steps of a session: forwards as their routers saw them, counted late, and windows of a sensor.

A hook keeps references to the decisions of a forward and, on a GPU, an event behind its work; nothing is read and
nothing waits. Counting happens in `ForwardLog.take`, in one read for all forwards since the last. `EnergyWindows` joins
these counts with what the sampler saw in the background: tokens and modelled joules are taken over the very span
between two counter readings, and the joules of a span with both phases are split in proportion to the modelled ones.

Shape letters: F forwards, L routed layers, E experts, K slots, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.readings import ControlReading
from thermoe.energy.cost_table import CostTable
from thermoe.moe.decision import RoutingDecision
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.window import EnergyWindow, Mark

#: Rows of forwards that are held by reference; beyond, counts are formed on the device and the references let go.
HELD_ROWS = 32_768
#: A span this much shorter than a window still is one: readings follow the counter's steps by some milliseconds.
SHORT_FRAC = 0.05
#: Without a reading for so many windows, a window is closed without one.
OVERDUE_WINDOWS = 1.5


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """One forward as the routers saw it: references, nothing read.

    Args:
        phase: "decode" when each sequence contributed one position.
        batch_size: sequences.
        rows: rows that are held, padding included.
        decisions: one per routed module; ``None`` where a module did not run.
        kept_frac: share of the forward's rows that is held.
    """

    phase: Phase
    batch_size: int
    rows: int
    decisions: tuple[RoutingDecision | None, ...]
    kept_frac: float = 1.0

    @classmethod
    def of(cls, decisions: Iterable[RoutingDecision | None], shape: tuple[int, int] | None) -> Forward | None:
        """Return the forward of ``decisions``; ``None`` when no module ran.

        Args:
            decisions: of the routed modules.
            shape: (sequences, positions) of the call; one sequence where it is not known or does not fit.
        """
        held = tuple(None if d is None else d.detach() for d in decisions)
        rows = max((d.expert_index.shape[0] for d in held if d is not None), default=0)
        if not rows:
            return None
        batch, length = shape if shape is not None and shape[0] * shape[1] == rows else (1, rows)
        return cls("decode" if length == 1 else "prefill", batch, rows, held)

    @property
    def device(self) -> torch.device:
        """Where the decision of the first module that ran is."""
        return next(d.expert_index.device for d in self.decisions if d is not None)

    def tail(self, rows: int) -> Forward:
        """Return a copy of the last whole sequences that fit into ``rows``, or of the end of the last one."""
        length = self.rows // self.batch_size
        batch = max(1, rows // length)
        kept = min(rows, batch * length)
        copies = tuple(None if d is None else _last(d, kept) for d in self.decisions)
        return replace(self, batch_size=batch, rows=kept, decisions=copies, kept_frac=self.kept_frac * kept / self.rows)


def _last(decision: RoutingDecision, rows: int) -> RoutingDecision:
    mask = decision.padding_mask
    return replace(
        decision,
        logits=decision.logits[-rows:].clone(),
        probabilities=decision.probabilities[-rows:].clone(),
        expert_index=decision.expert_index[-rows:].clone(),
        weights=decision.weights[-rows:].clone(),
        padding_mask=None if mask is None else mask[-rows:].clone(),
    )


@dataclass(frozen=True, slots=True)
class HostMark:
    """The end of a forward on a device that works while the host waits."""

    t_s: float

    def time_s(self) -> float:
        """Return it."""
        return self.t_s


@dataclass(frozen=True, slots=True, eq=False)
class ForwardCount:
    """One forward, counted.

    Args:
        phase: of the forward.
        tokens: real tokens.
        finished_s: when the device had done it, on the meter's clock.
        pairs: float32 (L, E), tokens per expert; 0 in a layer that did not run.
        layers: layers that ran.
        energy_j: modelled joules.
    """

    phase: Phase
    tokens: int
    finished_s: float
    pairs: Tensor
    layers: int
    energy_j: float


class ForwardLog:
    """Holds forwards until they are counted.

    Args:
        table: the joules of work.
        layers: L.
    """

    def __init__(self, table: CostTable, layers: int) -> None:
        self._table = table
        self._shape = layers, table.pair_j.shape[-1]
        self._held: list[tuple[int, Forward, Mark]] = []
        self._held_rows = 0
        self._noted = 0
        # Counts on the device: (places and marks of F forwards, float32 (F, 1 + L * E) with their tokens in front).
        self._folded: list[tuple[list[tuple[int, Phase, Mark, int]], Tensor]] = []

    def add(self, forward: Forward, mark: Mark) -> None:
        """Note a forward; reads nothing."""
        self._held.append((self._noted, forward, mark))
        self._noted += 1
        self._held_rows += forward.rows
        if self._held_rows > HELD_ROWS:
            self._fold()

    @property
    def phases(self) -> set[Phase]:
        """The phases of the forwards not yet counted."""
        folded = {phase for marks, _ in self._folded for _, phase, _, _ in marks}
        return folded | {forward.phase for _, forward, _ in self._held}

    def __len__(self) -> int:
        return len(self._held) + sum(len(marks) for marks, _ in self._folded)

    @torch.no_grad()
    def _fold(self) -> None:
        """Form the counts of all forwards held, on the device: those of one shape together."""
        alike: dict[Any, list[tuple[int, Forward, Mark]]] = defaultdict(list)
        for entry in self._held:
            decisions = entry[1].decisions
            kind = tuple(None if d is None else (d.expert_index.shape, d.expert_index.device) for d in decisions)
            alike[kind].append(entry)
        for entries in alike.values():
            forwards = [forward for _, forward, _ in entries]
            layers = sum(decision is not None for decision in forwards[0].decisions)
            marks = [(place, forward.phase, mark, layers) for place, forward, mark in entries]
            self._folded.append((marks, self._count(forwards)))
        self._held, self._held_rows = [], 0

    def _count(self, forwards: Sequence[Forward]) -> Tensor:
        device = forwards[0].device
        counts = torch.zeros(len(forwards), *self._shape, device=device)
        for layer, decision in enumerate(forwards[0].decisions):
            if decision is None:
                continue
            chosen = [f.decisions[layer] for f in forwards]
            index = torch.stack([d.expert_index for d in chosen if d is not None]).flatten(1)
            experts = decision.num_experts  # zero-compute experts and empty slots fall into one more column
            per_expert = torch.zeros(len(forwards), experts + 1, device=index.device)
            per_expert.scatter_add_(1, index.clamp(max=experts), torch.ones_like(index, dtype=torch.float32))
            counts[:, layer, :experts] = per_expert[:, :experts].to(device)
        tokens = torch.full((len(forwards),), float(forwards[0].rows), device=device)
        masks = [next(d for d in f.decisions if d is not None).padding_mask for f in forwards]
        if any(mask is not None for mask in masks):
            tokens = torch.stack([t if m is None else m.sum() for t, m in zip(tokens.unbind(), masks, strict=True)])
        return torch.cat([tokens.unsqueeze(1).float(), counts.flatten(1)], 1)

    def take(self) -> list[ForwardCount]:
        """Return the counts of all forwards since the last call, in order; waits for the device."""
        self._fold()
        found: list[tuple[int, ForwardCount]] = []
        for marks, counts in self._folded:
            read = counts.cpu()
            tokens, pairs = read[:, 0], read[:, 1:].unflatten(1, self._shape)
            joules = self._table.joules(tokens, pairs, (pairs > 0).float()).tolist()
            for row, (place, phase, mark, layers) in enumerate(marks):
                count = ForwardCount(phase, int(tokens[row]), mark.time_s(), pairs[row], layers, joules[row])
                found.append((place, count))
        self._folded = []
        return [count for _, count in sorted(found, key=lambda pair: pair[0])]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseWindow:
    """The part of one phase in a window of the sensor.

    Attributes:
        phase: of the work.
        t_s: when the window ended.
        tokens: of this phase, between the two readings.
        modelled_j: joules the model gives them.
        measured_j: their share of the window's joules; ``None`` when not measured.
        age_s: age of the newest reading when the window was closed.
        window: all that was measured.
    """

    phase: Phase
    t_s: float
    tokens: float
    modelled_j: float
    measured_j: float | None
    age_s: float
    window: EnergyWindow

    @property
    def j_per_token(self) -> float | None:
        """Measured joules per token of this phase."""
        return None if self.measured_j is None else self.measured_j / self.tokens

    def reading(self) -> ControlReading:
        """Return what the controller gets of it."""
        window, status = self.window, self.window.status
        if status == "invalid":  # a number that is missing is waited for; one that cannot be true is not
            status = "invalid" if "counter_reset" in window.flags else "flagged"
        return ControlReading(
            phase=self.phase,
            t_s=self.t_s,
            window_s=window.duration_s,
            tokens=self.tokens,
            j_per_token=self.j_per_token,
            rel_sd=window.energy_rel_sd,
            power_w=window.power_w,
            temp_c=window.temp_end_c,
            age_s=self.age_s,
            status=status,
            reason=window.reason,
            cost_j=self.modelled_j / self.tokens,
        )

    def as_row(self) -> dict[str, Any]:
        """Return it as plain numbers with their units."""
        return {
            "t_s": self.t_s,
            "phase": self.phase,
            "tokens": self.tokens,
            "j_per_token_measured": self.j_per_token,
            "j_per_token_modelled": self.modelled_j / self.tokens,
            "power_w": self.window.power_w,
            "temp_c": self.window.temp_end_c,
            "window_s": self.window.duration_s,
            "provenance": self.window.provenance,
            "reason": self.window.reason,
        }


def modelled_reading(
    phase: Phase, counts: Iterable[ForwardCount], *, t_s: float, window_s: float, reason: str
) -> ControlReading:
    """Return what the controller gets of a phase where the model stands in for a sensor."""
    own = [count for count in counts if count.phase == phase]
    tokens, spent_j = sum(count.tokens for count in own), sum(count.energy_j for count in own)
    return ControlReading(
        phase=phase,
        t_s=t_s,
        window_s=window_s,
        tokens=tokens,
        status="modelled",
        reason=reason,
        cost_j=spent_j / tokens if tokens else None,
    )


class EnergyWindows:
    """Closes windows on readings that the sampler took in the background; nothing is read from the sensor here.

    Args:
        meter: an open meter.
        window_s: shortest window, in seconds; at least two periods of the sampler.
    """

    def __init__(self, meter: EnergyMeter, window_s: float) -> None:
        self._meter = meter
        self.window_s = window_s if meter.sampler is None else max(window_s, 2 * meter.sampler.period_s)
        now_s = meter.clock.now_s()
        self._from_s = self._newest_s = now_s
        self._began_at = meter.clock.wall_s()
        #: (finished, phase, tokens, joules), and before the first the moment its work began.
        self._work: list[tuple[float, Phase, float, float]] = [(now_s, PHASES[0], 0.0, 0.0)]

    def add(self, counts: Iterable[ForwardCount]) -> None:
        """Note work that was done."""
        for count in counts:
            finished_s = max(count.finished_s, self._work[-1][0])
            self._work.append((finished_s, count.phase, float(count.tokens), count.energy_j))

    def close(self, *, last: bool = False) -> list[PhaseWindow]:
        """Return the window that has become due, one part per phase that worked in it; nothing when none has.

        Args:
            last: close what there is, however short; below ten steps of the counter it has no joules.
        """
        clock = self._meter.clock
        now_s = clock.now_s()
        started, ended = self._meter.sampled_edges(self._from_s, now_s)
        used = [d.uuid for d in self._meter.devices if d.kind == "gpu"] or list(started)
        span_s = min((ended[uuid].t_s - started[uuid].t_s for uuid in used), default=0.0)
        due = span_s >= (1 - SHORT_FRAC) * self.window_s or (last and span_s > 0)
        if not due and now_s - self._from_s < OVERDUE_WINDOWS * self.window_s:
            return []
        if due:
            self._newest_s = max(ended[uuid].sample.t_s for uuid in used)
        bounds = [(self._from_s, now_s)]

        def tokens(start_s: float, end_s: float) -> float:
            bounds.append((start_s, end_s))
            return sum(self._done(phase, start_s, end_s)[0] for phase in PHASES)

        window = self._meter.close_window(
            "session",
            edges="sampled",
            started=started,
            ended=ended,
            duration_s=now_s - self._from_s,
            started_at=self._began_at,
            tokens=tokens,
            flags=frozenset(),
            reason=None if due else "the sensor gave no new readings",
        )
        start_s, end_s = bounds[-1] if due else bounds[0]
        found = self._split(window, start_s, end_s, now_s - self._newest_s)
        # The next window begins with the reading that ended this one.
        self._from_s = min(ended[uuid].sample.t_s for uuid in used) - 1e-6 if due else now_s
        self._began_at = clock.wall_s()
        done = sum(finished_s <= end_s for finished_s, *_ in self._work)
        self._work = self._work[max(0, done - 1) :]
        return found

    def _split(self, window: EnergyWindow, start_s: float, end_s: float, age_s: float) -> list[PhaseWindow]:
        parts = {phase: self._done(phase, start_s, end_s) for phase in PHASES}
        total_j = sum(joules for _, joules in parts.values())
        return [
            PhaseWindow(
                phase=phase,
                t_s=end_s,
                tokens=tokens,
                modelled_j=joules,
                measured_j=None if window.energy_j is None else window.energy_j * joules / total_j,
                age_s=age_s,
                window=window,
            )
            for phase, (tokens, joules) in parts.items()
            if tokens > 0 and joules > 0
        ]

    def _done(self, phase: Phase, start_s: float, end_s: float) -> tuple[float, float]:
        """Return (tokens, modelled joules) of a phase between two moments, a forward under way in proportion."""
        tokens = joules = 0.0
        before_s = self._work[0][0]
        for finished_s, of, some, spent_j in self._work[1:]:
            overlap_s = min(finished_s, end_s) - max(before_s, start_s)
            if finished_s > before_s:
                share = max(0.0, overlap_s) / (finished_s - before_s)
            else:
                share = float(start_s < finished_s <= end_s)
            if of == phase:
                tokens, joules = tokens + share * some, joules + share * spent_j
            before_s = finished_s
        return tokens, joules
