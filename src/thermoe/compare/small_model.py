"""The small model of a study and a step of its training; a plain loop, so that little can go wrong.

Shape letters: B sequences, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thermoe.compare.study_base import StudyBase
from thermoe.models.frame import build_frame
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.moe.losses import routing_loss


def new_model(spec: StudyBase, seed: int, **router: Any) -> PreTrainedModel:
    """Return a fresh model of the study's size; ``router`` and ``router_options`` as `build_frame` takes them."""
    return build_frame(
        "moe", vocab_size=spec.vocab_size, sequence_length=spec.sequence_length, hidden_size=spec.hidden_size,
        layers=spec.layers, heads=spec.heads, num_experts=spec.num_experts, top_k=spec.top_k,
        expert_width=spec.expert_width, seed=seed, **router,
    )  # fmt: skip


def optimizer_of(model: nn.Module, spec: StudyBase) -> torch.optim.Optimizer:
    """Return AdamW as every study uses it."""
    return torch.optim.AdamW(model.parameters(), lr=spec.lr, betas=(0.9, 0.95), weight_decay=0.1)


def lr_at(step: int, spec: StudyBase) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to a tenth."""
    warm = max(1, spec.steps // 10)
    if step < warm:
        return spec.lr * (step + 1) / warm
    return spec.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, spec.steps - warm))))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, balance: Mapping[str, float], lr: float
) -> float:
    """Take one step and return the language-model loss.

    Args:
        model: trained in place.
        optimizer: of its weights.
        batch: int64 (B, S).
        balance: coefficients of the auxiliary losses by name.
        lr: of this step.
    """
    model.train()
    loss = model(batch, labels=batch).loss
    decisions = collect_routing(model)
    auxiliary = routing_loss(decisions.values(), balance)
    optimizer.zero_grad()
    (loss if auxiliary is None else loss + auxiliary).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    routers: list[Any] = [layer.router for _, layer in moe_layers(model)]
    for router, decision in zip(routers, decisions.values(), strict=True):
        router.observe(decision.detach())
        router.after_step()
    return float(loss.detach())
