"""The next-token loss, its passes over the logits fused on a GPU.

The logits of a step fill gigabytes where there are tens of thousands of tokens to tell apart, and transformers' loss
goes over them about ten times in float32. Compiled, it is two passes forward and one backward over what the model gave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel


def _sum_of_nats(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_sum_of_nats)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return transformers' causal language-modelling loss, computed by a compiled function.

    Args:
        logits: (B, S, V), of any dtype.
        labels: int64 (B, S), the tokens themselves; position s is scored on label s + 1.
        vocab_size: V.
        num_items_in_batch: what the sum of nats is divided by; the number of labels when ``None``.
        ignore_index: label that is not scored.
        shift_labels: int64 (B, S), labels already moved; in the place of ``labels``.

    Returns:
        Scalar float32, in nats per label.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    target = shift_labels.reshape(-1).to(logits.device)
    total = _compiled()(logits.reshape(-1, vocab_size), target, ignore_index)
    if num_items_in_batch is None:
        return total / (target != ignore_index).sum()
    return total / torch.as_tensor(num_items_in_batch).to(total.device)


def _fits(model: nn.Module) -> bool:
    on_gpu = next(model.parameters()).device.type == "cuda" and find_spec("triton") is not None
    known = isinstance(model, PreTrainedModel) and getattr(model, "loss_type", None) in (None, "ForCausalLM")
    return on_gpu and known and hasattr(model, "lm_head") and "_loss_function" not in model.__dict__


@contextmanager
def fused_loss(model: nn.Module) -> Iterator[bool]:
    """Let ``model`` compute its loss by `causal_lm_loss` while the context is open, where that is faster.

    Yields:
        Whether it does: for a causal language model of transformers on a CUDA device with Triton.
    """
    if not _fits(model):
        yield False
        return
    model.__dict__["_loss_function"] = causal_lm_loss  # where its property `loss_function` looks first
    try:
        yield True
    finally:
        del model.__dict__["_loss_function"]
