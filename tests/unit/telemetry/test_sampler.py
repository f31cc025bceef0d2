"""The background sampler: rate, phase lock, back-off, one warning per cause, and an end that never hangs."""

from __future__ import annotations

import gc
import logging
import math
import os
import threading
import time

import pytest
from counting_source import GPU, CountingSource, ticking
from fake_nvml import GPU_IS_LOST, TIMEOUT, FakeNvml

from thermoe.errors import ConfigError
from thermoe.telemetry.clock import SystemClock, VirtualClock
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.nvml import NvmlSource
from thermoe.telemetry.plant import Board, Fault, StepLoad
from thermoe.telemetry.sampler import Sampler
from thermoe.telemetry.simulated import SimulatedSource


def sampler_on(source, clock, **kwargs) -> Sampler:
    return Sampler(GatedReader(source, clock), source.devices(), clock=clock, **kwargs)


def run(sampler: Sampler, clock: VirtualClock, seconds: float) -> None:
    end_s = clock.now_s() + seconds
    while clock.now_s() < end_s:
        clock.sleep_s(max(1e-4, min(sampler.poll(), end_s - clock.now_s())))


def test_one_batch_a_second_beside_the_search_for_a_tick(clock: VirtualClock) -> None:
    source = CountingSource(clock, ticking(0.1))
    sampler = sampler_on(source, clock)
    run(sampler, clock, 300.0)
    checks = 10  # after 10, 20, 30, 45, ... seconds at first, then every minute
    assert source.reads <= 301 + 30 + 3 * checks
    assert len(sampler.between("GPU-x", 0, clock.now_s())) >= 299


@pytest.mark.parametrize("drift", [0.0, 100e-6, -100e-6])
def test_phase_lock_survives_the_drift_of_a_clock(clock: VirtualClock, drift: float) -> None:
    period_s = 0.1 * (1 + drift)
    sampler = sampler_on(CountingSource(clock, ticking(period_s)), clock)
    run(sampler, clock, 400.0)
    assert sampler.locked("GPU-x")
    assert sampler.notes() == []
    late = sampler.between("GPU-x", clock.now_s() - 200.0, clock.now_s())
    assert len(late) > 190
    for sample in late:
        true_tick_s = 0.033 + math.floor((sample.t_s - 0.033) / period_s) * period_s
        assert sample.tick_s == pytest.approx(true_tick_s, abs=0.005)
        assert 0.003 < sample.t_s - true_tick_s < 0.016


