"""NVIDIA boards through the vendor's library: energy, power, temperature, memory, clocks, and who else is on the board.

One batched query of four fields per sample costs what the energy counter alone costs (about 4 ms on an H200), so energy
never comes without power and memory temperature. Every field has its own status: one that fails is dropped alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from thermoe.results import Provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.devices import visible_devices
from thermoe.telemetry.nvml_library import LIBRARY, Fault, NvmlLibrary, fault_of
from thermoe.telemetry.source import GPU_METRICS, GPU_STATE, Device, Sample

#: Field number, metric, and what one unit of the field is in the metric's unit (mJ, mW, degrees).
_FIELDS: dict[int, tuple[str, float]] = {
    83: ("energy_j", 1e-3),
    186: ("power_w", 1e-3),
    185: ("power_avg_w", 1e-3),
    82: ("memory_temp_c", 1.0),
}
_UNION_MEMBER = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}
_THROTTLE_BITS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}
_MHZ = 1e6
#: Functions that answer when a field does not, with their unit; the power call's meaning changed between generations.
_FIELD_FALLBACK = {
    "energy_j": ("nvmlDeviceGetTotalEnergyConsumption", 1e-3),
    "power_w": ("nvmlDeviceGetPowerUsage", 1e-3),
}


class NvmlSource:
    """Readings of the NVIDIA boards this process may use.

    It makes no CUDA context and needs no root. Nothing is loaded until the first call. A machine without a driver
    has no devices, and ``absent`` says why.

    Args:
        module: a module shaped like ``pynvml``; the installed nvidia-ml-py by default.
        clock: stamps the samples.
        environment: where ``CUDA_VISIBLE_DEVICES`` is looked up; the process's own by default.
    """

    name = "nvml"
    provenance: Provenance = "measured"

    def __init__(
        self, module: Any | None = None, *, clock: Clock = SYSTEM_CLOCK, environment: Mapping[str, str] | None = None
    ) -> None:
        self._library = LIBRARY if module is None else NvmlLibrary(module)
        self._clock = clock
        self._environment = os.environ if environment is None else environment
        self._process = os.getpid()
        self._devices: list[Device] | None = None
        self._handles: dict[str, Any] = {}
        self._dropped: dict[tuple[str, str], str] = {}
        self._fallback: set[tuple[str, str]] = set()
        self._reason = "no GPU"
        self.notes: tuple[str, ...] = ()

    @property
    def absent(self) -> Mapping[str, str]:
        """Why nothing is measured here, by metric; empty when there is a board."""
        return {} if self.devices() else dict.fromkeys((*GPU_METRICS, *GPU_STATE), self._reason)

    def devices(self) -> list[Device]:
        """Return the boards left visible by ``CUDA_VISIBLE_DEVICES``, in CUDA's order."""
        if self._devices is None:
            self._devices = self._enumerate()
        return list(self._devices)

    def _enumerate(self) -> list[Device]:
        count = self._library.call("nvmlDeviceGetCount")
        if isinstance(count, Fault):
            self._reason = f"no GPU ({count.reason})"
            return []
        driver = self._library.text("nvmlSystemGetDriverVersion")
        boards: list[Device] = []
        for index in range(count):
            handle = self._library.call("nvmlDeviceGetHandleByIndex", index)
            uuid = None if isinstance(handle, Fault) else self._library.text("nvmlDeviceGetUUID", handle)
            if uuid is None:
                self.notes += (f"board {index} does not answer",)
                continue
            self._handles[uuid] = handle
            boards.append(
                Device(
                    uuid=uuid,
                    kind="gpu",
                    name=self._library.text("nvmlDeviceGetName", handle) or "NVIDIA GPU",
                    index=index,
                    pci_bus_id=self._pci_bus_id(handle),
                    driver=driver,
                    **self._slices(handle),
                )
            )
        visible = visible_devices(boards, self._environment)
        self.notes += visible.notes
        if not visible.devices:
            hidden = f"CUDA_VISIBLE_DEVICES={self._environment.get('CUDA_VISIBLE_DEVICES', '')!r} leaves none visible"
            self._reason = f"no GPU ({hidden})" if boards else "no GPU"
        return list(visible.devices)

    def _pci_bus_id(self, handle: Any) -> str | None:
        info = self._library.call("nvmlDeviceGetPciInfo", handle)
        raw = None if isinstance(info, Fault) else getattr(info, "busId", None)
        return raw.decode(errors="replace") if isinstance(raw, bytes) else raw

    def _slices(self, handle: Any) -> dict[str, Any]:
        mode = self._library.call("nvmlDeviceGetMigMode", handle)
        if isinstance(mode, Fault) or not mode[0]:
            return {}
        most = self._library.call("nvmlDeviceGetMaxMigDeviceCount", handle)
        found = []
        for position in range(0 if isinstance(most, Fault) else most):
            part = self._library.call("nvmlDeviceGetMigDeviceHandleByIndex", handle, position)
            uuid = None if isinstance(part, Fault) else self._library.text("nvmlDeviceGetUUID", part)
            if uuid is not None:
                found.append(uuid)
        return {"shared": True, "mig_uuids": tuple(found)}

    def metrics(self, device: Device) -> frozenset[str]:
        """Return what may be asked of a board; what it turns out not to support is dropped later, with a reason."""
        return frozenset((*GPU_METRICS, *GPU_STATE))

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read ``metrics`` of one board. It never raises for a fault of the hardware."""
        wanted = set(metrics)
        self._start_again_after_fork()
        handle = self._handles.get(device.uuid)
        if handle is None:
            reason = self._reason if not self.devices() else "the board is not among the visible ones"
            return Sample.empty(device, self._clock.now_s(), wanted, reason)
        reading = _Reading(device.uuid, self._clock.now_s())
        if wanted & {metric for metric, _ in _FIELDS.values()}:
            before_s = self._clock.now_s()
            self._read_fields(reading, handle)
            after_s = self._clock.now_s()
            reading.t_s, reading.latency_s = 0.5 * (before_s + after_s), after_s - before_s
        self._read_singles(reading, handle, wanted)
        return reading.sample()

    def _start_again_after_fork(self) -> None:
        if self._process != os.getpid():
            self._process = os.getpid()
            self._devices, self._handles = None, {}
            self.devices()

    def _read_fields(self, reading: _Reading, handle: Any) -> None:
        uuid = reading.uuid
        asked = [number for number, (metric, _) in _FIELDS.items() if (uuid, metric) not in self._dropped]
        for metric, _ in _FIELDS.values():
            if (uuid, metric) in self._dropped and (uuid, metric) not in self._fallback:
                reading.missing[metric] = self._dropped[uuid, metric]
        values = self._library.call("nvmlDeviceGetFieldValues", handle, asked) if asked else []
        for position, number in enumerate(asked):
            metric, unit = _FIELDS[number]
            if isinstance(values, Fault):
                self._field_failed(reading, handle, metric, values)
            elif values[position].nvmlReturn != 0:
                self._field_failed(reading, handle, metric, fault_of(int(values[position].nvmlReturn)))
            else:
                member = _UNION_MEMBER.get(int(values[position].valueType))
                if member is None:
                    reading.missing[metric] = "the driver gave a value of unknown type"
                else:
                    reading.values[metric] = float(getattr(values[position].value, member)) * unit
        for metric, (function, unit) in _FIELD_FALLBACK.items():
            if (uuid, metric) in self._fallback:
                self._keep(reading, metric, self._library.call(function, handle), unit)

    def _field_failed(self, reading: _Reading, handle: Any, metric: str, fault: Fault) -> None:
        if fault.standing == "permanent":
            self._dropped[reading.uuid, metric] = fault.reason
            if metric in _FIELD_FALLBACK:
                outcome = self._library.call(_FIELD_FALLBACK[metric][0], handle)
                if not isinstance(outcome, Fault):
                    self._fallback.add((reading.uuid, metric))
                    return
        reading.failed(metric, fault)

    def _keep(self, reading: _Reading, metric: str, outcome: Any, unit: float = 1.0) -> None:
        if isinstance(outcome, Fault):
            if outcome.standing == "permanent":
                self._dropped[reading.uuid, metric] = outcome.reason
            reading.failed(metric, outcome)
        else:
            reading.values[metric] = float(outcome) * unit

    def _first_that_answers(self, names: tuple[str, ...], *arguments: Any) -> Any:
        """Call the functions in turn until one exists and answers; newer and older drivers lack different ones."""
        outcome: Any = Fault("permanent", "no such function")
        for name in names:
            outcome = self._library.call(name, *arguments)
            if not isinstance(outcome, Fault) or outcome.standing != "permanent":
                return outcome
        return outcome

    def _read_singles(self, reading: _Reading, handle: Any, wanted: set[str]) -> None:
        call = self._library.call
        single = {
            "temp_c": lambda: self._first_that_answers(
                ("nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV"), handle, 0
            ),
            "power_limit_w": lambda: call("nvmlDeviceGetEnforcedPowerLimit", handle),
            "sm_clock_hz": lambda: call("nvmlDeviceGetClockInfo", handle, 1),
            "memory_clock_hz": lambda: call("nvmlDeviceGetClockInfo", handle, 2),
        }
        units = {"power_limit_w": 1e-3, "sm_clock_hz": _MHZ, "memory_clock_hz": _MHZ}
        for metric, read in single.items():
            if metric in wanted and self._still_offered(reading, metric):
                self._keep(reading, metric, read(), units.get(metric, 1.0))
        if wanted & {"memory_used_bytes", "memory_total_bytes"} and self._still_offered(reading, "memory_used_bytes"):
            memory = call("nvmlDeviceGetMemoryInfo", handle)
            for metric, part in (("memory_used_bytes", "used"), ("memory_total_bytes", "total")):
                self._keep(reading, metric, memory if isinstance(memory, Fault) else getattr(memory, part))
        if "utilization_frac" in wanted and self._still_offered(reading, "utilization_frac"):
            rates = call("nvmlDeviceGetUtilizationRates", handle)
            self._keep(reading, "utilization_frac", rates if isinstance(rates, Fault) else rates.gpu, 0.01)
        if "throttle_reasons" in wanted and self._still_offered(reading, "throttle_reasons"):
            names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
            bits = self._first_that_answers(names, handle)
            if isinstance(bits, Fault):
                self._keep(reading, "throttle_reasons", bits)
            else:
                reading.throttle = frozenset(name for bit, name in _THROTTLE_BITS.items() if int(bits) & bit)
        if "foreign_processes" in wanted and self._still_offered(reading, "foreign_processes"):
            self._count_strangers(reading, handle)

    def _still_offered(self, reading: _Reading, metric: str) -> bool:
        reason = self._dropped.get((reading.uuid, metric))
        if reason is not None:
            reading.missing[metric] = reason
        return reason is None

    def _count_strangers(self, reading: _Reading, handle: Any) -> None:
        running = self._library.call("nvmlDeviceGetComputeRunningProcesses", handle)
        if isinstance(running, Fault):
            self._keep(reading, "foreign_processes", running)
            return
        served = self._library.call("nvmlDeviceGetMPSComputeRunningProcesses", handle)
        ids = {int(entry.pid) for entry in (*running, *(() if isinstance(served, Fault) else served))}
        if self._process in ids:
            reading.strangers = len(ids) - 1
        else:
            # Inside a container the ids are those of the host, so one of them may well be this process.
            reading.strangers = max(0, len(ids) - 1)

    def close(self) -> None:
        """Forget the boards. The library stays started: other users in this process may need it."""
        self._devices, self._handles = None, {}


class _Reading:
    """A sample being put together."""

    def __init__(self, uuid: str, t_s: float) -> None:
        self.uuid = uuid
        self.t_s = t_s
        self.latency_s = 0.0
        self.values: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self.throttle: frozenset[str] | None = None
        self.strangers: int | None = None
        self.lost = False

    def failed(self, metric: str, fault: Fault) -> None:
        self.missing[metric] = fault.reason
        self.lost = self.lost or fault.standing == "lost"

    def sample(self) -> Sample:
        states = {"throttle_reasons": self.throttle, "foreign_processes": self.strangers}
        names = (*self.values, *(name for name, state in states.items() if state is not None))
        base = Sample(
            device_uuid=self.uuid,
            t_s=self.t_s,
            read_latency_s=self.latency_s,
            throttle_reasons=self.throttle,
            foreign_processes=self.strangers,
            provenance=dict.fromkeys(names, "measured"),
            missing=self.missing,
            lost=self.lost,
        )
        return base.with_values(self.values)
