"""The router adapter with the local teacher: reads better where experts must be found, and guarded like any other."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from planted import audited, planted_model
from torch import Tensor

from thermoe.adapt import audit
from thermoe.adapt.local_objective import Local
from thermoe.adapt.objectives import OBJECTIVES
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import RoutingError
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import moe_layers
from thermoe.testing import random_tokens

ROWS, LENGTH = 6, 40
#: No trust region: roles that are all wrong cannot be put right inside one.
FREE = Safeguards(kl_cap=None, judge_tokens=260, judge_tokens_most=1000)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a teacher that learns from every second sequence, 80 tokens at a time, while a test runs."""
    monkeypatch.setitem(OBJECTIVES._entries, "local_often", partial(Local, rate=0.5, min_tokens=80))


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Return text (96, LENGTH) that the model writes when its router is right, so that routing right is worth nats."""
    model = planted_model(1, permuted=False, family=None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 97, (16 * ROWS, 1), generator=generator)
    with torch.no_grad():
        cache = None
        for _ in range(LENGTH - 1):
            out = model(ids[:, -1:] if cache is not None else ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            drawn = torch.multinomial(torch.softmax(3 * out.logits[:, -1], -1), 1, generator=generator)
            ids = torch.cat([ids, drawn], 1)
    return ids


@torch.no_grad()
def _nll(model: Any, ids: Tensor) -> float:
    return float(sequence_nll(model(ids).logits, ids).mean()) / (ids.shape[1] - 1)


def _adapter(model: Any, **settings: Any) -> RouterAdapter:
    return RouterAdapter(
        model,
        **{
            "objective": "local_often",
            "family": "mix",
            "bucket": None,
            "held_frac": 0.34,
            "safeguards": FREE,
            **settings,
        },
    )


def _read(adapter: RouterAdapter, ids: Tensor) -> list[Any]:
    return [adapter.score_and_learn(batch) for batch in ids.split(ROWS)]


def test_text_that_needs_other_experts_is_read_better_and_better(text: Tensor) -> None:
    model = planted_model(1, family=None)
    frozen, right = _nll(model, text), _nll(planted_model(1, permuted=False, family=None), text)
    assert frozen > right + 0.3
    with _adapter(model) as adapter:
        steps = _read(adapter, text)
        later = torch.stack([step.sequence_nll.mean() for step in steps[8:]]).mean() / (LENGTH - 1)
        assert float(later) < right + 0.2 * (frozen - right)
        assert not any(p.grad is not None for p in model.parameters())
        assert adapter.ledger.counts["audit"] > 0 and adapter.ledger.counts["update"] == 0
        assert adapter.ledger.verdicts["accepted"] >= 1
    first = planted_model(1, family=None)
    with torch.no_grad():
        assert torch.equal(steps[0].sequence_nll, sequence_nll(first(text[:ROWS]).logits, text[:ROWS]))
    assert _nll(model, text) == frozen, "closed, the model is as it was"


def _lie(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = audit.output_shares
    monkeypatch.setattr(audit, "output_shares", lambda parts: 1 - honest(parts))


@pytest.mark.tuned
@pytest.mark.parametrize("shadow", [True, False], ids=["judge and shadow", "judge alone"])
def test_a_teacher_that_lies_is_undone_with_its_evidence(
    shadow: bool, text: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whichever looks first; the judge by itself waits for the blocks that it takes to be sure."""
    model = planted_model(1, permuted=False, family=None)
    frozen = _nll(model, text[: 4 * ROWS])
    _lie(monkeypatch)
    undoes = ("rejected", "reset") if shadow else ("rejected",)
    with _adapter(model, safeguards=replace(FREE, shadow=shadow)) as adapter:
        steps = []
        for batch in text.split(ROWS):
            steps.append(adapter.score_and_learn(batch))
            if steps[-1].verdict in undoes:
                break
        assert steps[-1].verdict in undoes and not steps[-1].learned
        assert len(steps) <= 8 and any(step.learned for step in steps)
        assert all((p == 0).all() for p in adapter.parameters())
        assert _nll(model, text[: 4 * ROWS]) == frozen
        evidence = adapter.state_dict()["objective"]["layers"]
        assert all((one["fit"]["information"] == 0).all() for one in evidence.values())


