"""Modelled joules: parts add up, same-shape experts cost the same, and the result never claims to be measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thermoe.adapt.test_time import RouterAdapter
from thermoe.energy.cost_model import CostModel, LayerWork, ModelWork
from thermoe.models.convert import convert_to_moe
from thermoe.moe.layer import moe_layers
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

COST = CostModel.prior()
BYTES = 2


def _matrices(model: nn.Module) -> int:
    """Weights of the matrices of a tied dense GPT-2, positions left out."""
    return sum(p.numel() for p in model.parameters() if p.ndim == 2) - model.transformer.wpe.weight.numel()


def test_the_prior_gives_back_what_it_was_fitted_to() -> None:
    olmoe = LayerWork(num_experts=64, bytes_per_expert=3 * 2048 * 1024 * BYTES, flops_per_pair=6 * 2048 * 1024)
    assert COST.open_cost_j(olmoe) == pytest.approx(2.89e-3)
    assert COST.pair_cost_j(olmoe) == pytest.approx(0.028e-3)
    pair, opening = COST.relative_costs(olmoe)
    assert pair == [1.0] * 64
    assert opening == pytest.approx([2.89 / 0.028] * 64)


def test_parts_add_up_to_the_whole() -> None:
    work = ModelWork.of(tiny_moe())
    pairs, opened, tokens = [20.0, 17.0], [8.0, 5.0], 10
    whole = COST.forward_j(work, tokens, pairs, opened)
    shared = COST.forward_j(work, tokens, [0, 0], [0, 0])
    parts = shared + sum(
        COST.pair_cost_j(layer) * p + COST.open_cost_j(layer) * o
        for layer, p, o in zip(work.layers, pairs, opened, strict=True)
    )
    assert whole == pytest.approx(parts, rel=1e-12)
    weights = COST.forward_j(work, 0, [0, 0], [0, 0])
    assert weights == pytest.approx(COST.open_j_per_byte * work.shared_bytes)
    per_token = (shared - weights) / tokens
    assert per_token == pytest.approx(COST.pair_j_per_flop * work.shared_flops_per_token)
    assert COST.forward_j(work, tokens, pairs, opened, passes=3) == pytest.approx(3 * whole)


def test_energy_rises_with_pairs_with_opened_experts_and_with_tokens() -> None:
    work = ModelWork.of(tiny_moe())
    base = COST.forward_j(work, 10, [20, 20], [4, 4])
    assert COST.forward_j(work, 10, [21, 20], [4, 4]) > base
    assert COST.forward_j(work, 10, [20, 20], [4, 5]) > base
    assert COST.forward_j(work, 11, [20, 20], [4, 4]) > base


def test_every_layer_has_to_be_given() -> None:
    work = ModelWork.of(tiny_moe())
    with pytest.raises(ValueError):
        COST.forward_j(work, 10, [20], [4])


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_count_as_the_output_projection_and_once(tied: bool) -> None:
    dense = tiny_gpt2(tie_word_embeddings=tied)
    work = ModelWork.of(dense)
    block = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)
    assert work.shared_bytes == BYTES * (block + 97 * 32)
    assert work.shared_flops_per_token == 2 * (block + 97 * 32)
    assert work.layers == ()


@pytest.mark.parametrize("num_experts", [2, 8])
def test_a_partition_reads_and_computes_what_the_dense_network_does(num_experts: int) -> None:
    dense = tiny_gpt2()
    moe = convert_to_moe(dense, num_experts=num_experts, top_k=num_experts)
    dense_work, work = ModelWork.of(dense), ModelWork.of(moe)
    ffn = 2 * 32 * 128
    routers = 2 * num_experts * 32
    for layer in work.layers:
        assert layer.num_experts == num_experts
        assert layer.num_experts * layer.bytes_per_expert == ffn * BYTES
        assert layer.num_experts * layer.flops_per_pair == 2 * ffn
    assert work.shared_bytes == dense_work.shared_bytes - 2 * ffn * BYTES + routers * BYTES
    tokens = 7
    everything = COST.forward_j(work, tokens, [tokens * num_experts] * 2, [num_experts] * 2)
    overhead = routers * (COST.open_j_per_byte * BYTES + COST.pair_j_per_flop * 2 * tokens)
    assert everything == pytest.approx(COST.forward_j(dense_work, tokens, [], []) + overhead)


def test_some_layers_converted() -> None:
    dense = tiny_gpt2()
    work = ModelWork.of(convert_to_moe(dense, num_experts=4, layers=[1]))
    assert len(work.layers) == 1
    assert work.shared_bytes == BYTES * (_matrices(dense) - 2 * 32 * 128 + 4 * 32)


def test_gated_experts_read_three_matrices() -> None:
    from thermoe.moe.experts import Experts
    from thermoe.moe.layer import MoELayer
    from thermoe.routers.topk import TopKRouter

    layer = MoELayer(TopKRouter(16, 4, 2), Experts(4, 16, 8, up_bias=True, down_bias=True))
    (work,) = ModelWork.of(nn.Sequential(layer)).layers
    assert work == LayerWork(4, 3 * 16 * 8 * BYTES, 2 * 3 * 16 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_is_counted_at_the_reference_width_whatever_the_dtype(dtype: torch.dtype) -> None:
    assert ModelWork.of(tiny_moe().to(dtype)) == ModelWork.of(tiny_moe())


def test_work_does_not_depend_on_the_router_or_on_having_run() -> None:
    model = tiny_moe()
    work = ModelWork.of(model)
    model(random_tokens(2, 5))
    set_router(model, "priced", price=0.1)
    assert ModelWork.of(model) == work
    with RouterAdapter(model):
        assert ModelWork.of(model).layers == work.layers


def test_experts_of_one_shape_share_one_cost() -> None:
    model = tiny_moe()
    work = ModelWork.of(model)
    assert work.layers[0] == work.layers[1]
    pair, opening = COST.relative_costs(work.layers[0])
    assert len(pair) == len(opening) == 8
    assert len(set(pair)) == len(set(opening)) == 1
    ratio = COST.open_cost_j(work.layers[0]) / COST.pair_cost_j(work.layers[0])
    assert opening[0] / pair[0] == pytest.approx(ratio)
    router = set_router(model, "priced", price=0.1) and model.transformer.h[0].mlp.router
    router.set_costs(pair, opening)
    assert router.couples_tokens


def test_it_says_that_it_is_an_estimate_and_of_what() -> None:
    described = COST.describe()
    assert COST.provenance == described["provenance"] == "estimated"
    assert described["basis"] == "prior"
    assert "not this machine" in described["reference"]
    for name, value, unit in (
        ("open_j_per_byte", COST.open_j_per_byte, "J/byte"),
        ("pair_j_per_flop", COST.pair_j_per_flop, "J/FLOP"),
    ):
        term = described["terms"][name]
        assert (term["value"], term["unit"]) == (value, unit)


def test_a_price_that_keeps_fewer_pairs_costs_less() -> None:
    model, ids = tiny_moe(router="priced", top_k=4, gate="renormalized"), random_tokens(2, 8)
    work, joules = ModelWork.of(model), []
    for price in (0.0, 0.05, 0.2):
        for _, layer in moe_layers(model):
            layer.router.set_price(price)
        with torch.no_grad():
            model(ids)
        decisions = [layer.last_routing for _, layer in moe_layers(model)]
        pairs = [float(d.counts.sum()) for d in decisions]
        opened = [float(d.opened.sum()) for d in decisions]
        joules.append(COST.forward_j(work, 16, pairs, opened))
    assert joules == sorted(joules, reverse=True) and joules[0] > joules[-1]


def test_the_prior_follows_the_data_sheet() -> None:
    reference, same = CostModel.prior(), CostModel.prior("NVIDIA H200")
    assert {n: t.value for n, t in same.terms.items()} == {n: t.value for n, t in reference.terms.items()}
    assert "data sheet of H200" in same.reference
    # Less bandwidth at the same power makes a byte dearer, and leaves an operation as it is.
    h100 = CostModel.prior("NVIDIA H100 80GB HBM3")
    assert h100.open_j_per_byte == pytest.approx(reference.open_j_per_byte * 4.8 / 3.35)
    assert h100.pair_j_per_flop == pytest.approx(reference.pair_j_per_flop)
    assert "H100 PCIe" in CostModel.prior("NVIDIA H100 PCIe").reference
    assert "data sheet of A100" in CostModel.prior("NVIDIA A100-SXM4-80GB").reference
    for unknown in (None, "no energy sensor", "NVIDIA RTX A1000"):
        assert CostModel.prior(unknown).terms == reference.terms
        assert "not this machine" in CostModel.prior(unknown).reference
