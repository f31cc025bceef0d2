"""The doctor on machines of every kind: what it finds, what it advises, what it prints, and how it exits."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fake_nvml import LIBRARY_NOT_FOUND, NO_PERMISSION, NOT_SUPPORTED, FakeNvml
from rich.console import Console

import thermoe.doctor as command
from thermoe import cli
from thermoe.telemetry import doctor, nvml_library
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.diagnosis import Diagnosis
from thermoe.telemetry.doctor import diagnose
from thermoe.telemetry.doctor_text import print_diagnosis
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.plant import Fault, StepLoad
from thermoe.telemetry.profiles import find_profiles, profiles_folder
from thermoe.telemetry.simulated import SimulatedSource

VERSIONS = {"thermoe": "0.1.0", "nvidia-ml-py": "13.0", "torch": None}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A system's files: an x86 processor, a bus with no GPU, no RAPL."""
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("flags : fpu sse\n")
    return tmp_path


def add_gpu(machine: Path, vendor: str) -> None:
    board = machine / "sys/bus/pci/devices/0000:01:00.0"
    board.mkdir()
    (board / "class").write_text("0x030200\n")
    (board / "vendor").write_text(vendor + "\n")


def add_rapl(machine: Path) -> Path:
    zone = machine / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    for name, text in (("name", "package-0"), ("energy_uj", "5000000"), ("max_energy_range_uj", "262143328850")):
        (zone / name).write_text(text)
    return zone


def examine(machine: Path, nvml: Any, clock: VirtualClock, **options: Any) -> Diagnosis:
    settings: dict[str, Any] = {
        "environment": {"HOME": str(machine)},
        "versions": VERSIONS,
        "root": machine,
        "rapl_root": machine / "sys/class/powercap",
    }
    return diagnose(nvml=nvml, clock=clock, **{**settings, **options})


def text_of(found: Diagnosis) -> str:
    stream = io.StringIO()
    print_diagnosis(Console(file=stream, width=200), found)
    return stream.getvalue()


def no_driver(clock: VirtualClock) -> FakeNvml:
    fake = FakeNvml(clock)
    fake.errors["nvmlInit"] = LIBRARY_NOT_FOUND
    return fake


def test_a_machine_without_gpu_and_rapl(machine: Path, clock: VirtualClock) -> None:
    found = examine(machine, no_driver(clock), clock)
    assert found.energy.provenance is None and found.energy.scope == "none"
    assert "no RAPL" in (found.energy.reason or "") and "driver library not found" in (found.energy.reason or "")
    gpu, host = found.devices
    assert not gpu.present and {metric.provenance for metric in gpu.metrics} == {None}
    assert all(metric.value is None and metric.reason and metric.fix for metric in gpu.metrics)
    assert "no NVIDIA or AMD GPU" in (gpu.metric("energy_j").fix or "")
    assert host.metric("host_memory_used_bytes").provenance == "measured"
    assert host.metric("cpu_energy_j").value is None
    assert "not measured" in text_of(found) and found.lacks("energy") and found.lacks("temperature")
    assert found.lacks("memory") is None


