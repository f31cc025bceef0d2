"""The host: memory from the process table, joules from RAPL files that wrap, overlap and may be closed to us."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.host import HostSource, RaplCounters
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.source import HOST_METRICS

RANGE_UJ = 262_143_328_850


def put(root: Path, zone: str, energy_uj: int) -> None:
    (root / zone / "energy_uj").write_text(f"{energy_uj}\n")


def host_on(root: Path, clock: VirtualClock) -> HostSource:
    return HostSource(root, clock=clock)


def test_packages_and_memory_are_summed_and_nothing_that_overlaps(tmp_path: Path, clock: VirtualClock) -> None:
    root = tmp_path
    for zone, kind in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):
        _zone(root, zone, kind)
    for zone, kind in (("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "uncore"), ("intel-rapl:0:2", "dram")):
        _zone(root, zone, kind)
    source = host_on(root, clock)
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:2", "intel-rapl:0:0", "intel-rapl:0:1", "intel-rapl:0:2"):
        put(root, zone, 3_000_000)
    sample = source.read(source.devices()[0], HOST_METRICS)
    assert sample.cpu_energy_j == pytest.approx(4.0)  # two sockets, 2 J each
    assert sample.dram_energy_j == pytest.approx(2.0)
    assert sample.provenance["cpu_energy_j"] == "measured"


def _zone(root: Path, zone: str, kind: str, energy_uj: int = 1_000_000, range_uj: int | None = RANGE_UJ) -> None:
    folder = root / zone
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(kind + "\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    if range_uj is not None:
        (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")


def test_zones_nested_in_their_package_are_found_once(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0")
    _zone(tmp_path, "intel-rapl:0/intel-rapl:0:0", "dram")
    _zone(tmp_path, "intel-rapl:0:0", "dram")
    counters = RaplCounters(tmp_path)
    put(tmp_path, "intel-rapl:0:0", 2_000_000)
    put(tmp_path, "intel-rapl:0/intel-rapl:0:0", 2_000_000)
    assert counters.read("dram_energy_j", 1.0) == pytest.approx(1.0)


@settings(max_examples=60)
@given(share=st.floats(0, 0.999999), shares=st.lists(st.floats(0, 0.9), min_size=1, max_size=6))
@example(share=0.999999, shares=[0.1])
@example(share=0.5, shares=[0.5, 0.9, 0.9, 0.0])
def test_a_wrap_at_any_point_gives_the_true_difference(
    tmp_path_factory: pytest.TempPathFactory, share: float, shares: list[float]
) -> None:
    start, steps = int(share * RANGE_UJ), [int(part * RANGE_UJ) for part in shares]
    root = tmp_path_factory.mktemp("rapl")
    _zone(root, "intel-rapl:0", "package-0", start)
    counters = RaplCounters(root)
    true_uj = start
    for number, step in enumerate(steps):
        true_uj += step
        put(root, "intel-rapl:0", true_uj % RANGE_UJ)
        found = counters.read("cpu_energy_j", float(number))
        assert found == pytest.approx((true_uj - start) * 1e-6, abs=1e-5)


def test_a_silence_longer_than_half_a_wrap_starts_the_total_anew(tmp_path: Path, clock: VirtualClock) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0")
    source = host_on(tmp_path, clock)
    reader = GatedReader(source, clock)
    device = source.devices()[0]
    reader.read(device, HOST_METRICS)
    put(tmp_path, "intel-rapl:0", 51_000_000)
    clock.sleep_s(1.0)
    before = reader.read(device, HOST_METRICS)
    assert before.cpu_energy_j == pytest.approx(50.0)
    clock.sleep_s(source._rapl.longest_silence_s + 1)
    silent = reader.read(device, HOST_METRICS)
    assert silent.cpu_energy_j is None
    assert "wrapped more than once" in silent.missing["cpu_energy_j"]
    put(tmp_path, "intel-rapl:0", 52_000_000)
    clock.sleep_s(1.0)
    assert "backwards" in reader.read(device, HOST_METRICS).missing["cpu_energy_j"]
    put(tmp_path, "intel-rapl:0", 53_000_000)
    clock.sleep_s(1.0)
    after = reader.read(device, HOST_METRICS)
    assert after.cpu_energy_j is not None
    assert after.counter_epoch > before.counter_epoch


def test_a_wrap_without_a_known_range_is_not_guessed(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000, range_uj=None)
    counters = RaplCounters(tmp_path)
    put(tmp_path, "intel-rapl:0", 1_000_000)
    assert counters.read("cpu_energy_j", 1.0) == "the RAPL counter wrapped and its range is unknown"


def test_a_machine_without_rapl_says_so_and_still_tells_its_memory(tmp_path: Path, clock: VirtualClock) -> None:
    source = host_on(tmp_path / "nowhere", clock)
    sample = source.read(source.devices()[0], HOST_METRICS)
    assert sample.cpu_energy_j is None
    assert sample.missing["cpu_energy_j"] == "no RAPL"
    assert source.absent == {"cpu_energy_j": "no RAPL", "dram_energy_j": "no RAPL"}
    assert 1e6 < sample.process_memory_bytes < sample.host_memory_total_bytes
    assert sample.host_memory_used_bytes <= sample.host_memory_total_bytes


def test_a_counter_only_root_may_read_gives_one_hint(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0")
    plain = Path.read_text

    def closed(path: Path, *args: object, **kwargs: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", closed)
    source = host_on(tmp_path, clock)
    assert "grant read permission on energy_uj" in source.absent["cpu_energy_j"]
    with EnergyMeter(source, clock=clock) as meter, meter.window("work") as window:
        clock.sleep_s(5.0)
    assert window.result.energy_j is None
    assert "only root may" in window.result.reason
    assert "no GPU" in window.result.reason


def test_one_unreadable_socket_makes_the_sum_missing(tmp_path: Path) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0")
    _zone(tmp_path, "intel-rapl:1", "package-1")
    counters = RaplCounters(tmp_path)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert str(counters.read("cpu_energy_j", 1.0)).startswith("RAPL not readable")


def test_joules_of_a_machine_without_a_gpu_are_the_processors(tmp_path: Path, clock: VirtualClock) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0")
    _zone(tmp_path, "intel-rapl:0:0", "dram")
    with EnergyMeter(host_on(tmp_path, clock), clock=clock) as meter, meter.window("work", tokens=100) as window:
        clock.sleep_s(2.0)
        put(tmp_path, "intel-rapl:0", 91_000_000)
        put(tmp_path, "intel-rapl:0:0", 11_000_000)
    result = window.result
    assert (result.energy_j, result.cpu_energy_j, result.dram_energy_j) == pytest.approx((100.0, 90.0, 10.0))
    assert (result.scope, result.provenance, result.status) == ("cpu package and dram", "measured", "valid")
    assert result.j_per_token == pytest.approx(1.0)
    assert meter.describe()["energy_j"]["scope"] == "cpu package and dram"


def test_a_processor_counter_that_stands_still_is_not_zero_joules(tmp_path: Path, clock: VirtualClock) -> None:
    _zone(tmp_path, "intel-rapl:0", "package-0")
    with EnergyMeter(host_on(tmp_path, clock), clock=clock) as meter, meter.window("work") as window:
        clock.sleep_s(3.0)
    assert window.result.energy_j is None
    assert "frozen" in window.result.reason


def test_without_a_process_table_memory_is_missing_and_nothing_raises(tmp_path: Path, clock: VirtualClock) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise FileNotFoundError("/proc/meminfo")

    broken = SimpleNamespace(Process=refuse, virtual_memory=refuse, cpu_percent=refuse)
    source = HostSource(tmp_path, clock=clock, process_module=broken)
    sample = source.read(source.devices()[0], HOST_METRICS)
    for metric in ("process_memory_bytes", "host_memory_used_bytes", "utilization_frac"):
        assert sample.value(metric) is None
        assert "/proc/meminfo" in sample.missing[metric]


def test_process_memory_follows_the_process_after_a_fork(
    tmp_path: Path, clock: VirtualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def process(pid: int) -> SimpleNamespace:
        asked.append(pid)
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=pid))

    source = HostSource(tmp_path, clock=clock, process_module=SimpleNamespace(Process=process))
    device = source.devices()[0]
    assert source.read(device, ["process_memory_bytes"]).process_memory_bytes == os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: 4242)
    assert source.read(device, ["process_memory_bytes"]).process_memory_bytes == 4242


def test_load_is_known_from_the_second_reading(tmp_path: Path, clock: VirtualClock) -> None:
    source = host_on(tmp_path, clock)
    device = source.devices()[0]
    assert source.read(device, ["utilization_frac"]).utilization_frac is None
    assert 0.0 <= source.read(device, ["utilization_frac"]).utilization_frac <= 1.0
