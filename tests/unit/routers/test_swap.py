"""Routers of a live model are swapped and put back without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.layer import moe_layers
from thermoe.routers.base import ROUTERS
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.priced import PricedRouter
from thermoe.routers.swap import build_router, set_router
from thermoe.routers.topk import TopKRouter
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

IDS = random_tokens(2, 10)


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("gate", ["ramped", "renormalized", "probability"])
def test_a_swap_to_an_identical_router_leaves_logits_bit_equal(gate: str) -> None:
    model = tiny_moe(gate=gate, top_k=3)
    for _, layer in moe_layers(model):
        layer.router.ramp.fill_(0.4)
        layer.router.fast = FastWeights(32, 8)
        with torch.no_grad():
            layer.router.fast.delta.normal_()
    before, routers = _logits(model), [layer.router for _, layer in moe_layers(model)]
    set_router(model, "topk")
    assert torch.equal(_logits(model), before)
    set_router(model, "priced", price=0.0, open_cost=[1.0] * 8)
    assert torch.equal(_logits(model), before)
    assert all(layer.router is not old for (_, layer), old in zip(moe_layers(model), routers, strict=True))


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_what_is_returned_undoes_the_swap(name: str) -> None:
    model = tiny_moe()
    before, routers = _logits(model), {n: layer.router for n, layer in moe_layers(model)}
    replaced = set_router(model, name, top_k=3)
    assert replaced == routers
    assert not torch.equal(_logits(model), before)
    new = {n: layer.router for n, layer in moe_layers(model)}
    assert set_router(model, replaced) == new
    assert torch.equal(_logits(model), before)
    assert all(layer.router is routers[n] for n, layer in moe_layers(model))


def test_some_layers_by_position_or_name() -> None:
    model = tiny_moe()
    names = [name for name, _ in moe_layers(model)]
    assert list(set_router(model, "priced", layers=[1])) == [names[1]]
    assert [type(layer.router) for _, layer in moe_layers(model)] == [TopKRouter, PricedRouter]
    assert list(set_router(model, "priced", layers=[names[0]])) == [names[0]]
    assert [type(layer.router) for _, layer in moe_layers(model)] == [PricedRouter, PricedRouter]


def test_options_are_inherited_and_replaced() -> None:
    model = tiny_moe(top_k=4, gate="probability", drop_order="probability", eval_capacity_factor=2.0)
    set_router(model, "priced", price=0.25, k_min=2)
    router = model.transformer.h[0].mlp.router
    options = router.options()
    assert router.top_k == 4
    assert (options["gate"], options["drop_order"], options["eval_capacity_factor"]) == (
        "probability",
        "probability",
        2.0,
    )
    assert (options["price"], options["k_min"]) == (0.25, 2)
    set_router(model, "priced", gate="renormalized")
    options = model.transformer.h[0].mlp.router.options()
    assert (options["gate"], options["price"], options["k_min"]) == ("renormalized", 0.25, 2)
    set_router(model, "topk", top_k=2)
    router = model.transformer.h[0].mlp.router
    assert router.top_k == 2 and router.options()["eval_capacity_factor"] == 2.0


def test_learned_state_mode_dtype_and_gradients_are_taken_over() -> None:
    model = tiny_moe().bfloat16().train()
    old = model.transformer.h[1].mlp.router
    old.weight.requires_grad_(False)
    old.ramp.fill_(0.5)
    old.active_top_k = 1
    old.fast = FastWeights(32, 8)
    set_router(model, "priced")
    new = model.transformer.h[1].mlp.router
    assert torch.equal(new.weight, old.weight) and new.weight.data_ptr() != old.weight.data_ptr()
    assert new.weight.dtype == torch.bfloat16 and new.price.dtype == torch.float32
    assert not new.weight.requires_grad
    assert model.transformer.h[0].mlp.router.weight.requires_grad
    assert torch.equal(new.ramp, old.ramp)
    assert new.active_top_k == 1 and new.fast is old.fast and new.training


def test_every_layer_gets_a_router_of_its_own() -> None:
    model = tiny_moe()
    set_router(model, "priced")
    first, second = (layer.router for _, layer in moe_layers(model))
    assert first is not second
    assert not {p.data_ptr() for p in first.state_dict().values()} & {
        p.data_ptr() for p in second.state_dict().values()
    }
    first.set_price(0.5)
    assert float(second.price) == 0


def test_a_stale_decision_is_forgotten() -> None:
    model = tiny_moe()
    _logits(model)
    set_router(model, "priced")
    assert all(layer.last_routing is None for _, layer in moe_layers(model))


def test_unknown_router_names_the_near_one_and_changes_nothing() -> None:
    model = tiny_moe()
    routers = [layer.router for _, layer in moe_layers(model)]
    with pytest.raises(UnknownNameError, match="did you mean 'priced'") as error:
        set_router(model, "price")
    assert error.value.where and "topk" in error.value.accepted
    with pytest.raises(ConfigError, match="pirce"):
        set_router(model, "priced", pirce=0.5)
    with pytest.raises(RoutingError, match="top_k is 9"):
        set_router(model, "topk", top_k=9)
    assert [layer.router for _, layer in moe_layers(model)] == routers


@pytest.mark.parametrize("layers", [[2], [-1], ["transformer.h.7.mlp"], [None]])
def test_unknown_layers_are_refused(layers: list[object]) -> None:
    with pytest.raises(ConfigError, match="there is no MoE layer") as error:
        set_router(tiny_moe(), "topk", layers=layers)  # type: ignore[arg-type]
    assert error.value.where == "layers" and "0..1" in error.value.accepted


def test_routers_of_other_sizes_are_refused_and_nothing_is_changed() -> None:
    model = tiny_moe()
    routers = {name: layer.router for name, layer in moe_layers(model)}
    names = list(routers)
    for wrong in (TopKRouter(32, 4, 2), TopKRouter(16, 8, 2)):
        with pytest.raises(RoutingError, match="the router has") as error:
            set_router(model, {names[0]: TopKRouter(32, 8, 2), names[1]: wrong})
        assert error.value.where == names[1] and "8 experts of width 32" in error.value.accepted
    assert {name: layer.router for name, layer in moe_layers(model)} == routers


def test_a_dictionary_goes_alone() -> None:
    model = tiny_moe()
    with pytest.raises(ConfigError, match="together with"):
        set_router(model, {}, price=0.1)


def test_a_dense_model_is_refused_with_the_way_to_convert() -> None:
    with pytest.raises(RoutingError, match="no MoE layer") as error:
        set_router(tiny_gpt2(), "topk")
    assert "convert_to_moe" in error.value.fix


def test_build_router_names_the_option_it_does_not_take() -> None:
    with pytest.raises(ConfigError, match="tempreature") as error:
        build_router("topk", 8, 4, 2, {"tempreature": 1.0})
    assert "TopKRouter" in error.value.accepted and error.value.fix
