"""A board that has nothing but a counter, given as a function of time; cheap enough for thousands of windows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from thermoe.telemetry.source import Device, Sample

GPU = Device(uuid="GPU-x", kind="gpu", name="counter", index=0)


class CountingSource:
    """A board whose counter is given by a function of time; counts the reads, and can be slow in real time."""

    name = "counting"
    provenance = "measured"
    absent: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, clock, energy=lambda t_s: t_s * 100.0, hang_s: float = 0.0) -> None:
        self.clock, self.energy, self.hang_s, self.reads = clock, energy, hang_s, 0

    def devices(self) -> list[Device]:
        return [GPU]

    def metrics(self, device: Device) -> frozenset[str]:
        return frozenset(("energy_j",))

    def read(self, device: Device, metrics: Iterable[str]) -> Sample:
        self.reads += 1
        if self.hang_s:
            time.sleep(self.hang_s)
        before_s = self.clock.now_s()
        if self.clock.virtual:
            self.clock.sleep_s(0.0037)
        at_s = 0.5 * (before_s + self.clock.now_s())
        return Sample(
            device_uuid="GPU-x",
            t_s=at_s,
            energy_j=self.energy(at_s),
            read_latency_s=self.clock.now_s() - before_s,
            provenance={"energy_j": "measured"},
        )

    def close(self) -> None:
        pass


def ticking(period_s: float, phase_s: float = 0.033, jump_at_s: float = math.inf):
    """A counter that steps every `period_s`, whose phase jumps by 43 ms at one moment."""

    def energy(t_s: float) -> float:
        shift = 0.043 if t_s >= jump_at_s else 0.0
        return 1e6 + math.floor((t_s - phase_s - shift) / period_s) * 30.0

    return energy
