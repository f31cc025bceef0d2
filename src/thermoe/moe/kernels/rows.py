"""Tokens to rows and back, in Triton. See `thermoe.moe.kernels.reference` for what is computed.

One program per token and slice of D reads the token once and writes its K rows, or reads its K rows and writes the
token: each row is written by one program and each sum has one order, so that runs repeat bit for bit.
"""
# No postponed annotations here: Triton reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Most values of a row per program; a wider row is sliced.
MAX_BLOCK = 2048


@triton.jit
def _spread_kernel(x, row, ends, out, E, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    live = tl.load(ends + E - 1)
    value = tl.load(x + t * D + d, mask=inside, other=0.0).to(out.dtype.element_ty)
    for k in tl.static_range(K):
        r = tl.load(row + t * K + k)
        tl.store(out + r.to(tl.int64) * D + d, tl.where(r < live, value, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_kernel(rows, row, ends, out, E, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    live = tl.load(ends + E - 1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in tl.static_range(K):
        r = tl.load(row + t * K + k)
        total += tl.load(rows + r.to(tl.int64) * D + d, mask=inside & (r < live), other=0.0).to(tl.float32)
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=inside)


def _grid(tokens: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    return (tokens, triton.cdiv(width, block)), block


def spread(x: Tensor, row: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy each token to the rows of its slots; see the reference."""
    tokens, top_k = row.shape
    out = torch.empty(tokens * top_k, x.shape[1], dtype=dtype, device=x.device)
    grid, block = _grid(tokens, x.shape[1])
    _spread_kernel[grid](x, row, ends, out, ends.shape[0], D=x.shape[1], K=top_k, BLOCK=block)
    return out


def combine(rows: Tensor, row: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of each token's slots in float32; see the reference."""
    tokens, top_k = row.shape
    out = torch.empty(tokens, rows.shape[1], dtype=dtype, device=rows.device)
    grid, block = _grid(tokens, rows.shape[1])
    _combine_kernel[grid](rows, row, ends, out, ends.shape[0], D=rows.shape[1], K=top_k, BLOCK=block)
    return out
