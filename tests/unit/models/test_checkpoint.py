"""A saved model comes back bit-equal, with the routers it had; generation with a cache equals generation without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from thermoe import __version__
from thermoe.errors import ConfigError
from thermoe.models.classes import MoEGPT2Config, MoEGPT2LMHeadModel
from thermoe.moe.layer import moe_layers
from thermoe.routers.base import ROUTERS
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe

IDS = random_tokens(2, 10)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ROUTERS},
    "topk with options": (
        "topk",
        {"gate": "probability", "eval_capacity_factor": 1.5, "drop_order": "probability", "temperature": 2.0},
    ),
    "priced with costs": (
        "priced",
        {"price": 0.123456789, "pair_cost": [0.1 * e + 0.3 for e in range(8)], "kappa": 1 / 3, "k_min": 0},
    ),
    "priced by group": ("priced", {"price": 0.05, "open_cost": [2.0] * 8, "group_by_position": True, "drop": "phase2"}),
}


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def _realigned(model: nn.Module) -> nn.Module:
    """Copy the weights out of the mapped file: how matrix products round depends on where their operands lie."""
    return copy.deepcopy(model)


@pytest.mark.parametrize("loader", [MoEGPT2LMHeadModel, AutoModelForCausalLM])
@pytest.mark.parametrize("setting", SETTINGS)
def test_save_and_load_is_a_no_op(setting: str, loader: Any, tmp_path: Path) -> None:
    name, options = SETTINGS[setting]
    model = tiny_moe(top_k=3, router=name, **options)
    for _, layer in moe_layers(model):
        layer.router.ramp.fill_(0.3)
    before = _logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(model), before)
    loaded = _realigned(loader.from_pretrained(tmp_path))
    assert isinstance(loaded, MoEGPT2LMHeadModel) and not loaded.training
    assert torch.equal(_logits(loaded), before)
    state = loaded.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value) and state[key].dtype == value.dtype, key
    for (_, mine), (_, theirs) in zip(moe_layers(model), moe_layers(loaded), strict=True):
        assert type(theirs.router) is type(mine.router)
        assert theirs.router.options() == mine.router.options()
        assert theirs.router.top_k == mine.router.top_k == 3


def test_routers_as_they_are_now_are_saved(tmp_path: Path) -> None:
    model = tiny_moe(top_k=3)
    set_router(model, "priced", layers=[1], price=0.1, open_cost=[1.0] * 8, top_k=2)
    model.transformer.h[1].mlp.router.set_price(0.2)
    model.save_pretrained(tmp_path)
    loaded = _realigned(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(_logits(loaded), _logits(model))
    first, second = (layer.router for _, layer in moe_layers(loaded))
    assert (type(first).__name__, first.top_k) == ("TopKRouter", 3)
    assert (type(second).__name__, second.top_k) == ("PricedRouter", 2)
    assert float(second.price) == pytest.approx(0.2) and second.couples_tokens


def test_configuration_round_trip(tmp_path: Path) -> None:
    model = tiny_moe(layers=[1], router="priced", price=0.25)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MoEGPT2Config)
    assert config.model_type == "thermoe_gpt2"
    assert config.thermoe_version == __version__
    assert config.moe_layers == [1]
    assert config.num_experts == 8 and config.num_experts_per_tok == 2 and config.expert_intermediate_size == 16
    assert config.routers == model.config.routers
    assert set(config.routers) == {"1"} and config.routers["1"]["options"]["price"] == 0.25
    fresh = MoEGPT2LMHeadModel(config)
    assert [name for name, _ in moe_layers(fresh)] == ["transformer.h.1.mlp"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_the_price_precise(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_moe(router="priced", price=0.123456789, open_cost=[1 / 3] * 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    router = loaded.transformer.h[0].mlp.router
    assert router.weight.dtype == dtype
    for name in ("price", "kappa", "pair_cost", "open_cost"):
        assert getattr(router, name).dtype == torch.float32, name
        assert torch.equal(getattr(router, name), getattr(model.transformer.h[0].mlp.router, name)), name


def test_a_model_from_a_configuration_is_initialised() -> None:
    torch.manual_seed(0)
    config = MoEGPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, num_experts=4, gated_experts=True, moe_layers=[1]
    )
    model = MoEGPT2LMHeadModel(config)
    layer = model.transformer.h[1].mlp
    assert layer.experts.gated and layer.experts.activation == "silu"
    assert 0.01 < float(layer.experts.gate_up_proj.std().detach()) < 0.03
    assert float(layer.router.weight.std().detach()) == pytest.approx(0.02 * (768 / 32) ** 0.5, rel=0.2)
    assert (layer.output_bias == 0).all()
    assert torch.isfinite(_logits(model)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"moe_layers": [5], "n_layer": 2}, r"MoE layers \[5\]"),
        ({"moe_layers": [-1], "n_layer": 2}, r"MoE layers \[-1\]"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        MoEGPT2Config(**fields)
    assert error.value.where and error.value.accepted


# --- generation ----------------------------------------------------------------------------------------------------

ROUTED: dict[str, dict[str, Any]] = {
    "topk": {},
    "priced, pair costs": {"router": "priced", "price": 0.1},
    "priced, opening costs, any batch": {
        "router": "priced",
        "price": 0.1,
        "open_cost": [1.0] * 8,
        "batch_invariant": True,
    },
    "priced, opening costs in groups": {
        "router": "priced",
        "price": 0.1,
        "open_cost": [1.0] * 8,
        "group_by_position": True,
    },
}


def _generate(model: MoEGPT2LMHeadModel, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, **settings)


@pytest.mark.parametrize("setting", ROUTED)
def test_greedy_generation_with_and_without_a_cache_agrees(setting: str) -> None:
    model = tiny_moe(**ROUTED[setting])
    cached = _generate(model, IDS, use_cache=True)
    assert cached.shape == (2, 22)
    assert torch.equal(cached, _generate(model, IDS, use_cache=False))


@pytest.mark.parametrize("setting", ["topk", "priced, pair costs", "priced, opening costs, any batch"])
def test_left_padding_changes_no_token(setting: str) -> None:
    model = tiny_moe(**ROUTED[setting])
    short = random_tokens(1, 6, seed=3)
    padded = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), IDS[:1]])
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    for use_cache in (True, False):
        together = _generate(model, padded, attention_mask=mask, use_cache=use_cache)
        assert torch.equal(together[0, 10:], _generate(model, short)[0, 6:])
        assert torch.equal(together[1, 10:], _generate(model, IDS[:1])[0, 10:])


def test_padding_is_routed_nowhere_in_prefill_and_decode() -> None:
    model = tiny_moe()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        prefill = model(IDS, attention_mask=mask, use_cache=True)
        for _, layer in moe_layers(model):
            active = layer.last_routing.active.view(2, 10, -1)  # type: ignore[union-attr]
            assert not active[0, :4].any() and active[0, 4:].all() and active[1].all()
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        model(IDS[:, :1], attention_mask=mask, past_key_values=prefill.past_key_values)
        assert all(layer.last_routing.active.all() for _, layer in moe_layers(model))  # type: ignore[union-attr]
        model(IDS)
    assert all(layer.last_routing.padding_mask is None for _, layer in moe_layers(model))  # type: ignore[union-attr]


def test_embeddings_in_place_of_tokens() -> None:
    model = tiny_moe()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    with torch.no_grad():
        by_ids = model(IDS, attention_mask=mask).logits
        by_embeds = model(inputs_embeds=model.transformer.wte(IDS), attention_mask=mask).logits
    assert torch.equal(by_ids, by_embeds)
    assert not model.transformer.h[0].mlp.last_routing.active.all()  # type: ignore[union-attr]
