"""The report of a shift study: loss over the stream, perplexity against joules, the verdicts, and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from thermoe.report.figures import RenderedFigure, render_figure
from thermoe.report.page import render_page
from thermoe.report.run_data import Row, RunData, entry, listing, number
from thermoe.report.style import WIDTH_IN, Theme, arm_style
from thermoe.report.wording import MINUS, NOT_MEASURED, count, percent, plain

#: Batches on either side that a line over the stream is averaged with.
SMOOTH = 2


def orders_of(data: RunData) -> list[str]:
    """Return the orders in which the stream was read."""
    return [str(order) for order in data.manifest.get("orders") or ()]


def segments_of(data: RunData) -> list[str]:
    """Return the segments of the stream."""
    return [str(item.get("name")) for item in listing(data.manifest, "segments")]


def batch_losses(data: RunData, arm: str, order: str) -> dict[tuple[str, Any], tuple[float, float]]:
    """Return (place in the stream, nats per token, mean over seeds) by segment and number; empty if not read."""
    found: dict[tuple[str, Any], list[tuple[float, float]]] = {}
    for row in data.of("batch", arm=arm, order=order):
        tokens = number(row.get("tokens"))
        values = [number(value) for value in row.get("sequence_nll") or ()]
        known = [value for value in values if value is not None]
        if tokens and len(known) == len(values):
            key = (str(row.get("segment")), row.get("number"))
            found.setdefault(key, []).append((float(row.get("at") or 0), sum(known) / tokens))
    return {key: (spots[0][0], sum(nll for _, nll in spots) / len(spots)) for key, spots in found.items()}


def gaps_of(data: RunData, arm: str, order: str) -> tuple[list[float], list[float]]:
    """Return places and smoothed losses above the first arm, nats per token, in the order read."""
    base = batch_losses(data, data.arms[0].name, orders_of(data)[0])
    own = batch_losses(data, arm, order)
    pairs = sorted((at, nll - base[key][1]) for key, (at, nll) in own.items() if key in base)
    values = [gap for _, gap in pairs]
    return [at for at, _ in pairs], smoothed(values)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and its neighbours."""
    parts = [values[max(0, i - SMOOTH) : i + SMOOTH + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def draw_shift_stream(data: RunData, theme: Theme) -> Figure | None:
    """Loss over the stream, and below it the loss above frozen in both orders; all smoothed."""
    orders = [o for o in orders_of(data) if any(gaps_of(data, arm.name, o)[0] for arm in data.arms[1:])]
    if not orders:
        return None
    first = orders_of(data)[0]
    figure = Figure(figsize=(WIDTH_IN, 2.9 * (len(orders) + 1) + 1.0), layout="constrained")
    panels = figure.subplots(len(orders) + 1, 1)
    for axes, order in zip(panels, [first, *orders], strict=True):
        for arm in data.arms:
            if not data.of("batch", arm=arm.name, order=order):
                continue  # what learns nothing is drawn once
            if axes is panels[0]:
                spots = sorted(batch_losses(data, arm.name, order).values())
                x, y = [at for at, _ in spots], smoothed([nll for _, nll in spots])
            else:
                x, y = gaps_of(data, arm.name, order)
            style = arm_style(data, arm.name, theme)
            axes.plot(x, y, color=style.color, ls=style.dash, label=arm.title)
        if order == first:
            _mark_segments(axes, data, theme, labelled=axes is panels[0])
        if axes is panels[0]:
            axes.set_ylabel("Loss (nats per token)\nlower is better")
            continue
        axes.axhline(0, color=theme.quiet, lw=0.9)
        axes.set_title("Segment after segment" if order == first else "Interleaved batch by batch")
        axes.set_ylabel("Above frozen\n(nats per token)")
    panels[-1].set_xlabel("Batches of the stream scored so far")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _mark_segments(axes: Any, data: RunData, theme: Theme, *, labelled: bool) -> None:
    places: dict[str, list[float]] = {}
    for (segment, _), (at, _) in batch_losses(data, data.arms[0].name, orders_of(data)[0]).items():
        places.setdefault(segment, []).append(at)
    for i, (segment, found) in enumerate(places.items()):
        low, high = min(found) - 0.5, max(found) + 0.5
        axes.axvspan(low, high, color=theme.shade[i % len(theme.shade)], lw=0, zorder=0)
        if not labelled:
            continue
        transform = axes.get_xaxis_transform()
        axes.text((low + high) / 2, 1.01, segment, transform=transform, ha="center", va="bottom", fontsize=9.5)


def draw_shift_front(data: RunData, theme: Theme) -> Figure | None:
    """Perplexity against modelled joules per token, learning inside, a panel a segment."""
    segments = segments_of(data)
    rows = [row for arm in data.arms if (row := summary_of(data, arm.name, orders_of(data)[0])) is not None]
    if not rows or not segments:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.6), layout="constrained")
    panels = figure.subplots(1, len(segments), squeeze=False)[0]
    for axes, segment in zip(panels, segments, strict=True):
        for row in rows:
            joules, ppl = number(entry(row, "j_per_token_modelled", "value")), number(entry(row, "ppl", segment))
            if joules is not None and ppl is not None:
                style = arm_style(data, str(row["arm"]), theme)
                title = data.title_of(row["arm"])
                axes.plot(1e6 * joules, ppl, color=style.color, marker=style.marker, ls="none", ms=8, label=title)
        axes.margins(0.15)
        axes.set_title(segment, fontsize=10.5)
        axes.set_xlabel("Modelled µJ per token", fontsize=9)
        axes.tick_params(labelsize=9)
    panels[0].set_ylabel("Perplexity, lower is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def summary_of(data: RunData, arm: str, order: str) -> Row | None:
    """Return the summary of an arm in an order; ``None`` when it was not read so."""
    return next(iter(data.of("summary", arm=arm, order=order)), None)


def render_shift(data: RunData) -> list[RenderedFigure]:
    """Draw the pictures for light and dark pages."""
    return render_figure("stream", draw_shift_stream, data) + render_figure("front", draw_shift_front, data)


def shift_rows(data: RunData) -> list[dict[str, Any]]:
    """Return a row an arm and order with every column as text."""
    table = []
    for order in orders_of(data):
        for arm in data.arms:
            row = summary_of(data, arm.name, order)
            if row is None:
                continue
            joules = number(entry(row, "j_per_token_modelled", "value"))
            made = [f"{count(value)} {name}" for name, value in (entry(row, "verdicts") or {}).items()]
            table.append(
                {
                    "order": order,
                    "title": arm.title,
                    "ppl": [plain(entry(row, "ppl", segment), 4) for segment in segments_of(data)],
                    "gaps": [_gap(entry(row, "to_frozen", segment)) for segment in (*segments_of(data), "all")],
                    "whole": _percent_of_perplexity(entry(row, "to_frozen", "all", "value")),
                    "joules": NOT_MEASURED if joules is None else plain(1e6 * joules),
                    "learning": percent(row.get("learning_frac")) if row.get("learning_frac") else "0",
                    "distinct": plain(row.get("distinct_experts")),
                    "worst": _signed(number(row.get("worst_window_nats")), 4),
                    "verdicts": ", ".join(made),
                }
            )
    return table


def _signed(value: float | None, digits: int) -> str:
    return NOT_MEASURED if value is None else f"{value:+.{digits}f}".replace("-", MINUS)


def _gap(estimate: Any) -> str:
    value, low, high = (number(entry(estimate, key)) for key in ("value", "lo", "hi"))
    if value is None:
        return NOT_MEASURED
    return f"{_signed(value, 4)} ({_signed(low, 4)} to {_signed(high, 4)})"


def _percent_of_perplexity(nats: Any) -> str:
    found = number(nats)
    return NOT_MEASURED if found is None else f"{_signed(100 * math.expm1(min(found, 700.0)), 2)} %"


def render_shift_html(data: RunData, figures: list[RenderedFigure]) -> str:
    """Return the report of a shift study as HTML."""
    return render_page(
        "shift.html.j2",
        data,
        figures,
        arms=data.arms,
        segments=segments_of(data),
        table=shift_rows(data),
        seeds=count(entry(data.manifest, "config", "seeds")),
        provenance=data.modelled_label() or NOT_MEASURED,
        reference=str(entry(data.manifest, "cost_model", "reference") or NOT_MEASURED),
        sources=[(str(name), str(entry(item, "source"))) for name, item in (data.manifest.get("data") or {}).items()],
    )


def shift_table(data: RunData) -> Table:
    """Return the study as a table for the terminal: perplexity by segment, of the whole against frozen, and joules."""
    title = "Perplexity by segment, and that of the whole stream against frozen"
    table = Table(title=title if data.finished else f"{title} (unfinished)", box=box.HORIZONTALS, padding=(0, 0, 0, 1))
    table.title_justify = table.caption_justify = "left"
    table.add_column("Arm", min_width=18)
    for segment in segments_of(data):
        table.add_column(segment.replace("-", "\n"), justify="right")
    for name in ("Whole", "µJ per\ntoken", "Learn-\ning"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in shift_rows(data):
        if row["order"] != before:
            if before is not None:
                table.add_section()
            table.add_row(f"[bold]{row['order']}[/bold]")
        before = row["order"]
        table.add_row(escape(row["title"]), *row["ppl"], row["whole"], row["joules"], row["learning"])
    table.caption = f"µJ per token: {data.modelled_label() or NOT_MEASURED}, decoding side by side, learning inside."
    return table
