"""A session sees what is declared of reading experts: in choices, prices, joules, learning and refusals alike."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from session_rig import scaled_cost
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from thermoe import AdaptiveSession, EnergyMeter, RouterAdapter
from thermoe.energy.cost_table import CostTable
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError
from thermoe.moe.layer import moe_layers, routed_modules
from thermoe.routers.topk import TopKRouter
from thermoe.telemetry.clock import VirtualClock
from thermoe.testing import random_tokens, tiny_moe

COST = scaled_cost(1e6)
NAMES = ["transformer.h.0.mlp", "transformer.h.1.mlp"]
DEAR = {name: [4.0] * 4 + [1.0] * 4 for name in NAMES}
ONES: dict[str, Any] = {NAMES[0]: 1, NAMES[1]: [1.0] * 8}


@pytest.fixture
def meter() -> EnergyMeter:
    return EnergyMeter(telemetry="off", clock=VirtualClock())


def model_of_equals() -> Any:
    return tiny_moe(num_experts=8, top_k=4)


@torch.no_grad()
def decode(model: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Return logits, uses of each expert of each layer (L, E), and by hand the joules of opening with `DEAR`."""
    logits, uses, opening_j = [], torch.zeros(2, 8), 0.0
    plain_j = COST.open_cost_j(ModelWork.of(model).layers[0])
    for seed in range(8):
        logits.append(model(random_tokens(6, 1, seed=seed)).logits)
        for place, (_, layer) in enumerate(moe_layers(model)):
            uses[place] += layer.last_routing.counts
            opened = layer.last_routing.opened.double()
            opening_j += plain_j * float(4 * opened[:4].sum() + opened[4:].sum())
    return torch.cat(logits), uses, opening_j


def at_price(price: float, read_cost: Any, meter: EnergyMeter) -> tuple[Tensor, Tensor, float, dict[str, Any]]:
    model = model_of_equals()
    with AdaptiveSession(model, meter=meter, cost_model=COST, read_cost=read_cost) as session:
        session.set_price(price)
        return *decode(model), session.step()


def test_the_dear_half_is_used_less_as_the_price_rises(meter: EnergyMeter) -> None:
    dear = []
    for price in (0.0, 0.1, 1.0, 10.0):
        _, uses, *_ = at_price(price, DEAR, meter)
        _, without, *_ = at_price(price, None, meter)
        dear.append(float(uses[:, :4].sum()))
        if price:
            assert dear[-1] < float(without[:, :4].sum())
            assert float(uses[:, 4:].sum()) > float(without[:, 4:].sum())
        else:
            assert torch.equal(uses, without)
    assert all(later < earlier for earlier, later in pairwise(dear)) and dear[0] > 0


@pytest.mark.parametrize("grouped", [False, True])
def test_in_prefill_opening_moves_choices_where_tokens_are_grouped(grouped: bool, meter: EnergyMeter) -> None:
    uses, joules = [], []
    for given in (None, DEAR):
        model, router = model_of_equals(), {"group_by_position": grouped}
        with AdaptiveSession(model, meter=meter, cost_model=COST, read_cost=given, router=router) as session:
            session.set_price(10.0)
            with torch.no_grad():
                model(random_tokens(6, 8, seed=1))
            uses.append(torch.stack([layer.last_routing.counts for _, layer in moe_layers(model)]))
            joules.append(session.step()["prefill/j_per_token_modelled"])
    if grouped:
        assert float(uses[1][:, :4].sum()) < float(uses[0][:, :4].sum())
    else:  # an opening is shared by tokens that choose alone: counted, and no part of the choice
        assert torch.equal(*uses) and joules[1] > joules[0]


def test_at_price_0_every_bit_is_that_of_top_k(meter: EnergyMeter) -> None:
    plain = model_of_equals()
    assert all(isinstance(layer.router, TopKRouter) for _, layer in moe_layers(plain))
    logits, uses, _ = decode(plain)
    found, theirs, *_ = at_price(0.0, DEAR, meter)
    assert torch.equal(found, logits) and torch.equal(theirs, uses)


def test_factors_of_one_change_nothing_at_any_price(meter: EnergyMeter) -> None:
    for price in (0.0, 0.3):
        logits, uses, _, metrics = at_price(price, None, meter)
        same, theirs, _, reported = at_price(price, ONES, meter)
        assert torch.equal(logits, same) and torch.equal(uses, theirs)
        assert metrics == reported


