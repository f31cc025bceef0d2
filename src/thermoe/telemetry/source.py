"""What a telemetry source is: devices, samples with provenance, and the registry that opens one by name.

A source reads numbers and says how it came by each; it never raises for a fault of the hardware. A number that was not
read is ``None`` with its reason beside it, never 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable

from thermoe.errors import ConfigError, TelemetryError, UnknownNameError
from thermoe.registry import Registry
from thermoe.results import Provenance, weakest_provenance
from thermoe.telemetry.clock import Clock

#: Numbers a GPU board can deliver.
GPU_METRICS: tuple[str, ...] = (
    "energy_j",
    "power_w",
    "power_avg_w",
    "power_limit_w",
    "temp_c",
    "memory_temp_c",
    "memory_used_bytes",
    "memory_total_bytes",
    "sm_clock_hz",
    "memory_clock_hz",
    "utilization_frac",
)
#: What a GPU delivers that is not one number: a set of names, and a count of strangers.
GPU_STATE: tuple[str, ...] = ("throttle_reasons", "foreign_processes")
#: Numbers the host can deliver.
HOST_METRICS: tuple[str, ...] = (
    "host_memory_used_bytes",
    "host_memory_total_bytes",
    "process_memory_bytes",
    "utilization_frac",
    "cpu_energy_j",
    "dram_energy_j",
)
#: Counters that only grow; a smaller value means the counter was reset.
COUNTERS: tuple[str, ...] = ("energy_j", "cpu_energy_j", "dram_energy_j")
HOST_UUID = "host"
NO_READINGS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One thing that is measured.

    Attributes:
        uuid: the vendor's identifier (``GPU-...``), or ``host``.
        kind: ``gpu`` or ``host``.
        name: what a person calls it.
        index: place in the source's own order; ``None`` for the host.
        pci_bus_id: ``domain:bus:device.function``, when known.
        counter_period_s: how often the energy counter changes, in seconds.
        shared: other tenants use the same board (a MIG slice), so its energy is not this process's alone.
        mig_uuids: the slices of the board.
        mapped_by: how the device was tied to what this process sees: ``uuid``, ``pci``, ``index``, ``all`` or ``host``.
        provisional: the tie was read from the environment before the process had used the device.
        driver: version of the driver, when known.
    """

    uuid: str
    kind: Literal["gpu", "host"]
    name: str
    index: int | None = None
    pci_bus_id: str | None = None
    counter_period_s: float = 0.1
    shared: bool = False
    mig_uuids: tuple[str, ...] = ()
    mapped_by: str = "all"
    provisional: bool = False
    driver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One reading of one device; a metric that was not read is ``None`` and has its reason in ``missing``.

    Attributes:
        device_uuid: whose reading it is.
        t_s: monotonic time of the reading, the middle of the call, in seconds.
        read_latency_s: how long the call took, in seconds.
        energy_j: cumulative energy of the board, in joules since an arbitrary start.
        power_w: power now, in watts (the sensor averages a part of each update period).
        power_avg_w: mean power of the last second, in watts.
        power_limit_w: the enforced limit, in watts.
        temp_c: temperature of the die, in degrees Celsius.
        memory_temp_c: temperature of the memory, in degrees Celsius.
        memory_used_bytes: device memory in use by all processes.
        memory_total_bytes: device memory there is.
        sm_clock_hz: clock of the cores.
        memory_clock_hz: clock of the memory.
        utilization_frac: share of time in use, from 0 to 1.
        host_memory_used_bytes: host memory in use by all processes.
        host_memory_total_bytes: host memory there is.
        process_memory_bytes: resident memory of this process.
        cpu_energy_j: cumulative energy of the processor packages, in joules.
        dram_energy_j: cumulative energy of the host memory, in joules.
        throttle_reasons: names of what holds the clocks down now; empty when nothing does.
        foreign_processes: compute processes on the device that are not this one.
        provenance: what kind of number each metric is.
        missing: why a metric is ``None``.
        lost: the device has gone; no later reading will succeed.
        counter_epoch: grows by one each time a counter was seen to start anew; two samples of different epochs have no
            energy between them.
        counter_age_s: how long the energy counter has been seen not to change, in seconds.
        tick_s: when the counter took the value read, when the sampler knows it.
        recorded_provenance: what ``provenance`` was when a replayed sample was recorded.
    """

    device_uuid: str
    t_s: float
    read_latency_s: float = 0.0
    energy_j: float | None = None
    power_w: float | None = None
    power_avg_w: float | None = None
    power_limit_w: float | None = None
    temp_c: float | None = None
    memory_temp_c: float | None = None
    memory_used_bytes: float | None = None
    memory_total_bytes: float | None = None
    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    utilization_frac: float | None = None
    host_memory_used_bytes: float | None = None
    host_memory_total_bytes: float | None = None
    process_memory_bytes: float | None = None
    cpu_energy_j: float | None = None
    dram_energy_j: float | None = None
    throttle_reasons: frozenset[str] | None = None
    foreign_processes: int | None = None
    provenance: Mapping[str, Provenance] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    lost: bool = False
    counter_epoch: int = 0
    counter_age_s: float = 0.0
    tick_s: float | None = None
    recorded_provenance: Mapping[str, Provenance] = field(default_factory=dict)

    def value(self, metric: str) -> float | None:
        """Return the number called ``metric``, in the unit its name says."""
        found: float | None = getattr(self, metric)
        return found

    def with_values(self, values: Mapping[str, Any]) -> Sample:
        """Return the sample with fields replaced, by name."""
        return replace(self, **values)

    @classmethod
    def empty(cls, device: Device, t_s: float, metrics: Iterable[str], reason: str, *, lost: bool = False) -> Sample:
        """Build the sample of a reading that gave nothing, each metric missing for ``reason``."""
        return cls(device_uuid=device.uuid, t_s=t_s, missing=dict.fromkeys(metrics, reason), lost=lost)


@runtime_checkable
class Source(Protocol):
    """Where readings come from.

    Attributes:
        name: how it is called in tables and messages.
        provenance: the best label any of its numbers can carry.
        absent: for each metric the source would deliver on another machine, why it cannot here.
    """

    name: str
    provenance: Provenance

    @property
    def absent(self) -> Mapping[str, str]:
        """Why a metric is missing here, by metric; read only, so that a source may work it out when asked."""

    def devices(self) -> list[Device]:
        """Return what can be read; empty when there is nothing."""

    def metrics(self, device: Device) -> frozenset[str]:
        """Return the names that :meth:`read` may answer for ``device``."""

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read ``metrics`` once; a fault of the hardware becomes a reason in ``missing``, or ``lost``."""

    def close(self) -> None:
        """Let go of what was opened; calling it twice is harmless."""


