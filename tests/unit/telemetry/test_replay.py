"""Recording and replaying: what was recorded comes back with another label; a failing sink costs the trace alone."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe.errors import DataError
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.plant import StepLoad
from thermoe.telemetry.replay import ReplayedSource, TraceRecorder, load_trace, sample_from_json, sample_to_json
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import GPU_METRICS, GPU_STATE, Sample

EVERYTHING = (*GPU_METRICS, *GPU_STATE)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
labels = st.sampled_from(["measured", "estimated", "simulated"])


@given(
    st.builds(
        Sample,
        device_uuid=st.text(min_size=1, max_size=8),
        t_s=st.floats(0, 1e9),
        read_latency_s=st.floats(0, 1),
        energy_j=numbers,
        power_w=numbers,
        temp_c=numbers,
        throttle_reasons=st.none() | st.frozensets(st.sampled_from(["sw_power_cap", "gpu_idle"])),
        foreign_processes=st.none() | st.integers(0, 9),
        provenance=st.dictionaries(st.sampled_from(EVERYTHING), labels, max_size=3),
        missing=st.dictionaries(st.sampled_from(EVERYTHING), st.text(max_size=9), max_size=3),
        lost=st.booleans(),
        counter_epoch=st.integers(0, 9),
        tick_s=numbers,
    )
)
def test_a_sample_survives_the_way_through_json(sample: Sample) -> None:
    assert sample_from_json(json.loads(json.dumps(sample_to_json(sample)))) == sample


def record(path: Path, seconds: int = 12) -> list[Sample]:
    clock = VirtualClock()
    recorder = TraceRecorder(SimulatedSource(seed=2, clock=clock, load=StepLoad(300.0)), path, key={"board": "H200"})
    taken = []
    for _ in range(seconds):
        taken.append(recorder.read(recorder.devices()[0], EVERYTHING))
        clock.sleep_s(1.0)
    recorder.close()
    return taken


def test_a_trace_holds_what_was_read(tmp_path: Path) -> None:
    taken = record(tmp_path / "trace.jsonl")
    header, samples = load_trace(tmp_path / "trace.jsonl")
    assert samples == taken
    assert header["source"] == "simulated"
    assert header["key"] == {"board": "H200"}


def test_replay_says_the_same_numbers_with_its_own_label(tmp_path: Path, clock: VirtualClock) -> None:
    taken = record(tmp_path / "trace.jsonl")
    source = ReplayedSource(tmp_path / "trace.jsonl", clock=clock)
    device = source.devices()[0]
    for original in taken:
        clock.advance_to(source._began_s + original.t_s - taken[0].t_s + 1e-6)
        sample = source.read(device, EVERYTHING)
        assert {m: sample.value(m) for m in GPU_METRICS} == {m: original.value(m) for m in GPU_METRICS}
        assert sample.throttle_reasons == original.throttle_reasons
        assert set(sample.provenance.values()) == {"replayed"}
        assert sample.recorded_provenance == original.provenance
        assert sample.t_s == pytest.approx(source._began_s + original.t_s - taken[0].t_s)


def test_a_faster_replay_passes_sooner(tmp_path: Path, clock: VirtualClock) -> None:
    taken = record(tmp_path / "trace.jsonl")
    source = ReplayedSource(tmp_path / "trace.jsonl", speed=10.0, clock=clock)
    clock.sleep_s(0.5005)
    assert source.read(source.devices()[0], ["energy_j"]).energy_j == taken[4].energy_j


def test_the_end_of_a_trace_is_silence_and_not_a_loop(tmp_path: Path, clock: VirtualClock) -> None:
    record(tmp_path / "trace.jsonl")
    source = ReplayedSource(tmp_path / "trace.jsonl", clock=clock)
    clock.sleep_s(60.0)
    sample = source.read(source.devices()[0], EVERYTHING)
    assert sample.energy_j is None
    assert sample.missing["energy_j"] == "end of the trace"


def test_a_window_over_a_replay_is_labelled_replayed(tmp_path: Path, clock: VirtualClock) -> None:
    taken = record(tmp_path / "trace.jsonl")
    source = ReplayedSource(tmp_path / "trace.jsonl", clock=clock)
    with EnergyMeter(source) as meter:
        clock.sleep_s(1.5)
        with meter.window("replay") as window:
            clock.sleep_s(6.0)
    assert window.result.provenance == "replayed"
    assert window.result.energy_j == pytest.approx(taken[7].energy_j - taken[1].energy_j)
    assert meter.describe()["power_w"]["provenance"] == "replayed"


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    taken = record(tmp_path / "trace.jsonl")
    with (tmp_path / "trace.jsonl").open("a") as stream:
        stream.write('{"device_uuid": "SIM')
    assert load_trace(tmp_path / "trace.jsonl")[1] == taken


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no trace header"),
        ("{}\n", "no trace header"),
        ("not json\n{}\n", "no JSON"),
        ('{"schema": "thermoe.trace", "schema_version": 99}\n', "newer"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        load_trace(tmp_path / "trace.jsonl")


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be replayed"):
        ReplayedSource(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("where", ["no/such/folder/trace.jsonl", "full"])
def test_a_sink_that_fails_costs_the_trace_and_nothing_else(
    tmp_path: Path, clock: VirtualClock, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    plain = SimulatedSource(clock=clock, load=StepLoad(300.0))
    with caplog.at_level(logging.WARNING, "thermoe.telemetry"):
        recorder = TraceRecorder(plain, tmp_path / where)
        if where == "full":

            class FullDisk:
                def write(self, text: str) -> None:
                    raise OSError(28, "No space left on device")

            recorder._stream = FullDisk()
        with EnergyMeter(recorder) as meter:
            clock.sleep_s(1.0)
            with meter.window("work") as window:
                clock.sleep_s(5.0)
            for _ in range(5):
                meter.snapshot()
    assert window.result.energy_j is not None
    assert window.result.status == "valid"
    assert recorder.reason is not None
    assert sum("the trace is not written" in record.message for record in caplog.records) == 1
