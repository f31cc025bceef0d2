"""Faults in the middle of a measurement: the value, the status, the reason, and that the program ran on."""

from __future__ import annotations

import logging
import math

import pytest
from fake_nvml import GPU_IS_LOST, NOT_SUPPORTED, RESET_REQUIRED, FakeNvml

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.gate import GatedReader, implausible
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.nvml import NvmlSource
from thermoe.telemetry.plant import Fault, StepLoad
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import GPU_METRICS, Device, NullSource, Sample
from thermoe.telemetry.window import EnergyWindow


def measured_with(clock: VirtualClock, work, *faults: Fault, seconds: float = 10.0) -> tuple[EnergyWindow, EnergyMeter]:
    """Measure ten seconds on a board with faults, the sampler polled; the window must let the work run to its end."""
    source = SimulatedSource(seed=3, clock=clock, load=StepLoad(300.0), faults=faults)
    meter = EnergyMeter(source).open()
    work(meter, 2.0)
    with meter.window("work", tokens=100) as window:
        steps = work(meter, seconds)
    assert steps >= seconds / 0.1 - 1
    return window.result, meter


def at(clock: VirtualClock, after_s: float) -> float:
    return clock.now_s() + after_s


@pytest.mark.parametrize("code", [GPU_IS_LOST, RESET_REQUIRED])
def test_a_board_lost_inside_a_window(clock: VirtualClock, nvml: FakeNvml, nvml_meter: EnergyMeter, work, code) -> None:
    with nvml_meter as meter:
        work(meter, 2.0)
        with meter.window("work") as window:
            work(meter, 3.0)
            nvml.errors["nvmlDeviceGetFieldValues"] = code
            assert work(meter, 5.0) >= 49
        assert meter.snapshot()["power_w"] is None
    result = window.result
    assert (result.energy_j, result.status) == (None, "invalid")
    assert result.reason in ("the GPU is lost", "the GPU needs a reset")
    assert "lost" in result.flags


def test_one_lost_board_of_two_makes_the_total_missing(clock: VirtualClock, work) -> None:
    source = SimulatedSource(clock=clock, load=StepLoad(300.0), boards=2, faults=[Fault(kind="lost", start_s=1005.0)])
    with EnergyMeter(source) as meter, meter.window("work") as window:
        work(meter, 10.0)
    first, second = window.result.devices.values()
    assert first.energy_j is None
    assert second.energy_j is not None
    assert window.result.energy_j is None
    assert window.result.reason == f"{first.uuid}: the GPU is lost"


@pytest.mark.parametrize("kind", ["reset", "backwards"])
def test_a_counter_that_goes_back_is_replaced_by_the_integral_of_power(clock: VirtualClock, work, kind: str) -> None:
    fault = Fault(kind=kind, start_s=at(clock, 6.0), value=5000.0)
    result, meter = measured_with(clock, work, fault)
    plant = meter.source.plants[0]
    true_j = plant.true_between(clock.now_s() - 10.0, clock.now_s() - 0.1) * plant.gain
    assert result.energy_j == pytest.approx(true_j, rel=0.05)
    assert (result.method, result.provenance, result.status) == ("power_integral", "simulated", "flagged")
    assert "counter_reset" in result.flags
    assert "went backwards" in result.reason
    assert result.energy_rel_sd >= 0.05


def test_a_counter_that_goes_back_without_samples_gives_nothing_negative(clock: VirtualClock, nvml: FakeNvml) -> None:
    source = NvmlSource(nvml, clock=clock, environment={})
    with EnergyMeter(source, clock=clock, sample=False) as meter:
        clock.sleep_s(1.0)
        with meter.window("work", tokens=5) as window:
            clock.sleep_s(5.0)
            nvml.plants[0].sensors.energy_j = 1.0
        with meter.window("after", tokens=5) as after:
            clock.sleep_s(5.0)
    assert (window.result.energy_j, window.result.j_per_token) == (None, None)
    assert window.result.status == "invalid"
    assert window.result.reason == "the energy counter went backwards (reset)"
    assert after.result.energy_j > 0


def test_a_measured_integral_is_called_estimated(clock: VirtualClock, nvml: FakeNvml, nvml_meter, work) -> None:
    nvml.errors["field", 83] = NOT_SUPPORTED
    nvml.errors["nvmlDeviceGetTotalEnergyConsumption"] = NOT_SUPPORTED
    with nvml_meter as meter:
        work(meter, 2.0)
        with meter.window("work") as window:
            work(meter, 10.0)
        with meter.aligned_window("aligned", min_s=5.0) as aligned:
            while not aligned.done:
                work(meter, 0.1)
                aligned.count(1.0)
    for result in (window.result, aligned.result):
        assert (result.provenance, result.method) == ("estimated", "power_integral")
        assert result.power_w == pytest.approx(nvml.plants[0].sensors.power_avg_w, rel=0.05)
        assert result.reason == "not supported by this board"


