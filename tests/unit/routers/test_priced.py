"""The priced router: price 0 is the baseline, a price buys the exact maximiser, costs fall as prices rise."""

from __future__ import annotations

from itertools import chain, combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thermoe.errors import RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.priced import PricedRouter, price_for_pairs
from thermoe.routers.selection import open_experts
from thermoe.routers.topk import TopKRouter
from thermoe.testing import random_tokens, tiny_moe

D, E = 12, 6
COSTS = [0.5, 1.5, 1.0, 0.75, 2.0, 0.25]
GATES = ("renormalized", "probability", "ramped")


def _router(top_k: int = 4, scale: float = 0.5, **options: Any) -> PricedRouter:
    router = PricedRouter(D, E, top_k, **options).eval()
    with torch.no_grad():
        router.weight.normal_(std=scale)
    return router


def _sets(index: Tensor) -> list[frozenset[int]]:
    return [frozenset(e for e in row if e < E) for row in index.tolist()]


# --- price 0 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("context", [RoutingContext(4, 5), RoutingContext(20, 1)])
def test_price_zero_is_the_baseline_bit_for_bit(gate: Any, capacity: float | None, context: RoutingContext) -> None:
    options: dict[str, Any] = {"gate": gate, "eval_capacity_factor": capacity}
    priced = _router(3, pair_cost=COSTS, open_cost=[5.0] * E, group_by_position=True, **options)
    priced.fast = FastWeights(D, E)
    baseline = TopKRouter(D, E, 3, **options).eval()
    baseline.load_state_dict({k: v for k, v in priced.state_dict().items() if k in baseline.state_dict()})
    x = torch.randn(20, D)
    mine, theirs = priced(x, context), baseline(x, context)
    for name in ("logits", "probabilities", "expert_index", "weights"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    if capacity:
        assert not theirs.active.all(), "the capacity is in effect"
    priced.set_price(0.2)
    assert not torch.equal(priced(x, context).expert_index, theirs.expert_index), "a price is not without effect"


def test_price_zero_draws_the_same_samples_in_training() -> None:
    priced = _router(3, temperature=2.0).train()
    baseline = TopKRouter(D, E, 3, temperature=2.0).train()
    baseline.load_state_dict({k: v for k, v in priced.state_dict().items() if k in baseline.state_dict()})
    x = torch.randn(20, D)
    torch.manual_seed(3)
    mine = priced(x)
    torch.manual_seed(3)
    assert torch.equal(mine.expert_index, baseline(x).expert_index)


@pytest.mark.parametrize("gate", GATES)
def test_price_zero_leaves_a_model_bit_equal_in_prefill_and_cached_decode(gate: Any) -> None:
    ids = random_tokens(3, 12)
    outputs = []
    for router, options in (("topk", {}), ("priced", {"open_cost": [3.0] * 8, "group_by_position": True})):
        model = tiny_moe(gate=gate, router=router, **options)
        for layer in model.transformer.h:
            layer.mlp.router.fast = FastWeights(32, 8)
        with torch.no_grad():
            prefill = model(ids[:, :8], use_cache=True)
            logits, cache = [prefill.logits], prefill.past_key_values
            for position in range(8, 12):
                step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
                logits.append(step.logits)
                cache = step.past_key_values
        outputs.append(torch.cat(logits, 1))
    assert torch.equal(*outputs)


# --- pair costs alone: exact per token -----------------------------------------------------------------------------


@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.4, 1.0, 10.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_selection_is_the_maximiser_over_all_subsets(
    seed: int, k_max: int, low: int, price: float, kappa: float
) -> None:
    k_min = min(low, k_max)
    torch.manual_seed(seed)
    costs = (torch.rand(E) * 2).tolist()
    router = _router(k_max, k_min=k_min, pair_cost=costs, price=price, kappa=kappa)
    decision = router(torch.randn(8, D))
    r = kappa * decision.probabilities.detach().double() - price * torch.tensor(costs).double()
    allowed = list(chain.from_iterable(combinations(range(E), k) for k in range(k_min, k_max + 1)))
    for t, chosen in enumerate(_sets(decision.expert_index)):
        assert k_min <= len(chosen) <= k_max
        best = max(float(r[t, list(subset)].sum()) for subset in allowed)
        assert float(r[t, list(chosen)].sum()) == pytest.approx(best, abs=1e-6 * max(1.0, price))


def test_cost_falls_with_the_price_token_by_token() -> None:
    router = _router(5, k_min=1, pair_cost=COSTS)
    x, costs = torch.randn(200, D), torch.tensor([*COSTS, 0.0])
    previous = torch.full((200,), float("inf"))
    totals = []
    for price in torch.logspace(-3, 1, 30).tolist():
        router.set_price(price)
        cost = costs[router(x).expert_index].sum(-1)
        assert (cost <= previous + 1e-6).all(), f"the cost of a token rose at price {price}"
        previous = cost
        totals.append(float(cost.mean()))
    assert totals[0] > 3 * totals[-1], "the prices cover the whole range"


@pytest.mark.parametrize("benefit", ["gate", "distortion"])
def test_cost_of_a_whole_model_falls_with_the_price(benefit: Any) -> None:
    """T3: a layer's choice changes what the layers after it see, so that the sum may rise, but by no more than 1 %."""
    pair = [*COSTS, 1.0, 0.7]
    model = tiny_moe(num_experts=8, top_k=5, router="priced", k_min=1, pair_cost=pair, benefit=benefit)
    layers = [layer.mlp.router for layer in model.transformer.h]
    costs, ids, totals = torch.tensor([*pair, 0.0]), random_tokens(8, 16), []
    with torch.no_grad():
        for router in layers:
            router.weight.normal_(std=0.5)
        for price in torch.logspace(-3, 1, 30).tolist():
            for router in layers:
                router.set_price(price)
            model(ids)
            chosen = [layer.mlp.last_routing.expert_index for layer in model.transformer.h]
            totals.append(sum(float(costs[index].sum()) for index in chosen))
    assert totals[0] > 2 * totals[-1], "the prices cover a range"
    for i, total in enumerate(totals):
        assert total <= 1.01 * min(totals[: i + 1])


@pytest.mark.parametrize("price", [1e-3, 0.1, 1.0, 1e2, 1e5])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_costs_with_fixed_k_are_without_effect_at_any_price(top_k: int, price: float) -> None:
    router = _router(top_k, k_min=top_k, pair_cost=[1.5] * E)
    x = torch.randn(500, D)
    baseline = router(x)
    router.set_price(price)
    priced = router(x)
    assert torch.equal(priced.expert_index, baseline.expert_index)
    assert torch.equal(priced.weights, baseline.weights)


@pytest.mark.parametrize("scale", [1e-4, 20.0])
def test_equal_costs_with_fixed_k_are_without_effect_for_close_and_for_extreme_scores(scale: float) -> None:
    """Scores that differ by less than their probabilities can show, and probabilities that underflow to 0."""
    router = _router(4, scale, k_min=4)
    x = torch.randn(500, D)
    baseline = router(x)
    router.set_price(0.5)
    assert torch.equal(router(x).expert_index, baseline.expert_index)


def test_a_large_price_keeps_the_order_of_benefits_under_unequal_costs() -> None:
    """Among equally cheap experts the more probable one goes first, however large the price."""
    router = _router(1, k_min=1, pair_cost=[1.0, 1.0, 1.0, 2.0, 2.0, 2.0], price=1e5)
    decision = router(torch.randn(500, D))
    assert torch.equal(decision.expert_index[:, 0], decision.probabilities[:, :3].argmax(-1))


@pytest.mark.parametrize("gate", GATES)
def test_the_price_never_enters_the_combine_weights(gate: Any) -> None:
    router = _router(4, gate=gate, pair_cost=COSTS, price=0.15)
    router.ramp.fill_(0.5)
    x = torch.randn(50, D)
    decision = router(x)
    assert 50 <= int(decision.active.sum()) < 200
    router.set_price(0.0)
    free = router(x)
    assert torch.equal(decision.logits, free.logits)
    assert torch.equal(decision.probabilities, free.probabilities)
    for t in range(50):
        live = decision.expert_index[t][decision.active[t]]
        p = free.probabilities[t, live]
        expected = {"renormalized": p / p.sum(), "probability": p, "ramped": 0.5 + 0.5 * E * p}[gate]
        torch.testing.assert_close(decision.weights[t][decision.active[t]], expected)


@pytest.mark.parametrize("k_min", [0, 1, 2, 3])
def test_a_ruinous_price_leaves_k_min(k_min: int) -> None:
    router = _router(3, k_min=k_min, pair_cost=COSTS, price=1e5)
    assert (router(torch.randn(40, D)).active.sum(-1) == k_min).all()


def test_active_top_k_lowers_k_min_too() -> None:
    router = _router(4, k_min=3, price=1e5)
    router.active_top_k = 2
    assert (router(torch.randn(10, D)).active.sum(-1) == 2).all()


# --- opening costs ---------------------------------------------------------------------------------------------------


def _objective(r: Tensor, chosen: list[frozenset[int]], price: float, opening: float) -> float:
    pairs = sum(float(r[t, list(s)].sum()) for t, s in enumerate(chosen))
    return pairs - price * opening * len(frozenset().union(*chosen))


def _brute_force(r: Tensor, k_min: int, k_max: int, price: float, opening: float) -> float:
    """The best objective over every opened set; given the set, each token's best choice is exact."""
    best = float("-inf")
    for size in range(max(k_min, 1), E + 1):
        for opened in combinations(range(E), size):
            ordered = r[:, list(opened)].sort(-1, descending=True).values[:, :k_max]
            keep = ordered.clone()
            keep[:, k_min:] = keep[:, k_min:].clamp(min=0)
            best = max(best, float(keep.sum()) - price * opening * size)
    return best


@torch.no_grad()
def _gaps(drop: str, cases: int) -> tuple[Tensor, Tensor]:
    """Return the shortfall against brute force of random groups, relative, and their best objective per benefit."""
    gaps, bests = [], []
    for seed in range(cases):
        torch.manual_seed(seed)
        price = float(10 ** (torch.rand(()) * 2 - 2))
        opening = float(10 ** (torch.rand(()) * 1.5 - 0.5))
        router = _router(3, pair_cost=(0.5 + torch.rand(E)).tolist(), open_cost=[opening] * E, price=price, drop=drop)
        decision = router(torch.randn(8, D), RoutingContext(8, 1))
        r = decision.probabilities.double() - price * router.pair_cost.double()
        best = _brute_force(r, 1, 3, price, opening)
        found = _objective(r, _sets(decision.expert_index), price, opening)
        assert found <= best + 1e-6, "nothing beats brute force"
        gaps.append(max(0.0, best - found) / abs(best))
        bests.append(best / float(decision.probabilities.topk(3, -1).values.sum()))
    return torch.tensor(gaps), torch.tensor(bests)


def test_the_drop_pass_comes_close_to_brute_force() -> None:
    """Where routing is worth its price, within 3% in every group; without the pass it is not.

    Where even the best choice costs more than it brings and k_min forces it all the same, one pass can end on the wrong
    last expert: there the bound is on the average.
    """
    gaps, bests = _gaps("all", 400)
    without, _ = _gaps("none", 400)
    worthwhile = bests > 0.3
    assert 200 < int(worthwhile.sum()) < 350
    assert gaps[worthwhile].max() < 0.03
    assert gaps[worthwhile].mean() < 0.001
    assert gaps.mean() < 0.02
    assert gaps.quantile(0.95) < 0.005
    assert without[worthwhile].max() > 0.05, "the pass is worth its while"
    assert without.mean() > 0.3


@pytest.mark.parametrize("drop", ["all", "phase2", "none"])
def test_opened_experts_fall_with_the_opening_cost(drop: str) -> None:
    x, context = torch.randn(3, D), RoutingContext(3, 1)  # few enough for some expert to be nobody's favourite
    router = _router(3, drop=drop, price=0.05)
    opened = []
    for cost in (0.0, 1.0, 5.0, 1e4):
        router.set_costs(None, [cost] * E)
        opened.append(int(router(x, context).opened.sum()))
    assert opened == sorted(opened, reverse=True) and opened[0] > opened[-1]
    if drop == "all":
        assert opened[-1] == 1


@pytest.mark.parametrize("drop", ["phase2", "none"])
def test_favourites_are_protected_unless_the_drop_pass_takes_all(drop: str) -> None:
    router = _router(3, price=0.05, open_cost=[1e4] * E, drop=drop)
    decision = router(torch.randn(16, D), RoutingContext(16, 1))
    favourites = decision.probabilities.argmax(-1)
    assert torch.equal(decision.expert_index[:, 0], favourites)
    assert torch.equal(decision.opened, torch.bincount(favourites, minlength=E) > 0)


@given(
    st.integers(0, 10_000),
    st.integers(1, 3),
    st.sampled_from(["all", "phase2", "none"]),
    st.sampled_from([0.1, 1.0, 100.0]),
)
@settings(max_examples=60)
def test_tokens_use_opened_experts_alone_and_at_least_k_min(seed: int, k_min: int, drop: str, paid: float) -> None:
    torch.manual_seed(seed)
    u = torch.softmax(2 * torch.randn(4, 5, E), -1)
    real = torch.rand(4, 5) < 0.8
    price, costs = torch.tensor(paid), torch.rand(E) + 0.5
    opening = 3 * torch.rand(E)
    opened = open_experts(u, real, price, costs, opening, k_min, 3, drop)  # type: ignore[arg-type]
    assert opened.shape == (4, E)
    assert (opened.sum(-1)[real.any(-1)] >= k_min).all()
    assert not opened[~real.any(-1)].any(), "a group of padding opens nothing"
    router = _router(3, k_min=k_min, drop=drop, pair_cost=costs.tolist(), open_cost=opening.tolist(), price=paid)
    decision = router(torch.randn(9, D), RoutingContext(9, 1))
    assert (decision.active.sum(-1) >= k_min).all()


@pytest.mark.parametrize("drop", ["all", "phase2", "none"])
def test_groups_are_routed_as_if_decoded_position_by_position(drop: str) -> None:
    batch, length = 5, 4
    router = _router(3, price=0.05, pair_cost=COSTS, open_cost=[2.0] * E, drop=drop, group_by_position=True)
    x = torch.randn(batch, length, D)
    mask = torch.rand(batch, length) < 0.8
    whole = router(x.view(-1, D), RoutingContext(batch, length, mask.view(-1)))
    for position in range(length):
        step = router(x[:, position], RoutingContext(batch, 1, mask[:, position]))
        rows = torch.arange(batch) * length + position
        assert torch.equal(whole.expert_index[rows], step.expert_index)
        assert torch.equal(whole.weights[rows], step.weights)


def test_a_large_batch_is_routed_as_several_of_the_served_size() -> None:
    parts, rows, length = 3, 4, 5
    router = _router(3, price=0.05, pair_cost=COSTS, open_cost=[2.0] * E, group_by_position=True)
    x, mask = torch.randn(parts * rows, length, D), torch.rand(parts * rows, length) < 0.8
    one = router(x.view(-1, D), RoutingContext(parts * rows, length, mask.view(-1)))
    router.group_rows = rows
    several = router(x.view(-1, D), RoutingContext(parts * rows, length, mask.view(-1)))
    assert not torch.equal(one.expert_index, several.expert_index)
    index = several.expert_index.view(parts * rows, length, -1)
    for part in range(parts):  # each served batch takes one sequence of every `parts` in a row
        own = x[part::parts].reshape(-1, D)
        alone = router(own, RoutingContext(rows, length, mask[part::parts].reshape(-1)))
        assert torch.equal(index[part::parts].flatten(0, 1), alone.expert_index)
    odd = RoutingContext(parts * rows - 1, length, mask[1:].reshape(-1))
    whole = router(x[1:].reshape(-1, D), odd).expert_index
    router.group_rows = None
    assert torch.equal(whole, router(x[1:].reshape(-1, D), odd).expert_index), "no multiple: one group"


def test_prefill_ignores_opening_costs_unless_grouped() -> None:
    x = torch.randn(20, D)
    router = _router(3, price=0.05, open_cost=[50.0] * E)
    free = _router(3, price=0.05)
    free.load_state_dict({**router.state_dict(), "open_cost": torch.zeros(E)})
    assert torch.equal(router(x, RoutingContext(4, 5)).expert_index, free(x, RoutingContext(4, 5)).expert_index)
    decoded = router(x, RoutingContext(20, 1))
    assert not torch.equal(decoded.expert_index, free(x, RoutingContext(20, 1)).expert_index)


def test_batch_invariant_routes_a_token_the_same_in_every_batch() -> None:
    x = torch.randn(16, D)
    for invariant in (True, False):
        router = _router(3, price=0.05, open_cost=[5.0] * E, batch_invariant=invariant)
        together = router(x, RoutingContext(16, 1)).expert_index
        alone = torch.cat([router(row, RoutingContext(1, 1)).expert_index for row in x.split(1)])
        assert torch.equal(together, alone) == invariant


@pytest.mark.parametrize("drop", ["all", "phase2", "none"])
@pytest.mark.parametrize("price", [0.02, 0.3])
def test_what_a_group_opens_is_what_its_real_tokens_open(price: float, drop: str) -> None:
    costs, opening = torch.tensor(COSTS), torch.full((E,), 0.7)
    for _ in range(20):
        u = torch.softmax(2 * torch.randn(1, 6, E), -1)
        real = torch.tensor([[True, False, True, False, False, True]])
        arguments = (torch.tensor(price), costs, opening, 1, 3, drop)
        together = open_experts(u, real, *arguments)  # type: ignore[arg-type]
        alone = open_experts(u[:, real[0]], torch.ones(1, 3, dtype=torch.bool), *arguments)  # type: ignore[arg-type]
        assert torch.equal(together, alone)


def test_padding_groups_and_padded_tokens_have_no_vote() -> None:
    router = _router(3, price=0.05, open_cost=[3.0] * E, group_by_position=True)
    x = torch.randn(4, 6, D)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 0] = False  # a position nobody has reached
    mask[1:3, 1] = False
    decision = router(x.view(-1, D), RoutingContext(4, 6, mask.view(-1)))
    index = decision.expert_index.view(4, 6, -1)
    assert (index[:, 0] == E).all()
    alone = router(x[[0, 3], 1], RoutingContext(2, 1))
    assert torch.equal(index[[0, 3], 1], alone.expert_index)


