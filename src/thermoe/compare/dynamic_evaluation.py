"""Dynamic evaluation: after each batch one step of AdamW on every weight (arXiv 1904.08378), the expensive rival.

It has no safeguards, keeps float32 masters and moments of every weight, and is what adapting a router alone is held
against.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from thermoe.evaluation import sequence_nll


class DynamicEvaluation:
    """Scores a batch, then learns from it with all weights; a context manager that puts the trained weights back.

    Args:
        model: a causal language model in evaluation mode.
        lr: step size of AdamW.
        anchor: factor on the distance from the trained weights after each step; 1 is no pull back.
        max_grad_norm: gradients are scaled down to this norm.
    """

    def __init__(self, model: nn.Module, *, lr: float, anchor: float = 1.0, max_grad_norm: float = 1.0) -> None:
        self.model, self.anchor, self.max_grad_norm = model, anchor, max_grad_norm
        self.weights = list(model.parameters())
        self._asked = [weight.requires_grad for weight in self.weights]
        self._trained = [weight.detach().clone() for weight in self.weights]
        self._masters = [weight.detach().float().clone() for weight in self.weights]
        for weight in self.weights:
            weight.requires_grad_(True)
        fused = bool(self.weights) and self.weights[0].is_cuda
        self._adamw = torch.optim.AdamW(self._masters, lr=lr, weight_decay=0.0, fused=fused)

    def score_and_learn(self, rows: Tensor) -> Tensor:
        """Return the nats per sequence (B,) of int64 (B, S) with the present weights, then learn from the rows."""
        with torch.enable_grad():
            nll = sequence_nll(self.model(rows, use_cache=False).logits, rows)
            loss = nll.sum() / (rows.shape[0] * (rows.shape[1] - 1))
            gradients = torch.autograd.grad(loss, self.weights, materialize_grads=True)
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient.float()
        nn.utils.clip_grad_norm_(self._masters, self.max_grad_norm)
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            for weight, master, trained in zip(self.weights, self._masters, self._trained, strict=True):
                if self.anchor < 1:
                    master.lerp_(trained.float(), 1 - self.anchor)
                weight.copy_(master)
        return nll.detach()

    @torch.no_grad()
    def close(self) -> None:
        """Put the trained weights back."""
        for weight, trained, asked in zip(self.weights, self._trained, self._asked, strict=True):
            weight.copy_(trained)
            weight.requires_grad_(asked)

    def __enter__(self) -> DynamicEvaluation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
