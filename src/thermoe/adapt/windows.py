"""Windows of the sensor, joined with the work that was done in them.

`EnergyWindows` joins counts of forwards with what the sampler saw in the background: tokens and modelled joules are
taken over the very span between two counter readings, and the joules of a span with both phases are split in proportion
to the modelled ones. What was learned in a span is no phase: its joules fall on the tokens that were served.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.learning_work import LearningWork
from thermoe.adapt.readings import ControlReading
from thermoe.adapt.steps import ForwardCount
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.window import EnergyWindow

#: A span this much shorter than a window still is one: readings follow the counter's steps by some milliseconds.
SHORT_FRAC = 0.05
#: Without a reading for so many windows, a window is closed without one.
OVERDUE_WINDOWS = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseWindow:
    """The part of one phase in a window of the sensor.

    Attributes:
        phase: of the work.
        t_s: when the window ended.
        tokens: of this phase, between the two readings.
        modelled_j: joules the model gives their forwards.
        learning_j: their share of the modelled joules of learning in the window.
        measured_j: their share of the window's joules; ``None`` when not measured.
        age_s: age of the newest reading when the window was closed.
        window: all that was measured.
    """

    phase: Phase
    t_s: float
    tokens: float
    modelled_j: float
    learning_j: float
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
            cost_j=(self.modelled_j + self.learning_j) / self.tokens,
        )

    def as_row(self) -> dict[str, Any]:
        """Return it as plain numbers with their units."""
        return {
            "t_s": self.t_s,
            "phase": self.phase,
            "tokens": self.tokens,
            "j_per_token_measured": self.j_per_token,
            "j_per_token_modelled": (self.modelled_j + self.learning_j) / self.tokens,
            "j_per_token_routing": self.modelled_j / self.tokens,
            "power_w": self.window.power_w,
            "temp_c": self.window.temp_end_c,
            "window_s": self.window.duration_s,
            "provenance": self.window.provenance,
            "reason": self.window.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedWindow:
    """A window of the sensor, split over what was served in it.

    Learning is no part of its own: its joules are on the tokens that were served, and the parts add up to the window.

    Attributes:
        window: all that was measured.
        parts: one per phase that served tokens.
        learning_s: seconds of it in which something was learned.
        attributed_j: joules of the window times that share of its time; ``None`` when not measured.
    """

    window: EnergyWindow
    parts: list[PhaseWindow]
    learning_s: float
    attributed_j: float | None


def modelled_reading(
    phase: Phase, counts: Iterable[ForwardCount], *, learning_j: float, t_s: float, window_s: float, reason: str
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
        cost_j=(spent_j + learning_j) / tokens if tokens else None,
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
        self._learning: list[LearningWork] = []

    def add_learning(self, works: Iterable[LearningWork]) -> None:
        """Note learning that was done."""
        self._learning += works

    def add(self, counts: Iterable[ForwardCount]) -> None:
        """Note work that was done."""
        for count in counts:
            finished_s = max(count.finished_s, self._work[-1][0])
            self._work.append((finished_s, count.phase, float(count.tokens), count.energy_j))

    def close(self, *, last: bool = False) -> ClosedWindow | None:
        """Return the window that has become due, if it has and anything was done in it.

        A window in which something was learned and nothing served goes on until something is served: the joules of
        learning are to fall on tokens.

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
            return None
        if due and not last:
            start_s, end_s = min(started[uuid].t_s for uuid in used), max(ended[uuid].t_s for uuid in used)
            served = any(self._done(phase, start_s, end_s)[0] > 0 for phase in PHASES)
            if not served and self._learned(start_s, end_s)[0] > 0:
                return None
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
        learning_s = self._learned(start_s, end_s)[0]
        # The next window begins with the reading that ended this one.
        self._from_s = min(ended[uuid].sample.t_s for uuid in used) - 1e-6 if due else now_s
        self._began_at = clock.wall_s()
        done = sum(finished_s <= end_s for finished_s, *_ in self._work)
        self._work = self._work[max(0, done - 1) :]
        self._learning = [work for work in self._learning if work.t_end_s > end_s]
        if not found and learning_s <= 0:
            return None
        share = learning_s / (end_s - start_s) if end_s > start_s else 0.0
        attributed_j = None if window.energy_j is None else share * window.energy_j
        return ClosedWindow(window=window, parts=found, learning_s=learning_s, attributed_j=attributed_j)

    def _split(self, window: EnergyWindow, start_s: float, end_s: float, age_s: float) -> list[PhaseWindow]:
        parts = {phase: self._done(phase, start_s, end_s) for phase in PHASES}
        learning_j = self._learned(start_s, end_s)[1]
        total_j = sum(joules for _, joules in parts.values())
        return [
            PhaseWindow(
                phase=phase,
                t_s=end_s,
                tokens=tokens,
                modelled_j=joules,
                learning_j=learning_j * joules / total_j,
                measured_j=None if window.energy_j is None else window.energy_j * joules / total_j,
                age_s=age_s,
                window=window,
            )
            for phase, (tokens, joules) in parts.items()
            if tokens > 0 and joules > 0
        ]

    def _learned(self, start_s: float, end_s: float) -> tuple[float, float]:
        """Return (seconds, modelled joules) of learning between two moments, what was under way in proportion."""
        seconds = joules = 0.0
        for work in self._learning:
            began_s = work.t_end_s - work.duration_s
            overlap_s = max(0.0, min(work.t_end_s, end_s) - max(began_s, start_s))
            if work.duration_s > 0:
                share = overlap_s / work.duration_s
            else:
                share = float(start_s < work.t_end_s <= end_s)
            seconds, joules = seconds + overlap_s, joules + share * work.energy_j
        return min(seconds, max(0.0, end_s - start_s)), joules

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
