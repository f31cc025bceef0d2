"""What is done with a batch: everything without a cap on joules, as much as there is credit for with one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reading_model import batches, trained_model

from thermoe import set_router
from thermoe.adapt import judging
from thermoe.adapt import plan as plan_module
from thermoe.adapt.plan import JUDGED_WORTH, Plan
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.energy.cost_model import CostModel
from thermoe.testing import random_tokens, tiny_moe

OFF = Safeguards.none()


def _adapter(**settings: Any) -> RouterAdapter:
    model = tiny_moe(gate="renormalized")
    return RouterAdapter(model, **{"bucket": 0.2, "safeguards": OFF, "by_text": False, **settings})


def _watched(adapter: RouterAdapter, monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    from thermoe.adapt import learner

    plans: list[Plan] = []
    made = learner.plan

    def watch(*given: Any) -> Plan:
        plans.append(made(*given))
        return plans[-1]

    monkeypatch.setattr(learner, "plan", watch)
    return plans


@pytest.mark.parametrize(("steps", "parts"), [(1, None), (3, 3), (16, 7)])
def test_without_a_cap_every_batch_is_learned_from_in_all_parts(
    steps: int, parts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _adapter(bucket=None, steps=steps) as adapter:
        plans = _watched(adapter, monkeypatch)
        for number in range(3):
            adapter.score_and_learn(random_tokens(8, 12, seed=number))
    assert [None if p.parts is None else len(p.parts) for p in plans] == [parts] * 3
    assert all(p.why_not is None and p.judges for p in plans)


def test_with_a_cap_what_is_at_hand_is_spent_on_parts_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    with RouterAdapter(trained_model(), bucket=0.5, safeguards=OFF, by_text=False) as adapter:
        plans = _watched(adapter, monkeypatch)
        steps = [adapter.score_and_learn(batch) for batch in batches("prose", 20)]
        spent_j, served_j, most_j = adapter.ledger.energy_j, adapter.bucket.served_j, adapter.bucket.capacity_j
    made = [0 if plan.why_not else len(plan.parts or []) for plan in plans]
    assert made[0] == 14, "the first update may come at once"
    assert sum(many > 0 for many in made) >= 16, "then at most batches, where all of it is paid for at every third"
    assert sum(made[1:]) < 0.7 * 14 * 19, "as much of them as there is credit for"
    assert [step.learned for step in steps] == [many > 0 for many in made]
    assert most_j is not None and 0.9 * 0.5 * served_j <= spent_j <= 0.5 * served_j + most_j


def test_parts_that_are_made_are_sequences_that_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with _adapter(steps=3) as adapter:
        plans = _watched(adapter, monkeypatch)
        for number in range(8):
            adapter.score_and_learn(random_tokens(8, 12, seed=number))
    for plan in plans:
        rows = [row for part in plan.parts or [] for row in part]
        assert len(rows) == len(set(rows)) and set(rows) <= set(range(8))


def test_a_verdict_waits_until_it_is_about_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    guards, spent = Safeguards(judge_tokens=126, shadow=False), {}
    for bucket in (0.3, None):
        with RouterAdapter(trained_model(), bucket=bucket, safeguards=guards, by_text=False) as adapter:
            plans = _watched(adapter, monkeypatch)
            steps = [adapter.score_and_learn(batch) for batch in batches("prose", 20)]
            works = adapter.ledger.take()
        spent[bucket] = {kind: sum(w.energy_j for w in works if w.kind == kind) for kind in ("update", "judge")}
        waiting = [step for step in steps if step.reason and "costs too much yet" in step.reason]
        assert bool(waiting) == (bucket is not None) and all(step.verdict == "deferred" for step in waiting)
        assert any(step.judged is not None for step in steps), "in the end it comes"
        assert any(not plan.judges for plan in plans) == (bucket is not None)
    assert spent[0.3]["judge"] * JUDGED_WORTH <= spent[0.3]["update"] * 1.1


@pytest.mark.parametrize("grouped", [False, True])
def test_a_verdict_costs_no_more_than_was_reckoned(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where opening experts is all that costs: each forward counts, however few its tokens are."""
    prior = CostModel.prior()
    dear = {name: term.value * (1e6 if "open" in name else 1) for name, term in prior.terms.items()}
    terms = {name: replace(term, value=dear[name]) for name, term in prior.terms.items()}
    model, bounds, reckon = trained_model(), [], plan_module._judge_bound_j
    set_router(model, "priced", price=0.0, open_cost=[1.0] * 8, group_by_position=grouped)
    monkeypatch.setattr(plan_module, "_judge_bound_j", lambda *given: bounds.append(reckon(*given)) or bounds[-1])
    monkeypatch.setattr(judging, "judge", lambda *given, **settings: ("accepted", ""))  # so each is a first
    guards = Safeguards(judge_tokens=126, judge_tokens_most=252, shadow=False)
    with RouterAdapter(model, bucket=None, safeguards=guards, cost_model=replace(prior, terms=terms)) as adapter:
        for batch in batches("prose", 5):
            step = adapter.score_and_learn(batch)
            judged_j = sum(work.energy_j for work in adapter.ledger.take() if work.kind == "judge")
            assert step.verdict == "accepted" and 0.5 * bounds[-1] < judged_j <= bounds[-1]


def test_what_cannot_pay_for_one_sequence_waits_and_says_so() -> None:
    with _adapter(bucket=1e-6) as adapter:
        steps = [adapter.score_and_learn(random_tokens(8, 12, seed=number)) for number in range(12)]
    assert steps[0].learned and not any(step.learned for step in steps[-3:]), "what the first left over is spent, too"
    assert all("no credit" in (step.reason or "") for step in steps[-3:])
    with _adapter(bucket=0) as adapter:
        step = adapter.score_and_learn(random_tokens(8, 12))
        assert not step.learned and "no credit" in (step.reason or "") and torch.isfinite(step.sequence_nll).all()