class NullSource:
    """A source with nothing to read.

    Args:
        reason: why, as a reader of a report should see it.
        name: how the source is called.
    """

    provenance: Provenance = "measured"

    def __init__(self, reason: str, *, name: str = "none") -> None:
        self.name = name
        self.reason = reason
        self.absent: Mapping[str, str] = dict.fromkeys((*GPU_METRICS, *GPU_STATE, *HOST_METRICS), reason)

    def devices(self) -> list[Device]:
        """Return no device."""
        return []

    def metrics(self, device: Device) -> frozenset[str]:
        """Return no metric."""
        return frozenset()

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Return a sample in which everything is missing."""
        return Sample.empty(device, 0.0, metrics, self.reason)

    def close(self) -> None:
        """Do nothing."""


class CompositeSource:
    """Several sources that are read as one; the first that offers a device owns it."""

    def __init__(self, parts: Iterable[Source]) -> None:
        self.parts = list(parts)
        self.name = "+".join(part.name for part in self.parts if part.devices()) or "none"
        labels = [part.provenance for part in self.parts if part.devices()]
        self.provenance: Provenance = weakest_provenance(labels) or "measured"
        self._owner: dict[str, Source] = {}
        self._devices: list[Device] = []
        for part in self.parts:
            for device in part.devices():
                if device.uuid not in self._owner:
                    self._owner[device.uuid] = part
                    self._devices.append(device)
        self.absent: Mapping[str, str] = {
            metric: reason for part in reversed(self.parts) for metric, reason in part.absent.items()
        }

    def devices(self) -> list[Device]:
        """Return the devices of every part."""
        return list(self._devices)

    def metrics(self, device: Device) -> frozenset[str]:
        """Return the metrics the owner of ``device`` can read."""
        return self._owner[device.uuid].metrics(device)

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read through the owner of ``device``."""
        return self._owner[device.uuid].read(device, metrics)

    def close(self) -> None:
        """Close every part."""
        for part in self.parts:
            part.close()


