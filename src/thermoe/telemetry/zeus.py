"""Boards of other makers through the optional package ``zeus``: AMD, Apple and Jetson.

Only ``zeus.device`` is used, and only its readings: clock, wraps, resets and labels are this package's business. What
Apple and Jetson report is derived from models or voltage rails, so it is labelled ``estimated``.
Its reader of processor energy is left alone: it follows the counters from processes it spawns, where the host source
reads the same files itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from thermoe.errors import MissingDependencyError
from thermoe.results import Provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.source import GPU_METRICS, HOST_UUID, Device, Sample

_MILLI = 1e-3
_GPU_CALLS: dict[str, tuple[str, float]] = {
    "energy_j": ("get_total_energy_consumption", _MILLI),
    "power_w": ("get_instant_power_usage", _MILLI),
    "power_avg_w": ("get_average_power_usage", _MILLI),
    "temp_c": ("get_gpu_temperature", 1.0),
}
#: Names the makers' figures have in a chip-wide measurement, in the order they are looked for; all in mJ.
_SOC_FIELDS = {
    "energy_j": ("gpu_mj", "gpu_energy_mj"),
    "cpu_energy_j": ("cpu_total_mj", "cpu_energy_mj"),
    "dram_energy_j": ("dram_mj",),
}


class ZeusSource:
    """Readings through ``zeus.device``.

    Args:
        module: a module shaped like ``zeus.device``; the installed one by default.
        clock: stamps the samples.

    Raises:
        MissingDependencyError: ``zeus`` is not installed.
    """

    name = "zeus"
    provenance: Provenance = "measured"

    def __init__(self, module: Any | None = None, *, clock: Clock = SYSTEM_CLOCK) -> None:
        if module is None:
            try:
                module = import_module("zeus.device")
            except ImportError as error:
                raise MissingDependencyError(
                    "the telemetry source 'zeus' needs the package zeus, which is not installed",
                    where="source='zeus'",
                    accepted="auto (NVIDIA and the host need no further package)",
                    fix="pip install 'thermoe[zeus]'",
                ) from error
        self._clock = clock
        self._absent: dict[str, str] = {}
        self._gpus = self._opened("GPU", module.get_gpus, GPU_METRICS)
        self._soc = self._opened("chip", module.get_soc, ())
        self._devices = self._enumerate()

    def _opened(self, what: str, opener: Callable[[], Any], metrics: Iterable[str]) -> Any:
        try:
            return opener()
        except Exception as error:  # the makers' libraries fail in their own ways, a KeyError among them
            self._absent.update(dict.fromkeys(metrics, f"no {what} (zeus: {type(error).__name__}: {error})"))
            return None

    def _enumerate(self) -> list[Device]:
        devices: list[Device] = []
        for index in range(0 if self._gpus is None else len(self._gpus)):
            outcome = self._asked(self._gpus.get_name, index)
            name = "GPU" if isinstance(outcome, Exception) else str(outcome)
            devices.append(Device(uuid=f"zeus-gpu-{index}", kind="gpu", name=name, index=index))
        if self._soc_field("energy_j") is not None:
            devices.append(Device(uuid="zeus-soc", kind="gpu", name=type(self._soc).__name__, index=len(devices)))
        if self._soc_field("cpu_energy_j") is not None:
            devices.append(Device(uuid=HOST_UUID, kind="host", name="host", mapped_by="host"))
        if not any(device.kind == "gpu" for device in devices):
            for metric in GPU_METRICS:
                self._absent.setdefault(metric, "no GPU")
        return devices

    @property
    def absent(self) -> Mapping[str, str]:
        """Why nothing is measured, by metric."""
        return self._absent

    def devices(self) -> list[Device]:
        """Return the boards and, where its joules can be read, the host."""
        return list(self._devices)

    def metrics(self, device: Device) -> frozenset[str]:
        """Return what may be asked of a device."""
        if device.kind == "host":
            return frozenset(("cpu_energy_j", "dram_energy_j"))
        return frozenset(("energy_j",) if device.uuid == "zeus-soc" else _GPU_CALLS)

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read ``metrics`` of one device; whatever zeus raises becomes a reason."""
        values: dict[str, float] = {}
        missing: dict[str, str] = {}
        label: Provenance = "measured" if device.uuid.startswith("zeus-gpu") else "estimated"
        before_s = self._clock.now_s()
        for metric in metrics:
            outcome = self._asked(self._read_one, device, metric)
            if isinstance(outcome, Exception):
                missing[metric] = f"zeus: {type(outcome).__name__}: {outcome}"
            elif outcome is None:
                missing[metric] = "zeus does not report it here"
            else:
                values[metric] = float(outcome)
        after_s = self._clock.now_s()
        base = Sample(
            device_uuid=device.uuid,
            t_s=0.5 * (before_s + after_s),
            read_latency_s=after_s - before_s,
            provenance=dict.fromkeys(values, label),
            missing=missing,
        )
        return base.with_values(values)

    def _asked(self, question: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return question(*arguments)
        except Exception as error:  # see _opened
            return error

    def _read_one(self, device: Device, metric: str) -> float | None:
        if device.uuid.startswith("zeus-gpu") and metric in _GPU_CALLS:
            call, unit = _GPU_CALLS[metric]
            return float(getattr(self._gpus, call)(device.index)) * unit
        return self._soc_field(metric)

    def _soc_field(self, metric: str) -> float | None:
        if self._soc is None or metric not in _SOC_FIELDS:
            return None
        reading = self._asked(self._soc.get_total_energy_consumption)
        for field in _SOC_FIELDS[metric]:
            value = getattr(reading, field, None)
            if value is not None:
                return float(value) * _MILLI
        return None

    def close(self) -> None:
        """Do nothing: zeus closes itself."""
