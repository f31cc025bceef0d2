"""The simulated board: known joules, the measured ends of temperature, a capped clock, sensors with their faults."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.plant import Board, Fault, Plant, StepLoad
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import GPU_METRICS, GPU_STATE, HOST_METRICS, SOURCES, open_source

CALM = Board(gain_rel_limit=0.0, noise_rel_sd=0.0, ambient_creep_c=0.0)


def settled(work_w: float, board: Board = CALM) -> Plant:
    plant = Plant(0.0, StepLoad(work_w), board=board)
    plant.advance(600.0)
    return plant


def test_temperature_ends_are_those_seen_on_hardware() -> None:
    assert settled(0.0).die_c == pytest.approx(36.0, abs=0.5)
    assert settled(570.0).die_c == pytest.approx(62.0, abs=1.0)


def test_work_beyond_the_limit_is_slowed_and_says_so() -> None:
    plant = settled(900.0)
    assert plant.sensors.power_w == pytest.approx(700.0, abs=1.0)
    assert "sw_power_cap" in plant.throttle
    assert plant.speed < 0.75
    assert settled(300.0).throttle == frozenset()
    assert settled(300.0).speed == 1.0


def test_heat_slows_the_work_with_hysteresis() -> None:
    plant = Plant(0.0, StepLoad(500.0), board=Board(slowdown_c=50.0, gain_rel_limit=0.0, noise_rel_sd=0.0))
    seen: list[tuple[bool, float]] = []
    for tick in range(1, 2500):
        plant.advance(0.1 * tick)
        seen.append(("hw_thermal_slowdown" in plant.throttle, plant.die_c))
    assert any(hot for hot, _ in seen)
    released = [temp for (was, _), (now, temp) in pairwise(seen) if was and not now]
    assert released
    assert all(temp <= 47.01 for temp in released)


def test_leakage_raises_power_with_temperature() -> None:
    cold = Plant(0.0, StepLoad(300.0), board=CALM)
    cold.advance(0.2)
    first_w, first_c = cold.sensors.power_w, cold.die_c
    cold.advance(600.0)
    assert cold.sensors.power_w / first_w == pytest.approx(1 + 0.003 * (cold.die_c - first_c), rel=0.01)


def test_the_counter_is_the_true_energy_times_the_boards_gain(clock: VirtualClock) -> None:
    source = SimulatedSource(seed=3, clock=clock, load=StepLoad(400.0), board=Board(noise_rel_sd=0.0))
    device, plant = source.devices()[0], source.plants[0]
    first = source.read(device, ["energy_j"])
    start_s = plant.tick_s
    clock.sleep_s(20.0)
    last = source.read(device, ["energy_j"])
    true_j = plant.true_between(start_s, plant.tick_s)
    assert plant.gain != 1.0
    assert last.energy_j - first.energy_j == pytest.approx(true_j * plant.gain, abs=0.01)


def test_the_counter_steps_every_tenth_of_a_second_by_whole_millijoules(clock: VirtualClock) -> None:
    source = SimulatedSource(seed=1, clock=clock, load=StepLoad(400.0))
    device = source.devices()[0]
    values = []
    for _ in range(200):
        values.append(source.read(device, ["energy_j"]).energy_j)
        clock.sleep_s(0.01 - 0.0037)
    assert len(set(values)) == pytest.approx(200 * 0.01 / 0.1, abs=2)
    assert all(value * 1e3 == pytest.approx(round(value * 1e3), abs=1e-6) for value in values)


def test_momentary_power_sees_the_last_quarter_and_the_mean_a_whole_second(clock: VirtualClock) -> None:
    load = StepLoad(0.0)
    plant = Plant(0.0, load, board=CALM, seed=5)
    plant.advance(10.0)
    rest_w = plant.sensors.power_avg_w
    load.set(plant.tick_s + 0.05, 400.0)
    plant.advance(plant.tick_s + 0.1)
    assert plant.sensors.power_w == pytest.approx(rest_w + 400.0 * 0.96, rel=0.01)
    assert plant.sensors.power_avg_w == pytest.approx(rest_w + 400.0 * 0.96 * 0.05, rel=0.02)


def test_power_follows_the_work_after_the_delay() -> None:
    load = StepLoad(0.0)
    plant = Plant(0.0, load, board=Board(delay_s=2.0, gain_rel_limit=0.0, noise_rel_sd=0.0))
    plant.advance(5.0)
    load.set(5.0, 400.0)
    plant.advance(6.9)
    assert plant.sensors.power_w < 110
    plant.advance(7.3)
    assert plant.sensors.power_w > 400


@pytest.mark.parametrize(("gain", "expected_w"), [(3.0, 500.0), (0.3, 230.0), (-1.0, 100.0)])
def test_a_gain_fault_scales_or_turns_the_answer_to_work(gain: float, expected_w: float) -> None:
    board = Board(gain_rel_limit=0.0, noise_rel_sd=0.0, work_reference_w=200.0)
    plant = Plant(0.0, StepLoad(300.0), board=board, faults=[Fault(kind="gain", start_s=1.0, value=gain)])
    plant.advance(3.0)
    leak = 1 + 0.003 * (plant.die_c - board.reference_c)
    assert plant.sensors.power_w / leak - board.idle_w == pytest.approx(expected_w, rel=0.01)


def test_noise_is_about_one_percent_and_averages_out() -> None:
    plant = Plant(0.0, StepLoad(400.0), board=Board(gain_rel_limit=0.0, ambient_creep_c=0.0))
    plant.advance(300.0)
    momentary, means = [], []
    for tick in range(400):
        plant.advance(300.0 + 0.1 * tick)
        momentary.append(plant.sensors.power_w)
        means.append(plant.sensors.power_avg_w)
    assert 0.004 < statistics.stdev(momentary) / statistics.mean(momentary) < 0.012
    assert statistics.stdev(means) < 0.5 * statistics.stdev(momentary)


def test_one_seed_gives_one_world(clock: VirtualClock) -> None:
    def world(seed: int) -> list[float]:
        here = VirtualClock()
        source = SimulatedSource(seed=seed, clock=here, load=StepLoad(400.0))
        out = []
        for _ in range(20):
            here.sleep_s(0.5)
            out.append(source.read(source.devices()[0], GPU_METRICS).energy_j)
        return out

    assert world(4) == world(4)
    assert world(4) != world(5)


def test_every_metric_is_there_and_labelled_simulated(clock: VirtualClock) -> None:
    source = SimulatedSource(clock=clock)
    clock.sleep_s(1.0)
    for device in source.devices():
        wanted = (*GPU_METRICS, *GPU_STATE) if device.kind == "gpu" else HOST_METRICS
        assert source.metrics(device) == set(wanted)
        sample = source.read(device, wanted)
        assert set(sample.provenance) == set(wanted)
        assert set(sample.provenance.values()) == {"simulated"}
        assert sample.missing == {}


@pytest.mark.parametrize(
    ("kind", "lost", "words"),
    [("lost", True, "lost"), ("dropout", False, "in time"), ("permission", False, "no permission")],
)
def test_refusals_come_and_go_by_schedule(clock: VirtualClock, kind: str, lost: bool, words: str) -> None:
    fault = Fault(kind=kind, start_s=clock.now_s() + 5, duration_s=5)
    source = SimulatedSource(clock=clock, faults=[fault])
    device = source.devices()[0]
    assert source.read(device, ["energy_j"]).energy_j is not None
    clock.sleep_s(6.0)
    sample = source.read(device, ["energy_j"])
    assert (sample.energy_j, sample.lost) == (None, lost)
    assert words in sample.missing["energy_j"]
    clock.sleep_s(6.0)
    assert source.read(device, ["energy_j"]).energy_j is not None


def test_absurd_and_missing_numbers_are_sent_as_a_broken_driver_sends_them(clock: VirtualClock) -> None:
    faults = [Fault(kind="nan", start_s=0, duration_s=1010), Fault(kind="absurd", start_s=1010)]
    source = SimulatedSource(clock=clock, faults=faults)
    device = source.devices()[0]
    assert math.isnan(source.read(device, GPU_METRICS).energy_j)
    clock.advance_to(1020.0)
    sample = source.read(device, GPU_METRICS)
    assert (sample.temp_c, sample.memory_temp_c) == (255.0, 65535.0)


def test_auto_never_picks_a_simulated_source(clock: VirtualClock) -> None:
    assert "simulated" in SOURCES
    source = open_source("auto", clock=clock)
    assert source.provenance == "measured"
    assert "simulated" not in source.name
    assert open_source("simulated", clock=clock).provenance == "simulated"
