"""Learning costs what the bucket allows, is always counted, and becomes rarer where it does not pay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading_model import batches, trained_model

from thermoe.adapt.learning_bucket import GAIN_WINDOW, MOST_INTERVAL, Cadence, LearningBucket
from thermoe.adapt.learning_costs import LearningCosts
from thermoe.adapt.learning_work import is_serving
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.energy.cost_model import CostModel
from thermoe.energy.work import ModelWork
from thermoe.errors import CheckpointError, ConfigError
from thermoe.moe.layer import collect_routing
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe


@given(
    st.floats(0.01, 1.0),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 5), st.floats(0, 1)), min_size=1, max_size=60),
)
def test_t17_what_is_spent_is_bounded_by_what_was_served(frac: float, work: list[tuple[float, float, float]]) -> None:
    """Spent <= frac * served + one update, whatever comes in whatever order; the first may come at once."""
    bucket, first = LearningBucket(frac), None
    for served_j, most_j, share in work:
        bucket.earn(served_j)
        if bucket.allows(most_j):
            first = most_j if first is None else first
            bucket.spend(share * most_j)
        assert bucket.level_j is not None and bucket.level_j >= -1e-9
        assert first is not None, "the bucket starts full"
        assert bucket.spent_j <= frac * bucket.served_j + first + 1e-9
        assert bucket.capacity_j is not None and bucket.level_j <= bucket.capacity_j + 1e-9


def test_a_bucket_fills_up_to_one_update_and_no_further() -> None:
    bucket = LearningBucket(0.1)
    assert bucket.level_j is None and bucket.allows(2.0)
    bucket.spend(2.0)
    assert not bucket.allows(2.0)
    bucket.earn(19.0)
    assert not bucket.allows(2.0) and bucket.level_j == pytest.approx(1.9)
    bucket.earn(1000.0)
    assert bucket.allows(2.0) and bucket.level_j == bucket.capacity_j == 2.0
    assert not bucket.allows(3.0), "a dearer one waits until it is earned"
    bucket.earn(10.0)
    assert bucket.allows(3.0)


def test_no_cap_and_nothing_allowed() -> None:
    free, closed = LearningBucket(None), LearningBucket(0)
    assert free.allows(1e9) and not closed.allows(1e-9)
    free.spend(5.0)
    assert free.spent_j == 5.0, "always counted"


@pytest.mark.parametrize("frac", [-0.1, 1.1, math.nan, math.inf, "x", True])
def test_a_bucket_of_no_share(frac: Any) -> None:
    with pytest.raises(ConfigError) as error:
        LearningBucket(frac)
    assert error.value.where == "adapt.bucket"


@pytest.mark.parametrize("energy_j", [-1, math.nan, math.inf, "x", None, True])
def test_joules_that_are_none(energy_j: Any) -> None:
    bucket = LearningBucket()
    with pytest.raises(ConfigError):
        bucket.earn(energy_j)
    assert bucket.served_j == 0


def test_the_state_of_a_bucket() -> None:
    bucket, other = LearningBucket(0.1), LearningBucket(0.1)
    bucket.allows(2.0)
    bucket.spend(1.5)
    bucket.earn(3.0)
    other.load_state_dict(bucket.state_dict())
    assert other.state_dict() == bucket.state_dict()
    with pytest.raises(CheckpointError):
        other.load_state_dict({"level_j": 1})
    assert other.state_dict() == bucket.state_dict()


# -- in the adapter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frac", [0.05, 0.3])
def test_t17_learning_stays_inside_the_bucket_and_is_counted(frac: float) -> None:
    model = trained_model()
    guards = Safeguards(judge_tokens=252)
    with RouterAdapter(model, bucket=frac, held_frac=0.25, safeguards=guards) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in batches("code", 60)]
        first_j = adapter.bucket.capacity_j
        assert first_j is not None
        assert adapter.ledger.energy_j <= frac * adapter.bucket.served_j + first_j
        assert adapter.ledger.energy_j == pytest.approx(sum(step.learning_j for step in steps))
        assert adapter.ledger.energy_j == pytest.approx(sum(work.energy_j for work in adapter.ledger.take()))
        assert adapter.ledger.energy_j == pytest.approx(adapter.bucket.spent_j)
        assert (adapter.updates > 1 or frac < 0.1) and steps[0].verdict != "skipped", (
            "the first update may come at once"
        )
        waiting = [step for step in steps if step.verdict == "skipped"]
        assert len(waiting) > 20 and all((step.reason or "").startswith("no credit") for step in waiting)
        assert all(step.learning_j == 0 or step.shadow is not None for step in waiting)
        assert adapter.metrics["learning_frac"] <= frac + first_j / adapter.bucket.served_j


def test_joules_of_elsewhere_pay_too() -> None:
    model = trained_model()
    with RouterAdapter(model, bucket=0.05) as adapter:
        adapter.bucket.earns_scoring = False
        learned = [adapter.score_and_learn(batch).learned for batch in batches("code", 4)]
        # What the first left of the credit that it was let in for is spent, and nothing more comes in.
        assert learned[0] and not any(learned[2:]) and adapter.bucket.served_j == 0
        adapter.bucket.earn(1e3)
        assert adapter.score_and_learn(batches("code", 1, start=5)[0]).learned


@pytest.mark.parametrize("router", ["topk", "priced", "null"])
def test_the_bound_is_a_bound_and_the_joules_are_the_cost_models(router: str) -> None:
    model = tiny_moe(top_k=3)
    set_router(model, router, **({"price": 0.1} if router == "priced" else {}))
    cost = CostModel.prior()
    costs, ids = LearningCosts(model, cost), random_tokens(3, 20)
    model(ids)
    decisions = list(collect_routing(model).values())
    pairs, opened = [d.counts.tolist() for d in decisions], [d.opened.float().tolist() for d in decisions]
    assert costs.last_forward_j(60) == pytest.approx(cost.forward_j(ModelWork.of(model), 60, pairs, opened))
    assert costs.last_forward_j(60) <= costs.bound_j(60)
    assert costs.last_forward_j(60, all_experts=True) == pytest.approx(costs.bound_j(60, all_experts=True))
    assert costs.bound_j(60, forwards=3) > costs.bound_j(60)


def test_forwards_that_serve_nobody_say_so() -> None:
    model, seen = trained_model(), []
    model.register_forward_hook(lambda *_: seen.append(is_serving()))
    guards = Safeguards(judge_tokens=252, shadow_every=1)
    with RouterAdapter(model, bucket=None, held_frac=0.25, safeguards=guards, lr=1e-2) as adapter:
        for batch in batches("code", 5):
            adapter.score_and_learn(batch)
        forwards = adapter.ledger.counts["judge"] + adapter.ledger.counts["shadow"]
        # An update reads each of its twelve parts again: four of sixteen sequences are held back.
        assert forwards > 0 and seen.count(False) == forwards + 12 * 5 and seen.count(True) == 5
        assert adapter.ledger.counts["update"] == 5


# -- cadence ---------------------------------------------------------------------------------------------------------


def _noted(cadence: Cadence, gains: list[float], energy_j: float = 1.0) -> Cadence:
    for gain in gains:
        cadence.note_verdict(gain, energy_j)
    return cadence


def test_updates_that_do_not_pay_become_rarer_and_those_that_do_frequent_again() -> None:
    cadence = Cadence()
    _noted(cadence, [0.0] * GAIN_WINDOW)
    assert cadence.interval == 2 and "cannot be told from no gain" in cadence.reason
    _noted(cadence, [0.0] * (GAIN_WINDOW - 1))
    assert cadence.interval == 2, "a whole window each time"
    _noted(cadence, [0.0] * (10 * GAIN_WINDOW))
    assert cadence.interval == MOST_INTERVAL
    _noted(cadence, [10.0, 11.0] * (GAIN_WINDOW // 2))
    _noted(cadence, [10.0, 11.0] * (GAIN_WINDOW // 2))
    assert cadence.interval < MOST_INTERVAL and "pay again" in cadence.reason


def test_a_few_lucky_updates_among_failures_are_not_enough() -> None:
    assert _noted(Cadence(), [5.0, 0, 0, 0, 0, 0, 0, 0]).interval == 2
    assert _noted(Cadence(), [5.0, 6, 5, 6, 5, 6, 5, 6]).interval == 1


def test_a_least_gain_per_joule_can_be_asked_for() -> None:
    gains = [5.0, 6.0] * (GAIN_WINDOW // 2)
    assert _noted(Cadence(min_gain_per_j=5.0), gains).interval == 1
    assert _noted(Cadence(min_gain_per_j=6.0), gains).interval == 2
    assert _noted(Cadence(min_gain_per_j=6.0), gains, energy_j=0.5).interval == 1


def test_a_jump_of_the_loss_makes_updates_frequent() -> None:
    cadence = Cadence(interval=8)
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(30, generator=generator)).tolist()
    assert not any(cadence.note_score(3.0 + away) for away in noise)
    assert cadence.note_score(4.0) and cadence.interval == 4 and "jumped" in cadence.reason
    assert not any(cadence.note_score(4.0 + away) for away in noise)


def test_the_state_of_a_cadence() -> None:
    cadence = _noted(Cadence(interval=4), [1.0, 2.0])
    cadence.note_score(3.0)
    assert Cadence.from_state(cadence.state_dict(), None) == cadence


def test_the_interval_is_kept_and_said() -> None:
    model = trained_model()
    with RouterAdapter(model, bucket=None, safeguards=Safeguards.none()) as adapter:
        adapter._learner.state.cadence._set(4, "of a test")
        learned = [adapter.score_and_learn(batch).learned for batch in batches("prose", 9)]
        assert learned == [True, False, False, False, True, False, False, False, True]
        assert adapter.metrics["interval"] == 4 and "4th batch" in adapter.metrics["interval_reason"]
        assert "4th batch" in adapter.report()
