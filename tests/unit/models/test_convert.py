"""Conversion is exact where it says so, leaves the source alone, and is really in the path of the logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ElectraConfig, ElectraForMaskedLM

from thermoe.errors import ConfigError, ConversionError, ThermoeError, UnknownNameError
from thermoe.models.convert import convert_to_moe
from thermoe.models.families import family_of
from thermoe.moe.layer import moe_layers
from thermoe.routers.base import ROUTERS
from thermoe.routers.priced import PricedRouter
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

IDS = random_tokens(3, 16)


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL(p || q) per token in nats, in float64."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float(F.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean"))


def _assert_exact(dense: nn.Module, moe: nn.Module) -> None:
    torch.testing.assert_close(_logits(moe), _logits(dense), atol=1e-5, rtol=1e-5)
    assert abs(_kl(_logits(dense), _logits(moe))) < 1e-8


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8, 16])
def test_partition_with_every_expert_is_the_dense_model(num_experts: int) -> None:
    dense = tiny_gpt2()
    _assert_exact(dense, convert_to_moe(dense, num_experts=num_experts, top_k=num_experts))


def test_partition_with_fewer_experts_is_not() -> None:
    dense = tiny_gpt2()
    assert _kl(_logits(dense), _logits(convert_to_moe(dense, num_experts=8, top_k=4))) > 1e-3


@pytest.mark.parametrize("router", ["topk", "random", "priced"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_copy_is_the_dense_model_for_every_router_and_k(top_k: int, router: str) -> None:
    dense = tiny_gpt2()
    options: dict[str, Any] = {"price": 0.2} if router == "priced" else {}
    moe = convert_to_moe(dense, num_experts=4, top_k=top_k, method="copy", router=router, **options)
    _assert_exact(dense, moe)
    for _, layer in moe_layers(moe):
        nn.init.normal_(layer.router.weight)
    _assert_exact(dense, moe)


def test_copy_without_renormalised_weights_is_not() -> None:
    dense = tiny_gpt2()
    moe = convert_to_moe(dense, num_experts=4, top_k=2, method="copy", gate="probability")
    assert _kl(_logits(dense), _logits(moe)) > 1e-3


def test_defaults() -> None:
    dense = tiny_gpt2()
    moe = convert_to_moe(dense)
    assert {(r.num_experts, r.top_k, r.gate) for r in (layer.router for _, layer in moe_layers(moe))} == {
        (8, 4, "ramped")
    }
    copied = convert_to_moe(dense, method="copy")
    assert {(r.num_experts, r.top_k, r.gate) for r in (layer.router for _, layer in moe_layers(copied))} == {
        (8, 1, "renormalized")
    }


def test_experts_hold_the_shards_of_the_dense_network() -> None:
    dense = tiny_gpt2()
    moe = convert_to_moe(dense, num_experts=4)
    ffn, layer = dense.transformer.h[1].mlp, moe.transformer.h[1].mlp
    width = ffn.c_fc.weight.shape[1] // 4
    for e in range(4):
        shard = slice(e * width, (e + 1) * width)
        assert torch.equal(layer.experts.up_proj[e], ffn.c_fc.weight[:, shard].T)
        assert torch.equal(layer.experts.up_bias[e], ffn.c_fc.bias[shard])
        assert torch.equal(layer.experts.down_proj[e], ffn.c_proj.weight[shard].T)
    assert torch.equal(layer.output_bias, ffn.c_proj.bias)
    assert layer.experts.down_bias is None, "inside, k experts would add it k times"


@pytest.mark.parametrize("layers", [[0], [1], [1, 0], [1, 1]])
def test_blocks_that_were_not_asked_for_stay(layers: list[int]) -> None:
    dense = tiny_gpt2()
    moe = convert_to_moe(dense, num_experts=4, top_k=2, layers=layers)
    assert [name for name, _ in moe_layers(moe)] == [f"transformer.h.{i}.mlp" for i in sorted(set(layers))]
    theirs = moe.state_dict()
    for name, value in dense.state_dict().items():
        converted = any(name.startswith(f"transformer.h.{i}.mlp.") for i in layers)
        assert converted or torch.equal(value, theirs[name]), name
        assert not converted or name not in theirs, name
    if 0 not in layers:  # the first block is before the first MoE layer
        with torch.no_grad():
            before = [m(IDS, output_hidden_states=True).hidden_states[1] for m in (dense, moe)]
        assert torch.equal(*before)


def test_the_source_is_left_as_it_was() -> None:
    dense = tiny_gpt2().train()
    dense.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    grads = {name: p.requires_grad for name, p in dense.named_parameters()}
    config, generation = copy.deepcopy(dense.config.to_dict()), copy.deepcopy(dense.generation_config.to_dict())
    moe = convert_to_moe(dense, num_experts=4)
    assert moe.training and dense.training
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(1.0)
    moe.generation_config.max_length = 7
    assert all(torch.equal(value, state[name]) for name, value in dense.state_dict().items())
    assert {name: p.requires_grad for name, p in dense.named_parameters()} == grads
    assert dense.config.to_dict() == config
    assert dense.generation_config.to_dict() == generation


def test_everything_learns_after_conversion() -> None:
    moe = convert_to_moe(tiny_gpt2(), num_experts=4, top_k=2).train()
    moe(IDS, labels=IDS).loss.backward()
    for name, parameter in moe.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("position", [0, 1])
def test_zeroing_experts_changes_the_logits(position: int) -> None:
    moe = tiny_moe()
    before = _logits(moe)
    with torch.no_grad():
        moe.transformer.h[position].mlp.experts.down_proj.zero_()
    assert (_logits(moe) - before).abs().max() > 0.1


def test_routers_are_distinct_objects() -> None:
    for name in ROUTERS:
        routers = [layer.router for _, layer in moe_layers(convert_to_moe(tiny_gpt2(), router=name))]
        assert len({id(r) for r in routers}) == 2
        assert not torch.equal(routers[0].weight, routers[1].weight)
        assert routers[0].weight.data_ptr() != routers[1].weight.data_ptr()


def test_router_options_arrive() -> None:
    moe = convert_to_moe(tiny_gpt2(), router="priced", price=0.25, k_min=2)
    for _, layer in moe_layers(moe):
        assert isinstance(layer.router, PricedRouter)
        assert float(layer.router.price) == 0.25 and layer.router.k_min == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_prices_stay_precise(dtype: torch.dtype) -> None:
    moe = convert_to_moe(tiny_gpt2().to(dtype), router="priced", price=0.123456789)
    assert {p.dtype for p in moe.parameters()} == {dtype}
    router = moe.transformer.h[0].mlp.router
    assert router.price.dtype == torch.float32
    assert float(router.price) == pytest.approx(0.123456789, rel=1e-7)
    assert _logits(moe).dtype == dtype


def test_tied_embeddings_stay_tied_and_untied_ones_untied() -> None:
    moe = tiny_moe()
    assert moe.lm_head.weight is moe.transformer.wte.weight
    dense = tiny_gpt2(tie_word_embeddings=False)
    free = convert_to_moe(dense, num_experts=4, top_k=4)
    assert free.lm_head.weight is not free.transformer.wte.weight
    assert torch.equal(free.lm_head.weight, dense.lm_head.weight)
    _assert_exact(dense, free)


def test_other_widths_activations_and_dropouts() -> None:
    dense = tiny_gpt2(n_inner=48, activation_function="relu", resid_pdrop=0.25)
    moe = convert_to_moe(dense, num_experts=6, top_k=6)
    layer = moe.transformer.h[0].mlp
    assert (layer.experts.intermediate_size, layer.experts.activation, layer.dropout.p) == (8, "relu", 0.25)
    _assert_exact(dense, moe)


def test_a_converted_model_that_has_run_can_be_copied() -> None:
    moe = tiny_moe().train()
    moe(IDS, labels=IDS).loss.backward()
    twin = copy.deepcopy(moe)
    assert torch.equal(_logits(twin.eval()), _logits(moe.eval()))
    with torch.no_grad():
        twin.transformer.h[0].mlp.router.weight.zero_()
    assert not torch.equal(_logits(twin), _logits(moe))


def test_hidden_states_cannot_see_the_future() -> None:
    for router, options in (("topk", {}), ("priced", {"price": 0.1, "open_cost": [1.0] * 8})):
        moe = tiny_moe(router=router, **options)
        changed = IDS.clone()
        changed[:, 9:] = random_tokens(3, 7, seed=5)
        with torch.no_grad():
            first, second = moe(IDS).logits, moe(changed).logits
        torch.testing.assert_close(first[:, :9], second[:, :9], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(first[:, 9:], second[:, 9:], atol=1e-2)


def _tiny_electra() -> ElectraForMaskedLM:
    return ElectraForMaskedLM(
        ElectraConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )


REFUSED: dict[str, tuple[Any, dict[str, Any], type[ThermoeError], str]] = {
    "unknown architecture": (_tiny_electra, {}, ConversionError, "architecture 'electra'"),
    "no model at all": (lambda: nn.Linear(3, 3), {}, ConversionError, "architecture 'Linear'"),
    "converted twice": (tiny_moe, {}, ConversionError, "already"),
    "a count that does not divide": (tiny_gpt2, {"num_experts": 7}, ConversionError, "7 experts do not divide"),
    "no experts": (tiny_gpt2, {"num_experts": 0}, ConversionError, "num_experts is 0"),
    "top_k above E": (tiny_gpt2, {"num_experts": 4, "top_k": 5}, ConversionError, "top_k is 5 with 4"),
    "top_k of 0": (tiny_gpt2, {"num_experts": 4, "top_k": 0}, ConversionError, "top_k is 0"),
    "unknown method": (tiny_gpt2, {"method": "partiton"}, UnknownNameError, "did you mean 'partition'"),
    "unknown router": (tiny_gpt2, {"router": "topkk"}, UnknownNameError, "did you mean 'topk'"),
    "unknown gate": (tiny_gpt2, {"gate": "rampd"}, UnknownNameError, "did you mean 'ramped'"),
    "unknown option": (tiny_gpt2, {"capacity": 1.0}, ConfigError, "'capacity'"),
    "a block that is not there": (tiny_gpt2, {"layers": [2]}, ConversionError, r"layers \[2\]"),
    "a negative block": (tiny_gpt2, {"layers": [-1]}, ConversionError, r"layers \[-1\]"),
    "no block": (tiny_gpt2, {"layers": []}, ConversionError, r"layers \[\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_say_what_where_what_is_accepted_and_what_to_do(case: str) -> None:
    build, arguments, error_class, message = REFUSED[case]
    model = build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error_class, match=message) as error:
        convert_to_moe(model, **arguments)
    assert error.value.what and error.value.where and error.value.accepted and error.value.fix
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_suggested_expert_count_works() -> None:
    with pytest.raises(ConversionError) as error:
        convert_to_moe(tiny_gpt2(), num_experts=7)
    assert error.value.fix == "use num_experts=8"
    convert_to_moe(tiny_gpt2(), num_experts=8)


def test_the_family_reads_weights_in_the_neutral_layout() -> None:
    dense = tiny_gpt2()
    family = family_of(dense)
    ffn = dense.transformer.h[0].mlp
    read, shape = family.read(dense.transformer.h[0]), family.shape(dense.config)
    x = torch.randn(5, 32)
    hidden = F.gelu(F.linear(x, read.up, read.up_bias), approximate="tanh")
    assert read.gate is None and (shape.activation, shape.gated, shape.intermediate_size) == ("gelu_new", False, 128)
    torch.testing.assert_close(F.linear(hidden, read.down, read.down_bias), ffn(x), atol=1e-5, rtol=1e-5)
