"""The optional adapter: millijoules to joules, labels by maker, and failures of the makers' libraries as reasons."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.zeus import ZeusSource


class Gpus:
    """Two boards of another maker; the second has no momentary power."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return 2

    def get_name(self, index: int) -> str:
        return "MI300X"

    def get_total_energy_consumption(self, index: int) -> int:
        return round(1000 * (500.0 + (index + 1) * 100.0 * self.clock.now_s()))

    def get_instant_power_usage(self, index: int) -> int:
        if index == 1:
            raise RuntimeError("not supported")
        return 100_000

    def get_average_power_usage(self, index: int) -> int:
        return 99_000

    def get_gpu_temperature(self, index: int) -> int:
        return 55


def refuse(*_: object) -> None:
    raise KeyError("amdsmi library not loaded")


def test_boards_are_measured_in_joules(clock: VirtualClock) -> None:
    source = ZeusSource(SimpleNamespace(get_gpus=lambda: Gpus(clock), get_soc=refuse), clock=clock)
    with EnergyMeter(source, clock=clock) as meter:
        with meter.window("work", tokens=10) as window:
            clock.sleep_s(10.0)
        told = meter.describe()
    assert window.result.energy_j == pytest.approx(3000.0)
    assert window.result.provenance == "measured"
    assert told["power_w"]["reason"] == "zeus: RuntimeError: not supported"
    assert told["temp_c"]["provenance"] == "measured"
    assert told["memory_used_bytes"]["provenance"] is None


def test_a_chip_is_estimated_and_its_parts_go_to_gpu_and_host(clock: VirtualClock) -> None:
    def reading() -> SimpleNamespace:
        t_s = clock.now_s()
        return SimpleNamespace(gpu_mj=9000.0 * t_s, cpu_total_mj=4000.0 * t_s, dram_mj=1000.0 * t_s)

    soc = SimpleNamespace(get_total_energy_consumption=reading)
    source = ZeusSource(SimpleNamespace(get_gpus=refuse, get_soc=lambda: soc), clock=clock)
    with EnergyMeter(source, clock=clock) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    result = window.result
    assert result.energy_j == pytest.approx(45.0)
    assert (result.cpu_energy_j, result.dram_energy_j) == pytest.approx((20.0, 5.0))
    assert (result.provenance, result.cpu_provenance) == ("estimated", "estimated")


def test_a_makers_library_that_is_broken_is_not_measured(clock: VirtualClock) -> None:
    source = ZeusSource(SimpleNamespace(get_gpus=refuse, get_soc=refuse), clock=clock)
    assert source.devices() == []
    assert "KeyError" in source.absent["energy_j"]
    with EnergyMeter(source, clock=clock) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert window.result.energy_j is None
    assert window.result.status == "invalid"