def test_routers_and_reported_joules_are_those_of_the_declared_work(meter: EnergyMeter) -> None:
    model = model_of_equals()
    table = CostTable.of(COST, ModelWork.of(model, read_cost=DEAR))
    with AdaptiveSession(model, meter=meter, cost_model=COST, read_cost=DEAR) as session:
        for place, (_, layer) in enumerate(moe_layers(model)):
            costs = layer.router.open_cost
            assert torch.allclose(costs.double() * table.unit_j, table.open_j[place], rtol=1e-6)
            assert float(costs[0]) == pytest.approx(4 * float(costs[7]), rel=1e-6)
        session.set_price(0.3)
        _, uses, opening_j = decode(model)
        metrics = session.step()
    by_hand = 8 * table.forward_j + 48 * table.token_j + float(uses.sum()) * float(table.pair_j[0, 0]) + opening_j
    assert metrics["decode/j_per_token_modelled"] == pytest.approx(by_hand / 48, rel=1e-6)


def test_a_modelled_budget_is_held_with_the_declared_costs(meter: EnergyMeter) -> None:
    model = model_of_equals()
    _, _, _, free = at_price(0.0, DEAR, meter)
    budget = 0.8 * free["decode/j_per_token_modelled"]
    cost = {"meter": meter, "cost_model": COST, "read_cost": DEAR}
    with AdaptiveSession(model, budget, **cost) as session:
        for _ in range(4):
            decode(model)
            metrics = session.step()
    assert metrics["decode/price"] > 0
    assert metrics["decode/j_per_token_modelled"] == pytest.approx(budget, rel=0.05)


def test_the_range_and_the_joules_of_learning_count_with_them(meter: EnergyMeter) -> None:
    told = [
        AdaptiveSession(model_of_equals(), meter=meter, cost_model=COST, read_cost=given).feasible()
        for given in (None, ONES, DEAR)
    ]
    assert told[0] == told[1] != told[2]
    model = model_of_equals()
    tables = []
    for given in (None, DEAR):
        with AdaptiveSession(model, meter=meter, cost_model=COST, read_cost=given, learn=True) as session:
            assert session.adapter is not None
            tables.append(session.adapter._learner.live.account.costs.table)
    assert torch.equal(tables[1].open_j, tables[0].open_j * torch.tensor([4.0] * 4 + [1.0] * 4).double())


@pytest.mark.parametrize(
    "read_cost",
    [3, "dear", {0: 2.0}, {NAMES[0]: 0.0}, {NAMES[0]: [1.0] * 7}, {NAMES[0]: float("nan")}, {"transformer.h.9.mlp": 2}],
)
def test_what_does_not_fit_is_refused_before_anything_is_touched(read_cost: Any, meter: EnergyMeter) -> None:
    model = model_of_equals()
    before = [layer.router for _, layer in moe_layers(model)]
    with pytest.raises(ConfigError, match="read_cost") as caught:
        AdaptiveSession(model, meter=meter, read_cost=read_cost)
    assert caught.value.what and caught.value.where and caught.value.accepted and caught.value.fix
    assert all(mine is layer.router for mine, (_, layer) in zip(before, moe_layers(model), strict=True))


def test_an_adapter_of_its_own_counts_with_them_or_refuses(meter: EnergyMeter) -> None:
    model = model_of_equals()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError, match="7 factors"):
        RouterAdapter(model, read_cost={NAMES[0]: [1.0] * 7})
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    with RouterAdapter(model, cost_model=COST, read_cost=DEAR) as adapter:
        found = adapter._learner.live.account.costs.table.open_j
    assert torch.equal(found, CostTable.of(COST, ModelWork.of(model, read_cost=DEAR)).open_j)


@pytest.mark.parametrize("learn", [None, True])
def test_a_hugging_face_moe_is_named_once_it_has_routers_and_left_alone_if_not(learn: Any, meter: EnergyMeter) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ConfigError, match=r"layers\.0") as caught:
        AdaptiveSession(model, meter=meter, read_cost={"model.layers.7": 2.0}, learn=learn).__enter__()
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert not model._forward_hooks
    name = caught.value.accepted.split(", ")[0]
    with AdaptiveSession(model, meter=meter, read_cost={name: [8.0, 1.0, 1.0, 1.0]}, learn=learn):
        router = next(module.router for found, module in routed_modules(model) if found == name)
        assert float(router.open_cost[0]) == pytest.approx(8 * float(router.open_cost[1]), rel=1e-6)


def test_what_is_declared_later_in_the_same_mapping_is_not_taken(meter: EnergyMeter) -> None:
    given: dict[str, Any] = {NAMES[0]: [2.0] * 8}
    model = model_of_equals()
    session = AdaptiveSession(model, meter=meter, read_cost=given)
    given[NAMES[0]][0] = 4.0
    given[NAMES[1]] = -1.0
    with session:
        costs = next(layer.router for _, layer in moe_layers(model)).open_cost
        assert float(costs[0]) == float(costs[1])
