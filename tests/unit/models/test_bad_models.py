"""A model or configuration that does not fit is refused in four parts, and never converted into something wrong."""

from __future__ import annotations

import copy
import json
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from thermoe import convert_to_moe
from thermoe.errors import ConfigError, ConversionError, ThermoeError
from thermoe.models.config_fields import FIELDS


@cache
def _llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ).eval()


def _four(error: ThermoeError, *words: str) -> None:
    assert error.what and error.where and error.accepted and error.fix
    for word in words:
        assert word in str(error)


def _set(path: str, value: Any) -> Any:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value() if callable(value) and not isinstance(value, type) else value)

    return change


def _low(dtype: torch.dtype) -> Any:
    return lambda: nn.Parameter(torch.zeros(64, 32).to(dtype), requires_grad=False)


def _quantised(model: Any) -> None:
    model.is_quantized = True
    model.config.quantization_config = types.SimpleNamespace(quant_method="bitsandbytes")


UNFIT: dict[str, tuple[Any, str]] = {
    "quantiser": (lambda model: setattr(model, "hf_quantizer", object()), "quantised"),
    "quantised": (_quantised, "quantised (bitsandbytes)"),
    "only said to be quantised": (
        lambda model: setattr(model.config, "quantization_config", {"quant_method": "gptq"}), "quantised (gptq)",
    ),
    "int8": (_set("model.layers.1.mlp.up_proj.weight", _low(torch.int8)), "torch.int8"),
    "float8": (_set("model.layers.1.mlp.up_proj.weight", _low(torch.float8_e4m3fn)), "float8"),
    "narrow up": (_set("model.layers.1.mlp.up_proj", lambda: nn.Linear(32, 48, bias=False)), "(48, 32)"),
    "narrow down": (_set("model.layers.1.mlp.down_proj", lambda: nn.Linear(64, 16, bias=False)), "(16, 64)"),
    "a bias more": (_set("model.layers.1.mlp.up_proj", lambda: nn.Linear(32, 64)), "biases"),
    "another network": (_set("model.layers.1.mlp", nn.Identity), "gate_proj"),
    "a part more": (_set("model.layers.1.mlp.extra", lambda: nn.Linear(2, 2)), "would be lost"),
    "blocks less": (lambda model: setattr(model.model, "layers", model.model.layers[:1]), "configuration says 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_be_divided(name: str) -> None:
    change, word = UNFIT[name]
    model = copy.deepcopy(_llama())
    if name == "another network":
        model.model.layers[1].mlp = nn.Identity()
    else:
        change(model)
    with pytest.raises(ConversionError) as caught:
        convert_to_moe(model, num_experts=4)
    _four(caught.value, word)


def test_an_unfit_block_may_be_left_out() -> None:
    model = copy.deepcopy(_llama())
    UNFIT["int8"][0](model)
    assert convert_to_moe(model, num_experts=4, layers=[0]).config.moe_layers == [0]


def test_adapters_are_not_lost_in_silence() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    model = copy.deepcopy(_llama())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    with pytest.raises(ConversionError, match="adapters") as caught:
        convert_to_moe(adapted.base_model.model, num_experts=4)
    _four(caught.value, "merge_and_unload")
    merged = adapted.merge_and_unload()
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        whole = convert_to_moe(merged, num_experts=4, top_k=4)
        assert torch.allclose(whole(ids).logits, merged(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"noise": "much", "method": "copy"}, {"noise": None, "method": "copy"}, {"reinit_frac": [1], "method": "copy"},
        {"noise": True, "method": "copy"}, {"seed": "x"}, {"seed": 1.5}, {"seed": 2**70},
        {"groups": 0, "method": "virtual"},
    ],
)  # fmt: skip
def test_settings_of_another_kind(settings: dict[str, Any]) -> None:
    with pytest.raises(ConversionError) as caught:
        convert_to_moe(_llama(), **{"num_experts": 4, **settings})
    _four(caught.value)


# --- configurations


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    convert_to_moe(_llama(), num_experts=4, top_k=2, router="priced", price=0.1).save_pretrained(tmp_path)
    return tmp_path


WRONG: list[tuple[str, Any]] = [
    ("num_experts", "4"), ("num_experts", 4.0), ("num_experts", 0), ("num_experts", True), ("num_experts", None),
    ("num_experts_per_tok", "2"), ("num_experts_per_tok", 9), ("num_experts_per_tok", -1),
    ("expert_intermediate_size", 0), ("expert_intermediate_size", "16"),
    ("expert_widths", "16"), ("expert_widths", []), ("expert_widths", [16, 16]), ("conversion_method", 3),
    ("shared_intermediate_size", -1), ("shared_intermediate_size", 1.5),
    ("moe_layers", 1), ("moe_layers", ["a"]), ("moe_layers", [0.0]), ("moe_layers", [7]), ("moe_layers", "01"),
    ("expert_bias", "no"), ("layer_bias", 1), ("gated_experts", "yes"),
    ("routers", [1]), ("routers", {"0": "priced"}), ("routers", {"0": {"name": 5}}),
    ("routers", {"0": {"name": "topk", "top_k": "2"}}), ("routers", {"0": {"name": "topk", "options": [1]}}),
    ("routers", {"0": {"name": "topk", "topk": 2}}),
    ("thermoe_version", "99.0.0"), ("thermoe_version", 3),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_fields_that_hold_what_they_cannot(field: str, value: Any, saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ConfigError) as caught:
        AutoModelForCausalLM.from_pretrained(saved)
    _four(caught.value, field)


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"name": "nope"}, "nope"),
        ({"name": "topk", "top_k": 9}, "top_k is 9"),
        ({"name": "topk", "options": {"price": 1}}, "price"),
        ({"name": "priced", "options": {"price": "x"}}, "price"),
        ({"name": "priced", "options": {"open_cost": [1.0]}}, "open_cost"),
    ],
)
def test_routers_that_cannot_be_built(entry: dict[str, Any], word: str, saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "routers": {"0": entry}}))
    with pytest.raises(ThermoeError) as caught:
        AutoModelForCausalLM.from_pretrained(saved)
    _four(caught.value, word)


def test_a_newer_version_comes_before_fields_it_may_have_changed(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "routers": [1], "thermoe_version": "99.0"}))
    with pytest.raises(ConfigError, match=r"written by thermoe 99\.0") as caught:
        AutoModelForCausalLM.from_pretrained(saved)
    _four(caught.value, "pip install --upgrade thermoe")


def test_every_field_is_tried_and_every_default_fits() -> None:
    assert {field for field, _ in WRONG} == set(FIELDS)
    assert all(fits(default) for _, default, _, fits in FIELDS.values())
