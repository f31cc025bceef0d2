"""A run folder survives crashes, and what was not measured stays None."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe.errors import RunFolderError
from thermoe.results import PROVENANCE_ORDER, SCHEMA_VERSION, RunFolder, weakest_provenance, write_json


def _run(path: Path) -> RunFolder:
    run = RunFolder.create(path / "run")
    run.write_manifest(seed=3)
    return run


def test_rows_come_back_in_order_and_by_kind(tmp_path: Path) -> None:
    run = _run(tmp_path)
    assert list(run.rows()) == []
    for i in range(3):
        run.append("train", step=i, loss=1.0 / (i + 1), energy_j=None)
        run.append("note", text="naïve ☃\nline")
    assert [row["step"] for row in run.rows("train")] == [0, 1, 2]
    assert [row["kind"] for row in run.rows()] == ["train", "note"] * 3
    first = next(run.rows("train"))
    assert first["energy_j"] is None and first["loss"] == 1.0
    assert next(run.rows("note"))["text"] == "naïve ☃\nline"
    assert [row["step"] for row in RunFolder.open(run.path).rows("train")] == [0, 1, 2]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON)
def test_every_value_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    run = RunFolder.create(tmp_path_factory.mktemp("run"))
    run.append("row", value=value)
    run.write_manifest(value=value)
    assert next(run.rows())["value"] == value
    assert run.manifest["value"] == value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_json_cannot_hold_become_words(tmp_path: Path, value: float) -> None:
    run = _run(tmp_path)
    run.append("row", loss=value, nested={"deep": [value]}, path=tmp_path, pair=(1, value))
    row = next(run.rows())
    assert row["loss"] == str(value) and row["nested"]["deep"] == [str(value)]
    assert row["path"] == str(tmp_path) and row["pair"] == [1, str(value)]
    json.loads((run.path / "rows.jsonl").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the file"))


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.append("row", i=0)
    with (run.path / "rows.jsonl").open("a") as stream:
        stream.write('{"kind": "row", "i"')
    assert [row["i"] for row in run.rows()] == [0]


@pytest.mark.parametrize("torn", ['{"kind": "row", "i"', '{"kind": "row", "i": 1}'])
def test_rows_after_a_crash_do_not_run_into_the_torn_one(tmp_path: Path, torn: str) -> None:
    run = _run(tmp_path)
    run.append("row", i=0)
    with (run.path / "rows.jsonl").open("a") as stream:
        stream.write(torn)
    run = RunFolder.create(run.path, resume=True)
    run.append("row", i=2)
    run.append("row", i=3)
    assert [row["i"] for row in run.rows()] == ([0, 2, 3] if torn.endswith('"') else [0, 1, 2, 3])


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    run = _run(tmp_path)
    (run.path / "rows.jsonl").write_text('{"kind": "row"}\nnonsense\n{"kind": "row"}\n')
    with pytest.raises(RunFolderError, match="line 2") as error:
        list(run.rows())
    assert error.value.where and error.value.accepted and error.value.fix


def test_rows_can_be_dropped(tmp_path: Path) -> None:
    run = _run(tmp_path)
    for i in range(4):
        run.append("row", i=i)
    run.drop_rows(lambda row: row["i"] % 2)
    assert [row["i"] for row in run.rows()] == [0, 2]
    run.append("row", i=9)
    assert [row["i"] for row in run.rows()] == [0, 2, 9]
    assert not list(run.path.glob("*.partial"))


def test_the_manifest_is_merged(tmp_path: Path) -> None:
    run = _run(tmp_path)
    run.write_manifest(device="cpu")
    run.write_manifest(seed=4)
    assert run.manifest == {"schema_version": SCHEMA_VERSION, "seed": 4, "device": "cpu"}
    assert RunFolder(tmp_path / "nothing").manifest == {}


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_an_unreadable_manifest_is_an_error(tmp_path: Path) -> None:
    run = _run(tmp_path)
    (run.path / "manifest.json").write_text('{"seed": ')
    with pytest.raises(RunFolderError, match="not readable JSON") as error:
        _ = run.manifest
    assert error.value.where and error.value.accepted and error.value.fix


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    run = _run(tmp_path)
    with pytest.raises(RunFolderError, match="not empty") as error:
        RunFolder.create(run.path)
    assert "--resume" in error.value.fix
    assert RunFolder.create(run.path, resume=True).manifest["seed"] == 3
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty")


def test_places_that_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RunFolderError, match="cannot be made"):
        RunFolder.create(tmp_path / "file" / "below")
    with pytest.raises(RunFolderError, match="holds no run") as error:
        RunFolder.open(tmp_path)
    assert error.value.where and error.value.accepted and error.value.fix


def test_a_sum_is_as_good_as_its_weakest_part() -> None:
    assert PROVENANCE_ORDER == ("simulated", "replayed", "estimated", "measured")
    assert weakest_provenance(["measured", "measured"]) == "measured"
    assert weakest_provenance(["measured", "estimated"]) == "estimated"
    assert weakest_provenance(["estimated", "simulated", "measured"]) == "simulated"
    assert weakest_provenance(["measured", None]) is None
    assert weakest_provenance([]) is None
    assert weakest_provenance(label for label in ("replayed", "measured")) == "replayed"
