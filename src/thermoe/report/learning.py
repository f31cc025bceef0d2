"""Learning curves over several seeds: validation loss against tokens, mean and 95 % t band, and a table of the ends.

Curves come from run folders of single trainings (rows `eval`, `train`, `convergence`, `done`, one folder an arm and
seed) or from the rows of a study. Bands are t intervals of the mean over seeds; with one seed there is none.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from thermoe.convergence import judge_convergence, mean_interval
from thermoe.errors import ConfigError, RunFolderError
from thermoe.report.run_data import RunData, entry, listing, number, section
from thermoe.report.style import DOTS_PER_INCH, LIGHT, WIDTH_IN, Theme, style_at

METRICS = {"nll": "NLL (nats per token)", "ppl": "Perplexity", "bits_per_byte": "Bits per byte"}
HELD_OUT = "held-out text"
Curve = list[tuple[float, float]]


@dataclass(slots=True)
class ArmCurves:
    """Validation curves of one arm.

    Args:
        title: as shown.
        curves: (tokens, nats per token) of each seed.
        bytes_per_token: of the validation text, or ``None`` when unknown.
        ends: figures at the end of each seed's training by name; ``None`` where not measured.
    """

    title: str
    curves: list[Curve] = field(default_factory=list)
    bytes_per_token: float | None = None
    ends: dict[str, list[float | None]] = field(default_factory=dict)

    def note(self, **figures: Any) -> None:
        """Add one seed's figures."""
        for name, value in figures.items():
            self.ends.setdefault(name, []).append(number(value))

    def values(self, metric: str) -> list[Curve]:
        """Return the curves in another unit; empty when it cannot be computed."""
        if metric == "nll":
            return self.curves
        if metric == "ppl":
            return [[(tokens, math.exp(min(nll, 700.0))) for tokens, nll in curve] for curve in self.curves]
        if metric != "bits_per_byte":
            raise ConfigError(
                f"no metric {metric!r}", where="metric", accepted=", ".join(METRICS), fix="choose one of these"
            )
        if not self.bytes_per_token:
            return []
        scale = 1 / math.log(2) / self.bytes_per_token
        return [[(tokens, nll * scale) for tokens, nll in curve] for curve in self.curves]


def band(curves: Sequence[Curve]) -> list[tuple[float, float, float | None, float | None]]:
    """Return (tokens, mean, low, high) where all curves have a point; low and high are ``None`` with one curve."""
    if not curves:
        return []
    found = [dict(curve) for curve in curves]
    shared = sorted(set(found[0]).intersection(*found[1:]))
    return [(tokens, *mean_interval([curve[tokens] for curve in found])) for tokens in shared]


def _arm_of(data: RunData, configs: dict[str, Any]) -> str:
    """Return the name under which a training's seeds are averaged: what it states, or what its settings say."""
    stated = data.manifest.get("arm")
    if isinstance(stated, str):
        return stated
    config = section(data.manifest, "config")
    if data.manifest.get("type") != "training":
        raise RunFolderError(
            f"{data.path} is no run of a single training",
            where=str(data.path),
            accepted="run folders of `thermoe train`, or of the arms of benchmarks/convergence.py",
            fix="give such folders",
        )
    balance = entry(config, "training", "balance") or {}
    kind = [str(entry(config, "model", "block")), str(entry(config, "router", "name") or "topk"), *map(str, balance)]
    name, without_seed = ", ".join(kind), {key: value for key, value in config.items() if key != "seed"}
    # Two settings that read alike are two arms: only the seed may differ within one.
    while configs.setdefault(name, without_seed) != without_seed:
        name += "'"
    return name


def _bytes_per_token(data: RunData, split: str, rows: Sequence[Mapping[str, Any]]) -> float | None:
    stated = number(entry(data.manifest, "meta", "splits", f"valid_{split}", "bytes_per_token"))
    if stated is not None or not rows:
        return stated
    nll, bits = number(rows[-1].get("nll")), number(rows[-1].get("bits_per_byte"))
    return nll / math.log(2) / bits if nll is not None and bits else None


def _total(values: Iterable[Any]) -> float | None:
    found = [number(value) for value in values]
    return None if not found or None in found else sum(value for value in found if value is not None)


def read_trainings(folders: Iterable[str | Path]) -> dict[str, dict[str, ArmCurves]]:
    """Read run folders of single trainings: validation text -> arm -> curves, in the order given.

    Raises:
        RunFolderError: a folder holds no run, or one without an arm's name.
    """
    panels: dict[str, dict[str, ArmCurves]] = {}
    configs: dict[str, Any] = {}
    for folder in folders:
        data = RunData.read(folder)
        arm = _arm_of(data, configs)
        done = next(iter([*data.of("done"), *data.of("summary")][-1:]), {})
        layers = [part for row in data.of("train")[-1:] for part in listing(row, "layers")]
        last = data.of("load")[-1].get("step") if data.of("load") else None
        layers += [row for row in data.of("load") if row.get("step") == last]
        for split in dict.fromkeys(str(row.get("split") or HELD_OUT) for row in data.of("eval")):
            found = panels.setdefault(split, {}).setdefault(arm, ArmCurves(arm))
            rows = [row for row in data.of("eval") if str(row.get("split") or HELD_OUT) == split]
            rows = [row for row in rows if number(row.get("nll")) is not None and number(row.get("tokens")) is not None]
            found.curves.append([(float(row["tokens"]), float(row["nll"])) for row in rows])
            found.bytes_per_token = _bytes_per_token(data, split, rows)
            found.note(
                effective_experts=min((p["effective_experts"] for p in layers), default=None),
                max_vio=max((p["max_vio"] for p in layers), default=None),
                dead_experts=_total(p.get("dead_experts") for p in layers),
                tokens_per_s=done.get("tokens_per_s"),
                energy_j=done.get("energy_j"),
            )
    return panels


