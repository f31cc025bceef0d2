"""The charts of a report: perplexity, its front against energy, expert load and routing accuracy."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from thermoe.report.run_data import RunData, entry, number, weighted_mean
from thermoe.report.style import WIDTH_IN, Theme, arm_style
from thermoe.report.wording import bounds_of, plain, shared_decimals

#: A heat map with more rows than this is no longer read cell by cell.
_MAX_HEAT_ARMS = 8


def _error_bounds(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """Interval as matplotlib takes it: distances from the value, none of them negative."""
    return [[max(0.0, value - low)], [max(0.0, high - value)]] if low is not None and high is not None else None


def draw_perplexity(data: RunData, theme: Theme) -> Figure | None:
    """Perplexity of each arm, one panel a segment, bars from zero with their 95% intervals."""
    wanted = [*(segment.name for segment in data.segments), "all"]
    values = {
        (arm.name, name): found
        for arm in data.arms
        for name in wanted
        if number(entry(found := entry(data.summaries.get(arm.name), "ppl", name), "value")) is not None
    }
    names = [name for name in wanted if any(key[1] == name for key in values)]
    arms = [arm for arm in data.arms if any(key[0] == arm.name for key in values)]
    if not names:
        return None
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(WIDTH_IN, rows * (0.9 + 0.42 * len(arms))), layout=ConstrainedLayoutEngine(hspace=0.08))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        decimals = shared_decimals(found for key, found in values.items() if key[1] == name)
        reach = 0.0
        for place, arm in enumerate(arms):
            value, low, high = bounds_of(values.get((arm.name, name)))
            if value is None:
                continue
            color = arm_style(data, arm.name, theme).color
            axes.barh(place, value, 0.66, color=color, alpha=0.85)
            axes.errorbar(value, place, xerr=_error_bounds(value, low, high), color=theme.quiet, capsize=4, lw=2)
            end = max(value, high or value)
            axes.annotate(
                f"{value:,.{decimals}f}", (end, place), (6, 0), textcoords="offset points", va="center", fontsize=10.5
            )
            reach = max(reach, end)
        axes.set_xlim(0, reach * 1.28 or 1.0)
        axes.set_title("whole stream" if name == "all" else name)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(arms)), [_wrapped(arm.title) for arm in arms])
    figure.supxlabel("Perplexity (lower is better)", fontsize=11)
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    return figure


def _wrapped(title: str, width: int = 22) -> str:
    """Break a title into at most two lines; what is longer than that ends in an ellipsis."""
    lines = [""]
    for word in title.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    text = lines[:2]
    if len(lines) > 2:
        text[1] += " …"
    return "\n".join(line if len(line) <= width + 4 else f"{line[: width + 3]}…" for line in text)


def draw_front(data: RunData, theme: Theme) -> Figure | None:
    """Perplexity against joules per token of the cost model; the arms that no other arm beats on both are joined."""
    factor, unit = data.energy_unit
    spots = []
    for arm in data.arms:
        row = data.summaries.get(arm.name)
        joules = number(entry(row, "j_per_token_modelled", "value"))
        value, low, high = bounds_of(entry(row, "ppl", "all"))
        if joules is not None and value is not None and data.modelled_label(arm.name):
            spots.append((joules * factor, value, _error_bounds(value, low, high), arm))
    if len(spots) < 2:
        return None
    figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
    axes = figure.subplots()
    front = sorted(s[:2] for s in spots if not any(o[0] <= s[0] and o[1] <= s[1] and o[:2] != s[:2] for o in spots))
    for joules, value, bounds, arm in spots:
        style = arm_style(data, arm.name, theme)
        axes.errorbar(
            joules, value, yerr=bounds, fmt=style.marker, ms=10, color=style.color, capsize=4, lw=1.5, label=arm.title
        )
    joined = "not beaten on both"
    axes.plot(*zip(*front, strict=True), color=theme.quiet, lw=1.2, ls=(0, (4, 3)), zorder=1, label=joined)
    axes.margins(0.16)
    axes.set_xlabel(f"Energy per token from the cost model ({unit}, {data.modelled_label()}), lower is better")
    axes.set_ylabel("Perplexity, whole stream\nlower is better")
    entries = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == joined)
    figure.legend(*zip(*entries, strict=True), loc="outside lower center", ncols=2)
    return figure


def draw_loads(data: RunData, theme: Theme) -> Figure | None:
    """Heat maps of expert load, a row of panels an arm and a column a segment; 1 is an even share."""
    shares: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in data.of("load"):
        stated = row.get("load")
        load = [number(share) for share in stated] if isinstance(stated, (list, tuple)) else []
        whole = [share for share in load if share is not None]
        if whole and len(whole) == len(load) and row.get("layer") is not None:
            key = (str(row.get("arm")), str(row.get("segment")))
            shares.setdefault(key, {})[str(row.get("layer"))] = [share * len(whole) for share in whole]
    arms = [arm for arm in data.arms if any(key[0] == arm.name for key in shares)][:_MAX_HEAT_ARMS]
    known = [segment.name for segment in data.segments]
    names = [name for name in [*known, "all"] if any(key[1] == name for key in shares)]
    if not arms or not names:
        return None
    layers = max(len(maps) for maps in shares.values())
    figure = Figure(
        figsize=(WIDTH_IN, 1.1 + len(arms) * max(1.25, 0.45 + 0.22 * layers)),
        layout=ConstrainedLayoutEngine(h_pad=0.15, rect=(0, 0, 1, 0.97)),
    )
    grid = figure.subplots(len(arms), len(names), squeeze=False)
    colors = LinearSegmentedColormap.from_list("load", theme.heat)
    peak = max(share for maps in shares.values() for load in maps.values() for share in load)
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, peak))
    image = None
    for i, arm in enumerate(arms):
        for j, name in enumerate(names):
            axes = grid[i][j]
            axes.grid(visible=False)
            axes.tick_params(length=0)
            maps = shares.get((arm.name, name))
            if i == 0:
                axes.set_title(name, loc="center")
            if not maps or len({len(load) for load in maps.values()}) != 1:
                axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
                axes.set(xticks=[], yticks=[])
                continue
            image = axes.imshow(list(maps.values()), aspect="auto", cmap=colors, norm=norm, interpolation="nearest")
            experts = len(next(iter(maps.values())))
            step = max(1, math.ceil(experts / 8))
            axes.set_xticks(
                range(0, experts, step), [str(e) for e in range(0, experts, step)] if i == len(arms) - 1 else []
            )
            axes.set_yticks(range(len(maps)), list(maps) if j == 0 and len(maps) <= 16 else [])
            if i == len(arms) - 1:
                axes.set_xlabel("Expert")
            if j == 0:
                axes.set_ylabel("Layer")
        title = grid[i][0].annotate(
            arm.title,
            (0, 1),
            (0, 20 if i == 0 else 4),
            xycoords="axes fraction",
            textcoords="offset points",
            weight="bold",
        )
        title.set_in_layout(False)  # a long title would otherwise push the columns apart
    if image is None:
        return None
    bar = figure.colorbar(image, ax=grid, location="bottom", shrink=0.6, aspect=45, pad=0.02)
    ticks = [0.0, 0.5, 1.0, *(tick for tick in (max(2.0, peak),))]
    bar.set_ticks(ticks, labels=["0", "½", "1 = even share", f"{plain(ticks[-1], 2)} ×"])
    bar.set_label("Load of the expert, as a multiple of an even share")
    return figure


def draw_accuracy(data: RunData, theme: Theme) -> Figure | None:
    """Chance-corrected routing accuracy by arm: a bar over the whole stream, a mark a segment, lines at 0 and 1."""
    names = [segment.name for segment in data.segments]
    table: dict[str, tuple[float, dict[str, float]]] = {}
    order = list(dict.fromkeys([*data.accuracy_arms, *(arm.name for arm in data.arms)]))
    for arm in order:
        stated = entry(data.summaries.get(arm), "accuracy_corrected")
        parts = {}
        for name in names:
            value = number(entry(stated, name))
            value = data.accuracy(arm, "tolerant_corrected", name) if value is None else value
            if value is not None:
                parts[name] = value
        whole = number(entry(stated, "all"))
        whole = data.accuracy(arm, "tolerant_corrected") if whole is None else whole
        whole = weighted_mean((value, 1.0) for value in parts.values()) if whole is None else whole
        if whole is not None:
            table[arm] = (whole, parts)
    if not table:
        return None
    figure = Figure(figsize=(WIDTH_IN, 1.7 + 0.42 * len(table)), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for place, (arm, (whole, parts)) in enumerate(table.items()):
        axes.barh(place, whole, 0.6, color=arm_style(data, arm, theme).color, alpha=0.9)
        for i, name in enumerate(names):
            if name in parts:
                # one above the other, so that equal values do not hide each other
                height = place + 0.36 * ((i + 0.5) / len(names) - 0.5)
                label = None if name in labelled else name
                labelled.add(name)
                look: dict[str, Any] = {"ms": 6, "mfc": theme.background, "mec": theme.ink, "label": label}
                axes.plot(parts[name], height, "o^DsvP"[i % 6], **look)
    for value, text in ((0.0, "random = 0"), (1.0, "oracle = 1")):
        axes.axvline(value, color=theme.ink, lw=1.3, ls=":")
        axes.text(value, 1.01, text, transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=theme.quiet)
    every = [value for whole, parts in table.values() for value in (whole, *parts.values())]
    axes.set_xlim(min(-0.08, min(every) * 1.1), max(1.08, max(every) * 1.05))
    axes.set_yticks(range(len(table)), [_wrapped(data.title_of(arm)) for arm in table])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("Routing accuracy, corrected for chance (share of decisions, higher is better)")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