def test_a_teacher_that_goes_on_lying_is_stopped(text: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three updates undone in a row, then a cool-down at the trained router; without the judge the harm stays."""
    ends = {}
    for judge in (True, False):
        model = planted_model(1, permuted=False, family=None)
        frozen = _nll(model, text[-4 * ROWS :])
        guards = replace(FREE, judge=judge, shadow=False, diversity=None)
        with monkeypatch.context() as lying, _adapter(model, safeguards=guards) as adapter:
            _lie(lying)
            _read(adapter, text)
            ends[judge] = _nll(model, text[-4 * ROWS :]) - frozen
            if judge:
                assert adapter.ledger.verdicts["rejected"] == 3 and "accepted" not in adapter.ledger.verdicts
    assert ends[True] == 0 and ends[False] > 0.2


def test_random_tokens_among_the_text_do_no_lasting_harm(text: Tensor) -> None:
    model = planted_model(1, family=None)
    with _adapter(model) as adapter:
        for number, batch in enumerate(text[: 12 * ROWS].split(ROWS)):
            adapter.score_and_learn(batch)
            if number % 3 == 2:
                adapter.score_and_learn(random_tokens(ROWS, LENGTH, seed=number))
        assert _nll(model, text[-4 * ROWS :]) < _nll(planted_model(1, family=None), text[-4 * ROWS :]) - 0.2


def test_the_trust_region_holds_for_its_updates_too(text: Tensor) -> None:
    with _adapter(planted_model(1, family=None), safeguards=Safeguards(kl_cap=0.05, judge=False)) as adapter:
        found = [step.kl for step in _read(adapter, text) if step.learned]
    assert len(found) > 5 and all(0 < kl <= 0.05 for kls in found for kl in kls.values())


def test_learning_stays_inside_its_bucket(text: Tensor) -> None:
    model = planted_model(1, family=None)
    with _adapter(model, bucket=0.05) as adapter:
        steps = _read(adapter, text)
        assert any(step.reason and step.reason.startswith("no credit") for step in steps)
        assert adapter.ledger.counts["audit"] > 0
        capacity_j, served_j = adapter.bucket.capacity_j, adapter.bucket.served_j
        assert adapter.ledger.energy_j == pytest.approx(adapter.bucket.spent_j)
        assert 0 < adapter.ledger.energy_j <= (0.05 * served_j + capacity_j) * (1 + 1e-9)
        assert sum(step.learning_j for step in steps) == pytest.approx(adapter.ledger.energy_j)


def test_the_same_seed_gives_the_same_bits_and_a_saved_state_goes_on(text: Tensor) -> None:
    twins = [planted_model(1, family=None) for _ in range(3)]
    with _adapter(twins[0]) as one, _adapter(twins[1]) as two, _adapter(twins[2]) as other:
        _read(one, text[: 5 * ROWS])
        _read(two, text[: 5 * ROWS])
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        scores = [[s.sequence_nll for s in _read(a, text[5 * ROWS : 10 * ROWS])] for a in (one, two, other)]
        for a, b, c in zip(*scores, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
        assert all(
            torch.equal(p, q) and torch.equal(p, r)
            for p, q, r in zip(one.parameters(), two.parameters(), other.parameters(), strict=True)
        )
        assert any((p != 0).any() for p in one.parameters())


def test_streams_have_teachers_of_their_own(text: Tensor) -> None:
    model = planted_model(1, family=None)
    with _adapter(model) as adapter:
        _read(adapter, text[: 6 * ROWS])
        before = copy.deepcopy(adapter.state_dict()["objective"])
        with adapter.stream("other"):
            assert all((p == 0).all() for p in adapter.parameters())
            assert adapter.state_dict()["objective"]["updates"] == 0
            _read(adapter, text[: 3 * ROWS])
        after = adapter.state_dict()["objective"]
        assert after["updates"] == before["updates"] > 0 and after["schedule"] == before["schedule"]
        for name, one in before["layers"].items():
            assert torch.equal(one["fit"]["information"], after["layers"][name]["fit"]["information"])


def test_a_model_that_does_not_fit_is_refused_and_left_alone() -> None:
    model = planted_model(1, family=None)
    with pytest.raises(RoutingError, match="full"):
        RouterAdapter(model, objective="local")
    assert all(layer.router.fast is None for _, layer in moe_layers(model))
    model.config.conversion_method = "copy"
    with pytest.raises(RoutingError, match="copy"):
        RouterAdapter(model, objective="local", family="mix")
    assert all(layer.router.fast is None for _, layer in moe_layers(model))
    assert audited(model, random_tokens(1, 4))
