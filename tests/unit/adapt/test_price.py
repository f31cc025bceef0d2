"""The inner loop: the modelled cost of a price is that of the routing it leads to, and a target finds its price."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from thermoe.adapt.budget import Phase
from thermoe.adapt.price import PriceSolver
from thermoe.adapt.steps import Forward
from thermoe.energy.cost_model import CostModel
from thermoe.energy.cost_table import CostTable
from thermoe.energy.fit import Term
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer, routed_modules
from thermoe.routers.priced import PricedRouter
from thermoe.routers.topk import TopKRouter

HIDDEN, EXPERTS, TOP_K = 16, 8, 4
COST = CostModel.prior()


class Parallel(nn.Module):
    """MoE layers that all see the same input, so that a price in one does not change what another one is asked."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            layer.padding_mask = mask
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def build(
    seed: int = 0, *, layers: int = 2, blocks: tuple[int, ...] | None = None, spread: float = 0.5, **options: Any
) -> Parallel:
    torch.manual_seed(seed)
    made = []
    for _ in range(layers):
        router = PricedRouter(HIDDEN, EXPERTS, TOP_K, **options)
        router.weight.data.normal_(std=spread)
        made.append(MoELayer(router, Experts(EXPERTS, HIDDEN, 8, blocks=blocks)))
    return Parallel(made).eval()


def with_costs(model: Parallel, cost: CostModel = COST, *, opening: bool = True) -> PriceSolver:
    """Return the solver of a model whose routers have the costs that the cost model gives them."""
    solver = PriceSolver(model, cost, ModelWork.of(model))
    for place, (_, module) in enumerate(routed_modules(model)):
        pair, open_cost = solver.table.relative(place, EXPERTS)
        module.router.set_costs(pair, open_cost if opening else None)  # type: ignore[union-attr, operator]
    return solver


def push(model: nn.Module, price: float) -> None:
    for _, module in routed_modules(model):
        module.router.set_price(price)  # type: ignore[union-attr, operator]


@torch.no_grad()
def run(model: Parallel, solver: PriceSolver | None, phase: Phase, x: Tensor, mask: Tensor | None = None) -> float:
    """Run one forward and return its modelled joules, summed by the cost model itself."""
    model(x, mask)
    decisions = [module.last_routing for _, module in routed_modules(model)]
    pairs = [d.counts.tolist() for d in decisions if d is not None]
    opened = [d.opened.float().tolist() for d in decisions if d is not None]
    if solver is not None:
        solver.observe(phase, x.shape[0])
    tokens = x.shape[0] * x.shape[1] if mask is None else int(mask.sum())
    return COST.forward_j(ModelWork.of(model), tokens, pairs, opened)


