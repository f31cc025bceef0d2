"""From readings to joules: the arithmetic of a window, with every fault turned into a status, flags and a reason.

The energy of a span is the difference of the cumulative counter at its edges, E = C(t1) - C(t0). Where enough samples
lie inside and power was steady, the slope of a least-squares line through them times the span is less uncertain than
two edges of unknown lag, and takes the difference's place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from thermoe.results import Provenance, weakest_provenance
from thermoe.telemetry.arguments import checked_min_ticks, checked_scatter
from thermoe.telemetry.gate import SLOW_READ_S
from thermoe.telemetry.source import Device, Sample
from thermoe.telemetry.window import INFORMATIVE_FLAGS, DeviceEnergy, EdgeMode, Method, Status

#: A uniform lag over one unit has this standard deviation.
UNIFORM_SD = 1.0 / math.sqrt(12.0)
#: Fewest counter updates a window may have.
MIN_TICKS = 10
#: Scatter of repeated windows on one machine; an A/A test replaces it.
REPEATABILITY_REL_SD = 0.01
#: What an integral of sampled power is worth at best: the power sensor sees a part of the time only.
POWER_INTEGRAL_REL_SD = 0.05
#: A counter that stood still longer than this is called frozen.
FROZEN_S = 1.0
#: Fewest readings a slope is fitted through.
MIN_SLOPE_SAMPLES = 5
MAX_GAP_PERIODS = 3.0

_THERMAL = {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake"}


@dataclass(frozen=True, slots=True)
class Edge:
    """One end of a window on one device.

    Attributes:
        sample: the reading; its energy is the counter at ``t_s``.
        t_s: the time the counter's value stands for, in seconds.
        sd_s: standard deviation of that time.
        reason: why the edge cannot be used, or ``None``.
        kind: how it was found; both ends of a window must have been found alike.
    """

    sample: Sample
    t_s: float
    sd_s: float
    reason: str | None = None
    kind: EdgeMode = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Everything read of one device in one window.

    Attributes:
        device: the device.
        start: its first edge.
        end: its last edge.
        samples: the sampler's readings strictly between the edges, in order.
        edges: how the edges were found.
        sampler_period_s: the sampler's period; ``None`` when none ran.
    """

    device: Device
    start: Edge
    end: Edge
    samples: Sequence[Sample] = ()
    edges: EdgeMode = "direct"
    sampler_period_s: float | None = None

    @property
    def duration_s(self) -> float:
        """From edge to edge, in seconds."""
        return self.end.t_s - self.start.t_s

    @property
    def readings(self) -> list[Sample]:
        """The edges and the samples between them."""
        return [self.start.sample, *self.samples, self.end.sample]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits of what counts as measured.

    Attributes:
        min_ticks: fewest counter updates in a window.
        repeatability_rel_sd: relative scatter of repeated windows on this machine.
    """

    min_ticks: int = MIN_TICKS
    repeatability_rel_sd: float = REPEATABILITY_REL_SD

    def __post_init__(self) -> None:
        checked_min_ticks(self.min_ticks)
        checked_scatter(self.repeatability_rel_sd)


def direct_edge(device: Device, sample: Sample) -> Edge:
    """Return the edge of one immediate reading: the counter may be up to one update old."""
    lag_s = device.counter_period_s * UNIFORM_SD
    return Edge(sample, sample.t_s, math.hypot(lag_s, sample.read_latency_s * UNIFORM_SD))


def too_short(duration_s: float, device: Device, settings: Settings, edges: EdgeMode) -> str | None:
    """Return why a span is too short to have a joule figure, or ``None``."""
    least_s = settings.min_ticks * device.counter_period_s
    # Edges on ticks are whole periods apart up to the jitter of two readings.
    slack_s = 0.5 * device.counter_period_s if edges == "tick" else 0.0
    if duration_s + slack_s >= least_s:
        return None
    return f"too short ({duration_s:.2f} s < {least_s:.1f} s); repeat the work inside one window (repeat=)"


def measure(span: Span, settings: Settings) -> DeviceEnergy:
    """Return the joules of one GPU in one window.

    Nothing raises: a fault gives ``energy_j=None`` with a status and a reason, or a number with flags.
    """
    flags = _flags_of(span)
    facts = _facts_of(span)
    device, duration_s = span.device, span.duration_s

    def refused(reason: str) -> DeviceEnergy:
        return DeviceEnergy(
            uuid=device.uuid,
            name=device.name,
            duration_s=duration_s,
            status="invalid",
            flags=tuple(sorted(flags)),
            reason=reason,
            **facts,
        )

    lost = next((sample for sample in span.readings if sample.lost), None)
    if lost is not None:
        flags.add("lost")
        return refused(next(iter(lost.missing.values()), "the device is lost"))
    edge_fault = span.start.reason or span.end.reason
    if edge_fault is not None:
        return refused(edge_fault)
    if span.start.kind != span.end.kind:
        # A tick is exact and an immediate reading lags by half a period on average, so their difference would read low.
        return refused(f"the ends of the window are of two kinds ({span.start.kind} and {span.end.kind})")
    gap_s = _widest_gap_s(span)
    if gap_s is not None:
        flags.add("gap")
    short = too_short(duration_s, device, settings, span.edges)
    fault = _counter_fault(span)
    if fault is not None and short is None:
        if fault.startswith("the energy counter went backwards"):
            flags.add("counter_reset")
        integral = None if gap_s is not None else integrate_power(span)
        if integral is None:
            return refused(fault)
        flags.add("power_integral")
        return _result(span, integral, POWER_INTEGRAL_REL_SD, "power_integral", flags, facts, fault)
    if fault is not None and "went backwards" not in fault and "did not change" not in fault:
        return refused(fault)
    if short is not None:
        return refused(short)
    if gap_s is not None and span.edges == "sampled":
        return refused(f"no sample for {gap_s:.1f} s inside the window")
    energy_j, rel_sd = _counter_energy(span, settings, flags)
    reason = f"no sample for {gap_s:.1f} s inside the window; the counter's edges are good" if gap_s else None
    return _result(span, energy_j, rel_sd, "counter", flags, facts, reason)


def _counter_fault(span: Span) -> str | None:
    """Return why the counter gives no difference, or ``None``."""
    first, last = span.start.sample, span.end.sample
    for sample in (first, last):
        if sample.energy_j is None:
            cause = sample.missing.get("energy_j", "the energy counter gave no value")
            return "the energy counter went backwards (reset)" if "backwards" in cause else cause
    if len({sample.counter_epoch for sample in span.readings}) > 1:
        return "the energy counter went backwards (reset) inside the window"
    assert first.energy_j is not None and last.energy_j is not None
    if last.energy_j < first.energy_j:
        return "the energy counter went backwards (reset)"
    if last.energy_j == first.energy_j:
        return f"the energy counter did not change in {span.duration_s:.2f} s (frozen)"
    return None


def _counter_energy(span: Span, settings: Settings, flags: set[str]) -> tuple[float, float]:
    first_j, last_j = span.start.sample.energy_j or 0.0, span.end.sample.energy_j or 0.0
    duration_s = span.duration_s
    energy_j = last_j - first_j
    edge_rel = math.hypot(span.start.sd_s, span.end.sd_s) / duration_s
    fitted = fit_slope(span)
    if fitted is not None and fitted[1] < edge_rel:
        energy_j, edge_rel = fitted[0] * duration_s, fitted[1]
    frozen_s = max(sample.counter_age_s for sample in span.readings)
    if frozen_s > FROZEN_S:
        flags.add("counter_frozen")
        edge_rel = math.hypot(edge_rel, frozen_s / duration_s)
    return energy_j, math.hypot(edge_rel, settings.repeatability_rel_sd)


def fit_slope(span: Span) -> tuple[float, float] | None:
    """Fit energy against time and return the slope in watts with its relative standard error.

    Returns ``None`` with fewer than five readings inside, or when they scatter about the line by more than the lag of
    the counter explains: then power was not steady, and a straight line would be the wrong model.
    """
    inside = [sample for sample in span.samples if sample.energy_j is not None]
    if len(inside) < MIN_SLOPE_SAMPLES:
        return None
    on_ticks = span.start.kind != "direct" and all(sample.tick_s is not None for sample in inside)
    points = [((s.tick_s or 0.0) if on_ticks else s.t_s, s.energy_j or 0.0) for s in inside]
    points += [(span.start.t_s, span.start.sample.energy_j or 0.0), (span.end.t_s, span.end.sample.energy_j or 0.0)]
    count = len(points)
    mean_t = math.fsum(t for t, _ in points) / count
    mean_e = math.fsum(e for _, e in points) / count
    spread = math.fsum((t - mean_t) ** 2 for t, _ in points)
    if spread <= 0:
        return None
    slope_w = math.fsum((t - mean_t) * (e - mean_e) for t, e in points) / spread
    if slope_w <= 0:
        return None
    residual = math.fsum((e - mean_e - slope_w * (t - mean_t)) ** 2 for t, e in points) / (count - 2)
    explained_j = 2.0 * UNIFORM_SD * span.device.counter_period_s * slope_w
    if math.sqrt(residual) > explained_j:
        return None
    return slope_w, math.sqrt(residual / spread) / slope_w


def integrate_power(span: Span) -> float | None:
    """Return the integral of sampled power over the span in joules; ``None`` when the samples do not cover it.

    The one-second mean is preferred to the momentary value, which sees a part of the time only.
    """
    for metric in ("power_avg_w", "power_w"):
        points = [(s.t_s, s.value(metric)) for s in span.readings]
        known = [(t, value) for t, value in points if value is not None]
        if len(known) < 3 or points[0][1] is None or points[-1][1] is None:
            continue
        return math.fsum(0.5 * (a + b) * (t1 - t0) for (t0, a), (t1, b) in pairwise(known))
    return None


def _widest_gap_s(span: Span) -> float | None:
    """Return the widest hole between readings when it is a gap, measured against the sampler's period."""
    if span.sampler_period_s is None:
        return None
    good = [s.t_s for s in span.samples if s.energy_j is not None or s.power_w is not None or s.power_avg_w is not None]
    times = [span.start.t_s, *good, span.end.t_s]
    widest_s = max(b - a for a, b in pairwise(times))
    return widest_s if widest_s > MAX_GAP_PERIODS * span.sampler_period_s else None


