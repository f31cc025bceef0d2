"""From scores to ids and combine weights in one launch, in Triton, for a few tokens a program.

See `thermoe.routers.fused_choice` for what is computed. What a weight comes out as depends on the probabilities and the
order of the slots alone, on no layout, so that every router that chooses the same gets the same bits.

Shape letters: T tokens, O outputs of the router, K slots, N tokens of a program.
"""
# No postponed annotations here: Triton reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOWEST = tl.constexpr(-3.0e38)
_TINY = tl.constexpr(1.1754943508222875e-38)
#: Tokens of a program of one warp.
_ROWS = 2


@triton.jit
def _choose_kernel(
    p_ptr, score_ptr, index_ptr, real_ptr, ramp_ptr, out_ptr, weight_ptr, T,
    OUTPUTS: tl.constexpr, LIVE: tl.constexpr, E: tl.constexpr, K: tl.constexpr, GATE: tl.constexpr,
    RANK: tl.constexpr, HAS_REAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, o, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_K)
    row = tl.program_id(0) * BLOCK_N + n
    inside = row < T
    slot_at, slots = row[:, None] * K + k[None, :], inside[:, None] & (k[None, :] < K)
    if RANK:
        there = inside[:, None] & (o[None, :] < OUTPUTS)
        score = tl.load(score_ptr + row[:, None] * OUTPUTS + o[None, :], mask=there, other=0.0)
        score = tl.where(score > _LOWEST, score, _LOWEST)  # what is no number comes last
        score = tl.where(there, score, -float("inf"))
        chosen = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        for slot in tl.static_range(K):
            best = tl.argmax(score, axis=1)
            chosen = tl.where(k[None, :] == slot, best[:, None], chosen)
            score = tl.where(o[None, :] == best[:, None], -float("inf"), score)
    else:
        chosen = tl.load(index_ptr + slot_at, mask=slots, other=OUTPUTS).to(tl.int32)
    if HAS_REAL:
        real = tl.load(real_ptr + row, mask=inside, other=0) != 0
        chosen = tl.where(real[:, None], chosen, OUTPUTS)
    used = slots & (chosen < LIVE)
    p = tl.load(p_ptr + row[:, None] * OUTPUTS + chosen, mask=used, other=0.0)
    weight = p
    if GATE == "renormalized":
        total = tl.zeros([BLOCK_N], tl.float32)
        for slot in tl.static_range(K):  # one after the other, whatever the layout
            total += tl.sum(tl.where(k[None, :] == slot, p, 0.0), axis=1)
        weight = tl.div_rn(p, tl.maximum(total, _TINY)[:, None] + tl.zeros_like(p))
    if GATE == "ramped":  # in the precision of the ramp what PyTorch computes in it
        ramp = tl.load(ramp_ptr)
        one, scale = 1.0 - ramp.to(tl.float32), ramp.to(tl.float32) * E
        kind: tl.constexpr = ramp_ptr.dtype.element_ty
        weight = tl.where(used, one.to(kind).to(tl.float32) + scale.to(kind).to(tl.float32) * p, 0.0)
    tl.store(out_ptr + slot_at, chosen.to(tl.int64), mask=slots)
    tl.store(weight_ptr + slot_at, weight.to(weight_ptr.dtype.element_ty), mask=slots)


def choose(
    p: Tensor,
    scores: Tensor | None,
    index: Tensor | None,
    real: Tensor | None,
    ramp: Tensor,
    slots: int,
    gate: str,
    live: int,
    experts: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return ids int64 (T, K) and weights (T, K); see `thermoe.routers.fused_choice`."""
    tokens, outputs = p.shape
    out = torch.empty(tokens, slots, dtype=torch.int64, device=p.device)
    weights = torch.empty(tokens, slots, dtype=dtype, device=p.device)
    _choose_kernel[(triton.cdiv(tokens, _ROWS),)](
        p, scores, index, real, ramp, out, weights, tokens,
        OUTPUTS=outputs, LIVE=live, E=experts, K=slots, GATE=gate, RANK=index is None, HAS_REAL=real is not None,
        BLOCK_N=_ROWS, BLOCK_O=max(16, triton.next_power_of_2(outputs)), BLOCK_K=max(2, triton.next_power_of_2(slots)),
        num_warps=1,
    )  # fmt: skip
    return out, weights
