"""From (expert ids, weights) to expert outputs: capacity, permutation, expert compute, combination.

Every routing idea is a rewrite of ids and weights; E as an id is the sentinel "no expert". The plan sorts the T*K slots
by expert (stable, sentinels last), so that each expert reads one contiguous run of rows; results go back to their slots
and the K slots of a token are summed in a fixed order, so that runs repeat bit for bit.

Shape letters: T tokens, K slots per token, R = T * K rows, E experts, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.moe.experts import Experts

DropOrder = Literal["position", "probability"]
DROP_ORDERS: tuple[DropOrder, ...] = ("position", "probability")
BACKENDS = ("auto", "loop", "grouped", "dense")


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """The slots of a call sorted by expert.

    Args:
        order: int64 (R,), slot of each sorted row; slot = token * K + k.
        expert: int64 (R,), expert of each sorted row, sentinels (E) last.
        ends: int32 (E,), inclusive end of each expert's run of rows.
    """

    order: Tensor
    expert: Tensor
    ends: Tensor


def plan_dispatch(expert_index: Tensor, num_experts: int) -> DispatchPlan:
    """Sort the slots of ``expert_index`` (T, K) by expert, keeping their order within an expert."""
    expert, order = torch.sort(expert_index.reshape(-1), stable=True)
    ids = torch.arange(1, num_experts + 1, device=expert.device)
    ends = torch.searchsorted(expert, ids, out_int32=True)
    return DispatchPlan(order, expert, ends)


def expert_capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """Return ceil(c * T * K / E), the most tokens an expert takes (GShard, arXiv 2006.16668)."""
    return math.ceil(capacity_factor * tokens * top_k / num_experts)


def apply_capacity(
    expert_index: Tensor,
    probabilities: Tensor,
    capacity: int,
    *,
    drop_order: DropOrder = "position",
) -> Tensor:
    """Turn the slots beyond each expert's capacity into sentinels.

    Args:
        expert_index: int64 (T, K).
        probabilities: (T, E), used by the drop order "probability".
        capacity: most tokens per expert, at least 0.
        drop_order: "position" keeps the earliest tokens of the call, "probability" the most probable ones (ties:
            the earliest).

    Returns:
        int64 (T, K) with E in the dropped slots.
    """
    num_experts = probabilities.shape[-1]
    flat = expert_index.reshape(-1)
    if drop_order == "probability":
        padded = F.pad(probabilities, (0, 1))
        slot_probability = padded.gather(-1, expert_index).reshape(-1)
        first = torch.sort(slot_probability, descending=True, stable=True).indices
    elif drop_order == "position":
        first = torch.arange(flat.numel(), device=flat.device)
    else:
        raise UnknownNameError.of("drop order", str(drop_order), DROP_ORDERS, where="drop_order")
    expert, within = torch.sort(flat[first], stable=True)
    order = first[within]
    starts = torch.searchsorted(expert, expert, right=False)
    rank = torch.arange(flat.numel(), device=flat.device) - starts
    kept = torch.where(rank < capacity, expert, num_experts)
    return torch.empty_like(flat).scatter(0, order, kept).reshape(expert_index.shape)


def expand_to_blocks(expert_index: Tensor, weights: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """Turn slots of experts into slots of their blocks, each with the expert's weight.

    Shapes depend on the table alone and no count is read, so that it runs in a CUDA graph. A token may name an expert
    twice, hence K * M slots, M blocks of the widest expert each.

    Args:
        expert_index: int64 (T, K), E meaning "no expert".
        weights: (T, K).
        block_table: int64 (E + 1, M), as `Experts` holds it.

    Returns:
        int64 (T, K * M) block numbers, G (the table's own sentinel) meaning "no block", and their weights, 0 there.
    """
    ids = block_table[expert_index].flatten(1)
    repeated = weights.unsqueeze(-1).expand(-1, -1, block_table.shape[1]).flatten(1)
    # The last row is all sentinels; `where`, not a product, stops the gradient of the slots without a block.
    return ids, torch.where(ids != block_table[-1, -1], repeated, 0)


def run_dense(x_TD: Tensor, expert_index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Reference: every expert on every token, then the weighted sum. Static shapes on any device and dtype."""
    scattered = torch.zeros(x_TD.shape[0], experts.num_blocks + 1, dtype=weights.dtype, device=x_TD.device).scatter_add(
        1, expert_index, weights
    )
    return torch.einsum("te,etd->td", scattered[:, :-1].to(x_TD.dtype), experts.forward_blocks(x_TD))


def _combine(rows: Tensor, slot: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Put rows (R', D) back into their slots (R',) and sum the K slots of each token in order, at least in float32."""
    tokens, top_k = weights.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    slots = torch.zeros(tokens * top_k, rows.shape[-1], dtype=rows.dtype, device=rows.device)
    weighted = slots.index_copy(0, slot, rows).view(tokens, top_k, -1).to(wide) * weights.unsqueeze(-1).to(wide)
    return weighted.sum(1).to(dtype)


def run_loop(x_TD: Tensor, expert_index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Sort once, then visit the experts that have rows. The default on CPU, where reading a count is free.

    On a GPU it waits for the counts once per call, so that it is for references there.
    """
    top_k = expert_index.shape[1]
    plan = plan_dispatch(expert_index, experts.num_blocks)
    ends = plan.ends.tolist()
    live = ends[-1] if ends else 0
    token = plan.order[:live] // top_k
    x_RD = x_TD[token]
    outputs, start = [], 0
    for e, end in enumerate(ends):
        if end == start:
            continue
        up = F.linear(x_RD[start:end], experts.up_weight[e], None if experts.up_bias is None else experts.up_bias[e])
        outputs.append(
            F.linear(
                experts.activate(up),
                experts.down_proj[e],
                None if experts.down_bias is None else experts.down_bias[e],
            )
        )
        start = end
    if not outputs:
        return torch.zeros_like(x_TD)
    return _combine(torch.cat(outputs), plan.order[:live], weights, x_TD.dtype)


def run_grouped(x_TD: Tensor, expert_index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """Sort once, then two grouped matrix products. No host synchronisation in bfloat16 on SM90 and newer.

    `grouped_mm` leaves the rows behind the last group uninitialised, in the output and in the gradient, so each product
    is masked on both sides.
    """
    top_k = expert_index.shape[1]
    plan = plan_dispatch(expert_index, experts.num_blocks)
    live = (torch.arange(plan.order.numel(), device=x_TD.device) < plan.ends[-1]).unsqueeze(-1)
    expert = plan.expert.clamp(max=experts.num_blocks - 1)
    x_RD = torch.where(live, x_TD[plan.order // top_k], 0)
    up = F.grouped_mm(x_RD, experts.up_weight.transpose(1, 2), offs=plan.ends)
    if experts.up_bias is not None:
        up = up + experts.up_bias[expert]
    hidden = torch.where(live, experts.activate(torch.where(live, up, 0)), 0)
    rows = F.grouped_mm(hidden, experts.down_proj.transpose(1, 2), offs=plan.ends)
    if experts.down_bias is not None:
        rows = rows + experts.down_bias[expert]
    return _combine(torch.where(live, rows, 0), plan.order, weights, x_TD.dtype)


def default_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Return what "auto" means outside of compilation: "grouped" where it does not wait for the host, else "loop"."""
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (9, 0):
        return "grouped"
    return "loop"


def _choose_backend(x_TD: Tensor) -> str:
    chosen = default_backend(x_TD.device, x_TD.dtype)
    # The loop reads its counts on the host, which a compiled graph cannot hold.
    return "dense" if chosen == "loop" and torch.compiler.is_compiling() else chosen


def run_experts(
    x_TD: Tensor, expert_index: Tensor, weights: Tensor, experts: Experts, *, backend: str = "auto"
) -> Tensor:
    """Compute sum_k w_tk * expert_{i_tk}(x_t) for every token.

    Args:
        x_TD: (T, D).
        expert_index: int64 (T, K), E meaning "no expert".
        weights: (T, K), 0 where there is no expert.
        experts: the E networks.
        backend: "auto", "loop", "grouped" or "dense".

    Returns:
        (T, D) in the dtype of ``x_TD``.

    Raises:
        UnknownNameError: no such backend.
        ConfigError: the widths do not suit `grouped_mm`.
    """
    if backend not in BACKENDS:
        raise UnknownNameError.of("expert backend", backend, BACKENDS, where="backend")
    if x_TD.shape[0] == 0 or expert_index.shape[1] == 0:
        return torch.zeros_like(x_TD)
    if experts.block_table is not None:  # from here on ids are those of blocks, below experts.num_blocks
        expert_index, weights = expand_to_blocks(expert_index, weights, experts.block_table)
    chosen = _choose_backend(x_TD) if backend == "auto" else backend
    if chosen == "dense":
        return run_dense(x_TD, expert_index, weights, experts)
    if chosen == "loop":
        return run_loop(x_TD, expert_index, weights, experts)
    if experts.hidden_size % 8 or experts.intermediate_size % 8:
        raise ConfigError(
            f"grouped_mm cannot take hidden_size {experts.hidden_size}, intermediate_size {experts.intermediate_size}",
            where="backend='grouped'",
            accepted="both a multiple of 8",
            fix="use backend='loop', or choose an expert count that leaves a width divisible by 8",
        )
    return run_grouped(x_TD, expert_index, weights, experts)
