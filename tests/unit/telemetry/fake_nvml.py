# ruff: noqa: N802 - the names are the vendor's
"""A module shaped like `pynvml`, on a virtual clock: simulated boards behind the calls, and faults by name."""

from __future__ import annotations

import os
from types import SimpleNamespace

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.plant import Plant, StepLoad


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


NOT_SUPPORTED, NO_PERMISSION, TIMEOUT, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN = 3, 4, 10, 15, 16, 999
LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND, VERSION_MISMATCH, UNINITIALIZED = 12, 13, 18, 1
_UNSIGNED, _LONG = 1, 3


class FakeNvml:
    """Boards, calls and faults.

    `errors` maps a function's name, or ("field", number), to an error code; a list is used up call by call.
    `absent` names functions the binding does not have. `calls` records every call.
    """

    NVMLError = NVMLError

    def __init__(self, clock: VirtualClock, boards: int = 1, *, work_w: float = 400.0, seed: int = 7, **plant) -> None:
        self.clock = clock
        self.load = StepLoad(work_w)
        self.plants = [Plant(clock.now_s(), self.load, seed=seed + i, **plant) for i in range(boards)]
        self.uuids = [f"GPU-{i:08x}-1111-2222-3333-44444444{i:04x}" for i in range(boards)]
        self.names = ["Fake H200"] * boards
        self.mig: dict[int, list[str]] = {}
        self.processes: list[int] = []
        self.errors: dict = {}
        self.absent: set[str] = set()
        self.calls: list[str] = []
        self.init_pids: list[int] = []
        self.latency_s = 0.0037
        self.override: dict[str, float] = {}

    def __getattribute__(self, name: str):
        if name.startswith("nvml") and name in object.__getattribute__(self, "absent"):
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        self._fail(name)

    def _fail(self, key) -> None:
        code = self._code(key)
        if code:
            raise NVMLError(code)

    def _code(self, key) -> int:
        planned = self.errors.get(key, 0)
        if isinstance(planned, list):
            return planned.pop(0) if planned else 0
        return planned

    def _plant(self, handle: int) -> Plant:
        plant = self.plants[handle]
        plant.advance(self.clock.now_s())
        return plant

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.init_pids.append(os.getpid())

    def nvmlShutdown(self) -> None:
        raise AssertionError("the library must never be shut down")

    def nvmlSystemGetDriverVersion(self) -> bytes:
        self._enter("nvmlSystemGetDriverVersion")
        return b"580.159.04"

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return len(self.plants)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._enter("nvmlDeviceGetHandleByIndex")
        assert index >= 0, "a negative index reached the driver"
        return index

    def nvmlDeviceGetUUID(self, handle) -> bytes:
        self._enter("nvmlDeviceGetUUID")
        return (handle if isinstance(handle, str) else self.uuids[handle]).encode()

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        self._enter("nvmlDeviceGetName")
        return self.names[handle].encode()

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        self._enter("nvmlDeviceGetPciInfo")
        return SimpleNamespace(busId=f"00000000:{handle + 1:02X}:00.0".encode())

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        self._enter("nvmlDeviceGetMigMode")
        if handle not in self.mig:
            raise NVMLError(NOT_SUPPORTED)
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, index: int) -> str:
        if index >= len(self.mig[handle]):
            raise NVMLError(6)
        return self.mig[handle][index]

    def nvmlDeviceGetFieldValues(self, handle: int, numbers: list[int]) -> list[SimpleNamespace]:
        self._enter("nvmlDeviceGetFieldValues")
        self.clock.sleep_s(self.latency_s / 2)
        plant = self._plant(handle)
        sensors = plant.sensors
        milli = {83: sensors.energy_j, 186: sensors.power_w, 185: sensors.power_avg_w}
        milli = {n: self.override.get(str(n), v) for n, v in milli.items()}
        answers = []
        for number in numbers:
            kind = _LONG if number == 83 else _UNSIGNED
            raw = round(milli[number] * 1000) if number in milli else round(plant.die_c)
            # Only the union member the type names holds the value; the others hold rubbish.
            value = SimpleNamespace(dVal=-1.0, uiVal=11, ulVal=12, ullVal=13, sllVal=-14, siVal=-15, usVal=16)
            setattr(value, "ullVal" if kind == _LONG else "uiVal", raw)
            code = self._code(("field", number))
            answers.append(SimpleNamespace(fieldId=number, nvmlReturn=code, valueType=kind, value=value, timestamp=0))
        self.clock.sleep_s(self.latency_s / 2)
        return answers

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        self._enter("nvmlDeviceGetTotalEnergyConsumption")
        return round(self._plant(handle).sensors.energy_j * 1000)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        self._enter("nvmlDeviceGetPowerUsage")
        return round(self._plant(handle).sensors.power_w * 1000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        self._enter("nvmlDeviceGetEnforcedPowerLimit")
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        self._enter("nvmlDeviceGetTemperature")
        return round(self.override.get("temp", self._plant(handle).die_c))

    def nvmlDeviceGetTemperatureV(self, handle: int, sensor: int) -> int:
        self._enter("nvmlDeviceGetTemperatureV")
        return round(self._plant(handle).die_c)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        self._enter("nvmlDeviceGetMemoryInfo")
        return SimpleNamespace(total=150_000_000_000, used=int(self.override.get("used", 37_000_000_000)), free=0)

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        self._enter("nvmlDeviceGetClockInfo")
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        self._enter("nvmlDeviceGetUtilizationRates")
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        self._enter("nvmlDeviceGetCurrentClocksEventReasons")
        return int(self.override.get("reasons", 0x4))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        self._enter("nvmlDeviceGetCurrentClocksThrottleReasons")
        return int(self.override.get("reasons", 0x4))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        self._enter("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=pid) for pid in self.processes]

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        self._enter("nvmlDeviceGetMPSComputeRunningProcesses")
        return []
