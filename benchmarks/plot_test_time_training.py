"""Draw the results of test_time_training.py: python benchmarks/plot_test_time_training.py FOLDER.

ppl.png: perplexity per segment. running.png: adapted minus frozen over the stream. front.png: perplexity against
measured joules per token, learning inside, with and without adaptation. grid.png: gain against the worst stretch of
each setting. A picture whose rows are not there is not drawn, and said so.
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
from matplotlib.figure import Figure
from shifting_text import ORDERS, SEGMENTS
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
    figure, panels = plt.subplots(1, len(orders), figsize=(7.5 * len(orders), 4), squeeze=False, sharey=True)
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
        axes.axhline(0, color="k", linewidth=0.6)
        axes.set(title=order, xticks=range(len(SEGMENTS)), xticklabels=[name for name, _ in SEGMENTS])
    panels[0][0].set_ylabel("perplexity against frozen with all experts, %")
    panels[0][0].legend(fontsize=6)
    return figure


def draw_running(rows: Rows) -> Figure:
    """Mean difference to frozen over the last batches, in the order read."""
    own = [row for row in rows if row["learner"] != "frozen"]
    orders = [order for order in ORDERS if any(row["order"] == order for row in own)]
    figure, panels = plt.subplots(1, len(orders), figsize=(7.5 * len(orders), 4), squeeze=False, sharey=True)
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
        axes.axhline(0, color="k", linewidth=0.6)
        axes.axhline(NEVER_WORSE, color="tab:red", linewidth=0.8, linestyle=":")
        axes.set(title=order, xlabel="batches read")
    panels[0][0].set_ylabel(f"nats per token to frozen, last {WINDOW} batches")
    panels[0][0].legend(fontsize=6)
    return figure


def draw_front(segments: Rows, totals: Rows) -> Figure | None:
    """Perplexity against joules per decoded token, by segment; ``None`` without measured joules."""
    joules = {(r["policy"], r["learner"], r["order"]): r["decode_total_j_per_token"] for r in totals}
    if not any(value is not None for value in joules.values()):
        return None
    figure, panels = plt.subplots(1, len(SEGMENTS), figsize=(4.2 * len(SEGMENTS), 3.8))
    for axes, (segment, _) in zip(panels, SEGMENTS, strict=True):
        lines: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        for row in segments:
            key = (row["policy"], row["learner"], row["order"])
            if row["segment"] == segment and row["order"] == ORDERS[0] and joules.get(key) is not None:
                lines[row["learner"]].append((1e3 * joules[key], float(row["ppl"]), row["policy"]))
        for learner, points in lines.items():
            words, marker, line = LEARNERS[learner]
            priced = sorted(point for point in points if point[2] != "oea1")
            axes.plot(*zip(*[point[:2] for point in priced], strict=True), line, color="tab:gray", linewidth=0.8)
            for j, ppl, policy in points:
                axes.plot(j, ppl, marker, color=POLICIES[policy][1], label=f"{POLICIES[policy][0]}, {words}")
        axes.set(title=segment, xlabel="mJ per decoded token, learning inside")
    panels[0].set_ylabel("perplexity")
    panels[-1].legend(fontsize=5)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    run = RunFolder.open(args.folder)
    rows = {kind: list(run.rows(kind)) for kind in ("segment", "running", "total", "grid")}
    drawn = {
        "ppl": draw_perplexity(rows["segment"]) if rows["segment"] else None,
        "running": draw_running(rows["running"]) if rows["running"] else None,
        "front": draw_front(rows["segment"], rows["total"]) if rows["total"] else None,
        "grid": draw_grid(rows["grid"]) if rows["grid"] else None,
    }
    for name, figure in drawn.items():
        if figure is None:
            print(f"{name}.png is not drawn: its rows are not in {args.folder}")
        else:
            figure.tight_layout()
            figure.savefig(args.folder / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
