"""`import thermoe` makes the Auto classes know our models, whatever is imported first, and loads no torch by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from thermoe import convert_to_moe

ORDERS = {
    "thermoe first": "import thermoe, sys; assert 'torch' not in sys.modules; from transformers import {names}",
    "transformers first": "from transformers import {names}; import thermoe",
    "packages only": "import transformers, thermoe; from transformers import {names}",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    convert_to_moe(GPT2LMHeadModel(config), num_experts=4, top_k=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("auto", "found"), [("AutoConfig", "MoEGPT2Config"), ("AutoModelForCausalLM", "MoEGPT2LMHeadModel")]
)
def test_auto_classes_load_what_was_saved(saved: Path, order: str, auto: str, found: str) -> None:
    code = ORDERS[order].format(names=auto) + f"; print(type({auto}.from_pretrained({str(saved)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == found, done.stderr[-2000:]


@pytest.mark.parametrize("first", ["GPT2LMHeadModel", "Trainer", "LlamaForCausalLM"])
def test_registration_waits_until_other_imports_are_done(saved: Path, first: str) -> None:
    code = (
        f"import thermoe; from transformers import {first}; from transformers import AutoModelForCausalLM as Auto; "
        f"import sys; print(type(Auto.from_pretrained({str(saved)!r})).__name__, "
        "sum(type(f).__module__ == 'thermoe.models.autoload' for f in sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "MoEGPT2LMHeadModel 0", done.stderr[-2000:]
