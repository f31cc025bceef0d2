"""Routers that balance by the choice itself: what steers the choice enters no weight, and the load becomes even."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.layer import moe_layers
from thermoe.routers import base
from thermoe.routers.balanced import ExpertChoiceRouter, SigmoidBiasRouter, SinkhornRouter, ThresholdRouter, sinkhorn
from thermoe.routers.base import Router
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe

D, E, K = 16, 8, 2


def _skewed(router: Any, std: float = 0.3) -> Any:
    """Give a router weights under which some experts are far more popular than others, for inputs with a mean."""
    with torch.no_grad():
        router.weight.normal_(std=std)
    return router


def _inputs(tokens: int = 512) -> torch.Tensor:
    return torch.randn(tokens, D) + 1


def _adapt(router: Router, steps: int, tokens: int = 512) -> RoutingDecision:
    for _ in range(steps):
        decision = router(_inputs(tokens))
        router.observe(decision)
        router.after_step()
    return router(_inputs(4096))


def _cv(decision: RoutingDecision) -> float:
    return float(decision.counts.std(correction=0) / decision.counts.mean())


# sigmoid_bias


def test_the_bias_steers_the_choice_and_enters_no_weight() -> None:
    router = _skewed(SigmoidBiasRouter(D, E, K))
    x = _inputs(64)
    before = router(x)
    router.balance_bias[3] = 10.0
    after = router(x)
    assert (after.expert_index == 3).any(-1).all() and not (before.expert_index == 3).any(-1).all()
    assert torch.equal(after.logits, before.logits) and torch.equal(after.probabilities, before.probabilities)
    scores = torch.sigmoid(x @ router.weight.T).gather(-1, after.expert_index)
    torch.testing.assert_close(after.weights, scores / scores.sum(-1, keepdim=True))


def test_the_choice_is_that_of_biased_sigmoid_scores() -> None:
    router = _skewed(SigmoidBiasRouter(D, E, K))
    router.balance_bias.normal_(std=0.2)
    x = _inputs(64)
    expected = (torch.sigmoid(x @ router.weight.T) + router.balance_bias).topk(K).indices
    assert torch.equal(router(x).expert_index, expected)


def test_saturated_scores_are_still_told_apart() -> None:
    router = SigmoidBiasRouter(D, E, K)
    logits = torch.arange(E).float().flip(0).repeat(2, 1) + 40  # every sigmoid is 1
    assert torch.equal(router.select(logits, logits, RoutingContext(1, 2)), torch.tensor([[0, 1]] * 2))
    logits = logits.flip(-1)
    assert torch.equal(router.select(logits, logits, RoutingContext(1, 2)), torch.tensor([[7, 6]] * 2))


def test_the_bias_moves_by_gamma_against_the_load() -> None:
    router = SigmoidBiasRouter(D, 4, 1, gamma=0.25)
    logits = torch.tensor([[9.0, 0, 0, 0], [9, 0, 0, 0], [9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
    decision = RoutingDecision(logits, logits.softmax(-1), logits.argmax(-1, keepdim=True), torch.ones(5, 1))
    router.observe(decision)
    router.observe(decision)  # two micro-batches: n = 6, 2, 2, 0 against a mean of 2.5
    assert torch.equal(router.balance_bias, torch.zeros(4))
    router.after_step()
    assert torch.equal(router.balance_bias, torch.tensor([-0.25, 0.25, 0.25, 0.25]))
    router.after_step()  # nothing was seen
    assert torch.equal(router.balance_bias, torch.tensor([-0.25, 0.25, 0.25, 0.25]))


def test_the_bias_makes_a_skewed_load_even() -> None:
    router = _skewed(SigmoidBiasRouter(D, E, K, gamma=5e-3)).train()
    before, after = _cv(router(_inputs(4096))), _cv(_adapt(router, 200))
    assert before > 0.5 and after < 0.1


def test_adaptive_state_is_no_parameter_and_stays_precise() -> None:
    for router in (SigmoidBiasRouter(D, E, K), ThresholdRouter(D, E, K)):
        _adapt(router, 3)
        router.observe(router(_inputs()))  # in the middle of a step
        kept = {name: getattr(router, name).clone() for name in router.float32_buffers}
        names = {name for name, _ in router.named_parameters()}
        assert names == {"weight"} and set(router.adaptive) <= set(router.state_dict())
        assert not {"step_counts", "step_sums"} & set(router.state_dict())
        router.bfloat16()
        assert router.weight.dtype == torch.bfloat16
        for name, value in kept.items():
            assert getattr(router, name).dtype == torch.float32 and torch.equal(getattr(router, name), value)


# what holds for all that adapt


@pytest.mark.parametrize("make", [SigmoidBiasRouter, ThresholdRouter])
def test_a_forward_changes_no_state(make: Any) -> None:
    router = _skewed(make(D, E, K)).train()
    _adapt(router, 2)
    state = copy.deepcopy(router.state_dict())
    router(_inputs())
    assert all(torch.equal(value, state[name]) for name, value in router.state_dict().items())


@pytest.mark.parametrize("make", [SigmoidBiasRouter, ThresholdRouter])
def test_ranks_are_added_up(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that see half a batch each come to what one rank comes to that sees it whole (in two micro-batches)."""
    alone, ranks = _skewed(make(D, E, K)), []
    decisions = [alone(_inputs(64)) for _ in range(2)]
    for decision in decisions:
        alone.observe(decision)
        ranks.append(copy.deepcopy(alone))
    alone.after_step()
    sent: list[torch.Tensor] = []

    def gather(values: torch.Tensor) -> torch.Tensor:
        sent.append(values.clone())
        return values

    for module in ("balanced", "dynamic"):
        monkeypatch.setattr(f"thermoe.routers.{module}.sum_over_ranks", gather)
    halves = [copy.deepcopy(ranks[0]) for _ in range(2)]
    for half, decision in zip(halves, decisions, strict=True):
        half.step_counts = half.step_sums = None
        half.observe(decision)
        copy.deepcopy(half).after_step()
    total = sent[0] + sent[1]
    for module in ("balanced", "dynamic"):
        monkeypatch.setattr(f"thermoe.routers.{module}.sum_over_ranks", lambda values: total.clone())
    for half in halves:
        half.after_step()
        for name in alone.adaptive:
            torch.testing.assert_close(getattr(half, name), getattr(alone, name))