SourceFactory = Callable[..., Source]
SOURCES: Registry[SourceFactory] = Registry("telemetry source", "thermoe.sources")
SOURCES.register_lazy("nvml", "thermoe.telemetry.nvml:NvmlSource")
SOURCES.register_lazy("host", "thermoe.telemetry.host:HostSource")
SOURCES.register_lazy("zeus", "thermoe.telemetry.zeus:ZeusSource")
SOURCES.register_lazy("simulated", "thermoe.telemetry.simulated:SimulatedSource")
SOURCES.register_lazy("replay", "thermoe.telemetry.replay:ReplayedSource")


def open_source(name: str | Source = "auto", *, clock: Clock | None = None, **options: Any) -> Source:
    """Open a telemetry source by name.

    ``auto`` reads NVIDIA GPUs and the host, whichever of them answers, and never a simulated source. On a machine
    without sensors it returns a source whose ``absent`` says why; it does not raise.

    Args:
        name: ``auto``, ``off``, or a name in :data:`SOURCES`; a source that is already open is returned as it is.
        clock: the clock its samples are stamped with; the system's by default.
        options: handed to the source's factory (``path=`` for ``replay``, ``seed=`` for ``simulated``).

    Raises:
        UnknownNameError: no source has that name.
        MissingDependencyError: the source was asked for by name and its package is not installed.
        TelemetryError: options are missing, or given to a source that takes none; or this is no source at all.
    """
    if not isinstance(name, str):
        checked_source(name)
        return name
    if clock is not None:
        options["clock"] = clock
    if name == "off":
        return NullSource("telemetry is off", name="off")
    if name == "auto":
        surplus = sorted(set(options) - {"clock"})
        if surplus:
            raise TelemetryError(
                f"the source 'auto' takes no option {surplus[0]!r}",
                where="open_source",
                accepted="clock",
                fix="name the source the option belongs to",
            )
        return CompositeSource([SOURCES.get("nvml")(**options), SOURCES.get("host")(**options)])
    checked_source(name)
    factory = SOURCES.get(name)
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise TelemetryError(
            f"the source {name!r} cannot be opened so: {error}",
            where="source",
            accepted=f"{name!r} with " + ", ".join(inspect.signature(factory).parameters),
            fix=f"open it in Python with its options and hand it over: open_source({name!r}, ...)",
        ) from error
    return factory(**options)


def checked_source(source: Any, *, where: str = "source") -> str | Source:
    """Return ``source`` when it is a known name or looks like an open source; nothing is opened.

    Raises:
        UnknownNameError: no source has that name.
        TelemetryError: it is neither a name nor a source.
    """
    names = ("auto", "off", *SOURCES)
    if isinstance(source, str):
        if source not in names:
            raise UnknownNameError.of("telemetry source", source, names, where=where)
        return source
    if not isinstance(source, Source):
        raise TelemetryError(
            f"{source!r} is no telemetry source",
            where=where,
            accepted=f"{', '.join(names)}, or a source that is open",
            fix="leave it out for 'auto'",
        )
    return source


def check_by_name(name: str, *, where: str = "telemetry") -> None:
    """Raise when there is no source of this name, or it cannot be opened by its name alone.

    Raises:
        UnknownNameError: no source has that name.
        ConfigError: the source needs options.
    """
    if name in ("auto", "off"):
        return
    checked_source(name, where=where)
    try:
        open_source(name).close()
    except TelemetryError as error:
        raise ConfigError(
            f"the telemetry source {name!r} needs more than its name: {error.what}",
            where=where,
            accepted="auto, off, or a source that opens by its name",
            fix="use --telemetry auto",
        ) from error
