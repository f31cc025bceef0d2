"""A run that was cut short, wherever, goes on to the same results as one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Done, command
from run_rows import assert_same_results

from thermoe.compare import runner, stages
from thermoe.results import RunFolder


def demo(folder: Path, *more: str) -> Done:
    return command("demo", "--preset", "smoke", "--device", "cpu", "--telemetry", "off", "--out", str(folder), *more)


def interrupt_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """Return ``function`` that is interrupted when it is called for the ``number``-th time."""
    calls = 0

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return cut


def test_a_run_cut_short_three_times_ends_like_one_that_was_not(
    smoke: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    train = stages.train_language_model

    def until_step_17(*args: Any, on_step: Callable[[int], None], **kwargs: Any) -> None:
        def stop(step: int) -> None:
            if step == 17:
                raise KeyboardInterrupt
            on_step(step)

        train(*args, on_step=stop, **kwargs)

    with monkeypatch.context() as patch:  # in dense training, behind a checkpoint at 10 and a row at 15
        patch.setattr(stages, "train_language_model", until_step_17)
        done = demo(folder)
    assert done.code == 130
    assert "--resume" in done.err
    assert (folder / "checkpoints" / "dense" / "checkpoint-10").is_dir()
    assert demo(folder).code == 2

    with monkeypatch.context() as patch:  # in the third arm, behind its first segment
        patch.setattr(runner, "_score_batch", interrupt_call(runner._score_batch, 2 * 9 + 5))
        assert demo(folder, "--resume").code == 130
    run = RunFolder.open(folder)
    assert {row["arm"] for row in run.rows("score")} == {"dense", "baseline", "priced"}
    assert [row["arm"] for row in run.rows("arm_done")] == ["dense", "baseline"]
    assert run.manifest["finished"] is False
    assert command("report", str(folder)).code == 0  # what there is can be looked at
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write('{"kind": "score", "arm": "priced", "segm')  # the process died while it wrote

    with monkeypatch.context() as patch:  # after all arms
        patch.setattr(runner, "summarise", interrupt_call(runner.summarise, 1))
        assert demo(folder, "--resume").code == 130

    assert demo(folder, "--resume").code == 0
    assert_same_results(run, smoke)
    assert run.manifest["finished"] is True
    assert not (folder / "checkpoints").exists()


def test_recovery_training_that_diverges_can_be_told_from_a_mistake(tmp_path: Path) -> None:
    """Exit code 3, the dense model is kept, and --resume does not take other settings."""
    folder = tmp_path / "run"
    done = demo(folder, "--set", "recovery.lr=1e38")
    assert done.code == 3
    for word in ("not finite", "where: ", "accepted: ", "fix: "):
        assert word in done.err
    assert (folder / "dense" / "model.safetensors").is_file()
    assert not (folder / "moe").exists()
    assert demo(folder, "--resume").code == 2


def test_a_folder_of_something_else_is_no_run_to_resume(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    done = demo(tmp_path, "--resume")
    assert done.code == 2
    assert "thesis.tex" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("manifest", ["{}", "[]", "not json", '{"config": 5}', '{"config": {"seed": 0}}'])
def test_a_manifest_that_is_not_one_is_refused(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "rows.jsonl").write_text("")
    done = demo(tmp_path, "--resume")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert (tmp_path / "manifest.json").read_text() == manifest


def test_a_run_interrupted_before_its_first_stage_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runner, "prepare_corpus", interrupt_call(runner.prepare_corpus, 1))
        assert demo(tmp_path / "run").code == 130
    with monkeypatch.context() as patch:
        patch.setattr(runner, "prepare_dense", interrupt_call(runner.prepare_dense, 1))
        assert demo(tmp_path / "run", "--resume").code == 130
    assert (tmp_path / "run" / "tokenizer").is_dir()