def test_a_counter_frozen_throughout_is_not_zero_joules(clock: VirtualClock) -> None:
    fault = Fault(kind="frozen", start_s=at(clock, 0.0))
    source = SimulatedSource(clock=clock, load=StepLoad(300.0), faults=[fault])
    with EnergyMeter(source, sample=False) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert (window.result.energy_j, window.result.status) == (None, "invalid")
    assert "did not change" in window.result.reason


def test_a_counter_frozen_for_a_while_widens_the_uncertainty(clock: VirtualClock, work) -> None:
    plain, _ = measured_with(VirtualClock(), _pass)
    result, _ = measured_with(clock, work, Fault(kind="frozen", start_s=at(clock, 6.0), duration_s=3.0))
    assert "counter_frozen" in result.flags
    assert result.status == "flagged"
    assert result.energy_rel_sd > 5 * plain.energy_rel_sd
    assert "stood still" in result.reason


def _pass(meter: EnergyMeter, seconds: float) -> int:
    for _ in range(round(seconds / 0.1)):
        meter.clock.sleep_s(0.1)
        meter.sampler.poll()
    return round(seconds / 0.1)


def test_a_foreign_process_contaminates(clock: VirtualClock, work) -> None:
    result, _ = measured_with(clock, work, Fault(kind="foreign", start_s=at(clock, 1.0), value=2))
    assert "contaminated" in result.flags
    assert result.status == "flagged"
    assert "another process" in result.reason
    assert result.energy_j is not None


def test_a_short_dropout_leaves_the_counters_edges_good(clock: VirtualClock, work) -> None:
    result, _ = measured_with(clock, work, Fault(kind="dropout", start_s=at(clock, 4.0), duration_s=1.2))
    assert result.energy_j is not None
    assert result.method == "counter"


def test_a_gap_is_flagged_and_a_window_with_good_edges_kept(clock: VirtualClock, work) -> None:
    result, _ = measured_with(clock, work, Fault(kind="dropout", start_s=at(clock, 4.0), duration_s=6.0))
    assert result.energy_j is not None
    assert "gap" in result.flags
    assert result.status == "flagged"
    assert "no sample for" in result.reason


def test_a_gap_voids_what_hangs_on_samples(clock: VirtualClock, work) -> None:
    source = SimulatedSource(
        clock=clock, load=StepLoad(300.0), faults=[Fault(kind="dropout", start_s=1006.0, duration_s=6.0)]
    )
    meter = EnergyMeter(source).open()
    work(meter, 2.0)
    with meter.window("work", edges="sampled") as window:
        work(meter, 20.0)
    assert window.result.energy_j is None
    assert "no sample for" in window.result.reason


def test_a_dropout_at_an_edge_gives_the_reason(clock: VirtualClock, work) -> None:
    result, _ = measured_with(clock, work, Fault(kind="dropout", start_s=at(clock, 11.5)))
    assert (result.energy_j, result.status) == (None, "invalid")
    assert result.reason == "the driver did not answer in time"


def test_no_permission_is_a_reason_and_one_hint(clock: VirtualClock, work) -> None:
    result, meter = measured_with(clock, work, Fault(kind="permission", start_s=0.0))
    assert result.energy_j is None
    assert result.reason == "no permission to read it"
    assert meter.describe()["power_w"]["reason"] == "no permission to read it"


def test_a_slow_sensor_is_told_once_and_the_window_kept(
    clock: VirtualClock, work, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "thermoe.telemetry"):
        result, _ = measured_with(clock, work, Fault(kind="slow", start_s=0.0, value=0.08))
    assert result.energy_j is not None
    assert "slow_read" in result.flags
    assert sum("telemetry read took" in record.message for record in caplog.records) == 1


def test_a_suspend_voids_the_window(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        with meter.window("work") as window:
            clock.sleep_s(3.0)
            clock.suspend(30.0)
            clock.sleep_s(3.0)
        with meter.window("after") as after:
            clock.sleep_s(3.0)
    assert window.result.energy_j is None
    assert window.result.reason == "the machine was suspended inside the window"
    assert after.result.status == "valid"


@pytest.mark.parametrize("step_s", [-3600.0, -10.0, 86400.0])
def test_a_step_of_the_wall_clock_changes_nothing(step_s: float) -> None:
    def one(step: float) -> EnergyWindow:
        clock = VirtualClock()
        nvml = FakeNvml(clock)
        meter = EnergyMeter(NvmlSource(nvml, clock=clock, environment={}), clock=clock)
        with meter, meter.window("work", tokens=5) as window:
            clock.sleep_s(3.0)
            clock.step_wall(step)
            clock.sleep_s(3.0)
        return window.result

    stepped, plain = one(step_s), one(0.0)
    assert stepped.duration_s > 0
    assert stepped == plain


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("temp_c", 0.0),
        ("temp_c", -5.0),
        ("temp_c", 255.0),
        ("temp_c", 65535.0),
        ("temp_c", 151.0),
        ("memory_temp_c", 255.0),
        ("power_w", 0.0),
        ("power_w", 2001.0),
        ("power_w", -1.0),
        ("energy_j", -1.0),
        ("energy_j", math.nan),
        ("energy_j", math.inf),
        ("utilization_frac", 1.5),
        ("memory_used_bytes", -1.0),
    ],
)
def test_what_cannot_be_true_is_rejected_counted_and_never_forwarded(
    clock: VirtualClock, metric: str, value: float
) -> None:
    assert implausible(metric, value) is not None

    class Broken(NullSource):
        def read(self, device: Device, metrics) -> Sample:
            return Sample(device_uuid=device.uuid, t_s=1.0, provenance={metric: "measured"}).with_values(
                {metric: value}
            )

    reader = GatedReader(Broken("none"), clock)
    sample = reader.read(Device(uuid="GPU-x", kind="gpu", name="x"), [metric])
    assert sample.value(metric) is None
    assert sample.missing[metric].startswith("reading rejected")
    assert metric not in sample.provenance
    assert reader.rejected[metric] == 1


