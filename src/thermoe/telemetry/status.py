"""The latest readings in one dictionary, and where each metric comes from or why it is missing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from thermoe.results import weakest_provenance
from thermoe.telemetry.source import GPU_METRICS, HOST_METRICS, Device, Sample, Source

_SUMMED = ("energy_j", "power_w", "power_avg_w", "power_limit_w", "memory_used_bytes", "memory_total_bytes")
_HIGHEST = ("temp_c", "memory_temp_c")
_AVERAGED = ("sm_clock_hz", "memory_clock_hz", "utilization_frac")


def _total(values: list[float]) -> float:
    return math.fsum(values)


def _average(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _join(samples: Sequence[Sample], metric: str, combine: Callable[[list[float]], float]) -> float | None:
    """Combine a metric over devices; ``None`` when any of them has no figure, so that no part passes for the whole."""
    values = [sample.value(metric) for sample in samples]
    known = [value for value in values if value is not None]
    return combine(known) if known and len(known) == len(values) else None


def snapshot_of(devices: Sequence[Device], samples: Sequence[Sample], now_s: float) -> dict[str, float | None]:
    """Return the readings joined over devices; GPU figures under their own names, the host's load as its own key."""
    gpus = [s for d, s in zip(devices, samples, strict=True) if d.kind == "gpu"]
    hosts = [s for d, s in zip(devices, samples, strict=True) if d.kind == "host"]
    joined: dict[str, float | None] = {metric: _join(gpus, metric, _total) for metric in _SUMMED}
    joined |= {metric: _join(gpus, metric, max) for metric in _HIGHEST}
    joined |= {metric: _join(gpus, metric, _average) for metric in _AVERAGED}
    joined |= {metric: _join(hosts, metric, _total) for metric in HOST_METRICS if metric != "utilization_frac"}
    joined["host_utilization_frac"] = _join(hosts, "utilization_frac", _average)
    joined["age_s"] = max((now_s - sample.t_s for sample in samples), default=None)
    return joined


def describe_metrics(
    source: Source,
    devices: Sequence[Device],
    samples: Sequence[Sample],
    host_power_w: float | None,
    no_energy_reason: str,
) -> dict[str, dict[str, Any]]:
    """Return, by metric, its provenance, method and source, or ``provenance=None`` and the reason it is missing."""
    gpus = [s for d, s in zip(devices, samples, strict=True) if d.kind == "gpu"]
    hosts = [s for d, s in zip(devices, samples, strict=True) if d.kind == "host"]
    found = {metric: _describe_one(source, gpus, metric, "no GPU") for metric in GPU_METRICS}
    found |= {
        metric: _describe_one(source, hosts, metric, "not read") for metric in HOST_METRICS if metric not in found
    }
    found["host_utilization_frac"] = _describe_one(source, hosts, "utilization_frac", "not read")
    _describe_energy(found, gpus, host_power_w, no_energy_reason)
    return found


def _describe_one(source: Source, samples: Sequence[Sample], metric: str, without: str) -> dict[str, Any]:
    labels = [sample.provenance.get(metric) for sample in samples]
    label = weakest_provenance(labels)
    if label is not None:
        return {"provenance": label, "reason": None, "source": source.name}
    reasons = [sample.missing[metric] for sample in samples if metric in sample.missing]
    reason = reasons[0] if reasons else source.absent.get(metric, without)
    return {"provenance": None, "reason": reason, "source": None}


def _describe_energy(
    found: dict[str, dict[str, Any]], gpus: Sequence[Sample], host_power_w: float | None, no_energy_reason: str
) -> None:
    """Say where the joules of a window come from: a GPU's counter, its power, the processor's counter, or nowhere."""
    energy = found["energy_j"]
    if energy["provenance"] is not None:
        energy |= {"method": "counter", "scope": "gpu board"}
    elif gpus:
        powers = [found[metric]["provenance"] for metric in ("power_avg_w", "power_w")]
        if any(powers):
            label = weakest_provenance([next(p for p in powers if p), "estimated"])
            energy |= {
                "provenance": label,
                "reason": None,
                "source": found["power_w"]["source"],
                "method": "power_integral",
                "scope": "gpu board",
            }
    elif found["cpu_energy_j"]["provenance"] is not None:
        energy |= {**found["cpu_energy_j"], "method": "counter", "scope": "cpu package and dram"}
    elif host_power_w is not None:
        energy |= {"provenance": "estimated", "reason": None, "method": "model", "scope": "host power given"}
    else:
        energy |= {"reason": no_energy_reason, "scope": "none"}
    found["j_per_token"] = dict(energy)
