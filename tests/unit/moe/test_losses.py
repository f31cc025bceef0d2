"""The auxiliary losses: values, gradients, and the identities that tell each cure from its naive form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.losses import (
    DEFAULT_BALANCE,
    LOSSES,
    check_loss_terms,
    entropy_loss,
    kl_uniform_loss,
    load_std_loss,
    routing_loss,
    switch_loss,
    z_loss,
)
from thermoe.routers.topk import TopKRouter

E, T = 8, 64


def _decide(logits: Tensor, top_k: int = 2, mask: Tensor | None = None) -> RoutingDecision:
    index = logits.topk(top_k, -1).indices
    if mask is not None:
        index = torch.where(mask.unsqueeze(-1), index, logits.shape[-1])
    return RoutingDecision(logits, logits.softmax(-1), index, torch.ones(index.shape), mask)


def _logits(scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(T, E) + torch.linspace(0, 1, E)).requires_grad_()


def _balanced(top_k: int) -> RoutingDecision:
    """Every expert equally often chosen and equally probable."""
    offsets = torch.arange(T).unsqueeze(1) + torch.arange(E)
    logits = torch.zeros(T, E).scatter(1, offsets % E, -torch.arange(E).float().expand(T, -1))
    return _decide(logits, top_k)


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_registered() -> None:
    assert set(LOSSES) >= {"switch", "load_std", "entropy", "kl_uniform", "z_loss"}
    assert all(LOSSES.get(name)(_decide(_logits())).ndim == 0 for name in LOSSES)


def test_the_naive_spread_of_counts_has_no_gradient_and_load_std_has_one() -> None:
    logits = _logits()
    decision = _decide(logits)
    assert not decision.counts.std().requires_grad
    assert _gradient(load_std_loss(decision), logits).abs().max() > 1e-4


def test_load_std_is_finite_at_exact_balance() -> None:
    logits = _balanced(2).logits.clone().requires_grad_()
    loss = load_std_loss(_decide(logits))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(_gradient(loss, logits)).all()


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_std_is_the_squared_cv_of_the_counts_with_twice_the_gradient_of_switch(top_k: int) -> None:
    logits = _logits()
    decision = _decide(logits, top_k)
    counts = decision.counts
    expected = (counts.std(correction=0) / counts.mean()) ** 2
    torch.testing.assert_close(load_std_loss(decision), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        _gradient(load_std_loss(decision), logits), 2 * _gradient(switch_loss(decision), logits), atol=1e-8, rtol=1e-4
    )


def test_kl_and_marginal_entropy_are_one_penalty() -> None:
    logits = _logits()
    decision = _decide(logits)
    marginal = decision.probabilities.mean(0)
    marginal_entropy = -(marginal * marginal.log()).sum()
    kl = kl_uniform_loss(decision)
    torch.testing.assert_close(kl + marginal_entropy, torch.tensor(math.log(E)))
    torch.testing.assert_close(_gradient(kl, logits), -_gradient(marginal_entropy, logits), atol=1e-8, rtol=1e-4)


def test_kl_is_half_the_squared_cv_near_balance() -> None:
    decision = _decide(torch.randn(T, E) * 0.05)
    p = decision.probabilities.mean(0)
    squared_cv = (p.std(correction=0) / p.mean()) ** 2
    assert float(kl_uniform_loss(decision)) == pytest.approx(float(squared_cv) / 2, rel=0.05)


def test_kl_at_its_extremes() -> None:
    collapsed = torch.full((T, E), -100.0)
    collapsed[:, 3] = 100.0
    assert float(kl_uniform_loss(_decide(collapsed))) == pytest.approx(math.log(E), abs=1e-5)
    assert float(kl_uniform_loss(_balanced(2))) == pytest.approx(0, abs=1e-6)


def test_entropy_is_least_for_balanced_and_decisive_tokens() -> None:
    best = _decide(1e3 * torch.eye(E).repeat(T // E, 1), 1)
    assert float(entropy_loss(best)) == pytest.approx(-math.log(E), abs=1e-5)
    undecided = _decide(torch.zeros(T, E), 1)
    assert float(entropy_loss(undecided)) == pytest.approx(0, abs=1e-5)
    collapsed = torch.zeros(T, E)
    collapsed[:, 0] = 1e3
    assert float(entropy_loss(_decide(collapsed, 1))) == pytest.approx(0, abs=1e-5)
    for _ in range(20):
        assert float(entropy_loss(_decide(3 * torch.randn(T, E)))) > -math.log(E)


def test_entropy_makes_tokens_decisive_where_the_naive_form_makes_them_arbitrary() -> None:
    start = torch.randn(T, E)
    ends = {}
    for name in ("ours", "naive"):
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(100):
            p = logits.softmax(-1)
            loss = entropy_loss(_decide(logits)) if name == "ours" else (p * p.log()).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[name] = float(torch.special.entr(logits.detach().softmax(-1)).sum(-1).mean())
    assert ends["ours"] < 0.2 < 2.0 < ends["naive"]


@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_switch_is_one_at_balance_for_every_k(top_k: int) -> None:
    assert float(switch_loss(_balanced(top_k))) == pytest.approx(1, abs=1e-5)


def test_switch_is_the_number_of_experts_when_collapsed() -> None:
    logits = torch.zeros(T, E)
    logits[:, 2] = 1e3
    assert float(switch_loss(_decide(logits, 1))) == pytest.approx(E, rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_switch_is_the_form_of_transformers_divided_by_k(top_k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(T, E)
    theirs = load_balancing_loss_func((logits,), E, top_k)
    torch.testing.assert_close(switch_loss(_decide(logits, top_k)) * top_k, theirs)


def test_layers_collapsed_onto_different_experts_do_not_look_balanced() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    halves = []
    for first in (0, E // 2):
        logits = torch.full((T, E), -20.0)
        logits[:, first : first + E // 2] = torch.randn(T, E // 2)
        halves.append(logits)
    concatenated = float(load_balancing_loss_func(tuple(halves), E, 2)) / 2
    ours = float(routing_loss([_decide(z) for z in halves], {"switch": 1.0}))  # type: ignore[arg-type]
    assert concatenated < 1.1
    assert ours > 1.9


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = _logits()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / T
    assert float(z_loss(_decide(logits)).detach()) == pytest.approx(expected, rel=1e-5)
    assert bool(z_loss(_decide(logits + 10)) > z_loss(_decide(logits)))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_masked_tokens_count_for_nothing(name: str) -> None:
    logits = _logits()
    mask = torch.rand(T) < 0.6
    masked = LOSSES.get(name)(_decide(logits, mask=mask))
    alone = LOSSES.get(name)(_decide(logits[mask]))
    torch.testing.assert_close(masked, alone, atol=1e-6, rtol=1e-5)
    assert (_gradient(masked, logits)[~mask] == 0).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nothing_but_padding_is_finite(name: str) -> None:
    logits = _logits()
    loss = LOSSES.get(name)(_decide(logits, mask=torch.zeros(T, dtype=torch.bool)))
    assert torch.isfinite(loss) and torch.isfinite(_gradient(loss, logits)).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_very_decisive_router_has_a_finite_gradient(name: str) -> None:
    """Probabilities that underflow to 0 must not turn 0 log 0 into NaN."""
    logits = (1e3 * torch.eye(E)[torch.arange(T) % 3]).requires_grad_()
    assert int((logits.softmax(-1) == 0).sum()) > 0
    assert torch.isfinite(_gradient(LOSSES.get(name)(_decide(logits)), logits)).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_tokens_are_finite(name: str) -> None:
    assert torch.isfinite(LOSSES.get(name)(_decide(torch.zeros(0, E))))


def test_top_k_does_not_see_a_temperature() -> None:
    logits = torch.randn(T, E)
    for temperature in (0.1, 0.5, 2.0, 10.0):
        router = TopKRouter(4, E, 3, temperature=temperature).eval()
        chosen = router.select(logits, logits.softmax(-1), RoutingContext(1, T))
        assert torch.equal(chosen, logits.topk(3, -1).indices)
        assert torch.equal((logits / temperature).topk(3, -1).indices, chosen)


def test_sampled_experts_follow_the_tempered_softmax() -> None:
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


@pytest.mark.parametrize("gate", ["probability", "ramped"])
def test_zero_gradient_traps_and_their_remedies(gate: str) -> None:
    """With renormalised weights, top-1 (weight 1) and identical experts (weights sum to 1) teach the router nothing."""

    def gradient(gate: str, top_k: int, *, identical: bool) -> float:
        torch.manual_seed(1)
        router = TopKRouter(8, E, top_k, gate=gate)  # type: ignore[arg-type]
        x = torch.randn(32, 8)
        outputs = torch.randn(E + 1, 5)
        if identical:
            outputs = outputs[:1].expand(E + 1, -1)
        decision = router(x)
        y = (decision.weights.unsqueeze(-1) * outputs[decision.expert_index]).sum(1)
        loss = (y * torch.randn(32, 5)).sum()
        return float(torch.autograd.grad(loss, router.weight)[0].norm())

    for top_k, identical in ((1, False), (3, True)):
        reference = gradient("probability", top_k, identical=identical)
        assert gradient("renormalized", top_k, identical=identical) < 1e-5 * reference
        assert gradient(gate, top_k, identical=identical) > 1e-2 * reference


def test_losses_average_over_layers_and_add_over_terms() -> None:
    first, second = _decide(_logits()), _decide(_logits(3.0))
    terms = {"switch": 0.5, "z_loss": 0.25, "entropy": 0.0}
    expected = sum(0.5 * switch_loss(d) + 0.25 * z_loss(d) for d in (first, second)) / 2
    torch.testing.assert_close(routing_loss([first, second], terms), expected)
    assert routing_loss([], terms) is None
    assert routing_loss([first], {"switch": 0.0}) is None


def test_stacking_two_names_of_one_penalty_warns() -> None:
    with pytest.warns(UserWarning, match="penalise the same thing"):
        check_loss_terms({"kl_uniform": 0.1, "load_std": 0.1})


def test_terms_are_checked() -> None:
    assert check_loss_terms(DEFAULT_BALANCE) == DEFAULT_BALANCE
    assert check_loss_terms({"kl_uniform": 0.1, "load_std": 0}) == {"kl_uniform": 0.1, "load_std": 0.0}
    with pytest.raises(UnknownNameError, match="did you mean 'switch'") as unknown:
        check_loss_terms({"swtch": 1.0}, where="training.balance")
    assert unknown.value.where == "training.balance.swtch"
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="coefficient of switch"):
            check_loss_terms({"switch": bad})
