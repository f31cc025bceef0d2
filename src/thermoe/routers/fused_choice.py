"""Top-k, the mask of padding and the combine weights in one kernel launch, for inference on GPUs with Triton.

At decode a router is a chain of kernels over a few hundred numbers, each of which takes longer to start than to run.
This one takes the place of about ten. It is a custom operator, opaque to `torch.compile`; whether it runs follows from
shapes, dtypes and features alone, the same way for every router, so that routers that choose alike stay bit-equal.

Scores that are equal go by the number of the expert, and one that is no number comes last, where `torch.topk` leaves
the first open and puts the second first. Weights differ from PyTorch's by the order of a sum of K numbers.

Shape letters: T tokens, O outputs of the router, K slots.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
#: Most tokens, outputs and slots. With more tokens the launches no longer count.
MAX_TOKENS, MAX_OUTPUTS, MAX_SLOTS = 1024, 256, 8


def can_choose(probabilities: Tensor, slots: int) -> bool:
    """Return whether the kernel takes probabilities (T, O) and so many slots: on CUDA, in float32, without gradient."""
    if torch.is_grad_enabled() or not (HAS_TRITON and probabilities.is_cuda and probabilities.dtype == torch.float32):
        return False
    tokens, outputs = probabilities.shape
    return 0 < tokens <= MAX_TOKENS and outputs <= MAX_OUTPUTS and 0 < slots <= MAX_SLOTS


@torch.library.custom_op("thermoe::choose_and_weigh", mutates_args=())
def choose_and_weigh(
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
    """Return ids int64 (T, K), O for none, and combine weights (T, K), 0 where there is nothing to combine.

    Args:
        p: float32 (T, O), probabilities.
        scores: float32 (T, O), of which the K highest are taken; or ``None`` with ``index``.
        index: int64 (T, K), a choice to weigh; or ``None`` with ``scores``.
        real: bool (T,), false for padding, which gets no expert; or ``None``.
        ramp: scalar of the gate "ramped".
        slots: K.
        gate: see `thermoe.routers.base.Router`.
        live: ids below it have a weight.
        experts: E of the gate "ramped".
        dtype: of the weights.
    """
    from thermoe.routers.kernels.choose import choose

    p, scores, index, real = (None if v is None else v.contiguous() for v in (p, scores, index, real))  # type: ignore[assignment]
    return choose(p, scores, index, real, ramp, slots, gate, live, experts, dtype)


@choose_and_weigh.register_fake
def _(p: Tensor, scores: Tensor | None, index: Tensor | None, real: Tensor | None, ramp: Tensor, slots: int, gate: str,
      live: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = p.shape[0], slots
    return p.new_empty(shape, dtype=torch.int64), p.new_empty(shape, dtype=dtype)


def best(scores: Tensor, slots: int) -> Tensor:
    """Return ids (T, K) of the highest scores, in one launch where `can_choose` says so."""
    return choose_and_weigh(
        scores, scores, None, None, scores, slots, "probability", scores.shape[-1], 1, scores.dtype
    )[0]