# --- what is pushed in ---------------------------------------------------------------------------------------------


#: Not numbers of at least 0 that float32 can hold.
NO_AMOUNTS: list[Any] = [-0.1, float("nan"), float("inf"), 1e39, 10**400, "0.2", True, None, [1.0]]


@pytest.mark.parametrize("price", NO_AMOUNTS)
def test_bad_prices_are_refused_and_change_nothing(price: Any) -> None:
    router = _router(price=0.25)
    with pytest.raises(RoutingError, match="the price is"):
        router.set_price(price)
    assert float(router.price) == 0.25
    with pytest.raises(RoutingError, match="the price is"):
        _router(price=price)


@pytest.mark.parametrize("kappa", NO_AMOUNTS)
def test_a_bad_kappa_is_refused(kappa: Any) -> None:
    with pytest.raises(RoutingError, match="kappa is") as error:
        _router(kappa=kappa)
    assert error.value.where == "kappa" and error.value.accepted and error.value.fix


@pytest.mark.parametrize(
    "costs", [[1.0] * (E - 1), [1.0] * (E + 1), 1.0, "1" * E, {1: 1.0}, *([value] * E for value in NO_AMOUNTS)]
)
def test_bad_costs_are_refused_and_change_nothing(costs: Any) -> None:
    router = _router(pair_cost=COSTS, open_cost=[2.0] * E)
    for pair, opening, name in ((costs, None, "pair_cost"), (None, costs, "open_cost")):
        with pytest.raises(RoutingError, match=name) as error:
            router.set_costs(pair, opening)
        assert error.value.where == name and error.value.accepted and error.value.fix
    assert router.pair_cost.tolist() == COSTS and router.open_cost.tolist() == [2.0] * E
    assert router.couples_tokens
    with pytest.raises(RoutingError, match="sensitivity is"):
        router.set_sensitivity(costs)
    assert router.sensitivity.tolist() == [1.0] * E


