"""Where the edges of a window lie and what that does to its joules: ticks, samples, immediate readings, never a mix."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import pytest
from counting_source import GPU, CountingSource, ticking

from thermoe.errors import ConfigError
from thermoe.telemetry.clock import SystemClock, VirtualClock
from thermoe.telemetry.evaluate import Edge, Settings, Span, direct_edge, measure
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.plant import Board, Fault, StepLoad
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import Sample
from thermoe.telemetry.ticks import find_tick, measure_tick_period

POWER_W = 300.0  # of a counter that steps by 30 J every 0.1 s


class Done:
    """A step whose time of completion is known."""

    def __init__(self, t_s: float) -> None:
        self.t_s = t_s

    def time_s(self) -> float:
        return self.t_s


def keep_busy(window, clock: VirtualClock, step_s: float = 0.01, tokens: float = 10.0) -> None:
    """Run steps of a fixed length until the window is done, as a loop that always has work queued."""
    step, start_s = 0, clock.now_s()
    while not window.done:
        step += 1
        clock.advance_to(start_s + step * step_s)
        window.count(tokens, Done(start_s + step * step_s))


def test_windows_between_ticks_repeat_within_three_per_mille(clock: VirtualClock) -> None:
    source = SimulatedSource(seed=11, clock=clock, load=StepLoad(400.0), board=Board(ambient_creep_c=0.0))
    clock.sleep_s(250.0)
    powers = []
    with EnergyMeter(source, sample=False) as meter:
        for _ in range(40):
            with meter.aligned_window("arm", min_s=1.0) as window:
                keep_busy(window, clock)
            clock.sleep_s(random.Random(len(powers)).uniform(0.0, 0.3))
            powers.append(window.result.power_w)
            assert window.result.edges == "tick"
            assert window.result.ticks == 10
    assert statistics.stdev(powers) / statistics.mean(powers) < 0.003


def test_immediate_edges_scatter_by_the_lag_of_two_readings(clock: VirtualClock) -> None:
    draw = random.Random(5)
    source = CountingSource(clock, ticking(0.1))
    errors_s, told_s = [], []
    with EnergyMeter(source, clock=clock, sample=False, repeatability_rel_sd=0.0) as meter:
        for _ in range(2000):
            clock.sleep_s(draw.uniform(0.0, 0.1))
            with meter.window("w") as window:
                clock.sleep_s(draw.uniform(1.5, 1.7))
            result = window.result
            errors_s.append(result.energy_j / POWER_W - result.duration_s)
            told_s.append(result.energy_rel_sd * result.duration_s)
    assert statistics.stdev(errors_s) == pytest.approx(0.041, rel=0.10)
    assert statistics.mean(errors_s) == pytest.approx(0.0, abs=0.004)
    assert statistics.mean(told_s) == pytest.approx(0.041, rel=0.05)


def test_tick_edges_are_known_to_one_call(clock: VirtualClock) -> None:
    draw = random.Random(6)
    source = CountingSource(clock, ticking(0.1))
    errors_s = []
    with EnergyMeter(source, clock=clock, sample=False) as meter:
        for _ in range(300):
            clock.sleep_s(draw.uniform(0.0, 0.1))
            with meter.aligned_window("w", min_s=1.0) as window:
                keep_busy(window, clock, step_s=0.02)
            errors_s.append(window.result.energy_j / POWER_W - window.result.duration_s)
    assert statistics.stdev(errors_s) < 0.002
    assert statistics.mean(errors_s) == pytest.approx(0.0, abs=0.0005)


@pytest.mark.parametrize(("start", "end"), [("tick", "direct"), ("direct", "tick"), ("sampled", "direct")])
def test_mixed_edges_are_refused(start: str, end: str) -> None:
    def edge(t_s: float, kind: str) -> Edge:
        sample = Sample(device_uuid="GPU-x", t_s=t_s, energy_j=300.0 * t_s, provenance={"energy_j": "measured"})
        return Edge(sample, t_s, 0.001, kind=kind)

    alike = Span(device=GPU, start=edge(1.0, start), end=edge(9.0, start))
    mixed = Span(device=GPU, start=edge(1.0, start), end=edge(9.0, end))
    assert measure(alike, Settings()).energy_j == pytest.approx(2400.0)
    refused = measure(mixed, Settings())
    assert (refused.energy_j, refused.status) == (None, "invalid")
    assert "two kinds" in refused.reason


def test_parts_between_common_ticks_add_up_exactly() -> None:
    def edge(t_s: float) -> Edge:
        sample = Sample(
            device_uuid="GPU-x", t_s=t_s, energy_j=round(310.7 * t_s, 3), provenance={"energy_j": "measured"}
        )
        return Edge(sample, t_s, 0.001, kind="tick")

    def joules(start_s: float, end_s: float) -> float:
        span = Span(device=GPU, start=edge(start_s), end=edge(end_s), edges="tick")
        return measure(span, Settings()).energy_j

    assert joules(1.0, 9.0) == pytest.approx(joules(1.0, 4.0) + joules(4.0, 9.0), abs=1e-9)


def test_tokens_are_those_of_the_span_between_the_ticks(clock: VirtualClock) -> None:
    source = CountingSource(clock, ticking(0.1))
    with EnergyMeter(source, clock=clock, sample=False) as meter, meter.aligned_window("w", min_s=2.0) as window:
        keep_busy(window, clock, step_s=0.03, tokens=12.0)
    result = window.result
    assert result.tokens == pytest.approx(result.duration_s * 12.0 / 0.03, rel=1e-3)
    assert result.j_per_token == pytest.approx(POWER_W * 0.03 / 12.0, rel=0.005)
    assert result.status == "valid"
    assert window.tokens > result.tokens  # what was queued before, between and after


def test_a_span_of_whole_periods_does_not_take_one_more(clock: VirtualClock) -> None:
    with EnergyMeter(CountingSource(clock, ticking(0.1)), clock=clock, sample=False) as meter:
        for min_s, ticks in ((1.0, 10), (1.55, 16), (6.0, 60)):
            with meter.aligned_window("w", min_s=min_s) as window:
                keep_busy(window, clock)
            assert window.result.ticks == ticks


def test_few_readings_are_spent_on_the_closing_tick(clock: VirtualClock) -> None:
    source = CountingSource(clock, ticking(0.1))
    with EnergyMeter(source, clock=clock, sample=False) as meter, meter.aligned_window("w", min_s=3.0) as window:
        keep_busy(window, clock, step_s=0.002)
        reads = source.reads
    assert reads <= 30 + 1 + 8 + 1
    assert window.result.energy_j is not None


def test_a_device_that_ran_dry_is_flagged(clock: VirtualClock) -> None:
    with (
        EnergyMeter(CountingSource(clock, ticking(0.1)), clock=clock, sample=False) as meter,
        meter.aligned_window("w", min_s=1.0) as window,
    ):
        start_s = clock.now_s()
        for step in range(50):
            assert not window.done
            clock.advance_to(start_s + 0.01 * step)
            window.count(1.0, Done(start_s + 0.01 * step))
        while not window.done:
            clock.sleep_s(0.05)
    assert "drained" in window.result.flags
    assert window.result.status == "flagged"


def test_leaving_before_the_closing_tick_has_no_joules(clock: VirtualClock) -> None:
    with EnergyMeter(CountingSource(clock, ticking(0.1)), clock=clock) as meter:
        with meter.aligned_window("w", min_s=6.0) as window:
            assert not window.done
            clock.sleep_s(1.0)
        with pytest.raises(ValueError, match="user"), meter.aligned_window("x", min_s=6.0) as broken:
            raise ValueError("user")
    assert window.result.energy_j is None
    assert "left before the closing tick" in window.result.reason
    assert "exception" in broken.result.flags
    assert broken.result.status == "invalid"


def test_a_counter_that_does_not_step_ends_the_loop_and_is_told(clock: VirtualClock) -> None:
    with (
        EnergyMeter(CountingSource(clock, lambda t_s: 7.0), clock=clock) as meter,
        meter.aligned_window("w", min_s=2.0) as window,
    ):
        keep_busy(window, clock)
    assert window.result.energy_j is None
    assert window.result.status == "invalid"
    assert "tick_timeout: the counter did not change" in window.result.reason


def test_a_board_lost_in_a_window_ends_the_loop_and_is_told(clock: VirtualClock) -> None:
    fault = Fault(kind="lost", start_s=clock.now_s() + 3.0)
    source = SimulatedSource(clock=clock, load=StepLoad(300.0), faults=[fault])
    with EnergyMeter(source) as meter, meter.aligned_window("w", min_s=6.0) as window:
        keep_busy(window, clock)
    assert (window.result.energy_j, window.result.reason) == (None, "the GPU is lost")


@pytest.mark.parametrize("min_s", [0, -1.0, float("nan"), "6s", None, True])
def test_a_length_that_is_none_is_refused(clock: VirtualClock, min_s: object) -> None:
    with pytest.raises(ConfigError, match="not a length of time") as caught:
        EnergyMeter(CountingSource(clock), clock=clock).aligned_window("w", min_s=min_s)
    assert "6.0" in (caught.value.fix or "")


def test_no_more_than_two_steps_are_queued(clock: VirtualClock) -> None:
    waited: list[int] = []

    class Counted(Done):
        def __init__(self, number: int, t_s: float) -> None:
            super().__init__(t_s)
            self.number = number

        def time_s(self) -> float:
            waited.append(self.number)
            return self.t_s

    with (
        EnergyMeter(CountingSource(clock, ticking(0.1)), clock=clock) as meter,
        meter.aligned_window("w", min_s=1.0) as window,
    ):
        for number in range(5):
            clock.sleep_s(0.01)
            window.count(1.0, Counted(number, clock.now_s()))
            assert waited == list(range(max(0, number - 1)))
        while not window.done:
            clock.sleep_s(0.01)
    assert waited == [0, 1, 2, 3, 4]


def test_the_ticks_are_found_on_another_thread_in_real_time() -> None:
    clock = SystemClock()
    source = CountingSource(clock, ticking(0.02))
    source.devices = lambda: [GPU_FAST]
    main_thread_reads: list[int] = []
    with EnergyMeter(source, clock=clock, sample=False) as meter, meter.aligned_window("w", min_s=0.3) as window:
        while not window.done:
            time.sleep(0.002)
            before = source.reads
            window.count(4.0)
            main_thread_reads.append(source.reads - before)
    result = window.result
    assert result.status == "valid", result.reason
    assert result.duration_s == pytest.approx(0.3, abs=0.1)  # a busy machine may miss a tick
    assert result.energy_j == pytest.approx(30.0 * result.duration_s / 0.02, abs=45.0)
    assert result.tokens == pytest.approx(window.tokens * result.duration_s / 0.4, rel=0.6)


GPU_FAST = type(GPU)(uuid="GPU-x", kind="gpu", name="fast counter", index=0, counter_period_s=0.02)


# -- sampled edges and slopes ------------------------------------------------------------------------------------------


def sampled_meter(clock: VirtualClock, work: Callable[..., int], **kwargs) -> EnergyMeter:
    meter = EnergyMeter(CountingSource(clock, ticking(0.1)), clock=clock, **kwargs).open()
    work(meter, 3.0)
    return meter


def test_sampled_windows_read_nothing_on_the_callers_thread(clock: VirtualClock, work) -> None:
    meter = sampled_meter(clock, work)
    source = meter.source
    reads = source.reads
    with meter.window("w", edges="sampled") as window:
        for _ in range(100):
            clock.sleep_s(0.05)
            window.count(10.0, Done(clock.now_s()))
            before = source.reads
            meter.sampler.poll()
            reads += source.reads - before
    assert source.reads == reads
    result = window.result
    assert (result.edges, result.status) == ("sampled", "valid")
    assert result.energy_j == pytest.approx(POWER_W * result.duration_s, rel=0.005)
    assert result.tokens == pytest.approx(result.duration_s * 10.0 / 0.05, rel=0.02)


@pytest.mark.parametrize(("locked", "low_s", "high_s"), [(True, 0.001, 0.010), (False, 0.035, 0.047)])
def test_a_sampled_window_is_sharper_where_readings_follow_the_ticks(
    clock: VirtualClock, work, locked: bool, low_s: float, high_s: float
) -> None:
    meter = sampled_meter(clock, work, repeatability_rel_sd=0.0)
    if not locked:
        meter.sampler._tracks["GPU-x"].lock._tick_s = None
        work(meter, 2.0)
    with meter.window("w", edges="sampled") as window:
        work(meter, 4.0, step_s=0.002)  # too few readings inside for a slope
    assert low_s < window.result.energy_rel_sd * window.result.duration_s < high_s


def test_sampled_tokens_without_times_give_no_joules_per_token(clock: VirtualClock, work) -> None:
    meter = sampled_meter(clock, work)
    with meter.window("w", edges="sampled", tokens=500) as window:
        work(meter, 6.0)
    assert window.result.energy_j is not None
    assert (window.result.tokens, window.result.j_per_token) == (None, None)


def test_a_sampled_window_without_two_samples_is_invalid(clock: VirtualClock, work) -> None:
    meter = sampled_meter(clock, work)
    with meter.window("w", edges="sampled") as window:
        clock.sleep_s(5.0)
    assert window.result.energy_j is None
    assert "background samples in the window" in window.result.reason


def test_a_lock_lost_inside_a_sampled_window_turns_both_edges_direct(clock: VirtualClock, work) -> None:
    meter = sampled_meter(clock, work)
    with meter.window("w", edges="sampled") as window:
        work(meter, 5.0)
        meter.sampler._tracks["GPU-x"].lock._tick_s = None
        work(meter, 5.0)
    assert window.result.energy_j is not None
    assert window.result.energy_rel_sd > 0.0


def test_a_slope_through_many_readings_beats_two_immediate_edges(clock: VirtualClock) -> None:
    draw = random.Random(8)

    def span(samples: bool) -> Span:
        start_s = 1000.0 + draw.uniform(0, 0.1)
        counter = ticking(0.1)
        # The readings fall anywhere between two steps, as those of an unlocked sampler do.
        times = [start_s + i + draw.uniform(0, 0.1) for i in range(21)]
        read = [
            Sample(device_uuid="GPU-x", t_s=t, energy_j=counter(t), provenance={"energy_j": "measured"}) for t in times
        ]
        start, end = direct_edge(GPU, read[0]), direct_edge(GPU, read[-1])
        return Span(device=GPU, start=start, end=end, samples=read[1:-1] if samples else ())

    def error(samples: bool) -> float:
        one = span(samples)
        return measure(one, Settings()).energy_j / (POWER_W * one.duration_s) - 1

    plain = statistics.stdev(error(False) for _ in range(400))
    fitted = statistics.stdev(error(True) for _ in range(400))
    assert fitted < 0.75 * plain
    told = measure(span(True), Settings(repeatability_rel_sd=0.0)).energy_rel_sd
    assert told == pytest.approx(fitted, rel=0.5)


def test_a_slope_is_not_drawn_through_power_that_changed() -> None:
    def energy(t_s: float) -> float:  # 100 W, then 500 W for the last fifth
        return 100.0 * min(t_s, 16.0) + 500.0 * max(0.0, t_s - 16.0)

    read = [
        Sample(device_uuid="GPU-x", t_s=float(t), energy_j=energy(t), provenance={"energy_j": "measured"})
        for t in range(21)
    ]
    span = Span(device=GPU, start=direct_edge(GPU, read[0]), end=direct_edge(GPU, read[-1]), samples=read[1:-1])
    assert measure(span, Settings()).energy_j == energy(20.0)


def test_a_slope_is_not_drawn_through_power_that_rose_and_fell() -> None:
    def energy(t_s: float) -> float:  # 300 W with a slow swell: a line through it is off by ten times its own error
        return 300.0 * (t_s + 0.53 * (t_s / 50.0 - 1.0) ** 3)

    read = [
        Sample(device_uuid="GPU-x", t_s=float(t), energy_j=energy(t), provenance={"energy_j": "measured"})
        for t in range(101)
    ]
    span = Span(device=GPU, start=direct_edge(GPU, read[0]), end=direct_edge(GPU, read[-1]), samples=read[1:-1])
    assert measure(span, Settings()).energy_j == pytest.approx(energy(100.0) - energy(0.0), rel=1e-9)


def test_a_reset_between_two_readings_is_seen_though_the_last_value_is_higher() -> None:
    def reading(t_s: float, energy_j: float, epoch: int) -> Sample:
        return Sample(
            device_uuid="GPU-x", t_s=t_s, energy_j=energy_j, counter_epoch=epoch, provenance={"energy_j": "measured"}
        )

    start, end = direct_edge(GPU, reading(0.0, 100.0, 0)), direct_edge(GPU, reading(9.0, 900.0, 1))
    found = measure(Span(device=GPU, start=start, end=end, samples=[reading(4.0, 200.0, 1)]), Settings())
    assert (found.energy_j, found.status) == (None, "invalid")
    assert "went backwards (reset) inside the window" in found.reason


# -- ticks -------------------------------------------------------------------------------------------------------------


def test_a_tick_is_found_by_change_and_the_first_value_is_none(clock: VirtualClock) -> None:
    source = CountingSource(clock, ticking(0.1))
    found = find_tick(GatedReader(source, clock), GPU, clock)
    assert found.reads >= 2
    assert (found.t_s - 0.033) % 0.1 == pytest.approx(0.0, abs=0.004) or (found.t_s - 0.033) % 0.1 > 0.096
    assert found.width_s < 0.006


def test_a_search_is_bounded_in_reads_and_time(clock: VirtualClock) -> None:
    source = CountingSource(clock, lambda t_s: 1.0)
    start_s = clock.now_s()
    found = find_tick(GatedReader(source, clock), GPU, clock)
    assert found.t_s is None
    assert found.timed_out
    assert source.reads <= 30
    assert clock.now_s() - start_s <= 0.26


@pytest.mark.parametrize("period_s", [0.05, 0.1, 0.2])
def test_the_update_period_is_measured(clock: VirtualClock, period_s: float) -> None:
    reader = GatedReader(CountingSource(clock, ticking(period_s)), clock)
    assert measure_tick_period(reader, GPU, clock) == pytest.approx(period_s, abs=0.005)


def test_an_update_period_nobody_saw_is_unknown_and_not_zero(clock: VirtualClock) -> None:
    source = CountingSource(clock, lambda t_s: 1.0)
    start_s = clock.now_s()
    assert measure_tick_period(GatedReader(source, clock), GPU, clock) is None
    assert clock.now_s() - start_s < 1.3
