"""NVIDIA boards: units, one batch per sample, and every way in which a driver can be missing or fail in part."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace

import pytest
from fake_nvml import (
    FUNCTION_NOT_FOUND,
    GPU_IS_LOST,
    LIBRARY_NOT_FOUND,
    NO_PERMISSION,
    NOT_SUPPORTED,
    TIMEOUT,
    UNINITIALIZED,
    UNKNOWN,
    VERSION_MISMATCH,
    FakeNvml,
)

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.nvml import NvmlSource
from thermoe.telemetry.nvml_library import NvmlLibrary
from thermoe.telemetry.source import GPU_METRICS, GPU_STATE, Sample

EVERYTHING = (*GPU_METRICS, *GPU_STATE)


def source_on(nvml: FakeNvml, environment: dict[str, str] | None = None) -> NvmlSource:
    return NvmlSource(nvml, clock=nvml.clock, environment=environment or {})


def read_all(source: NvmlSource) -> Sample:
    return source.read(source.devices()[0], EVERYTHING)


def test_every_metric_is_in_its_unit_and_measured(nvml: FakeNvml, clock: VirtualClock) -> None:
    clock.sleep_s(3.0)
    sample = read_all(source_on(nvml))
    sensors = nvml.plants[0].sensors
    assert sample.energy_j == pytest.approx(sensors.energy_j, abs=1e-3)
    assert sample.power_w == pytest.approx(sensors.power_w, abs=1e-3)
    assert sample.power_avg_w == pytest.approx(sensors.power_avg_w, abs=1e-3)
    assert sample.power_limit_w == 700.0
    assert 30 < sample.temp_c < 60
    assert sample.memory_temp_c == sample.temp_c
    assert (sample.memory_used_bytes, sample.memory_total_bytes) == (37e9, 150e9)
    assert (sample.sm_clock_hz, sample.memory_clock_hz) == (1980e6, 3201e6)
    assert sample.utilization_frac == pytest.approx(0.97)
    assert sample.throttle_reasons == {"sw_power_cap"}
    assert sample.foreign_processes == 0
    assert sample.missing == {}
    assert set(sample.provenance) == set(EVERYTHING)
    assert set(sample.provenance.values()) == {"measured"}


def test_one_batch_per_sample_and_the_time_is_its_middle(nvml: FakeNvml, clock: VirtualClock) -> None:
    source = source_on(nvml)
    source.devices()
    started_s = clock.now_s()
    sample = read_all(source)
    assert nvml.calls.count("nvmlDeviceGetFieldValues") == 1
    assert sample.read_latency_s == pytest.approx(0.0037)
    assert sample.t_s == pytest.approx(started_s + 0.00185)


def test_nothing_is_loaded_before_the_first_call(nvml: FakeNvml) -> None:
    source_on(nvml)
    assert nvml.calls == []


def test_the_library_is_started_once_and_never_shut_down(nvml: FakeNvml) -> None:
    for _ in range(3):
        source = source_on(nvml)
        read_all(source)
        source.close()
    assert nvml.init_pids == [os.getpid()] * 3  # each source here has a library object of its own
    library = NvmlLibrary(nvml)
    for _ in range(5):
        library.call("nvmlDeviceGetCount")
    assert nvml.init_pids == [os.getpid()] * 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (LIBRARY_NOT_FOUND, "NVIDIA driver library not found"),
        (9, "driver is not loaded"),
        (VERSION_MISMATCH, "different versions"),
        (NO_PERMISSION, "no permission"),
    ],
)
def test_without_a_usable_driver_there_is_no_device_and_a_reason(nvml: FakeNvml, code: int, words: str) -> None:
    nvml.errors["nvmlInit"] = code
    source = source_on(nvml)
    assert source.devices() == []
    assert words in source.absent["energy_j"]
    with EnergyMeter(source, clock=nvml.clock) as meter, meter.window("work") as window:
        ran_on = True
    assert ran_on
    assert window.result.energy_j is None
    assert window.result.status == "invalid"
    assert "no GPU" in window.result.reason


def test_an_old_fork_in_the_place_of_the_binding_is_named(clock: VirtualClock) -> None:
    fork = SimpleNamespace(nvmlInit=lambda: None)
    source = NvmlSource(fork, clock=clock, environment={})
    assert source.devices() == []
    assert "pip uninstall pynvml" in source.absent["energy_j"]


def test_a_binding_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("no module named 'pynvml'")

    monkeypatch.setattr("thermoe.telemetry.nvml_library.import_module", broken)
    fault = NvmlLibrary().start()
    assert fault is not None
    assert "nvidia-ml-py cannot be imported" in fault.reason


@pytest.mark.parametrize(("number", "metric"), [(82, "memory_temp_c"), (185, "power_avg_w")])
def test_an_unsupported_field_is_dropped_alone(nvml: FakeNvml, number: int, metric: str) -> None:
    nvml.errors["field", number] = NOT_SUPPORTED
    source = source_on(nvml)
    for _ in range(3):
        sample = read_all(source)
        assert sample.value(metric) is None
        assert sample.missing[metric] == "not supported by this board"
        assert sample.energy_j is not None
        assert sample.power_w is not None
    asked: list[list[int]] = []
    plain = nvml.nvmlDeviceGetFieldValues
    nvml.nvmlDeviceGetFieldValues = lambda handle, numbers: (asked.append(list(numbers)), plain(handle, numbers))[1]
    read_all(source)
    assert number not in asked[0]
    assert len(asked[0]) == 3


def test_without_the_energy_field_the_older_counter_call_answers(nvml: FakeNvml) -> None:
    nvml.errors["field", 83] = NOT_SUPPORTED
    source = source_on(nvml)
    read_all(source)
    sample = read_all(source)
    assert sample.energy_j == pytest.approx(nvml.plants[0].sensors.energy_j, abs=1e-3)
    assert "energy_j" not in sample.missing


def test_a_driver_without_field_queries_still_gives_energy_and_power(nvml: FakeNvml) -> None:
    nvml.errors["nvmlDeviceGetFieldValues"] = FUNCTION_NOT_FOUND
    source = source_on(nvml)
    read_all(source)
    sample = read_all(source)
    assert sample.energy_j is not None
    assert sample.power_w is not None
    assert "too old" in sample.missing["memory_temp_c"]


@pytest.mark.parametrize("lacking", ["nvmlDeviceGetTemperature", "nvmlDeviceGetCurrentClocksEventReasons"])
@pytest.mark.parametrize("how", ["binding", "driver"])
def test_the_other_symbol_is_tried_when_one_is_missing(nvml: FakeNvml, lacking: str, how: str) -> None:
    if how == "binding":
        nvml.absent.add(lacking)
    else:
        nvml.errors[lacking] = FUNCTION_NOT_FOUND
    sample = read_all(source_on(nvml))
    assert sample.temp_c is not None
    assert sample.throttle_reasons == {"sw_power_cap"}
    assert sample.energy_j is not None


def test_no_permission_for_one_metric_leaves_the_others(nvml: FakeNvml) -> None:
    nvml.errors["nvmlDeviceGetComputeRunningProcesses"] = NO_PERMISSION
    nvml.errors["nvmlDeviceGetUtilizationRates"] = NO_PERMISSION
    sample = read_all(source_on(nvml))
    assert sample.missing == dict.fromkeys(("foreign_processes", "utilization_frac"), "no permission to read it")
    assert sample.power_w is not None


def test_a_passing_error_is_tried_once_more(nvml: FakeNvml) -> None:
    nvml.errors["nvmlDeviceGetFieldValues"] = [TIMEOUT]
    assert read_all(source_on(nvml)).energy_j is not None
    assert nvml.calls.count("nvmlDeviceGetFieldValues") == 2


def test_an_error_that_lasts_makes_a_gap_and_is_not_remembered(nvml: FakeNvml) -> None:
    nvml.errors["nvmlDeviceGetFieldValues"] = [UNKNOWN, UNKNOWN]
    source = source_on(nvml)
    first = read_all(source)
    assert first.energy_j is None
    assert first.missing["energy_j"] == "unknown driver error"
    assert read_all(source).energy_j is not None


def test_an_uninitialised_library_is_started_again(nvml: FakeNvml) -> None:
    source = source_on(nvml)
    source.devices()
    nvml.errors["nvmlDeviceGetFieldValues"] = [UNINITIALIZED]
    assert read_all(source).energy_j is not None
    assert len(nvml.init_pids) == 2


def test_a_lost_board_is_lost_and_nothing_raises(nvml: FakeNvml) -> None:
    source = source_on(nvml)
    source.devices()
    nvml.errors["nvmlDeviceGetFieldValues"] = GPU_IS_LOST
    sample = read_all(source)
    assert sample.lost
    assert sample.missing["energy_j"] == "the GPU is lost"


def test_the_library_is_started_anew_in_another_process(nvml: FakeNvml) -> None:
    process = SimpleNamespace(id=100)
    library = NvmlLibrary(nvml, process_id=lambda: process.id)
    library.call("nvmlDeviceGetCount")
    process.id = 101
    library.call("nvmlDeviceGetCount")
    library.call("nvmlDeviceGetCount")
    assert len(nvml.init_pids) == 2


@pytest.mark.parametrize(
    ("processes", "strangers"),
    [([], 0), (["own"], 0), (["own", 77], 1), ([55], 0), ([55, 66], 1), (["own", 55, 66], 2)],
)
def test_strangers_are_counted_with_and_without_the_own_id_in_the_list(
    nvml: FakeNvml, processes: list, strangers: int
) -> None:
    nvml.processes = [os.getpid() if p == "own" else p for p in processes]
    assert read_all(source_on(nvml)).foreign_processes == strangers


def test_a_sliced_board_is_shared_and_keeps_its_whole_energy(nvml: FakeNvml, clock: VirtualClock) -> None:
    nvml.mig[0] = ["MIG-aaaa0000-1111-2222-3333-444455556666"]
    source = source_on(nvml, {"CUDA_VISIBLE_DEVICES": "MIG-aaaa0000"})
    device = source.devices()[0]
    assert device.shared
    assert device.mig_uuids == ("MIG-aaaa0000-1111-2222-3333-444455556666",)
    with EnergyMeter(source, clock=clock) as meter:
        clock.sleep_s(1.0)
        with meter.window("work") as window:
            clock.sleep_s(5.0)
    assert window.result.status == "flagged"
    assert "shared_device" in window.result.flags
    assert "whole board" in window.result.reason
    true_j = nvml.plants[0].true_between(clock.now_s() - 5.0, clock.now_s() - 0.1)
    assert window.result.energy_j == pytest.approx(true_j, rel=0.10)


def test_a_container_that_hides_every_board_says_so(nvml: FakeNvml) -> None:
    source = source_on(nvml, {"CUDA_VISIBLE_DEVICES": ""})
    assert source.devices() == []
    assert "leaves none visible" in source.absent["energy_j"]


def test_a_board_that_does_not_answer_is_left_out(clock: VirtualClock) -> None:
    nvml = FakeNvml(clock, boards=2)
    nvml.errors["nvmlDeviceGetHandleByIndex"] = [GPU_IS_LOST]
    source = source_on(nvml)
    assert [device.uuid for device in source.devices()] == [nvml.uuids[1]]
    assert source.notes == ("board 0 does not answer",)