def test_a_gpu_with_everything(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    found = examine(machine, nvml, clock)
    gpu = found.devices[0]
    assert (found.energy.provenance, found.energy.method, found.energy.scope) == ("measured", "counter", "gpu board")
    assert {metric.provenance for metric in gpu.metrics} == {"measured"}
    assert all(metric.source == "nvml" and metric.cost_s is not None for metric in gpu.metrics)
    assert gpu.metric("energy_j").cost_s == pytest.approx(0.0037)
    assert gpu.tick_period_s == pytest.approx(0.1, abs=0.005)
    assert gpu.metric("power_limit_w").value == 700.0
    assert gpu.metric("energy_j").value > gpu.metric("energy_j").first_value
    assert gpu.metric("throttle_reasons").value == ["sw_power_cap"]
    assert gpu.board is not None and gpu.board.batch.cost_s == pytest.approx(0.0037)
    assert set(gpu.board.fields.values()) == {None} and len(gpu.board.fields) == 5
    assert gpu.board.calls["nvmlDeviceGetTemperature"].cost_s is not None
    assert found.versions["driver"] == "580.159.04"
    assert [found.lacks(what) for what in ("energy", "power", "temperature", "memory")] == [None] * 4
    assert found.took_s < 10
    assert not [name for name in nvml.calls if "Set" in name or "Reset" in name]
    printed = text_of(found)
    assert "counter period 100 ms" in printed and "3.70 ms/read" in printed and gpu.uuid in printed


def test_permission_denied_names_the_step_and_leaves_the_rest(
    machine: Path, clock: VirtualClock, nvml: FakeNvml
) -> None:
    clock.sleep_s(2.0)  # the board has been running for a while
    nvml.errors = {("field", 83): NO_PERMISSION, "nvmlDeviceGetTotalEnergyConsumption": NO_PERMISSION}
    found = examine(machine, nvml, clock)
    energy = found.devices[0].metric("energy_j")
    assert (energy.provenance, energy.method) == ("estimated", "power_integral")
    assert "permission" in (energy.reason or "") and "ask" in (energy.fix or "")
    assert "estimated" in (found.lacks("energy") or "")
    assert found.devices[0].metric("power_w").provenance == "measured"
    assert found.devices[0].board.fields["83 energy"] == "no permission to read it"  # type: ignore[union-attr]
    assert found.devices[0].tick_period_s is None
    assert "integral of sampled power" in text_of(found)


def test_nothing_permitted_is_not_measured(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    nvml.errors = {("field", number): NO_PERMISSION for number in (82, 83, 185, 186)}
    nvml.errors |= {"nvmlDeviceGetTotalEnergyConsumption": NO_PERMISSION, "nvmlDeviceGetPowerUsage": NO_PERMISSION}
    found = examine(machine, nvml, clock)
    assert found.energy.provenance is None and "permission" in (found.energy.reason or "")
    assert "ask" in (found.energy.fix or "")


def test_rapl_for_root_only_names_the_command(machine: Path, clock: VirtualClock, monkeypatch: Any) -> None:
    zone = add_rapl(machine)
    plain = Path.read_text

    def guarded(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == zone / "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    found = examine(machine, no_driver(clock), clock)
    cpu = found.devices[-1].metric("cpu_energy_j")
    assert cpu.value is None and (cpu.fix or "").startswith("sudo chmod -R a+r /sys/class/powercap")
    assert (found.energy.fix or "").startswith("sudo chmod")


def test_rapl_alone_measures_the_processor(machine: Path, clock: VirtualClock) -> None:
    add_rapl(machine)
    found = examine(machine, no_driver(clock), clock)
    assert (found.energy.provenance, found.energy.scope) == ("measured", "cpu package")
    assert found.lacks("energy") is None


@pytest.mark.parametrize(
    ("vendor", "container", "step"),
    [
        ("0x10de", False, "install the NVIDIA driver"),
        ("0x10de", True, "--gpus all"),
        ("0x1002", False, "zeus amdsmi"),
        ("0x8086", False, "none on this machine"),
    ],
)
def test_the_advice_fits_the_machine(
    machine: Path, clock: VirtualClock, vendor: str, container: bool, step: str
) -> None:
    add_gpu(machine, vendor)
    if container:
        (machine / ".dockerenv").touch()
    found = examine(machine, no_driver(clock), clock)
    assert step in (found.devices[0].metric("energy_j").fix or "")
    assert found.machine.container is container


@pytest.mark.parametrize(
    ("system", "arch", "cpuinfo", "step"),
    [
        ("Linux", "x86_64", "flags : fpu hypervisor", "none inside this virtual machine"),
        ("Linux", "aarch64", "", "have no RAPL"),
        ("Linux", "x86_64", "", "modprobe intel_rapl_msr"),
        ("Darwin", "arm64", "", "zeus"),
        ("Windows", "AMD64", "", "Linux only"),
    ],
)
def test_the_advice_for_the_processor_fits(
    machine: Path, clock: VirtualClock, monkeypatch: Any, system: str, arch: str, cpuinfo: str, step: str
) -> None:
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: arch)
    (machine / "proc/cpuinfo").write_text(cpuinfo)
    found = examine(machine, no_driver(clock), clock)
    assert step in (found.devices[-1].metric("cpu_energy_j").fix or "")


def test_a_missing_or_shadowed_binding_is_named(machine: Path, clock: VirtualClock) -> None:
    found = examine(machine, ModuleType("pynvml"), clock, versions={**VERSIONS, "pynvml": "11.5.0"})
    assert "old fork" in (found.energy.reason or "")
    assert "pip uninstall -y pynvml" in (found.devices[0].metric("energy_j").fix or "")
    assert any("shadow" in note for note in found.notes)


def test_a_binding_that_is_not_installed(machine: Path, clock: VirtualClock, monkeypatch: Any) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    library = nvml_library.NvmlLibrary()
    monkeypatch.setattr(nvml_library, "import_module", refuse)
    monkeypatch.setattr("thermoe.telemetry.nvml.LIBRARY", library)
    monkeypatch.setattr(doctor, "LIBRARY", library)
    found = examine(machine, None, clock, versions={"nvidia-ml-py": None})
    assert found.devices[0].metric("energy_j").fix == "pip install nvidia-ml-py"


def test_a_slice_of_a_board(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    nvml.mig = {0: ["MIG-aaaaaaaa-0000-0000-0000-000000000000"]}
    found = examine(machine, nvml, clock, environment={"CUDA_VISIBLE_DEVICES": nvml.mig[0][0], "HOME": str(machine)})
    gpu = found.devices[0]
    assert gpu.shared and gpu.mig_uuids == tuple(nvml.mig[0])
    assert any("whole board's" in note for note in gpu.notes)
    assert "MIG on (1 slices)" in text_of(found)


def test_two_boards_of_which_one_is_visible(machine: Path, clock: VirtualClock) -> None:
    nvml = FakeNvml(clock, 2)
    environment = {"CUDA_VISIBLE_DEVICES": "1,7", "HOME": str(machine)}
    found = examine(machine, nvml, clock, environment=environment)
    assert [device.uuid for device in found.devices if device.kind == "gpu"] == [nvml.uuids[1]]
    assert found.hidden_devices == (nvml.uuids[0],)
    assert found.cuda_visible_devices["value"] == "1,7"
    assert found.cuda_visible_devices["devices"] == [nvml.uuids[1]]
    assert "there are 2 boards" in found.cuda_visible_devices["notes"][0]
    assert found.devices[0].provisional
    assert "hidden: " + nvml.uuids[0] in text_of(found)


def test_all_boards_hidden_says_which_variable(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    found = examine(machine, nvml, clock, environment={"CUDA_VISIBLE_DEVICES": "", "HOME": str(machine)})
    assert "CUDA_VISIBLE_DEVICES" in (found.energy.reason or "")
    assert "unset CUDA_VISIBLE_DEVICES" in (found.energy.fix or "")


def test_torchs_numbers_are_tied_by_uuid(machine: Path, clock: VirtualClock) -> None:
    nvml = FakeNvml(clock, 2)
    listed = [{"index": 0, "uuid": nvml.uuids[1][4:]}, {"index": 1, "uuid": nvml.uuids[0][4:]}]
    found = examine(machine, nvml, clock, torch_devices=listed)
    assert [device.torch_device for device in found.devices[:2]] == ["cuda:1", "cuda:0"]
    assert all(device.mapped_by == "uuid" and not device.provisional for device in found.devices[:2])


def test_a_foreign_process_is_noted(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    nvml.processes = [os.getpid(), 4242]
    gpu = examine(machine, nvml, clock).devices[0]
    assert gpu.board is not None and gpu.board.processes == 2 and gpu.board.own_process_listed
    assert any("1 other compute process" in note for note in gpu.notes)


def test_a_metric_the_board_lacks_is_missing_alone(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    nvml.errors = {("field", 82): NOT_SUPPORTED, ("field", (185, 1)): NOT_SUPPORTED}
    gpu = examine(machine, nvml, clock).devices[0]
    assert gpu.metric("memory_temp_c").fix == "none: this board does not have it"
    assert gpu.metric("temp_c").provenance == gpu.metric("energy_j").provenance == "measured"
    assert gpu.board is not None and gpu.board.fields["185 mean power of the memory"] == "not supported by this board"


def test_an_absurd_value_is_turned_away_and_counted(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    nvml.override["temp"] = 255
    found = examine(machine, nvml, clock)
    temperature = found.devices[0].metric("temp_c")
    assert temperature.value is None and "rejected" in (temperature.reason or "")
    assert found.rejected["temp_c"] >= 2


def test_a_counter_that_stands_still_has_an_unknown_period(machine: Path, clock: VirtualClock) -> None:
    source = SimulatedSource(1, clock=clock, faults=[Fault(kind="frozen", start_s=0.0)])
    found = examine(machine, no_driver(clock), clock, source=source)
    assert found.devices[0].tick_period_s is None
    assert any("period is unknown" in note for note in found.devices[0].notes)
    assert "counter period unknown" in text_of(found)


def test_a_simulated_source_says_so_and_does_not_count_as_measured(machine: Path, clock: VirtualClock) -> None:
    found = examine(machine, no_driver(clock), clock, source=SimulatedSource(1, clock=clock))
    assert found.energy.provenance == "simulated" and "simulated" in (found.lacks("energy") or "")
    assert "energy: simulated" in text_of(found)


def test_eight_boards_are_examined_within_ten_seconds(machine: Path, clock: VirtualClock) -> None:
    found = examine(machine, FakeNvml(clock, 8), clock)
    assert found.took_s < 10 and all(d.tick_period_s for d in found.devices if d.kind == "gpu")


def test_the_json_keeps_its_schema(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    body = json.loads(json.dumps(examine(machine, nvml, clock).as_dict(), allow_nan=False))
    assert (body["schema"], body["schema_version"]) == ("thermoe.doctor", 1)
    assert list(body) == [
        "schema", "schema_version", "energy", "devices", "hidden_devices", "versions", "importable", "machine",
        "cuda_visible_devices", "kernels", "profiles", "rejected", "notes", "took_s",
    ]  # fmt: skip
    assert set(body["energy"]) == {"provenance", "scope", "method", "reason", "fix"}
    assert set(body["devices"][0]) == {
        "kind", "present", "name", "uuid", "index", "pci_bus_id", "mapped_by", "provisional", "torch_device", "shared",
        "mig_uuids", "tick_period_s", "board", "metrics", "notes",
    }  # fmt: skip
    assert set(body["devices"][0]["metrics"][0]) == {
        "metric", "provenance", "value", "first_value", "method", "source", "cost_s", "reason", "fix",
    }  # fmt: skip
    assert set(body["devices"][0]["board"]) == {
        "batch", "calls", "fields", "processes", "own_process_listed", "mps_processes",
    }  # fmt: skip


def test_profiles_are_found_and_broken_ones_only_named(tmp_path: Path) -> None:
    good = {"schema": "thermoe.cost_profile", "schema_version": 1, "basis": "calibrated"}
    good |= {"key": {"device_uuid": "GPU-1", "device_name": "H200"}, "fit": {"quality": "good"}}
    (tmp_path / "a.json").write_text(json.dumps(good))
    (tmp_path / "b.json").write_text("{broken")
    (tmp_path / "c.json").write_text(json.dumps({**good, "schema_version": 9}))
    (tmp_path / "d.json").write_text("[]")
    (tmp_path / "e.json").write_bytes(b"\xff\xfe\x00")
    found = find_profiles(tmp_path, now_s=(tmp_path / "a.json").stat().st_mtime + 86400)
    assert [entry["usable"] for entry in found] == [True, False, False, False, False]
    assert found[0]["age_s"] == pytest.approx(86400) and found[0]["device_uuid"] == "GPU-1"
    assert all(entry["reason"] for entry in found[1:])
    assert (tmp_path / "b.json").read_text() == "{broken"
    assert find_profiles(tmp_path / "nowhere") == []
    assert profiles_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/thermoe/profiles")


def test_a_profile_of_this_board_is_marked(machine: Path, clock: VirtualClock, nvml: FakeNvml) -> None:
    folder = machine / ".cache/thermoe/profiles"
    folder.mkdir(parents=True)
    key = {"device_uuid": nvml.uuids[0], "device_name": "Fake H200"}
    body = {"schema": "thermoe.cost_profile", "schema_version": 1, "key": key, "fit": {"quality": "good"}}
    (folder / "p.json").write_text(json.dumps(body))
    assert "p.json (Fake H200, this board" in text_of(examine(machine, nvml, clock))


def test_an_installed_package_is_told_without_importing_it() -> None:
    assert doctor.installed_versions(("typer", "no-such-package"))["no-such-package"] is None
    assert doctor.installed_versions(("typer",))["typer"]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Any:
    """Run `thermoe doctor ...` in this process and return its exit code, what it printed, and its errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["thermoe", "doctor", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def bare(machine: Path, clock: VirtualClock, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "diagnose", lambda source, **kw: examine(machine, no_driver(clock), clock, **kw))


@pytest.fixture
def with_gpu(machine: Path, clock: VirtualClock, nvml: FakeNvml, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "diagnose", lambda source, **kw: examine(machine, nvml, clock, **kw))


@pytest.mark.usefixtures("bare")
def test_it_exits_0_when_it_could_tell_and_3_when_what_is_required_is_missing(run: Any) -> None:
    assert run()[0] == 0
    code, out, err = run("--require", "energy")
    assert code == 3 and "energy is not measured" in err and "fix" in out
    assert run("--require", "memory")[0] == 0


@pytest.mark.usefixtures("with_gpu")
def test_what_is_required_and_measured_exits_0(run: Any) -> None:
    assert run("--require", "energy")[0] == 0


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--require", "enery"),
        ("--count", "2"),
        ("--watch", "--count", "0"),
        ("--load", "0"),
        ("--load", "x"),
        ("--no",),
    ],
)
def test_bad_arguments_exit_2(run: Any, arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


def test_an_unknown_source_exits_2_with_the_near_match(run: Any) -> None:
    code, _, err = run("--source", "simulatd")
    assert code == 2 and "simulated" in err


@pytest.mark.usefixtures("bare")
def test_json_is_one_document_and_nothing_else(run: Any) -> None:
    code, out, _ = run("--json")
    body = json.loads(out)
    assert code == 0 and body["schema_version"] == 1 and body["load"] is None


@pytest.mark.usefixtures("bare")
def test_a_load_without_a_gpu_says_why(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "PyTorch sees no CUDA device" in run("--load", "3")[1]
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert "PyTorch is not installed" in run("--load", "3")[1]
    assert run("--torch")[0] == 0


def test_watching_is_bounded_and_its_rate_is_the_counters(clock: VirtualClock) -> None:
    source = SimulatedSource(2, clock=clock, load=lambda t_s: 300.0)
    stream = io.StringIO()
    began_s = clock.now_s()
    command.watch(source, Console(file=stream, width=160), count=4, as_json=True)
    rows = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(rows) == 4 and clock.now_s() - began_s == pytest.approx(3.0, abs=0.05)
    gpu = rows[-1]["devices"][0]
    assert gpu["energy_rate_w"] == pytest.approx(gpu["power_w"], rel=0.15) and gpu["label"] == "simulated"
    assert rows[0]["devices"][0]["energy_rate_w"] is None


def test_watching_shows_a_table_and_ends_at_ctrl_c(clock: VirtualClock, monkeypatch: Any) -> None:
    source, stream = SimulatedSource(2, clock=clock), io.StringIO()
    command.watch(source, Console(file=stream, width=160), count=2, as_json=False)
    assert "simulated H200" in stream.getvalue() and "simulated host" in stream.getvalue()

    def interrupt(duration_s: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep_s", interrupt)
    monkeypatch.setattr(source, "read", lambda device, metrics: SimulatedSource(2).read(device, ()))
    command.watch(source, Console(file=stream), count=None, as_json=True)


def test_a_load_holds_the_counter_to_the_power(clock: VirtualClock) -> None:
    load = StepLoad(0.0)
    source = SimulatedSource(5, clock=clock, load=load)
    with EnergyMeter(source) as meter:

        def step() -> None:
            load.set(clock.now_s(), 400.0)
            clock.sleep_s(0.05)
            if meter.sampler is not None:
                meter.sampler.poll()

        found = command.measure_load(meter, step, 5.0, name="simulated H200")
    assert found.ran and found.power_rises
    assert found.idle_power_w == pytest.approx(100, rel=0.15) and (found.load_power_w or 0) > 400
    assert found.counter_over_integral == pytest.approx(1.0, abs=0.05)
    assert found.provenance == "simulated" and "rises" in str(found) and "counter / integral" in str(found)


def test_a_load_that_power_does_not_see_is_told(clock: VirtualClock) -> None:
    with EnergyMeter(SimulatedSource(5, clock=clock)) as meter:
        found = command.measure_load(meter, lambda: clock.sleep_s(0.05), 3.0, name="board")
    assert found.power_rises is False and "does NOT rise" in str(found)
    assert found.integral_energy_j is None and found.counter_over_integral is None
