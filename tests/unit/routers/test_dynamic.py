"""Dynamic k: the top-p set is the smallest, its threshold follows a target, and sharing is for decode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermoe.errors import ConfigError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.dynamic import MassKeepRouter, OpenedExpertsRouter, TopPRouter

D, E = 16, 8


def _router(make: Any, top_k: int, std: float = 0.3, **options: Any) -> Any:
    router = make(D, E, top_k, **options).eval()
    with torch.no_grad():
        router.weight.normal_(std=std)
    return router


@given(st.floats(0, 1), st.integers(1, 3), st.integers(0, 999))
def test_the_top_p_set_is_the_smallest_that_reaches_theta(theta: float, k_min: int, seed: int) -> None:
    router = TopPRouter(D, E, E, theta=theta, k_min=k_min)
    logits = torch.randn(20, E, generator=torch.Generator().manual_seed(seed))
    p = logits.softmax(-1)
    index = router.select(logits, p, RoutingContext(1, 20))
    limit = float(router.theta)
    for token in range(20):
        chosen = index[token][index[token] < E]
        mass = p[token][chosen].tolist()
        assert mass == sorted(mass, reverse=True) and set(chosen.tolist()) == set(
            p[token].topk(len(mass)).indices.tolist()
        )
        assert len(mass) >= k_min
        assert len(mass) == E or len(mass) == k_min or sum(mass) >= limit - 1e-6
        if len(mass) > k_min:
            assert sum(mass[:-1]) < limit + 1e-6


def test_top_p_stops_at_top_k() -> None:
    router = _router(TopPRouter, 3, theta=1.0)
    assert (router(torch.randn(30, D)).active.sum(-1) == 3).all()
    router = _router(TopPRouter, 3, theta=0.0)
    decision = router(torch.randn(30, D))
    assert (decision.active.sum(-1) == 1).all()
    assert torch.equal(decision.expert_index[:, 0], decision.logits.argmax(-1))


@pytest.mark.parametrize("std", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("target", [1.5, 2.0, 3.0])
def test_theta_is_steered_to_the_wished_k(std: float, target: float) -> None:
    router = _router(TopPRouter, 4, std, target_k=target).train()
    used = []
    for _ in range(200):
        decision = router(torch.randn(256, D))
        router.observe(decision)
        router.after_step()
        used.append(float(decision.active.float().sum(-1).mean()))
    assert sum(used[-50:]) / 50 == pytest.approx(target, rel=0.05)


def test_theta_stays_without_a_target_or_without_tokens() -> None:
    for options in ({}, {"target_k": 2.0}):
        router = _router(TopPRouter, 4, **options)
        if not options:
            router.observe(router(torch.randn(64, D)))
        router.after_step()
        assert float(router.theta) == pytest.approx(0.4) and float(router.k_error) == 0


def test_padding_is_not_counted_in_the_mean() -> None:
    router = _router(TopPRouter, 4, target_k=2.0)
    mask = torch.arange(40) < 10
    decision = router(torch.randn(40, D), RoutingContext(1, 40, mask))
    router.observe(decision)
    assert router.step_sums.tolist() == [float(decision.active.sum()), 10.0]


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 999))
def test_oea_keeps_favourites_and_opens_no_more_than_they_do(k0: int, batch: int, seed: int) -> None:
    router = OpenedExpertsRouter(D, E, 3, k0=k0)
    logits = torch.randn(batch, E, generator=torch.Generator().manual_seed(seed))
    index = router.select(logits, logits.softmax(-1), RoutingContext(batch, 1))
    own = logits.topk(k0).indices
    union = set(own.flatten().tolist())
    for token in range(batch):
        chosen = set(index[token][index[token] < E].tolist())
        best = sorted(union, key=lambda e: -float(logits[token, e]))[:3]
        assert chosen == set(best) >= set(own[token].tolist())


def test_k0_of_k_is_top_k_and_half_of_k_is_the_default() -> None:
    x, context = torch.randn(6, D), RoutingContext(6, 1)
    router = _router(OpenedExpertsRouter, 3, k0=3)
    assert torch.equal(router(x, context).expert_index, router(x, context).logits.topk(3).indices)
    assert torch.equal(
        _same(router, OpenedExpertsRouter(D, E, 3))(x, context).expert_index,
        _same(router, OpenedExpertsRouter(D, E, 3, k0=2))(x, context).expert_index,
    )


def _same(router: Any, other: Any) -> Any:
    other.load_state_dict(router.state_dict())
    return other.eval()


@pytest.mark.parametrize(("make", "options"), [(OpenedExpertsRouter, {"k0": 1}), (MassKeepRouter, {"keep": 2})])
def test_sharing_acts_at_decode_or_where_it_is_asked_for(make: Any, options: dict[str, int]) -> None:
    x = torch.randn(24, D)
    plain, decode = RoutingContext(6, 4), RoutingContext(6, 1)
    router = _router(make, 3, **options)
    assert torch.equal(router(x, plain).expert_index, router(x, plain).logits.topk(3).indices)
    grouped = _same(router, make(D, E, 3, group_by_position=True, **options))(x, plain)
    for position in range(4):  # a prompt scored in decode grouping is the decode of each position
        rows = torch.arange(6) * 4 + position
        assert torch.equal(grouped.expert_index[rows], router(x[rows], decode).expert_index)
    alone = _same(router, make(D, E, 3, batch_invariant=True, **options))
    assert torch.equal(alone(x[:6], decode).expert_index, alone(x[:6], decode).logits.topk(3).indices)
    assert not torch.equal(router(x[:6], decode).expert_index, alone(x[:6], decode).expert_index)


def test_padding_opens_nothing_for_others() -> None:
    x, mask = torch.randn(6, D), torch.tensor([True, False, True, True, False, True])
    for router in (_router(OpenedExpertsRouter, 3, k0=1), _router(MassKeepRouter, 3, keep=3)):
        padded = router(x, RoutingContext(6, 1, mask))
        assert torch.equal(padded.expert_index[mask], router(x[mask], RoutingContext(4, 1)).expert_index)


def test_mass_keep_keeps_the_experts_of_most_mass() -> None:
    router = _router(MassKeepRouter, 2, keep=3)
    decision = router(torch.randn(10, D), RoutingContext(10, 1))
    kept = set(decision.probabilities.sum(0).topk(3).indices.tolist())
    assert set(decision.opened.nonzero().flatten().tolist()) <= kept
    assert decision.active.all()


@pytest.mark.parametrize(
    ("make", "option", "value"),
    [
        (TopPRouter, "theta", 1.2),
        (TopPRouter, "k_min", 0),
        (TopPRouter, "target_k", 4.5),
        (TopPRouter, "kp", -1),
        (TopPRouter, "ki", "much"),
        (OpenedExpertsRouter, "k0", 0),
        (OpenedExpertsRouter, "k0", 5),
        (OpenedExpertsRouter, "k0", 1.5),
        (MassKeepRouter, "keep", 9),
        (MassKeepRouter, "keep", 4.0),
        (TopPRouter, "k_min", 1.5),
    ],
)
def test_options_outside_their_range_are_refused(make: Any, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option} is") as error:
        make(D, E, 4, **{option: value})
    assert error.value.where == option and error.value.accepted and error.value.fix
