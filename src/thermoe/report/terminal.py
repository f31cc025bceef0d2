"""The table of the arms for a terminal: the most telling columns at 80 characters, the segments from 116 on."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from thermoe.report.run_data import Arm, RunData, entry
from thermoe.report.wording import NOT_MEASURED, Cell, energy_cell, plain, router_cell, shared_decimals, with_interval

_BADGE_STYLES = {
    "measured": "green",
    "estimated": "blue",
    "simulated": "magenta",
    "replayed": "magenta",
    NOT_MEASURED: "dim",
}
#: From these widths on the table has the segments, and all its columns.
_SEGMENTS_WIDTH, _FULL_WIDTH = 116, 140


def _lines(cell: Cell, *, badge: bool = False) -> Text:
    if cell.missing:
        return Text(cell.text, style="dim")
    text = Text(cell.text, style="bold")
    if badge:
        text.append(f"\n{cell.badge}", style=_BADGE_STYLES.get(cell.badge, ""))
    elif cell.note:
        text.append(f"\n{cell.note}", style="dim")
    return text


def _perplexity(data: RunData, arm: Arm, segment: str, *, interval: bool) -> Text:
    decimals = shared_decimals(entry(row, "ppl", segment) for row in data.summaries.values())
    cell = with_interval(entry(data.summaries.get(arm.name), "ppl", segment), decimals)
    return _lines(cell if interval else Cell(cell.text))


def summary_table(run_path: str | Path, *, width: int | None = None) -> Table:
    """Return the arms of the run as a table.

    Args:
        run_path: the run folder.
        width: characters to lay the table out for; the width of the terminal when not given.

    Raises:
        RunFolderError: the folder holds no run.
    """
    data = RunData.read(run_path)
    if data.manifest.get("type") == "training":
        from thermoe.report.training import training_table  # late, as below

        return training_table(data)
    if data.manifest.get("type") == "shift":
        from thermoe.report.shift import shift_table

        return shift_table(data)
    if data.manifest.get("type") == "study":
        from thermoe.report.study import study_table  # late: it brings matplotlib

        return study_table(data)
    room = Console().width if width is None else width
    segments = [segment.name for segment in data.segments] if room >= _SEGMENTS_WIDTH else []
    full = room >= _FULL_WIDTH
    table = Table(title=_title(data), caption=_caption(data), box=box.HORIZONTALS, show_lines=True)
    table.title_justify = table.caption_justify = "left"
    table.add_column("Arm", width=16)  # fixed: with a least width rich lays out more than there is room for
    for name in segments:
        table.add_column(f"PPL\n{escape(name)}", justify="right")
    table.add_column("PPL\nwhole", justify="right")
    table.add_column("J/token\ncost model", justify="right")
    table.add_column("J/token\ntelemetry", justify="right")
    table.add_column("Effective\nexperts", justify="right")
    table.add_column("Routing\naccuracy", justify="right")
    if full:
        table.add_column("Experts\nper token", justify="right")
        table.add_column("Tokens\nper second", justify="right")
    for arm in data.arms:
        row = data.summaries.get(arm.name)
        cells = [Text(arm.title)]
        # at the smaller width the intervals of the segments would fold into three lines
        cells += [_perplexity(data, arm, name, interval=full) for name in segments]
        cells.append(_perplexity(data, arm, "all", interval=True))
        cells += [
            _lines(energy_cell(data, arm, c), badge=True) for c in ("j_per_token_modelled", "j_per_token_measured")
        ]
        cells.append(_lines(router_cell(arm, entry(row, "effective_experts"))))
        cells.append(_lines(router_cell(arm, entry(row, "accuracy_corrected", "all"), 2)))
        if full:
            cells.append(_lines(router_cell(arm, entry(row, "experts_per_token"))))
            cells.append(_lines(Cell(plain(entry(row, "tokens_per_s")))))
        table.add_row(*cells)
    for name in ("random", "oracle"):  # the two ends of the scale, judged in the place of the baseline's decisions
        accuracy = entry(data.summaries.get(name), "accuracy_corrected", "all")
        if accuracy is not None:
            title = str(entry(data.summaries.get(name), "title") or name)
            blank = [Text("")] * (4 + len(segments))
            table.add_row(Text(title), *blank, _lines(Cell(plain(accuracy, 2))))
    return table


def _title(data: RunData) -> str:
    words = f" ({' and '.join(data.artificial_sources)} energy readings)" if data.artificial_sources else ""
    return ("Arms" if data.finished else "Arms so far: the run is unfinished") + words


def _caption(data: RunData) -> str:
    lines = [
        "PPL: perplexity with its 95% interval, lower is better. Routing accuracy: 0 random, 1 best possible subset."
    ]
    reasons = [entry(row, "j_per_token_measured", "reason") for row in data.summaries.values()]
    stated = [str(reason) for reason in dict.fromkeys(reasons) if reason]
    if stated:
        lines.append(f"Joules per token from telemetry not measured: {escape('; '.join(stated))}.")
    return "\n".join(lines)