def test_a_jump_of_the_phase_ends_the_lock_and_is_told_once(
    clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    source = CountingSource(clock, ticking(0.1, jump_at_s=clock.now_s() + 100.0))
    sampler = sampler_on(source, clock)
    with caplog.at_level(logging.WARNING, "thermoe.telemetry"):
        run(sampler, clock, 90.0)
        assert sampler.locked("GPU-x")
        run(sampler, clock, 200.0)
    assert not sampler.locked("GPU-x")
    assert sampler.notes() == ["sampling lost its lock on the counter; it goes on unlocked"]
    assert sum("lost its lock" in record.message for record in caplog.records) == 1
    assert sampler.latest("GPU-x").tick_s is None
    assert clock.now_s() - sampler.latest("GPU-x").t_s < 1.1


def test_a_counter_that_never_steps_leaves_the_sampler_unlocked(clock: VirtualClock) -> None:
    sampler = sampler_on(CountingSource(clock, lambda t_s: 5.0), clock)
    run(sampler, clock, 5.0)
    assert not sampler.locked("GPU-x")
    assert "tick_timeout" in sampler.notes()[0]


def test_a_device_that_does_not_answer_is_asked_less_and_less(clock: VirtualClock, nvml: FakeNvml) -> None:
    source = NvmlSource(nvml, clock=clock, environment={})
    sampler = Sampler(GatedReader(source, clock), source.devices(), clock=clock, phase_lock=False)
    sampler.poll()
    for name in dir(nvml):
        if name.startswith("nvmlDeviceGet"):
            nvml.errors[name] = TIMEOUT
    before = nvml.calls.count("nvmlDeviceGetFieldValues")
    run(sampler, clock, 120.0)
    polls = (nvml.calls.count("nvmlDeviceGetFieldValues") - before) / 2  # each is tried twice
    assert 6 <= polls <= 10
    nvml.errors.clear()
    run(sampler, clock, 40.0)
    assert sampler.latest(nvml.uuids[0]).energy_j is not None


def test_a_lost_device_is_not_asked_again_and_is_told_once(
    clock: VirtualClock, nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    source = NvmlSource(nvml, clock=clock, environment={})
    sampler = Sampler(GatedReader(source, clock), source.devices(), clock=clock, phase_lock=False)
    run(sampler, clock, 3.0)
    nvml.errors["nvmlDeviceGetFieldValues"] = GPU_IS_LOST
    with caplog.at_level(logging.WARNING, "thermoe.telemetry"):
        run(sampler, clock, 5.0)
        calls = len(nvml.calls)
        run(sampler, clock, 60.0)
    assert len(nvml.calls) == calls
    assert sampler.latest(nvml.uuids[0]).lost
    assert sum("no longer sampled" in record.message for record in caplog.records) == 1


def test_slow_calls_are_counted_and_backed_off(clock: VirtualClock) -> None:
    fault = Fault(kind="slow", start_s=clock.now_s() + 10, duration_s=30, value=0.08)
    source = SimulatedSource(clock=clock, load=StepLoad(300.0), faults=[fault])
    reader = GatedReader(source, clock)
    sampler = Sampler(reader, source.devices()[:1], clock=clock, phase_lock=False)
    run(sampler, clock, 40.0)
    assert 3 <= reader.slow_reads <= 6


def test_the_ring_keeps_the_newest(clock: VirtualClock) -> None:
    sampler = sampler_on(CountingSource(clock), clock, capacity=5, phase_lock=False)
    run(sampler, clock, 20.0)
    assert len(sampler.between("GPU-x", 0, math.inf)) == 5
    assert sampler.latest("GPU-x").t_s > clock.now_s() - 1.1


@pytest.mark.parametrize("period", [0.0, -1.0, math.nan, math.inf, "1s", None, True, 4000])
def test_a_period_that_is_none_is_refused_with_the_range(period: object) -> None:
    with pytest.raises(ConfigError, match="not a sampling period") as caught:
        EnergyMeter(period_s=period)
    assert "1.0" in (caught.value.accepted or "")


def test_a_fast_period_needs_permission_and_the_message_says_why() -> None:
    with pytest.raises(ConfigError, match="more than once a second") as caught:
        EnergyMeter(period_s=0.1)
    assert "2.6%" in (caught.value.fix or "")
    EnergyMeter(period_s=0.1, allow_fast=True)


# -- the thread, in real time ------------------------------------------------------------------------------------------


def real_sampler(hang_s: float = 0.0) -> tuple[Sampler, CountingSource]:
    source = CountingSource(SystemClock(), hang_s=hang_s)
    sampler = Sampler(
        GatedReader(source, source.clock), [GPU], period_s=0.02, allow_fast=True, phase_lock=False, clock=source.clock
    )
    return sampler, source


def wait_until(condition, timeout_s: float = 2.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.002)


def test_the_thread_is_a_daemon_and_gone_after_close() -> None:
    sampler, source = real_sampler()
    sampler.start()
    thread = sampler._thread
    assert thread.daemon
    wait_until(lambda: source.reads >= 3)
    sampler.close()
    sampler.close()
    assert not thread.is_alive()
    assert not sampler.running
    reads = source.reads
    time.sleep(0.06)
    assert source.reads == reads


def test_a_dropped_sampler_takes_its_thread_with_it() -> None:
    sampler, source = real_sampler()
    sampler.start()
    thread = sampler._thread
    wait_until(lambda: source.reads >= 1)
    del sampler
    gc.collect()
    wait_until(lambda: not thread.is_alive())


def test_closing_does_not_wait_for_a_driver_that_hangs() -> None:
    sampler, _ = real_sampler(hang_s=5.0)
    sampler.start()
    time.sleep(0.05)
    started_s = time.monotonic()
    sampler.close()
    assert time.monotonic() - started_s < 2.5


def test_a_second_reader_gives_up_on_a_driver_that_hangs() -> None:
    source = CountingSource(SystemClock(), hang_s=3.0)
    reader = GatedReader(source, source.clock)
    thread = threading.Thread(target=reader.read, args=(GPU, ["energy_j"]), daemon=True)
    thread.start()
    wait_until(lambda: source.reads == 1)
    sample = reader.read(GPU, ["energy_j"])
    assert sample.energy_j is None
    assert "did not answer another thread" in sample.missing["energy_j"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_has_no_sampler_and_its_own_locks() -> None:
    sampler, source = real_sampler()
    reader = sampler._reader
    sampler.start()
    wait_until(lambda: source.reads >= 2)
    lock = reader._lock_of(GPU)
    lock.acquire()  # as if the sampler's thread were inside a call when the process forks
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        quiet = sampler.latest("GPU-x") is None and not sampler.running
        own = reader.read(GPU, ["energy_j"]).energy_j is not None
        sampler.close()
        os.write(write_end, b"ok" if quiet and own else b"no")
        os._exit(0)
    lock.release()
    os.waitpid(child, 0)
    assert os.read(read_end, 2) == b"ok"
    assert sampler.running
    sampler.close()


def test_other_threads_may_look_while_samples_arrive() -> None:
    sampler, source = real_sampler()
    sampler.start()
    for _ in range(300):
        found = sampler.between("GPU-x", 0, math.inf)
        assert found == sorted(found, key=lambda sample: sample.t_s)
    wait_until(lambda: source.reads >= 5)
    sampler.close()


def test_several_boards_are_each_read_after_their_own_tick(clock: VirtualClock) -> None:
    source = SimulatedSource(seed=9, clock=clock, load=StepLoad(300.0), boards=3, board=Board(noise_rel_sd=0.0))
    sampler = Sampler(GatedReader(source, clock), source.devices()[:3], clock=clock)
    run(sampler, clock, 30.0)
    for device, plant in zip(source.devices(), source.plants, strict=False):
        sample = sampler.latest(device.uuid)
        phase_s = (sample.tick_s - plant.tick_s) % 0.1
        assert min(phase_s, 0.1 - phase_s) < 0.006
