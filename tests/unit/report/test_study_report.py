"""The report of a study, and learning curves: what is drawn and stated is what the rows say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rich.console import Console

from thermoe.errors import ConfigError, RunFolderError
from thermoe.report import build_report, summary_table
from thermoe.report.learning import (
    ArmCurves,
    band,
    draw_learning,
    learning_table,
    read_trainings,
    write_learning_report,
)
from thermoe.report.run_data import RunData
from thermoe.report.study import ranked_load, study_rows
from thermoe.report.style import LIGHT, style_at
from thermoe.results import RunFolder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    run = RunFolder.create(tmp_path / "study")
    arms = [{"name": "none", "title": "No <cure>", "description": "Nothing."}, {"name": "switch", "title": "Switch"}]
    run.write_manifest(
        type="study", starts=["balanced", "collapsed"], arms=arms, finished=True, bytes_per_token=2.0,
        config={"seeds": 2}, environment={"command": "thermoe compare"},
    )  # fmt: skip
    for arm in ("none", "switch"):
        for start in ("balanced", "collapsed"):
            for seed in (0, 1):
                for step in range(0, 101, 10):
                    winner = [0.7, 0.3] if seed else [0.3, 0.7]  # another expert wins with each seed
                    nll = 3 + math.exp(-step / 20) + 0.01 * seed
                    run.append(
                        "point", arm=arm, start=start, seed=seed, step=step, tokens=step * 8, nll=nll, load=[winner]
                    )
            value = {"value": 1.8431, "lo": 1.8, "hi": 1.8862}
            run.append(
                "summary", arm=arm, start=start, seeds=2, converged=1, convergence=["not converged: x"],
                nll=value, effective_experts=value, max_vio={"value": "nan", "lo": None, "hi": None},
            )  # fmt: skip
    run.append("verdict", arm="switch", holds=False, text="Not as predicted: it <did> not.")
    return run.path


def test_the_report_is_one_escaped_page_with_its_picture(study: Path) -> None:
    page = build_report(study).read_text(encoding="utf-8")
    assert "Not as predicted: it &lt;did&gt; not." in page and "No &lt;cure&gt;" in page and "<did>" not in page
    assert "0 as predicted, 1 not as predicted, 0 left open" in page
    assert "1.843 ± 0.043" in page and "not measured" in page and "nan" not in page.split("base64")[0]
    assert page.count("data:image/png;base64,") == 2 and "<script" not in page
    assert (study / "plots" / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_loads_are_sorted_before_they_are_averaged(study: Path) -> None:
    steps, columns = ranked_load(RunData.read(study), "none", "balanced")
    assert steps[0] == 0 and steps[-1] == 100
    assert columns[0] == pytest.approx([1.4, 0.6]), "an average by name would be 1, 1 and hide the collapse"


def test_an_unfinished_study_is_reported_as_such(study: Path) -> None:
    run = RunFolder.open(study)
    run.drop_rows(lambda row: row["kind"] in ("summary", "verdict"))
    run.write_manifest(finished=False)
    page = build_report(study).read_text(encoding="utf-8")
    assert "unfinished" in page and "No verdict was written" in page


def test_the_terminal_has_a_table(study: Path) -> None:
    console = Console(width=120, record=True, file=None)
    with console.capture() as captured:
        console.print(summary_table(study))
    text = captured.get()
    assert "collapsed" in text and "1.843 ± 0.043" in text and "1 of 2" in text
    assert len(study_rows(RunData.read(study))) == 4


def _training(path: Path, arm: str, seed: int, offset: float) -> Path:
    run = RunFolder.create(path)
    splits = {"valid_novels": {"bytes_per_token": 4.0}}
    run.write_manifest(arm=arm, settings={"seed": seed}, meta={"splits": splits})
    for step in range(21):
        nll = 3 + 4 * math.exp(-step / 2) + offset
        run.append("eval", split="novels", step=step, tokens=step * 1000, nll=nll)
    layers = [{"max_vio": 0.5, "effective_experts": 7.0, "dead_experts": 1}] * 2
    run.append("train", step=20, tokens=20000, loss=3.0, layers=layers)
    run.append("done", arm=arm, tokens_per_s=1000.0 + seed, energy_j=None)
    return run.path


def test_learning_curves_of_several_seeds(tmp_path: Path) -> None:
    folders = [_training(tmp_path / f"a{seed}", "switch", seed, offset) for seed, offset in enumerate((0.0, 0.1, 0.2))]
    folders.append(_training(tmp_path / "b", "dense", 0, 0.5))
    panels = read_trainings(folders)
    switch, dense = learning_table(panels["novels"])
    half = 4.303 * 0.1 / math.sqrt(3)
    end = 3.1 + 4 * math.exp(-10)
    assert switch["nll"] == pytest.approx((end, end - half, end + half))
    assert switch["bits_per_byte"][0] == pytest.approx(end / math.log(2) / 4)
    assert switch["ppl"][0] == pytest.approx(sum(math.exp(end + d) for d in (-0.1, 0, 0.1)) / 3)
    assert (switch["seeds"], switch["converged"]) == (3, 3)
    assert switch["dead_experts"][0] == 2 and switch["energy_j"] is None, "unknown is no zero"
    assert dense["nll"][1:] == (None, None), "one seed has no interval"
    text = write_learning_report(folders, tmp_path / "out").read_text(encoding="utf-8")
    assert "| switch | 3 | 3.100 ± 0.248 |" in text and "not measured" in text
    assert (tmp_path / "out" / "learning-bits_per_byte.png").is_file()
    figure = draw_learning(panels, LIGHT)
    assert figure is not None and len(figure.axes) == 1
    assert [line.get_label() for line in figure.axes[0].lines] == ["switch", "dense"]
    assert len(figure.axes[0].collections) == 1, "a band for the arm with several seeds alone"


def test_a_band_holds_where_all_seeds_have_a_point() -> None:
    assert band([[(0, 1.0), (1, 2.0)], [(1, 4.0), (2, 5.0)]])[0][:2] == (1, 3.0)
    assert band([]) == []
    with pytest.raises(ConfigError, match="no metric"):
        ArmCurves("x", [[(1.0, 1.0)]]).values("accuracy")
    assert draw_learning({"x": {"a": ArmCurves("a", [[(1.0, 1.0)]])}}, LIGHT, metric="bits_per_byte") is None


def test_folders_that_are_no_training_are_refused(study: Path) -> None:
    with pytest.raises(RunFolderError, match="single training"):
        read_trainings([study])


def test_eight_arms_look_different() -> None:
    looks = {(style.color, str(style.dash)) for style in (style_at(place, LIGHT) for place in range(12))}
    assert len(looks) == 12
