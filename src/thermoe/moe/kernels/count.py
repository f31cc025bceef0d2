"""Tokens per expert, in one program, in Triton; see `thermoe.moe.fused_count`."""
# No postponed annotations here: Triton reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _count_kernel(index_ptr, count_ptr, opened_ptr, pairs, E: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr):
    at, e = tl.arange(0, BLOCK), tl.arange(0, BINS)
    index = tl.load(index_ptr + at, mask=at < pairs, other=E)
    found = tl.histogram(tl.minimum(index, E).to(tl.int32), BINS)  # bin E holds what is no expert
    tl.store(count_ptr + e, found.to(tl.float32), mask=e < E)
    tl.store(opened_ptr + e, found > 0, mask=e < E)


def count(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return float32 (E,) and bool (E,); see `thermoe.moe.fused_count`."""
    counts = torch.empty(experts, dtype=torch.float32, device=index.device)
    opened = torch.empty(experts, dtype=torch.bool, device=index.device)
    block, bins = max(128, triton.next_power_of_2(index.numel())), max(128, triton.next_power_of_2(experts + 1))
    _count_kernel[(1,)](
        index, counts, opened, index.numel(), E=experts, BLOCK=block, BINS=bins,
        num_warps=4 if block <= 1024 else 8,
    )  # fmt: skip
    return counts, opened
