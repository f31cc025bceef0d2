"""The report of one training: how it ended, its curves, the load of its experts over time, and what raised an alarm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from thermoe.report.figures import RenderedFigure
from thermoe.report.page import render_page
from thermoe.report.run_data import RunData, entry, number
from thermoe.report.wording import NOT_MEASURED, count

#: Field of the summary row, title, digits.
ENDS = (
    ("ppl", "Perplexity on held-out text", 2),
    ("bits_per_byte", "Bits per byte", 4),
    ("tokens", "Tokens trained on", 0),
    ("tokens_per_s", "Tokens per second", 0),
    ("effective_experts", "Effective experts per layer, mean", 2),
    ("energy_j", "Energy (J)", 0),
)


def training_rows(data: RunData) -> list[tuple[str, str]]:
    """Return (title, value in words) of a training's end."""
    summary = next(iter(data.of("summary")), {})
    rows = []
    for name, title, digits in ENDS:
        value = number(summary.get(name))
        text = f"{value:,.{digits}f}" if value is not None else NOT_MEASURED
        if name == "energy_j":
            label = str((summary.get("energy_provenance") if value is not None else summary.get("energy_reason")) or "")
            if value is not None and summary.get("energy_partial"):
                label += f", not all of it: {summary.get('energy_reason')}"
            text += f" ({label})" if label else ""
        rows.append((title, text))
    rows += _under_price(summary)
    rows.append(("Convergence", str(entry(summary, "convergence", "text") or "not judged: no validation")))
    return rows


def _under_price(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the model costs in perplexity as it will be served, where it was trained under a price."""
    ppl, opened, every = (
        number(summary.get(name)) for name in ("ppl_under_price", "distinct_under_price", "distinct_experts")
    )
    if ppl is None or opened is None or every is None:
        return []
    return [("Perplexity under the price", f"{ppl:,.2f} with {opened:.2f} of {every:.2f} distinct experts")]


def alarms_of(data: RunData) -> list[str]:
    """Return what the collapse monitor said, with the step."""
    return [f"step {count(row.get('step'))}: {row.get('text')}" for row in data.of("alarm")]


def training_table(data: RunData) -> Table:
    """Return the end of a training as a table for the terminal."""
    table = Table(show_header=False, box=box.HORIZONTALS, title=None if data.finished else "unfinished")
    for title, text in training_rows(data):
        table.add_row(title, text)
    for text in alarms_of(data):
        table.add_row("Alarm", text)
    return table


def render_training_html(data: RunData, figures: list[RenderedFigure]) -> str:
    """Return the report of a training as HTML."""
    return render_page(
        "training.html.j2",
        data,
        figures,
        ends=training_rows(data),
        alarms=alarms_of(data),
        names=[figure.name for figure in figures],
    )