def test_one_rank_of_a_process_group_adds_up_to_itself(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert torch.equal(base.sum_over_ranks(torch.arange(3.0)), torch.arange(3.0))
    finally:
        torch.distributed.destroy_process_group()


def test_no_tokens_are_nothing_to_adapt_to() -> None:
    for router in (SigmoidBiasRouter(D, E, K), ThresholdRouter(D, E, K)):
        router.observe(router(torch.zeros(0, D)))
        padded = RoutingContext(1, 4, torch.zeros(4, dtype=torch.bool))
        router.observe(router(torch.randn(4, D), padded))
        router.after_step()
        assert all((getattr(router, name) == 0).all() for name in router.adaptive)


# threshold


def test_the_threshold_is_the_quantile_of_each_expert() -> None:
    router = _skewed(ThresholdRouter(D, E, K, k_min=0))
    decision = router(_inputs(64))
    router.observe(decision)
    router.after_step()
    # 64 * 2 / 8 = 16 tokens of this batch are over each threshold.
    assert ((decision.probabilities > router.cutoff).sum(0) == 16).all()


def test_padding_has_no_say_in_the_thresholds() -> None:
    router = _skewed(ThresholdRouter(D, E, K))
    x, mask = _inputs(96), torch.arange(96) % 3 != 0
    router.observe(router(x, RoutingContext(1, 96, mask)))
    twin = copy.deepcopy(router)
    twin.step_sums = None
    twin.observe(twin(x[mask]))
    router.after_step()
    twin.after_step()
    torch.testing.assert_close(router.cutoff, twin.cutoff)


@pytest.mark.parametrize(("k_min", "tolerance"), [(0, 0.05), (1, 0.15)])
def test_the_threshold_holds_k_on_average_and_the_load_even(k_min: int, tolerance: float) -> None:
    router = _skewed(ThresholdRouter(D, E, K, k_min=k_min)).train()
    before = router(_inputs(4096))
    assert (before.active.sum(-1) == K).all() and _cv(before) > 0.5
    after = _adapt(router, 150)
    used = after.active.sum(-1)
    # Favourites that are kept in any case come on top of the mean, and the cap of 2k takes some away.
    assert float(used.float().mean()) == pytest.approx(K, rel=tolerance)
    assert used.max() <= 2 * K and used.min() >= k_min
    assert len(used.unique()) > 1
    assert _cv(after) < 0.25


def test_the_first_steps_are_averaged_evenly_and_later_ones_forgotten() -> None:
    router = ThresholdRouter(D, 2, 1, ema=0.5)
    seen = []
    for share in (0.2, 0.4, 0.9):
        p = torch.tensor([[share, 1 - share]] * 4)
        router.observe(RoutingDecision(p.log(), p, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)))
        router.after_step()
        seen.append(float(router.cutoff[0]))
    assert seen == pytest.approx([0.2, 0.3, 0.6])


