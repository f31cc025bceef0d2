"""`thermoe calibrate`: builds the workload, runs it with a progress bar, prints the tables, writes the profile."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from thermoe.energy.calibrate import Calibration, CellResult, calibrate, plan_cells
from thermoe.energy.profile import ProfileKey, check_folder, save_profile
from thermoe.energy.workload import MoEStack
from thermoe.errors import ConfigError, MachineError, UnknownNameError
from thermoe.moe.dispatch import default_backend
from thermoe.runtime import choose_device
from thermoe.telemetry.meter import EnergyMeter

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Share of the free device memory that the weights may take.
MEMORY_FRAC = 0.5
#: Larger sizes are mistakes; they would be refused by the device much later.
MAX_SIZE = 2**20


def _fitting_layers(shape: tuple[int, int, int, int], layers: int, dtype: torch.dtype) -> int:
    """Return how many of ``layers`` fit into memory.

    Raises:
        MachineError: not one of them fits.
    """
    experts, hidden, width, gated = shape
    per_layer = experts * hidden * width * (3 if gated else 2) * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if not free:
        return layers
    fitting = min(layers, int(MEMORY_FRAC * free) // per_layer)
    if fitting < 1:
        raise MachineError(
            f"one layer of these experts takes {per_layer / 1e9:.1f} GB of weights, "
            f"of {free / 1e9:.1f} GB free on the device",
            where="--experts, --hidden, --width",
            accepted=f"weights of one layer up to {100 * MEMORY_FRAC:.0f} % of the free memory",
            fix="calibrate with fewer or smaller experts",
        )
    return fitting


def _device_name(device: str) -> str | None:
    """Return what PyTorch calls the device, to find its data sheet."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def _check(shape: tuple[int, int, int, int], layers: int, dtype: str, window_s: float, seed: int) -> None:
    if dtype not in DTYPES:
        raise UnknownNameError.of("dtype", dtype, DTYPES, where="--dtype")
    experts, hidden, width, _ = shape
    for name, value, usual in (("--experts", experts, 64), ("--layers", layers, 8)):
        if not 1 <= value <= MAX_SIZE:
            raise ConfigError(
                f"{name} is {value}",
                where=name,
                accepted=f"an integer from 1 to {MAX_SIZE}",
                fix=f"leave it out for {usual}",
            )
    for name, value, usual in (("--hidden", hidden, 2048), ("--width", width, 1024)):
        if not 8 <= value <= MAX_SIZE or value % 8:
            raise ConfigError(
                f"{name} is {value}",
                where=name,
                accepted=f"a multiple of 8 from 8 to {MAX_SIZE}",
                fix=f"leave it out for {usual}",
            )
    if not 1.0 <= window_s <= 60:
        raise ConfigError(
            f"--window-s is {window_s}",
            where="--window-s",
            accepted="1 to 60 seconds (a window below ten steps of the energy counter gives no number)",
            fix="leave it out for 2.5",
        )
    if not 0 <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}", where="--seed", accepted="0 to 2**63 - 1", fix="leave it out for 0")


def run_calibration(
    console: Console,
    *,
    shape: tuple[int, int, int, int],
    layers: int,
    dtype: str,
    window_s: float,
    telemetry: str,
    out: Path | None,
    seed: int,
) -> Path:
    """Calibrate and return the path of the profile; see `thermoe calibrate --help`.

    Raises:
        ConfigError: a size is out of range.
        MachineError: the fit is refused.
    """
    _check(shape, layers, dtype, window_s, seed)
    check_folder(out)  # before two minutes of measuring, not after
    device = choose_device()
    console.print(f"device: {device.name} ({device.reason})", highlight=False)
    with EnergyMeter(source=telemetry) as meter:
        described = meter.describe()["energy_j"]
        measured = described["provenance"] is not None and device.name == "cuda"
        if described["provenance"] is not None and device.name != "cuda":
            described = {
                **described,
                "provenance": None,
                "reason": "energy is not that of the device the layers run on",
            }
        if device.name == "cuda":
            how = "in CUDA graphs" if default_backend(torch.device("cuda"), DTYPES[dtype]) != "loop" else "eager"
            console.print(
                f"experts run {how} ({dtype}); graphs need bfloat16 on a GPU of compute capability 9.0 or more"
            )
        key = ProfileKey.of(meter, dtype=dtype, expert_shape=shape, device=device.name)
        if not measured:
            console.print(f"energy: not measured ({described['reason']}); the prior is written, as an estimate")
            outcome = Calibration.of_prior(str(described["reason"]), _device_name(device.name))
        else:
            outcome = _measure(console, meter, shape, layers, DTYPES[dtype], window_s, seed)
    _print(console, outcome)
    path = save_profile(outcome.as_profile(), key, out)
    console.print(f"profile: {path}", highlight=False)
    return path


def _measure(
    console: Console,
    meter: EnergyMeter,
    shape: tuple[int, int, int, int],
    layers: int,
    dtype: torch.dtype,
    window_s: float,
    seed: int,
) -> Calibration:
    experts, hidden, width, gated = shape
    fitting = _fitting_layers(shape, layers, dtype)
    if fitting < layers:
        console.print(f"{fitting} of {layers} layers fit into the device's memory", highlight=False)
    stack = MoEStack(experts, hidden, width, layers=fitting, gated=bool(gated), dtype=dtype, seed=seed)
    cells = plan_cells(experts, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measure forced routing", total=len(cells))

        def show(done: int, _: CellResult) -> None:
            progress.update(task, completed=done)

        return calibrate(meter, stack, cells, window_s=window_s, seed=seed, on_cell=show)


def _print(console: Console, outcome: Calibration) -> None:
    for title, fit in (("gross marginal costs (what a router sees)", outcome.gross), ("decomposition", outcome.net)):
        terms = fit.terms if fit else outcome.model.terms if title.startswith("gross") else {}
        if not terms:
            continue
        table = Table(title=f"{title}, {outcome.model.basis}", title_justify="left")
        for column in ("term", "value", "sd", "unit", "identified"):
            table.add_column(column)
        for name, term in terms.items():
            sd = "-" if term.sd is None else f"{term.sd:.2g}"
            table.add_row(name, f"{term.value:.4g}", sd, term.unit, "yes" if term.identified else "no")
        console.print(table)
    if outcome.cells:
        table = Table(title="windows", title_justify="left")
        for column in ("tokens", "U", "k", "role", "mJ/forward", "modelled", "ms", "W", "C", "flags"):
            table.add_column(column)
        for row in outcome.cells:
            modelled = sum(outcome.model.term(name) * count for name, count in row.work.regressors.items())
            table.add_row(
                str(row.cell.tokens),
                str(row.cell.active_experts),
                str(row.cell.top_k),
                row.cell.role,
                "not measured" if row.energy_j is None else f"{1e3 * row.energy_j:.2f}",
                f"{1e3 * modelled:.2f}",
                f"{1e3 * row.duration_s:.3f}",
                "-" if row.power_w is None else f"{row.power_w:.0f}",
                "-" if row.temp_c is None else f"{row.temp_c:.0f}",
                " ".join(row.flags),
            )
        console.print(table)
    if outcome.held_out_mape_frac is not None and outcome.anchor_drift_frac is not None:
        console.print(
            f"held-out error {100 * outcome.held_out_mape_frac:.1f} %, anchors drifted by "
            f"{100 * outcome.anchor_drift_frac:+.2f} % and scattered by "
            f"{100 * (outcome.anchor_scatter_frac or 0):.2f} %: {outcome.quality}; "
            "absolute joules are good to about 5 %",
            highlight=False,
        )
