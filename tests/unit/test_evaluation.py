"""Perplexity, and routing accuracy against an oracle that is checked against brute force."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from thermoe.errors import ConfigError, RoutingError
from thermoe.evaluation import (
    LayerAccuracy,
    mean_accuracy,
    perplexity,
    routing_accuracy,
    sequence_nll,
    subset_losses,
)
from thermoe.moe.layer import moe_layers
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.topk import TopKRouter
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

GATES = ["renormalized", "probability", "ramped"]
BATCHES = [random_tokens(4, 16, seed=seed) for seed in range(3)]


# --- likelihood -----------------------------------------------------------------------------------------------------


def test_sequence_nll_is_the_sum_over_predicted_tokens() -> None:
    logits, ids = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    expected = [-sum(float(logits[b, t].log_softmax(-1)[ids[b, t + 1]]) for t in range(4)) for b in range(3)]
    found = sequence_nll(logits, ids)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_sequence_nll_is_computed_in_float32() -> None:
    logits, ids = torch.randn(2, 6, 11).bfloat16(), torch.randint(0, 11, (2, 6))
    assert torch.equal(sequence_nll(logits, ids), sequence_nll(logits.float(), ids))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_perplexity_equals_the_direct_computation(batch_size: int) -> None:
    model, rows = tiny_moe(), random_tokens(7, 12)
    with torch.no_grad():
        loss = F.cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert perplexity(model, rows, batch_size=batch_size) == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_perplexity_of_a_blind_model_is_the_vocabulary() -> None:
    model = tiny_gpt2(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, random_tokens(3, 8)) == pytest.approx(97, rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (3, 0)])
def test_nothing_to_score_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="nothing to score") as error:
        perplexity(tiny_gpt2(), torch.ones(shape, dtype=torch.long))
    assert error.value.where == "rows" and error.value.accepted


# --- the oracle -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", [0.0, 0.7])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_loss_of_a_subset_is_its_error_without_the_gram_trick(gate: Any, k: int, ramp: float) -> None:
    experts, tokens, width = 5, 9, 7
    router = TopKRouter(4, experts, 5, gate=gate)
    router.ramp.fill_(ramp)
    outputs = torch.randn(experts, tokens, width)
    probabilities = torch.randn(tokens, experts).mul(2).softmax(-1)
    subsets = torch.tensor(list(combinations(range(experts), k)))
    losses = subset_losses(outputs, probabilities, router, subsets).detach()

    def weights(p: torch.Tensor, members: tuple[int, ...]) -> list[float]:
        chosen = [float(p[e]) for e in members]
        return {
            "renormalized": [v / sum(chosen) for v in chosen],
            "probability": chosen,
            "ramped": [1 - ramp + ramp * experts * v for v in chosen],
        }[gate]

    for t in range(tokens):
        y = outputs[:, t].double()
        full = sum(w * y[e] for e, w in enumerate(weights(probabilities[t], tuple(range(experts)))))
        for n, members in enumerate(combinations(range(experts), k)):
            part = sum(w * y[e] for e, w in zip(members, weights(probabilities[t], members), strict=True))
            error = float((full - part).square().sum() / full.square().sum())  # type: ignore[union-attr]
            assert float(losses[t, n]) == pytest.approx(error, rel=1e-3, abs=1e-5)
    if k == experts:
        assert losses.max() < 1e-5, "all experts are the whole output"


def _by_hand(model: Any, batches: list[torch.Tensor], tau: float) -> dict[str, dict[str, float]]:
    """Accuracy of a fixed-k model, token by token, from expert outputs alone."""
    sums: dict[str, dict[str, float]] = {}
    for batch in batches:
        inputs: dict[str, torch.Tensor] = {}

        def keep(name: str, into: dict[str, torch.Tensor] = inputs) -> Any:
            return lambda module, arguments: into.__setitem__(name, arguments[0].reshape(-1, 32))

        handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in moe_layers(model)]
        with torch.no_grad():
            model(batch)
        for handle in handles:
            handle.remove()
        for name, layer in moe_layers(model):
            total = sums.setdefault(name, dict.fromkeys(("tolerant", "chance", "overlap", "regret", "tokens"), 0.0))
            outputs = layer.experts.forward_all(inputs[name]).detach().double()
            p = (inputs[name] @ layer.router.weight.T).softmax(-1).detach().double()
            k = layer.router.top_k
            for t, row in enumerate(layer.last_routing.expert_index.tolist()):
                full = (p[t].unsqueeze(1) * outputs[:, t]).sum(0)
                losses = {}
                for members in combinations(range(8), k):
                    index = list(members)
                    part = (p[t, index].unsqueeze(1) / p[t, index].sum() * outputs[index, t]).sum(0)
                    losses[frozenset(members)] = float((full - part).square().sum() / full.square().sum())
                best = min(losses, key=losses.__getitem__)
                own = frozenset(row)
                total["tolerant"] += losses[own] <= losses[best] + tau
                total["chance"] += sum(v <= losses[best] + tau for v in losses.values()) / len(losses)
                total["overlap"] += len(own & best) / k
                total["regret"] += losses[own] - losses[best]
                total["tokens"] += 1
    return sums


@pytest.mark.parametrize("top_k", [1, 3])
def test_accuracy_and_chance_equal_brute_force(top_k: int) -> None:
    model, tau = tiny_moe(top_k=top_k, gate="renormalized"), 0.05
    found = routing_accuracy(model, BATCHES[:2], tau=tau)
    for name, sums in _by_hand(model, BATCHES[:2], tau).items():
        n = sums["tokens"]
        accuracy = found[name]
        assert accuracy.tokens == n == 128
        assert accuracy.tolerant == pytest.approx(sums["tolerant"] / n, abs=1e-9)
        assert accuracy.tolerant_chance == pytest.approx(sums["chance"] / n, abs=1e-6)
        assert accuracy.overlap == pytest.approx(sums["overlap"] / n, abs=1e-6)
        assert accuracy.overlap_chance == pytest.approx(top_k / 8)
        assert accuracy.regret == pytest.approx(sums["regret"] / n, abs=1e-4)
        chance = sums["chance"] / n
        assert accuracy.tolerant_corrected == pytest.approx((sums["tolerant"] / n - chance) / (1 - chance), abs=1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [1, 4])
def test_the_oracle_scores_one(top_k: int, gate: str) -> None:
    for accuracy in routing_accuracy(tiny_moe(top_k=top_k, gate=gate), BATCHES, chooser="oracle").values():
        assert accuracy.tolerant == 1
        assert accuracy.tolerant_corrected == 1
        assert accuracy.overlap == pytest.approx(1, abs=1e-6)
        assert accuracy.regret == 0


@pytest.mark.parametrize("router", [{}, {"router": "priced", "price": 0.1}])
def test_random_routing_scores_zero(router: dict[str, Any]) -> None:
    model = tiny_moe(top_k=3, gate="renormalized", **router)
    batches = [random_tokens(16, 32, seed=seed) for seed in range(4)]
    for accuracy in routing_accuracy(model, batches, tau=0.05, chooser="random").values():
        n = accuracy.tokens
        assert n == 2048
        for value, chance, corrected in (
            (accuracy.tolerant, accuracy.tolerant_chance, accuracy.tolerant_corrected),
            (accuracy.overlap, accuracy.overlap_chance, accuracy.overlap_corrected),
        ):
            bound = 4 * math.sqrt(0.25 / n)  # four standard errors of a share, at their widest
            assert abs(value - chance) < bound
            assert corrected is not None and abs(corrected) < bound / (1 - chance)


def test_the_router_is_between_chance_and_the_oracle() -> None:
    model = tiny_moe(top_k=3, gate="renormalized")
    own = routing_accuracy(model, BATCHES)
    random = routing_accuracy(model, BATCHES, chooser="random")
    for name, accuracy in own.items():
        assert 0 <= random[name].tolerant < accuracy.tolerant <= 1
        assert 0 < accuracy.regret < random[name].regret


def test_every_expert_for_every_token_leaves_nothing_to_correct() -> None:
    for accuracy in routing_accuracy(tiny_moe(num_experts=4, top_k=4), BATCHES).values():
        assert accuracy.overlap == accuracy.overlap_chance == accuracy.tolerant == accuracy.tolerant_chance == 1
        assert accuracy.overlap_corrected is None and accuracy.tolerant_corrected is None
        assert accuracy.regret == pytest.approx(0, abs=1e-6)


def test_a_tolerance_that_takes_all_leaves_nothing_to_correct() -> None:
    for accuracy in routing_accuracy(tiny_moe(), BATCHES, tau=1e9).values():
        assert accuracy.tolerant == accuracy.tolerant_chance == 1 and accuracy.tolerant_corrected is None
        assert accuracy.overlap_corrected is not None


def test_fewer_experts_are_judged_against_the_best_set_as_small() -> None:
    model = tiny_moe(top_k=4, gate="renormalized", router="priced", price=0.15)
    found = routing_accuracy(model, BATCHES[:1])
    for name, layer in moe_layers(model):
        used = layer.last_routing.active.sum(-1)  # type: ignore[union-attr]
        assert used.min() < used.max()
        assert found[name].overlap_chance == pytest.approx(float(used.float().mean()) / 8)


def test_tokens_without_an_expert_are_left_out() -> None:
    model = tiny_moe(top_k=2, router="priced", k_min=0, price=0.35)
    found = routing_accuracy(model, BATCHES[:1])
    for name, layer in moe_layers(model):
        routed = int(layer.last_routing.active.any(-1).sum())  # type: ignore[union-attr]
        assert 0 < routed < 64
        assert found[name].tokens == routed
    set_price = [layer.router.set_price(1e3) for _, layer in moe_layers(model)]
    assert len(set_price) == 2 and routing_accuracy(model, BATCHES[:1]) == {}


def test_fast_weights_change_decisions_and_not_the_yardstick() -> None:
    model = tiny_moe(top_k=2, gate="renormalized", layers=[0])
    before = routing_accuracy(model, BATCHES)
    (layer,) = (layer for _, layer in moe_layers(model))
    layer.router.fast = FastWeights(32, 8)
    with torch.no_grad():
        layer.router.fast.delta.normal_(std=3.0)
    after = routing_accuracy(model, BATCHES)
    (one,), (other,) = before.values(), after.values()
    assert one.tolerant_chance == other.tolerant_chance
    assert one.regret < other.regret


def test_judging_leaves_no_trace() -> None:
    model = tiny_moe()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    routing_accuracy(model, BATCHES[:1])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for _, layer in moe_layers(model))
    with pytest.raises(IndexError):
        routing_accuracy(model, [torch.full((1, 4), 10_000)])
    assert not any(layer._forward_pre_hooks for _, layer in moe_layers(model)), "nor does an error in the model"


def test_a_search_too_large_is_refused_with_its_size() -> None:
    model = tiny_moe(num_experts=32, top_k=8)
    with pytest.raises(RoutingError, match="10518300 subsets") as error:
        routing_accuracy(model, BATCHES)
    assert error.value.where and error.value.accepted and error.value.fix


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(RoutingError, match="no MoE layer"):
        routing_accuracy(tiny_gpt2(), BATCHES)


def test_mean_over_layers_passes_over_those_without_a_value() -> None:
    def layer(corrected: float | None) -> LayerAccuracy:
        return LayerAccuracy(0.5, 0.4, corrected, 0.5, 0.25, 0.3, 0.1, 10)

    assert mean_accuracy([layer(0.2), layer(None), layer(0.6)]) == pytest.approx(0.4)
    assert mean_accuracy([layer(None)]) is None
    assert mean_accuracy([]) is None
    assert layer(0.2).as_dict()["tolerant_corrected"] == 0.2
