"""A diagnosis for people: one line per metric, with its label, source and cost, or the reason and the one fix."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thermoe.telemetry.compiler import KernelReport
from thermoe.telemetry.diagnosis import DeviceReport, Diagnosis, MetricReport
from thermoe.telemetry.probe import CallCost

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PLAIN_NAMES = {
    "energy_j": "energy counter",
    "power_w": "power now",
    "power_avg_w": "power, mean of 1 s",
    "power_limit_w": "power limit",
    "temp_c": "temperature",
    "memory_temp_c": "memory temperature",
    "memory_used_bytes": "memory used",
    "memory_total_bytes": "memory there is",
    "sm_clock_hz": "core clock",
    "memory_clock_hz": "memory clock",
    "utilization_frac": "utilisation",
    "throttle_reasons": "clocks held down by",
    "foreign_processes": "other processes",
    "host_memory_used_bytes": "memory used",
    "host_memory_total_bytes": "memory there is",
    "process_memory_bytes": "memory of this process",
    "cpu_energy_j": "processor energy",
    "dram_energy_j": "memory energy",
}
_COLOURS = {"measured": "green", "estimated": "yellow", "simulated": "magenta", "replayed": "magenta"}
_DAY_S = 86400.0


def plain_value(metric: str, value: Any) -> str:
    """Return a reading in a unit people use."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " ".join(value) or "nothing"
    if metric.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if metric.endswith("_hz"):
        return f"{value / 1e6:.0f} MHz"
    if metric.endswith("_frac"):
        return f"{100 * value:.0f} %"
    for ending, unit, digits in (("_j", "J", 1), ("_w", "W", 1), ("_c", "C", 0)):
        if metric.endswith(ending):
            return f"{value:.{digits}f} {unit}"
    return str(value)


def plain_cost(cost_s: float | None) -> str:
    """Return the cost of a call in milliseconds."""
    if cost_s is None:
        return ""
    return "< 0.01 ms" if cost_s < 1e-5 else f"{cost_s * 1e3:.2f} ms"


