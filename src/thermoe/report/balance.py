"""Balance over training: the load of every expert as a heat map over steps, effective experts and overload as lines.

Both take plain rows, as `CollapseMonitor.flush` returns them with the `step` added: `step`, `layer`, `load` (shares
that sum to 1), `effective_experts`, `max_vio`, and `arm` or `phase` where there is more than one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from thermoe.report.run_data import Row, RunData, number
from thermoe.report.style import WIDTH_IN, Theme, style_at

#: Below this multiple of an even share an expert is as good as dead; the monitor says so over enough tokens.
_DEAD = 0.1
_MAX_PANELS = 12
_MAX_SERIES = 3
_MAX_LINES = 6
_ROUND = (1, 2, 2.5, 5, 10)
#: Layer name to its rows by step.
Layers = dict[str, dict[float, Row]]


def histories(rows: Iterable[Row]) -> dict[str, Layers]:
    """Group rows by series (arm or phase, or nothing), layer and step; of two at one step the last counts.

    Rows without a step, such as those of an evaluation, are passed over.
    """
    found: dict[str, Layers] = {}
    for row in rows:
        step = number(row.get("step"))
        if step is not None and row.get("layer") is not None:
            series = str(row.get("arm") or row.get("phase") or "")
            found.setdefault(series, {}).setdefault(str(row["layer"]), {})[step] = row
    return {
        series: {layer: dict(sorted(by_step.items())) for layer, by_step in layers.items()}
        for series, layers in found.items()
    }


def _loads(by_step: Mapping[float, Row]) -> dict[float, list[float]]:
    """Load of each step as multiples of an even share; a row without a whole load is passed over."""
    found: dict[float, list[float]] = {}
    for step, row in by_step.items():
        stated = row.get("load")
        load = [number(share) for share in stated] if isinstance(stated, (list, tuple)) else []
        whole = [share for share in load if share is not None]
        if whole and len(whole) == len(load):
            found[step] = [share * len(whole) for share in whole]
    sizes = {len(load) for load in found.values()}
    return found if len(sizes) == 1 else {}


def _least_even(layers: Mapping[str, Any], by_layer: Layers) -> list[str]:
    """Return the layers to show, in order: all, or those with the fewest effective experts at any step."""
    if len(layers) <= _MAX_PANELS:
        return list(layers)

    def worst(layer: str) -> float:
        values = [number(row.get("effective_experts")) for row in by_layer[layer].values()]
        return min((value for value in values if value is not None), default=math.inf)

    chosen = sorted(layers, key=worst)[:_MAX_PANELS]
    return [layer for layer in layers if layer in chosen]


def load_history_figure(rows: Iterable[Row], theme: Theme) -> Figure | None:
    """Heat maps of expert (down) by step (across), one a layer, a column for each of the last three series.

    Colour is the share of the load on a logarithmic scale around an even share; ``None`` without loads.
    """
    by_series = histories(rows)
    series = {
        name: loads
        for name, layers in by_series.items()
        if (loads := {layer: load for layer, by_step in layers.items() if (load := _loads(by_step))})
    }
    series = dict(list(series.items())[-_MAX_SERIES:])
    if not series:
        return None
    shown = {name: _least_even(loads, by_series[name]) for name, loads in series.items()}
    cells: list[list[tuple[str, str] | None]]
    if len(series) == 1:
        ((name, layers),) = shown.items()
        columns = 1 if len(layers) == 1 else 2 if len(layers) <= 4 else 3
        cells = [[(name, layer) for layer in layers[i : i + columns]] for i in range(0, len(layers), columns)]
    else:
        longest = max(len(layers) for layers in shown.values())
        cells = [
            [(name, layers[i]) if i < len(layers) else None for name, layers in shown.items()] for i in range(longest)
        ]
    width = max(len(line) for line in cells)
    experts = max(len(next(iter(load.values()))) for loads in series.values() for load in loads.values())
    height = min(2.6, max(1.15, 0.3 + 0.1 * experts))
    figure = Figure(figsize=(WIDTH_IN, 1.25 + len(cells) * (height + 0.3)), layout=ConstrainedLayoutEngine(hspace=0.06))
    grid = figure.subplots(len(cells), width, squeeze=False)
    colors = LinearSegmentedColormap.from_list("load", theme.heat).with_extremes(under=theme.ink)
    peak = max(max(share) for loads in series.values() for load in loads.values() for share in load.values())
    norm = TwoSlopeNorm(0.0, math.log2(_DEAD), max(1.0, math.log2(max(peak, 1.0))))
    image = None
    for i, line in enumerate(cells):
        for j in range(width):
            axes, cell = grid[i][j], line[j] if j < len(line) else None
            if cell is None:
                axes.set_visible(False)
                continue
            name, layer = cell
            image = _heat(axes, series[name][layer], colors, norm)
            axes.set_title(f"{name}, layer {layer}" if name and len(series) > 1 else f"layer {layer}", fontsize=10.5)
            below = any(j < len(later) and later[j] is not None for later in cells[i + 1 :])
            axes.tick_params(length=0, labelbottom=not below)
            if j == 0:
                axes.set_ylabel("Expert")
            if not below:
                axes.set_xlabel("Training step")
    hidden = sum(len(loads) for loads in series.values()) - sum(len(layers) for layers in shown.values())
    if hidden:
        text = f"{hidden} layers with a more even load are left out"
        figure.suptitle(text, x=0.99, ha="right", fontsize=9.5, color=theme.quiet)
    _add_scale(figure, image, grid, norm, theme)
    return figure


def _heat(axes: Any, loads: Mapping[float, list[float]], colors: Any, norm: Any) -> Any:
    """Draw one layer: a column per row, as wide as the steps since the row before."""
    steps = list(loads)
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    edges = [max(0.0, first) if steps[0] > 0 else first, *steps]
    experts = len(loads[steps[0]])
    floor = 2.0 ** (norm.vmin - 1)  # 0 has no logarithm; anything below the scale is drawn in the colour for that
    values = [[math.log2(max(loads[step][e], floor)) for step in steps] for e in range(experts)]
    image = axes.pcolormesh(edges, [e - 0.5 for e in range(experts + 1)], values, cmap=colors, norm=norm)
    image.set_rasterized(True)
    image.set_edgecolor("face")
    axes.set_ylim(experts - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_yticks(range(0, experts, max(1, math.ceil(experts / 8))))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_ROUND))
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _add_scale(figure: Figure, image: Any, grid: Any, norm: Any, theme: Theme) -> None:
    bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.62, aspect=45, pad=0.03, extend="min")
    ticks = [norm.vmin, -2.0, -1.0, 0.0, *(float(t) for t in range(1, math.floor(norm.vmax) + 1))]
    names = {-2.0: "¼", -1.0: "½", 0.0: "even"}
    bar.set_ticks(ticks, labels=["1/10", *(names.get(t, f"{2**t:.0f} ×") for t in ticks[1:])])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("Share of the load, as a multiple of an even share; below a tenth an expert is as good as dead")


def balance_history_figure(rows: Iterable[Row], theme: Theme) -> Figure | None:
    """Effective experts and overload (MaxVio) over steps.

    A line a layer where there is one series, by depth if they are many; else the mean over layers and a band from the
    lowest to the highest layer, a colour a series. ``None`` without such rows.
    """
    series = histories(rows)
    every = [row for layers in series.values() for by_step in layers.values() for row in by_step.values()]
    if not any(number(row.get("effective_experts")) is not None for row in every):
        return None
    sizes = {len(row["load"]) for row in every if isinstance(row.get("load"), (list, tuple)) and row["load"]}
    figure = Figure(figsize=(WIDTH_IN, 5.6), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, column in zip(panels, ("effective_experts", "max_vio"), strict=True):
        if len(series) > 1:
            for place, (name, layers) in enumerate(series.items()):
                _band(axes, layers, column, place, name, theme)
        else:
            (layers,) = series.values()
            _lines(figure, panels, axes, layers, column, theme)
    if len(sizes) == 1:
        experts = float(sizes.pop())
        _mark(panels[0], experts, "even load", theme, ":")
        _mark(panels[0], experts / 2, "half of it", theme, (0, (4, 3)))
        panels[0].set_ylim(0, experts * 1.1)
    else:
        panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(bottom=0)
    panels[1].margins(y=0.1)
    panels[0].set_ylabel("Effective experts\nhigher is better")
    panels[1].set_ylabel("Overload (MaxVio)\n0 is even")
    panels[1].set_xlabel("Training step")
    panels[1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=_ROUND))
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(handles)))
    return figure


def _column(by_step: Mapping[float, Row], column: str) -> dict[float, float]:
    return {step: value for step, row in by_step.items() if (value := number(row.get(column))) is not None}


def _mark(axes: Any, height: float, text: str, theme: Theme, dash: Any) -> None:
    axes.axhline(height, color=theme.quiet, lw=1.2, ls=dash, zorder=1)
    axes.annotate(
        text,
        (1, height),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9.5,
        color=theme.quiet,
    )


def _lines(figure: Figure, panels: Any, axes: Any, layers: Layers, column: str, theme: Theme) -> None:
    """One line a layer: told apart by name while they are few, by depth when they are many."""
    drawn = {layer: values for layer, by_step in layers.items() if (values := _column(by_step, column))}
    if len(drawn) <= _MAX_LINES:
        for place, (layer, values) in enumerate(drawn.items()):
            style = style_at(place, theme)
            look: dict[str, Any] = {"color": style.color, "ls": style.dash, "label": f"layer {layer}"}
            axes.plot(list(values), list(values.values()), marker=style.marker if len(values) == 1 else "", **look)
        return
    colors = LinearSegmentedColormap.from_list("depth", (theme.arms[2], theme.arms[1]))
    lines = LineCollection([list(values.items()) for values in drawn.values()], cmap=colors, lw=1.3, alpha=0.85)
    lines.set_array(list(range(len(drawn))))
    axes.add_collection(lines)
    axes.autoscale_view()
    if column == "effective_experts":
        bar = figure.colorbar(lines, ax=panels, shrink=0.5, aspect=25, pad=0.01)
        bar.outline.set_visible(False)
        bar.set_ticks([0, len(drawn) - 1], labels=["first", "last"])
        bar.set_label("Layer")


def _band(axes: Any, layers: Layers, column: str, place: int, name: str, theme: Theme) -> None:
    """Mean over layers, and the range from the lowest to the highest of them."""
    by_step: dict[float, list[float]] = {}
    for rows in layers.values():
        for step, value in _column(rows, column).items():
            by_step.setdefault(step, []).append(value)
    if not by_step:
        return
    steps = sorted(by_step)
    style = style_at(place, theme)
    low, high = [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps]
    axes.fill_between(steps, low, high, color=style.color, alpha=0.15, lw=0)
    means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
    axes.plot(steps, means, color=style.color, ls=style.dash, label=name or "all layers")


def draw_load_history(data: RunData, theme: Theme) -> Figure | None:
    """Return the heat maps of a run's training."""
    return load_history_figure(data.of("load"), theme)


def draw_balance_history(data: RunData, theme: Theme) -> Figure | None:
    """Return the lines of a run's training."""
    return balance_history_figure(data.of("load"), theme)
