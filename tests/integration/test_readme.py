"""What the README says runs, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import command
from transformers import GPT2Config, GPT2LMHeadModel

from thermoe.data import train_tokenizer

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _save_as_distilgpt2(folder: Path) -> None:
    """Write a checkpoint in DistilGPT2's format, small and random, where its hub name is a path."""
    tokenizer = train_tokenizer([(ROOT / "README.md").read_text(encoding="utf-8")], 400)
    tokenizer.save_pretrained(folder)
    sizes = {"n_layer": 6, "n_embd": 48, "n_head": 4, "vocab_size": len(tokenizer)}
    end = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **end)).save_pretrained(folder)


def test_the_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    _save_as_distilgpt2(tmp_path / "distilbert" / "distilgpt2")
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "my-moe" / "config.json").is_file()


def test_the_conversion_command_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save_as_distilgpt2(tmp_path / "distilbert" / "distilgpt2")
    (line,) = re.findall(r"`thermoe (convert distilbert/distilgpt2 [^`]+)`", README)
    done = command(*line.split())
    assert done.code == 0, done.err
    assert {"config.json", "README.md", "tokenizer.json"} <= {p.name for p in (tmp_path / "distilgpt2-moe").iterdir()}


def test_its_commands_and_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    import thermoe

    for name in re.findall(r"from thermoe import (.+)", README):
        for public in name.split(","):
            assert hasattr(thermoe, public.strip())


def test_its_links_point_at_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
