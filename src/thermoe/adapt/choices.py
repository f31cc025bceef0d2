"""What priced routers would choose at many prices at once, from benefits they saw: the same rules, batched over prices.

Prices become groups, so that the functions the routers call choose for all of them in one go. For the benefit "gate"
these know one price; dividing by it leaves u / pi - c and a at price 1, and the same choice.

Shape letters: P prices, G groups, N tokens of a group, M rows, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thermoe.adapt.budget import Phase
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import Routed
from thermoe.routers.fused_selection import ROWS_PER_GROUP, can_fuse, select_by_distortion
from thermoe.routers.priced import PricedRouter
from thermoe.routers.selection import close_by_distortion, drop_by_distortion, open_experts


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of one layer in the groups in which they are routed: (G, N) each, u (G, N, E).

    Args:
        u: benefits, or for a router without a price whatever has its shape.
        real: bool, false for padding.
        forward: number of the forward a row belongs to.
        weight: tokens a row stands for; above 1 where a forward was too long to be held whole.
    """

    u: Tensor
    real: Tensor
    forward: Tensor
    weight: Tensor


def benefit_of(module: Routed, decisions: Sequence[RoutingDecision]) -> Tensor:
    """Return u (M, E), what the priced router of ``module`` weighs against its price."""
    if not isinstance(module.router, PricedRouter):
        return torch.cat([d.logits[:, : d.num_experts] for d in decisions])
    scores = getattr(module, "selection_scores", None)  # an attached router ranks by its model's own scores
    if scores is None:
        found = torch.cat([d.probabilities for d in decisions])
    else:
        found = scores(torch.cat([d.logits for d in decisions]))
    return found.clamp(min=0) if module.router.benefit == "distortion" else module.router.kappa * found


def couples(router: PricedRouter, phase: Phase) -> bool:
    """Whether opening costs act on the choice of the router in this phase."""
    return router.couples_tokens and not router.batch_invariant and (phase == "decode" or router.group_by_position)


def k_max_of(router: PricedRouter) -> int:
    """Return the most experts a token has now."""
    return router.active_top_k or router.top_k


def choose_at(router: PricedRouter, rows: Rows, prices: Sequence[float] | None, coupled: bool) -> tuple[Tensor, Tensor]:
    """Return the choice of ``router`` at each price: ids (P, G, N, K) and which of these slots are used."""
    k_max, real = k_max_of(router), rows.real.unsqueeze(-1)
    k_min = min(router.k_min, k_max)
    if prices is None:
        index = rows.u.topk(k_max, -1).indices.unsqueeze(0)
        return index, real.expand_as(index[0]).unsqueeze(0)
    at = torch.tensor(prices, device=rows.u.device, dtype=torch.float32)
    choose = _by_distortion if router.benefit == "distortion" else _by_gate
    index, used = choose(router, rows, at, coupled, k_min, k_max)
    return index, used & real


def _by_gate(
    router: PricedRouter, rows: Rows, prices: Tensor, coupled: bool, k_min: int, k_max: int
) -> tuple[Tensor, Tensor]:
    pair = router.pair_cost
    u = rows.u / prices.view(-1, 1, 1, 1)
    r, key = u - pair, u - (pair - pair.min())
    opened = torch.ones_like(r, dtype=torch.bool)
    if coupled:
        real, one = _repeat(rows.real, len(prices)), torch.ones_like(prices[0])
        found = open_experts(u.flatten(0, 1), real, one, pair, router.open_cost, k_min, k_max, router.drop)
        opened = found.unflatten(0, u.shape[:2]).unsqueeze(2).expand_as(u)
        key = torch.where(opened, key, torch.finfo(key.dtype).min)
    index = key.topk(k_max, -1).indices
    kept = torch.arange(k_max, device=u.device) < k_min
    return index, ((r.gather(-1, index) > 0) | kept) & opened.gather(-1, index)


def _by_distortion(
    router: PricedRouter, rows: Rows, prices: Tensor, coupled: bool, k_min: int, k_max: int
) -> tuple[Tensor, Tensor]:
    count, weight = len(prices), router.kappa * router.sensitivity
    groups, tokens, experts = rows.u.shape
    if router.drop == "none":  # what is never closed is open to all
        coupled = False
    launched = groups if coupled else -(-groups * tokens // ROWS_PER_GROUP)
    if can_fuse(rows.u.flatten(0, 1), launched, k_max):
        return _by_kernel(router, rows, prices, coupled, k_min, k_max, launched)
    p_GNE, opened = _repeat(rows.u, count), None
    own = p_GNE.topk(k_max, -1).indices
    index = own
    if coupled:
        open_price = (prices.unsqueeze(-1) * router.open_cost).repeat_interleave(groups, 0)
        real = _repeat(rows.real, count)
        opened = close_by_distortion(
            p_GNE, real, open_price, weight, k_min, k_max, router.drop, router.favourite_weight
        ).unsqueeze(1)
        value, index = torch.where(opened, p_GNE, -1.0).topk(k_max, -1)
        index = torch.where(value >= 0, index, experts)
    pair_price = (prices.unsqueeze(-1) * router.pair_cost).repeat_interleave(groups * tokens, 0)
    flat = index.flatten(0, 1), p_GNE.flatten(0, 1), own.flatten(0, 1)
    index = drop_by_distortion(flat[0], flat[1], flat[2], pair_price, weight, k_min)
    index = index.view(count, groups, tokens, k_max)
    return index, index < experts


def _by_kernel(
    router: PricedRouter, rows: Rows, prices: Tensor, coupled: bool, k_min: int, k_max: int, launched: int
) -> tuple[Tensor, Tensor]:
    """Choose by distortion in one kernel launch a price; it has token n of group g in row n * G + g."""
    groups, tokens, experts = rows.u.shape
    p, real = rows.u.transpose(0, 1).flatten(0, 1), rows.real.transpose(0, 1).flatten() if coupled else None
    costs, protect = (router.pair_cost, router.open_cost, router.sensitivity), router.drop == "phase2"
    rule = launched, k_min, k_max, coupled, protect, router.favourite_weight
    chosen = [select_by_distortion(p, p, real, None, price, router.kappa, *costs, *rule) for price in prices.unbind()]
    index = torch.stack(chosen).unflatten(1, (tokens, groups)).transpose(1, 2)
    return index, index < experts


def _repeat(values: Tensor, count: int) -> Tensor:
    """Return (G, ...) as (P * G, ...), once for each price."""
    return values.expand(count, *values.shape).flatten(0, 1)
