"""Finding the moment a counter steps: by reading until it changes, and by predicting it from an earlier step.

A cumulative energy counter is refreshed every 100 ms or so. A reading between two refreshes is up to a period old; a
reading that brackets a refresh is exact to one call. The first value seen never counts as a change.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from itertools import pairwise

from thermoe.telemetry.clock import Clock
from thermoe.telemetry.evaluate import UNIFORM_SD, Edge
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.source import Device, Sample

MAX_READS = 30
TIMEOUT_S = 0.25
#: Reads that come back at once are spread out, so that thirty of them outlast one period of the counter.
READ_SPACING_S = 0.004
#: A phase-locked reading comes this long after the predicted tick.
GUARD_S = 0.007
#: A prediction is checked after this long at first, then after half the time watched so far, and at last every minute.
FIRST_CHECK_S = 10.0
CHECK_EVERY_S = 60.0
CHECK_READS = 3
#: Time between the readings of a check: three of them bracket a step that is up to this far from where it was expected.
CHECK_SPACING_S = 0.006
#: No two quartz clocks run further apart than this.
MAX_DRIFT = 200e-6


@dataclass(frozen=True, slots=True)
class TickSearch:
    """What a search for a counter step found.

    Attributes:
        t_s: the time of the step, in seconds; ``None`` when there was none.
        width_s: time between the last reading before it and the first after it.
        after: the first reading after the step, or the last reading when there was none.
        reads: readings it took.
        reason: why there is no step, or ``None``.
        timed_out: the counter answered and did not step.
    """

    t_s: float | None
    width_s: float
    after: Sample
    reads: int
    reason: str | None = None
    timed_out: bool = False

    def edge(self) -> Edge:
        """Return the step as the end of a window."""
        if self.t_s is None:
            # A reading without a counter is no fault of the edge: power may stand in for it.
            return Edge(self.after, self.after.t_s, 0.0, self.reason if self.timed_out else None, "tick")
        return Edge(self.after, self.t_s, self.width_s * UNIFORM_SD, kind="tick")


def find_tick(
    reader: GatedReader,
    device: Device,
    clock: Clock,
    *,
    max_reads: int = MAX_READS,
    timeout_s: float = TIMEOUT_S,
    spacing_s: float = READ_SPACING_S,
    stop: threading.Event | None = None,
) -> TickSearch:
    """Read ``device`` until its energy counter changes; at most ``max_reads`` readings and ``timeout_s`` seconds."""
    started_s = clock.now_s()
    before: Sample | None = None
    sample = Sample.empty(device, started_s, ("energy_j",), "not read")
    for reads in range(1, max_reads + 1):
        called_s = clock.now_s()
        sample = reader.read(device, ("energy_j",))
        if sample.lost:
            return TickSearch(None, 0.0, sample, reads, sample.missing.get("energy_j", "the device is lost"))
        if sample.energy_j is None:
            cause = sample.missing.get("energy_j", "the energy counter gave no value")
            return TickSearch(None, 0.0, sample, reads, cause)
        if before is not None and sample.counter_epoch == before.counter_epoch and sample.energy_j != before.energy_j:
            return TickSearch(0.5 * (before.t_s + sample.t_s), sample.t_s - before.t_s, sample, reads)
        before = sample
        if clock.now_s() - started_s >= timeout_s:
            break
        if stop is not None and stop.is_set():
            return TickSearch(None, 0.0, sample, reads, "the search for a tick was called off", True)
        clock.sleep_s(spacing_s - (clock.now_s() - called_s))
    waited_s = clock.now_s() - started_s
    reason = f"tick_timeout: the counter did not change in {waited_s:.2f} s"
    return TickSearch(None, 0.0, sample, max_reads, reason, True)


def measure_tick_period(reader: GatedReader, device: Device, clock: Clock, *, duration_s: float = 1.0) -> float | None:
    """Return how often the energy counter changes, in seconds, watched for ``duration_s``; ``None`` when unknown.

    At least two changes must be seen; the value found first is not a change.
    """
    ends_s = clock.now_s() + duration_s
    ticks: list[float] = []
    while clock.now_s() < ends_s:
        found = find_tick(reader, device, clock, timeout_s=min(TIMEOUT_S, ends_s - clock.now_s()))
        if found.t_s is None:
            if not found.timed_out:
                return None
            continue
        ticks.append(found.t_s)
    steps = sorted(b - a for a, b in pairwise(ticks))
    return steps[len(steps) // 2] if steps else None


class PhaseLock:
    """Predicts when a device's counter will step next, and checks the prediction now and then.

    Args:
        device: whose counter.
        clock: the clock ticks are told on.

    Attributes:
        note: why the lock was given up or never found, or ``None``.
    """

    def __init__(self, device: Device, clock: Clock) -> None:
        self.device = device
        self.period_s = device.counter_period_s
        self.note: str | None = None
        self._clock = clock
        self._tick_s: float | None = None
        self._seen: list[tuple[int, float]] = []
        self._check_at_s = 0.0

    @property
    def locked(self) -> bool:
        """Whether the next step can be predicted."""
        return self._tick_s is not None

    def acquire(self, reader: GatedReader, stop: threading.Event | None = None) -> None:
        """Find one step, once; without one the sampler runs unlocked."""
        found = find_tick(reader, self.device, self._clock, stop=stop)
        if found.t_s is None:
            self.note = f"sampling is not locked to the counter ({found.reason})"
            return
        self._tick_s = found.t_s
        self._seen = [(0, found.t_s)]
        self._check_at_s = found.t_s + FIRST_CHECK_S

    def last_tick_before(self, t_s: float) -> float | None:
        """Return the predicted step at or before ``t_s``."""
        if self._tick_s is None:
            return None
        return self._tick_s + math.floor((t_s - self._tick_s) / self.period_s) * self.period_s

    def reading_time(self, not_before_s: float) -> float:
        """Return when to read next, at ``not_before_s`` or just after the first step that follows it."""
        before = self.last_tick_before(not_before_s - GUARD_S)
        if before is None:
            return not_before_s
        # Half a period of slack keeps rounding from skipping a whole period every time.
        nearest = before if not_before_s - GUARD_S - before < 0.5 * self.period_s else before + self.period_s
        return nearest + GUARD_S

    def check(self, reader: GatedReader) -> None:
        """Bracket a predicted step with three readings when one is due; a miss gives the lock up."""
        if self._tick_s is None or self._clock.now_s() < self._check_at_s:
            return
        predicted_s = (self.last_tick_before(self._clock.now_s() + 0.01) or 0.0) + self.period_s
        self._clock.sleep_s(predicted_s - CHECK_SPACING_S - 0.5 * READ_SPACING_S - self._clock.now_s())
        found = find_tick(reader, self.device, self._clock, max_reads=CHECK_READS, spacing_s=CHECK_SPACING_S)
        if found.t_s is None:
            self._tick_s = None
            self.note = "sampling lost its lock on the counter; it goes on unlocked"
            reader.warn_once(f"lock:{self.device.uuid}", self.note)
            return
        self._seen.append((self._seen[-1][0] + round((found.t_s - self._seen[-1][1]) / self.period_s), found.t_s))
        self._fit()
        watched_s = found.t_s - self._seen[0][1]
        self._check_at_s = found.t_s + min(CHECK_EVERY_S, max(FIRST_CHECK_S, 0.5 * watched_s))

    def _fit(self) -> None:
        """Fit the steps seen so far to a straight line: one found step is only known to a few milliseconds."""
        self._seen = self._seen[-32:]
        count = len(self._seen)
        mean_n = math.fsum(n for n, _ in self._seen) / count
        mean_t = math.fsum(t for _, t in self._seen) / count
        spread = math.fsum((n - mean_n) ** 2 for n, _ in self._seen)
        slope_s = math.fsum((n - mean_n) * (t - mean_t) for n, t in self._seen) / spread
        nominal_s = self.device.counter_period_s
        self.period_s = min(max(slope_s, nominal_s * (1 - MAX_DRIFT)), nominal_s * (1 + MAX_DRIFT))
        self._tick_s = mean_t + self.period_s * (self._seen[-1][0] - mean_n)
