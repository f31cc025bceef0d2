"""The experts implementation "thermoe" of transformers: grouped products that take "no expert" for an answer.

transformers lets a model choose how its experts are computed (`experts_implementation`). Its own choices disagree, and
change between versions, on a slot without an expert: one crashes, one returns memory as it found it. This one computes
what "grouped_mm" computes, operation by operation, so that the bits are the same; an id of E or more costs no product,
adds nothing and carries no gradient.

Importing this module registers the name.

Shape letters: T tokens, K slots per token, R = T * K rows, E experts, D model width, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "thermoe"

#: What an experts module must hold; transformers' decorator for experts classes sets all but the weights.
REQUIRED = ("config", "num_experts", "has_gate", "has_bias", "is_transposed", "down_proj")


def why_not_native(experts: nn.Module) -> str | None:
    """Return why ``experts`` cannot be computed here, or ``None`` when they can."""
    missing = [name for name in REQUIRED if not hasattr(experts, name)]
    if missing:
        return f"{type(experts).__name__} does not use transformers' experts interface (no {', '.join(missing)})"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over several devices by transformers"
    weight = experts.down_proj
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        return f"its expert weights are quantised ({getattr(weight, 'dtype', type(weight).__name__)})"
    return None


def _takes_grouped(rows: Tensor, weight: Tensor) -> bool:
    """Whether `F.grouped_mm` can multiply these: its dtypes, and every row a multiple of 16 bytes."""
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if torch.compiler.is_compiling() and weight.dtype != torch.bfloat16:
        return False
    if rows.is_cuda and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    return all(width * weight.element_size() % 16 == 0 for width in weight.shape[1:])


def rows_are_independent(rows: Tensor) -> bool:
    """Whether the bits of a row's product stay the same however many rows its expert has.

    So for `F.grouped_mm` in bfloat16 on SM90 and newer, whose tiles follow from shapes alone; elsewhere each expert's
    rows are a matrix product of their own, which rounds by its size.
    """
    return rows.is_cuda and rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (9, 0)


def _grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """Multiply each expert's run of ``rows`` by its weight. Rows behind the last run may hold anything.

    Args:
        rows: (R, in), sorted by expert.
        weight: (E, in, out) when ``is_transposed``, else (E, out, in).
        ends: int32 (E,), inclusive end of each expert's run.
        bias: (R, out), already that of each row's expert, or ``None``.
        is_transposed: how the weight is stored.

    Returns:
        (R, out) in the dtype of the weight.
    """
    matrix = weight if is_transposed else weight.transpose(-2, -1)
    rows = rows.to(weight.dtype)  # grouped_mm knows nothing of autocast
    if _takes_grouped(rows, weight):
        out = F.grouped_mm(rows, matrix, offs=ends)
    else:  # transformers' own operator: any dtype and width, but it waits for the counts on a GPU
        out = torch.ops.transformers.grouped_mm_fallback(rows, matrix, offs=ends)
    return out if bias is None else out + bias


def thermoe_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Compute sum_k w_tk * expert_{i_tk}(x_t) for every token; an id of E or more is "no expert".

    No host synchronisation in bfloat16 on SM90 and newer. Rows are combined slot by slot, so that runs repeat.

    Args:
        self: the experts module, as transformers' `use_experts_implementation` made it.
        hidden_states: (T, D).
        top_k_index: int64 (T, K).
        top_k_weights: (T, K).

    Returns:
        (T, D) in the dtype of ``hidden_states``.
    """
    tokens, top_k = top_k_index.shape
    if tokens == 0 or top_k == 0:
        return torch.zeros_like(hidden_states)
    # The same sort as "grouped_mm": another order of equal ids could change the last bit of a product.
    expert, order = torch.sort(top_k_index.reshape(-1))
    ids = torch.arange(1, self.num_experts + 1, device=expert.device)
    ends = torch.searchsorted(expert, ids, out_int32=True)
    live = (expert < self.num_experts).unsqueeze(-1)
    # A row without an expert reads the last one's bias, which the masks take away again.
    expert = expert.clamp(max=self.num_experts - 1)

    # grouped_mm leaves the rows behind the last run uninitialised, in the output and in the gradient, hence a mask on
    # both sides of each product; never a factor of zero, which a NaN would survive.
    x_RD = torch.where(live, hidden_states[order // top_k], 0)
    up_weight = self.gate_up_proj if self.has_gate else self.up_proj
    up_bias = (self.gate_up_proj_bias if self.has_gate else self.up_proj_bias)[expert] if self.has_bias else None
    up = torch.where(live, _grouped_linear(x_RD, up_weight, ends, up_bias, self.is_transposed), 0)
    hidden = torch.where(live, self._apply_gate(up) if self.has_gate else self.act_fn(up), 0)
    down_bias = self.down_proj_bias[expert] if self.has_bias else None
    rows = torch.where(live, _grouped_linear(hidden, self.down_proj, ends, down_bias, self.is_transposed), 0)
    if getattr(self, "has_post_expert_norm", False):
        rows = self.post_expert_norm(rows)

    weight = torch.where(live, top_k_weights.reshape(-1)[order].unsqueeze(-1), 0)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(order.numel(), device=order.device)
    return (rows * weight)[slot].view(tokens, top_k, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, thermoe_experts_forward)
