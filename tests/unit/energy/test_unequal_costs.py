"""Unequal experts cost what each of them reads and computes, and a price makes the router take the narrow ones."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from thermoe.compare.arms import Scorer
from thermoe.compare.runner import _score_batch
from thermoe.energy.cost_model import CostModel
from thermoe.energy.work import LayerWork, ModelWork
from thermoe.errors import ConfigError
from thermoe.evaluation import sequence_nll
from thermoe.models.convert import convert_to_moe
from thermoe.moe.experts import Experts
from thermoe.moe.layer import moe_layers
from thermoe.moe.stats import StatsAccumulator
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

COST = CostModel.prior()
WIDTHS = [64, 16, 32, 16]
IDS = random_tokens(3, 8)


def unequal(**options: Any) -> Any:
    return tiny_moe(num_experts=4, widths=WIDTHS, **options)


def test_each_expert_counts_its_own_matrices() -> None:
    layer = LayerWork.of(Experts(4, 32, 16, gated=False, activation="gelu_new", up_bias=True, blocks=(4, 1, 2, 1)))
    singles = [LayerWork.of(Experts(1, 32, width, gated=False, activation="gelu_new")) for width in WIDTHS]
    assert layer.num_experts == 4
    assert layer.bytes_by_expert == tuple(single.bytes_per_expert for single in singles)
    assert layer.flops_by_expert == tuple(single.flops_per_pair for single in singles)
    assert layer.read_bytes([1, 0, 2, 0]) == singles[0].bytes_per_expert + 2 * singles[2].bytes_per_expert
    assert layer.pair_flops([3, 1, 0, 1]) == 3 * singles[0].flops_per_pair + 2 * singles[1].flops_per_pair
    assert pickle.loads(pickle.dumps(layer)) == layer != LayerWork(4, 1, 1)


def test_one_number_is_enough_only_where_experts_are_alike() -> None:
    same, layer = LayerWork(4, 10, 20), LayerWork(4, [40, 10, 20, 10], [8, 2, 4, 2])
    assert same.read_bytes(3) == same.read_bytes([1, 1, 0, 1]) == 30
    assert same.pair_flops(7) == same.pair_flops([4, 0, 3, 0]) == 140
    for broken in (
        lambda: layer.read_bytes(3),
        lambda: layer.pair_flops(3.0),
        lambda: layer.read_bytes([1, 1]),
        lambda: layer.bytes_per_expert,
        lambda: layer.flops_per_pair,
        lambda: COST.open_cost_j(layer),
        lambda: COST.pair_cost_j(layer),
        lambda: LayerWork(4, [1, 2, 3], 5),
    ):
        with pytest.raises(ConfigError) as caught:
            broken()
        assert caught.value.what and caught.value.where and caught.value.accepted and caught.value.fix


def test_modelled_joules_add_up() -> None:
    work = ModelWork.of(unequal())
    pairs, opened = [[5, 0, 2, 9], [1, 1, 1, 1]], [[1, 0, 1, 1], [1, 1, 1, 1]]
    whole = COST.forward_j(work, 16, pairs, opened)
    nothing = COST.forward_j(work, 16, [[0] * 4] * 2, [[0] * 4] * 2)
    parts = sum(
        p * pair + o * opening
        for layer, layer_pairs, layer_opened in zip(work.layers, pairs, opened, strict=True)
        for p, o, pair, opening in zip(
            layer_pairs, layer_opened, COST.pair_costs_j(layer), COST.open_costs_j(layer), strict=True
        )
    )
    assert whole == pytest.approx(nothing + parts, rel=1e-12)
    with pytest.raises(ConfigError, match="one number"):
        COST.forward_j(work, 16, [16, 4], [3, 4])


def test_all_experts_together_read_and_compute_what_the_dense_network_does() -> None:
    dense = tiny_gpt2()
    work = ModelWork.of(convert_to_moe(dense, num_experts=4, widths=WIDTHS))
    even = ModelWork.of(convert_to_moe(dense, num_experts=4))
    assert work.shared_bytes == even.shared_bytes
    everything = [[7] * 4] * 2, [[1] * 4] * 2
    assert COST.forward_j(work, 7, *everything) == pytest.approx(COST.forward_j(even, 7, [28, 28], [4, 4]), rel=1e-12)


def test_relative_costs_follow_the_widths_and_average_to_one() -> None:
    layer = ModelWork.of(unequal()).layers[0]
    pair, opening = COST.relative_costs(layer)
    assert pair == [2.0, 0.5, 1.0, 0.5]
    ratio = COST.open_costs_j(layer)[0] / COST.pair_costs_j(layer)[0]
    assert opening == pytest.approx([ratio * cost for cost in pair])
    assert COST.mean_pair_cost_j(layer) == pytest.approx(sum(COST.pair_costs_j(layer)) / 4)


def counts_of(model: Any) -> list[list[float]]:
    with torch.no_grad():
        model(IDS)
    return [layer.last_routing.counts.tolist() for _, layer in moe_layers(model)]


def test_at_equal_benefit_a_price_takes_the_narrow_experts() -> None:
    model = unequal(top_k=2)
    pair, opening = COST.relative_costs(ModelWork.of(model).layers[0])
    for _, layer in moe_layers(model):
        torch.nn.init.zeros_(layer.router.weight)  # every expert is worth the same to every token
    set_router(model, "priced", price=0.0, k_min=2, pair_cost=pair, open_cost=[0.0] * 4)
    assert all(layer[0] + layer[2] > 0 for layer in counts_of(model)), "without a price width does not matter"
    set_router(model, "priced", price=0.01, k_min=2, pair_cost=pair, open_cost=[0.0] * 4)
    assert counts_of(model) == [[0, 24, 0, 24]] * 2
    # Opening costs alone do the same among the experts beyond k_min, where tokens are routed as a group: here the three
    # tokens of a group are worth 0.72 to each expert, opening costs 0.52 (narrow), 1.03 and 2.06.
    options = {"pair_cost": [1.0] * 4, "open_cost": opening, "group_by_position": True}
    set_router(model, "priced", price=0.01, top_k=4, k_min=1, **options)
    assert counts_of(model) == [[0, 24, 0, 24]] * 2


def test_a_price_lowers_the_modelled_joules() -> None:
    model = unequal(top_k=3, router="priced", gate="renormalized")
    work, joules = ModelWork.of(model), []
    pair, _ = COST.relative_costs(work.layers[0])
    for price in (0.0, 0.02, 0.1, 0.5):
        set_router(model, "priced", price=price, pair_cost=pair)
        pairs = counts_of(model)
        joules.append(COST.forward_j(work, IDS.numel(), pairs, [[float(n > 0) for n in layer] for layer in pairs]))
    assert joules == sorted(joules, reverse=True) and joules[0] > joules[-1]


@pytest.mark.parametrize("widths", [None, WIDTHS])
def test_a_comparison_counts_each_expert(widths: list[int] | None) -> None:
    model = tiny_moe(num_experts=4, widths=widths)

    @torch.no_grad()
    def score(batch: torch.Tensor) -> torch.Tensor:
        return sequence_nll(model(batch).logits, batch)

    work, stats = ModelWork.of(model), {name: StatsAccumulator() for name, _ in moe_layers(model)}
    row = _score_batch(Scorer(model, score), IDS, work, COST, stats)
    expected = COST.forward_j(work, IDS.numel(), [[0.0] * 4] * 2, [[0.0] * 4] * 2)
    for (_, layer), layer_work in zip(moe_layers(model), work.layers, strict=True):
        decision = layer.last_routing
        pair, opening = COST.pair_costs_j(layer_work), COST.open_costs_j(layer_work)
        expected += sum(pair[e] for e in decision.expert_index[decision.active].tolist())
        expected += sum(opening[e] for e in decision.opened.nonzero().flatten().tolist())
    assert row["energy_modelled_j"] == pytest.approx(expected, rel=1e-12)
    assert row["experts_per_token"] == 2
    opened = [float(layer.last_routing.opened.sum()) for _, layer in moe_layers(model)]
    assert row["distinct_experts"] == sum(opened) / 2
