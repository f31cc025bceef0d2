"""`thermoe train` from the outside: a whole run, runs that are cut short, recovery, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Done, command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from thermoe.moe.layer import moe_layers
from thermoe.results import RunFolder
from thermoe.training import loop
from thermoe.training import run as run_module
from thermoe.training.loop import checkpoint_step, last_checkpoint

FAST = ("--preset", "smoke", "--device", "cpu", "--telemetry", "off")
#: Random k and accumulation beside what the preset has.
HARD = (
    *("--set", "training.random_k=true", "--set", "training.gradient_accumulation_steps=2"),
    *("--set", "router.options={capacity_factor: 1.0, temperature: 0.7}"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of a few thousand words: reading and encoding the novels would take most of the time."""
    from thermoe.data import embedded_prose

    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(embedded_prose("heldout").content[:40_000])
    return file


def train(text: Path, folder: Path, *more: str, preset: tuple[str, ...] = FAST) -> Done:
    return command("train", *preset, "--set", f"data.train=[{text}]", "--out", str(folder), *more)


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Done]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = train(text, folder, *HARD)
    assert done.code == 0, done.err
    return RunFolder.open(folder), done


def results(run: RunFolder) -> list[dict[str, Any]]:
    """Return the rows without what depends on the clock or on the part of the run that was made last."""
    timed = ("wall_s", "tokens_per_s")
    return [{key: value for key, value in row.items() if key not in timed} for row in run.rows()]


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    assert results(one) == results(other)
    mine, theirs = (load_file(run.path / "model" / "model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_run_leaves_a_model_rows_and_a_manifest(whole: tuple[RunFolder, Done]) -> None:
    run, done = whole
    assert sorted(path.name for path in run.path.iterdir()) == [
        "manifest.json", "model", "plots", "report.html", "rows.jsonl", "tokenizer",
    ]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert len(list(moe_layers(model))) == 2
    assert len(AutoTokenizer.from_pretrained(run.path / "model")) == 300
    steps = [row["step"] for row in run.rows("train")]
    assert steps == [2, 4, 6, 8, 10, 12]
    row = list(run.rows("train"))[-1]
    for name in ("loss", "lm_loss", "aux_load_std_root", "aux_z_loss", "max_vio", "effective_experts", "dead_experts"):
        assert isinstance(row[name], float)
    assert row["drop_rate"] > 0
    assert [row["step"] for row in run.rows("eval")] == [0, 6, 12]
    assert all(row["bits_per_byte"] > 0 for row in run.rows("eval"))
    assert len(list(run.rows("load"))) == 6 * 2
    manifest = run.manifest
    assert manifest["finished"] is True and manifest["config"]["seed"] == 0
    assert len(manifest["data"]["train"][0]["sha256"]) == 64
    assert manifest["environment"]["versions"]["torch"]
    assert manifest["sizes"]["parameters"] > manifest["sizes"]["active_parameters"]
    for word in (
        "Perplexity",
        "Bits per byte",
        "Tokens per second",
        "Effective experts",
        "not measured",
        "report.html",
    ):
        assert word in done.out, word
    assert str(run.path / "model") in done.out


def test_joules_that_were_not_measured_are_absent_and_never_0(whole: tuple[RunFolder, Done]) -> None:
    run, _ = whole
    assert not list(run.rows("energy"))
    (summary,) = run.rows("summary")
    assert summary["energy_j"] is None and summary["energy_provenance"] is None
    assert "telemetry is off" in summary["energy_reason"]


def test_a_run_stopped_with_ctrl_c_goes_on(
    text: Path, whole: tuple[RunFolder, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    inner = run_module.train_language_model

    def until_step_7(*args: Any, on_step: Any, **kwargs: Any) -> Any:
        def stop(step: int) -> None:
            if step == 7:
                raise KeyboardInterrupt
            on_step(step)

        return inner(*args, on_step=stop, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_language_model", until_step_7)
        done = train(text, folder, *HARD)
    assert done.code == 130
    assert "--resume auto" in done.err
    assert checkpoint_step(last_checkpoint(folder / "checkpoints")) == 4
    assert train(text, folder, *HARD, "--resume", "never").code == 2
    assert train(text, folder).code == 2  # another configuration
    with (folder / "rows.jsonl").open("a") as rows:
        rows.write('{"kind": "train", "ste')  # the process died while it wrote
    again = train(text, folder, *HARD)
    assert again.code == 0, again.err
    assert "going on from step 4 of 12" in again.out
    assert_same_run(RunFolder.open(folder), whole[0])
    third = train(text, folder, *HARD)
    assert third.code == 0 and "nothing is left to train" in third.out


def test_a_run_cut_between_the_last_step_and_the_model_goes_on(
    text: Path, whole: tuple[RunFolder, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_save_model", interrupted)
        assert train(text, tmp_path / "run", *HARD).code == 130
    assert train(text, tmp_path / "run", *HARD).code == 0
    assert_same_run(RunFolder.open(tmp_path / "run"), whole[0])


def test_a_run_that_was_killed_goes_on(text: Path, tmp_path: Path) -> None:
    """SIGKILL, at whatever instruction it hits, behind the second checkpoint."""
    longer = (*HARD, "--steps", "40", "--set", "training.log_every=4")
    reference, folder = tmp_path / "whole", tmp_path / "killed"
    assert train(text, reference, *longer).code == 0
    arguments = ["train", *FAST, "--set", f"data.train=[{text}]", "--out", str(folder), *longer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "thermoe", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 90
        while checkpoint_step(last_checkpoint(folder / "checkpoints")) < 8 and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "model").exists()
    reached = checkpoint_step(last_checkpoint(folder / "checkpoints"))
    assert 8 <= reached < 40
    done = train(text, folder, *longer)
    assert done.code == 0, done.err
    assert f"going on from step {reached} of 40" in done.out
    assert_same_run(RunFolder.open(folder), RunFolder.open(reference))


def test_a_dense_model_is_converted_and_recovered(text: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    assert train(text, dense, "--set", "model.block=dense", "--set", "model.gated=false").code == 0
    assert not list(RunFolder.open(dense).rows("load"))
    small = ["training.steps=8", "training.batch_size=8", "training.log_every=4", "training.save_every=4"]
    small += ["model.sequence_length=32", "model.convert.num_experts=4", "model.convert.top_k=2"]
    small += [f"model.from_pretrained={dense / 'model'}", "training.eval_every=4", "data.heldout_sequences=8"]
    overrides = [part for one in small for part in ("--set", one)]
    preset = ("--preset", "recovery", "--device", "cpu", "--telemetry", "off")
    done = train(text, tmp_path / "moe", *overrides, preset=preset)
    assert done.code == 0, done.err
    run = RunFolder.open(tmp_path / "moe")
    errors = [row["distill_layer_mse"] for row in run.rows("train")]
    assert errors[0] > errors[-1] > 0
    assert all(row["distill_kl"] > 0 for row in run.rows("train"))
    assert [row["step"] for row in run.rows("eval")] == [0, 4, 8]
    assert run.manifest["data"]["tokenizer"]["origin"] == str(dense / "model")
    model = AutoModelForCausalLM.from_pretrained(run.path / "model")
    assert [float(layer.router.ramp) for _, layer in moe_layers(model)] == [1.0, 1.0]


def test_simulated_joules_are_logged_as_simulated(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from thermoe import EnergyCallback

    class Slow(EnergyCallback):
        """Lets real time pass, as much as a window of energy needs."""

        def __init__(self, source: Any) -> None:
            super().__init__(source, min_window_s=1.0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            time.sleep(0.15)

    monkeypatch.setattr(run_module, "EnergyCallback", Slow)
    done = train(text, tmp_path / "run", "--telemetry", "simulated")
    assert done.code == 0, done.err
    run = RunFolder.open(tmp_path / "run")
    rows = list(run.rows("energy"))
    assert rows and all(row["provenance"] == "simulated" for row in rows)
    (summary,) = run.rows("summary")
    assert summary["energy_j"] > 0 and summary["energy_provenance"] == "simulated"
    assert "(simulated" in done.out


def test_the_configuration_is_printed_and_read_again(tmp_path: Path) -> None:
    done = command("train", *FAST, "--epochs", "2", "--seed", "5", "--show-config")
    assert done.code == 0
    tree = yaml.safe_load(done.out)
    assert (tree["training"]["epochs"], tree["seed"], tree["telemetry"]) == (2.0, 5, "off")
    file = tmp_path / "mine.yaml"
    file.write_text(done.out)
    assert yaml.safe_load(command("train", "--config", str(file), "--show-config").out) == tree
    assert "gpu-convergence" in command("list", "training-presets").out


def _refused(done: Done, *words: str) -> None:
    assert done.code in (2, 3), done.out
    for word in ("error: ", "where: ", "accepted: ", "fix: ", *words):
        assert word in done.err
    assert "Traceback" not in done.err


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    little = tmp_path / "little.txt"
    little.write_text("It was a dark and stormy night. " * 40)
    _refused(train(tmp_path / "none.txt", out), "none.txt")
    _refused(train(little, out, "--set", "training.batch_size=64"), "fewer than one")
    _refused(train(text, out, "--set", "model.layer=2"), "did you mean 'model.layers'")
    _refused(train(text, out, "--resume", "always"), "auto")
    _refused(train(text, out, "--telemetry", "replay"), "needs more than its name")
    _refused(train(text, out, "--set", "router.options={capacity: 1}"), "capacity")
    _refused(train(text, out, "--set", f"model.from_pretrained={tmp_path}"), "tokenizer")
    assert not out.exists()
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    _refused(train(text, folder), "thesis.tex")
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_reporter_that_is_not_installed_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "find_spec", lambda name: None)
    for name in ("wandb", "all"):
        done = train(text, tmp_path / "run", "--report-to", name)
        assert done.code == 3
        _refused(done, "installed")
    assert not (tmp_path / "run").exists()


def test_other_texts_do_not_go_on_with_a_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_save_model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(file, tmp_path / "run").code == 130
    before = (tmp_path / "run" / "rows.jsonl").read_text()
    file.write_text(text.read_text().replace("the", "teh"))
    _refused(train(file, tmp_path / "run"), "no longer those")
    assert (tmp_path / "run" / "rows.jsonl").read_text() == before


def test_a_run_that_diverges_says_what_to_do(text: Path, tmp_path: Path) -> None:
    done = train(text, tmp_path / "run", "--set", "training.lr=1e38")
    assert done.code == 3
    _refused(done, "not finite")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"] is False
    assert loop.last_checkpoint(tmp_path / "run" / "checkpoints") is None
