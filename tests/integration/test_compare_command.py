"""`thermoe compare`: a small study through the command line, with worker processes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Done, command

SMALL = [
    *("steps=4", "eval_every=2", "seeds=1", "batch_size=4", "sequence_length=16", "eval_rows=8", "hidden_size=16"),
    *("layers=1", "heads=2", "num_experts=4", "expert_width=8", "text_bytes=20000", "vocab_size=300"),
    "arms=[none, switch]",
]


def _refused(done: Done, *words: str) -> None:
    assert done.code == 2 and done.err.startswith("error: ") and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err


def _set(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_a_small_study_from_command_to_report(tmp_path: Path) -> None:
    out = tmp_path / "study"
    done = command("compare", "--preset", "collapse", "--out", str(out), *_set(SMALL))
    assert done.code == 0, done.err
    assert "collapsed" in done.out and "predicted" in done.out
    assert (out / "report.html").is_file() and (out / "plots" / "collapse.png").is_file()
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(row["kind"] == "trial" for row in rows) == 4
    _refused(command("compare", "--out", str(out), *_set(SMALL)), "not empty", "--resume")
    assert command("compare", "--out", str(out), "--resume", *_set(SMALL)).code == 0


SHIFT = [
    *("steps=4", "seeds=1", "workers=1", "batch_size=4", "sequence_length=16", "decoded=4", "segment_batches=2"),
    *("hidden_size=16", "layers=1", "heads=2", "num_experts=4", "top_k=2", "expert_width=8", "vocab_size=300"),
    *("prose_bytes=20000", "python_bytes=60000", "calibration_batches=1", "window=2"),
]


def test_a_small_shift_study_from_command_to_report(tmp_path: Path) -> None:
    out = tmp_path / "shift"
    done = command("compare", "--preset", "shift", "--out", str(out), *_set(SHIFT))
    assert done.code == 0, done.err
    assert "interleaved" in done.out and "predicted" in done.out and "estimated" in done.out
    assert (out / "report.html").is_file() and (out / "plots" / "front.png").is_file()
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(row["kind"] == "pass" for row in rows) == 10 and sum(row["kind"] == "batch" for row in rows) == 80
    _refused(command("compare", "--preset", "shift", "--out", str(out), *_set(SHIFT)), "not empty", "--resume")
    _refused(command("compare", "--preset", "shift", "--set", "segment_batchs=1"), "segment_batches")
    shown = command("compare", "--preset", "shift", "--show-config", "--set", "budget_frac=0.5")
    assert shown.code == 0 and "budget_frac: 0.5" in shown.out and "adapted_budget" in shown.out


def test_presets_are_listed_with_their_kind_and_unknown_ones_refused(tmp_path: Path) -> None:
    done = command("list", "presets")
    assert [line.split() for line in done.out.splitlines()] == [
        ["collapse", "study"], ["demo", "stream"], ["shift", "shift", "study"], ["smoke", "stream"],
    ]  # fmt: skip
    _refused(command("compare", "--preset", "colapse", "--out", str(tmp_path / "x")), "unknown preset 'colapse'")
    shown = command("compare", "--preset", "demo", "--show-config")
    assert shown.code == 0 and shown.out == command("demo", "--show-config").out
    assert "definitions" in command("compare", "--show-config").out
