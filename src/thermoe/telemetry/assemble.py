"""From the parts of a window to the window: totals over devices, the host's share, joules per token, net of idle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from thermoe.results import Provenance, weakest_provenance
from thermoe.telemetry.evaluate import FROZEN_S, Settings, Span, explain, measure, too_short
from thermoe.telemetry.window import INFORMATIVE_FLAGS, DeviceEnergy, EdgeMode, EnergyWindow, Method, usable_tokens

IDLE_DRIFT_REL = 0.10
NO_SENSOR = "no RAPL; no GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What a window knew when it closed, beside its readings.

    Attributes:
        name: of the window.
        edges: how its ends were found.
        duration_s: of the user's code, used when no device was read.
        started_at: wall time of the start, seconds since 1970.
        tokens: of the whole window, or a function of a span's start and end in seconds; ``None`` for no count.
        flags: what the window itself noticed.
        reason: why the window as a whole is void, or ``None``.
        host_power_w: power of the host the user gave, in watts.
        idle_w: idle references, each the power by device UUID, in watts.
        absent_reason: why no device was read.
    """

    name: str
    edges: EdgeMode
    duration_s: float
    started_at: float
    tokens: float | Callable[[float, float], float] | None
    flags: frozenset[str] = frozenset()
    reason: str | None = None
    host_power_w: float | None = None
    idle_w: Sequence[Mapping[str, float]] = ()
    absent_reason: str = NO_SENSOR


@dataclass(frozen=True, slots=True)
class _Total:
    """Joules of a window, however they were come by."""

    energy_j: float | None
    power_w: float | None = None
    provenance: Provenance | None = None
    method: Method | None = None
    rel_sd: float | None = None
    scope: str = "none"
    reason: str | None = None


def measure_host(span: Span, settings: Settings) -> dict[str, tuple[float, Provenance] | str]:
    """Return processor and memory joules with their label, or why there are none, by metric."""
    found: dict[str, tuple[float, Provenance] | str] = {}
    for metric in ("cpu_energy_j", "dram_energy_j"):
        first, last = span.start.sample, span.end.sample
        before_j, after_j = first.value(metric), last.value(metric)
        short = too_short(span.duration_s, span.device, settings, span.edges)
        if before_j is None or after_j is None:
            found[metric] = first.missing.get(metric) or last.missing.get(metric) or "not read"
        elif len({sample.counter_epoch for sample in span.readings}) > 1 or after_j < before_j:
            found[metric] = "the host's energy counter started anew inside the window"
        elif short is not None:
            found[metric] = short
        elif after_j == before_j and span.duration_s > FROZEN_S:
            found[metric] = f"the host's energy counter did not change in {span.duration_s:.2f} s (frozen)"
        else:
            label = weakest_provenance([first.provenance.get(metric), last.provenance.get(metric)])
            found[metric] = (after_j - before_j, label or "measured")
    return found


def assemble(closing: Closing, gpu_spans: Sequence[Span], host_span: Span | None, settings: Settings) -> EnergyWindow:
    """Put a window together from the spans of its devices.

    Totals are sums over distinct devices and are ``None`` when any device has no figure; the label is the weakest of
    the parts. Without a GPU the host's own joules, where they can be read, are the window's.
    """
    parts = [measure(span, settings) for span in gpu_spans]
    host = {} if host_span is None else measure_host(host_span, settings)
    duration_s = _mean_duration(gpu_spans, host_span, closing.duration_s)
    cpu, dram = host.get("cpu_energy_j", "no RAPL"), host.get("dram_energy_j", "no RAPL")
    total = _gpu_total(parts) if parts else _host_total(closing, duration_s, cpu, dram)
    flags = set(closing.flags).union(*(part.flags for part in parts))
    if closing.reason is not None:
        total = _Total(None, scope=total.scope, reason=closing.reason)
    tokens, per_token = _per_token(closing, gpu_spans, parts, total, (host_span, duration_s))
    if closing.tokens is not None and tokens is None:
        flags.add("no_tokens")
    cpu_j, cpu_label = cpu if isinstance(cpu, tuple) else (None, None)
    if cpu_j is None and closing.host_power_w is not None and duration_s > 0:
        cpu_j, cpu_label = closing.host_power_w * duration_s, "estimated"
    idle_w, net_j, net_range = _net(closing, parts, total, duration_s, flags)
    void = total.energy_j is None
    reason = total.reason if void else explain(set(closing.flags), total.reason)
    end = None if host_span is None else host_span.end.sample
    return EnergyWindow(
        name=closing.name,
        duration_s=duration_s,
        energy_j=total.energy_j,
        power_w=total.power_w,
        tokens=tokens,
        j_per_token=per_token,
        idle_power_w=idle_w,
        net_energy_j=net_j,
        net_energy_range_j=net_range,
        devices={part.uuid: part for part in parts},
        cpu_energy_j=cpu_j,
        dram_energy_j=dram[0] if isinstance(dram, tuple) else None,
        cpu_provenance=cpu_label,
        scope=total.scope,
        edges=closing.edges,
        energy_rel_sd=total.rel_sd,
        temp_start_c=max((p.temp_start_c for p in parts if p.temp_start_c is not None), default=None),
        temp_end_c=max((p.temp_end_c for p in parts if p.temp_end_c is not None), default=None),
        memory_used_peak_bytes=_sum([p.memory_used_peak_bytes for p in parts]),
        process_memory_bytes=None if end is None else end.process_memory_bytes,
        sm_clock_mean_hz=_mean([p.sm_clock_mean_hz for p in parts]),
        memory_clock_mean_hz=_mean([p.memory_clock_mean_hz for p in parts]),
        throttle_reasons=frozenset().union(*(p.throttle_reasons for p in parts)),
        ticks=min((p.ticks for p in parts if p.ticks is not None), default=None),
        provenance=total.provenance,
        method=total.method,
        status="invalid" if void else "flagged" if flags - INFORMATIVE_FLAGS else "valid",
        flags=tuple(sorted(flags)),
        reason=reason,
        started_at=closing.started_at,
    )


