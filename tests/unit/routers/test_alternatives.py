"""The controls: what they choose follows from nothing learned, and repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingContext
from thermoe.moe.layer import moe_layers
from thermoe.routers.alternatives import FixedRouter, HashRouter, RoundRobinRouter
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe

D, E, K = 16, 8, 2


def _with_ids(ids: torch.Tensor) -> RoutingContext:
    return RoutingContext(1, len(ids), token_ids=ids)


def test_one_token_id_has_one_set_of_experts() -> None:
    router = HashRouter(D, E, K)
    ids = torch.tensor([5, 9, 5, 7, 9, 5])
    index = router(torch.randn(6, D), _with_ids(ids)).expert_index
    assert torch.equal(index[0], index[2]) and torch.equal(index[0], index[5]) and torch.equal(index[1], index[4])
    again = router(torch.randn(6, D), _with_ids(ids.flip(0))).expert_index.flip(0)
    assert torch.equal(index, again)


@pytest.mark.parametrize("experts", [7, 8, 64])
def test_the_hash_is_even_over_ids_and_another_seed_is_another_hash(experts: int) -> None:
    ids = torch.arange(50_000)
    first = HashRouter(D, experts, K)(torch.zeros(50_000, D), _with_ids(ids))
    expected = 50_000 * K / experts
    # Chi-square with E - 1 degrees of freedom: mean E - 1, standard deviation sqrt(2 (E - 1)).
    chi = float(((first.counts - expected) ** 2 / expected).sum())
    assert chi < experts - 1 + 5 * (2 * (experts - 1)) ** 0.5
    other = HashRouter(D, experts, K, seed=1)(torch.zeros(50_000, D), _with_ids(ids))
    same = float((first.expert_index[:, 0] == other.expert_index[:, 0]).float().mean())
    assert same == pytest.approx(1 / experts, abs=0.02)


def test_pairs_of_experts_are_not_tied_together() -> None:
    index = HashRouter(D, E, 2)(torch.zeros(20_000, D), _with_ids(torch.arange(20_000))).expert_index
    pairs = torch.zeros(E, E).index_put((index[:, 0], index[:, 1]), torch.ones(20_000), accumulate=True)
    shares = pairs[~torch.eye(E, dtype=torch.bool)] / 20_000
    assert (pairs.diagonal() == 0).all()
    torch.testing.assert_close(shares, torch.full((56,), 1 / 56), atol=0.004, rtol=0)


def test_a_model_hands_on_its_token_ids_and_embeddings_are_refused() -> None:
    model = tiny_moe()
    set_router(model, "hash")
    ids = random_tokens(2, 10)
    with torch.no_grad():
        model(ids)
        layer = next(layer for _, layer in moe_layers(model))
        index = layer.last_routing.expert_index  # type: ignore[union-attr]
        expected = HashRouter(32, 8, 2)(torch.zeros(20, 32), _with_ids(ids.reshape(-1))).expert_index
        assert torch.equal(index, expected)
        with pytest.raises(RoutingError, match="goes by token ids") as error:
            model(inputs_embeds=model.transformer.wte(ids))
    assert error.value.where == "RoutingContext.token_ids" and "input_ids" in str(error.value.fix)
    assert error.value.accepted


def test_ids_of_another_call_are_not_taken_for_this_ones() -> None:
    model = tiny_moe()
    set_router(model, "hash")
    with torch.no_grad():
        model(random_tokens(2, 10))
    layer = next(layer for _, layer in moe_layers(model))
    with pytest.raises(RoutingError, match="goes by token ids"):
        layer(torch.randn(2, 7, 32))


@pytest.mark.parametrize("name", ["hash", "round_robin"])
def test_generation_with_a_cache_equals_generation_without(name: str) -> None:
    model = tiny_moe()
    set_router(model, name)
    ids = random_tokens(2, 7)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_positions_follow_the_cache_where_the_model_is_not_given_any() -> None:
    model = tiny_moe()
    set_router(model, "round_robin")
    ids = random_tokens(1, 6)
    layer = next(layer for _, layer in moe_layers(model))
    with torch.no_grad():
        past = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], past_key_values=past)
    assert layer.last_routing is not None
    assert layer.last_routing.expert_index.tolist() == [[5, 6]]


def test_round_robin_takes_turns() -> None:
    router = RoundRobinRouter(D, E, K, offset=3)
    decision = router(torch.randn(16, D), RoutingContext(2, 8))
    assert decision.expert_index[:8].tolist() == [[(i + 3) % E, (i + 4) % E] for i in range(8)]
    assert torch.equal(decision.expert_index[8:], decision.expert_index[:8])
    assert (decision.counts == 4).all()
    placed = RoutingContext(2, 1, positions=torch.tensor([6, 1]))
    assert router(torch.randn(2, D), placed).expert_index.tolist() == [[1, 2], [4, 5]]


def test_a_fixed_choice_is_the_same_for_all() -> None:
    decision = FixedRouter(D, E, 3, experts=[6, 1])(torch.randn(5, D))
    assert decision.expert_index.tolist() == [[6, 1]] * 5
    assert FixedRouter(D, E, 3)(torch.randn(2, D)).expert_index.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("experts", [[], [8], [-1], [0, 1, 2], [1, 1], [0.5], [True], "01", 3])
def test_a_fixed_choice_outside_the_layer_is_refused(experts: Any) -> None:
    with pytest.raises(ConfigError, match="experts is") as error:
        FixedRouter(D, E, K, experts=experts)
    assert error.value.where == "experts" and "0 to 7" in str(error.value.accepted) and error.value.fix


def test_a_seed_and_an_offset_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="seed is -1"):
        HashRouter(D, E, K, seed=-1)
    with pytest.raises(ConfigError, match="offset is 8"):
        RoundRobinRouter(D, E, K, offset=8)
    with pytest.raises(ConfigError, match=r"offset is 0\.5") as error:
        RoundRobinRouter(D, E, K, offset=0.5)  # type: ignore[arg-type]
    assert "an integer from 0 to 7" in str(error.value.accepted)
