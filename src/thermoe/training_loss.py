"""Next-token loss without the logits of a whole batch: chunk by chunk, the gradient in the same pass as the loss.

With B * S tokens and a vocabulary of V the logits of a batch are the largest tensor of a step: 64 x 512 x 50257 in
float32 are 6.6 GB, and as much again for their gradient. Here each chunk of tokens computes its logits, its loss and
the gradients of hidden states and weight, and lets the logits go (as Liger-Kernel does, arXiv 2410.10989). The
vocabulary is padded to a multiple of 64 for the product, because an odd width denies it the fast kernels.

Shape letters: N tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Widths of the product are padded to a multiple of this.
PADDING = 64
IGNORED = -100


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
        vocabulary = len(weight)
        padded = F.pad(weight.detach().to(dtype), (0, 0, 0, -vocabulary % PADDING))
        wide = torch.promote_types(dtype, torch.float32)
        kept = labels != IGNORED
        target = torch.where(kept, labels, 0).unsqueeze(1)
        # A tensor, so that nothing waits; no label at all gives nan, as `cross_entropy` does.
        share = (kept / kept.sum().to(wide)).unsqueeze(1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        minus_one = share.new_full((chunk, 1), -1.0)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            rows = hidden[part].detach().to(dtype)
            logits = rows @ padded.t()
            logits[:, vocabulary:] = -torch.inf  # the padding has no probability, hence no gradient
            log_p = torch.log_softmax(logits, dim=-1, dtype=wide)
            loss -= (log_p.gather(1, target[part]) * share[part]).sum()
            if not (need_hidden or need_weight):
                continue
            gradient = log_p.exp_().scatter_add_(1, target[part], minus_one[: len(rows)])
            torch.mul(gradient, share[part], out=logits)
            del log_p, gradient
            if grad_hidden is not None:
                grad_hidden[part] = logits @ padded
            if grad_weight is not None:
                grad_weight += (logits.t() @ rows)[:vocabulary]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (grad,) = grads
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
            None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = 8192) -> Tensor:
    """Return the mean of -log softmax(hidden @ weight.T)[label] over the tokens with a label.

    Products are in the dtype of autocast where that is on, else in that of ``hidden``; the softmax and its sums are at
    least in float32. Differentiable once, in ``hidden`` and ``weight``.

    Args:
        hidden: (N, D).
        weight: (V, D), the output embedding.
        labels: int64 (N,), -100 where a token has none.
        chunk_tokens: tokens whose logits are in memory at a time.

    Returns:
        A scalar, in float32 or wider.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with torch.autocast(kind, enabled=False):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, dtype, chunk_tokens)
    return loss


def next_token_loss(hidden_states: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = 8192) -> Tensor:
    """Return the loss of predicting each next token, as the causal models of transformers compute it.

    Args:
        hidden_states: (B, S, D) after the last norm.
        weight: (V, D), the output embedding.
        labels: int64 (B, S), the tokens themselves; -100 is not predicted.
        chunk_tokens: see `linear_cross_entropy`.
    """
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return linear_cross_entropy(hidden_states.flatten(0, 1), weight, target.flatten(), chunk_tokens=chunk_tokens)
