"""The fused next-token loss is transformers' own, and a model has it only while it is asked for."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from thermoe.testing import random_tokens, tiny_gpt2
from thermoe.training import language_loss
from thermoe.training.language_loss import causal_lm_loss, fused_loss


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_loss, "_compiled", lambda: language_loss._sum_of_nats)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shifted", [False, True])
def test_it_is_the_loss_of_transformers(items: object, dtype: torch.dtype, shifted: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 8, 13).to(dtype)
    labels = torch.randint(0, 13, (3, 8))
    labels[1, 2:5] = -100
    given = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
    found, gradients = [], []
    for loss in (ForCausalLMLoss, causal_lm_loss):
        x = logits.clone().requires_grad_()
        value = loss(x, vocab_size=13, num_items_in_batch=items, **given)
        value.backward()
        found.append(value.detach())
        gradients.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_a_model_off_the_gpu_keeps_its_loss() -> None:
    model = tiny_gpt2()
    with fused_loss(model) as fused:
        assert not fused and model.loss_function is not causal_lm_loss


def test_a_model_on_the_gpu_has_it_inside_the_context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_gpt2(), random_tokens(2, 9)
    before = model(ids, labels=ids).loss
    monkeypatch.setattr(language_loss, "_fits", lambda model: True)
    with fused_loss(model) as fused:
        assert fused and model.loss_function is causal_lm_loss
        torch.testing.assert_close(model(ids, labels=ids).loss, before)
    assert model.loss_function is not causal_lm_loss and "_loss_function" not in model.__dict__
