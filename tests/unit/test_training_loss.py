"""The chunked loss is the ordinary one, in value and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.training_loss import linear_cross_entropy, next_token_loss


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(23, 8, dtype=dtype), torch.randn(101, 8, dtype=dtype)
    labels = torch.randint(0, 101, (23,))
    labels[[0, 7, 22]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_equals_cross_entropy(chunk: int) -> None:
    hidden, weight, labels = _inputs()
    expected = F.cross_entropy(hidden @ weight.T, labels)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    found, wanted = (torch.autograd.grad(3 * v, [hidden, weight]) for v in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, labels = _inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels[:4], chunk_tokens=3),
        (hidden[:4].detach().requires_grad_(), weight),
    )


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, labels = _inputs()
    frozen = linear_cross_entropy(hidden, weight.detach(), labels)
    assert frozen.requires_grad
    frozen.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        plain = linear_cross_entropy(hidden, weight, labels)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, frozen.detach())


def test_next_token_loss_is_that_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight = torch.randn(3, 9, 8), torch.randn(50, 8)
    labels = torch.randint(0, 50, (3, 9))
    labels[1, 5:] = -100
    expected = ForCausalLMLoss(hidden @ weight.T, labels, 50)
    torch.testing.assert_close(next_token_loss(hidden, weight, labels, chunk_tokens=4), expected)


def test_under_autocast_the_gradients_keep_their_dtype() -> None:
    hidden, weight, labels = _inputs(torch.float32)
    exact = F.cross_entropy(hidden @ weight.T, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=10)
    assert loss.dtype == torch.float32
    assert 1e-7 < abs(float(loss.detach() - exact.detach())) < 2e-2
    for a, b in zip(*(torch.autograd.grad(v, [hidden, weight]) for v in (loss, exact)), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() / b.norm() < 2e-2


def test_no_label_at_all_is_nan_as_in_torch() -> None:
    hidden, weight, labels = _inputs()
    assert torch.isnan(linear_cross_entropy(hidden, weight, torch.full_like(labels, -100)))
