"""The host: memory and load through psutil, processor and memory energy through the RAPL files where they can be read.

RAPL counters wrap. A running total is kept from the modular differences, so it must be read at least twice per wrap; a
longer silence starts the total anew, which the reader behind this source reports as a reset.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from thermoe.results import Provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.source import HOST_METRICS, HOST_UUID, Device, Sample

RAPL_ROOT = Path("/sys/class/powercap")
#: No package of today draws more; with the counter's range it bounds the time of one wrap from below.
MOST_PACKAGE_POWER_W = 1000.0
_UJ = 1e-6


@dataclass(slots=True)
class _Zone:
    """One counter: its file, its range, and the value read last."""

    name: str
    path: Path
    range_uj: int | None
    last_uj: int | None = None


class RaplCounters:
    """Running totals of the package and memory zones under a powercap folder.

    Only packages and memory are summed: cores and the uncore lie inside a package and a platform zone around it, so
    adding them would count joules twice.

    Args:
        root: the powercap folder.

    Attributes:
        reason: why nothing can be read, or ``None``.
    """

    def __init__(self, root: Path = RAPL_ROOT) -> None:
        self.reason: str | None = None
        self._zones: dict[str, list[_Zone]] = {"cpu_energy_j": [], "dram_energy_j": []}
        self._total_j: dict[str, float] = {}
        self._read_at_s: dict[str, float] = {}
        self._find(root)

    def _find(self, root: Path) -> None:
        try:
            folders = {p.name: p for p in sorted(root.glob("intel-rapl:*"))}
            for parent in list(folders.values()):
                folders.update({p.name: p for p in sorted(parent.glob("intel-rapl:*"))})
            kinds = [(folder, (folder / "name").read_text().strip()) for folder in folders.values()]
        except OSError as error:
            self.reason = f"RAPL not readable ({error.strerror})"
            return
        for folder, kind in kinds:
            metric = "cpu_energy_j" if kind.startswith("package") else "dram_energy_j" if kind == "dram" else None
            if metric is not None:
                self._zones[metric].append(_Zone(kind, folder / "energy_uj", _read_int(folder / "max_energy_range_uj")))
        if not self._zones["cpu_energy_j"]:
            self.reason = "no RAPL"
            return
        for metric in self._zones:
            outcome = self.read(metric, 0.0)
            if isinstance(outcome, str) and metric == "cpu_energy_j":
                self.reason = outcome
            self._read_at_s.pop(metric, None)

    @property
    def longest_silence_s(self) -> float:
        """The longest time between two readings, in seconds, in which no counter can have wrapped twice."""
        ranges = [z.range_uj for zones in self._zones.values() for z in zones if z.range_uj]
        return 0.5 * min(ranges) * _UJ / MOST_PACKAGE_POWER_W if ranges else float("inf")

    def read(self, metric: str, t_s: float) -> float | str:
        """Return the running total of ``metric`` in joules, or why it cannot be read.

        A partial sum is never returned: when one socket cannot be read the total is missing.
        """
        zones = self._zones[metric]
        if not zones:
            return "no RAPL" if metric == "cpu_energy_j" else "this machine has no RAPL memory zone"
        silence_s = t_s - self._read_at_s.get(metric, t_s)
        added_uj = 0
        for zone in zones:
            try:
                value = int(zone.path.read_text())
            except PermissionError:
                return "RAPL not readable (only root may; grant read permission on energy_uj)"
            except (OSError, ValueError) as error:
                return f"RAPL not readable ({error})"
            last, zone.last_uj = zone.last_uj, value
            if last is None:
                continue
            if value < last and zone.range_uj is None:
                self._total_j[metric] = 0.0
                return "the RAPL counter wrapped and its range is unknown"
            added_uj += value - last if value >= last else value - last + (zone.range_uj or 0)
        self._read_at_s[metric] = t_s
        if silence_s > self.longest_silence_s:
            self._total_j[metric] = 0.0
            return f"RAPL was not read for {silence_s:.0f} s and may have wrapped more than once"
        self._total_j[metric] = self._total_j.get(metric, 0.0) + added_uj * _UJ
        return self._total_j[metric]


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


class HostSource:
    """Readings of the machine and of this process.

    Args:
        rapl_root: the powercap folder.
        clock: stamps the samples.
        process_module: a module shaped like ``psutil``; the installed one by default, loaded on first use.
    """

    name = "host"
    provenance: Provenance = "measured"

    def __init__(
        self, rapl_root: str | os.PathLike[str] = RAPL_ROOT, *, clock: Clock = SYSTEM_CLOCK, process_module: Any = None
    ) -> None:
        self._clock = clock
        self._rapl = RaplCounters(Path(rapl_root))
        self._psutil = process_module
        self._psutil_reason: str | None = None
        self._process: Any = None
        self._process_id: int | None = None
        self._load_read = False
        period_s = 0.001 if self._rapl.reason is None else 0.1
        self._device = Device(uuid=HOST_UUID, kind="host", name="host", mapped_by="host", counter_period_s=period_s)

    @property
    def absent(self) -> Mapping[str, str]:
        """Why there is no processor energy here; empty when there is."""
        if self._rapl.reason is None:
            return {}
        return {"cpu_energy_j": self._rapl.reason, "dram_energy_j": self._rapl.reason}

    def devices(self) -> list[Device]:
        """Return the host."""
        return [self._device]

    def metrics(self, device: Device) -> frozenset[str]:
        """Return what may be asked of the host."""
        return frozenset(m for m in HOST_METRICS if m not in self.absent)

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read ``metrics`` of the host. It never raises for a file or a process table that cannot be read."""
        wanted = set(metrics)
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        before_s = self._clock.now_s()
        for metric in ("cpu_energy_j", "dram_energy_j"):
            if metric in wanted:
                outcome: float | str = self._rapl.reason or self._rapl.read(metric, before_s)
                if isinstance(outcome, str):
                    missing[metric] = outcome
                else:
                    values[metric] = outcome
        after_s = self._clock.now_s()
        for metric in wanted - {"cpu_energy_j", "dram_energy_j"}:
            outcome = self._from_process_table(metric)
            if isinstance(outcome, str):
                missing[metric] = outcome
            else:
                values[metric] = outcome
        base = Sample(
            device_uuid=HOST_UUID,
            t_s=0.5 * (before_s + after_s),
            read_latency_s=after_s - before_s,
            provenance=dict.fromkeys(values, "measured"),
            missing=missing,
        )
        return base.with_values(values)

    def _from_process_table(self, metric: str) -> float | str:
        if metric not in HOST_METRICS:
            return "the host does not measure it"
        if self._psutil is None and self._psutil_reason is None:
            try:
                self._psutil = import_module("psutil")
            except ImportError as error:
                self._psutil_reason = f"psutil cannot be imported ({error})"
        if self._psutil is None:
            return self._psutil_reason or "psutil cannot be imported"
        try:
            return self._ask_psutil(metric)
        except Exception as error:  # without a proc file system psutil fails in ways that differ by platform
            return f"the system does not tell ({type(error).__name__}: {error})"

    def _ask_psutil(self, metric: str) -> float | str:
        if metric == "process_memory_bytes":
            if self._process_id != os.getpid():
                self._process, self._process_id = self._psutil.Process(os.getpid()), os.getpid()
            return float(self._process.memory_info().rss)
        if metric == "utilization_frac":
            share = float(self._psutil.cpu_percent(interval=None)) / 100.0
            if not self._load_read:
                self._load_read = True
                return "the processor's load is known from the second reading on"
            return share
        memory = self._psutil.virtual_memory()
        return float(memory.used if metric == "host_memory_used_bytes" else memory.total)

    def close(self) -> None:
        """Do nothing: no file stays open."""