# sinkhorn


@given(st.integers(2, 40), st.integers(2, 8), st.floats(0.1, 3), st.integers(0, 999))
def test_the_plan_has_even_columns_and_unit_rows(tokens: int, experts: int, std: float, seed: int) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * std
    plan = sinkhorn(logits, 300)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.ones(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plan.sum(0), torch.full((experts,), tokens / experts), rtol=2e-2, atol=2e-2)


def test_padding_has_no_share_in_the_plan() -> None:
    logits, real = torch.randn(30, E), torch.arange(30) % 3 != 0
    plan = sinkhorn(logits, 50, real)
    torch.testing.assert_close(plan[real], sinkhorn(logits[real], 50))


def test_sinkhorn_balances_training_and_leaves_evaluation_alone() -> None:
    router = _skewed(SinkhornRouter(D, E, K))
    x = _inputs(2048)
    plain = router.eval()(x)
    assert torch.equal(plain.expert_index, plain.logits.topk(K).indices)
    trained = router.train()(x)
    assert _cv(trained) < 0.3 * _cv(plain)
    assert torch.equal(trained.logits, plain.logits)
    broken = x.clone()
    broken[5] = float("nan")
    index = router(broken).expert_index
    assert ((index >= 0) & (index < E)).all()


# expert_choice


@pytest.mark.parametrize("training", [False, True])
def test_expert_choice_is_exactly_even(training: bool) -> None:
    router = _skewed(ExpertChoiceRouter(D, E, K)).train(training)
    decision = router(_inputs(64), RoutingContext(4, 16))
    assert (decision.counts == 64 * K / E).all()
    assert len(decision.active.sum(-1).unique()) > 1
    for expert in range(E):
        took = (decision.expert_index == expert).any(-1)
        p = decision.probabilities[:, expert]
        assert p[took].min() >= p[~took].max()


def test_expert_choice_counts_real_tokens() -> None:
    router = _skewed(ExpertChoiceRouter(D, E, K)).eval()
    mask = torch.arange(64) % 2 == 0
    decision = router(_inputs(64), RoutingContext(4, 16, mask))
    assert (decision.counts == 32 * K / E).all() and not decision.active[~mask].any()


def test_expert_choice_looks_ahead() -> None:
    router = _skewed(ExpertChoiceRouter(D, E, K)).eval()
    x = _inputs(16)
    before, later = router(x), x.clone()
    later[-1] = 10 * x[0]
    assert not torch.equal(router(later).expert_index[:-1], before.expert_index[:-1])


def test_expert_choice_scores_but_does_not_generate() -> None:
    model = tiny_moe()
    set_router(model, "expert_choice")
    ids = random_tokens(2, 10)
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
    with pytest.raises(RoutingError, match="cannot generate") as error:
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert error.value.where and error.value.accepted and "threshold" in str(error.value.fix)
    layer = next(layer for _, layer in moe_layers(model))
    assert layer.router.train()(torch.randn(4, 32), RoutingContext(4, 1)).counts.sum() > 0


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (SigmoidBiasRouter, "gamma", -1e-3),
        (SigmoidBiasRouter, "gamma", float("nan")),
        (ThresholdRouter, "k_min", 3),
        (ThresholdRouter, "max_experts", 1),
        (ThresholdRouter, "ema", 1.5),
        (SinkhornRouter, "iterations", 0),
        (SinkhornRouter, "iterations", 2.5),
        (ThresholdRouter, "k_min", 0.5),
        (ThresholdRouter, "max_experts", 2.5),
    ],
)
def test_options_outside_their_range_are_refused(make: Any, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} is") as error:
        make(D, E, K, **{option: value})
    assert error.value.where == option and error.value.accepted and error.value.fix
