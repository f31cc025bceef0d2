"""Decisions made from logits, for the tests of losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.moe.decision import RoutingDecision

E, T = 8, 64


def decide(logits: Tensor, top_k: int = 2, mask: Tensor | None = None) -> RoutingDecision:
    """Route by top-k with renormalised weights."""
    experts = logits.shape[-1]
    p = logits.softmax(-1)
    index = logits.topk(top_k, -1).indices
    if mask is not None:
        index = torch.where(mask.unsqueeze(-1), index, experts)
    weights = F.pad(p, (0, 1)).gather(-1, index) * (index < experts)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    return RoutingDecision(logits, p, index, weights, mask)


def random_logits(scale: float = 1.0, *, tokens: int = T, experts: int = E) -> Tensor:
    """Logits that lean towards the later experts, with a gradient."""
    return (scale * torch.randn(tokens, experts) + torch.linspace(0, 1, experts)).requires_grad_()


def balanced(top_k: int, experts: int = E) -> RoutingDecision:
    """Every expert equally often chosen and equally probable."""
    tokens = experts * 4
    offsets = torch.arange(tokens).unsqueeze(1) + torch.arange(experts)
    falling = -torch.arange(experts).float().expand(tokens, -1)
    return decide(torch.zeros(tokens, experts).scatter(1, offsets % experts, falling), top_k)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    """Gradient of ``loss`` by ``logits``."""
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]
