"""The objective "local": audits what is due, learns from what may be learned from, and pays for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import planted_model, recall

from thermoe.adapt.learning_bucket import LearningBucket
from thermoe.adapt.learning_costs import LearningAccount, LearningCosts
from thermoe.adapt.learning_work import LearningLedger
from thermoe.adapt.local_objective import Local
from thermoe.adapt.objectives import OBJECTIVES, LearnBatch, Proposal
from thermoe.energy.cost_model import CostModel
from thermoe.errors import RoutingError
from thermoe.moe.layer import moe_layers
from thermoe.testing import random_tokens, tiny_moe


def _account(model: Any) -> LearningAccount:
    return LearningAccount(LearningCosts(model, CostModel.prior()), LearningLedger(), LearningBucket(None))


def _learn(
    objective: Local,
    account: LearningAccount,
    ids: torch.Tensor,
    weights: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    layers: list[str] | None = None,
) -> Proposal:
    model = objective.teacher.model
    fast = {name: layer.router.fast for name, layer in moe_layers(model) if layers is None or name in layers}
    predicted = (ids.shape[0], ids.shape[1] - 1)
    weights = torch.ones(predicted) if weights is None else weights
    return objective.learn(LearnBatch(model, fast, ids, mask, torch.zeros(predicted), weights, 0, account))


def test_it_is_registered_and_needs_no_graph() -> None:
    objective = OBJECTIVES.get("local")(planted_model(), seed=3)
    assert isinstance(objective, Local) and not objective.needs_graph and objective.teacher.schedule.seed == 3
    with pytest.raises(RoutingError, match="partition"):
        OBJECTIVES.get("local")(tiny_moe(method="copy"), seed=0)
    with pytest.raises(RoutingError, match="full"):
        OBJECTIVES.get("local")(planted_model(family="full"), seed=0)


def test_it_recovers_planted_roles_and_pays_for_every_audit() -> None:
    model, held = planted_model(1), random_tokens(16, 64, seed=999)
    objective, account = Local(model), _account(model)
    reasons = set()
    for chunk in range(32):
        bound_j, before_j = objective.bound_j(account.costs, 16, 64), account.ledger.energy_j
        reasons.add(_learn(objective, account, random_tokens(16, 64, seed=chunk)).reason)
        assert account.ledger.energy_j - before_j <= bound_j * (1 + 1e-9)
    assert recall(model, held) > 0.9
    assert None in reasons and "no sequence of this batch is due for an audit" in reasons
    works = account.ledger.take()
    assert {work.kind for work in works} == {"audit"} and all(work.energy_j > 0 for work in works)
    burst = 16_000 // (16 * 64) + 1  # batches until it is over, two sequences of each
    assert 2 * burst * 64 <= sum(work.tokens for work in works) <= (2 * burst + 32) * 64


def test_an_audit_costs_what_a_forward_with_every_expert_does() -> None:
    model = planted_model()
    objective, account = Local(model), _account(model)
    _learn(objective, account, random_tokens(4, 64))
    (work,) = account.ledger.take()
    costs = account.costs.table
    expected_j = costs.forward_j + float(costs.open_j.sum()) + 64 * (costs.token_j + float(costs.pair_j.sum()))
    assert work.tokens == 64 and work.energy_j == pytest.approx(expected_j)


def test_what_is_held_back_padded_or_generated_is_not_learned_from() -> None:
    ids = random_tokens(4, 40)
    weights = torch.ones(4, 39)
    weights[0] = 0  # held back for the judge
    weights[1, 20:] = 0
    model = planted_model()
    objective = Local(model, rate=1.0)
    proposal = _learn(objective, _account(model), ids, weights)
    assert proposal.gradients is None and proposal.weight == 21 + 40 + 40
    assert objective.teacher.pending == 101
    _learn(objective, _account(model), ids, torch.where(torch.arange(39) < 3, weights, 0), torch.ones(4, 40).bool())
    assert objective.teacher.pending == 101 + 3 * 4


def test_layers_that_may_not_move_stay() -> None:
    model = planted_model()
    objective = Local(model, min_tokens=32)
    names = [name for name, _ in moe_layers(model)]
    assert _learn(objective, _account(model), random_tokens(4, 64), layers=names[:1]).reason is None
    assert (model.transformer.h[0].mlp.router.fast.delta != 0).any()
    assert (model.transformer.h[1].mlp.router.fast.delta == 0).all()


def test_nothing_due_costs_nothing() -> None:
    model = planted_model()
    objective, account = Local(model), _account(model)
    objective.teacher.schedule.burst_tokens = 0
    objective.teacher.schedule.sequences = 1 + next(n for n in range(1000) if objective.teacher.schedule._due(n))
    assert objective.bound_j(account.costs, 1, 64) == 0
    proposal = _learn(objective, account, random_tokens(1, 64))
    assert proposal.reason == "no sequence of this batch is due for an audit" and account.ledger.take() == []
