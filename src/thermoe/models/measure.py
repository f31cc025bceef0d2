"""What a conversion changes: how far the outputs are from the dense model's, and how many parameters work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thermoe.moe.layer import moe_layers
from thermoe.routers.base import Router


def _outputs(model: Any, rows: Tensor) -> tuple[Tensor, bool]:
    """Return what the model says of ``rows``, and whether it is logits."""
    found = model(rows)
    for name in ("logits", "start_logits"):
        if getattr(found, name, None) is not None:
            return getattr(found, name).double(), True
    return found[0].double(), False


@torch.no_grad()
def exactness(dense: nn.Module, converted: nn.Module, rows: Tensor) -> dict[str, float]:
    """Return how far a converted model is from its dense one.

    Args:
        dense: a Hugging Face model.
        converted: the same with MoE layers.
        rows: token ids (B, S).

    Returns:
        `max_abs_diff`, the largest difference of logits, or of hidden states where there is no head; and, where there
        is one, `logit_kl`, the mean KL(dense || converted) per token in nats.
    """
    (a, is_logits), (b, _) = _outputs(dense, rows), _outputs(converted, rows)
    found = {"max_abs_diff": float((a - b).abs().max())}
    if is_logits:
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        found["logit_kl"] = float((log_a.exp() * (log_a - log_b)).sum(-1).mean())
    return found


def model_size(model: nn.Module) -> dict[str, int]:
    """Return how many parameters there are, and how many work on one token in top_k experts of each MoE layer.

    Returns:
        `parameters`; `active_parameters`, the most: those of the widest top_k experts; and `active_parameters_min`, the
        least: those of the narrowest. The last two are equal where all experts of a layer are alike.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    # Where weights are offloaded, one that is tied to another is listed twice.
    total = sum(p.numel() for name, p in model.named_parameters() if not (p.is_meta and name in tied))
    least_idle = most_idle = 0
    for _, layer in moe_layers(model):
        assert isinstance(layer.router, Router)
        sizes, idle = sorted(layer.experts.parameters_by_expert), layer.experts.num_experts - layer.router.top_k
        least_idle += sum(sizes[:idle])
        most_idle += sum(sizes[len(sizes) - idle :])
    return {
        "parameters": total,
        "active_parameters": total - least_idle,
        "active_parameters_min": total - most_idle,
    }
