"""What this machine measures, what is estimated, what is missing, and the one step that would mend each gap.

:func:`diagnose` reads and returns; it prints nothing, changes nothing, makes no CUDA context and needs no root.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from platform import python_version
from typing import Any

from thermoe.results import weakest_provenance
from thermoe.telemetry.arguments import is_off
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.compiler import look_at_kernels
from thermoe.telemetry.devices import normalise_uuid, visible_devices
from thermoe.telemetry.diagnosis import DeviceReport, Diagnosis, EnergyVerdict, MetricReport
from thermoe.telemetry.fixes import Surroundings, fix_for, look_around
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.host import RAPL_ROOT, HostSource
from thermoe.telemetry.nvml import NvmlSource
from thermoe.telemetry.nvml_library import LIBRARY, NvmlLibrary
from thermoe.telemetry.probe import BoardFacts, library_versions, probe_board
from thermoe.telemetry.profiles import find_profiles
from thermoe.telemetry.source import (
    GPU_METRICS,
    GPU_STATE,
    HOST_METRICS,
    CompositeSource,
    Device,
    Sample,
    Source,
    open_source,
)
from thermoe.telemetry.ticks import measure_tick_period

PACKAGES = ("thermoe", "nvidia-ml-py", "pynvml", "psutil", "torch", "transformers", "zeus", "amdsmi")
#: Time spent on watching counters, over all boards together, and the least that can show two of a counter's steps.
TICK_BUDGET_S, LEAST_TICK_S = 4.0, 0.35


def diagnose(
    source: str | Source = "auto",
    *,
    nvml: Any | None = None,
    rapl_root: str | os.PathLike[str] = RAPL_ROOT,
    root: str | os.PathLike[str] = "/",
    environment: Mapping[str, str] | None = None,
    clock: Clock | None = None,
    versions: Mapping[str, str | None] | None = None,
    profiles: str | os.PathLike[str] | None = None,
    torch_devices: Sequence[Mapping[str, Any]] = (),
    tick_s: float = 1.0,
) -> Diagnosis:
    """Examine the machine. A fault of the hardware never raises; it becomes a reason.

    Args:
        source: ``auto``, a source's name, or an open source.
        nvml: a module shaped like ``pynvml``; the installed nvidia-ml-py by default.
        rapl_root: the powercap folder.
        root: where the system's files are looked for.
        environment: the environment variables; the process's own by default.
        clock: what calls are timed by.
        versions: versions by package; those of the installed packages by default.
        profiles: the folder of cost profiles; the user's cache folder by default.
        torch_devices: PyTorch's own list, each with ``index`` and ``uuid``; empty when PyTorch was not asked.
        tick_s: how long a counter is watched for changes, in seconds.

    Raises:
        UnknownNameError: no source has that name.
        MissingDependencyError: the named source needs a package that is not installed.
    """
    environment = os.environ if environment is None else environment
    clock = clock or getattr(source, "clock", None) or SYSTEM_CLOCK
    began_s = clock.now_s()
    around = look_around(Path(root), environment)
    with_nvml = source in ("auto", "nvml")
    library = NvmlLibrary(nvml) if nvml is not None else LIBRARY
    boards = NvmlSource(nvml, clock=clock, environment={}).devices() if with_nvml else []
    visible = visible_devices(boards, environment)
    opened = _open(source, nvml, rapl_root, environment, clock)
    try:
        reader = GatedReader(opened, clock)
        reports = _examine_all(reader, library if with_nvml else None, around, tick_s)
    finally:
        if isinstance(source, str):
            opened.close()
    told = installed_versions() if versions is None else dict(versions)
    return Diagnosis(
        energy=_energy_verdict(reports),
        devices=tuple(_with_torch_names(reports, torch_devices)),
        hidden_devices=tuple(b.uuid for b in boards if b.uuid not in {d.uuid for d in visible.devices}),
        versions={"python": python_version(), **told, **(library_versions(library) if with_nvml else {})},
        importable={name: _importable(name) for name in ("zeus", "amdsmi")},
        machine=around,
        cuda_visible_devices={
            "value": environment.get("CUDA_VISIBLE_DEVICES"),
            "order": environment.get("CUDA_DEVICE_ORDER"),
            "devices": [device.uuid for device in visible.devices],
            "notes": list(visible.notes),
        },
        kernels=look_at_kernels(bool(visible.devices or torch_devices), environment),
        profiles=tuple(find_profiles(profiles, environment=environment, now_s=clock.wall_s())),
        rejected=dict(reader.rejected),
        notes=tuple(_general_notes(told, environment)),
        took_s=clock.now_s() - began_s,
    )


def _open(
    source: str | Source,
    nvml: Any | None,
    rapl_root: str | os.PathLike[str],
    environment: Mapping[str, str],
    clock: Clock,
) -> Source:
    if source not in ("auto", "nvml", "host"):
        return open_source(source)
    parts: list[Source] = []
    if source in ("auto", "nvml"):
        parts.append(NvmlSource(nvml, clock=clock, environment=environment))
    if source in ("auto", "host"):
        parts.append(HostSource(rapl_root, clock=clock))
    return CompositeSource(parts)


def _examine_all(
    reader: GatedReader, library: NvmlLibrary | None, around: Surroundings, tick_s: float
) -> list[DeviceReport]:
    devices = reader.source.devices()
    gpus = sum(device.kind == "gpu" for device in devices)
    watch_s = max(LEAST_TICK_S, min(tick_s, TICK_BUDGET_S / max(1, gpus)))
    reports = [_examine(reader, library, device, around, watch_s) for device in devices]
    kinds = {report.kind for report in reports}
    if "gpu" not in kinds:
        reports.insert(0, _absent("gpu", "no GPU", (*GPU_METRICS, *GPU_STATE), reader.source, around))
    if "host" not in kinds:
        reports.append(_absent("host", "host", HOST_METRICS, reader.source, around))
    return reports


def _examine(
    reader: GatedReader, library: NvmlLibrary | None, device: Device, around: Surroundings, watch_s: float
) -> DeviceReport:
    """Read everything twice with a watch of the counter in between, then each metric alone for its cost."""
    offered = sorted(reader.source.metrics(device))
    first = reader.read(device, offered)
    tick_period_s = None
    if device.kind == "gpu" and first.energy_j is not None:
        tick_period_s = measure_tick_period(reader, device, reader.clock, duration_s=watch_s)
    second = reader.read(device, offered)
    board = None
    if library is not None and device.kind == "gpu" and device.index is not None:
        board = probe_board(library, device.index, reader.clock)
    names = (*GPU_METRICS, *GPU_STATE) if device.kind == "gpu" else HOST_METRICS
    metrics = [_metric(reader, device, name, first, second, around) for name in names]
    if device.kind == "gpu":
        metrics = [_or_integral(metric, metrics) for metric in metrics]
    return DeviceReport(
        kind=device.kind,
        present=True,
        name=device.name,
        uuid=device.uuid,
        index=device.index,
        pci_bus_id=device.pci_bus_id,
        mapped_by=device.mapped_by,
        provisional=device.provisional,
        shared=device.shared,
        mig_uuids=device.mig_uuids,
        tick_period_s=tick_period_s,
        board=board,
        metrics=tuple(metrics),
        notes=tuple(_notes_of(device, board, second, tick_period_s, watch_s)),
    )


def _metric(
    reader: GatedReader, device: Device, name: str, first: Sample, second: Sample, around: Surroundings
) -> MetricReport:
    owner = _owner(reader.source, device)
    earlier, value = (_readable(getattr(sample, name)) for sample in (first, second))
    if value is None:
        untold = f"the source {owner!r} does not read it"
        reason = second.missing.get(name) or reader.source.absent.get(name) or untold
        return MetricReport(metric=name, first_value=earlier, reason=reason, fix=fix_for(reason, around))
    before_s = reader.clock.now_s()
    reader.read(device, (name,))
    return MetricReport(
        metric=name,
        provenance=second.provenance.get(name),
        value=value,
        first_value=earlier,
        method="counter" if name.endswith("energy_j") else None,
        source=owner,
        cost_s=reader.clock.now_s() - before_s,
    )


def _readable(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def _owner(source: Source, device: Device) -> str:
    for part in source.parts if isinstance(source, CompositeSource) else ():
        if any(device.uuid == offered.uuid for offered in part.devices()):
            return part.name
    return source.name


def _or_integral(metric: MetricReport, others: Iterable[MetricReport]) -> MetricReport:
    """Return the energy of a board without a counter as what it would be: an estimate from its sampled power."""
    if metric.metric != "energy_j" or metric.provenance is not None:
        return metric
    power = next((m for m in others if m.metric in ("power_avg_w", "power_w") and m.provenance is not None), None)
    if power is None:
        return metric
    label = weakest_provenance([power.provenance, "estimated"])
    return replace(metric, provenance=label, method="power_integral", source=power.source, cost_s=power.cost_s)


def _absent(kind: str, name: str, metrics: Iterable[str], source: Source, around: Surroundings) -> DeviceReport:
    reports = []
    for metric in metrics:
        reason = source.absent.get(metric) or f"the source {source.name!r} does not read it"
        reports.append(MetricReport(metric=metric, reason=reason, fix=fix_for(reason, around)))
    return DeviceReport(kind=kind, present=False, name=name, metrics=tuple(reports))


def _notes_of(
    device: Device, board: BoardFacts | None, sample: Sample, tick_period_s: float | None, watch_s: float
) -> list[str]:
    notes = []
    if device.shared:
        slices = f"{len(device.mig_uuids)} MIG slices" if device.mig_uuids else "a slice of it is used"
        notes.append(f"the board is shared ({slices}): its joules are the whole board's, windows say shared_device")
    if device.mapped_by == "index":
        notes.append(
            "mapped by index, which CUDA and the driver may count differently: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
        )
    if sample.foreign_processes:
        count = sample.foreign_processes
        who = "1 other compute process uses" if count == 1 else f"{count} other compute processes use"
        notes.append(f"{who} this board: windows will say contaminated")
    if board is not None and board.mps_processes:
        notes.append(f"{board.mps_processes} clients of the multi-process service share this board")
    if sample.energy_j is not None and device.kind == "gpu" and tick_period_s is None:
        notes.append(f"the energy counter was not seen to step twice in {watch_s:.2g} s: its period is unknown")
    if sample.lost:
        notes.append("the board is lost: " + next(iter(sample.missing.values()), "it does not answer"))
    return notes


def _energy_verdict(reports: Sequence[DeviceReport]) -> EnergyVerdict:
    """Say what a window's joules would be here: those of all GPUs, or without a GPU those of the processor."""
    gpus = [report.metric("energy_j") for report in reports if report.kind == "gpu"]
    host = next(report for report in reports if report.kind == "host")
    if any(report.kind == "gpu" and report.present for report in reports):
        label = weakest_provenance([metric.provenance for metric in gpus])
        short = next((metric for metric in gpus if metric.reason is not None), MetricReport(metric="energy_j"))
        method = "power_integral" if any(m.method == "power_integral" for m in gpus) else "counter"
        return EnergyVerdict(
            provenance=label,
            scope="gpu board" if label else "none",
            method=method if label else None,
            reason=short.reason,
            fix=short.fix,
        )
    cpu, dram = host.metric("cpu_energy_j"), host.metric("dram_energy_j")
    if cpu.provenance is not None:
        scope = "cpu package and dram" if dram.provenance is not None else "cpu package"
        return EnergyVerdict(provenance=cpu.provenance, scope=scope, method="counter")
    fixes = [gpus[0].fix, cpu.fix]
    useful = next((fix for fix in fixes if fix is not None and not fix.startswith("none")), fixes[0])
    reasons = dict.fromkeys(reason for reason in (cpu.reason, gpus[0].reason) if reason)
    return EnergyVerdict(provenance=None, reason="; ".join(reasons), fix=useful)


