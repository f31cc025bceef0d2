"""The report of one training, and learning curves of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thermoe.errors import RunFolderError
from thermoe.report.html import build_report
from thermoe.report.learning import read_trainings, write_learning_report
from thermoe.report.run_data import RunData
from thermoe.report.training import alarms_of, training_rows


def training(folder: Path, *, seed: int = 0, lr: float = 1e-3, energy_j: float | None = None, **more: Any) -> Path:
    """Write the folder that a training of two layers and four experts leaves."""
    folder.mkdir()
    config = {"seed": seed, "model": {"block": "moe"}, "router": {"name": None}, "training": {"lr": lr, "balance": {}}}
    manifest = {"schema_version": 1, "type": "training", "command": "train", "finished": True, "config": config, **more}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows: list[dict[str, Any]] = []
    for step in range(0, 50, 10):
        nll = 5.0 - 0.05 * step + 0.01 * seed
        rows.append({"kind": "eval", "step": step, "tokens": 100 * step, "nll": nll, "ppl": 1.0, "bits_per_byte": nll})
        rows.append({"kind": "train", "step": step, "tokens": 100 * step, "loss": nll, "lr": lr})
        for layer in range(2):
            part = {"effective_experts": 3.0 - layer, "max_vio": 0.5, "dead_experts": None if step < 40 else layer}
            rows.append({"kind": "load", "step": step, "layer": layer, "load": [0.4, 0.3, 0.2, 0.1], **part})
    rows.append({"kind": "alarm", "step": 30, "alarm": "collapse", "layer": "h.1", "text": "h.1: <b>few</b> experts"})
    energy = {"energy_j": energy_j, "energy_provenance": energy_j and "measured", "energy_reason": "no sensor"}
    judged = {"converged": False, "text": "not converged (improving): so much"}
    rows.append({"kind": "summary", "ppl": 12.5, "tokens": 4000, "tokens_per_s": 9.0, "convergence": judged, **energy})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_has_the_end_the_alarms_and_the_pictures(tmp_path: Path) -> None:
    page = build_report(training(tmp_path / "run")).read_text(encoding="utf-8")
    for text in (
        "12.50",
        "4,000",
        "not measured (no sensor)",
        "not converged (improving)",
        "step 30: h.1: &lt;b&gt;few",
    ):
        assert text in page, text
    assert page.count("data:image/png") >= 4 and "<script" not in page
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} >= {"balance.png", "load_history.png"}


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    rows = dict(training_rows(RunData.read(training(tmp_path / "a", energy_j=7.0))))
    assert rows["Energy (J)"] == "7 (measured)" and rows["Bits per byte"] == "not measured"
    assert alarms_of(RunData.read(tmp_path / "a")) == ["step 30: h.1: <b>few</b> experts"]


def test_seeds_are_averaged_and_other_settings_are_not(tmp_path: Path) -> None:
    folders = [training(tmp_path / f"s{seed}", seed=seed) for seed in range(3)]
    folders.append(training(tmp_path / "other", lr=2e-3))
    (arms,) = read_trainings(folders).values()
    assert [len(arm.curves) for arm in arms.values()] == [3, 1]
    first = next(iter(arms.values()))
    assert first.ends["dead_experts"] == [1.0, 1.0, 1.0] and first.ends["effective_experts"] == [2.0, 2.0, 2.0]
    text = write_learning_report(folders, tmp_path / "out").read_text(encoding="utf-8")
    assert "| moe, topk | 3 |" in text and (tmp_path / "out" / "learning-bits_per_byte.png").is_file()


def test_a_folder_that_is_no_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no run of a single training"):
        read_trainings([training(tmp_path / "run", type="study")])
