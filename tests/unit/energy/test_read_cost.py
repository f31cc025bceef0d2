"""Precision that differs by layer, and declared costs of reading, count in the bytes of experts; nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from thermoe.energy.cost_model import CostModel
from thermoe.energy.cost_table import CostTable
from thermoe.energy.read_cost import MOST
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError
from thermoe.moe.layer import moe_layers
from thermoe.testing import random_tokens, tiny_moe

COST = CostModel.prior()
FIRST, SECOND = "transformer.h.0.mlp", "transformer.h.1.mlp"
DEAR = [4.0, 4.0, 1.0, 1.0]
WIDTHS = [64, 16, 32, 16]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [layer.experts for _, layer in moe_layers(model)]


def exact(work: ModelWork) -> Any:
    """Return all numbers with their kinds, for 1 == 1.0."""
    return repr(work)


@pytest.mark.parametrize("widths", [None, WIDTHS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dtype_throughout_counts_as_before(dtype: torch.dtype, widths: list[int] | None) -> None:
    model = tiny_moe(num_experts=4, widths=widths)
    # Of the 32 in and 32 out weights of a neuron, at two bytes each, and two operations.
    neurons = widths or [32] * 4
    before = tuple([128 * n for n in neurons] for _ in range(2))
    for experts in experts_of(model):
        experts.to(dtype)  # the experts alone: what else there is has its own dtype, and counts as it did
    work = ModelWork.of(model)
    assert exact(work) == exact(ModelWork.of(tiny_moe(num_experts=4, widths=widths)))
    assert tuple(list(layer.bytes_by_expert) for layer in work.layers) == before
    assert all(isinstance(count, int) for layer in work.layers for count in layer.bytes_by_expert)


@pytest.mark.parametrize(
    ("common", "other", "relative"),
    [
        (torch.float32, torch.bfloat16, 0.5),
        (torch.bfloat16, torch.float32, 2),
        (torch.bfloat16, torch.float8_e4m3fn, 0.5),
        (torch.float32, torch.float8_e4m3fn, 0.25),
        (torch.bfloat16, torch.float16, 1),
    ],
)
def test_a_layer_in_another_dtype_counts_at_its_own_width(
    common: torch.dtype, other: torch.dtype, relative: float
) -> None:
    model = nn.Sequential(tiny_moe(num_experts=4), tiny_moe(num_experts=4, widths=WIDTHS))
    plain = ModelWork.of(model)
    experts = experts_of(model)
    for place, found in enumerate(experts):
        found.to(other if place == 2 else common)
    work = ModelWork.of(model)
    assert work.shared_bytes == plain.shared_bytes
    for place, (layer, before) in enumerate(zip(work.layers, plain.layers, strict=True)):
        factor = relative if place == 2 else 1
        assert layer.bytes_by_expert == tuple(factor * count for count in before.bytes_by_expert)
        assert layer.flops_by_expert == before.flops_by_expert


def test_of_equally_many_weights_the_first_width_is_the_reference() -> None:
    model = tiny_moe(num_experts=4)
    plain = ModelWork.of(model).layers[0].bytes_per_expert
    experts_of(model)[1].to(torch.bfloat16)
    assert [layer.bytes_per_expert for layer in ModelWork.of(model).layers] == [plain, plain / 2]


def test_a_model_in_two_dtypes_runs_at_the_joules_of_its_widths() -> None:
    model = tiny_moe(num_experts=4)
    experts_of(model)[1].to(torch.bfloat16)
    for _, layer in moe_layers(model):
        layer.backend = "grouped"
    with torch.no_grad():
        assert model(random_tokens(3, 8)).logits.isfinite().all()
    opened = [layer.last_routing.opened.tolist() for _, layer in moe_layers(model)]
    opened = [[float(e) for e in layer] for layer in opened]
    pairs = [layer.last_routing.counts.tolist() for _, layer in moe_layers(model)]
    plain = ModelWork.of(tiny_moe(num_experts=4))
    saved = sum(opened[1]) * plain.layers[1].bytes_per_expert / 2
    work = ModelWork.of(model)
    assert plain.step(24, pairs, opened).read_bytes - work.step(24, pairs, opened).read_bytes == saved > 0


def test_declared_factors_multiply_the_bytes_and_the_width_of_the_dtype() -> None:
    model = tiny_moe(num_experts=4, widths=WIDTHS)
    plain = ModelWork.of(model)
    work = ModelWork.of(model, read_cost={FIRST: DEAR, SECOND: 0.5})
    first, second = plain.layers
    assert work.layers[0].bytes_by_expert == tuple(f * b for f, b in zip(DEAR, first.bytes_by_expert, strict=True))
    assert work.layers[1].bytes_by_expert == tuple(b / 2 for b in second.bytes_by_expert)
    assert [layer.flops_by_expert for layer in work.layers] == [first.flops_by_expert, second.flops_by_expert]
    experts_of(model)[1].to(torch.bfloat16)
    assert ModelWork.of(model, read_cost={SECOND: 8}).layers[1].bytes_by_expert == tuple(
        4 * b for b in second.bytes_by_expert
    )


@pytest.mark.parametrize("read_cost", [None, {}, {FIRST: 1}, {FIRST: [1.0] * 4, SECOND: 1.0}])
def test_factors_of_one_change_no_number(read_cost: Any) -> None:
    model = tiny_moe(num_experts=4)
    assert exact(ModelWork.of(model, read_cost=read_cost)) == exact(ModelWork.of(model))


def test_modelled_joules_add_up_with_the_factors() -> None:
    model = tiny_moe(num_experts=4)
    plain, work = ModelWork.of(model), ModelWork.of(model, read_cost={FIRST: DEAR, SECOND: 0.5})
    pairs, opened = [[5.0, 0.0, 2.0, 9.0], [1.0, 1.0, 0.0, 1.0]], [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]]
    whole = COST.forward_j(work, 16, pairs, opened)
    # Three bytes more for the one dear expert that was opened; half a byte less for the three of the second layer.
    more = (3 - 3 * 0.5) * COST.open_cost_j(plain.layers[0])
    assert whole == pytest.approx(COST.forward_j(plain, 16, pairs, opened) + more, rel=1e-12)
    table, before = CostTable.of(COST, work), CostTable.of(COST, plain)
    given = torch.tensor([16]), torch.tensor([pairs]), torch.tensor([opened])
    assert float(table.joules(*given)[0]) == pytest.approx(whole, rel=1e-12)
    assert (table.unit_j, table.forward_j, table.token_j) == (before.unit_j, before.forward_j, before.token_j)
    assert torch.equal(table.pair_j, before.pair_j)


@pytest.mark.parametrize(
    ("read_cost", "says"),
    [
        (3, "read_cost is 3"),
        ([2.0, 2.0], "read_cost is"),
        ({0: 2.0}, "read_cost is"),
        ({"transformer.h.0": 2.0}, "no routed layer"),
        ({FIRST: [1.0, 2.0]}, "2 factors for 4 experts"),
        ({FIRST: []}, "0 factors for 4 experts"),
        *(({FIRST: value}, "a factor is") for value in (0, -1.0, float("nan"), float("inf"), True, "4", None)),
        *(({FIRST: value}, "a factor is") for value in (10**400, 2 * MOST, 0.5 / MOST, {1: 2})),
        ({FIRST: [1.0, 1.0, 0.0, 1.0]}, "a factor is 0.0"),
        ({FIRST: 2.0, SECOND: [1.0, True, 1.0, 1.0]}, "a factor is True"),
    ],
)
def test_what_cannot_be_declared_is_refused_and_named(read_cost: Any, says: str) -> None:
    with pytest.raises(ConfigError, match="read_cost") as caught:
        ModelWork.of(tiny_moe(num_experts=4), read_cost=read_cost)
    error = caught.value
    assert says in error.what and "read_cost" in error.where and error.accepted and error.fix


def test_a_slip_in_the_name_of_a_layer_is_seen() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'transformer\.h\.1\.mlp'"):
        ModelWork.of(tiny_moe(num_experts=4), read_cost={"transformer.h1.mlp": 2})
    with pytest.raises(ConfigError, match="no routed layer"):
        ModelWork.of(nn.Linear(2, 2), read_cost={"mlp": 2})
