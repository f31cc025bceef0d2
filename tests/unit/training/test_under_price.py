"""Training under a price: it leaves the share that is asked for, costs nothing before it begins, and is worth it."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_tools import ROWS, assert_same_weights, biased_moe, interrupt_at, routers, settings, train

from thermoe import set_router
from thermoe.errors import ConfigError
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import routed_modules
from thermoe.routers.priced import PricedRouter
from thermoe.routers.topk import TopKRouter
from thermoe.sensitivity import measure_sensitivity
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe
from thermoe.training import under_price
from thermoe.training.spec import load_spec
from thermoe.training.trainer import Validation, validate
from thermoe.training.under_price import PriceSettings, UnderPrice


def price(**changes: Any) -> PriceSettings:
    return PriceSettings(**{"distinct_frac": 0.5, "served_batch": 4, "start_frac": 0.5, **changes})


def test_until_the_price_begins_it_is_the_training_without_one(tmp_path: Path) -> None:
    plain, priced = tiny_moe(), tiny_moe()
    before = train(plain, tmp_path / "a", log_every=1)[1]
    after = train(priced, tmp_path / "b", log_every=1, price=price(start_frac=0.75))[1]
    losses = [[row["loss"] for row in rows if row["kind"] == "train"] for rows in (before, after)]
    assert losses[0][:7] == losses[1][:7]
    assert losses[0][7] != losses[1][7]


def test_the_steps_open_the_share_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_moe(num_experts=8, top_k=3)
    rows = train(model, tmp_path, random_tokens(32, 16), steps=40, log_every=1, price=price(start_frac=0.25))[1]
    opened = [row["distinct_under_price"] for row in rows if "price_nats" in row]
    assert [row["step"] for row in rows if "price_nats" in row] == list(range(11, 41))
    with torch.no_grad():
        whole = _distinct(model, random_tokens(32, 16), 4)
    assert whole > 4
    assert sum(opened[-10:]) / 10 == pytest.approx(0.5 * whole, rel=0.12)


def test_the_model_keeps_its_own_routers_with_what_they_learned(tmp_path: Path) -> None:
    model = tiny_moe()
    own = routers(model)
    slow = [router.weight.detach().clone() for router in own]
    parameters = dict(model.named_parameters())
    train(model, tmp_path, price=price(start_frac=0.0))
    assert all(now is before for now, before in zip(routers(model), own, strict=True))
    assert {type(router) for router in own} == {TopKRouter}
    assert all(not torch.equal(router.weight, before) for router, before in zip(own, slow, strict=True))
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert not any(module._forward_hooks for _, module in routed_modules(model))


def test_the_share_of_steps_is_drawn_and_no_step_leaves_its_price(tmp_path: Path) -> None:
    model, seen = tiny_moe(), []

    def look(step: int) -> None:
        seen.extend(float(router.price) for router in routers(model) if isinstance(router, PricedRouter))

    often = price(start_frac=0.0, steps_frac=0.5)
    written = train(model, tmp_path, steps=40, log_every=1, price=often, on_step=look)[1]
    assert len(seen) == 80 and set(seen) == {0.0}
    prices = [row["price_nats"] for row in written if "price_nats" in row]
    moved = sum(a != b for a, b in pairwise(prices))
    assert 10 < moved < 30  # a step without a price leaves it where it was


def test_a_share_that_no_price_can_leave_keeps_the_numbers_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_price, "GAIN", 10.0)
    rows = train(tiny_moe(), tmp_path, steps=12, log_every=1, price=price(distinct_frac=0.01, start_frac=0.0))[1]
    rows = [row for row in rows if row["kind"] == "train"]
    assert rows[-1]["price_nats"] == pytest.approx(math.exp(under_price.MOST_LOG_PRICE), rel=1e-3)
    assert rows[-1]["distinct_under_price"] == 1  # what is left of each layer
    assert all(math.isfinite(row["loss"]) for row in rows)


@pytest.mark.parametrize("stop", [4, 7])
def test_interrupted_it_ends_the_same(stop: int, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"save_every": 2, "random_k": True, "price": price(start_frac=0.4), "seed": 3}
    whole = tiny_moe(top_k=3)
    rows = train(whole, tmp_path / "whole", **plan)[1]
    with pytest.raises(KeyboardInterrupt):
        train(tiny_moe(top_k=3), tmp_path / "cut", on_step=interrupt_at(stop), **plan)
    fresh = tiny_moe(9, top_k=3)
    more = train(fresh, tmp_path / "cut", resume=True, **plan)[1]
    assert_same_weights(whole, fresh)
    assert rows[-len(more) :] == more


def test_an_interrupted_training_leaves_the_routers_as_they_were(tmp_path: Path) -> None:
    model = tiny_moe()
    own = routers(model)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, on_step=interrupt_at(8), price=price())
    assert routers(model) == own


def test_it_does_better_with_half_of_the_experts_than_a_training_without_a_price(tmp_path: Path) -> None:
    rows = _bigrams(96, 24)
    found = {}
    for name, chosen in (("plain", PriceSettings()), ("priced", price(start_frac=0.5))):
        torch.manual_seed(0)
        model = tiny_moe(num_experts=8, top_k=2)
        train(model, tmp_path / name, rows, steps=120, batch_size=8, lr=1e-2, price=chosen)
        found[name] = _loss_with_half(model, rows)
    assert found["priced"] < found["plain"] - 0.02


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"distinct_frac": 0.0}, "training.price.distinct_frac"),
        ({"distinct_frac": 1.1}, "training.price.distinct_frac"),
        ({"distinct_frac": float("nan")}, "training.price.distinct_frac"),
        ({"served_batch": 0}, "training.price.served_batch"),
        ({"served_batch": 3}, "training.price.served_batch"),
        ({"start_frac": 1.0}, "training.price.start_frac"),
        ({"start_frac": -0.1}, "training.price.start_frac"),
        ({"steps_frac": 0.0}, "training.price.steps_frac"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(price=price(**changes)).check()
    assert caught.value.where == where


def test_models_without_a_price_to_pay_are_refused() -> None:
    with pytest.raises(ConfigError, match="no MoE layer"):
        UnderPrice(tiny_gpt2(), price(), ROWS, 10)
    with pytest.raises(ConfigError, match="BiasedRouter"):
        UnderPrice(biased_moe(), price(), ROWS, 10)
    with UnderPrice(tiny_gpt2(), PriceSettings(), ROWS, 10) as nothing:
        nothing.before_step(9)
        nothing.after_step()
        assert nothing.figures() == {}


def test_the_outcome_says_what_serving_costs(tmp_path: Path) -> None:
    held = Validation(random_tokens(10, 16, seed=7), 1.5, 8)  # the last batch is no multiple of the served one
    model = tiny_moe(num_experts=8, top_k=3)
    outcome, _ = train(model, tmp_path, random_tokens(32, 16), steps=20, price=price(), validation=held)
    said = outcome.validation
    assert said["ppl_under_price"] != said["ppl"]
    assert said["distinct_experts"] == pytest.approx(_mean_of_groups(model, held.rows), rel=1e-5)
    assert 1 < said["distinct_under_price"] < 0.75 * said["distinct_experts"]
    assert outcome.validation["ppl"] == pytest.approx(validate(model, held)["ppl"], rel=1e-6)
    plain, _ = train(tiny_moe(), tmp_path, steps=2, validation=held)
    assert plain.validation.keys() == {"ppl", "bits_per_byte"}


def test_it_is_a_setting_of_the_command() -> None:
    spec = load_spec("cpu-small", overrides=["training.price.distinct_frac=0.5", "training.price.served_batch=8"])
    assert spec.training.price == PriceSettings(distinct_frac=0.5, served_batch=8)
    with pytest.raises(ConfigError, match="multiple"):
        load_spec("cpu-small", overrides=["training.price.distinct_frac=0.5", "training.price.served_batch=7"])


def _distinct(model: nn.Module, rows: Tensor, batch: int) -> float:
    """Return the distinct experts per layer that ``batch`` rows open at one position."""
    found = []
    for part in rows.split(batch):
        model(part)
        for _, layer in routed_modules(model):
            index = layer.last_routing.expert_index.view(*part.shape, -1)
            used = [index[:, at].unique() for at in range(part.shape[1])]
            found += [int((ids < layer.router.num_experts).sum()) for ids in used]  # beyond: no expert
    return sum(found) / len(found)


@torch.no_grad()
def _mean_of_groups(model: nn.Module, rows: Tensor) -> float:
    """Return the mean over forwards of eight rows, routed in fours where these divide them."""
    eight = torch.cat([rows[0:8:2], rows[1:8:2]])
    return (_distinct(model, eight, 4) + _distinct(model, rows[8:], 2)) / 2


@torch.no_grad()
def _loss_with_half(model: nn.Module, rows: Tensor) -> float:
    """Return nats per token at the price that leaves half of what four sequences open."""
    whole, low, high = _distinct(model, rows[:16], 4), 1e-6, 10.0
    experts = routers(model)[0].num_experts
    options = {"benefit": "distortion", "favourite_weight": 4.0, "open_cost": [1.0] * experts}
    before = set_router(model, "priced", pair_cost=[0.0] * experts, group_by_position=True, **options)
    measure_sensitivity(model, rows[:16])
    for _ in range(20):
        middle = (low * high) ** 0.5
        for router in routers(model):
            router.set_price(middle)
        low, high = (middle, high) if _distinct(model, rows[:16], 4) > 0.5 * whole else (low, middle)
    losses = [sequence_nll(model(part).logits, part).mean() for part in rows.split(4)]
    set_router(model, before)
    return float(torch.stack(losses).mean()) / (rows.shape[1] - 1)


def _bigrams(count: int, length: int) -> Tensor:
    """Return rows of a text in which a token is mostly followed by one of three others."""
    generator = torch.Generator().manual_seed(1)
    followers = torch.randint(0, 96, (96, 3), generator=generator)
    rows = [torch.randint(0, 96, (count,), generator=generator)]
    for _ in range(length - 1):
        rows.append(followers[rows[-1], torch.randint(0, 3, (count,), generator=generator)])
    return torch.stack(rows, 1)