def draw_learning(
    panels: Mapping[str, Mapping[str, ArmCurves]], theme: Theme, *, metric: str = "nll", skip_frac: float = 0.05
) -> Figure | None:
    """Draw a panel a text or start, a line an arm, with its 95 % t band over seeds.

    Args:
        panels: title -> arm -> curves.
        theme: colours.
        metric: a key of `METRICS`.
        skip_frac: share of the tokens left out at the start, where the fall from chance would flatten all the rest.
    """
    drawn = {title: arms for title, arms in panels.items() if any(curves.values(metric) for curves in arms.values())}
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH_IN, 4.4), layout="constrained")
    grid = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, arms) in zip(grid, drawn.items(), strict=True):
        draw_bands(axes, arms, theme, metric=metric, skip_frac=skip_frac)
        axes.set_title(title)
        axes.set_xlabel("Training tokens")
    grid[0].set_ylabel(f"{METRICS[metric]}\nlower is better")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_bands(
    axes: Any,
    arms: Mapping[str, ArmCurves],
    theme: Theme,
    *,
    metric: str = "nll",
    skip_frac: float = 0.05,
    opacity: float = 0.12,
) -> None:
    """Draw the arms of one panel; ``opacity`` is that of the bands."""
    for place, curves in enumerate(arms.values()):
        points = band(curves.values(metric))
        if not points:
            continue
        points = [point for point in points if point[0] >= skip_frac * points[-1][0]]
        style = style_at(place, theme)
        x = [point[0] for point in points]
        axes.plot(x, [point[1] for point in points], color=style.color, ls=style.dash, lw=1.6, label=curves.title)
        if points[0][2] is not None:
            low, high = [point[2] for point in points], [point[3] for point in points]
            axes.fill_between(x, low, high, color=style.color, alpha=opacity, lw=0)


def learning_table(arms: Mapping[str, ArmCurves]) -> list[dict[str, Any]]:
    """Return a row an arm: final loss, perplexity and bits per byte with intervals, convergence, experts, speed.

    A figure that is missing for one seed is missing for the arm.
    """
    table = []
    for name, curves in arms.items():
        row: dict[str, Any] = {"arm": name, "title": curves.title, "seeds": len(curves.curves)}
        for metric in METRICS:
            ends = [curve[-1][1] for curve in curves.values(metric) if curve]
            row[metric] = mean_interval(ends) if ends else None
        judged = [judge_convergence([p for p in curve if p[0] > 0]) for curve in curves.curves]
        row["converged"] = sum(found.converged for found in judged)
        row["convergence"] = [found.text for found in judged]
        for figure, values in curves.ends.items():
            known = [value for value in values if value is not None]
            row[figure] = mean_interval(known) if len(known) == len(values) and known else None
        table.append(row)
    return table


def _stated(value: tuple[float, float | None, float | None] | None, digits: int = 3) -> str:
    if value is None:
        return "not measured"
    mean, low, high = value
    half = f" ± {(high - mean):,.{digits}f}" if low is not None and high is not None else ""
    return f"{mean:,.{digits}f}{half}"


def write_learning_report(folders: Iterable[str | Path], out: str | Path) -> Path:
    """Write learning.md and a PNG a metric for trainings in run folders; returns the path of learning.md.

    Raises:
        RunFolderError: a folder holds no training.
    """
    panels = read_trainings(folders)
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    lines = ["# Learning curves", ""]
    for metric in METRICS:
        with matplotlib.rc_context(LIGHT.rc()):
            figure = draw_learning(panels, LIGHT, metric=metric)
            if figure is None:
                continue
            FigureCanvasAgg(figure)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        (target / f"learning-{metric}.png").write_bytes(buffer.getvalue())
        lines += [f"![{METRICS[metric]} against training tokens](learning-{metric}.png)", ""]
    for title, arms in panels.items():
        lines += [f"## {title}", ""]
        lines += ["| Arm | seeds | NLL | perplexity | bits per byte | converged | effective experts | MaxVio | dead |"]
        lines[-1] += " tokens/s | joules |"
        lines += ["|---|" + "---:|" * 10]
        for row in learning_table(arms):
            cells = [str(row["seeds"]), _stated(row["nll"]), _stated(row["ppl"], 2), _stated(row["bits_per_byte"], 4)]
            cells.append(f"{row['converged']} of {row['seeds']}")
            cells += [_stated(row.get(name), 2) for name in ("effective_experts", "max_vio", "dead_experts")]
            cells += [_stated(row.get(name), 0) for name in ("tokens_per_s", "energy_j")]
            lines.append("| " + " | ".join([row["title"], *cells]) + " |")
        lines += ["", *(f"- {row['title']}: {text}" for row in learning_table(arms) for text in row["convergence"]), ""]
    path = target / "learning.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
