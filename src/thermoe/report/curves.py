"""The curves of a report: loss along the stream, and loss along training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from thermoe.report.run_data import RunData, StreamPoint, number
from thermoe.report.style import WIDTH_IN, Theme, arm_style


def smooth(values: Sequence[float], weights: Sequence[float], window: int) -> list[float]:
    """Weighted mean over the last ``window`` entries; it looks back only, as the stream was scored."""
    smoothed = []
    for i in range(len(values)):
        start = max(0, i + 1 - window)
        weight = sum(weights[start : i + 1]) or 1.0
        smoothed.append(sum(v * w for v, w in zip(values[start : i + 1], weights[start : i + 1], strict=True)) / weight)
    return smoothed


def smoothing_window(points: int) -> int:
    """Batches to average over: about a fortieth of the stream."""
    return max(1, round(points / 40))


def _stream_line(points: list[StreamPoint], losses: list[float]) -> tuple[list[float], list[float]]:
    """Positions in thousand tokens and smoothed losses; smoothing starts anew, with a gap, where the text changes."""
    window = smoothing_window(len(points))
    positions: list[float] = []
    values: list[float] = []
    seen = 0.0
    start = 0
    for i, point in enumerate(points):
        if i + 1 < len(points) and points[i + 1].segment == point.segment:
            continue
        run = points[start : i + 1]
        for batch in run:
            seen += batch.tokens
            positions.append((seen - batch.tokens / 2) / 1000)
        values.extend(smooth(losses[start : i + 1], [batch.tokens for batch in run], window))
        positions.append(math.nan)
        values.append(math.nan)
        start = i + 1
    return positions, values


def _shade_segments(axes: Any, data: RunData, points: list[StreamPoint], theme: Theme, *, label: bool) -> None:
    domains = list(dict.fromkeys(segment.domain for segment in data.segments))
    domain_of = {segment.name: segment.domain for segment in data.segments}
    seen = 0.0
    for name in dict.fromkeys(point.segment for point in points):
        length = sum(point.tokens for point in points if point.segment == name) / 1000
        domain = domain_of.get(name, name)
        place = domains.index(domain) if domain in domains else 0
        axes.axvspan(seen, seen + length, color=theme.shade[place % len(theme.shade)], lw=0, zorder=0)
        if seen:
            axes.axvline(seen, color=theme.quiet, lw=0.9)
        if label:
            middle = seen + length / 2
            axes.text(middle, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", weight="bold")
        seen += length
    axes.set_xlim(0, seen)


def draw_stream(data: RunData, theme: Theme) -> Figure | None:
    """Loss along the stream, and below it the difference from the arm that the run compares against."""
    streams = {arm.name: points for arm in data.arms if (points := data.stream(arm.name))}
    if not streams:
        return None
    base = {(p.segment, p.batch): p.nll for p in streams.get(data.baseline or "", [])}
    paired = bool(base) and len(streams) > 1
    figure = Figure(figsize=(WIDTH_IN, 6.4 if paired else 4.2), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)) if paired else [figure.subplots()]
    longest = max(streams.values(), key=len)
    for i, axes in enumerate(panels):
        _shade_segments(axes, data, longest, theme, label=i == 0)
    for name, points in streams.items():
        style = arm_style(data, name, theme)
        look = {"color": style.color, "ls": style.dash, "label": data.title_of(name)}
        panels[0].plot(*_stream_line(points, [p.nll for p in points]), **look)
        if data.seeds > 1:
            x, low = _stream_line(points, [p.low for p in points])
            panels[0].fill_between(
                x, low, _stream_line(points, [p.high for p in points])[1], color=style.color, alpha=0.15
            )
        if paired:
            both = [p for p in points if (p.segment, p.batch) in base]
            gaps = [p.nll - base[p.segment, p.batch] for p in both]
            # drawn only where every batch has its pair; else the positions along the stream would slip
            if len(both) == len(points):
                panels[1].plot(*_stream_line(points, gaps), **look)
    panels[0].set_ylabel("NLL (nats per token)\nlower is better")
    if paired:
        panels[1].set_ylabel("Difference from\nbaseline (nats per token)")
    panels[-1].set_xlabel("Tokens of the stream scored so far (thousands)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _training_tokens(rows: Sequence[Any]) -> list[float]:
    """Tokens seen at each row: as written if they grow from row to row, else summed (rows may hold each step's own)."""
    tokens = [number(row.get("tokens")) or 0.0 for row in rows]
    if all(later > earlier for earlier, later in itertools.pairwise(tokens)):
        return tokens
    return [sum(tokens[: i + 1]) for i in range(len(tokens))]


def draw_training(data: RunData, theme: Theme) -> Figure | None:
    """Training loss and held-out loss, a panel a phase, with the loss of a unigram model as the line to get under."""
    phases = []
    for phase in dict.fromkeys(str(row["phase"]) for row in data.of("train") if row.get("phase")):
        rows = [
            row for row in data.of("train") if str(row.get("phase")) == phase and number(row.get("loss")) is not None
        ]
        if len(rows) > 1:
            phases.append((phase, rows))
    if not phases:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.9), layout="constrained")
    grid = figure.subplots(1, len(phases), sharey=True, squeeze=False)
    unigram = number(data.manifest.get("unigram_ppl"))
    for axes, (phase, rows) in zip(grid[0], phases, strict=True):
        tokens = _training_tokens(rows)
        position = {row.get("step"): place / 1000 for row, place in zip(rows, tokens, strict=True)}
        losses = [number(row.get("loss")) or 0.0 for row in rows]
        line = smooth(losses, [1.0] * len(losses), smoothing_window(len(losses)))
        axes.plot([t / 1000 for t in tokens], losses, color=theme.arms[2], lw=0.8, alpha=0.4)
        axes.plot([t / 1000 for t in tokens], line, color=theme.arms[2], label="training loss")
        evals: dict[str, list[tuple[float, float]]] = {}
        for row in data.of("eval"):
            step, value = row.get("step"), number(row.get("nll"))
            if str(row.get("phase")) == phase and value is not None and number(step) is not None:
                evals.setdefault(str(row.get("split") or "held out"), []).append((_position(position, step), value))
        for i, (split, spots) in enumerate(sorted(evals.items())):
            axes.plot(
                *zip(*sorted(spots), strict=True),
                color=theme.arms[(1, 3, 4)[i % 3]],
                marker="oD^"[i % 3],
                lw=1.4,
                ls="--",
                label=f"evaluation: {split}",
            )
        if unigram is not None and unigram > 1:
            axes.axhline(math.log(unigram), color=theme.ink, ls=":", lw=1.4, label="unigram model")
        axes.set_title({"dense": "dense model", "recovery": "recovery of the MoE"}.get(phase, phase))
        axes.set_xlabel("Training tokens (thousands)")
    grid[0][0].set_ylabel("Loss (nats per token)")
    found: dict[str, Any] = {}
    for axes in grid[0]:
        found.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(3, len(found)))
    return figure


def _position(position: dict[Any, float], step: Any) -> float:
    """Thousand tokens at a step: of the nearest training row, since evaluation may fall between logged steps."""
    numbered = [key for key in position if number(key) is not None]
    return position[min(numbered, key=lambda key: abs(key - step))] if numbered else float(step)
