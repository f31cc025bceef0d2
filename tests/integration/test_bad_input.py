"""A mistake on the command line gives one clear message, the right exit code and no half-made run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import Done, command

from thermoe import __version__
from thermoe.compare import runner

SMOKE = ("demo", "--preset", "smoke", "--device", "cpu", "--telemetry", "off")


def assert_clear(done: Done, code: int, *words: str) -> None:
    """One message with its four parts, no traceback."""
    assert done.code == code, done.err
    assert done.err.startswith("error: ")
    assert done.err.count("error: ") == 1
    for part in ("\n  where: ", "\n  accepted: ", "\n  fix: ", *words):
        assert part in done.err, done.err
    assert "Traceback" not in done.err + done.out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("moe.num_expert=4", ["did you mean 'moe.num_experts'?"]),
        ("recovery.balance={z_los: 0.1}", ["unknown loss 'z_los'", "did you mean 'z_loss'?"]),
        ("arms=[dense, pricey]", ["unknown arm 'pricey'", "did you mean 'priced'?"]),
        ("moe.top_k=5", ["top_k is 5 with 4 experts"]),
        ("moe.num_experts=7", ["7 experts do not divide the 128 neurons"]),
        ("moe.num_experts", ["sets nothing"]),
        ("training.steps=soon", ["an integer"]),
        ("training.lr=-1", ["training.lr"]),
        ("model.sequence_length=1", ["model.sequence_length"]),
        ("model.heads=3", ["model.heads"]),
        ("model.vocab_size=99", ["at least 257"]),
        ("seed=-1", ["seed is -1"]),
        ("arms=[]", ["at least one arm"]),
        ("training.steps=[", ["cannot be read"]),
        ("device=cuda:7", ["CUDA_VISIBLE_DEVICES"]),
    ],
)
def test_a_bad_setting(override: str, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert_clear(command("demo", "--preset", "smoke", "--out", str(out), "--set", override), 2, *words)
    assert not out.exists()


@pytest.mark.parametrize("source", ["simulatd", "replay"])
def test_a_bad_telemetry_source(source: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command("demo", "--preset", "smoke", "--telemetry", source, "--out", str(out))
    assert_clear(done, 2, "where: telemetry", "auto")
    assert not out.exists()


def test_unknown_preset() -> None:
    assert_clear(command("demo", "--preset", "smoek"), 2, "unknown preset 'smoek'", "did you mean 'smoke'?")


def test_unknown_kind_to_list() -> None:
    assert_clear(command("list", "router"), 2, "did you mean 'routers'?")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_without_cuda(tmp_path: Path) -> None:
    done = command("demo", "--preset", "smoke", "--device", "cuda", "--out", str(tmp_path / "run"))
    assert_clear(done, 3, "the device 'cuda' is not available", "--device auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [None, b"", b" \n\t\n", b"caf\xe9 latin-1"], ids=["absent", "empty", "blank", "bytes"]
)
@pytest.mark.parametrize("key", ["data.prose", "data.code"])
def test_a_text_file_that_cannot_be_used(key: str, content: bytes | None, tmp_path: Path) -> None:
    file, out = tmp_path / "mein Text é.txt", tmp_path / "run"
    if content is not None:
        file.write_bytes(content)
    done = command(*SMOKE, "--out", str(out), "--set", f"{key}={file}")
    assert_clear(done, 2, f"where: {key}", file.name)
    assert not out.exists()


def test_a_text_too_short_leaves_the_folder_free_for_the_next_try(tmp_path: Path) -> None:
    file, out = tmp_path / "short.txt", tmp_path / "run"
    file.write_text("It was a dark and stormy night. " * 40, encoding="utf-8")
    out.mkdir()
    done = command(*SMOKE, "--out", str(out), "--set", f"data.prose={file}")
    assert_clear(done, 2, "tokens")
    assert list(out.iterdir()) == []  # the folder was there before, and is as it was


def test_a_batch_larger_than_the_text(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command(*SMOKE, "--out", str(out), "--set", "recovery.batch_size=1000000")
    assert_clear(done, 2, "where: recovery.batch_size")
    assert not out.exists()


def test_an_output_path_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert_clear(command(*SMOKE, "--out", str(file)), 2, "is a file")
    assert_clear(command(*SMOKE, "--out", str(file / "below")), 2, "cannot be made")
    assert file.read_text() == "mine"


def test_an_output_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text("")
    assert_clear(command(*SMOKE, "--out", str(tmp_path)), 2, "is not empty", "--out", "--resume")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because root may write anywhere."""

    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "run" / "manifest.json"))

    monkeypatch.setattr("thermoe.results.write_json", forbidden)
    done = command(*SMOKE, "--out", str(tmp_path / "run"))
    assert_clear(done, 3, "Permission denied", "manifest.json")


