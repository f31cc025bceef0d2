"""Selection by distortion: what it minimises, held against a slow count of the same thing, and its bounds."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thermoe.errors import RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.routers import selection
from thermoe.routers.priced import PricedRouter
from thermoe.routers.selection import close_by_distortion, drop_by_distortion
from thermoe.testing import random_tokens, tiny_moe

D, E = 12, 6


def _router(top_k: int = 3, **options: Any) -> PricedRouter:
    torch.manual_seed(options.pop("seed", 0))
    router = PricedRouter(D, E, top_k, benefit="distortion", **options).eval()
    with torch.no_grad():
        router.weight.normal_(std=0.5)
    return router


def _distortion(p: Tensor, own: list[int], chosen: list[int], s: Tensor) -> float:
    """D of one token, straight from its definition."""
    w, then = torch.zeros(len(p), dtype=torch.float64), torch.zeros(len(p), dtype=torch.float64)
    p = p.double()
    w[own] = p[own] / p[own].sum()
    if chosen:
        then[chosen] = p[chosen] / p[chosen].sum()
    return float((s.double() * (w - then).square()).sum())


def _group_objective(p_NE: Tensor, opened: list[int], s: Tensor, k: int, price: float) -> float:
    total = price * len(opened)
    for p in p_NE:
        own = p.topk(k).indices.tolist()
        order = sorted(opened, key=lambda e: -float(p[e]))[:k]
        total += _distortion(p, own, order, s)
    return total


@given(st.integers(0, 5000), st.integers(1, 3), st.sampled_from([0.01, 0.05, 0.2, 1.0]))
@settings(max_examples=60)
def test_closing_saves_more_than_it_costs_and_comes_close_to_brute_force(seed: int, k: int, price: float) -> None:
    torch.manual_seed(seed)
    p = torch.softmax(1.5 * torch.randn(8, E), -1)
    s = torch.rand(E) + 0.5
    opened = close_by_distortion(p[None], torch.ones(1, 8, dtype=torch.bool), torch.full((E,), price), s, 1, k, "all")[
        0
    ]
    union = torch.zeros(E, dtype=torch.bool)
    union[p.topk(k).indices.flatten()] = True
    assert not (opened & ~union).any() and opened.any()
    mine = _group_objective(p, opened.nonzero().flatten().tolist(), s, k, price)
    before = _group_objective(p, union.nonzero().flatten().tolist(), s, k, price)
    assert mine <= before + 1e-6
    sets = [list(c) for n in range(1, E + 1) for c in combinations(range(E), n)]
    best = min(_group_objective(p, chosen, s, k, price) for chosen in sets)
    assert mine <= 1.3 * best + 1e-6


def test_closing_is_within_a_few_percent_of_brute_force_on_average() -> None:
    ratios = []
    for seed in range(120):
        torch.manual_seed(seed)
        p, s, price = torch.softmax(1.5 * torch.randn(8, E), -1), torch.rand(E) + 0.5, float(torch.rand(()) * 0.3)
        real = torch.ones(1, 8, dtype=torch.bool)
        opened = close_by_distortion(p[None], real, torch.full((E,), price), s, 1, 3, "all")[0]
        sets = [list(c) for n in range(1, E + 1) for c in combinations(range(E), n)]
        best = min(_group_objective(p, chosen, s, 3, price) for chosen in sets)
        ratios.append(_group_objective(p, opened.nonzero().flatten().tolist(), s, 3, price) / best)
    assert sum(ratios) / len(ratios) < 1.02
    assert max(ratios) < 1.3


@given(st.integers(0, 5000), st.integers(0, 3), st.sampled_from([0.001, 0.02, 0.1, 10.0]))
@settings(max_examples=60)
def test_a_token_gives_up_what_brings_less_than_it_costs(seed: int, k_min: int, price: float) -> None:
    torch.manual_seed(seed)
    p, s, c = torch.softmax(torch.randn(5, E), -1), torch.rand(E) + 0.1, torch.rand(E) + 0.5
    own = p.topk(3).indices
    index = drop_by_distortion(own, p, own, price * c, s, k_min)
    assert ((index < E).sum(-1) >= k_min).all()
    for row, mine, first in zip(p, index.tolist(), own.tolist(), strict=True):
        kept = [e for e in mine if e < E]
        assert set(kept) <= set(first)
        cost = _distortion(row, first, kept, s) + price * float(c[kept].sum())
        assert cost <= _distortion(row, first, first, s) + price * float(c[first].sum()) + 1e-6
        for e in kept if len(kept) > k_min else []:  # no single expert is left that would pay to give up
            fewer = [f for f in kept if f != e]
            assert cost <= _distortion(row, first, fewer, s) + price * float(c[fewer].sum()) + 1e-5


def test_with_equal_costs_a_token_costs_less_at_every_higher_price() -> None:
    router = _router(5)
    x, previous = torch.randn(200, D), torch.full((200,), 6)
    for price in torch.logspace(-4, 1, 30).tolist():
        router.set_price(price)
        k = router(x).active.sum(-1)
        assert (k <= previous).all()
        previous = k
    assert (previous == 1).all()


def test_opened_experts_fall_with_the_price() -> None:
    router = _router(3, open_cost=[1.0] * E)
    x, seen = torch.randn(16, D), []
    for price in (0.0, 0.01, 0.1, 1.0, 100.0):
        router.set_price(price)
        seen.append(int(router(x, RoutingContext(16, 1)).opened.sum()))
    assert seen == sorted(seen, reverse=True) and seen[0] == E and seen[-1] == 1


def test_a_sensitive_layer_keeps_more_open_and_a_sensitive_expert_stays() -> None:
    x, context = torch.randn(32, D), RoutingContext(32, 1)
    router = _router(3, price=1.0, open_cost=[1.0] * E)
    opened = []
    for sensitivity in ([0.01] * E, [1.0] * E, [100.0] * E):
        router.set_sensitivity(sensitivity)
        opened.append(int(router(x, context).opened.sum()))
    assert opened == sorted(opened) and opened[0] == 1 and opened[-1] == E
    router.set_sensitivity([0.05] * E)
    (only,) = router(x, context).opened.nonzero().flatten().tolist()
    other = (only + 1) % E
    router.set_sensitivity([2.0 if e == other else 0.05 for e in range(E)])
    assert router(x, context).opened[other]


def test_price_zero_leaves_a_model_bit_equal() -> None:
    ids, outputs = random_tokens(3, 12), []
    for router, options in (("topk", {}), ("priced", {"benefit": "distortion", "open_cost": [3.0] * 8})):
        model = tiny_moe(router=router, **options)
        with torch.no_grad():
            prefill = model(ids[:, :8], use_cache=True)
            step = model(ids[:, 8:9], past_key_values=prefill.past_key_values, use_cache=True)
        outputs.append(torch.cat([prefill.logits, step.logits], 1))
    assert torch.equal(*outputs)


def test_routes_depend_on_nothing_that_comes_later() -> None:
    """T19: with opening costs in decode grouping, too, a later token of a sequence changes no earlier route."""
    router = _router(3, price=0.1, open_cost=[1.0] * E, group_by_position=True)
    x = torch.randn(4, 6, D)
    changed = x.clone()
    changed[:, 4:] = torch.randn(4, 2, D)
    routes = [router(v.view(-1, D), RoutingContext(4, 6)).expert_index.view(4, 6, -1) for v in (x, changed)]
    assert torch.equal(routes[0][:, :4], routes[1][:, :4])
    assert not torch.equal(routes[0][:, 4:], routes[1][:, 4:])


@pytest.mark.parametrize("benefit", ["gate", "distortion"])
def test_each_phase_has_its_price(benefit: Any) -> None:
    router = PricedRouter(D, E, 3, benefit=benefit).eval()
    x = torch.randn(20, D)
    router.set_price(1e3, "decode")
    assert (router(x, RoutingContext(4, 5)).active.sum(-1) == 3).all()
    assert (router(x, RoutingContext(20, 1)).active.sum(-1) == 1).all()
    router.set_price(0.0, "decode")
    router.set_price(1e3, "prefill")
    assert (router(x, RoutingContext(4, 5)).active.sum(-1) == 1).all()
    again = PricedRouter(D, E, 3, **router.options())
    assert float(again.prefill_price) == 1e3 and float(again.price) == 0 and again.benefit == benefit
    with pytest.raises(UnknownNameError, match="decode"):
        router.set_price(1.0, "decoding")  # type: ignore[arg-type]


def test_padding_has_no_vote() -> None:
    p = torch.softmax(2 * torch.randn(1, 6, E), -1)
    real = torch.tensor([[True, False, True, False, False, True]])
    arguments: Any = (torch.full((E,), 0.1), torch.ones(E), 1, 3, "all")
    together = close_by_distortion(p, real, *arguments)
    assert torch.equal(together, close_by_distortion(p[:, real[0]], torch.ones(1, 3, dtype=torch.bool), *arguments))
    assert not close_by_distortion(p, torch.zeros_like(real), *arguments).any()


def test_protected_favourites_stay_open() -> None:
    router = _router(3, price=100.0, open_cost=[1.0] * E, drop="phase2")
    decision = router(torch.randn(16, D), RoutingContext(16, 1))
    favourites = decision.probabilities.argmax(-1)
    assert torch.equal(decision.opened, torch.bincount(favourites, minlength=E) > 0)


def _closed_slowly(p: Tensor, s: Tensor, price: Tensor, k_min: int, k: int, weight: float) -> list[int]:
    """The rounds of closing, each loss counted from the definition in double precision."""
    own = [row.topk(k).indices.tolist() for row in p]
    opened = sorted({e for ids in own for e in ids})

    def lost(t: int, closed: int) -> float:
        if closed not in sorted(opened, key=lambda e: -float(p[t, e]))[:k]:
            return 0.0
        d = [
            _distortion(p[t], own[t], sorted(left, key=lambda e: -float(p[t, e]))[:k], s)
            for left in (opened, [e for e in opened if e != closed])
        ]
        change = d[1] - d[0]
        return change * weight if change > 0 and closed in own[t][:k_min] else change

    for _ in range(selection.ROUNDS):
        saving = {e: float(price[e]) - sum(lost(t, e) for t in range(len(p))) for e in opened}
        pays = sorted((e for e in opened if saving[e] > 0), key=lambda e: -saving[e])
        number = min(math.ceil(len(pays) * selection.SHARE), len(opened) - max(k_min, 1))
        opened = [e for e in opened if e not in pays[: max(number, 0)]]
    return opened


@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("k_min", [0, 1, 2])
def test_closing_follows_its_definition_with_any_weight_on_favourites(k_min: int, weight: float) -> None:
    changed = 0
    for seed in range(25):
        torch.manual_seed(seed)
        p, s, price = torch.softmax(1.5 * torch.randn(8, E), -1), torch.rand(E) + 0.5, 0.3 * torch.rand(E)
        arguments: Any = (p[None], torch.ones(1, 8, dtype=torch.bool), price, s, k_min, 3, "all")
        opened = close_by_distortion(*arguments, weight)[0]
        assert opened.nonzero().flatten().tolist() == _closed_slowly(p, s, price, k_min, 3, weight)
        changed += not torch.equal(opened, close_by_distortion(*arguments)[0])
    assert (changed > 0) == (weight > 1 and k_min > 0)  # without favourites nothing weighs more


def test_a_huge_weight_on_favourites_never_closes_them_and_one_in_between_keeps_more_open() -> None:
    torch.manual_seed(0)
    p, real = torch.softmax(2 * torch.randn(60, 16, 32), -1), torch.rand(60, 16) < 0.9
    arguments: Any = (p, real, torch.full((32,), 0.2), torch.rand(32) + 0.5, 1, 4)
    opened = [close_by_distortion(*arguments, "all", weight) for weight in (1.0, 1.5, 1e30)]
    assert torch.equal(opened[0], close_by_distortion(*arguments, "all"))
    assert torch.equal(opened[2], close_by_distortion(*arguments, "phase2"))
    low, middle, high = (int(o.sum()) for o in opened)
    assert low < middle < high


def test_more_rounds_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    p, real = torch.softmax(2 * torch.randn(40, 16, 32), -1), torch.ones(40, 16, dtype=torch.bool)
    arguments: Any = (torch.full((32,), 0.1), torch.ones(32), 1, 4, "all")
    few = close_by_distortion(p, real, *arguments).sum()
    monkeypatch.setattr(selection, "ROUNDS", 64)
    monkeypatch.setattr(selection, "SHARE", 0.01)
    assert abs(int(few) / int(close_by_distortion(p, real, *arguments).sum()) - 1) < 0.05


@pytest.mark.parametrize("given_", [[1.0] * (E - 1), [-1.0] * E, [float("nan")] * E])
def test_bad_sensitivities_are_refused(given_: list[float]) -> None:
    with pytest.raises(RoutingError, match="sensitivity"):
        _router(sensitivity=given_)
    with pytest.raises(UnknownNameError, match="distortion"):
        PricedRouter(D, E, 3, benefit="distort")  # type: ignore[arg-type]


@pytest.mark.parametrize("given_", [0.5, -1.0, float("nan"), float("inf"), 1e39, True, "4", None, [2.0]])
def test_a_weight_on_favourites_that_is_no_number_from_1_is_refused(given_: Any) -> None:
    with pytest.raises(RoutingError, match="favourite_weight"):
        _router(favourite_weight=given_)


def test_a_weight_on_favourites_is_kept_and_refused_where_it_would_do_nothing() -> None:
    router = _router(favourite_weight=4, price=0.1, open_cost=[1.0] * E)
    again = PricedRouter(D, E, 3, **router.options())
    again.load_state_dict(router.state_dict())
    assert again.favourite_weight == 4.0
    x, context = torch.randn(16, D), RoutingContext(16, 1)
    assert torch.equal(router(x, context).expert_index, again.eval()(x, context).expert_index)
    with pytest.raises(RoutingError, match="gate"):
        PricedRouter(D, E, 3, benefit="gate", favourite_weight=2.0)
