"""What the vendor's library answers about one board, call by call: fields, single functions, processes, versions.

Everything here only reads, makes no CUDA context and needs no root. A call that fails leaves its reason.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from thermoe.telemetry.clock import Clock
from thermoe.telemetry.nvml_library import Fault, NvmlLibrary, fault_of

#: What is asked in the batch, as the field number and, where there is one, its scope.
FIELDS: dict[str, int | tuple[int, int]] = {
    "83 energy": 83,
    "186 instant power": 186,
    "185 mean power of 1 s": 185,
    "82 memory temperature": 82,
    "185 mean power of the memory": (185, 1),
}
BATCH = (83, 186, 185, 82)
#: Single functions and what they are given beside the board.
CALLS: dict[str, tuple[Any, ...]] = {
    "nvmlDeviceGetTotalEnergyConsumption": (),
    "nvmlDeviceGetPowerUsage": (),
    "nvmlDeviceGetTemperature": (0,),
    "nvmlDeviceGetMemoryInfo": (),
    "nvmlDeviceGetClockInfo": (1,),
    "nvmlDeviceGetUtilizationRates": (),
    "nvmlDeviceGetEnforcedPowerLimit": (),
    "nvmlDeviceGetCurrentClocksEventReasons": (),
    "nvmlDeviceGetComputeRunningProcesses": (),
}
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCost:
    """How long one call takes.

    Attributes:
        cost_s: median over three calls, in seconds; ``None`` when it failed.
        reason: why it failed, or ``None``.
    """

    cost_s: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFacts:
    """What one NVIDIA board answers.

    Attributes:
        batch: cost of the batched query of energy, power and memory temperature.
        calls: cost of each single function.
        fields: for each field ``None`` when it answers, else why not.
        processes: compute processes on the board; ``None`` when they cannot be listed.
        own_process_listed: this process is among them; in a container it usually is not, though it may be there.
        mps_processes: clients of the vendor's multi-process service.
    """

    batch: CallCost
    calls: dict[str, CallCost] = field(default_factory=dict)
    fields: dict[str, str | None] = field(default_factory=dict)
    processes: int | None = None
    own_process_listed: bool = False
    mps_processes: int | None = None


def probe_board(library: NvmlLibrary, index: int, clock: Clock) -> BoardFacts | None:
    """Return what the board at ``index`` of the library's own order answers; ``None`` when it has no handle."""
    handle = library.call("nvmlDeviceGetHandleByIndex", index)
    if isinstance(handle, Fault):
        return None
    processes = _process_ids(library, "nvmlDeviceGetComputeRunningProcesses", handle)
    clients = _process_ids(library, "nvmlDeviceGetMPSComputeRunningProcesses", handle)
    return BoardFacts(
        batch=_timed(library, clock, "nvmlDeviceGetFieldValues", handle, list(BATCH)),
        calls={name: _timed(library, clock, name, handle, *more) for name, more in CALLS.items()},
        fields={label: _field_reason(library, handle, number) for label, number in FIELDS.items()},
        processes=None if processes is None else len(processes),
        own_process_listed=processes is not None and os.getpid() in processes,
        mps_processes=None if clients is None else len(clients),
    )


def library_versions(library: NvmlLibrary) -> dict[str, str | None]:
    """Return the versions of the driver and of the vendor's library, ``None`` where they are not told."""
    return {
        "driver": library.text("nvmlSystemGetDriverVersion"),
        "nvml": library.text("nvmlSystemGetNVMLVersion"),
        "cuda_of_driver": _cuda_version(library),
    }


def _cuda_version(library: NvmlLibrary) -> str | None:
    number = library.call("nvmlSystemGetCudaDriverVersion_v2")
    if isinstance(number, Fault) or not isinstance(number, int):
        return None
    return f"{number // 1000}.{number % 1000 // 10}"


def _timed(library: NvmlLibrary, clock: Clock, name: str, *arguments: Any) -> CallCost:
    took: list[float] = []
    for _ in range(REPEATS):
        before_s = clock.now_s()
        outcome = library.call(name, *arguments)
        took.append(clock.now_s() - before_s)
        if isinstance(outcome, Fault):
            return CallCost(cost_s=None, reason=outcome.reason)
    return CallCost(cost_s=sorted(took)[REPEATS // 2])


def _field_reason(library: NvmlLibrary, handle: Any, number: int | tuple[int, int]) -> str | None:
    answer = library.call("nvmlDeviceGetFieldValues", handle, [number])
    if isinstance(answer, Fault):
        return answer.reason
    code = int(answer[0].nvmlReturn)
    return None if code == 0 else fault_of(code).reason


def _process_ids(library: NvmlLibrary, name: str, handle: Any) -> set[int] | None:
    running = library.call(name, handle)
    return None if isinstance(running, Fault) else {int(entry.pid) for entry in running}
