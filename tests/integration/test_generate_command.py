"""`thermoe generate`: a folder and a prompt in, text and what it cost out, or one clear error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from thermoe.adapt.command import _View, run_generate, status_line
from thermoe.testing import tiny_gpt2, tiny_moe

WORDS = ["<pad>", "the", "quick", "brown", "fox", *(f"w{i}" for i in range(5, 97))]


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_moe(num_experts=8, top_k=3), tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=6, num_experts_per_tok=3,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return save(MixtralForCausalLM(config), tmp_path_factory.mktemp("mixtral"))


def generate(folder: Path, *args: str) -> Any:
    return command(
        "generate", str(folder), "--prompt", "the quick brown fox", "--device", "cpu", "--telemetry", "off", *args
    )


def test_text_comes_and_a_summary_ends_it(moe: Path) -> None:
    done = generate(moe, "--max-new-tokens", "20", "--batch", "4")
    assert done.code == 0, done.err
    text = done.out.split("what it took")[0].split()
    assert text[:4] == ["the", "quick", "brown", "fox"] and len(text) > 10 and set(text) <= set(WORDS)
    for part in ("budget", "none", "OFF: no budget", "decode", "76 tokens in 19 forwards", "(estimated)", "cost model"):
        assert part in done.out, part
    assert generate(moe, "--max-new-tokens", "20", "--batch", "4").out == done.out  # the seed decides
    assert generate(moe, "--max-new-tokens", "20", "--batch", "4", "--seed", "1").out != done.out


@pytest.mark.parametrize("kind", ["moe", "mixtral"])
def test_a_budget_changes_what_is_used(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    options: dict[str, Any] = {"prompt": "the quick", "max_new_tokens": 40, "device": "cpu", "telemetry": "off"}
    quiet = Console(file=io.StringIO(), width=100)
    free = run_generate(quiet, str(folder), budget={}, **options)
    held = run_generate(quiet, str(folder), budget={"j_per_token": 1e-12}, **options)
    assert free["state"] == "OFF" and free["decode/experts_per_token"] == 3
    assert held["state"] == "INFEASIBLE" and held["decode/experts_per_token"] == 1
    assert "no sensor" in held["reason"]


LONG = " ".join(f"w{5 + (7 * i) % 60}" for i in range(40))


@pytest.mark.parametrize("kind", ["moe", "mixtral"])
@pytest.mark.parametrize("budget", [{}, {"j_per_token": 1e-6}], ids=["free", "held"])
def test_the_routers_learn_from_the_prompt_first(
    kind: str, budget: dict[str, float], request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(kind))
    options: dict[str, Any] = {"prompt": LONG, "max_new_tokens": 16, "batch": 2, "device": "cpu", "telemetry": "off"}
    screen = io.StringIO()
    found = run_generate(Console(file=screen, width=160), folder, budget=budget, adapt=True, **options)
    plain = run_generate(Console(file=io.StringIO(), width=160), folder, budget=budget, **options)
    told = screen.getvalue().split("what it took")[1]
    assert "nats/token before learning, 39 tokens" in told and "  update" in told
    assert "learning" in told and "1 update" in told and "1 read" in told and "(estimated)" in told
    # The prompt is counted once, where generate reads it.
    assert found["tokens_total"] == plain["tokens_total"] == 2 * 40 + 2 * 15
    assert found["learning_updates"] == 1 and 0 < found["learning_frac"] < 1
    assert plain["learning_updates"] == 0 and plain["learning_frac"] == 0
    assert found["state"] == plain["state"]


def test_learning_from_a_prompt_on_the_command_line(moe: Path) -> None:
    done = command(
        "generate",
        str(moe),
        "--prompt",
        LONG,
        "--device",
        "cpu",
        "--telemetry",
        "off",
        "--max-new-tokens",
        "8",
        "--adapt",
    )
    assert done.code == 0, done.err
    assert "before learning" in done.out
    told = refused(
        "generate",
        str(moe),
        "--prompt",
        "fox",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        "--adapt",
        "--telemetry",
        "off",
    )
    assert "where: --adapt" in told and "nothing to learn from" in told


def test_on_a_terminal_the_numbers_stand_below_the_text(moe: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=140, height=30)
    run_generate(console, str(moe), prompt="the fox", budget={"j_per_token": 1e-6}, max_new_tokens=30, telemetry="off")
    shown = screen.getvalue()
    assert "experts open" in shown and "nats/J" in shown and "estimated" in shown and "the fox" in shown
    assert "what it took" in shown


def test_the_line_of_numbers_says_where_joules_come_from() -> None:
    base = {
        "phase": "decode", "provenance_modelled": "estimated",
        "provenance_sensors": "measured",
        "power_w": 312.4, "temp_c": 61.0, "decode/tokens": 8,
        "decode/state": "TRACKING", "decode/price": 2.5, "decode/distinct_experts": 14.25,
        "decode/experts_per_token": 6.5, "decode/j_per_token_modelled": 0.0181, "decode/j_per_token_measured": None,
        "decode/provenance": None,
    }  # fmt: skip
    expected = (
        "TRACKING | price 2.5 nats/J | 14.2 experts open, 6.50 per token | 18.1 mJ/token estimated | "
        "312 W, 61 C measured"
    )
    assert status_line(base) == expected
    told = status_line({**base, "decode/j_per_token_measured": 0.02, "decode/provenance": "measured", "power_w": None})
    assert "20 mJ/token measured | 61 C measured" in told
    assert status_line({}) == "reading the prompt"
    assert status_line({**base, "decode/j_per_token_modelled": None}) == "TRACKING | reading the prompt"


def refused(*args: str, code: int = 2) -> str:
    done = command(*args)
    assert done.code == code, done.err or done.out
    for part in ("error: ", "  where: ", "  accepted: ", "  fix: "):
        assert part in done.err
    return done.err


def test_what_cannot_be_generated_is_refused(moe: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "the fox", "--device", "cpu", "--telemetry", "off")
    assert "convert" in refused("generate", str(save(tiny_gpt2(), tmp_path / "dense")), *prompt)
    assert "no folder" in refused("generate", str(tmp_path / "absent"), *prompt)
    few = ("--max-new-tokens", "4")
    bare = tmp_path / "bare"
    tiny_moe().save_pretrained(bare)
    assert "no tokenizer" in refused("generate", str(bare), *prompt)
    assert "are to follow" in refused("generate", str(moe), *prompt, "--max-new-tokens", "5000")
    assert "are to follow" in refused("generate", str(moe), "--prompt", "", *prompt[2:])
    told = refused("generate", str(moe), *prompt, "--budget-j-per-token", "-1", *few)
    assert "mJ/token at decode" in told
    assert "power_w" in refused("generate", str(moe), *prompt, "--power-cap-w", "0", *few)
    assert "source" in refused("generate", str(moe), *prompt[:4], "--telemetry", "sensor")


def test_a_tokenizer_that_cannot_be_read_is_refused_without_an_option_of_another_command(tmp_path: Path) -> None:
    folder = save(tiny_moe(), tmp_path / "moe")
    (folder / "tokenizer.json").write_text("{")
    told = refused("generate", str(folder), "--prompt", "fox", "--device", "cpu", "--telemetry", "off")
    assert "tokenizer" in told and "--no-tokenizer" not in told


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tiny_moe(), tmp_path / "moe")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("down_proj")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told = refused("generate", str(folder), "--prompt", "fox", "--device", "cpu", "--telemetry", "off")
    assert "weight" in told


def test_a_simulated_sensor_is_never_taken_for_a_real_one(moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THERMOE_TELEMETRY", raising=False)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160, height=30)
    options: dict[str, Any] = {"prompt": "the fox", "telemetry": "simulated", "device": "cpu"}
    metrics = run_generate(console, str(moe), budget={}, max_new_tokens=12, **options)
    assert metrics["provenance_sensors"] == "simulated" and metrics["power_w"] > 50
    assert " C simulated" in screen.getvalue()
    assert "measured" not in screen.getvalue().replace("measured   │ nothing", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_what_it_took_is_told_when_interrupted(moe: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C in a long text: the interrupt goes on to the caller, and what was counted is not lost."""
    put, put_so_far = _View.put, 0

    def interrupted(view: _View, value: torch.Tensor) -> None:
        nonlocal put_so_far
        put_so_far += 1
        if put_so_far == 20:
            raise KeyboardInterrupt
        put(view, value)

    monkeypatch.setattr(_View, "put", interrupted)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=100)
    options: dict[str, Any] = {"prompt": "the fox", "max_new_tokens": 60, "device": "cpu", "telemetry": "off"}
    with pytest.raises(KeyboardInterrupt):
        run_generate(console, str(moe), budget={}, **options)
    told = screen.getvalue().split("interrupted")[1]
    assert "what it took" in told and "15 tokens in 15 forwards" in told
