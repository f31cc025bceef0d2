"""How many tokens each expert got, in one kernel launch, on GPUs with Triton.

At decode the counts of every layer are read at every step, and what they cost is the number of launches. A custom
operator, opaque to `torch.compile`; whether it runs follows from shapes alone.

Shape letters: T tokens, K slots, E experts.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
#: Most slots of all tokens that one program counts.
MAX_PAIRS = 8192


def can_count(index: Tensor) -> bool:
    """Return whether the kernel takes the ids ``index`` (T, K)."""
    return HAS_TRITON and index.is_cuda and 0 < index.numel() <= MAX_PAIRS


@torch.library.custom_op("thermoe::count_experts", mutates_args=())
def count_experts(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return float32 (E,), tokens per expert, and bool (E,), whether there are any.

    Args:
        index: int64 (T, K), ids of at least 0; those from E count for nothing.
        experts: E.
    """
    from thermoe.moe.kernels.count import count

    return count(index.contiguous(), experts)


@count_experts.register_fake
def _(index: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return index.new_empty(experts, dtype=torch.float32), index.new_empty(experts, dtype=torch.bool)
