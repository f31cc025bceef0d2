"""The model card says what a saved model is, and nothing about the machine it was made on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from thermoe.models.card import describe_exactness, describe_layers, method_by_shape, model_card, task_of, write_card
from thermoe.models.classes import MoEGPT2Config
from thermoe.testing import tiny_moe


@pytest.mark.parametrize(("layers", "text"), [([], ""), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 2, 5, 6, 7], "0, 2, 5-7")])
def test_positions_in_short(layers: list[int], text: str) -> None:
    assert describe_layers(layers) == text


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("MoEGPT2LMHeadModel", "AutoModelForCausalLM"),
        ("MoELlamaForCausalLM", "AutoModelForCausalLM"),
        ("MoEBertForMaskedLM", "AutoModelForMaskedLM"),
        ("MoEBertForTokenClassification", "AutoModelForTokenClassification"),
        ("MoEBertModel", "AutoModel"),
    ],
)
def test_the_auto_class_that_loads(name: str, auto: str) -> None:
    assert task_of(name)[0] == auto


@pytest.mark.parametrize(
    ("experts", "width", "method"), [(4, 16, "partition"), (4, 64, "copy"), (4, 32, "virtual"), (4, 24, None)]
)
def test_the_method_shows_in_the_width(experts: int, width: int, method: str | None) -> None:
    config = MoEGPT2Config(n_embd=16, n_layer=1, n_head=2, num_experts=experts, expert_intermediate_size=width)
    assert method_by_shape(config) == method


def test_exactness_in_words() -> None:
    text = describe_exactness({"max_abs_diff": 2e-6, "logit_kl": 3e-11}, experts="8 of 8 experts", compared="64 tokens")
    assert "logits" in text and "2.0e-06" in text and "3.0e-11 nats" in text and "64 tokens" in text
    assert "hidden states" in describe_exactness({"max_abs_diff": 2e-6}, experts="all", compared="1 token")


def _front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_card_of_a_model_from_the_hub() -> None:
    model = tiny_moe(top_k=3, router="priced", price=0.25, pair_cost=[1.0] * 8)
    model.config._name_or_path = "some-lab/small-gpt"
    model.config.routers = {"0": {"name": "priced", "top_k": 3, "options": {"price": 0.25, "pair_cost": [1.0] * 8}}}
    text = model_card(model, exactness="with 8 of 8 experts the logits agree")
    assert _front(text)["base_model"] == "some-lab/small-gpt"
    assert _front(text)["pipeline_tag"] == "text-generation"
    assert {"thermoe", "mixture-of-experts"} <= set(_front(text)["tags"])
    for part in ("`some-lab/small-gpt`", "`partition`", "8 per layer", "layers 0: `priced`, 3 of 8", "price=0.25"):
        assert part in text, part
    assert "pair_cost=8 values" in text and "the logits agree" in text
    assert "import thermoe" in text and "AutoModelForCausalLM.from_pretrained" in text


def test_a_folder_is_named_without_its_path(tmp_path: Path) -> None:
    model = tiny_moe()
    model.config._name_or_path = str(tmp_path)
    text = model_card(model)
    assert str(tmp_path.parent) not in text and tmp_path.name in text
    assert "base_model" not in _front(text)


def test_saving_writes_a_card_and_keeps_one(tmp_path: Path) -> None:
    model = tiny_moe()
    model.save_pretrained(tmp_path)
    assert "# MoEGPT2LMHeadModel" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text("my own words", encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert write_card(tmp_path, model).read_text(encoding="utf-8") == "my own words"


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    tiny_moe().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()
