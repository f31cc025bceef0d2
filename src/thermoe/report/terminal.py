"""The table of the arms for a terminal: all columns from 100 characters on, the most telling ones below."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from thermoe.report.run_data import Arm, RunData, entry
from thermoe.report.wording import NOT_MEASURED, Cell, energy_cell, plain, router_cell, with_interval

_BADGE_STYLES = {
    "measured": "green",
    "estimated": "blue",
    "simulated": "magenta",
    "replayed": "magenta",
    NOT_MEASURED: "dim",
}
#: From this width on the table has all its columns.
_FULL_WIDTH = 100


def _lines(cell: Cell, *, badge: bool = False) -> Text:
    if cell.missing:
        return Text(cell.text, style="dim")
    text = Text(cell.text, style="bold")
    if badge:
        text.append(f"\n{cell.badge}", style=_BADGE_STYLES.get(cell.badge, ""))
    elif cell.note:
        text.append(f"\n{cell.note}", style="dim")
    return text


def _perplexity(data: RunData, arm: Arm, segment: str) -> Text:
    return _lines(with_interval(entry(data.summaries.get(arm.name), "ppl", segment)))


def summary_table(run_path: str | Path, *, width: int | None = None) -> Table:
    """Return the arms of the run as a table.

    Args:
        run_path: the run folder.
        width: characters to lay the table out for; the width of the terminal when not given.

    Raises:
        RunFolderError: the folder holds no run.
    """
    data = RunData.read(run_path)
    wide = (Console().width if width is None else width) >= _FULL_WIDTH
    table = Table(
        title=_title(data), caption=_caption(data), title_justify="left", caption_justify="left", show_lines=True
    )
    table.add_column("Arm", min_width=14, ratio=3 if wide else None)
    segments = [segment.name for segment in data.segments] if wide else []
    for name in segments:
        table.add_column(f"Perplexity {escape(name)}", justify="right", no_wrap=False)
    table.add_column("Perplexity, whole", justify="right")
    table.add_column("J/token, cost model", justify="right")
    table.add_column("J/token, telemetry", justify="right")
    if wide:
        table.add_column("Experts per token", justify="right")
    table.add_column("Routing accuracy", justify="right")
    if wide:
        table.add_column("Tokens/s", justify="right")
    for arm in data.arms:
        row = data.summaries.get(arm.name)
        cells = [Text(arm.title), *(_perplexity(data, arm, name) for name in segments), _perplexity(data, arm, "all")]
        cells += [
            _lines(energy_cell(data, arm, c), badge=True) for c in ("j_per_token_modelled", "j_per_token_measured")
        ]
        if wide:
            cells.append(_lines(router_cell(arm, entry(row, "experts_per_token"))))
        cells.append(_lines(router_cell(arm, entry(row, "accuracy_corrected", "all"), 2)))
        if wide:
            cells.append(_lines(Cell(plain(entry(row, "tokens_per_s")))))
        table.add_row(*cells)
    return table


def _title(data: RunData) -> str:
    words = f" ({' and '.join(data.artificial_sources)} energy readings)" if data.artificial_sources else ""
    return ("Arms" if data.finished else "Arms so far: the run is unfinished") + words


def _caption(data: RunData) -> str:
    lines = ["Perplexity with 95% interval, lower is better. Routing accuracy: 0 = random, 1 = best possible subset."]
    reasons = [entry(row, "j_per_token_measured", "reason") for row in data.summaries.values()]
    stated = [str(reason) for reason in dict.fromkeys(reasons) if reason]
    if stated:
        lines.append(f"Joules per token from telemetry not measured: {escape('; '.join(stated))}.")
    return "\n".join(lines)
