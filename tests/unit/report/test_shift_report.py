"""The report of a shift study: what is drawn and stated is what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from thermoe.report import build_report, summary_table
from thermoe.report.run_data import RunData
from thermoe.report.shift import batch_losses, gaps_of, shift_rows, smoothed
from thermoe.results import RunFolder

SEGMENTS = ("prose-1", "python")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    run = RunFolder.create(tmp_path / "study")
    run.write_manifest(
        type="shift", orders=["segments", "interleaved"], finished=True, config={"seeds": 2},
        segments=[{"name": name, "domain": name, "tokens": 40} for name in SEGMENTS],
        arms=[{"name": "frozen", "title": "Fro<zen>", "description": "None."}, {"name": "adapted", "title": "Adapted"}],
        cost_model={"provenance": "estimated", "reference": "a board"}, data={"prose": {"source": "a <book>"}},
        environment={"command": "thermoe compare --preset shift"},
    )  # fmt: skip
    gain = {"prose-1": 0.0, "python": -0.5}
    for seed in (0, 1):
        for arm, order in (("frozen", "segments"), ("adapted", "segments"), ("adapted", "interleaved")):
            places = [(segment, number) for segment in SEGMENTS for number in (0, 1)]
            if order == "interleaved":
                places.sort(key=lambda place: place[1])
            for at, (segment, number) in enumerate(places):
                nll = 3.0 + seed + number + (gain[segment] if arm == "adapted" else 0.0)
                run.append("batch", arm=arm, order=order, seed=seed, segment=segment, number=number, at=at, tokens=10,
                           sequence_nll=[5 * nll, 5 * nll])  # fmt: skip
    for arm, order in (("frozen", "segments"), ("adapted", "segments"), ("adapted", "interleaved")):
        gap = {name: {"value": gain.get(name, -0.25), "lo": -0.6, "hi": 0.1} for name in (*SEGMENTS, "all")}
        run.append(
            "summary", arm=arm, order=order, ppl=dict.fromkeys((*SEGMENTS, "all"), 20.5), to_frozen=gap,
            j_per_token_modelled={"value": 3.05e-5, "lo": 3e-5, "hi": 3.1e-5, "provenance": "estimated"},
            learning_frac=0.21 if arm == "adapted" else 0.0, distinct_experts=8.5, worst_window_nats=None,
            verdicts={"accepted": 3, "rejected": 1} if arm == "adapted" else {"nothing learns": 4},
        )  # fmt: skip
    run.append("verdict", arm="adapted", holds=False, text="Not as predicted: it <did> not.")
    return run.path


def test_lines_pair_each_batch_with_the_same_one_of_the_first_arm(study: Path) -> None:
    data = RunData.read(study)
    assert batch_losses(data, "frozen", "segments")["python", 1] == (3.0, 4.5), "mean of two seeds"
    assert gaps_of(data, "adapted", "segments") == ([0, 1, 2, 3], pytest.approx(smoothed([0, 0, -0.5, -0.5])))
    assert gaps_of(data, "adapted", "interleaved")[1] == pytest.approx(smoothed([0, -0.5, 0, -0.5]))
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:3] == [2.0, 2.5, 3.0]


def test_the_report_is_one_escaped_page_with_its_pictures(study: Path) -> None:
    page = build_report(study).read_text(encoding="utf-8")
    assert "Not as predicted: it &lt;did&gt; not." in page and "<did>" not in page and "<zen>" not in page
    assert "0 as predicted, 1 not as predicted, 0 left open" in page and "a &lt;book&gt;" in page
    assert "3 accepted, 1 rejected" in page and "estimated, learning inside" in page and "not measured" in page
    assert page.count("data:image/png;base64,") == 4 and "<script" not in page
    assert all((study / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("stream", "front"))


def test_the_terminal_table_fits_and_says_where_joules_come_from(study: Path) -> None:
    console = Console(width=80, record=True)
    console.print(summary_table(study))
    text = console.export_text()
    assert "interleaved" in text and "30.5" in text and "21 %" in text and "estimated" in text
    assert "\N{MINUS SIGN}22.12 %" in text, "exp(-0.25) - 1"
    assert [row["learning"] for row in shift_rows(RunData.read(study))] == ["0", "21 %", "21 %"]


def test_a_study_without_results_still_has_a_page(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "empty")
    run.write_manifest(type="shift", orders=["segments"], finished=False, arms=[{"name": "frozen", "title": "Frozen"}])
    page = build_report(run.path).read_text(encoding="utf-8")
    assert "unfinished" in page and "No arm has been summed up yet" in page and "data:image" not in page