DISTORTION = {"benefit": "distortion"}
CASES: dict[str, tuple[Phase, tuple[int, int], dict[str, Any]]] = {
    "decode": ("decode", (6, 1), {}),
    "decode, one sequence": ("decode", (1, 1), {}),
    "decode, no drop pass": ("decode", (6, 1), {"drop": "none"}),
    "decode, favourites kept": ("decode", (6, 1), {"drop": "phase2", "k_min": 2}),
    "decode, batch invariant": ("decode", (6, 1), {"batch_invariant": True}),
    "prefill": ("prefill", (2, 7), {}),
    "decode by distortion": ("decode", (6, 1), DISTORTION),
    "decode by distortion, favourites kept": (
        "decode",
        (6, 1),
        {"benefit": "distortion", "drop": "phase2", "k_min": 2},
    ),
    "decode by distortion, favourites weighed": ("decode", (6, 1), {"benefit": "distortion", "favourite_weight": 3.0}),
    "prefill by distortion": (
        "prefill",
        (2, 7),
        {"benefit": "distortion", "sensitivity": [0.1, 2, 1, 1, 3, 1, 1, 0.5]},
    ),
    "unequal experts by distortion": ("decode", (5, 1), {"benefit": "distortion", "blocks": (4, 1, 1, 2, 1, 1, 2, 4)}),
    "prefill in decode grouping": ("prefill", (3, 5), {"group_by_position": True}),
    "unequal experts": ("decode", (5, 1), {"blocks": (4, 1, 1, 2, 1, 1, 2, 4)}),
    "unequal experts, prefill": ("prefill", (2, 6), {"blocks": (4, 1, 1, 2, 1, 1, 2, 4), "k_min": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cost_of_a_price_is_that_of_the_routing_it_leads_to(case: str) -> None:
    phase, (batch, length), options = CASES[case]
    model = build(**options)
    solver = with_costs(model)
    inputs = [torch.randn(batch, length, HIDDEN) for _ in range(5)]
    for x in inputs:
        run(model, solver, phase, x)
    unit = solver.table.unit_j
    seen = set()
    for price in (0.0, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 30.0):
        push(model, price)
        spent_j = sum(run(model, None, phase, x) for x in inputs) / (5 * batch * length)
        assert solver.cost_at(phase, price / unit) == pytest.approx(spent_j, rel=1e-5)
        seen.add(round(spent_j, 12))
    assert len(seen) >= 3  # the prices do change something


def test_padding_and_changing_batches_are_counted_as_they_are() -> None:
    model = build()
    solver = with_costs(model)
    mask = torch.ones(4, 1, dtype=torch.bool)
    mask[2] = False
    inputs: list[tuple[Tensor, Tensor | None]] = [
        (torch.randn(batch, 1, HIDDEN), mask if batch == 4 else None) for batch in (3, 4, 3, 1, 4)
    ]
    for x, real in inputs:
        run(model, solver, "decode", x, real)
    for price in (0.0, 0.01, 0.1):
        push(model, price)
        spent_j = sum(run(model, None, "decode", x, real) for x, real in inputs)
        assert solver.cost_at("decode", price / solver.table.unit_j) == pytest.approx(spent_j / 13, rel=1e-5)
    assert solver.cost_at("prefill", 0.1) is None
    assert solver.cost_range("prefill") is None
    assert solver.price_for("prefill", 1.0) == 0.0


def test_layers_without_a_price_count_with_what_they_do() -> None:
    model = build()
    layer = model.layers[1]
    layer.router = TopKRouter(HIDDEN, EXPERTS, 3)
    solver = PriceSolver(model, COST, ModelWork.of(model))
    model.layers[0].router.set_costs(*solver.table.relative(0, EXPERTS))  # type: ignore[union-attr, operator]
    x = torch.randn(5, 1, HIDDEN)
    run(model, solver, "decode", x)
    for price in (0.0, 0.05):
        model.layers[0].router.set_price(price)  # type: ignore[union-attr, operator]
        spent_j = run(model, None, "decode", x) / 5
        assert solver.cost_at("decode", price / solver.table.unit_j) == pytest.approx(spent_j, rel=1e-5)


@given(
    seed=st.integers(0, 30),
    batch=st.integers(1, 8),
    spread=st.floats(0.05, 1.5),
    share=st.floats(0.02, 0.98),
    opening=st.booleans(),
    unequal=st.booleans(),
    benefit=st.sampled_from(["gate", "distortion"]),
)
def test_a_target_finds_the_lowest_price_that_meets_it(
    seed: int, batch: int, spread: float, share: float, opening: bool, unequal: bool, benefit: str
) -> None:
    model = build(seed, spread=spread, layers=1, benefit=benefit, blocks=(4, 1, 1, 2, 1, 1, 2, 4) if unequal else None)
    solver = with_costs(model, opening=opening)
    for _ in range(8):
        run(model, solver, "decode", torch.randn(batch, 1, HIDDEN))
    costs = solver.cost_range("decode")
    assert costs is not None
    target = costs.low_j + share * (costs.high_j - costs.low_j)
    price = solver.price_for("decode", target)
    reached = solver.cost_at("decode", price)
    assert reached is not None and reached <= target * (1 + 1e-6)
    if price > 0:  # C is monotone for the benefit "gate" without opening costs, and nearly so else
        below = solver.cost_at("decode", price / 1.011)
        assert below is not None and (below > target or ((opening or benefit != "gate") and below > 0.98 * target))


def test_the_ends_of_the_range() -> None:
    model = build()
    solver = with_costs(model)
    for _ in range(10):
        run(model, solver, "decode", torch.randn(4, 1, HIDDEN))
    costs = solver.cost_range("decode")
    assert costs is not None and costs.low_j < 0.6 * costs.high_j
    assert solver.price_for("decode", costs.high_j) == solver.price_for("decode", 2 * costs.high_j) == 0.0
    most = solver.price_for("decode", 0.0)
    assert 0 < most < float("inf")
    assert solver.cost_at("decode", most) == pytest.approx(costs.low_j, rel=1e-6)
    assert solver.cost_at("decode", 1e6 * most) == pytest.approx(costs.low_j, rel=1e-6)
    assert solver.price_for("decode", costs.low_j) == most
    assert solver.cost_at("decode", solver.price_for("decode", 1.0001 * costs.low_j)) == pytest.approx(
        costs.low_j, rel=1e-3
    )
    push(model, most * solver.table.unit_j)
    run(model, None, "decode", torch.randn(4, 1, HIDDEN))
    for _, module in routed_modules(model):
        assert module.last_routing is not None
        assert module.last_routing.active.sum(-1).max() == 1  # k_min, and one expert serves all four
        assert module.last_routing.opened.sum() == 1


@given(seed=st.integers(0, 50), length=st.integers(1, 6), unequal=st.booleans())
def test_cost_falls_with_the_price(seed: int, length: int, unequal: bool) -> None:
    model = build(seed, layers=1, blocks=(4, 1, 1, 2, 1, 1, 2, 4) if unequal else None)
    solver = with_costs(model, opening=False)
    run(model, solver, "prefill", torch.randn(3, length, HIDDEN))
    prices = [0.0, *(10 ** (step / 4 - 4) / solver.table.unit_j for step in range(24))]
    # Only what the price acts on must fall: without opening costs in the choice an opened expert may come and go.
    solver.table.open_j.zero_()
    costs = [solver.cost_at("prefill", price) for price in prices]
    assert all(b <= a * (1 + 1e-6) for a, b in pairwise(costs))  # type: ignore[operator]


def test_a_target_between_the_grid_points_is_met_closely() -> None:
    model = build(layers=3)
    for opening, benefit in ((False, "gate"), (True, "gate"), (True, "distortion")):
        for layer in model.layers:
            layer.router.benefit = benefit  # type: ignore[union-attr, assignment]
        solver = with_costs(model, opening=opening)
        for _ in range(60):
            run(model, solver, "decode", torch.randn(8, 1, HIDDEN))
        costs = solver.cost_range("decode")
        assert costs is not None
        for share in (0.2, 0.4, 0.6, 0.8):
            target = costs.low_j + share * (costs.high_j - costs.low_j)
            reached = solver.cost_at("decode", solver.price_for("decode", target))
            assert reached == pytest.approx(target, rel=0.02)
            again = solver.cost_at(
                "decode", solver.price_for("decode", target)
            )  # from the last price, not from nothing
            assert again == pytest.approx(target, rel=0.02)


def test_only_the_last_rows_are_kept() -> None:
    model = build()
    solver = PriceSolver(model, COST, ModelWork.of(model), rows=12)
    for _ in range(9):
        run(model, solver, "decode", torch.randn(5, 1, HIDDEN))
    assert solver.rows("decode") == 15
    run(model, solver, "prefill", torch.randn(1, 100, HIDDEN))
    assert solver.rows("prefill") == 12
    run(model, solver, "prefill", torch.randn(30, 4, HIDDEN))
    assert solver.rows("prefill") == 12
    assert solver.rows("decode") == 15


def test_a_forward_too_long_to_be_held_stands_for_all_its_tokens() -> None:
    model = build()
    short, whole = PriceSolver(model, COST, ModelWork.of(model), rows=256), with_costs(model)
    x = torch.randn(1, 1024, HIDDEN)
    for solver in (short, whole):
        run(model, solver, "prefill", x)
    for price in (0.0, 0.1 / whole.table.unit_j):
        assert short.cost_at("prefill", price) == pytest.approx(whole.cost_at("prefill", price), rel=0.05)


def test_what_is_kept_is_free_of_the_graph_and_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    solver = with_costs(model)
    model(torch.randn(4, 1, HIDDEN)).sum().backward()
    for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the device was read"))
    solver.observe("decode")
    monkeypatch.undo()
    kept = solver._kept["decode"][0]
    assert isinstance(kept, Forward)
    assert all(d is not None and not d.weights.requires_grad for d in kept.decisions)


def test_the_table_is_the_cost_model() -> None:
    model = build(blocks=(4, 1, 1, 2, 1, 1, 2, 4))
    work = ModelWork.of(model)
    terms = {**COST.terms, "layer_j": Term(3e-3, "J"), "token_j": Term(2e-6, "J")}
    cost = CostModel(terms=terms, basis="prior", reference="test")
    table = CostTable.of(cost, work)
    pairs = torch.randint(0, 9, (5, 2, EXPERTS)).float()
    opened = (pairs > 3).float()
    found = table.joules(torch.arange(5), pairs, opened)
    for row in range(5):
        expected = cost.forward_j(work, row, pairs[row].tolist(), opened[row].tolist())
        assert float(found[row]) == pytest.approx(expected, rel=1e-12)
    mean = sum(sum(cost.pair_costs_j(layer)) for layer in work.layers) / (2 * EXPERTS)
    assert table.unit_j == pytest.approx(mean)
    with pytest.raises(ConfigError, match="costs nothing"):
        CostTable.of(
            CostModel(terms={**COST.terms, "pair_j_per_flop": Term(0.0, "J/FLOP")}, basis="x", reference="x"), work
        )
