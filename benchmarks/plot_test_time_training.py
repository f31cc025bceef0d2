"""Draw the results of test_time_training.py: python benchmarks/plot_test_time_training.py FOLDER ...

ppl.png: perplexity per segment. running.png: adapted minus frozen over the stream. front.png: perplexity against
measured joules per token, learning inside, with and without adaptation. grid.png: gain against the worst stretch of
each setting. A picture whose rows are not there is not drawn, and said so. Policies may be spread over several folders.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shifting_text import ORDERS, SEGMENTS, TRAINED_ON
from stream_scores import NEVER_WORSE, WINDOW

from thermoe.results import RunFolder

POLICIES = {
    "all": ("all experts", "k"),
    "half": ("half of the distinct experts", "tab:blue"),
    "quarter": ("a quarter", "tab:green"),
    "quarter-of-layer": ("a quarter of the layer's", "tab:purple"),
    "oea1": ("OEA k0=1", "tab:orange"),
}
LEARNERS = {
    "frozen": ("frozen", "s", "-"),
    "adapted": ("routers adapted", "o", "--"),
    "all_weights": ("all weights adapted", "^", ":"),
}
Rows = list[dict[str, Any]]


def draw_perplexity(rows: Rows) -> Figure:
    """Change of perplexity to frozen with all experts, by segment, one panel per order; bars are 95 % intervals."""
    orders = [order for order in ORDERS if any(row["order"] == order and row["learner"] != "frozen" for row in rows)]
    figure, panels = plt.subplots(1, len(orders), figsize=(7.5 * len(orders), 4.6), squeeze=False, sharey=True)
    for axes, order in zip(panels[0], orders, strict=True):
        arms = [(p, w) for p in POLICIES for w in LEARNERS if any((r["policy"], r["learner"]) == (p, w) for r in rows)]
        for at, (policy, learner) in enumerate(arms):
            own = {
                row["segment"]: row["to_all_frozen"]
                for row in rows
                if (row["policy"], row["learner"]) == (policy, learner)
                and row["order"] == (ORDERS[0] if learner == "frozen" else order)
            }
            x = np.arange(len(SEGMENTS)) + 0.8 * (at / max(1, len(arms) - 1) - 0.5)
            mean, low, high = (np.array([100 * math.expm1(own[s][i]) for s, _ in SEGMENTS]) for i in range(3))
            label, colour = POLICIES[policy]
            words, marker, _ = LEARNERS[learner]
            axes.errorbar(
                x, mean, yerr=[mean - low, high - mean], color=colour, marker=marker, linestyle="none", markersize=5,
                label=f"{label}, {words}", markerfacecolor="white" if learner == "frozen" else colour,
            )  # fmt: skip
        for edge in range(1, len(SEGMENTS)):
            axes.axvline(edge - 0.5, color="0.85", linewidth=0.8)
        axes.axhline(0, color="k", linewidth=0.6)
        axes.set(title=order, xticks=range(len(SEGMENTS)), xticklabels=[name for name, _ in SEGMENTS])
    panels[0][0].set_ylabel("perplexity against frozen with all experts, %")
    _legend_below(figure)
    return figure


def draw_running(rows: Rows) -> Figure:
    """Mean difference to frozen over the last batches, in the order read; linear near 0, logarithmic beyond."""
    own = [row for row in rows if row["learner"] != "frozen"]
    orders = [order for order in ORDERS if any(row["order"] == order for row in own)]
    figure, panels = plt.subplots(1, len(orders), figsize=(7.5 * len(orders), 4.6), squeeze=False, sharey=True)
    for axes, order in zip(panels[0], orders, strict=True):
        for row in (row for row in own if row["order"] == order):
            sums = np.concatenate([[0.0], np.cumsum(row["difference"])])
            ends = np.arange(1, len(sums))
            starts = np.maximum(0, ends - WINDOW)
            label, colour = POLICIES[row["policy"]]
            words, _, line = LEARNERS[row["learner"]]
            axes.plot(
                ends, (sums[ends] - sums[starts]) / (ends - starts), line, color=colour, label=f"{label}, {words}"
            )
            if order == ORDERS[0] and len(row["difference"]) % len(SEGMENTS) == 0:
                _name_segments(axes, len(row["difference"]) // len(SEGMENTS))
        axes.axhline(0, color="k", linewidth=0.6)
        axes.axhline(NEVER_WORSE, color="tab:red", linewidth=0.8, linestyle=":")
        axes.set_yscale("symlog", linthresh=0.02, linscale=1.0)
        ticks = (-1, -0.3, -0.1, -0.03, -0.01, 0, 0.01, 0.03)
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set(title=order, xlabel="batches read")
    panels[0][0].set_ylabel(f"nats per token to frozen, last {WINDOW} batches")
    _legend_below(figure)
    return figure


def _name_segments(axes: Axes, width: int) -> None:
    """Write the names of the segments of so many batches along the lower edge, with lines between them."""
    if axes.texts:
        return
    for at, (name, _) in enumerate(SEGMENTS):
        axes.text((at + 0.5) * width, 0.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=7)
        if at:
            axes.axvline(at * width + 0.5, color="0.85", linewidth=0.8)


def _legend_below(figure: Figure) -> None:
    """Put one legend of all panels below them."""
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncol=4, fontsize=7, frameon=False)


def draw_front(segments: Rows, totals: Rows) -> Figure | None:
    """Perplexity against joules per decoded token; ``None`` without measured joules.

    A panel for each text that is new to the model, and one for those that it was trained on, together.
    """
    joules = {
        (r["policy"], r["learner"], r["order"]): r["decode_total_j_per_token"]
        for r in totals
        if r["decode_total_j_per_token"] is not None
    }
    if not joules:
        return None
    shifted = [(name, (name,)) for name, text in SEGMENTS if text not in TRAINED_ON]
    known = tuple(name for name, text in SEGMENTS if text in TRAINED_ON)
    parts = [*shifted, (", ".join(known), known)]
    figure, panels = plt.subplots(1, len(parts), figsize=(4.6 * len(parts), 4.6))
    for axes, (title, names) in zip(panels, parts, strict=True):
        lines: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for policy, learner, order in joules:
            own = [r for r in segments if (r["policy"], r["learner"], r["order"]) == (policy, learner, order)]
            own = [row for row in own if row["segment"] in names]
            if order == ORDERS[0] and own:
                nll = sum(row["nll"] * row["tokens"] for row in own) / sum(row["tokens"] for row in own)
                lines[learner].append((1e3 * joules[policy, learner, order], math.exp(nll), policy))
        for learner, points in lines.items():
            words, marker, line = LEARNERS[learner]
            priced = sorted(point for point in points if point[2] != "oea1")
            axes.plot(*zip(*[point[:2] for point in priced], strict=True), line, color="tab:gray", linewidth=0.8)
            for j, ppl, policy in points:
                label, colour = POLICIES[policy]
                axes.plot(
                    j, ppl, marker, color=colour, linestyle="none", label=f"{label}, {words}",
                    markerfacecolor="white" if learner == "frozen" else colour,
                )  # fmt: skip
        axes.set(title=title, xlabel="mJ per decoded token, learning inside")
    panels[0].set_ylabel("perplexity")
    _legend_below(figure)
    return figure


def draw_grid(rows: Rows) -> Figure:
    """Gain against the worst stretch of each setting."""
    figure, axes = plt.subplots(figsize=(7, 5))
    for row in rows:
        if row["worst_window_nats"] is not None:
            colour = POLICIES[row["policy"]][1] if row["learner"] == "adapted" else "tab:red"
            axes.plot(row["worst_window_nats"], row["dnll"]["all"], LEARNERS[row["learner"]][1], color=colour)
            words = " ".join(f"{name}={value}" for name, value in row["options"].items())
            axes.annotate(words, (row["worst_window_nats"], row["dnll"]["all"]), fontsize=4)
    axes.axvline(NEVER_WORSE, color="tab:red", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"worst mean of {WINDOW} batches, nats per token to frozen", ylabel="mean over the stream")
    return figure


def rows_of(folders: list[Path], kind: str) -> Rows:
    """Return the rows of a kind of all folders; of arms that several read, those of the first that measured them."""
    found: dict[Any, dict[str, Any]] = {}
    for at, folder in enumerate(folders):
        for number, row in enumerate(RunFolder.open(folder).rows(kind)):
            key = (row["policy"], row["learner"], row["order"], row.get("segment"))
            key = (at, number) if kind == "grid" else key
            if key not in found or found[key].get("provenance", "unknown") is None:
                found[key] = row
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="of runs that read the same stream with one model")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: the first)")
    args = parser.parse_args()
    rows = {kind: rows_of(args.folders, kind) for kind in ("segment", "running", "total", "grid")}
    drawn = {
        "ppl": draw_perplexity(rows["segment"]) if rows["segment"] else None,
        "running": draw_running(rows["running"]) if rows["running"] else None,
        "front": draw_front(rows["segment"], rows["total"]) if rows["total"] else None,
        "grid": draw_grid(rows["grid"]) if rows["grid"] else None,
    }
    for name, figure in drawn.items():
        if figure is None:
            print(f"{name}.png is not drawn: its rows are not in {', '.join(map(str, args.folders))}")
        else:
            figure.set_layout_engine("constrained")
            figure.savefig((args.out or args.folders[0]) / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