def test_a_name_that_is_too_long() -> None:
    assert_clear(command(*SMOKE, "--out", "x" * 300), 3, "name too long")


def test_report_on_a_folder_without_a_run(tmp_path: Path) -> None:
    assert_clear(command("report", str(tmp_path)), 2, "holds no run")
    assert list(tmp_path.iterdir()) == []


def test_report_on_a_run_that_has_hardly_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "prepare_corpus", cut)
    assert command(*SMOKE, "--out", str(tmp_path / "run")).code == 130
    assert command("report", str(tmp_path / "run")).code == 0


def test_usage_errors_exit_with_2() -> None:
    for args in (["nosuch"], ["demo", "--nosuch"], ["list"], ["report"]):
        assert command(*args).code == 2


def test_a_path_with_brackets_and_letters_of_any_script(tmp_path: Path) -> None:
    """Rich would take [/b] for markup; the run ends well and prints the path whole."""
    out = tmp_path / "läufe [/b] [red]日本" / 'a"b<script>'
    done = command(*SMOKE, "--set", "arms=[dense]", "--out", str(out))
    assert done.code == 0, done.err
    assert str(out / "report.html") in done.out
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        ["arms=[priced]", "moe.method=copy", "moe.num_experts=3"],
        ["arms=[adapted, priced]", "price.k_min=0", "price.value=9", "accuracy.batches=0"],
    ],
    ids=" ".join,
)
def test_unusual_comparisons_run_to_the_end(overrides: list[str], tmp_path: Path) -> None:
    """Without the baseline; copies of the whole network; a price that leaves no expert; no routing accuracy."""
    options = [part for override in overrides for part in ("--set", override)]
    done = command(*SMOKE, *options, "--out", str(tmp_path / "run"))
    assert done.code == 0, done.err


def test_help_names_the_commands_and_options() -> None:
    done = command("--help")
    assert done.code == 0
    for word in ("demo", "report", "list", "--debug", "--version"):
        assert word in done.out
    done = command("demo", "--help")
    assert done.code == 0
    for word in ("--out", "--preset", "--set", "--device", "--telemetry", "--resume", "--show-config"):
        assert word in done.out


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("routers", {"topk", "priced", "random"}),
        ("losses", {"switch", "z_loss"}),
        ("sources", {"nvml", "simulated"}),
        ("arms", {"dense", "baseline", "priced", "adapted"}),
        ("families", {"gpt2"}),
        ("presets", {"demo", "smoke"}),
    ],
)
def test_list_prints_names(kind: str, some: set[str]) -> None:
    done = command("list", kind)
    assert done.code == 0
    assert some <= set(done.out.split())


def test_show_config_prints_the_settings_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    done = command("demo", "--show-config", "--telemetry", "off", "--set", "moe.top_k=2")
    assert done.code == 0
    shown = yaml.safe_load(done.out)
    assert shown["moe"]["top_k"] == 2
    assert shown["telemetry"] == "off"
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback() -> None:
    from thermoe.errors import UnknownNameError

    with pytest.raises(UnknownNameError):
        command("--debug", "list", "router")
    assert_clear(command("list", "router"), 2)  # and only when asked for


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "thermoe", *args], capture_output=True, text=True, timeout=60, check=False
    )


def test_as_a_process_of_its_own() -> None:
    assert python("--version").stdout == f"thermoe {__version__}\n"
    bad = python("list", "router")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: unknown kind of thing to list 'router'\n  where: ")
    debug = python("--debug", "list", "router")
    assert debug.returncode != 0
    assert "Traceback (most recent call last)" in debug.stderr
