"""The activation between the two products and its gradient, one pass each, in Triton.

See `thermoe.moe.kernels.reference` for what is computed. Values are float32 in registers whatever the dtype in memory.
"""
# No postponed annotations here: Triton reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _value_and_slope(x, ACT: tl.constexpr):
    if ACT == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1 + x * (1 - s))
    elif ACT == "gelu_tanh":  # 0.5 (1 + tanh y) = sigmoid(2y)
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * s
        slope = s + value * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    return value, slope


@triton.jit
def _load_h(h, bias, e, r, f, mask, F: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Gate and value (the gate twice when there is no value) of rows ``r``, columns ``f``, 0 outside ``mask``."""
    width = 2 * F if GATED else F
    at = r[:, None].to(tl.int64) * width + f[None, :]
    gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        at_bias = e[:, None] * width + f[None, :]
        gate += tl.load(bias + at_bias, mask=mask, other=0.0).to(tl.float32)
    value = gate
    if GATED:
        value = tl.load(h + at + F, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            value += tl.load(bias + at_bias + F, mask=mask, other=0.0).to(tl.float32)
    return gate, value


@triton.jit
def _activate_kernel(
    h, bias, weight, order, expert, ends, out, R, E,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live = r < tl.load(ends + E - 1)
    mask = live[:, None] & (f < F)[None, :]
    w = tl.load(weight + tl.load(order + r, mask=live, other=0), mask=live, other=0.0).to(tl.float32)
    e = tl.load(expert + r, mask=live, other=0).to(tl.int32)
    gate, value = _load_h(h, bias, e, r, f, mask, F, GATED, HAS_BIAS)
    hidden, _ = _value_and_slope(gate, ACT)
    if GATED:
        hidden *= value
    hidden = tl.where(mask, hidden * w[:, None], 0.0)
    at = r[:, None].to(tl.int64) * F + f[None, :]
    tl.store(out + at, hidden.to(out.dtype.element_ty), mask=(r < R)[:, None] & (f < F)[None, :])


@triton.jit
def _activate_backward_kernel(
    grad, h, bias, weight, order, expert, ends, grad_h, out, grad_weight, R, E,
    F: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < R
    live = r < tl.load(ends + E - 1)
    slot = tl.load(order + r, mask=inside, other=0)
    w = tl.load(weight + slot, mask=live, other=0.0).to(tl.float32)[:, None]
    e = tl.load(expert + r, mask=live, other=0).to(tl.int32)
    width = 2 * F if GATED else F
    total = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        mask = live[:, None] & (f < F)[None, :]
        gate, value = _load_h(h, bias, e, r, f, mask, F, GATED, HAS_BIAS)
        at = r[:, None].to(tl.int64) * F + f[None, :]
        d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        hidden, slope = _value_and_slope(gate, ACT)
        stored = inside[:, None] & (f < F)[None, :]
        at_h = r[:, None].to(tl.int64) * width + f[None, :]
        if GATED:
            tl.store(grad_h + at_h + F, (w * d * hidden).to(grad_h.dtype.element_ty), mask=stored)
            slope *= value
            hidden *= value
        tl.store(grad_h + at_h, (w * d * slope).to(grad_h.dtype.element_ty), mask=stored)
        tl.store(out + at, (w * hidden).to(out.dtype.element_ty), mask=stored)
        total += d * hidden
    tl.store(grad_weight + slot, tl.sum(total, axis=1).to(grad_weight.dtype.element_ty), mask=inside)


def _blocks(width: int, values: int) -> tuple[int, int]:
    """Rows and columns of a tile of ``values``: columns divide the width where a power of two up to 256 does."""
    columns = min(width & -width, 256)
    if columns < 32:
        columns = min(triton.next_power_of_2(width), 256)
    return max(1, values // columns), columns


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
    """Return w * act(h + b); see the reference."""
    rows, width = h.shape[0], h.shape[1] // 2 if gated else h.shape[1]
    out = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    block_r, block_f = _blocks(width, 2048)
    grid = (triton.cdiv(rows, block_r), triton.cdiv(width, block_f))
    _activate_kernel[grid](
        h, h if bias is None else bias, weight, order, expert, ends, out, rows, ends.shape[0],
        F=width, ACT=activation, GATED=gated, HAS_BIAS=bias is not None, BLOCK_R=block_r, BLOCK_F=block_f,
    )  # fmt: skip
    return out


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
    """Differentiate `activate`; see the reference."""
    rows, width = grad.shape
    grad_h, out, grad_weight = torch.empty_like(h), torch.empty_like(grad), torch.empty_like(weight)
    block_r, block_f = _blocks(width, 1024)
    _activate_backward_kernel[(triton.cdiv(rows, block_r),)](
        grad, h, h if bias is None else bias, weight, order, expert, ends, grad_h, out, grad_weight,
        rows, ends.shape[0],
        F=width, ACT=activation, GATED=gated, HAS_BIAS=bias is not None, BLOCK_R=block_r, BLOCK_F=block_f,
    )  # fmt: skip
    return grad_h, out, grad_weight
