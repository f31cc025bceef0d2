"""What each balancing loss is, as identities I1 to I10, and which classic forms teach nothing as usually written.

These have no gradient to the router in exact arithmetic:
- std(tokens per expert), and anything else made of counts alone: counts are piecewise constant (I1);
- the language-modelling loss itself, where the combine weights are constant: top-1 with a renormalised weight, which
  is 1, and identical experts with weights that sum to 1, as after a conversion by copies (I10);
- softmax(z / tau) in place of softmax(z): no gradient is missing, but the ranking, and so the choice, stays (I6).
KL(P, uniform) and -H(P) do have gradients, but one and the same (I3), so that stacking them only scales one.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import E, T, balanced, decide, gradient, random_logits
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from thermoe.moe.decision import RoutingContext
from thermoe.moe.losses import (
    LOSSES,
    entropy_loss,
    importance_loss,
    kl_uniform_loss,
    load_std_loss,
    routing_loss,
    switch_hf_loss,
    switch_loss,
)
from thermoe.routers.topk import TopKRouter

seeds = st.integers(0, 10_000)
sizes = st.integers(2, 12)


def _case(seed: int, experts: int, scale: float = 1.0) -> Tensor:
    torch.manual_seed(seed)
    return random_logits(scale, experts=experts)


@given(seeds, sizes, st.data())
def test_i1_counts_have_no_gradient_and_load_std_has_one(seed: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts - 1))
    logits = _case(seed, experts)
    decision = decide(logits, top_k)
    assert not decision.counts.std().requires_grad
    for root in (False, True):
        assert gradient(load_std_loss(decision, root=root), logits).abs().max() > 1e-6


@pytest.mark.parametrize("root", [False, True])
def test_i1_load_std_is_finite_at_exact_balance(root: bool) -> None:
    logits = balanced(2).logits.clone().requires_grad_()
    loss = load_std_loss(decide(logits), root=root)
    assert float(loss.detach()) == pytest.approx(1e-3 if root else 0, abs=1e-4)
    assert torch.isfinite(gradient(loss, logits)).all()


@given(seeds, sizes, st.data())
def test_i2_load_std_is_the_squared_cv_with_twice_the_gradient_of_switch(
    seed: int, experts: int, data: st.DataObject
) -> None:
    logits = _case(seed, experts)
    decision = decide(logits, data.draw(st.integers(1, experts)))
    counts = decision.counts
    expected = (counts.std(correction=0) / counts.mean()) ** 2
    torch.testing.assert_close(load_std_loss(decision), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(load_std_loss(decision, root=True) ** 2, expected + 1e-6, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        gradient(load_std_loss(decision), logits), 2 * gradient(switch_loss(decision), logits), atol=1e-8, rtol=1e-4
    )


@given(seeds, sizes, st.sampled_from([0.1, 1.0, 5.0]))
def test_i3_kl_and_marginal_entropy_are_one_penalty(seed: int, experts: int, scale: float) -> None:
    logits = _case(seed, experts, scale)
    decision = decide(logits, 1)
    marginal = decision.probabilities.mean(0)
    marginal_entropy = -(marginal * marginal.log()).sum()
    kl = kl_uniform_loss(decision)
    torch.testing.assert_close(kl + marginal_entropy, torch.tensor(math.log(experts)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(kl, logits), -gradient(marginal_entropy, logits), atol=1e-7, rtol=1e-3)
    scoped = entropy_loss(decision, scope="marginal")
    torch.testing.assert_close(kl, scoped + math.log(experts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(kl, logits), gradient(scoped, logits), atol=1e-7, rtol=1e-3)


@given(seeds, st.integers(4, 16))
def test_i4_kl_is_half_the_squared_cv_near_balance(seed: int, experts: int) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(1, experts) * 0.02).expand(T, -1).double()
    decision = decide(logits, 1)
    p = decision.probabilities.mean(0)
    half = float((p.std(correction=0) / p.mean()) ** 2) / 2
    for reverse in (False, True):
        divergence = float(_kl_in_double(p, reverse))
        assert divergence == pytest.approx(half, rel=0.05)
        assert float(kl_uniform_loss(decision, reverse=reverse)) == pytest.approx(divergence, abs=1e-6)


def _kl_in_double(p: Tensor, reverse: bool) -> Tensor:
    u = torch.full_like(p, 1 / p.numel())
    first, second = (u, p) if reverse else (p, u)
    return (first * (first / second).log()).sum()


def test_i4_kl_far_from_balance_is_another_thing() -> None:
    collapsed = torch.full((T, E), -100.0)
    collapsed[:, 3] = 100.0
    decision = decide(collapsed)
    assert float(kl_uniform_loss(decision)) == pytest.approx(math.log(E), abs=1e-5)
    assert float(load_std_loss(decide(collapsed, 1))) == pytest.approx(E - 1, abs=1e-4)
    # Seven of eight experts have log p = -200, which no probability in float32 can say.
    assert float(kl_uniform_loss(decision, reverse=True)) == pytest.approx(200 * 7 / 8 - math.log(E), rel=1e-5)
    assert float(kl_uniform_loss(balanced(2))) == pytest.approx(0, abs=1e-6)
    assert float(kl_uniform_loss(balanced(2), reverse=True)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("experts", [2, 5, 8])
def test_i5_entropy_is_least_for_balanced_and_decisive_tokens(experts: int) -> None:
    best = decide(1e3 * torch.eye(experts).repeat(8, 1), 1)
    assert float(entropy_loss(best)) == pytest.approx(-math.log(experts), abs=1e-5)
    undecided = decide(torch.zeros(T, experts), 1)
    assert float(entropy_loss(undecided)) == pytest.approx(0, abs=1e-5)
    collapsed = torch.zeros(T, experts)
    collapsed[:, 0] = 1e3
    assert float(entropy_loss(decide(collapsed, 1))) == pytest.approx(0, abs=1e-5)
    # The naive scope is content with the undecided router, where top-k is arbitrary.
    assert float(entropy_loss(undecided, scope="token")) == pytest.approx(-math.log(experts), abs=1e-5)
    assert float(entropy_loss(best, scope="token")) == pytest.approx(0, abs=1e-5)


@given(seeds, sizes, st.floats(0, 50))
def test_i5_entropy_is_never_below_its_bound(seed: int, experts: int, scale: float) -> None:
    loss = float(entropy_loss(decide(_case(seed, experts, scale), 1)).detach())
    assert -math.log(experts) - 1e-5 <= loss <= 1e-5


@given(seeds, st.floats(0.05, 20.0), st.integers(1, E))
def test_i6_a_temperature_leaves_top_k_alone(seed: int, temperature: float, top_k: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(T, E)
    router = TopKRouter(4, E, top_k, temperature=temperature).eval()
    chosen = router.select(logits, logits.softmax(-1), RoutingContext(1, T))
    assert torch.equal(chosen, logits.topk(top_k, -1).indices)
    tempered = (logits.double() / temperature).softmax(-1)
    assert torch.equal(tempered.topk(top_k, -1).indices, chosen)


def test_i7_sampled_experts_follow_the_tempered_softmax() -> None:
    """Chi-square of the first pick, and of the second given the first, at the 0.1% level."""
    temperature, draws = 2.0, 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    router = TopKRouter(4, 4, 2, temperature=temperature).train()
    rows = logits.expand(draws, -1)
    picks = router.select(rows, rows.softmax(-1), RoutingContext(1, draws))
    assert (picks[:, 0] != picks[:, 1]).all()
    p = (logits / temperature).softmax(-1)
    observed = torch.bincount(picks[:, 0], minlength=4).float()
    chi_square = ((observed - draws * p) ** 2 / (draws * p)).sum()
    assert chi_square < 16.27  # 3 degrees of freedom
    after_zero = picks[picks[:, 0] == 0, 1]
    q = p[1:] / p[1:].sum()
    observed = torch.bincount(after_zero, minlength=4)[1:].float()
    chi_square = ((observed - len(after_zero) * q) ** 2 / (len(after_zero) * q)).sum()
    assert chi_square < 13.82  # 2 degrees of freedom
    untempered = draws * logits.softmax(-1)
    observed = torch.bincount(picks[:, 0], minlength=4).float()
    assert ((observed - untempered) ** 2 / untempered).sum() > 1000, "the temperature is in effect"


@given(sizes, st.data())
def test_i8_switch_is_one_at_balance_for_every_k_and_k_in_the_form_of_transformers(
    experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    decision = balanced(top_k, experts)
    assert float(switch_loss(decision)) == pytest.approx(1, abs=1e-5)
    assert float(switch_hf_loss([decision])) == pytest.approx(top_k, abs=1e-4)
    theirs = load_balancing_loss_func((decision.logits,), experts, top_k)
    assert float(theirs) == pytest.approx(top_k, abs=1e-4)


@given(seeds, sizes, st.data())
def test_i8_switch_hf_is_the_loss_of_transformers(seed: int, experts: int, data: st.DataObject) -> None:
    """Values and gradients, for several layers, with and without padding."""
    top_k = data.draw(st.integers(1, experts))
    layers = [_case(seed + i, experts, scale) for i, scale in enumerate((1.0, 3.0, 0.3))]
    mask = torch.rand(T) < 0.7 if data.draw(st.booleans()) else None
    attention = None if mask is None else mask.view(4, -1).long()
    theirs = load_balancing_loss_func(tuple(layers), experts, top_k, attention)
    ours = switch_hf_loss([decide(z, top_k, mask) for z in layers])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for logits in layers:
        torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), atol=1e-8, rtol=1e-4)
    one = decide(layers[0], top_k, mask)
    torch.testing.assert_close(switch_hf_loss([one]), top_k * switch_loss(one), atol=1e-6, rtol=1e-5)


def test_i9_layers_collapsed_onto_different_experts_do_not_look_balanced() -> None:
    halves = []
    for first in (0, E // 2):
        logits = torch.full((T, E), -20.0)
        logits[:, first : first + E // 2] = torch.randn(T, E // 2)
        halves.append(decide(logits))
    concatenated = routing_loss(halves, {"switch_hf": 0.5})
    ours = routing_loss(halves, {"switch": 1.0})
    assert concatenated is not None and ours is not None
    assert float(concatenated) < 1.1
    assert float(ours) / len(halves) > 1.9


def _router_gradient(gate: str, top_k: int, *, identical: bool, sure: bool = False) -> float:
    """Norm of the gradient of a task's loss by the router's weights."""
    torch.manual_seed(1)
    router = TopKRouter(8, E, top_k, gate=gate)  # type: ignore[arg-type]
    x = torch.randn(32, 8)
    outputs = torch.randn(E + 1, 5)
    if identical:
        outputs = outputs[:1].expand(E + 1, -1)
    decision = router(x)
    weights = decision.weights
    if sure:  # p / sg(p): the value 1, the gradient of log p
        p = decision.probabilities.gather(-1, decision.expert_index)
        weights = p / p.detach()
    y = (weights.unsqueeze(-1) * outputs[decision.expert_index]).sum(1)
    loss = (y * torch.randn(32, 5)).sum()
    return float(torch.autograd.grad(loss, router.weight)[0].norm())


@pytest.mark.parametrize(("top_k", "identical"), [(1, False), (3, True)])
def test_i10_the_zero_gradient_traps_and_their_remedies(top_k: int, identical: bool) -> None:
    reference = _router_gradient("probability", top_k, identical=identical)
    assert _router_gradient("renormalized", top_k, identical=identical) < 1e-5 * reference
    assert _router_gradient("ramped", top_k, identical=identical) > 1e-2 * reference
    assert _router_gradient("probability", top_k, identical=identical, sure=True) > 1e-2 * reference


def test_i10_neither_trap_closes_where_weights_and_experts_differ() -> None:
    reference = _router_gradient("probability", 3, identical=False)
    assert _router_gradient("renormalized", 3, identical=False) > 1e-2 * reference


def test_i10_importance_teaches_nothing_where_the_weights_are_constant() -> None:
    logits = random_logits()
    assert gradient(importance_loss(decide(logits, 1)), logits).abs().max() < 1e-6
    assert gradient(importance_loss(decide(logits, 2)), logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"z_loss"}))
def test_every_balancing_loss_teaches_the_router(name: str) -> None:
    logits = random_logits()
    assert gradient(LOSSES.get(name)(decide(logits)), logits).abs().max() > 1e-5
