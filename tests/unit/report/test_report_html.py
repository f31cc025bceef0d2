from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import ARMS, SEGMENTS, write_arm, write_manifest, write_run

from thermoe.errors import RunFolderError
from thermoe.report import build_report
from thermoe.results import RunFolder


class _Page(HTMLParser):
    """Collects the visible text, the attributes that load something, and the tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self._hidden = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden = tag == "style"
        self.tags.append(tag)
        self.loads += [
            value or "" for key, value in attrs if key in ("src", "srcset", "href", "data", "action", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def assert_no_gap_is_printed(text: str) -> None:
    found = re.search(r"\b(None|nan|NaN|inf|undefined)\b", text)
    assert found is None, text[max(0, found.start() - 80) : found.end() + 80]


def test_a_complete_run_shows_every_arm_segment_badge_and_figure(make_run) -> None:
    run = make_run()
    path = build_report(run)
    page = read(path)
    assert path == run / "report.html"
    for title, description, _, _ in ARMS.values():
        assert title in page.text
        assert description in page.text
    for segment, _, _ in SEGMENTS:
        assert segment in page.text
    for words in ("estimated", "not measured", "RAPL counters are not readable", "does not hold", "thermoe demo --out"):
        assert words in page.text
    assert "never token predictions" in page.text
    assert "4.21 million parameters" in page.text
    names = {"stream", "perplexity", "front", "loads", "accuracy", "training"}
    assert {plot.stem for plot in (run / "plots").glob("*.png")} == names
    assert page.tags.count("img") == len(names)
    assert "unfinished" not in page.text
    assert "simulated energy" not in page.text
    assert_no_gap_is_printed(page.text)


def test_the_page_loads_nothing_from_outside(make_run) -> None:
    path = build_report(make_run())
    page = read(path)
    assert page.loads
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    styles = re.findall(r"<style>.*?</style>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(styles) == 1
    assert "url(" not in styles[0]
    assert "@import" not in styles[0]


def test_an_empty_manifest_makes_a_report_of_gaps(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "bare")
    run.write_manifest()
    page = read(build_report(run.path))
    assert "unfinished" in page.text
    assert "No arm is recorded" in page.text
    assert "The command was not recorded" in page.text
    assert "img" not in page.tags
    assert_no_gap_is_printed(page.text)


def test_every_value_may_be_none_or_not_finite(make_run) -> None:
    run = RunFolder.open(make_run())
    for arm in ARMS:
        run.append(
            "summary", arm=arm, title=None, ppl={"all": {"value": float("nan"), "lo": None, "hi": None}, "code": None},
            bits_per_byte=None, accuracy_corrected=None, effective_experts=None, experts_per_token=float("inf"),
            distinct_experts=None, j_per_token_modelled=None, j_per_token_measured={"value": None}, tokens_per_s=None,
        )  # fmt: skip
    for kind in ("train", "eval", "score", "load", "accuracy", "comparison", "verdict"):
        run.append(kind)
        run.append(
            kind, arm="priced", against="baseline", segment=None, phase=None, load=[None, 1.0], tokens=None, step=None
        )
    manifest = dict.fromkeys(run.manifest)
    run.write_manifest(**{**manifest, "arms": [{"name": None}, "x", None], "telemetry": {"energy": None, "power": {}}})
    page = read(build_report(run.path))
    assert "not measured" in page.text
    assert_no_gap_is_printed(page.text)


def test_an_unfinished_run_says_so_and_shows_what_there_is(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "cut")
    write_manifest(run, finished=False)
    write_arm(run, "baseline")
    page = read(build_report(run.path))
    assert "This run is unfinished." in page.text
    assert "MoE, energy-aware + learning" in page.text
    assert "not measured" in page.text
    assert "no paired comparison" in page.text
    assert_no_gap_is_printed(page.text)


def test_labels_are_escaped(make_run) -> None:
    evil = '<script>alert("x")</script> & $\\frac{1$'
    run = RunFolder.open(make_run(arms=[{"name": "dense", "title": evil, "description": evil}], command=evil))
    run.append("verdict", text=evil, holds=True)
    html = build_report(run.path).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_simulated_readings_are_named_wherever_arms_are_shown(make_run) -> None:
    html = build_report(make_run(measured={"value": 4e-5, "provenance": "simulated"})).read_text(encoding="utf-8")
    for name in ("arms", "stream", "perplexity", "front", "loads", "accuracy"):
        start = html.index(f'<section id="{name}">')
        assert "Made with simulated energy readings" in html[start : html.index("</section>", start)], name
    assert '<span class="badge simulated">simulated</span>' in html
    assert "40.0 µJ" in html


def test_an_energy_figure_without_provenance_is_not_shown(make_run) -> None:
    page = read(build_report(make_run(measured={"value": 0.0417, "provenance": None})))
    assert "41.7" not in page.text
    assert "a value without provenance was recorded" in page.text


def test_measured_energy_is_not_denied(make_run) -> None:
    page = read(build_report(make_run(measured={"value": 4e-5, "lo": 3.9e-5, "hi": 4.1e-5, "provenance": "measured"})))
    assert "No saving in measured energy" not in page.text
    assert "[39.0, 41.0]" in page.text


def test_a_second_report_replaces_the_first(make_run) -> None:
    run = make_run()
    first = build_report(run).read_text(encoding="utf-8")
    assert build_report(str(run)).read_text(encoding="utf-8") == first
    assert not list(run.glob("*.partial"))


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="holds no run"):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_importing_the_report_imports_no_torch() -> None:
    code = (
        "import sys; import thermoe.report.html, thermoe.report.terminal; "
        "bad = [m for m in ('torch', 'transformers', 'thermoe.moe', 'thermoe.routers') if m in sys.modules]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_size_of_a_paired_sample_is_not_given_in_the_unit_of_the_loss(tmp_path: Path) -> None:
    page = build_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "96 sequences" in page
    assert "96 nats" not in page