def _mean_duration(gpu_spans: Sequence[Span], host_span: Span | None, fallback_s: float) -> float:
    if gpu_spans:
        return math.fsum(span.duration_s for span in gpu_spans) / len(gpu_spans)
    return fallback_s if host_span is None else host_span.duration_s


def _gpu_total(parts: Sequence[DeviceEnergy]) -> _Total:
    energies = [part.energy_j for part in parts if part.energy_j is not None]
    if len(energies) < len(parts):
        void = [part for part in parts if part.energy_j is None]
        named = [f"{part.uuid}: {part.reason}" if len(parts) > 1 else str(part.reason) for part in void]
        return _Total(None, scope="gpu board", reason="; ".join(named))
    energy_j = math.fsum(energies)
    spread = math.sqrt(math.fsum(((p.energy_j or 0.0) * (p.energy_rel_sd or 0.0)) ** 2 for p in parts))
    methods = {part.method for part in parts}
    return _Total(
        energy_j,
        math.fsum(part.power_w or 0.0 for part in parts),
        weakest_provenance([part.provenance for part in parts]),
        "power_integral" if "power_integral" in methods else "counter",
        spread / energy_j if energy_j > 0 else None,
        "gpu board",
        "; ".join(dict.fromkeys(part.reason for part in parts if part.reason)) or None,
    )


def _host_total(
    closing: Closing,
    duration_s: float,
    cpu: tuple[float, Provenance] | str,
    dram: tuple[float, Provenance] | str,
) -> _Total:
    if isinstance(cpu, tuple):
        parts = [cpu, *([dram] if isinstance(dram, tuple) else [])]
        energy_j = math.fsum(joules for joules, _ in parts)
        label = weakest_provenance([label for _, label in parts])
        scope = "cpu package and dram" if len(parts) == 2 else "cpu package"
        return _Total(energy_j, energy_j / duration_s, label, "counter", 0.01, scope)
    if closing.host_power_w is not None and duration_s > 0:
        energy_j = closing.host_power_w * duration_s
        return _Total(energy_j, closing.host_power_w, "estimated", "model", None, "host power given")
    has_rapl = cpu not in ("no RAPL", "not read") and "RAPL not readable" not in cpu
    return _Total(None, reason=cpu if has_rapl else closing.absent_reason)


def _per_token(
    closing: Closing,
    spans: Sequence[Span],
    parts: Sequence[DeviceEnergy],
    total: _Total,
    host: tuple[Span | None, float],
) -> tuple[float | None, float | None]:
    """Return the tokens of the measured span and the joules per token; each device's tokens are those of its span."""
    counted = closing.tokens
    if counted is None:
        return None, None
    if not callable(counted):
        tokens = usable_tokens(counted)
        possible = tokens is not None and total.energy_j is not None and host[1] > 0
        return tokens, (total.energy_j or 0.0) / tokens if possible and tokens is not None else None
    bounds = [(span.start.t_s, span.end.t_s) for span in spans]
    if not bounds and host[0] is not None:
        bounds = [(host[0].start.t_s, host[0].end.t_s)]
    shares = [usable_tokens(counted(start_s, end_s)) for start_s, end_s in bounds]
    known = [share for share in shares if share is not None]
    if not known or len(known) < len(shares):
        return None, None
    tokens = math.fsum(known) / len(known)
    if total.energy_j is None:
        return tokens, None
    if not parts:
        return tokens, total.energy_j / tokens
    return tokens, math.fsum((part.energy_j or 0.0) / share for part, share in zip(parts, known, strict=True))


def _net(
    closing: Closing, parts: Sequence[DeviceEnergy], total: _Total, duration_s: float, flags: set[str]
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    uuids = [part.uuid for part in parts] or ["host"]
    references = [math.fsum(ref[u] for u in uuids) for ref in closing.idle_w if all(u in ref for u in uuids)]
    if not references:
        return None, None, None
    idle_w = math.fsum(references) / len(references)
    if total.energy_j is None:
        return idle_w, None, None
    low_j = total.energy_j - max(references) * duration_s
    high_j = total.energy_j - min(references) * duration_s
    drifted = max(references) - min(references) > IDLE_DRIFT_REL * min(references)
    if drifted:
        flags.add("idle_reference_drifted")
    return idle_w, total.energy_j - idle_w * duration_s, (low_j, high_j) if drifted else None


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
