"""Every figure of a report, drawn for light and dark pages; a figure without data is left out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from thermoe.report.balance import (
    balance_history_figure,
    draw_balance_history,
    draw_load_history,
    load_history_figure,
)
from thermoe.report.charts import draw_accuracy, draw_front, draw_loads, draw_perplexity
from thermoe.report.curves import draw_stream, draw_training
from thermoe.report.run_data import Row, RunData
from thermoe.report.style import DARK, DOTS_PER_INCH, LIGHT, Theme

Draw = Callable[[RunData, Theme], Figure | None]
#: Name of the file, what to draw, and whether readings of energy can have had a part in what it shows.
FIGURES: tuple[tuple[str, Draw, bool], ...] = (
    ("stream", draw_stream, True),
    ("perplexity", draw_perplexity, True),
    ("front", draw_front, True),
    ("loads", draw_loads, True),
    ("accuracy", draw_accuracy, True),
    ("training", draw_training, False),
    ("balance", draw_balance_history, False),
    ("load_history", draw_load_history, False),
)


@dataclass(frozen=True, slots=True)
class RenderedFigure:
    """A figure as PNG in both schemes, with its size in pixels."""

    name: str
    light: bytes
    dark: bytes
    width: int
    height: int


def _png(figure: Figure, stamp: str, theme: Theme) -> bytes:
    if stamp:
        figure.suptitle(stamp, x=0.99, ha="right", fontsize=10, color=theme.quiet, style="italic")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a title may hold a sign the font lacks; a box is then drawn
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def render_figure(name: str, draw: Draw, data: RunData, stamp: str = "") -> list[RenderedFigure]:
    """Draw a figure in both schemes; an empty list when the run has no data for it.

    Args:
        name: of the file.
        draw: what to draw.
        data: the run.
        stamp: words at the top.
    """
    images: list[bytes] = []
    for theme in (LIGHT, DARK):
        with matplotlib.rc_context(theme.rc()):
            figure = draw(data, theme)
            if figure is None:
                return []
            images.append(_png(figure, stamp, theme))
            width, height = (round(inches * DOTS_PER_INCH) for inches in figure.get_size_inches())
    return [RenderedFigure(name, images[0], images[1], width, height)]


def render_figures(data: RunData) -> list[RenderedFigure]:
    """Draw every figure the run has data for, in both schemes."""
    rendered = []
    words = " and ".join(data.artificial_sources)
    for name, draw, carries_readings in FIGURES:
        rendered += render_figure(name, draw, data, f"{words} energy readings" if words and carries_readings else "")
    return rendered


def save_balance_figures(rows: Iterable[Row], folder: str | Path, *, theme: Theme = LIGHT) -> list[Path]:
    """Write ``balance`` and ``load_history`` of a training, each as PNG and SVG, and return the paths.

    Args:
        rows: as `CollapseMonitor.flush` returns them, with the `step` added.
        folder: made if absent.
        theme: colours.
    """
    folder, rows = Path(folder), list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context({**theme.rc(), "svg.hashsalt": "thermoe"}):
        for name, draw in (("balance", balance_history_figure), ("load_history", load_history_figure)):
            figure = draw(rows, theme)
            if figure is None:
                continue
            for kind, extra in (("png", {"dpi": DOTS_PER_INCH}), ("svg", {"metadata": {"Date": None}})):
                written.append(folder / f"{name}.{kind}")
                figure.savefig(written[-1], format=kind, **extra)
    return written