def _flags_of(span: Span) -> set[str]:
    flags: set[str] = set()
    if span.device.shared:
        flags.add("shared_device")
    if span.device.mapped_by == "index":
        flags.add("mapped_by_index")
    reasons = _throttle_reasons(span)
    if reasons & _THERMAL:
        flags.add("throttled")
    if "sw_power_cap" in reasons:
        flags.add("power_cap")
    if any(sample.foreign_processes for sample in span.readings):
        flags.add("contaminated")
    if any(sample.read_latency_s > SLOW_READ_S for sample in span.readings):
        flags.add("slow_read")
    return flags


def _throttle_reasons(span: Span) -> frozenset[str]:
    return frozenset().union(*(sample.throttle_reasons or () for sample in span.readings))


def _facts_of(span: Span) -> dict[str, Any]:
    used = [s.memory_used_bytes for s in span.readings if s.memory_used_bytes is not None]
    ticks = span.duration_s / span.device.counter_period_s
    return {
        "temp_start_c": span.start.sample.temp_c,
        "temp_end_c": span.end.sample.temp_c,
        "memory_used_peak_bytes": max(used, default=None),
        "sm_clock_mean_hz": _mean([s.sm_clock_hz for s in span.readings]),
        "memory_clock_mean_hz": _mean([s.memory_clock_hz for s in span.readings]),
        "throttle_reasons": _throttle_reasons(span),
        "ticks": round(ticks) if span.edges == "tick" else max(0, math.floor(ticks)),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _result(
    span: Span,
    energy_j: float,
    rel_sd: float,
    method: Method,
    flags: set[str],
    facts: dict[str, Any],
    fault: str | None,
) -> DeviceEnergy:
    metrics = ("energy_j",) if method == "counter" else ("power_avg_w", "power_w")
    labels = [s.provenance[m] for s in (span.start.sample, span.end.sample) for m in metrics if m in s.provenance]
    label: Provenance | None = weakest_provenance(labels)
    if method == "power_integral":
        label = weakest_provenance([label, "estimated"])
    status: Status = "flagged" if flags - INFORMATIVE_FLAGS else "valid"
    return DeviceEnergy(
        uuid=span.device.uuid,
        name=span.device.name,
        duration_s=span.duration_s,
        energy_j=energy_j,
        power_w=energy_j / span.duration_s,
        provenance=label,
        method=method,
        energy_rel_sd=rel_sd,
        status=status,
        flags=tuple(sorted(flags)),
        reason=explain(flags, fault),
        **facts,
    )


_FLAG_TEXT = {
    "shared_device": "the board is shared (a slice); its joules are the whole board's",
    "contaminated": "another process used the device",
    "counter_frozen": "the energy counter stood still for more than 1 s",
    "throttled": "the clocks were held down by heat or by the power supply",
    "exception": "an exception ended the window",
    "sync_failed": "waiting for the device failed",
    "drained": "the device ran out of queued work before the closing tick",
}


def explain(flags: set[str], fault: str | None) -> str | None:
    """Return one text for a fault and the flags that have something to say."""
    parts = [fault] if fault else []
    parts += [text for flag, text in _FLAG_TEXT.items() if flag in flags]
    return "; ".join(parts) or None
