"""Draw the results of energy_router.py: python benchmarks/plot_energy_router.py FOLDER

FOLDER holds fronts, sweep, shape and loop, and fronts-batch-1 where one sequence was read by itself.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

STYLES = {
    "topk": ("top-k", "k", "s"),
    "oea": ("OEA", "tab:orange", "D"),
    "priced": ("priced, distortion", "tab:blue", "o"),
    "priced-f2": ("... favourites weigh twice", "tab:purple", "v"),
    "priced-f4": ("... four times", "tab:pink", "^"),
    "priced-f8": ("... eight times", "tab:olive", "<"),
    "priced-favourites": ("... favourites kept", "tab:cyan", "o"),
    "priced-uniform": ("... sensitivities equal", "tab:green", "^"),
    "priced-gate": ("priced, gate", "tab:gray", "v"),
}

#: Folders of the fronts. Those of batch 1 may come from a run of their own.
FRONTS = ("fronts", "fronts-batch-1")


def rows_of(folder: Path, kind: str) -> list[dict]:
    """Return the rows of one kind."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def draw(axes: Axes, rows: list[dict], x: Callable[[dict], float], y: Callable[[dict], float], error: str = "") -> None:
    """Draw a line per policy, points of equal price averaged."""
    points: dict[str, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        points[row["policy"]][row.get("price_nats", row.get("price", 0.0))].append(row)
    for policy, by_price in points.items():
        label, colour, marker = STYLES[policy]
        means = [[sum(f(r) for r in group) / len(group) for f in (x, y)] for group in by_price.values()]
        bars = [2 * group[0].get(error, 0.0) for group in by_price.values()] if error else None
        order = sorted(range(len(means)), key=lambda i: means[i][0])
        axes.errorbar(
            [means[i][0] for i in order], [means[i][1] for i in order], yerr=bars and [bars[i] for i in order],
            label=label, color=colour, marker=marker, markersize=4, linewidth=1,
        )  # fmt: skip


def draw_fronts(folder: Path, out: Path) -> None:
    """Loss against distinct experts: a row of panels per text, one panel per batch size."""
    rows = [row for name in FRONTS if (folder / name).exists() for row in rows_of(folder / name, "front")]
    texts, batches = (sorted({row[key] for row in rows}) for key in ("text", "batch"))
    size = (4.2 * len(batches), 3.6 * len(texts))
    figure, panels = plt.subplots(len(texts), len(batches), figsize=size, squeeze=False)
    for line, text in zip(panels, texts, strict=True):
        for axes, batch in zip(line, batches, strict=True):
            chosen = [r for r in rows if (r["text"], r["batch"]) == (text, batch) and r["dnll"] < 0.25]
            draw(axes, chosen, lambda r: r["distinct_experts"], lambda r: r["dnll"], "dnll_se")
            title = f"{text}, {batch} sequence{'s' if batch > 1 else ''}"
            axes.set(title=title, xlabel="distinct experts per layer", ylim=(-0.004, 0.12))
        line[0].set_ylabel("nats per token above top-k")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def draw_joules(folder: Path, out: Path) -> None:
    """Measured joules: of decoding, also against the loss, of layers of OLMoE's shape, of prefill, and of the loop."""
    sweep, shape, loop = (
        rows_of(folder / n, k) for n, k in (("sweep", "sweep"), ("shape", "shape"), ("loop", "window"))
    )
    figure, panels = plt.subplots(1, 5, figsize=(20.5, 3.8))
    mj = lambda r: 1e3 * r["j_per_token"]  # noqa: E731
    draw(panels[0], [r for r in sweep if r["batch"] == 16], lambda r: r["distinct_experts"], mj)
    panels[0].set(title="trained model, decode, 16 sequences", xlabel="distinct experts per layer", ylabel="mJ/token")
    at_16 = [r for r in sweep if r["batch"] == 16]
    free = min(r["nll"] for r in at_16 if r["policy"] == "topk")
    draw(panels[1], [r for r in at_16 if r["nll"] < free + 0.13], mj, lambda r: r["nll"] - free)
    panels[1].set(title="the same, loss against joules", xlabel="mJ/token", ylabel="nats per token above top-k")
    draw(panels[2], [r for r in shape if r["batch"] == 16], lambda r: r["distinct_experts"], mj)
    panels[2].set(title="8 layers of OLMoE's shape, 16 sequences", xlabel="distinct experts per layer")
    draw(panels[3], [r for r in sweep if r["batch"] == 0 and "nll" in r], mj, lambda r: r["nll"])
    panels[3].set(title="trained model, prefill", xlabel="mJ/token", ylabel="nats per token")
    part = [r for r in loop if (r["j_per_token_measured"] or 1) < 0.03]
    start = part[0]["t_s"]
    panels[4].plot([r["t_s"] - start for r in part], [mj({"j_per_token": r["j_per_token_measured"]}) for r in part],
                   color="tab:blue", marker=".", label="each window of 2 s")  # fmt: skip
    for budget in sorted({r["budget"] for r in rows_of(folder / "loop", "lag") if r["budget"]}):
        panels[4].axhline(float(budget.split()[0]), color="tab:red", linewidth=0.8)
    panels[4].set(title="holding a budget (red)", xlabel="s", ylabel="mJ/token")
    panels[4].legend(fontsize=7)
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    draw_fronts(args.folder, args.folder / "fronts.png")
    draw_joules(args.folder, args.folder / "joules.png")


if __name__ == "__main__":
    main()