@pytest.mark.parametrize(
    ("metric", "value"), [("temp_c", 0.5), ("temp_c", 150.0), ("power_w", 2000.0), ("energy_j", 0.0), ("power_w", 0.1)]
)
def test_the_ends_of_the_range_are_accepted(metric: str, value: float) -> None:
    assert implausible(metric, value) is None


def test_more_memory_used_than_there_is_cannot_be_true(nvml: FakeNvml, nvml_meter: EnergyMeter) -> None:
    nvml.override["used"] = 10**15
    nvml.clock.sleep_s(1.0)
    with nvml_meter as meter:
        assert meter.snapshot()["memory_used_bytes"] is None
        assert meter.snapshot()["memory_total_bytes"] == 150e9


@pytest.mark.parametrize("kind", ["nan", "absurd"])
def test_absurd_numbers_never_reach_a_snapshot(clock: VirtualClock, kind: str) -> None:
    source = SimulatedSource(clock=clock, load=StepLoad(300.0), faults=[Fault(kind=kind, start_s=0.0)])
    clock.sleep_s(1.0)
    with EnergyMeter(source) as meter:
        seen = meter.snapshot()
        told = meter.describe()
    assert (seen["temp_c"], seen["power_w"]) == (None, None)
    assert told["temp_c"]["reason"].startswith("reading rejected")


def test_a_source_that_raises_is_a_reason_and_not_an_exception(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Raising(SimulatedSource):
        def read(self, device: Device, metrics) -> Sample:
            raise OSError("the sensor's file is gone")

    caplog.set_level(logging.WARNING, "thermoe.telemetry")
    with EnergyMeter(Raising(clock=clock)) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert window.result.energy_j is None
    assert "raised OSError: the sensor's file is gone" in window.result.reason
    assert len([r for r in caplog.records if "OSError" in r.message]) == 1


@pytest.mark.parametrize(
    ("bits", "flag", "status"),
    [(0x4, "power_cap", "valid"), (0x40, "throttled", "flagged"), (0x88, "throttled", "flagged"), (0x1, None, "valid")],
)
def test_what_held_the_clocks_down_is_told(
    clock: VirtualClock, nvml: FakeNvml, nvml_meter: EnergyMeter, bits: int, flag: str | None, status: str
) -> None:
    nvml.override["reasons"] = bits
    with nvml_meter as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert window.result.flags == (() if flag is None else (flag,))
    assert window.result.status == status
    assert window.result.throttle_reasons


def test_a_rank_that_does_not_read_reports_nothing_of_its_own(clock: VirtualClock) -> None:
    nvml = FakeNvml(clock)
    reading = EnergyMeter(NvmlSource(nvml, clock=clock, environment={}), devices=[nvml.uuids[0]], clock=clock)
    waiting = EnergyMeter(NullSource("read by rank 0"), clock=clock)
    with reading, waiting, reading.window("work") as first, waiting.window("work") as second:
        clock.sleep_s(5.0)
    total = [w.result.energy_j for w in (first, second) if w.result.energy_j is not None]
    assert len(total) == 1
    assert second.result.reason == "read by rank 0"
    assert waiting.describe()["energy_j"]["reason"] == "read by rank 0"


def test_the_newest_reading_grows_old_when_the_reader_stops(clock: VirtualClock, nvml_meter: EnergyMeter, work) -> None:
    with nvml_meter as meter:
        work(meter, 3.0)
        sampler = meter.sampler
        uuid = meter.devices[0].uuid
        assert clock.now_s() - sampler.latest(uuid).t_s <= 1.1
        clock.sleep_s(10.0)
        assert clock.now_s() - sampler.latest(uuid).t_s >= 9.0


def test_every_metric_missing_leaves_every_metric_with_a_reason(clock: VirtualClock, work) -> None:
    _, meter = measured_with(clock, work, Fault(kind="dropout", start_s=0.0))
    told = meter.describe()
    for metric in GPU_METRICS:
        assert told[metric]["provenance"] is None
        assert told[metric]["reason"]
