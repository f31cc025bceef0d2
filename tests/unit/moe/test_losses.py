"""The auxiliary losses: values, padding, extremes, and how terms and layers are put together."""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import E, T, decide, gradient, random_logits

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.losses import (
    DEFAULT_BALANCE,
    DEFAULT_COEFFICIENTS,
    LOSSES,
    check_loss_terms,
    default_balance,
    entropy_loss,
    kl_uniform_loss,
    routing_loss,
    switch_hf_loss,
    switch_loss,
    z_loss,
)


def test_registered() -> None:
    assert set(LOSSES) >= {"switch", "load_std", "entropy", "kl_uniform", "z_loss"}
    assert all(LOSSES.get(name)(decide(random_logits())).ndim == 0 for name in LOSSES)


def test_entropy_makes_tokens_decisive_where_the_naive_form_makes_them_arbitrary() -> None:
    start = torch.randn(T, E)
    ends = {}
    for name in ("ours", "naive"):
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for _ in range(100):
            p = logits.softmax(-1)
            loss = entropy_loss(decide(logits)) if name == "ours" else (p * p.log()).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[name] = float(torch.special.entr(logits.detach().softmax(-1)).sum(-1).mean())
    assert ends["ours"] < 0.2 < 2.0 < ends["naive"]


def test_switch_is_the_number_of_experts_when_collapsed() -> None:
    logits = torch.zeros(T, E)
    logits[:, 2] = 1e3
    assert float(switch_loss(decide(logits, 1))) == pytest.approx(E, rel=1e-5)


def test_z_loss_is_the_mean_squared_log_partition() -> None:
    logits = random_logits()
    expected = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / T
    assert float(z_loss(decide(logits)).detach()) == pytest.approx(expected, rel=1e-5)
    assert bool(z_loss(decide(logits + 10)) > z_loss(decide(logits)))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_masked_tokens_count_for_nothing(name: str) -> None:
    logits = random_logits()
    mask = torch.rand(T) < 0.6
    masked = LOSSES.get(name)(decide(logits, mask=mask))
    alone = LOSSES.get(name)(decide(logits[mask]))
    torch.testing.assert_close(masked, alone, atol=1e-6, rtol=1e-5)
    assert (gradient(masked, logits)[~mask] == 0).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nothing_but_padding_is_finite(name: str) -> None:
    logits = random_logits()
    loss = LOSSES.get(name)(decide(logits, mask=torch.zeros(T, dtype=torch.bool)))
    assert torch.isfinite(loss) and torch.isfinite(gradient(loss, logits)).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_very_decisive_router_has_a_finitegradient(name: str) -> None:
    """Probabilities that underflow to 0 must not turn 0 log 0 into NaN."""
    logits = (1e3 * torch.eye(E)[torch.arange(T) % 3]).requires_grad_()
    assert int((logits.softmax(-1) == 0).sum()) > 0
    assert torch.isfinite(gradient(LOSSES.get(name)(decide(logits)), logits)).all()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_tokens_are_finite(name: str) -> None:
    assert torch.isfinite(LOSSES.get(name)(decide(torch.zeros(0, E))))


def test_losses_add_over_layers_and_over_terms() -> None:
    first, second = decide(random_logits()), decide(random_logits(3.0))
    terms = {"switch": 0.5, "z_loss": 0.25, "entropy": 0.0}
    expected = sum(0.5 * switch_loss(d) + 0.25 * z_loss(d) for d in (first, second))
    torch.testing.assert_close(routing_loss([first, second], terms), expected)
    assert routing_loss([], terms) is None
    assert routing_loss([first], {"switch": 0.0}) is None


def test_switch_hf_joins_the_layers_and_the_others_add_over_them() -> None:
    first, second = decide(random_logits()), decide(random_logits(3.0))
    terms = {"switch": 0.5, "switch_hf": 0.25}
    expected = 0.5 * (switch_loss(first) + switch_loss(second)) + 0.25 * switch_hf_loss([first, second])
    torch.testing.assert_close(routing_loss([first, second], terms), expected)


def test_switch_hf_refuses_layers_of_unequal_size() -> None:
    with pytest.raises(RoutingError, match=r"\[4, 8\] experts"):
        switch_hf_loss([decide(random_logits()), decide(random_logits(experts=4))])


def test_entropy_refuses_an_unknown_scope() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'marginal'"):
        entropy_loss(decide(random_logits()), scope="marginl")  # type: ignore[arg-type]


def test_importance_is_the_squared_cv_of_the_summed_weights() -> None:
    decision = decide(random_logits())
    summed = [0.0] * E
    for experts, weights in zip(decision.expert_index.tolist(), decision.weights.tolist(), strict=True):
        for e, w in zip(experts, weights, strict=True):
            summed[e] += w
    mean = sum(summed) / E
    expected = sum((v - mean) ** 2 for v in summed) / E / mean**2
    assert float(LOSSES.get("importance")(decision).detach()) == pytest.approx(expected, rel=1e-4)


def test_reverse_kl_still_pulls_where_the_probability_underflows() -> None:
    logits = torch.zeros(T, E)
    logits[:, 0] = -200.0
    logits.requires_grad_()
    decision = decide(logits)
    assert (decision.probabilities[:, 0] == 0).all()
    assert gradient(kl_uniform_loss(decision), logits)[:, 0].abs().max() == 0
    assert (gradient(kl_uniform_loss(decision, reverse=True), logits)[:, 0] < -1e-4).all()


@pytest.mark.parametrize(
    "pair", [("kl_uniform", "load_std"), ("switch", "load_std_root"), ("entropy_marginal", "kl_uniform_reverse")]
)
def test_stacking_two_names_of_one_penalty_warns(pair: tuple[str, str]) -> None:
    with pytest.warns(UserWarning, match="penalise the same thing"):
        check_loss_terms(dict.fromkeys(pair, 0.1))


def test_every_loss_of_ours_has_a_usual_coefficient() -> None:
    assert set(DEFAULT_COEFFICIENTS) == set(LOSSES)
    assert default_balance("load_std_root") == DEFAULT_BALANCE
    assert default_balance("z_loss") == {"z_loss": 1e-3}
    for name in LOSSES:
        terms = check_loss_terms(default_balance(name))  # no warning: the two terms are not alike
        assert terms[name] == DEFAULT_COEFFICIENTS[name] > 0
    with pytest.raises(UnknownNameError, match="did you mean 'entropy'") as unknown:
        default_balance("entropi", where="train.balance")
    assert unknown.value.where == "train.balance"


def test_a_loss_from_elsewhere_needs_its_coefficient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES._entries, "of_a_third_party", switch_loss)
    with pytest.raises(ConfigError, match="no usual coefficient"):
        default_balance("of_a_third_party")


def test_terms_are_checked() -> None:
    assert check_loss_terms(DEFAULT_BALANCE) == DEFAULT_BALANCE
    assert check_loss_terms({"kl_uniform": 0.1, "load_std": 0}) == {"kl_uniform": 0.1, "load_std": 0.0}
    with pytest.raises(UnknownNameError, match="did you mean 'switch'") as unknown:
        check_loss_terms({"swtch": 1.0}, where="training.balance")
    assert unknown.value.where == "training.balance.swtch"
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="coefficient of switch"):
            check_loss_terms({"switch": bad})
