"""The one door readings pass: a range gate, counters watched for resets and standstill, faults turned into reasons."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from thermoe.telemetry.clock import Clock
from thermoe.telemetry.source import COUNTERS, Device, Sample, Source

_LOG = logging.getLogger("thermoe.telemetry")
#: A call longer than this is slow: the sensor is busy or the driver is in trouble.
SLOW_READ_S = 0.05
#: Longest wait for another thread's reading of the same device.
BUSY_TIMEOUT_S = 1.0

#: Smallest (excluded) and largest (included) value that can be true; 255 and 65535 are how firmware writes "no value".
_LIMITS: dict[str, tuple[float, float]] = {
    "temp_c": (0.0, 150.0),
    "memory_temp_c": (0.0, 150.0),
    "power_w": (0.0, 2000.0),
    "power_avg_w": (0.0, 2000.0),
    "power_limit_w": (0.0, 5000.0),
    "sm_clock_hz": (0.0, 1e11),
    "memory_clock_hz": (0.0, 1e11),
}
_NOT_NEGATIVE = (
    "energy_j",
    "cpu_energy_j",
    "dram_energy_j",
    "memory_used_bytes",
    "memory_total_bytes",
    "host_memory_used_bytes",
    "host_memory_total_bytes",
    "process_memory_bytes",
)


def implausible(metric: str, value: float) -> str | None:
    """Return why ``value`` cannot be a true reading of ``metric``, or ``None`` when it can."""
    if not math.isfinite(value):
        return f"reading rejected: {value} is not a number"
    if metric in _LIMITS:
        low, high = _LIMITS[metric]
        if not low < value <= high:
            return f"reading rejected: {value:g} is outside ({low:g}, {high:g}]"
    if metric in _NOT_NEGATIVE and value < 0:
        return f"reading rejected: {value:g} is negative"
    if metric == "utilization_frac" and not 0 <= value <= 1:
        return f"reading rejected: {value:g} is outside [0, 1]"
    return None


@dataclass(slots=True)
class _Counters:
    """What is remembered of a device's counters between readings."""

    last: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    changed_s: float | None = None


class WarnOnce:
    """Logs the first occurrence of each cause and stays quiet afterwards."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, cause: str, message: str) -> None:
        """Log ``message`` as a warning, unless ``cause`` has been logged before."""
        if cause not in self._seen:
            self._seen.add(cause)
            _LOG.warning("%s", message)


class GatedReader:
    """Reads one source for every thread of a process: one reading of a device at a time, nothing implausible let by.

    Args:
        source: where the readings come from.
        clock: the clock the source stamps its samples with.

    Attributes:
        rejected: how many readings of each metric the range gate turned away.
        slow_reads: how many calls took longer than 50 ms.
    """

    def __init__(self, source: Source, clock: Clock) -> None:
        self.source = source
        self.clock = clock
        self.rejected: Counter[str] = Counter()
        self.slow_reads = 0
        self.warn_once = WarnOnce()
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._pid = os.getpid()
        self._locks: dict[str, threading.Lock] = {}
        self._memory: dict[str, _Counters] = {}
        self._table_lock = threading.Lock()

    def _lock_of(self, device: Device) -> threading.Lock:
        if self._pid != os.getpid():
            # A thread of the parent may have held these locks when the process forked; nobody would release them here.
            self._start_afresh()
        with self._table_lock:
            self._memory.setdefault(device.uuid, _Counters())
            return self._locks.setdefault(device.uuid, threading.Lock())

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read ``metrics`` of ``device`` once and let only plausible values by. It never raises."""
        wanted = tuple(metrics)
        lock = self._lock_of(device)
        if not lock.acquire(timeout=BUSY_TIMEOUT_S):
            return Sample.empty(device, self.clock.now_s(), wanted, "the sensor did not answer another thread in time")
        try:
            sample = self._read_source(device, wanted)
            if sample.read_latency_s > SLOW_READ_S:
                self.slow_reads += 1
                self.warn_once("slow", f"a telemetry read took {sample.read_latency_s * 1e3:.0f} ms (usual: 4 ms)")
            return self._gate(device, sample)
        finally:
            lock.release()

    def _read_source(self, device: Device, wanted: tuple[str, ...]) -> Sample:
        try:
            return self.source.read(device, wanted)
        except Exception as error:  # a source is third-party code; whatever it raises must not reach the user's step
            reason = f"the source {self.source.name!r} raised {type(error).__name__}: {error}"
            self.warn_once(f"raised:{type(error).__name__}", reason)
            return Sample.empty(device, self.clock.now_s(), wanted, reason)

    def _gate(self, device: Device, sample: Sample) -> Sample:
        changes: dict[str, Any] = {}
        missing = dict(sample.missing)
        for metric in (*_LIMITS, *_NOT_NEGATIVE, "utilization_frac"):
            value = sample.value(metric)
            fault = None if value is None else implausible(metric, value)
            if fault is not None:
                changes[metric], missing[metric] = None, fault
        used, total = sample.memory_used_bytes, sample.memory_total_bytes
        if used is not None and total is not None and used > total and "memory_used_bytes" not in changes:
            changes["memory_used_bytes"] = None
            missing["memory_used_bytes"] = "reading rejected: more memory used than there is"
        self.rejected.update(changes.keys())
        memory = self._memory[device.uuid]
        for metric in COUNTERS:
            value = sample.value(metric)
            if value is not None and metric not in changes and not self._watch(memory, metric, value, sample.t_s):
                changes[metric] = None
                missing[metric] = "the counter went backwards"
                self.warn_once("backwards", f"the energy counter of {device.name} went backwards; it was reset")
        age_s = 0.0 if memory.changed_s is None else max(0.0, sample.t_s - memory.changed_s)
        return replace(
            sample,
            missing=missing,
            provenance={m: p for m, p in sample.provenance.items() if m not in changes},
            counter_epoch=memory.epoch,
            counter_age_s=age_s if sample.energy_j is not None and "energy_j" not in changes else 0.0,
            **changes,
        )

    def _watch(self, memory: _Counters, metric: str, value: float, t_s: float) -> bool:
        """Remember a counter's value; false, and a new epoch, when it is below the last one."""
        last = memory.last.get(metric)
        memory.last[metric] = value
        if last is not None and value < last:
            memory.epoch += 1
            self.rejected[metric] += 1
            if metric == "energy_j":
                memory.changed_s = t_s
            return False
        if metric == "energy_j" and (last is None or value != last):
            memory.changed_s = t_s
        return True