def _with_torch_names(
    reports: Sequence[DeviceReport], torch_devices: Sequence[Mapping[str, Any]]
) -> list[DeviceReport]:
    """Tie each board to PyTorch's own name for it, by UUID."""
    names = {
        normalise_uuid(str(entry["uuid"])): f"cuda:{entry['index']}" for entry in torch_devices if entry.get("uuid")
    }
    tied = []
    for report in reports:
        name = names.get(normalise_uuid(report.uuid)) if report.kind == "gpu" and report.uuid is not None else None
        tied.append(report if name is None else replace(report, torch_device=name, mapped_by="uuid", provisional=False))
    return tied


def installed_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Return the version of each package that is installed, without importing any; ``None`` for the others."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _importable(name: str) -> bool:
    try:
        return util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _general_notes(versions: Mapping[str, str | None], environment: Mapping[str, str]) -> list[str]:
    notes = []
    fork = versions.get("pynvml")
    if fork is not None and fork.split(".")[0].isdigit() and int(fork.split(".")[0]) < 12:
        notes.append(f"the package pynvml {fork} may shadow nvidia-ml-py; fix: pip uninstall pynvml, then reinstall it")
    if is_off(environment):
        notes.append("THERMOE_TELEMETRY is off: meters read nothing; this diagnosis reads all the same")
    return notes
