"""The baseline router, the gates, fast weights and the random control."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.alternatives import RandomRouter
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FAST_FAMILIES, FastFamily, FastWeights
from thermoe.routers.topk import NoisyTopKRouter, TopKRouter

D, E, K = 10, 6, 3


def _router(**options: object) -> TopKRouter:
    router = TopKRouter(D, E, K, **options).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.normal_()
    return router


def test_takes_the_most_probable_experts_in_order() -> None:
    router, x = _router(), torch.randn(40, D)
    decision = router(x)
    scores = x @ router.weight.T
    torch.testing.assert_close(decision.logits, scores)
    assert torch.equal(decision.expert_index, scores.argsort(-1, descending=True)[:, :K])
    assert decision.active.all()


def test_the_start_breaks_ties_at_random() -> None:
    router = TopKRouter(768, E, 1)
    assert float(router.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(TopKRouter(192, E, 1).weight.detach().std()) == pytest.approx(0.04, rel=0.1)
    assert len(router(torch.randn(100, 768)).opened.nonzero()) > 1


@pytest.mark.parametrize("drop_order", ["position", "probability"])
def test_capacity_acts_in_training_and_only_if_asked_in_evaluation(drop_order: str) -> None:
    router = _router(capacity_factor=0.5, drop_order=drop_order)
    x = torch.randn(24, D)
    assert router(x).active.all()
    router.train()
    counts = router(x).counts
    assert counts.max() == 6  # ceil(0.5 * 24 * 3 / 6)
    router = _router(eval_capacity_factor=0.5, drop_order=drop_order)
    assert router(x).counts.max() == 6
    assert router.train()(x).active.all()


def test_dropped_slots_leave_the_rest_renormalised() -> None:
    router = _router(eval_capacity_factor=0.5)
    decision = router(torch.randn(24, D))
    some = decision.active.any(-1)
    assert not decision.active.all() and some.any()
    torch.testing.assert_close(decision.weights.sum(-1)[some], torch.ones(int(some.sum())))
    assert (decision.weights.sum(-1)[~some] == 0).all()


@pytest.mark.parametrize("field", ["capacity_factor", "eval_capacity_factor", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_values_outside_their_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is") as error:
        _router(**{field: value})
    assert error.value.where == field and error.value.accepted


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'probability'"):
        _router(drop_order="probabilty")
    with pytest.raises(UnknownNameError, match="did you mean 'renormalized'"):
        _router(gate="renormalised")


def test_top_k_outside_its_range_says_what_to_do() -> None:
    with pytest.raises(RoutingError, match="top_k is 7 with 6 experts") as error:
        TopKRouter(D, E, 7)
    assert error.value.where == "top_k" and "1 to 6" in error.value.accepted and error.value.fix


def test_sampling_is_off_in_evaluation_and_on_in_training() -> None:
    router, x = _router(temperature=5.0), torch.randn(200, D)
    first = router(x)
    assert torch.equal(first.expert_index, _as_baseline(router)(x).expert_index)
    router.train()
    sampled = router(x)
    assert not torch.equal(sampled.expert_index, first.expert_index)
    assert torch.equal(sampled.logits, first.logits), "noise is in the choice alone"
    torch.manual_seed(5)
    one = router(x).expert_index
    torch.manual_seed(5)
    assert torch.equal(one, router(x).expert_index)


def _as_baseline(router: TopKRouter) -> TopKRouter:
    baseline = TopKRouter(D, E, K).eval()
    baseline.load_state_dict(router.state_dict())
    return baseline


# --- gates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ramp", [0.0, 0.25, 1.0])
def test_ramped_gate_goes_from_one_to_the_router(ramp: float) -> None:
    router = _router(gate="ramped")
    router.ramp.fill_(ramp)
    decision = router(torch.randn(20, D))
    p = decision.probabilities.gather(-1, decision.expert_index)
    torch.testing.assert_close(decision.weights, (1 - ramp) + ramp * E * p)
    if ramp == 0:
        assert (decision.weights == 1).all(), "exactly 1, so that a partitioned network is exact"


def test_ramped_gate_at_its_start_has_the_gradient_of_the_log_probability() -> None:
    router = _router(gate="ramped")
    p = torch.rand(5, E).requires_grad_()
    index = torch.arange(5).unsqueeze(1)
    (gradient,) = torch.autograd.grad(router.combine_weights(p, index).sum(), p)
    torch.testing.assert_close(gradient.gather(1, index), 1 / p.detach().gather(1, index))


@pytest.mark.parametrize("gate", ["renormalized", "probability", "ramped"])
def test_gates_survive_probabilities_of_zero(gate: str) -> None:
    router = _router(gate=gate)
    p = torch.zeros(2, E)
    p[0, 0] = 1.0
    p.requires_grad_()
    weights = router.combine_weights(p, torch.tensor([[0, 1, E], [1, 2, 3]]))
    assert torch.isfinite(weights).all()
    (gradient,) = torch.autograd.grad(weights.sum(), p)
    assert torch.isfinite(gradient).all()


def test_combine_weights_take_any_leading_shape() -> None:
    router = _router()
    p = torch.rand(4, 7, E)
    index = torch.randint(0, E + 1, (4, 7, 2))
    together = router.combine_weights(p, index)
    apart = torch.stack([router.combine_weights(p[i], index[i]) for i in range(4)])
    assert torch.equal(together, apart)


def test_the_base_chooses_nothing() -> None:
    with pytest.raises(NotImplementedError):
        Router(D, E, K)(torch.randn(2, D))


# --- fast weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_fast_weights_start_as_nothing_and_add_up(family: FastFamily) -> None:
    router, x = _router(), torch.randn(30, D)
    before = router(x)
    router.fast = FastWeights(D, E, family, rank=3)
    if family == "mix":
        router.fast.set_statistics(before.logits.mean(0), before.logits.std(0, correction=0))
    after = router(x)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.weights, before.weights)
    with torch.no_grad():
        for parameter in router.fast.parameters():
            parameter.normal_()
    expected = before.logits + router.fast.delta
    if router.fast.matrix is not None:
        zbar = (before.logits - before.logits.mean(0)) / before.logits.std(0, correction=0)
        low = x @ router.fast.directions.T if family == "low_rank" else x
        expected = expected + (zbar if family == "mix" else low) @ router.fast.matrix.T
    torch.testing.assert_close(router(x).logits, expected)
    assert torch.equal(router.slow_scores(x), before.logits)
    router.fast.reset()
    assert torch.equal(router(x).logits, before.logits)


def test_fast_weights_are_float32_in_a_half_precision_router() -> None:
    router = _router().bfloat16()
    router.fast = FastWeights(D, E)
    x = torch.randn(5, D, dtype=torch.bfloat16)
    with torch.no_grad():
        router.fast.delta.fill_(1e-4)
    torch.testing.assert_close(router(x).logits - router.slow_scores(x), torch.full((5, E), 1e-4), atol=2e-6, rtol=0)


def test_active_top_k_stands_in_for_top_k() -> None:
    router, x = _router(), torch.randn(9, D)
    router.active_top_k = 1
    assert router(x).expert_index.shape == (9, 1)
    router.active_top_k = None
    assert router(x).expert_index.shape == (9, K)


# --- the random control ----------------------------------------------------------------------------------------------


def test_random_router_takes_every_set_equally_often() -> None:
    """Chi-square over the 20 sets of 3 of 6 experts, at the 0.1% level; and over the first pick."""
    tokens = 20_000
    router = RandomRouter(D, E, K).eval()
    index = router(torch.randn(tokens, D)).expert_index
    assert (index.sort(-1).values.diff(dim=-1) > 0).all(), "distinct experts"
    sets = {subset: i for i, subset in enumerate(combinations(range(E), K))}
    found = torch.tensor([sets[tuple(row)] for row in index.sort(-1).values.tolist()])
    for observed, cells, limit in (
        (torch.bincount(found, minlength=len(sets)), len(sets), 43.82),
        (torch.bincount(index[:, 0], minlength=E), E, 20.52),
    ):
        expected = tokens / cells
        assert float(((observed - expected) ** 2 / expected).sum()) < limit


def test_random_router_is_blind_to_which_expert_is_good() -> None:
    router = _router()
    random = RandomRouter(D, E, 1).eval()
    random.load_state_dict(router.state_dict())
    x = torch.randn(20_000, D)
    agree = (random(x).expert_index == router(x).expert_index[:, :1]).float().mean()
    assert float(agree) == pytest.approx(1 / E, abs=0.01)


def test_random_router_is_a_function_of_the_scores_of_the_token_alone() -> None:
    router, logits = RandomRouter(D, E, K).eval(), torch.randn(50, E)
    together = router.select(logits, logits.softmax(-1), RoutingContext(10, 5))
    order = torch.randperm(50)
    shuffled = router.select(logits[order], logits[order].softmax(-1), RoutingContext(1, 50))
    assert torch.equal(shuffled, together[order])


def test_noise_acts_in_training_and_its_size_learns() -> None:
    router = NoisyTopKRouter(D, E, K)
    with torch.no_grad():
        router.weight.normal_()
    x = torch.randn(4000, D)
    clean = x @ router.weight.T
    torch.testing.assert_close(router.eval()(x).logits, clean)
    router.train()
    noise = (router(x).logits - clean).detach()
    assert float(noise.std()) == pytest.approx(math.log(2), rel=0.05)  # softplus(0)
    assert abs(float(noise.mean())) < 0.02
    with torch.no_grad():
        router.noise_weight.copy_(torch.full((E, D), 0.0)).index_fill_(0, torch.tensor([2]), -50.0)
    sure = (x.sum(-1) > 1).nonzero().flatten()
    assert float((router(x).logits - clean)[sure, 2].detach().abs().max()) < 1e-6
    decision = router(x)
    assert torch.equal(decision.expert_index, decision.logits.topk(K).indices)  # the noise is in the choice ...
    torch.testing.assert_close(
        decision.probabilities, decision.logits.softmax(-1)
    )  # ... and in the weights, as in the paper
    (decision.weights * torch.randn(4000, K)).sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().max() > 0
    assert router.noise_weight.grad is not None and router.noise_weight.grad.abs().max() > 0


def test_noisy_top_k_takes_a_capacity() -> None:
    router = NoisyTopKRouter(D, E, K, capacity_factor=0.5).train()
    assert router(torch.randn(24, D)).counts.max() <= 6