def test_costs_are_written_in_place() -> None:
    router = _router()
    places = {name: getattr(router, name).data_ptr() for name in ("price", "pair_cost", "open_cost")}
    router.set_price(0.5)
    router.set_costs(COSTS, [1.0] * E)
    assert places == {name: getattr(router, name).data_ptr() for name in places}
    assert router.couples_tokens
    router.set_costs(None, None)
    assert router.pair_cost.tolist() == [1.0] * E and router.open_cost.tolist() == [0.0] * E
    assert not router.couples_tokens


def test_loaded_opening_costs_act() -> None:
    saver, loader = _router(3, price=0.05, open_cost=[5.0] * E), _router(3)
    loader.load_state_dict(saver.state_dict())
    x, context = torch.randn(16, D), RoutingContext(16, 1)
    assert loader.couples_tokens
    assert torch.equal(loader(x, context).expert_index, saver(x, context).expert_index)
    free = _router(3, price=0.05)
    saver.load_state_dict({**free.state_dict(), "weight": saver.weight})
    assert not saver.couples_tokens


@pytest.mark.parametrize("k_min", [-1, 5, 1.5, True, "1", None])
def test_k_min_outside_its_range_is_refused(k_min: Any) -> None:
    with pytest.raises(RoutingError, match=f"k_min is {k_min!r}"):
        _router(4, k_min=k_min)


