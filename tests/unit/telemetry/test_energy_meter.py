"""The meter's promises to a user: windows in every form, what is told about a machine, and an off switch."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
from fake_nvml import NOT_SUPPORTED, FakeNvml

from thermoe.errors import ConfigError, MissingDependencyError, TelemetryError, UnknownNameError
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.nvml import NvmlSource
from thermoe.telemetry.plant import Board, StepLoad
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import CompositeSource, NullSource, open_source

CALM = Board(gain_rel_limit=0.0, noise_rel_sd=0.0, ambient_creep_c=0.0)


def simulated(clock: VirtualClock, work_w: float = 300.0, **kwargs) -> SimulatedSource:
    return SimulatedSource(clock=clock, load=StepLoad(work_w), board=CALM, **kwargs)


def test_a_window_gives_the_joules_of_its_span(clock: VirtualClock, nvml: FakeNvml, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        clock.sleep_s(2.0)
        with meter.window("decode", tokens=1000) as window:
            start_s = clock.now_s()
            clock.sleep_s(10.0)
            end_s = clock.now_s()
    result = window.result
    true_j = nvml.plants[0].true_between(start_s, end_s) * nvml.plants[0].gain
    assert result.energy_j == pytest.approx(true_j, rel=0.02)
    assert result.power_w == pytest.approx(result.energy_j / result.duration_s)
    assert result.j_per_token == pytest.approx(result.energy_j / 1000)
    assert result.duration_s == pytest.approx(10.0, abs=0.01)
    assert (result.provenance, result.method, result.edges, result.scope) == (
        "measured",
        "counter",
        "direct",
        "gpu board",
    )
    assert result.status == "valid"
    assert result.flags == ("power_cap",)  # a power cap informs; it does not spoil the joules
    assert result.ticks == 100
    assert result.temp_end_c > result.temp_start_c
    assert result.gain_rel_limit == 0.05
    assert 0.01 < result.energy_rel_sd < 0.012
    assert result.devices[nvml.uuids[0]].energy_j == result.energy_j
    assert (result.net_energy_j, result.idle_power_w) == (None, None)


def test_a_row_is_flat_json_and_the_text_names_the_label(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter, meter.window("decode", tokens=10) as window:
        clock.sleep_s(5.0)
    row = json.loads(json.dumps(window.result.as_row()))
    assert row["energy_j"] == window.result.energy_j
    assert row["throttle_reasons"] == "sw_power_cap"
    assert not any(isinstance(value, (dict, list)) for value in row.values())
    assert "measured, counter, direct edges, gpu board" in str(window.result)


def test_nothing_is_opened_before_the_first_use(nvml: FakeNvml, nvml_meter: EnergyMeter) -> None:
    assert nvml.calls == []
    assert nvml_meter.sampler is None


def test_a_meter_opens_itself_when_a_window_does(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter.window("work") as window:
        clock.sleep_s(3.0)
    assert window.result.energy_j is not None


def test_a_closed_meter_says_so(nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        pass
    meter.close()
    with pytest.raises(TelemetryError, match="closed"), meter.window("late"):
        pass


def test_windows_nest_overlap_and_share_names(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        clock.sleep_s(1.0)
        with meter.window("outer") as outer:
            with meter.window("same") as first:
                clock.sleep_s(4.0)
            with meter.window("same") as second:
                clock.sleep_s(4.0)
        meter.begin_window("a")
        clock.sleep_s(2.0)
        meter.begin_window("b")
        clock.sleep_s(2.0)
        a = meter.end_window("a")
        clock.sleep_s(2.0)
        b = meter.end_window("b")
    parts_j = first.result.energy_j + second.result.energy_j
    assert outer.result.energy_j == pytest.approx(parts_j, rel=0.03)
    assert a.duration_s == pytest.approx(4.0, abs=0.02)
    assert b.duration_s == pytest.approx(4.0, abs=0.02)
    assert [window.name for window in meter.results()] == ["same", "same", "outer", "a", "b"]
    assert len(meter.results("same")) == 2


def test_pairs_are_checked_by_name(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        with pytest.raises(TelemetryError, match="no window 'a' is open"):
            meter.end_window("a")
        meter.begin_window("a")
        with pytest.raises(TelemetryError, match="'a' is open already") as caught:
            meter.begin_window("a")
        assert "restart=True" in (caught.value.fix or "")
        clock.sleep_s(5.0)
        meter.begin_window("a", restart=True)
        clock.sleep_s(2.0)
        assert meter.end_window("a", tokens=5).duration_s == pytest.approx(2.0, abs=0.02)
        meter.begin_window("b")
        cancelled = meter.end_window("b", cancel=True)
        assert (cancelled.energy_j, cancelled.status, cancelled.reason) == (None, "invalid", "cancelled")
        with pytest.raises(TelemetryError, match="no window 'b'"):
            meter.end_window("b")


def test_a_function_can_be_measured(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    @nvml_meter.window("step", tokens=7)
    def step(seconds: float, *, extra: int = 0) -> str:
        """Document."""
        clock.sleep_s(seconds)
        return f"done {extra}"

    with nvml_meter as meter:
        assert step(2.0, extra=3) == "done 3"
        assert step(3.0) == "done 0"
    assert step.__name__ == "step"
    assert [round(window.duration_s) for window in meter.results("step")] == [2, 3]
    assert meter.results("step")[0].tokens == 7


def test_an_exception_closes_the_window_and_goes_on(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        window = meter.window("broken")
        with pytest.raises(ZeroDivisionError), window:
            clock.sleep_s(5.0)
            raise ZeroDivisionError
        with meter.window("next") as after:
            clock.sleep_s(5.0)
    assert window.result.status == "flagged"
    assert "exception" in window.result.flags
    assert "an exception ended the window" in window.result.reason
    assert window.result.energy_j is not None
    assert after.result.status == "valid"


def test_a_result_before_the_end_is_an_error_that_names_the_window(nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter, meter.window("open") as window, pytest.raises(TelemetryError, match="'open'"):
        _ = window.result


def test_a_window_is_entered_once(nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter:
        window = meter.window("once")
        with window:
            pass
        with pytest.raises(TelemetryError, match="entered twice"), window:
            pass


@pytest.mark.parametrize("tokens", [0, -5, math.nan, math.inf])
def test_tokens_nobody_can_divide_by_give_no_joules_per_token(
    clock: VirtualClock, nvml_meter: EnergyMeter, tokens: float
) -> None:
    with nvml_meter as meter, meter.window("work", tokens=tokens) as window:
        clock.sleep_s(5.0)
    result = window.result
    assert (result.j_per_token, result.tokens) == (None, None)
    assert result.energy_j is not None
    assert "no_tokens" in result.flags
    assert result.status == "valid"


def test_a_window_without_duration_has_no_joules(nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter, meter.window("nothing", tokens=5) as window:
        pass
    assert (window.result.energy_j, window.result.j_per_token) == (None, None)
    assert window.result.status == "invalid"


@pytest.mark.parametrize("seconds", [0.05, 0.42, 0.95])
def test_a_window_below_ten_ticks_is_too_short_and_says_what_to_do(
    clock: VirtualClock, nvml_meter: EnergyMeter, seconds: float
) -> None:
    with nvml_meter as meter, meter.window("short", tokens=5) as window:
        clock.sleep_s(seconds)
    result = window.result
    assert result.energy_j is None
    assert result.status == "invalid"
    assert f"too short ({seconds + 0.0037:.2f} s < 1.0 s)" in result.reason
    assert "repeat=" in result.reason


def test_work_counted_inside_a_window_is_its_tokens(clock: VirtualClock, nvml_meter: EnergyMeter) -> None:
    with nvml_meter as meter, meter.window("work") as window:
        for _ in range(5):
            clock.sleep_s(1.0)
            window.count(30)
    assert window.result.tokens == 150


# -- idle reference, host power, several boards ------------------------------------------------------------------------


def test_net_energy_needs_an_idle_reference(clock: VirtualClock) -> None:
    source = simulated(clock, 0.0)
    with EnergyMeter(source) as meter:
        idle = meter.measure_idle(10.0)
        source.load.set(clock.now_s(), 300.0)
        clock.sleep_s(1.0)
        with meter.window("work") as window:
            clock.sleep_s(10.0)
    result = window.result
    assert result.idle_power_w == pytest.approx(idle.power_w)
    assert result.net_energy_j == pytest.approx(result.energy_j - idle.power_w * result.duration_s)
    assert result.net_energy_range_j is None


def test_idle_references_that_differ_make_net_energy_a_range(clock: VirtualClock) -> None:
    source = simulated(clock, 0.0)
    with EnergyMeter(source) as meter:
        low = meter.measure_idle(5.0).power_w
        source.load.set(clock.now_s(), 40.0)
        clock.sleep_s(1.0)
        high = meter.measure_idle(5.0).power_w
        with meter.window("work") as window:
            clock.sleep_s(5.0)
    result = window.result
    assert result.net_energy_range_j == pytest.approx(
        (result.energy_j - high * result.duration_s, result.energy_j - low * result.duration_s)
    )
    assert "idle_reference_drifted" in result.flags
    assert result.status == "valid"


def test_power_the_user_gave_is_estimated_and_never_assumed(clock: VirtualClock) -> None:
    with (
        EnergyMeter(NullSource("no GPU"), clock=clock, host_power_w=50.0) as meter,
        meter.window("work", tokens=100) as window,
    ):
        clock.sleep_s(4.0)
    result = window.result
    assert result.energy_j == pytest.approx(200.0)
    assert (result.provenance, result.method, result.scope) == ("estimated", "model", "host power given")
    assert (result.cpu_energy_j, result.cpu_provenance) == (pytest.approx(200.0), "estimated")
    assert meter.describe()["energy_j"]["provenance"] == "estimated"


@pytest.mark.parametrize("power", [0, -5.0, math.nan, "5W", True, math.inf])
def test_a_power_that_is_none_is_refused(power: object) -> None:
    with pytest.raises(ConfigError, match="not a power") as caught:
        EnergyMeter(host_power_w=power)
    assert "65.0" in (caught.value.accepted or "")


def test_several_boards_add_up(clock: VirtualClock) -> None:
    with EnergyMeter(simulated(clock, boards=3)) as meter:
        clock.sleep_s(1.0)
        with meter.window("work") as window:
            clock.sleep_s(6.0)
    parts = window.result.devices
    assert len(parts) == 3
    assert window.result.energy_j == pytest.approx(sum(part.energy_j for part in parts.values()))
    assert window.result.power_w == pytest.approx(sum(part.power_w for part in parts.values()))


def test_a_chosen_board_is_measured_alone(clock: VirtualClock) -> None:
    nvml = FakeNvml(clock, boards=2)
    source = NvmlSource(nvml, clock=clock, environment={})
    with EnergyMeter(source, devices=nvml.uuids[1][4:], clock=clock) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert list(window.result.devices) == [nvml.uuids[1]]


def test_a_board_named_twice_is_counted_once(clock: VirtualClock) -> None:
    nvml = FakeNvml(clock)
    source = NvmlSource(nvml, clock=clock, environment={})
    doubled = CompositeSource([source, NvmlSource(nvml, clock=clock, environment={})])
    with EnergyMeter(doubled, clock=clock, devices=[0, nvml.uuids[0]]) as meter:
        assert [device.uuid for device in meter.devices] == [nvml.uuids[0]]


# -- waiting for the device --------------------------------------------------------------------------------------------


def test_the_device_is_awaited_at_both_ends(clock: VirtualClock, nvml: FakeNvml) -> None:
    waits: list[float] = []
    source = NvmlSource(nvml, clock=clock, environment={})
    with EnergyMeter(source, sync=lambda: waits.append(clock.now_s()), clock=clock) as meter, meter.window("work"):
        clock.sleep_s(2.0)
    assert len(waits) == 2


@pytest.mark.parametrize(("initialised", "expected"), [(True, 2), (False, 0)])
def test_pytorch_is_awaited_only_where_cuda_is_in_use(
    monkeypatch: pytest.MonkeyPatch, nvml_meter: EnergyMeter, initialised: bool, expected: int
) -> None:
    waits: list[int] = []
    cuda = SimpleNamespace(is_initialized=lambda: initialised, synchronize=lambda: waits.append(1))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    with nvml_meter as meter, meter.window("work"):
        pass
    assert len(waits) == expected


def test_a_wait_that_fails_flags_the_window_and_nothing_more(clock: VirtualClock, nvml: FakeNvml) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    source = NvmlSource(nvml, clock=clock, environment={})
    with EnergyMeter(source, sync=fail, clock=clock) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert "sync_failed" in window.result.flags
    assert window.result.status == "flagged"
    assert window.result.energy_j is not None


# -- what is told about a machine --------------------------------------------------------------------------------------


def test_a_machine_without_sensors_says_not_measured(clock: VirtualClock, tmp_path) -> None:
    nvml = FakeNvml(clock)
    nvml.errors["nvmlInit"] = 12
    from thermoe.telemetry.host import HostSource

    source = CompositeSource([NvmlSource(nvml, clock=clock, environment={}), HostSource(tmp_path, clock=clock)])
    with EnergyMeter(source, devices="cuda:0", clock=clock) as meter, meter.window("work", tokens=9) as window:
        clock.sleep_s(5.0)
    result = window.result
    assert (result.energy_j, result.j_per_token, result.power_w, result.provenance) == (None, None, None, None)
    assert result.reason == "no RAPL; no GPU"
    assert str(result) == "work: 5.00 s, energy not measured (no RAPL; no GPU)"
    told = meter.describe()
    assert told["energy_j"]["provenance"] is None
    assert told["energy_j"]["reason"] == "no RAPL; no GPU"
    assert told["j_per_token"]["reason"] == "no RAPL; no GPU"
    assert told["temp_c"]["reason"] == "no GPU (NVIDIA driver library not found)"
    assert told["process_memory_bytes"]["provenance"] == "measured"
    seen = meter.snapshot()
    assert seen["power_w"] is None
    assert seen["process_memory_bytes"] > 1e6
    assert 0 not in [seen[metric] for metric in ("energy_j", "power_w", "temp_c", "memory_used_bytes")]


def test_every_metric_of_the_description_has_a_label_or_a_reason(
    clock: VirtualClock, nvml: FakeNvml, nvml_meter: EnergyMeter
) -> None:
    nvml.errors["field", 82] = NOT_SUPPORTED
    with nvml_meter as meter:
        told = meter.describe()
    for metric, entry in told.items():
        assert (entry["provenance"] is None) == (entry["reason"] is not None), metric
    assert told["energy_j"]["method"] == "counter"
    assert told["memory_temp_c"]["reason"] == "not supported by this board"
    json.dumps(told)


def test_a_board_without_a_counter_describes_its_joules_as_estimated(nvml: FakeNvml, nvml_meter: EnergyMeter) -> None:
    nvml.errors["field", 83] = NOT_SUPPORTED
    nvml.errors["nvmlDeviceGetTotalEnergyConsumption"] = NOT_SUPPORTED
    nvml.clock.sleep_s(1.0)
    with nvml_meter as meter:
        told = meter.describe()["energy_j"]
    assert (told["provenance"], told["method"]) == ("estimated", "power_integral")
    assert told["reason"] is None


def test_a_snapshot_uses_the_samplers_reading_while_it_runs(clock: VirtualClock, nvml: FakeNvml, work) -> None:
    meter = EnergyMeter(NvmlSource(nvml, clock=clock, environment={}), clock=clock)
    with meter:
        work(meter, 3.0)
        meter.sampler._thread = SimpleNamespace(is_alive=lambda: True)
        calls = len(nvml.calls)
        seen = meter.snapshot()
        assert len(nvml.calls) == calls
        assert 0 <= seen["age_s"] <= 1.1
        assert seen["power_w"] == meter.sampler.latest(nvml.uuids[0]).power_w


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_off_reads_nothing_and_the_program_runs_on(
    clock: VirtualClock, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("THERMOE_TELEMETRY", "off")
    source = NvmlSource(nvml, clock=clock, environment={})
    with EnergyMeter(source, clock=clock, telemetry="off" if how == "argument" else "on") as meter:
        with meter.window("work", tokens=5) as window:
            clock.sleep_s(3.0)
        with meter.aligned_window("aligned", min_s=1.0) as aligned:
            steps = 0
            while not aligned.done:
                clock.sleep_s(0.1)
                aligned.count(1)
                steps += 1
        seen = meter.snapshot()
    assert nvml.calls == []
    assert meter.sampler is None
    assert window.result.reason == aligned.result.reason == "telemetry is off"
    assert window.result.duration_s == pytest.approx(3.0)
    assert steps == 10
    assert all(value is None for value in seen.values())


# -- opening by name ---------------------------------------------------------------------------------------------------


def test_an_unknown_source_is_refused_with_the_near_match() -> None:
    with pytest.raises(UnknownNameError, match="smulated") as caught:
        open_source("smulated")
    assert "simulated" in (caught.value.fix or "")


def test_options_of_another_source_are_refused() -> None:
    with pytest.raises(TelemetryError, match="seed"):
        open_source("auto", seed=3)


def test_zeus_is_needed_only_when_asked_for() -> None:
    open_source("auto")
    with pytest.raises(MissingDependencyError, match="zeus") as caught:
        open_source("zeus")
    assert "thermoe[zeus]" in (caught.value.fix or "")


def test_an_unknown_way_to_find_edges_is_refused(nvml_meter: EnergyMeter) -> None:
    with pytest.raises(ConfigError, match="aligned_window"):
        nvml_meter.window("work", edges="tick")
