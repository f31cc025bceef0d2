from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from thermoe.errors import RunFolderError
from thermoe.report import summary_table
from thermoe.results import RunFolder


def printed(run: Path, width: int) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(summary_table(run, width=width))
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 116, 140])
def test_the_table_fits_its_width_and_names_arms_and_provenance(make_run, width: int) -> None:
    text = printed(make_run(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    last = ["second", "2,412"] if width == 140 else ["accuracy", "0.30"]
    assert all(any(line.rstrip().endswith(word) for line in text.splitlines()) for word in last)  # nothing cut off
    for words in ("capacity", "learning", "105.6", "41.0", "estimated", "RAPL counters are not readable"):
        assert words in text
    assert "None" not in text
    assert "nan" not in text


def test_segments_appear_where_there_is_room(make_run) -> None:
    run = make_run()
    assert "prose-1" in printed(run, 140)
    assert "prose-1" not in printed(run, 80)


def test_an_unfinished_empty_run_prints(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "bare")
    run.write_manifest()
    assert "unfinished" in printed(run.path, 100)


def test_simulated_is_named_in_the_title(make_run) -> None:
    text = printed(
        make_run(measured={"value": 4e-5, "provenance": "simulated"}, arms=[{"name": "dense", "title": "[x]"}]), 100
    )
    assert "simulated energy readings" in text
    assert "[x]" in text


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        summary_table(tmp_path)


def test_the_ends_of_the_accuracy_scale_stand_below_the_arms(make_run) -> None:
    run = make_run()
    folder = RunFolder.open(run)
    folder.append("summary", arm="random", title="Random routing", accuracy_corrected={"all": -0.002})
    folder.append("summary", arm="oracle", title="Best possible routing (oracle)", accuracy_corrected={"all": 1.0})
    lines = printed(run, 140).splitlines()
    assert any("Random routing" in line and "0.0020" in line for line in lines)
    assert any("Best possible" in line and "1.0" in line for line in lines)
