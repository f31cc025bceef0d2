"""What a measured window is: the joules of a span of time, how they were formed, and how far they can be trusted."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from thermoe.results import Provenance

EdgeMode = Literal["tick", "sampled", "direct"]
Status = Literal["valid", "flagged", "invalid"]
Method = Literal["counter", "power_integral", "model"]
#: Boards of one type differ by up to this in the gain of their sensor; it cancels in a ratio on one board.
GAIN_REL_LIMIT = 0.05
#: Flags that inform and leave a window valid.
INFORMATIVE_FLAGS = frozenset({"power_cap", "mapped_by_index", "no_tokens", "idle_reference_drifted", "slow_read"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEnergy:
    """The part one device had in a window.

    Attributes:
        uuid: the device.
        name: what a person calls it.
        duration_s: from its first reading to its last, in seconds.
        energy_j: joules in between; ``None`` when not measured, with ``reason``.
        power_w: their mean rate, in watts.
        provenance: what kind of number ``energy_j`` is.
        method: ``counter`` (difference or slope of the energy counter) or ``power_integral``.
        energy_rel_sd: relative standard deviation of ``energy_j``, the gain of the board's sensor left out.
        temp_start_c: die temperature at the start, in degrees Celsius.
        temp_end_c: die temperature at the end, in degrees Celsius.
        memory_used_peak_bytes: most device memory seen in use.
        sm_clock_mean_hz: mean clock of the cores over the samples inside.
        memory_clock_mean_hz: mean clock of the memory.
        throttle_reasons: what held the clocks down at any sample.
        ticks: updates of the energy counter in the span.
        status: ``valid``, ``flagged`` or ``invalid``.
        flags: what was odd.
        reason: why ``energy_j`` is ``None`` or the status is not ``valid``.
    """

    uuid: str
    name: str
    duration_s: float
    energy_j: float | None = None
    power_w: float | None = None
    provenance: Provenance | None = None
    method: Method | None = None
    energy_rel_sd: float | None = None
    temp_start_c: float | None = None
    temp_end_c: float | None = None
    memory_used_peak_bytes: float | None = None
    sm_clock_mean_hz: float | None = None
    memory_clock_mean_hz: float | None = None
    throttle_reasons: frozenset[str] = frozenset()
    ticks: int | None = None
    status: Status = "valid"
    flags: tuple[str, ...] = ()
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyWindow:
    """The energy of one named span of work; every number that was not measured is ``None`` and ``reason`` says why.

    Attributes:
        name: what was measured.
        duration_s: length of the measured span, in seconds of monotonic time.
        energy_j: gross joules of all selected devices; ``scope`` says which part of the machine that is.
        power_w: mean gross power, in watts.
        tokens: tokens processed in the same span; interpolated when the edges fall between two steps.
        j_per_token: gross joules per token.
        idle_power_w: power of the same devices at rest; ``None`` until an idle reference was taken.
        net_energy_j: ``energy_j`` less idle power times duration; ``None`` until an idle reference was taken.
        net_energy_range_j: smallest and largest net energy when the idle references differ by more than 10%.
        devices: the part of each device, by UUID.
        cpu_energy_j: joules of the processor packages.
        dram_energy_j: joules of the host memory.
        cpu_provenance: what kind of number ``cpu_energy_j`` is.
        scope: ``gpu board``, ``cpu package and dram``, ``host power given``, or ``none``.
        edges: how both ends were found: ``tick``, ``sampled`` or ``direct``.
        energy_rel_sd: relative standard deviation of ``energy_j``; a gain common to the board is not in it.
        gain_rel_limit: bound of that common gain.
        temp_start_c: hottest selected device at the start, in degrees Celsius.
        temp_end_c: hottest selected device at the end.
        memory_used_peak_bytes: most device memory seen in use, over all selected devices.
        process_memory_bytes: resident memory of this process at the end.
        sm_clock_mean_hz: mean core clock.
        memory_clock_mean_hz: mean memory clock.
        throttle_reasons: what held the clocks down at any time.
        ticks: fewest counter updates any device had in the span.
        provenance: weakest label among the parts of ``energy_j``.
        method: how ``energy_j`` was formed.
        status: ``valid``, ``flagged`` (a number with a caveat) or ``invalid``.
        flags: what was odd, in short words.
        reason: why the number is missing or carries a caveat.
        started_at: wall time of the start, seconds since 1970; a label only.
    """

    name: str
    duration_s: float
    energy_j: float | None = None
    power_w: float | None = None
    tokens: float | None = None
    j_per_token: float | None = None
    idle_power_w: float | None = None
    net_energy_j: float | None = None
    net_energy_range_j: tuple[float, float] | None = None
    devices: Mapping[str, DeviceEnergy] = field(default_factory=dict)
    cpu_energy_j: float | None = None
    dram_energy_j: float | None = None
    cpu_provenance: Provenance | None = None
    scope: str = "none"
    edges: EdgeMode = "direct"
    energy_rel_sd: float | None = None
    gain_rel_limit: float = GAIN_REL_LIMIT
    temp_start_c: float | None = None
    temp_end_c: float | None = None
    memory_used_peak_bytes: float | None = None
    process_memory_bytes: float | None = None
    sm_clock_mean_hz: float | None = None
    memory_clock_mean_hz: float | None = None
    throttle_reasons: frozenset[str] = frozenset()
    ticks: int | None = None
    provenance: Provenance | None = None
    method: Method | None = None
    status: Status = "valid"
    flags: tuple[str, ...] = ()
    reason: str | None = None
    started_at: float | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the window as one flat row for JSON or CSV: units in the names, devices left out, sets as text."""
        row: dict[str, Any] = {
            name: getattr(self, name) for name in self.__slots__ if name not in ("devices", "net_energy_range_j")
        }
        row["throttle_reasons"] = " ".join(sorted(self.throttle_reasons))
        row["flags"] = " ".join(self.flags)
        low, high = self.net_energy_range_j or (None, None)
        return {**row, "net_energy_low_j": low, "net_energy_high_j": high}

    def __str__(self) -> str:
        if self.energy_j is None:
            return f"{self.name}: {self.duration_s:.2f} s, energy not measured ({self.reason})"
        per_token = "" if self.j_per_token is None else f", {self.j_per_token:.4g} J/token"
        label = f"{self.provenance}, {self.method}, {self.edges} edges, {self.scope}"
        return f"{self.name}: {self.duration_s:.2f} s, {self.energy_j:.4g} J{per_token} ({label}; {self.status})"


