"""Selection by distortion in one kernel launch, on GPUs with Triton; `selection.py` says what is computed.

A chain of small kernels would take longer at decode than the expert layer whose joules it is to save. The kernel is a
custom operator, opaque to `torch.compile`. Which groups it takes follows from shapes alone.

Shape letters: T tokens, E experts, K slots, G groups, N tokens of a group.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from thermoe.routers import selection

HAS_TRITON = find_spec("triton") is not None
#: Most experts, slots, and scores of a group that one program holds. Beyond 8192 scores a thread has 16, and 480 bytes
#: of what belongs to them lie outside its registers; twice as many would leave most of it there.
MAX_EXPERTS, MAX_SLOTS, MAX_SCORES = 128, 8, 16384
#: Rows by themselves are put into groups of this many.
ROWS_PER_GROUP = 16


def can_fuse(scores: Tensor, groups: int, k_max: int) -> bool:
    """Return whether the kernel takes scores (T, E) in so many groups."""
    if not (scores.is_cuda and HAS_TRITON and scores.dtype == torch.float32 and scores.shape[0] and k_max):
        return False
    experts, tokens = scores.shape[-1], -(-scores.shape[0] // groups)
    size = _power_of_2(tokens) * _power_of_2(experts)
    return experts <= MAX_EXPERTS and k_max <= MAX_SLOTS and size <= MAX_SCORES


def _power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


@torch.library.custom_op("thermoe::select_by_distortion", mutates_args=())
def select_by_distortion(
    p: Tensor,
    logits: Tensor,
    real: Tensor | None,
    baseline: Tensor | None,
    price: Tensor,
    kappa: Tensor,
    pair_cost: Tensor,
    open_cost: Tensor,
    sensitivity: Tensor,
    groups: int,
    k_min: int,
    k_max: int,
    coupled: bool,
    protect: bool,
    favourite_weight: float,
) -> Tensor:
    """Return ids int64 (T, K) of the priced choice, E for none.

    Args:
        p: float32 (T, E), probabilities, those below 0 taken for 0; token n of group g is row n * G + g.
        logits: float32 (T, E), which order a token's experts.
        real: bool (T,), false for padding, or ``None``.
        baseline: int64 (T, K), the answer at price 0; ``None`` for the top-k, equal scores by the number of the expert.
        price: scalar.
        kappa: scalar, on the sensitivities.
        pair_cost: (E,).
        open_cost: (E,).
        sensitivity: (E,).
        groups: G.
        k_min: experts a token keeps.
        k_max: K.
        coupled: whether opening costs act.
        protect: whether the k_min best experts of a token stay open.
        favourite_weight: on what a token loses by the closing of one of these.
    """
    from thermoe.routers.kernels.select import select

    return select(
        p.contiguous(), logits.contiguous(), None if real is None else real.contiguous(),
        None if baseline is None else baseline.contiguous(), price, kappa, pair_cost, open_cost, sensitivity, groups,
        k_min, k_max, coupled, protect, favourite_weight, selection.ROUNDS, selection.SHARE,
    )  # fmt: skip


@select_by_distortion.register_fake
def _(p: Tensor, logits: Tensor, real: Tensor | None, baseline: Tensor | None, price: Tensor, kappa: Tensor,
      pair_cost: Tensor, open_cost: Tensor, sensitivity: Tensor, groups: int, k_min: int, k_max: int, coupled: bool,
      protect: bool, favourite_weight: float) -> Tensor:  # fmt: skip
    return p.new_empty((p.shape[0], k_max), dtype=torch.int64)
