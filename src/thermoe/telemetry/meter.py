"""The energy meter: opens a source, keeps a sampler going, and turns spans of a program into measured windows."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Self

from thermoe.errors import ConfigError, TelemetryError
from thermoe.telemetry import arguments
from thermoe.telemetry.aligned import AlignedWindow
from thermoe.telemetry.assemble import NO_SENSOR, Closing, assemble
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.devices import select_devices
from thermoe.telemetry.evaluate import REPEATABILITY_REL_SD, UNIFORM_SD, Edge, Settings, Span, direct_edge
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.open_window import OpenWindow
from thermoe.telemetry.sampler import Sampler
from thermoe.telemetry.source import GPU_METRICS, GPU_STATE, Device, Sample, Source, open_source
from thermoe.telemetry.status import describe_metrics, snapshot_of
from thermoe.telemetry.window import EdgeMode, EnergyWindow

#: Read at both ends of a window.
EDGE_METRICS = (*(m for m in GPU_METRICS if m != "power_limit_w"), *GPU_STATE)
HOST_EDGE_METRICS = ("cpu_energy_j", "dram_energy_j", "process_memory_bytes", "host_memory_used_bytes")
KEPT_RESULTS = 1024


class EnergyMeter:
    """Measures the joules of named spans of a program.

    Nothing is opened before the meter is entered or first used, and nothing a sensor does raises into the program: a
    number that cannot be had is ``None`` with a reason. Windows nest and overlap; each is measured on its own.

    Args:
        source: a source's name (``auto`` never picks a simulated one) or a source that is already open.
        devices: what to measure: ``None`` for every device this process may use, or an index, ``"cuda:0"``, UUID,
            PCI address, torch device, or a list of them.
        sync: waits for the device; called before an edge is read. By default PyTorch's CUDA work is awaited when
            PyTorch is loaded and CUDA is in use in this process, and nothing otherwise.
        period_s: time between two background samples, in seconds.
        telemetry: ``"off"`` reads nothing at all; so does the environment variable ``THERMOE_TELEMETRY=off``.
        host_power_w: power of the host in watts, when the user knows it; joules from it are labelled ``estimated``.
        allow_fast: permit ``period_s`` below 1 s, which disturbs what is measured.
        sample: run the background sampler.
        min_ticks: fewest counter updates a window must have to get a figure.
        repeatability_rel_sd: relative scatter of repeated windows on this machine, part of each uncertainty.
        clock: the clock to measure by; the source's own where it brings one.

    Raises:
        ConfigError: a number is out of range.
        UnknownNameError: no source has that name (when opened).
        MissingDependencyError: the named source needs a package that is not installed (when opened).
    """

    def __init__(
        self,
        source: str | Source = "auto",
        devices: Any = None,
        sync: Callable[[], object] | None = None,
        period_s: float = 1.0,
        *,
        telemetry: str = "on",
        host_power_w: float | None = None,
        allow_fast: bool = False,
        sample: bool = True,
        min_ticks: int = 10,
        repeatability_rel_sd: float = REPEATABILITY_REL_SD,
        clock: Clock | None = None,
    ) -> None:
        self._period_s = arguments.checked_period(period_s, allow_fast)
        self._allow_fast = allow_fast
        self._host_power_w = arguments.checked_power(host_power_w)
        self._settings = Settings(min_ticks=min_ticks, repeatability_rel_sd=repeatability_rel_sd)
        off = not arguments.checked_switch(telemetry) or arguments.is_off(os.environ)
        self._source_wanted: str | Source = "off" if off else source
        self._devices_wanted = devices
        self._sync = sync
        self._sample = sample
        self._source: Source | None = None
        self._clock_wanted = clock
        self._clock = clock or getattr(source, "clock", None) or SYSTEM_CLOCK
        self._lock = threading.Lock()
        self._named: dict[str, OpenWindow] = {}
        self._idle_w: list[dict[str, float]] = []
        self._results: deque[EnergyWindow] = deque(maxlen=KEPT_RESULTS)
        self._sampler: Sampler | None = None
        self._devices: list[Device] = []
        self._closed = False

    # -- opening and closing ------------------------------------------------------------------------------------------

    @property
    def clock(self) -> Clock:
        """The clock everything is measured by."""
        return self._clock

    def open(self) -> Self:
        """Open the source and start the sampler, if that has not happened yet.

        Raises:
            TelemetryError: the meter was closed.
        """
        if self._closed:
            raise TelemetryError(
                "the energy meter is closed",
                where="EnergyMeter",
                accepted="a meter inside its with block",
                fix="make a new EnergyMeter",
            )
        self._open_source()
        with self._lock:
            if self._sampler is None and self._sample and self._source_wanted != "off":
                self._sampler = Sampler(
                    self._reader,
                    self._devices,
                    period_s=self._period_s,
                    allow_fast=self._allow_fast,
                    clock=self._clock,
                )
                self._sampler.start()
        return self

    def _open_source(self) -> Source:
        with self._lock:
            if self._source is None:
                wanted = self._source_wanted
                source = open_source(wanted, clock=self._clock_wanted)
                self._clock = getattr(source, "clock", None) or self._clock
                self._devices = select_devices(source.devices(), self._devices_wanted)
                self._reader = GatedReader(source, self._clock)
                self._source = source
            return self._source

    def close(self) -> None:
        """Stop the sampler and close the source; windows still open stay without a result. Harmless when repeated."""
        self._closed = True
        if self._sampler is not None:
            self._sampler.close()
        if self._source is not None:
            self._source.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- windows ------------------------------------------------------------------------------------------------------

    def window(self, name: str, *, tokens: float | None = None, edges: str = "direct") -> OpenWindow:
        """Return a window to enter with ``with``, or to decorate a function with.

        Args:
            name: what is measured; names may repeat.
            tokens: tokens of the span, when known beforehand.
            edges: ``direct`` reads the sensor at both ends; ``sampled`` reads nothing on this thread and takes the
                ends from the background samples.

        Raises:
            ConfigError: ``edges`` is neither.
        """
        if edges not in ("direct", "sampled"):
            raise ConfigError(
                f"edges={edges!r} is not a way to find the ends of a window",
                where="EnergyMeter.window(edges=...)",
                accepted="direct, sampled",
                fix="use aligned_window() for edges on counter ticks",
            )
        return OpenWindow(self, name, tokens=tokens, sampled=edges == "sampled")

    def aligned_window(self, name: str, *, min_s: float) -> AlignedWindow:
        """Return a window from one step of the energy counter to another, at least ``min_s`` seconds apart.

        Keep the device busy until ``window.done``, and call ``window.count(tokens, mark)`` after each step.

        Raises:
            ConfigError: ``min_s`` is not a length of time.
        """
        return AlignedWindow(self, name, min_s=min_s)

    def begin_window(self, name: str, *, restart: bool = False) -> None:
        """Open a window that :meth:`end_window` closes by its name.

        Args:
            name: of the window.
            restart: drop an open window of this name and begin again.

        Raises:
            TelemetryError: a window of this name is open and ``restart`` is false.
        """
        if name in self._named:
            if not restart:
                raise TelemetryError(
                    f"the window {name!r} is open already",
                    where="begin_window",
                    accepted="one open window per name",
                    fix=f"call end_window({name!r}) first, or begin_window({name!r}, restart=True)",
                )
            del self._named[name]
        window = self.window(name)
        window.__enter__()
        self._named[name] = window

    def end_window(self, name: str, *, tokens: float | None = None, cancel: bool = False) -> EnergyWindow:
        """Close the window ``name`` and return it.

        Args:
            name: given to :meth:`begin_window`.
            tokens: tokens processed in the span.
            cancel: drop the measurement; the window returned is invalid with the reason ``cancelled``.

        Raises:
            TelemetryError: no window of this name is open.
        """
        window = self._named.pop(name, None)
        if window is None:
            raise TelemetryError(
                f"no window {name!r} is open",
                where="end_window",
                accepted=", ".join(sorted(self._named)) or "no window is open",
                fix=f"call begin_window({name!r}) first",
            )
        if tokens is not None:
            window.tokens = arguments.checked_tokens(tokens)
        if cancel:
            return window.cancel()
        window.__exit__(None, None, None)
        return window.result

    def results(self, name: str | None = None) -> list[EnergyWindow]:
        """Return the windows closed so far, the latest 1024, all or those of one name."""
        return [window for window in list(self._results) if name is None or window.name == name]

    # -- idle reference -----------------------------------------------------------------------------------------------

    def measure_idle(self, duration_s: float = 10.0) -> EnergyWindow:
        """Measure the devices at rest for ``duration_s`` seconds, and use it as the idle reference of later windows.

        Call it before and after the work: net energy is then a range when the two differ by more than 10%.
        """
        length_s = arguments.checked_duration(duration_s)
        with self.window("idle") as window:
            self._clock.sleep_s(length_s)
        found = window.result
        powers = {uuid: part.power_w for uuid, part in found.devices.items() if part.power_w is not None}
        if not found.devices and found.power_w is not None:
            powers = {"host": found.power_w}
        if powers:
            self._idle_w.append(powers)
        return found

    # -- what is known now --------------------------------------------------------------------------------------------

    @property
    def devices(self) -> list[Device]:
        """The devices this meter measures; opens the source, not the sampler."""
        self._open_source()
        return list(self._devices)

    @property
    def source(self) -> Source:
        """The source readings come from; opened when first asked for."""
        return self._open_source()

    @property
    def sampler(self) -> Sampler | None:
        """The background sampler; ``None`` before the meter is opened and when telemetry is off."""
        return self._sampler

    def snapshot(self) -> dict[str, float | None]:
        """Return the latest reading: sums of power and memory, highest temperatures, means of clocks and load.

        The background sampler's newest samples are used while it runs, so that a call costs nothing; otherwise the
        sensor is read now. Keys carry their units; what was not measured is ``None``.
        """
        self._open_source()
        samples = [self._latest(device) for device in self._devices]
        return snapshot_of(self._devices, samples, self._clock.now_s())

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return, for each metric, ``provenance`` and ``source``, or ``provenance=None`` and the ``reason``."""
        source = self._open_source()
        samples = [self._latest(device) for device in self._devices]
        return describe_metrics(source, self._devices, samples, self._host_power_w, self._absent_reason())

    def _latest(self, device: Device) -> Sample:
        if self._sampler is not None and self._sampler.running:
            sample = self._sampler.latest(device.uuid)
            if sample is not None:
                return sample
        return self._reader.read(device, sorted(self._reader.source.metrics(device)))

    def _absent_reason(self) -> str:
        """Return why there are no joules on this machine, shortest cause first."""
        source = self._open_source()
        if not source.devices() and "energy_j" in source.absent and "cpu_energy_j" in source.absent:
            gpu, cpu = source.absent["energy_j"], source.absent["cpu_energy_j"]
            return gpu if gpu == cpu else f"{cpu}; no GPU"
        cpu = source.absent.get("cpu_energy_j", "no RAPL")
        return f"{cpu}; no GPU" if cpu else NO_SENSOR

    # -- used by windows ----------------------------------------------------------------------------------------------

    def wait_for_device(self) -> set[str]:
        """Wait until the device has done what was queued; return a flag instead of raising."""
        try:
            (self._sync or _wait_for_torch)()
        except Exception as error:  # an error of the device surfaces again at the user's next call; here it must not
            self._reader.warn_once("sync", f"waiting for the device failed: {type(error).__name__}: {error}")
            return {"sync_failed"}
        return set()

    @property
    def reader(self) -> GatedReader:
        """The reader that every thread of this meter shares; opens the source."""
        self._open_source()
        return self._reader

    def read_edge(self, device: Device) -> Sample:
        """Read what a window wants to know of a device at its ends."""
        offered = self._reader.source.metrics(device)
        wanted = EDGE_METRICS if device.kind == "gpu" else HOST_EDGE_METRICS
        return self._reader.read(device, [metric for metric in wanted if metric in offered])

    def direct_edges(self) -> dict[str, Edge]:
        """Read every device once and return the edges by UUID."""
        return {device.uuid: direct_edge(device, self.read_edge(device)) for device in self._devices}

    def sampled_edges(self, start_s: float, end_s: float) -> tuple[dict[str, Edge], dict[str, Edge]]:
        """Return the first and the last background sample between two moments as edges, by UUID."""
        started: dict[str, Edge] = {}
        ended: dict[str, Edge] = {}
        for device in self._devices:
            found = [] if self._sampler is None else self._sampler.between(device.uuid, start_s, end_s)
            if len(found) < 2:
                reason = f"{len(found)} background samples in the window; at least 2 are needed"
                empty = Sample.empty(device, start_s, ("energy_j", "cpu_energy_j", "dram_energy_j"), reason)
                started[device.uuid] = ended[device.uuid] = Edge(empty, start_s, 0.0, reason)
            else:
                on_ticks = found[0].tick_s is not None and found[-1].tick_s is not None
                edge = _tick_edge if on_ticks else direct_edge
                started[device.uuid], ended[device.uuid] = edge(device, found[0]), edge(device, found[-1])
        return started, ended

    def close_window(
        self,
        name: str,
        *,
        edges: EdgeMode,
        started: Mapping[str, Edge],
        ended: Mapping[str, Edge],
        duration_s: float,
        started_at: float,
        tokens: float | Callable[[float, float], float] | None,
        flags: frozenset[str],
        reason: str | None,
    ) -> EnergyWindow:
        """Evaluate the edges of a window, keep the result, and return it."""
        spans = [self._span(d, started[d.uuid], ended[d.uuid], edges) for d in self._devices if d.uuid in started]
        closing = Closing(
            name=name,
            edges=edges,
            duration_s=duration_s,
            started_at=started_at,
            tokens=tokens,
            flags=flags,
            reason=reason,
            host_power_w=self._host_power_w,
            idle_w=tuple(self._idle_w),
            absent_reason=self._absent_reason(),
        )
        host = next((span for span in spans if span.device.kind == "host"), None)
        result = assemble(closing, [span for span in spans if span.device.kind == "gpu"], host, self._settings)
        self._results.append(result)
        return result

    def _span(self, device: Device, start: Edge, end: Edge, edges: EdgeMode) -> Span:
        sampler = self._sampler
        samples = [] if sampler is None else sampler.between(device.uuid, start.t_s, end.t_s)
        period_s = sampler.period_s if sampler is not None and (sampler.running or samples) else None
        return Span(device=device, start=start, end=end, samples=samples, edges=edges, sampler_period_s=period_s)


def _tick_edge(device: Device, sample: Sample) -> Edge:
    """Return the edge of a reading that followed a predicted step: it stands for that step, give or take one call."""
    tick_s = sample.t_s if sample.tick_s is None else sample.tick_s
    return Edge(sample, tick_s, (sample.t_s - tick_s + sample.read_latency_s) * UNIFORM_SD, kind="sampled")


def _wait_for_torch() -> None:
    """Wait for PyTorch's CUDA work when PyTorch is loaded and CUDA is in use here; it is never loaded for this."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is not None and cuda.is_initialized():
        cuda.synchronize()