def print_diagnosis(console: Console, found: Diagnosis) -> None:
    """Write the diagnosis to ``console``."""
    _say(console, _energy_line(found))
    for device in found.devices:
        _print_device(console, device)
    console.print()
    for line in _surroundings(found):
        _say(console, line)
    _say(
        console, f"[dim]read-only; took {found.took_s:.1f} s. Joules are those of the part named; see docs/energy.md[/]"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _energy_line(found: Diagnosis) -> str:
    energy = found.energy
    if energy.provenance is None:
        return (
            f"[bold]energy: [red]not measured[/][/] ({_escape(energy.reason or 'no reason given')})"
            f"\n  fix: {_escape(energy.fix or 'none known')}"
        )
    colour = _COLOURS[energy.provenance]
    why = f"\n  because: {_escape(energy.reason)}; fix: {_escape(energy.fix or 'none known')}" if energy.reason else ""
    method = (energy.method or "").replace("_", " ")
    return f"[bold]energy: [{colour}]{energy.provenance}[/][/] ({method}; {energy.scope}, not the wall){why}"


def _print_device(console: Console, device: DeviceReport) -> None:
    console.print()
    _say(console, f"[bold]{_escape(_title(device))}[/]")
    console.print(_metric_table(device.metrics))
    for line in _board_lines(device):
        _say(console, f"  {_escape(line)}")
    for note in device.notes:
        _say(console, f"  [yellow]note[/] {_escape(note)}")


def _title(device: DeviceReport) -> str:
    if device.kind == "host":
        return "host"
    if not device.present:
        return "GPU: none"
    place = "GPU" if device.index is None else f"GPU {device.index}"
    basis = f"mapped by {device.mapped_by}" + (" (from the environment alone)" if device.provisional else "")
    parts = [place, device.name, device.uuid or "", device.pci_bus_id or "", device.torch_device or "", basis]
    return "  ".join(part for part in parts if part)


def _metric_table(metrics: Sequence[MetricReport]) -> Table:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for style, fold in (("", False), ("bold", False), ("", True)):
        table.add_column(style=style, overflow="fold" if fold else "ellipsis")
    for metric in metrics:
        if metric.provenance is not None:
            name = _PLAIN_NAMES.get(metric.metric, metric.metric)
            table.add_row(f"  {name}", _escape(plain_value(metric.metric, metric.value)), _how(metric))
    for (reason, fix), names in _grouped(metrics).items():
        table.add_row(f"  {', '.join(names)}", "-", f"[red]not measured[/]: {_escape(reason)}. Fix: {_escape(fix)}")
    return table


def _how(metric: MetricReport) -> str:
    label = f"[{_COLOURS[metric.provenance or 'measured']}]{metric.provenance}[/]"
    cost = plain_cost(metric.cost_s)
    parts = [label, metric.source or "", f"{cost}/read" if cost else ""]
    if metric.method == "power_integral":
        parts.append(f"integral of sampled power: {_escape(metric.reason or '')}; fix: {_escape(metric.fix or '')}")
    return "  ".join(part for part in parts if part)


def _grouped(metrics: Iterable[MetricReport]) -> Mapping[tuple[str, str], list[str]]:
    """Collect the metrics that are missing for one and the same reason."""
    missing = [metric for metric in metrics if metric.provenance is None]
    groups: dict[tuple[str, str], list[str]] = {}
    for metric in missing:
        name = _PLAIN_NAMES.get(metric.metric, metric.metric)
        groups.setdefault((metric.reason or "no reason given", metric.fix or "none known"), []).append(name)
    many = len(_PLAIN_NAMES) // 2
    return {cause: names if len(names) < many else ["everything"] for cause, names in groups.items()}


def _board_lines(device: DeviceReport) -> list[str]:
    if not device.present or device.kind == "host":
        return []
    tick = "unknown" if device.tick_period_s is None else f"{device.tick_period_s * 1e3:.0f} ms"
    lines = [f"counter period {tick}"]
    board = device.board
    if board is None:
        return lines
    processes = "cannot be listed" if board.processes is None else str(board.processes)
    slices = f"MIG on ({len(device.mig_uuids)} slices)" if device.shared else "MIG off"
    lines[0] += f"; {slices}; compute processes {processes}; batch of four fields {_call(board.batch)}"
    lines.append("fields: " + "; ".join(f"{name} {why or 'yes'}" for name, why in board.fields.items()))
    lines.append("calls: " + "; ".join(f"{n.removeprefix('nvmlDeviceGet')} {_call(c)}" for n, c in board.calls.items()))
    return lines


def _call(cost: CallCost) -> str:
    return cost.reason or "fails" if cost.cost_s is None else plain_cost(cost.cost_s)


def _kernel_line(kernels: KernelReport) -> str:
    if kernels.usable:
        return f"Triton builds them with {kernels.compiler}"
    if kernels.usable is None:
        return f"not used here: {kernels.reason}"
    return f"cannot be built: {kernels.reason}. Fix: {kernels.fix}"


def _surroundings(found: Diagnosis) -> list[str]:
    versions = "  ".join(f"{name} {version}" for name, version in found.versions.items() if version is not None)
    absent = [name for name, there in found.importable.items() if not there]
    lines = [f"versions  {_escape(versions)}"]
    if absent:
        lines.append(f"optional  not installed: {', '.join(absent)}")
    kind = [
        name for name, true in (("container", found.machine.container), ("VM", found.machine.virtual_machine)) if true
    ]
    lines.append(
        f"machine   {found.machine.system} {found.machine.machine}" + (f" ({', '.join(kind)})" if kind else "")
    )
    lines.append(f"kernels   {_escape(_kernel_line(found.kernels))}")
    visible = found.cuda_visible_devices
    chosen = "not set" if visible["value"] is None else repr(visible["value"])
    lines.append(f"CUDA_VISIBLE_DEVICES  {_escape(chosen)}: {len(visible['devices'])} boards visible")
    if found.hidden_devices:
        lines[-1] += f", hidden: {', '.join(found.hidden_devices)}"
    lines += [f"[yellow]note[/] {_escape(note)}" for note in (*visible["notes"], *found.notes)]
    if found.rejected:
        lines.append("turned away by the range gate: " + ", ".join(f"{m} {n}x" for m, n in found.rejected.items()))
    here = {device.uuid for device in found.devices}
    profiles = "; ".join(_profile(entry, here) for entry in found.profiles)
    lines.append(f"cost profiles  {_escape(profiles) or 'none; make one with: thermoe calibrate'}")
    return lines


def _profile(entry: Mapping[str, Any], here: Collection[str | None]) -> str:
    age = "" if entry["age_s"] is None else f", {entry['age_s'] / _DAY_S:.0f} days old"
    what = (entry["device_name"] or "unknown device") + (", this board" if entry["device_uuid"] in here else "")
    state = f"{entry['basis']}, {entry['quality'] or 'quality unknown'}" if entry["usable"] else entry["reason"]
    return f"{entry['file']} ({what}{age}; {state})"