class Mark(Protocol):
    """Says when a step that was queued on a device has finished."""

    def time_s(self) -> float:
        """Return the completion time on the monotonic clock, in seconds; waits for it."""


class WorkLog:
    """Tokens against the time they were finished, so that work can be counted between any two moments.

    Args:
        started_s: when the first step began.
    """

    def __init__(self, started_s: float) -> None:
        self._times: list[float] = [started_s]
        self._totals: list[float] = [0.0]

    def add(self, finished_s: float, tokens: float) -> None:
        """Note that ``tokens`` were finished at ``finished_s``; a time before the last one counts as the last one."""
        self._times.append(max(finished_s, self._times[-1]))
        self._totals.append(self._totals[-1] + tokens)

    @property
    def total(self) -> float:
        """All tokens noted."""
        return self._totals[-1]

    @property
    def steps(self) -> int:
        """How many steps were noted."""
        return len(self._times) - 1

    @property
    def last_s(self) -> float:
        """When the last step finished."""
        return self._times[-1]

    def done_by(self, t_s: float) -> float:
        """Return the tokens finished by ``t_s``, the step under way counted in proportion."""
        position = bisect.bisect_right(self._times, t_s)
        if position == 0:
            return 0.0
        if position == len(self._times):
            return self.total
        before_s, after_s = self._times[position - 1], self._times[position]
        share = (t_s - before_s) / (after_s - before_s)
        return self._totals[position - 1] + share * (self._totals[position] - self._totals[position - 1])

    def between(self, start_s: float, end_s: float) -> float:
        """Return the tokens of the work done from ``start_s`` to ``end_s``."""
        return max(0.0, self.done_by(end_s) - self.done_by(start_s))


def usable_tokens(tokens: float | None) -> float | None:
    """Return ``tokens`` when joules can be divided by it; ``None`` for none, zero, negative or not a number."""
    if tokens is None or not math.isfinite(tokens) or tokens <= 0:
        return None
    return float(tokens)
