"""A source of simulated readings: every metric, from a board whose true joules are known. Never chosen by ``auto``."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from thermoe.results import Provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.plant import NOMINAL_MEMORY_CLOCK_HZ, NOMINAL_SM_CLOCK_HZ, Board, Fault, Plant, StepLoad
from thermoe.telemetry.source import GPU_METRICS, GPU_STATE, HOST_METRICS, HOST_UUID, Device, Sample

READ_LATENCY_S = (0.0034, 0.0040)
_HOST_POWER_W = {"cpu_energy_j": 90.0, "dram_energy_j": 12.0}
_HOST_BYTES = {
    "host_memory_used_bytes": 24e9,
    "host_memory_total_bytes": 128e9,
    "process_memory_bytes": 3e9,
}


class SimulatedSource:
    """Simulated boards and a simulated host; every number carries the label ``simulated``.

    Args:
        seed: of the boards' gain, phase and noise.
        clock: a virtual clock in tests; the system's clock lets a demonstration run in real time.
        load: work power in watts as a function of the clock's time; by default a :class:`StepLoad` at rest, which
            ``source.load.set(t_s, power_w)`` changes.
        board: constants of the boards.
        faults: what goes wrong with the first board, and when.
        boards: how many boards there are.
        name: of the boards.

    Attributes:
        clock: what samples are stamped with.
        load: the function the boards' work power comes from.
        plants: the boards, with the true joules.
    """

    name = "simulated"
    provenance: Provenance = "simulated"

    def __init__(
        self,
        seed: int = 0,
        *,
        clock: Clock = SYSTEM_CLOCK,
        load: Callable[[float], float] | None = None,
        board: Board | None = None,
        faults: Iterable[Fault] = (),
        boards: int = 1,
        name: str = "simulated H200",
    ) -> None:
        self.clock = clock
        self.load: Callable[[float], float] = StepLoad() if load is None else load
        self.absent: Mapping[str, str] = {}
        self._latency = random.Random(seed + 2)
        self._began_s = clock.now_s()
        self._lock = threading.Lock()
        listed = tuple(faults)
        self.plants = [
            Plant(self._began_s, self.load, board=board, seed=seed + 101 * i, faults=listed if i == 0 else ())
            for i in range(boards)
        ]
        self._devices = [
            Device(
                uuid=f"SIM-{seed:08x}-{i:04x}",
                kind="gpu",
                name=name,
                index=i,
                counter_period_s=plant.board.counter_period_s,
            )
            for i, plant in enumerate(self.plants)
        ]
        self._devices.append(Device(uuid=HOST_UUID, kind="host", name="simulated host", counter_period_s=0.001))

    def devices(self) -> list[Device]:
        """Return the boards and the host."""
        return list(self._devices)

    def metrics(self, device: Device) -> frozenset[str]:
        """Return every metric of its kind."""
        return frozenset((*GPU_METRICS, *GPU_STATE) if device.kind == "gpu" else HOST_METRICS)

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        """Read a board or the host; time passes while it answers, as it does on hardware."""
        wanted = set(metrics)
        with self._lock:
            return self._read_host(wanted) if device.kind == "host" else self._read_board(device, wanted)

    def _read_host(self, wanted: set[str]) -> Sample:
        now_s = self.clock.now_s()
        passed_s = now_s - self._began_s
        values = {m: power_w * passed_s for m, power_w in _HOST_POWER_W.items() if m in wanted}
        values |= {m: size for m, size in _HOST_BYTES.items() if m in wanted}
        if "utilization_frac" in wanted:
            values["utilization_frac"] = 0.25
        labels: dict[str, Provenance] = dict.fromkeys(values, "simulated")
        return Sample(device_uuid=HOST_UUID, t_s=now_s, provenance=labels).with_values(values)

    def _read_board(self, device: Device, wanted: set[str]) -> Sample:
        plant = self.plants[device.index or 0]
        before_s = self.clock.now_s()
        slow = plant.active("slow", before_s)
        latency_s = slow.value if slow is not None else self._latency.uniform(*READ_LATENCY_S)
        self.clock.sleep_s(0.5 * latency_s)
        at_s = self.clock.now_s()
        plant.advance(at_s)
        values, strangers = _board_values(plant, at_s), 0
        throttle: frozenset[str] = plant.throttle
        self.clock.sleep_s(0.5 * latency_s)
        after_s = self.clock.now_s()
        foreign = plant.active("foreign", at_s)
        if foreign is not None:
            strangers = int(foreign.value or 1)
        timing = {"t_s": 0.5 * (before_s + after_s), "read_latency_s": after_s - before_s}
        missing = self._refusal(plant, at_s)
        if missing is not None:
            reason, lost = missing
            return Sample.empty(device, at_s, wanted, reason, lost=lost).with_values(timing)
        kept: dict[str, Any] = {name: value for name, value in values.items() if name in wanted}
        if "throttle_reasons" in wanted:
            kept["throttle_reasons"] = throttle
        if "foreign_processes" in wanted:
            kept["foreign_processes"] = strangers
        labels: dict[str, Provenance] = dict.fromkeys(kept, "simulated")
        return Sample(device_uuid=device.uuid, t_s=at_s, provenance=labels).with_values({**timing, **kept})

    def _refusal(self, plant: Plant, t_s: float) -> tuple[str, bool] | None:
        if plant.active("lost", t_s) is not None:
            return "the GPU is lost", True
        if plant.active("dropout", t_s) is not None:
            return "the driver did not answer in time", False
        if plant.active("permission", t_s) is not None:
            return "no permission to read it", False
        return None

    def close(self) -> None:
        """Do nothing."""


def _board_values(plant: Plant, t_s: float) -> dict[str, float]:
    board, sensors = plant.board, plant.sensors
    share = min(1.0, plant.speed) if "gpu_idle" not in plant.throttle else 0.0
    values = {
        "energy_j": sensors.energy_j,
        "power_w": sensors.power_w or board.idle_w,
        "power_avg_w": sensors.power_avg_w or board.idle_w,
        "power_limit_w": board.limit_w,
        "temp_c": float(round(plant.die_c)),
        "memory_temp_c": float(round(plant.die_c + 3.0)),
        "memory_used_bytes": 0.25 * board.memory_total_bytes,
        "memory_total_bytes": board.memory_total_bytes,
        "sm_clock_hz": NOMINAL_SM_CLOCK_HZ * plant.speed,
        "memory_clock_hz": NOMINAL_MEMORY_CLOCK_HZ,
        "utilization_frac": share,
    }
    if plant.active("nan", t_s) is not None:
        values |= dict.fromkeys(("energy_j", "power_w", "power_avg_w", "temp_c"), math.nan)
    if plant.active("absurd", t_s) is not None:
        values |= {"temp_c": 255.0, "memory_temp_c": 65535.0, "power_w": 4e6, "memory_used_bytes": 1e18}
    return values
