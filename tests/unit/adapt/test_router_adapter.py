"""Test-time training moves fast weights and nothing else, and leaves the model as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import moe_layers
from thermoe.routers.fast_weights import FAST_FAMILIES, FastFamily
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

BATCHES = [random_tokens(2, 12, seed=seed) for seed in range(4)]
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {"gate": "renormalized"},
    "ramped": {"gate": "ramped"},
    "priced": {"gate": "renormalized", "router": "priced", "price": 0.05},
    "priced by group": {
        "gate": "renormalized",
        "router": "priced",
        "price": 0.05,
        "open_cost": [0.5] * 8,
        "group_by_position": True,
    },
}


def _adapter(model: nn.Module, **settings: Any) -> RouterAdapter:
    """Return an adapter that learns from every batch, whatever it costs."""
    return RouterAdapter(model, **{"bucket": None, "lr": 1e-2, **settings})


@torch.no_grad()
def _nll(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return sequence_nll(model(ids).logits, ids)


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(BATCHES[0]).logits


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_only_fast_weights_change(router: str, family: FastFamily) -> None:
    model = tiny_moe(top_k=3, **ROUTERS[router])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with _adapter(model, family=family) as adapter:
        for batch in BATCHES:
            step = adapter.score_and_learn(batch)
            assert step.learned and step.verdict == "deferred" and step.change_norm > 0
        fast = {id(p) for p in adapter.parameters()}
        assert all(p.abs().sum() > 0 for p in adapter.parameters())
        for name, parameter in model.named_parameters():
            assert parameter.grad is None, name
            assert (id(parameter) in fast) == parameter.requires_grad, name
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in state.items())
        assert len(fast) == (2 if family == "bias" else 4)
        assert adapter.updates == len(BATCHES) and adapter.resets == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_the_first_score_is_that_of_the_frozen_model_bit_for_bit(router: str) -> None:
    model = tiny_moe(top_k=3, **ROUTERS[router])
    frozen = [_nll(model, batch) for batch in BATCHES]
    with _adapter(model, lr=0.05) as adapter:
        scores = [adapter.score_and_learn(batch).sequence_nll for batch in BATCHES]
    assert torch.equal(scores[0], frozen[0])
    assert not any(torch.equal(score, reference) for score, reference in zip(scores[1:], frozen[1:], strict=True))
    assert not scores[0].requires_grad


def test_every_batch_is_scored_before_it_is_learned_from() -> None:
    model = tiny_moe(top_k=3, gate="renormalized")
    with _adapter(model, lr=0.05) as adapter:
        for batch in BATCHES:
            expected = _nll(model, batch)
            assert torch.equal(adapter.score_and_learn(batch).sequence_nll, expected)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_step_size_of_zero_is_the_frozen_model_bit_for_bit(router: str) -> None:
    model = tiny_moe(top_k=3, **ROUTERS[router])
    frozen = [_nll(model, batch) for batch in BATCHES]
    with _adapter(model, lr=0.0) as adapter:
        for batch, expected in zip(BATCHES, frozen, strict=True):
            step = adapter.score_and_learn(batch)
            assert torch.equal(step.sequence_nll, expected)
            assert not step.learned and step.reason == "the step was zero" and step.change_norm == 0
        assert adapter.updates == 0


@pytest.mark.parametrize("router", ["topk", "ramped", "priced"])
def test_a_batch_seen_again_and_again_gets_easier(router: str) -> None:
    model = tiny_moe(top_k=3, **ROUTERS[router])
    ids = random_tokens(4, 24)
    with _adapter(model, lr=0.02, anchor=0.9, held_frac=0.0, safeguards=Safeguards.none()) as adapter:
        scores = [float(adapter.score_and_learn(ids).sequence_nll.sum()) for _ in range(50)]
    assert scores[-1] < 0.985 * scores[0]


def test_the_anchor_pulls_back() -> None:
    model = tiny_moe(gate="renormalized")
    ends = {}
    for anchor in (1.0, 0.5):
        with _adapter(model, anchor=anchor) as adapter:
            for batch in BATCHES:
                adapter.score_and_learn(batch)
            ends[anchor] = float(sum(p.detach().square().sum() for p in adapter.parameters()))
    assert 0 < ends[0.5] < 0.5 * ends[1.0]


def test_the_change_reported_is_the_change_made() -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model, anchor=0.9) as adapter:
        adapter.score_and_learn(BATCHES[0])
        before = [p.detach().clone() for p in adapter.parameters()]
        step = adapter.score_and_learn(BATCHES[1])
        change = torch.cat([(p.detach() - b).flatten() for p, b in zip(adapter.parameters(), before, strict=True)])
    assert step.change_norm == pytest.approx(float(change.norm()), rel=1e-5)


def test_a_loss_that_is_not_finite_resets_the_fast_weights() -> None:
    model = tiny_moe(gate="renormalized")
    frozen = _nll(model, BATCHES[1])
    with _adapter(model) as adapter:
        adapter.score_and_learn(BATCHES[0])
        adapter.score_and_learn(BATCHES[1])
        row = model.transformer.wpe.weight[3].detach().clone()
        with torch.no_grad():
            model.transformer.wpe.weight[3] = float("nan")
        step = adapter.score_and_learn(BATCHES[2])
        assert not step.learned and step.change_norm == 0
        assert step.reason == "the loss is not finite; the fast weights were reset"
        assert all((p == 0).all() for p in adapter.parameters())
        assert adapter.resets == 1 and adapter.updates == 2
        with torch.no_grad():
            model.transformer.wpe.weight[3] = row
        step = adapter.score_and_learn(BATCHES[1])
        assert torch.equal(step.sequence_nll, frozen), "back at the trained router exactly"
        assert step.learned, "and learning goes on"
        counts = {one["count"] for one in adapter.state_dict()["optimizer"][0]["layers"].values()}
        assert counts == {1}, "with fresh moments: a step of the one row that is not held back"


def test_reset_is_the_trained_router() -> None:
    model = tiny_moe(gate="renormalized")
    before = _logits(model)
    with _adapter(model, held_frac=0.0, steps=1) as adapter:  # parts are other ones for every batch
        first = adapter.score_and_learn(BATCHES[0]).change_norm
        adapter.score_and_learn(BATCHES[1])
        assert not torch.equal(_logits(model), before)
        adapter.reset()
        assert torch.equal(_logits(model), before)
        assert adapter.score_and_learn(BATCHES[0]).change_norm == first


def test_close_leaves_the_model_as_it_was() -> None:
    model = tiny_moe(gate="renormalized")
    model.transformer.wte.weight.requires_grad_(False)
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    names, before = list(model.state_dict()), _logits(model)
    adapter = _adapter(model)
    adapter.score_and_learn(BATCHES[0])
    adapter.close()
    adapter.close()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert list(model.state_dict()) == names
    assert torch.equal(_logits(model), before)
    with _adapter(model) as again:
        assert again.updates == 0


def test_an_error_inside_the_context_still_closes() -> None:
    model = tiny_moe(gate="renormalized")
    with pytest.raises(ZeroDivisionError), _adapter(model):
        raise ZeroDivisionError
    assert all(p.requires_grad for p in model.parameters())
    assert all(layer.router.fast is None for _, layer in moe_layers(model))


def test_routers_swapped_while_adapting_are_cleaned_up_too() -> None:
    model = tiny_moe(gate="renormalized")
    before = _logits(model)
    with _adapter(model, lr=0.05) as adapter:
        adapter.score_and_learn(BATCHES[0])
        learned = _logits(model)
        set_router(model, "priced")
        assert torch.equal(_logits(model), learned), "what was learned moves along"
        assert adapter.score_and_learn(BATCHES[1]).learned
    assert all(layer.router.fast is None for _, layer in moe_layers(model))
    assert torch.equal(_logits(model), before)


def test_a_second_adapter_is_refused_and_disturbs_nothing() -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model) as adapter:
        adapter.score_and_learn(BATCHES[0])
        fast = [p.detach().clone() for p in adapter.parameters()]
        with pytest.raises(RoutingError, match="fast weights already") as error:
            _adapter(model)
        assert error.value.where and error.value.accepted and error.value.fix
        assert all(torch.equal(p, f) for p, f in zip(adapter.parameters(), fast, strict=True))


@pytest.mark.parametrize("router", ["topk", "priced"])
def test_a_saved_state_goes_on_bit_equal(router: str) -> None:
    model, twin = (tiny_moe(top_k=3, **ROUTERS[router]) for _ in range(2))
    with _adapter(model) as first, _adapter(twin) as second:
        for batch in BATCHES[:2]:
            first.score_and_learn(batch)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.updates == 2
        for batch in BATCHES[2:]:
            one, other = first.score_and_learn(batch), second.score_and_learn(batch)
            assert torch.equal(one.sequence_nll, other.sequence_nll)
            assert one.change_norm == other.change_norm
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_works_under_no_grad_and_on_a_frozen_model() -> None:
    model = tiny_moe(gate="renormalized").requires_grad_(False)
    with torch.no_grad(), _adapter(model) as adapter:
        assert adapter.score_and_learn(BATCHES[0]).learned
    assert not any(p.requires_grad for p in model.parameters())


def test_half_precision_models_learn_in_float32() -> None:
    model = tiny_moe(gate="renormalized").bfloat16()
    with _adapter(model, lr=1e-4) as adapter:
        assert adapter.score_and_learn(BATCHES[0]).learned
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_a_price_that_leaves_no_expert_leaves_nothing_to_learn() -> None:
    model = tiny_moe(router="priced", price=1e3, k_min=0)
    with _adapter(model) as adapter:
        step = adapter.score_and_learn(BATCHES[0])
        assert not step.learned and step.reason and torch.isfinite(step.sequence_nll).all()
        model.transformer.h[0].mlp.router.set_price(0.0)
        assert adapter.score_and_learn(BATCHES[0]).learned, "the layers that use experts go on learning"


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lr": -1e-3}, "adapt.lr"),
        ({"lr": float("nan")}, "adapt.lr"),
        ({"lr": float("inf")}, "adapt.lr"),
        ({"anchor": 0.0}, "adapt.anchor"),
        ({"anchor": 1.01}, "adapt.anchor"),
        ({"steps": 0}, "adapt.steps"),
        ({"steps": 1.5}, "adapt.steps"),
        ({"steps": True}, "adapt.steps"),
        ({"steps": None}, "adapt.steps"),
        ({"by_text": 1}, "adapt.by_text"),
        ({"by_text": None}, "adapt.by_text"),
        ({"optimizer": "sgd"}, "adapt.optimizer"),
        ({"safeguards": True}, "adapt.safeguards"),
        ({"lr": 10**400}, "adapt.lr"),
        ({"max_grad_norm": 10**400}, "adapt.max_grad_norm"),
        ({"objective": None}, "adapt.objective"),
        ({"objective": ["next_token"]}, "adapt.objective"),
        ({"layers": {}}, "adapt.layers"),
        ({"layers": [[0]]}, "adapt.layers"),
        ({"cost_model": "prior"}, "adapt.cost_model"),
        ({"cost_model": 0}, "adapt.cost_model"),
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any], where: str) -> None:
    model = tiny_moe()
    with pytest.raises((ConfigError, UnknownNameError)) as error:
        _adapter(model, **settings)
    assert error.value.where == where and error.value.accepted
    assert all(layer.router.fast is None for _, layer in moe_layers(model))


def test_one_token_predicts_nothing() -> None:
    model = tiny_moe()
    with _adapter(model) as adapter, pytest.raises(ConfigError, match="nothing to score"):
        adapter.score_and_learn(BATCHES[0][:, :1])


def test_a_dense_model_is_refused_with_the_way_to_convert() -> None:
    dense = tiny_gpt2()
    with pytest.raises(RoutingError, match="no MoE layer") as error:
        RouterAdapter(dense)
    assert "convert_to_moe" in error.value.fix
    assert all(p.requires_grad for p in dense.parameters())
