"""The report of a study: one picture of load and loss for every cure and start, the verdicts, and a table."""

from __future__ import annotations

from typing import Any

from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from thermoe.report.figures import RenderedFigure, render_figure
from thermoe.report.learning import ArmCurves, draw_bands
from thermoe.report.page import render_page
from thermoe.report.run_data import RunData, entry, number
from thermoe.report.style import WIDTH_IN, Theme
from thermoe.report.wording import NOT_MEASURED, count, plain

COLUMNS = {
    "nll": ("Validation loss", "nats per token", 3),
    "effective_experts": ("Effective experts", "worst layer", 2),
    "effective_experts_training": ("In training", "effective experts, worst layer", 2),
    "max_vio": ("MaxVio", "busiest / mean \N{MINUS SIGN} 1, worst layer", 2),
    "dead_experts": ("Dead experts", "all layers", 1),
    "token_entropy": ("Entropy per token", "nats", 2),
    "tokens_per_s": ("Tokens per second", "one thread", 0),
}


def starts_of(data: RunData) -> list[str]:
    """Return the starts of the study in order."""
    return [str(start) for start in data.manifest.get("starts") or ()]


def study_curves(data: RunData) -> dict[str, dict[str, ArmCurves]]:
    """Return start -> arm -> validation curves, one a seed."""
    size = number(data.manifest.get("bytes_per_token"))
    panels: dict[str, dict[str, ArmCurves]] = {}
    for start in starts_of(data):
        for arm in data.arms:
            by_seed: dict[Any, list[tuple[float, float]]] = {}
            for row in data.of("point", arm=arm.name, start=start):
                nll = number(row.get("nll"))
                if nll is not None:
                    by_seed.setdefault(row.get("seed"), []).append((float(row["tokens"]), nll))
            if by_seed:
                panels.setdefault(start, {})[arm.name] = ArmCurves(arm.title, list(by_seed.values()), size)
    return panels


def ranked_load(data: RunData, arm: str, start: str) -> tuple[list[float], list[list[float]]]:
    """Return steps, and by step the load of the busiest, second busiest, ... expert in multiples of an even share.

    Loads are sorted before they are averaged over layers and seeds: which expert wins differs from seed to seed, and an
    average over names would make collapse look even.
    """
    by_step: dict[float, list[list[float]]] = {}
    for row in data.of("point", arm=arm, start=start):
        for load in row.get("load") or ():
            by_step.setdefault(float(row["step"]), []).append(sorted((s * len(load) for s in load), reverse=True))
    steps = sorted(by_step)
    return steps, [[sum(c) / len(c) for c in zip(*by_step[step], strict=True)] for step in steps]


