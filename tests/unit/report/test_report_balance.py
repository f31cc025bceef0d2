"""The pictures of balance over training, from plain rows."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure

from thermoe.report.balance import balance_history_figure, histories, load_history_figure
from thermoe.report.figures import render_figures, save_balance_figures
from thermoe.report.run_data import RunData
from thermoe.report.style import LIGHT
from thermoe.results import RunFolder


def rows(layers: int = 2, experts: int = 4, steps: int = 5, **fields: Any) -> list[dict[str, Any]]:
    """Rows of a training in which the last layer collapses onto expert 1."""
    random.seed(0)
    made = []
    for layer in range(layers):
        for step in range(steps):
            weights = [random.uniform(0.8, 1.2) for _ in range(experts)]
            if layer == layers - 1 and step >= steps // 2:
                weights = [float(e == 1) for e in range(experts)]
            load = [weight / sum(weights) for weight in weights]
            effective = math.exp(-sum(f * math.log(f) for f in load if f))
            made.append(
                {
                    "step": 10 * (step + 1), "layer": layer, "load": load, "effective_experts": effective,
                    "max_vio": max(load) * experts - 1, **fields,
                }
            )  # fmt: skip
    return made


def _meshes(figure: Figure | None) -> list[QuadMesh]:
    assert figure is not None
    return [c for axes in figure.axes if axes.get_visible() for c in axes.collections if isinstance(c, QuadMesh)]


def test_rows_are_grouped_by_series_layer_and_step() -> None:
    given = [{"step": 20, "layer": 1}, {"step": 10, "layer": 1}, {"step": 10, "layer": 1, "max_vio": 2.0}]
    given += [{"layer": 0, "segment": "code"}, {"step": 10, "layer": 0, "arm": "a"}]
    found = histories(given)
    assert list(found) == ["", "a"]
    assert list(found[""]["1"]) == [10.0, 20.0]
    assert found[""]["1"][10.0]["max_vio"] == 2.0, "the later of two rows of one step"


def test_a_heat_map_shows_each_expert_and_step_on_a_scale_around_even() -> None:
    made = rows()
    figure = load_history_figure(made, LIGHT)
    meshes = _meshes(figure)[:2]
    assert all(mesh.get_array().shape == (4, 5) for mesh in meshes)
    for layer, mesh in enumerate(meshes):
        for place, row in enumerate(row for row in made if row["layer"] == layer):
            for e, share in enumerate(row["load"]):
                if share:
                    assert mesh.get_array()[e, place] == pytest.approx(math.log2(share * 4))
    dead = meshes[1].get_array()[0, 4]
    assert tuple(meshes[1].cmap(meshes[1].norm(dead))) == tuple(meshes[1].cmap.get_under()), "a dead expert stands out"
    assert meshes[1].norm(0.0) == 0.5, "an even share is the middle of the scale"


def test_many_layers_are_thinned_out_to_the_least_even_ones() -> None:
    figure = load_history_figure(rows(layers=20), LIGHT)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]  # type: ignore[union-attr]
    assert len(titles) == 12 and "layer 19" in titles
    assert "8 layers" in figure._suptitle.get_text()  # type: ignore[union-attr]


def test_arms_stand_side_by_side() -> None:
    figure = load_history_figure(rows(arm="a") + rows(layers=1, arm="b"), LIGHT)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]  # type: ignore[union-attr]
    assert titles == ["a, layer 0", "b, layer 0", "a, layer 1"]


def test_lines_per_layer_or_a_colour_scale_or_a_band_per_arm() -> None:
    few = balance_history_figure(rows(), LIGHT)
    assert few is not None
    lines = {str(line.get_label()): line for line in few.axes[0].lines}
    assert list(lines["layer 1"].get_xdata()) == [10, 20, 30, 40, 50]
    assert lines["layer 1"].get_ydata()[-1] == pytest.approx(1)
    many = balance_history_figure(rows(layers=9), LIGHT)
    assert many is not None
    (collection,) = (c for c in many.axes[1].collections if isinstance(c, LineCollection))
    assert len(collection.get_segments()) == 9
    arms = balance_history_figure(rows(arm="a") + rows(arm="b"), LIGHT)
    assert arms is not None
    assert {str(line.get_label()) for line in arms.axes[1].lines} == {"a", "b"}
    mean = next(line for line in arms.axes[0].lines if line.get_label() == "a").get_ydata()
    last = [row["effective_experts"] for row in rows() if row["step"] == 50]
    assert mean[-1] == pytest.approx(sum(last) / 2)


@pytest.mark.parametrize(
    "given",
    [
        [],
        [{"layer": 0, "load": [0.5, 0.5]}],
        [{"step": 1, "layer": 0, "load": [0.5, None], "effective_experts": None}],
        [{"step": 1, "layer": 0, "load": "nan", "effective_experts": "nan"}],
    ],
)
def test_nothing_to_show_is_no_figure(given: list[dict[str, Any]]) -> None:
    assert load_history_figure(given, LIGHT) is None
    assert balance_history_figure(given, LIGHT) is None


def test_one_row_is_enough(tmp_path: Path) -> None:
    assert len(save_balance_figures(rows(layers=1, steps=1), tmp_path)) == 4


def test_figures_are_saved_as_png_and_svg_and_repeat(tmp_path: Path) -> None:
    written = save_balance_figures(rows(), tmp_path / "new")
    assert [path.name for path in written] == [
        "balance.png", "balance.svg", "load_history.png", "load_history.svg",
    ]  # fmt: skip
    assert all(path.stat().st_size > 1000 for path in written)
    again = save_balance_figures(rows(), tmp_path / "again")
    assert written[1].read_bytes() == again[1].read_bytes()
    assert save_balance_figures([], tmp_path / "none") == []


def test_a_training_run_shows_them_in_its_report(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_manifest()
    for row in rows():
        run.append("load", **row)
    names = {figure.name for figure in render_figures(RunData.read(run.path))}
    assert names == {"balance", "load_history"}
    from thermoe.report.html import build_report

    page = build_report(run.path).read_text(encoding="utf-8")
    assert "an expert that training has lost" in page and page.count("<h2>Training</h2>") == 1
