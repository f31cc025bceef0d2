"""Experts for training on recent NVIDIA GPUs: grouped products with every pass between them fused into one kernel.

The combine weight goes into the activation, w * act(x W_up) W_down, so that the sum over a token's slots is plain in
both directions. The backward keeps the up-projection's output and neither the activation nor the experts' outputs: with
dA = dout W_down, the gradient of a weight is <dA, act>, and act is computed again on the way. Everything has a static
shape and a fixed order of summation; nothing waits for the host.

Both directions are custom operators, opaque to `torch.compile`. On the CPU they run their PyTorch reference, for tests:
it waits for the counts.

Shape letters: T tokens, K slots per token, R = T * K rows, E experts, D model width, F expert width, H = 2F when gated,
else F.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from thermoe.moe.experts import MAX_BLOCKS, Experts
from thermoe.moe.kernels import products, reference

HAS_TRITON = find_spec("triton") is not None


def why_not_fused(experts: Experts) -> str | None:
    """Return why these experts cannot be fused, or ``None`` when they can."""
    if experts.activation not in reference.ACTIVATIONS:
        return f"the activation {experts.activation!r} has no kernel"
    if type(experts).activate is not Experts.activate:
        return f"{type(experts).__name__} has an activation of its own"
    if experts.down_bias is not None:
        return "each expert has an output bias"
    if experts.hidden_size % 8 or experts.intermediate_size % 8:
        return f"hidden_size {experts.hidden_size} or intermediate_size {experts.intermediate_size} is no multiple of 8"
    if experts.num_blocks > MAX_BLOCKS:
        return f"there are {experts.num_blocks} experts"
    return None


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of the passes; `thermoe.moe.kernels.reference` says what each computes."""

    spread: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    activate: Callable[..., Tensor]
    activate_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    grouped_product: Callable[..., Tensor]
    grouped_outer: Callable[..., Tensor]


REFERENCE = Kernels(
    reference.spread,
    reference.combine,
    reference.activate,
    reference.activate_backward,
    reference.grouped_product,
    reference.grouped_outer,
)


@functools.cache
def _triton() -> Kernels:
    from thermoe.moe.kernels import activation, rows

    return Kernels(
        rows.spread,
        rows.combine,
        activation.activate,
        activation.activate_backward,
        products.grouped_product,
        products.grouped_outer,
    )


def kernels_for(device: torch.device) -> Kernels:
    """Return Triton's kernels on a GPU, the reference elsewhere."""
    return _triton() if device.type == "cuda" else REFERENCE


@torch.library.custom_op("thermoe::fused_experts", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    order: Tensor,
    row: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (T, D), and what the backward needs: the rows (R, D) and h (R, H), empty unless ``keep``."""
    run = kernels_for(x.device)
    gated = up.shape[1] != down.shape[2]
    x_RD = run.spread(x.contiguous(), row, ends, up.dtype)
    h_RH = run.grouped_product(x_RD, up.transpose(1, 2), ends)
    kept = (x_RD, h_RH) if keep else (x_RD.new_empty(0), x_RD.new_empty(0))
    del x_RD
    a_RF = run.activate(h_RH, bias, weight, order, expert, ends, activation, gated)
    del h_RH
    y_RD = run.grouped_product(a_RF, down.transpose(1, 2), ends)
    return run.combine(y_RD, row, ends, x.dtype), *kept


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    order: Tensor,
    row: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = order.shape[0]
    out = x.new_empty(x.shape)
    if not keep:
        return out, up.new_empty(0), up.new_empty(0)
    return out, up.new_empty(rows, up.shape[2]), up.new_empty(rows, up.shape[1])


@torch.library.custom_op("thermoe::fused_experts_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    order: Tensor,
    row: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, up, down and bias, empty where not ``wanted`` (that of weight comes free)."""
    run = kernels_for(grad.device)
    gated = up.shape[1] != down.shape[2]
    grad_y = run.spread(grad.contiguous(), row, ends, up.dtype)
    grad_a = run.grouped_product(grad_y, down, ends)
    grad_h, a_RF, grad_weight = run.activate_backward(
        grad_a, h_RH, bias, weight, order, expert, ends, activation, gated
    )
    del grad_a
    nothing = up.new_empty
    grad_down = run.grouped_outer(grad_y, a_RF, ends) if wanted[3] else nothing(0)
    del grad_y, a_RF
    grad_up = run.grouped_outer(grad_h, x_RD, ends) if wanted[2] else nothing(0)
    if wanted[4]:  # a product with ones, eight wide for the alignment, sums in one order without atomics
        ones = grad_h.new_ones(grad_h.shape[0], 8)
        grad_bias = run.grouped_outer(grad_h, ones, ends)[..., 0].contiguous()
    else:
        grad_bias = nothing(0)
    if wanted[0]:
        grad_x = run.combine(run.grouped_product(grad_h, up, ends), row, ends, grad.dtype)
    else:
        grad_x = grad.new_empty(0)
    return grad_x, grad_weight, grad_up, grad_down, grad_bias


@_backward.register_fake
def _(
    grad: Tensor,
    x_RD: Tensor,
    h_RH: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    order: Tensor,
    row: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape if wanted[0] else 0),
        weight.new_empty(weight.shape),
        up.new_empty(up.shape if wanted[2] else 0),
        up.new_empty(down.shape if wanted[3] else 0),
        up.new_empty(up.shape[:2] if wanted[4] else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, up, down, bias, order, row, expert, ends, activation, _ = inputs
    _, x_RD, h_RH = output
    # The kept tensors are large: zeros for their gradients would cost as much again.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(x_RD, h_RH)
    ctx.save_for_backward(x_RD, h_RH, weight, up, down, bias, order, row, expert, ends)
    ctx.activation = activation


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 11
    wanted = list(ctx.needs_input_grad[:5])
    found = _backward(grad, *ctx.saved_tensors, ctx.activation, wanted)
    gradients = [g if want else None for g, want in zip(found, wanted, strict=True)]
    return (*gradients, *(None,) * 6)


_forward.register_autograd(_differentiate, setup_context=_save)


def fused_experts(
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None,
    order: Tensor,
    expert: Tensor,
    ends: Tensor,
    activation: str,
) -> Tensor:
    """Compute sum_k w_tk * act(x_t W_up + b) W_down over the planned slots, differentiable once.

    Args:
        x: (T, D), of any float dtype.
        weights: (T, K) combine weights, used and differentiated in at least float32.
        up: (E, H, D); its dtype is that of the products.
        down: (E, D, F) in the same dtype.
        bias: (E, H) in the same dtype, or ``None``.
        order: int64 (R,), the slot of each row; this and the next two as in `DispatchPlan`.
        expert: int (R,), the expert of each row, E in rows without one.
        ends: int32 (E,).
        activation: a key of `reference.ACTIVATIONS`.

    Returns:
        (T, D) in the dtype of ``x``.
    """
    slots = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    row = torch.empty_like(slots).scatter_(0, order, slots).view(weights.shape)
    weight = weights.reshape(-1).to(torch.promote_types(weights.dtype, torch.float32))
    tensors = (x, weight, up, down) if bias is None else (x, weight, up, down, bias)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    kind = reference.ACTIVATIONS[activation]
    out: Tensor = _forward(x, weight, up, down, bias, order, row, expert, ends, kind, keep)[0]
    return out
