"""Sensitivity: half the mean square of what an expert's deviation does to the loss, and no trace left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from thermoe import attach_router, sensitivity, set_router
from thermoe.errors import ConfigError, RoutingError
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import moe_layers
from thermoe.sensitivity import measure_sensitivity
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe


def test_it_is_half_the_squared_slope_of_the_loss_along_the_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against the derivative that autograd finds by moving a layer's output by hand."""
    monkeypatch.setattr(sensitivity, "PRIOR_TOKENS", 0)
    model, ids = tiny_moe(top_k=2).double(), random_tokens(2, 6)
    name, layer = next(iter(moe_layers(model)))
    found = measure_sensitivity(model, ids)[name]
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda m, a, y: inputs.append(a[0].detach()))
    model(ids)
    handle.remove()
    x = inputs[0].flatten(0, 1)
    decision, outputs = layer.last_routing, layer.experts.forward_all(x).detach()
    assert decision is not None
    totals, counts = torch.zeros(8), torch.zeros(8)
    for t in range(12):
        own = sum(
            w * outputs[e, t] for e, w in zip(decision.expert_index[t], decision.weights[t].detach(), strict=True)
        )
        for e in decision.expert_index[t].tolist():
            move = torch.zeros_like(x)
            move[t] = outputs[e, t] - own
            epsilon = torch.zeros((), dtype=torch.float64, requires_grad=True)
            handle = layer.register_forward_hook(lambda m, a, y, d=move, s=epsilon: y + s * d.view_as(y))
            (slope,) = torch.autograd.grad(sequence_nll(model(ids).logits, ids).sum(), epsilon)
            handle.remove()
            totals[e] += 0.5 * float(slope) ** 2
            counts[e] += 1
    used = counts > 0
    torch.testing.assert_close(found[used], (totals / counts)[used], rtol=1e-3, atol=1e-9)


def test_it_is_handed_to_priced_routers_and_leaves_nothing_else_behind() -> None:
    model, ids = tiny_moe(top_k=2).train(), random_tokens(4, 16)
    set_router(model, "priced", benefit="distortion")
    before = {name: value.clone() for name, value in model.state_dict().items() if "sensitivity" not in name}
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    first = measure_sensitivity(model, ids, batch_size=2)
    assert model.training and wants == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name, layer in moe_layers(model):
        assert torch.equal(layer.router.sensitivity, first[name]) and (first[name] > 0).all()
        assert not layer._forward_hooks
    again = measure_sensitivity(model, ids, batch_size=4, push=False)
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-8)


def test_a_rare_expert_is_drawn_to_its_layer() -> None:
    total, count = torch.tensor([0.0, 100.0]), torch.tensor([0.0, 1000.0])
    assert sensitivity._shrunk(total, count).tolist() == pytest.approx([0.1, 0.1], rel=1e-5)


def test_models_without_experts_of_ours_are_refused() -> None:
    with pytest.raises(RoutingError, match="no expert to measure"):
        measure_sensitivity(tiny_gpt2(), random_tokens(2, 8))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    native = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=97))
    attach_router(native, "priced", verbose=False)
    with pytest.raises(RoutingError, match="one by one"):
        measure_sensitivity(native, random_tokens(2, 8))


def test_rows_without_anything_to_predict_are_refused() -> None:
    with pytest.raises(ConfigError):
        measure_sensitivity(tiny_moe(), torch.zeros(4, 1, dtype=torch.int64))


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, "8", True])
def test_a_batch_of_no_size_is_refused(batch_size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size is"):
        measure_sensitivity(tiny_moe(), random_tokens(2, 8), batch_size=batch_size)


@pytest.mark.parametrize("wrong", [-100, 97])
def test_ids_outside_the_vocabulary_are_refused_before_a_kernel_meets_them(wrong: int) -> None:
    rows = random_tokens(2, 8)
    rows[1, 3] = wrong
    with pytest.raises(ConfigError, match="token ids") as error:
        measure_sensitivity(tiny_moe(), rows)
    assert "0 to 96" in error.value.accepted


def test_it_is_measured_inside_inference_mode_too() -> None:
    model, ids = tiny_moe(), random_tokens(2, 8)
    expected = measure_sensitivity(model, ids)
    with torch.inference_mode():
        found = measure_sensitivity(model, ids)
        made_there = measure_sensitivity(model, ids.clone())
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(made_there[name], value) for name, value in expected.items())