def draw_collapse(data: RunData, theme: Theme) -> Figure | None:
    """The picture: loss curves on top, and below a row an arm with the load of its experts over training."""
    panels = study_curves(data)
    starts = [start for start in starts_of(data) if start in panels]
    arms = [arm for arm in data.arms if any(arm.name in panels[start] for start in starts)]
    if not arms:
        return None
    rows = len(arms)
    figure = Figure(figsize=(WIDTH_IN, 4.2 + 0.72 * rows))
    outer = figure.add_gridspec(2, 1, height_ratios=(2.6, 0.66 * rows), left=0.205, right=0.87, top=0.955, bottom=0.1)
    outer.update(hspace=0.28)
    top = outer[0].subgridspec(1, len(starts), wspace=0.24)
    below = outer[1].subgridspec(rows, len(starts), wspace=0.24, hspace=0.22)
    colors = LinearSegmentedColormap.from_list("load", theme.heat)
    loads = {(arm.name, start): ranked_load(data, arm.name, start) for arm in arms for start in starts}
    peak = max(2.0, *(share for _, columns in loads.values() for column in columns for share in column))
    norm = TwoSlopeNorm(1.0, 0.0, peak)
    image, first = None, None
    for j, start in enumerate(starts):
        axes = figure.add_subplot(top[0, j], sharey=first)
        first = first or axes
        draw_bands(axes, panels[start], theme, skip_frac=0.08, opacity=0.05)
        axes.set_title(f"{start} start")
        axes.set_xlabel("Training tokens", fontsize=9.5)
        axes.ticklabel_format(axis="x", style="plain")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:.0f}k")
        axes.tick_params(labelsize=9.5)
        if j == 0:
            axes.set_ylabel("Validation loss\n(nats per token)", fontsize=10.5)
        for i, arm in enumerate(arms):
            steps, columns = loads[arm.name, start]
            if not columns:
                continue
            cell = figure.add_subplot(below[i, j])
            cell.grid(visible=False)
            image = cell.imshow(
                list(zip(*columns, strict=True)),
                aspect="auto", cmap=colors, norm=norm, interpolation="nearest",
                extent=(steps[0], steps[-1], len(columns[0]) + 0.5, 0.5),
            )  # fmt: skip
            cell.tick_params(length=0, labelsize=9)
            cell.set_yticks([])
            if i < rows - 1:
                cell.set_xticks([])
            else:
                cell.set_xlabel("Training step", fontsize=9.5)
            if i == 0:
                note = "Load of the experts, busiest on top"
                cell.set_title(note, fontsize=9.5, fontweight="normal", color=theme.quiet)
            if j == 0:
                cell.set_ylabel(arm.title, rotation=0, ha="right", va="center", fontsize=10.5, labelpad=8)
            final = number(entry(_summary(data, arm.name, start), "effective_experts", "value"))
            if final is not None:
                cell.text(
                    1.02, 0.5, f"{final:.1f}", transform=cell.transAxes, va="center", fontsize=10.5, weight="bold"
                )
                if i == 0:
                    cell.text(1.02, 1.08, "eff.", transform=cell.transAxes, va="bottom", fontsize=9, color=theme.quiet)
    assert image is not None and first is not None
    figure.legend(
        *first.get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=9.5, bbox_to_anchor=(0.5, 0)
    )
    bar = figure.colorbar(image, cax=figure.add_axes((0.925, 0.2, 0.014, 0.3)))
    bar.set_ticks([0.0, 1.0, peak], labels=["0", "even", f"{plain(peak, 2)} ×"])
    bar.ax.tick_params(labelsize=9)
    return figure


def _summary(data: RunData, arm: str, start: str) -> Any:
    return next(iter(data.of("summary", arm=arm, start=start)), None)


def render_study(data: RunData) -> list[RenderedFigure]:
    """Draw the picture for light and dark pages."""
    return render_figure("collapse", draw_collapse, data)


def study_rows(data: RunData) -> list[dict[str, Any]]:
    """Return a row an arm and start with every column as text: mean, and half the width of its 95 % interval."""
    table = []
    for start in starts_of(data):
        for arm in data.arms:
            row = _summary(data, arm.name, start)
            if row is None:
                continue
            cells = {name: _stated(entry(row, name), digits) for name, (_, _, digits) in COLUMNS.items()}
            cells["converged"] = f"{count(row.get('converged'))} of {count(row.get('seeds'))}"
            table.append({"title": arm.title, "start": start, "cells": cells, "texts": row.get("convergence") or []})
    return table


def _stated(estimate: Any, digits: int) -> str:
    value, high = number(entry(estimate, "value")), number(entry(estimate, "hi"))
    if value is None:
        return NOT_MEASURED
    return f"{value:,.{digits}f}" + (f" ± {high - value:,.{digits}f}" if high is not None else "")


def render_study_html(data: RunData, figures: list[RenderedFigure]) -> str:
    """Return the report of a study as HTML."""
    return render_page(
        "study.html.j2",
        data,
        figures,
        arms=data.arms,
        columns=[(name, title, note) for name, (title, note, _) in COLUMNS.items()],
        table=study_rows(data),
        seeds=count(entry(data.manifest, "config", "seeds")),
    )


def study_table(data: RunData) -> Table:
    """Return the study as a table for the terminal."""
    title = "Arms by start, mean ± half of the 95 % interval over seeds"
    table = Table(title=title if data.finished else f"{title} (unfinished)", box=box.HORIZONTALS, title_justify="left")
    table.add_column("Start")
    table.add_column("Arm")
    shown = ("nll", "effective_experts", "max_vio", "dead_experts")
    for name in shown:
        table.add_column(COLUMNS[name][0], justify="right")
    table.add_column("Converged", justify="right")
    before = None
    for row in study_rows(data):
        if before not in (None, row["start"]):
            table.add_section()
        start = row["start"] if row["start"] != before else ""
        table.add_row(start, row["title"], *(row["cells"][name] for name in shown), row["cells"]["converged"])
        before = row["start"]
    return table
