"""What the kernels compute, in PyTorch: the algebra to test against, and to test with where there is no Triton.

Rows are slots sorted by expert; those behind `ends[-1]` belong to no expert ("dead"). A dead row may hold anything, as
after `grouped_mm`, and nothing here lets it through. Sums and activations are at least in float32.

Shape letters: T tokens, K slots per token, R = T * K rows, E experts, D model width, F expert width, H = 2F when gated,
else F.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: By the name of `transformers.activations.ACT2FN`: the function the kernels know it as. Any other name is not fused.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _live(rows: int, ends: Tensor) -> Tensor:
    """Bool (R, 1): the rows that belong to an expert."""
    return (torch.arange(rows, device=ends.device) < ends[-1]).unsqueeze(-1)


def value_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation of ``x`` and its derivative, both of the shape of ``x``."""
    if activation == "silu":
        s = torch.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    if activation == "gelu_tanh":  # 0.5 (1 + tanh y) = sigmoid(2y)
        c = 2 * math.sqrt(2 / math.pi)
        s = torch.sigmoid(c * (x + 0.044715 * x**3))
        return x * s, s + x * s * (1 - s) * c * (1 + 3 * 0.044715 * x**2)
    if activation == "gelu":
        below = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return torch.relu(x), (x > 0).to(x.dtype)


def spread(x: Tensor, row: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy each token to the rows of its slots; dead rows become 0.

    Args:
        x: (T, D).
        row: int32 (T, K), the row of each slot.
        ends: int32 (E,), inclusive end of each expert's run of rows.
        dtype: of the rows.

    Returns:
        (R, D).
    """
    slots = torch.where(row.unsqueeze(-1) < ends[-1], x.unsqueeze(1), 0).to(dtype).flatten(0, 1)
    return torch.empty_like(slots).index_copy_(0, row.flatten().long(), slots)


def combine(rows: Tensor, row: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each token's slots, in the order of the slots; dead rows are not read.

    Args:
        rows: (R, D).
        row: int32 (T, K), the row of each slot.
        ends: int32 (E,).
        dtype: of the sum.

    Returns:
        (T, D).
    """
    slots = torch.where(row.unsqueeze(-1) < ends[-1], _wide(rows[row.long()]), 0)
    return slots.sum(1).to(dtype)


def _gate_value(
    h: Tensor, bias: Tensor | None, expert: Tensor, ends: Tensor, gated: bool
) -> tuple[Tensor, Tensor | None]:
    wide = _wide(h)
    if bias is not None:
        wide = wide + _wide(bias)[expert.long().clamp(max=bias.shape[0] - 1)]
    wide = torch.where(_live(len(h), ends), wide, 0)
    if not gated:
        return wide, None
    gate, value = wide.chunk(2, dim=-1)
    return gate, value


def activate(
    h: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    order: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    """Return w * act(h + b), gated or not; dead rows become 0.

    Args:
        h: (R, H), gate before value when gated.
        bias: (E, H) or ``None``.
        weight: (R,), combine weight of each slot.
        order: int64 (R,), the slot of each row.
        expert: int (R,), the expert of each row; E in dead rows.
        ends: int32 (E,).
        activation: a value of `ACTIVATIONS`.
        gated: whether H = 2F.

    Returns:
        (R, F) in the dtype of ``h``.
    """
    gate, value = _gate_value(h, bias, expert, ends, gated)
    hidden = value_and_slope(gate, activation)[0]
    if value is not None:
        hidden = hidden * value
    return torch.where(_live(len(h), ends), hidden * weight[order].unsqueeze(-1), 0).to(h.dtype)


def activate_backward(
    grad: Tensor,
    h: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    order: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `activate` without its output, which is computed again.

    Args:
        grad: (R, F), gradient at w * act(h + b) divided by w: the output's gradient through the down-projection alone.
        h: (R, H); this and the rest as in `activate`.
        bias: (E, H) or ``None``.
        weight: (R,).
        order: int64 (R,).
        expert: int (R,).
        ends: int32 (E,).
        activation: a value of `ACTIVATIONS`.
        gated: whether H = 2F.

    Returns:
        Gradient of ``h`` (R, H), w * act(h + b) (R, F), and gradient of ``weight`` (R,), exactly 0 in dead slots.
    """
    live = _live(len(h), ends)
    gate, value = _gate_value(h, bias, expert, ends, gated)
    hidden, slope = value_and_slope(gate, activation)
    w = weight[order].unsqueeze(-1)
    scaled = torch.where(live, _wide(grad) * w, 0)
    if value is None:
        grad_h = scaled * slope
    else:
        grad_h = torch.cat([scaled * slope * value, scaled * hidden], dim=-1)
        hidden = hidden * value
    grad_row = torch.where(live, _wide(grad) * hidden, 0).sum(-1)
    grad_weight = torch.empty_like(weight).index_copy_(0, order, grad_row.to(weight.dtype))
    return grad_h.to(h.dtype), torch.where(live, hidden * w, 0).to(h.dtype), grad_weight


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows (R, A) by its matrix of ``weight`` (E, A, B): (R, B); dead rows are NaN."""
    out = rows.new_full((len(rows), weight.shape[-1]), float("nan"))
    start = 0
    for e, end in enumerate(ends.tolist()):
        out[start:end] = rows[start:end] @ weight[e]
        start = end
    return out


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return the sum over each expert's rows of left (R, A) times right (R, B): (E, A, B)."""
    out = left.new_zeros(len(ends), left.shape[-1], right.shape[-1])
    start = 0
    for e, end in enumerate(ends.tolist()):
        out[e] = left[start:end].T @ right[start:end]
        start = end
    return out