def test_unknown_drop_pass_names_the_near_one() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'phase2'"):
        _router(drop="phase")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_price_and_costs_in_float32(dtype: torch.dtype) -> None:
    price = 0.123456789
    router = _router(pair_cost=COSTS, open_cost=[1 / 3] * E, price=price, kappa=1 / 7)
    before = {name: getattr(router, name).clone() for name in ("price", "kappa", "pair_cost", "open_cost")}
    router = torch.nn.Sequential(router).to(dtype)[0]
    assert router.weight.dtype == dtype
    for name, value in before.items():
        assert getattr(router, name).dtype == torch.float32
        assert torch.equal(getattr(router, name), value)
        assert name in dict(router.named_buffers())
    router.set_price(0.2)
    assert float(router.price) == pytest.approx(0.2, rel=1e-7)
    assert router(torch.randn(4, D, dtype=dtype)).weights.dtype == dtype


def test_a_price_lowers_energy_and_not_the_gradient() -> None:
    router = _router(4, price=0.2).train()
    decision = router(torch.randn(64, D))
    (decision.weights * torch.randn_like(decision.weights)).sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0
    assert all(not buffer.requires_grad for buffer in router.buffers())


# --- the price for a share of the pairs ------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([0.3, 0.5, 0.625, 0.9, 1.0]), st.integers(0, 1))
@settings(max_examples=30)
def test_price_for_pairs_keeps_the_share_asked_for(seed: int, share: float, k_min: int) -> None:
    torch.manual_seed(seed)
    router = _router(4, k_min=k_min)
    x = torch.randn(400, D)
    price = price_for_pairs([router(x).probabilities.detach()], k_min=k_min, k_max=4, pairs_frac=share)
    router.set_price(price)
    assert int(router(x).active.sum()) == pytest.approx(share * 4 * 400, abs=2)


def test_price_for_pairs_refuses_fewer_than_k_min() -> None:
    with pytest.raises(RoutingError, match="fewer than k_min 2"):
        price_for_pairs([torch.full((3, E), 1 / E)], k_min=2, k_max=4, pairs_frac=0.4)
