"""Arms leave the models as they found them, whatever happens while one is open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from thermoe.compare.arms import ARMS, Prepared
from thermoe.compare.spec import load_spec
from thermoe.moe.layer import moe_layers
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

BATCHES = random_tokens(12, 16).split(4)


@pytest.fixture
def prepared() -> Prepared:
    return Prepared(load_spec("smoke"), tiny_gpt2(), tiny_moe(), price=0.2)


def state_of(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    found["trainable"] = {name: p.requires_grad for name, p in model.named_parameters()}
    found["routers"] = [(id(layer.router), layer.router.fast) for _, layer in moe_layers(model)]
    found["training"] = model.training
    with torch.no_grad():
        found["logits"] = model(BATCHES[0]).logits
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name], name


@pytest.mark.parametrize("name", list(ARMS))
def test_the_models_are_left_as_they_were(name: str, prepared: Prepared) -> None:
    before = [state_of(model) for model in (prepared.dense, prepared.moe)]
    with ARMS.get(name).open(prepared) as scorer:
        scores = [scorer.score(batch) for batch in BATCHES]
    assert all(score.shape == (4,) and not score.requires_grad for score in scores)
    for was, model in zip(before, (prepared.dense, prepared.moe), strict=True):
        assert_same(was, state_of(model))


@pytest.mark.parametrize("name", list(ARMS))
def test_the_models_are_left_as_they_were_after_an_interruption(name: str, prepared: Prepared) -> None:
    before = state_of(prepared.moe)
    with pytest.raises(KeyboardInterrupt), ARMS.get(name).open(prepared) as scorer:
        scorer.score(BATCHES[0])
        raise KeyboardInterrupt
    assert_same(before, state_of(prepared.moe))


def test_adapting_arms_score_before_they_learn(prepared: Prepared) -> None:
    for adapting, frozen in (("adapted", "priced"), ("baseline_adapted", "baseline")):
        with ARMS.get(frozen).open(prepared) as scorer:
            reference = [scorer.score(batch) for batch in BATCHES]
        with ARMS.get(adapting).open(prepared) as scorer:
            learning = [scorer.score(batch) for batch in BATCHES]
        assert torch.equal(reference[0], learning[0])
        assert not torch.equal(reference[1], learning[1])


def test_only_adapting_arms_count_learning() -> None:
    prepared = Prepared(load_spec("smoke"), tiny_gpt2(), tiny_moe(), price=0.2)
    passes = {}
    for name in ARMS:
        with ARMS.get(name).open(prepared) as scorer:
            passes[name] = scorer.learning_passes
    assert passes == {"dense": 0.0, "baseline": 0.0, "priced": 0.0, "adapted": 1.0, "baseline_adapted": 1.0}


def test_a_price_that_leaves_no_expert_is_scored_all_the_same() -> None:
    spec = load_spec("smoke", ["price.k_min=0", "price.value=9"])
    prepared = Prepared(spec, tiny_gpt2(), tiny_moe(), price=9.0)
    for name in ("priced", "adapted"):
        with ARMS.get(name).open(prepared) as scorer:
            assert all(bool(torch.isfinite(scorer.score(batch)).all()) for batch in BATCHES)
            assert all(int(layer.last_routing.active.sum()) == 0 for _, layer in moe_layers(scorer.model))


def test_every_arm_is_compared_with_one_that_exists() -> None:
    assert {ARMS.get(name).against for name in ARMS} <= {None, *ARMS}
