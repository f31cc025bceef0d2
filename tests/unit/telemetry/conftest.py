"""Meters on simulated or fake hardware, all on one virtual clock."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fake_nvml import FakeNvml

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.nvml import NvmlSource


@pytest.fixture(autouse=True)
def telemetry_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THERMOE_TELEMETRY", raising=False)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def nvml(clock: VirtualClock) -> FakeNvml:
    return FakeNvml(clock)


@pytest.fixture
def nvml_meter(clock: VirtualClock, nvml: FakeNvml) -> EnergyMeter:
    return EnergyMeter(NvmlSource(nvml, clock=clock, environment={}), clock=clock)


@pytest.fixture
def work(clock: VirtualClock) -> Callable[..., int]:
    """Let virtual time pass in steps, the meter's sampler polled as its thread would; returns the steps done."""

    def pass_time(meter: EnergyMeter, duration_s: float, step_s: float = 0.1) -> int:
        steps = 0
        end_s = clock.now_s() + duration_s
        while clock.now_s() < end_s - 1e-9:
            clock.sleep_s(min(step_s, end_s - clock.now_s()))
            steps += 1
            if meter.sampler is not None:
                meter.sampler.poll()
        return steps

    return pass_time
