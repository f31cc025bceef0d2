"""The choice of experts under a price: which ones a group of tokens opens, and which of these a token takes.

Two ways to say what an expert is worth. "gate": the probability the router gives it, which adds up over a token's
experts; the choice is then exact per token where no opening costs are at play. "distortion": how far the output moves
away from that of the token's own top-k. With w and w' the renormalised weights over its own top-k and over the choice,

    D_t = sum_e s_e (w_te - w'_te)^2,

to second order what the move costs in loss where the deviations of different experts are independent, with
s_e = E[<dNLL/dy, E_e(x) - y>^2] / 2 the measured sensitivity (`thermoe.sensitivity`) in nats. A token that loses
its favourite counts far more than two that lose their last choice, layers and experts count by what they do to the
loss, and a token that has lost much already is spared.

Shape letters: T tokens, E experts, K slots, G groups, N tokens of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DropPass = Literal["all", "phase2", "none"]
#: A round closes this share of the experts that do not earn their price, the least useful first; what is left to close
#: after the last round stays open. More rounds come closer to closing one by one.
ROUNDS, SHARE = 8, 1 / 3


def open_experts(
    u_GNE: Tensor,
    real_GN: Tensor,
    price: Tensor,
    pair_cost: Tensor,
    open_cost: Tensor,
    k_min: int,
    k_max: int,
    drop: DropPass,
) -> Tensor:
    """Return bool (G, E): the experts each group opens (phases 1, 2 and the drop pass).

    Args:
        u_GNE: benefits.
        real_GN: bool, false for padding.
        price: scalar tensor.
        pair_cost: (E,) c.
        open_cost: (E,) a.
        k_min: experts every token keeps.
        k_max: most experts per token.
        drop: "all" may close any expert, "phase2" only those opened for their surplus, "none" closes nothing.
    """
    experts = u_GNE.shape[-1]
    real = real_GN.unsqueeze(-1)
    r = u_GNE - price * pair_cost
    key = u_GNE - price * (pair_cost - pair_cost.min())
    base = torch.zeros_like(u_GNE, dtype=torch.bool)
    if k_min:
        base = base.scatter(-1, key.topk(k_min, -1).indices, True) & real
    favourite = base.any(1)
    wanted = torch.zeros_like(base).scatter(-1, key.topk(k_max, -1).indices, True) & real
    surplus = torch.where(wanted, r.clamp(min=0), 0).sum(1)
    opened = favourite | (surplus > price * open_cost)
    if drop == "none":
        return opened
    worst = torch.finfo(u_GNE.dtype).min
    # Ties are the rule where the price exceeds every benefit and each surplus is 0: then the least useful goes first.
    by_use = torch.where(real, key, 0).sum(1).argsort(dim=-1, stable=True)
    order = by_use.gather(-1, surplus.gather(-1, by_use).argsort(dim=-1, stable=True))
    for rank in range(experts):  # a sequential pass by definition: each closing changes what the others are worth
        candidate = order[:, rank : rank + 1]
        open_GNE = opened.unsqueeze(1).expand_as(r)
        best, used = take_open(key, r, open_GNE, k_min, k_max)
        chosen = torch.zeros_like(base).scatter(-1, best, used)
        # A token that loses this expert falls back on its best open one outside its choice, or, above k_min, on none.
        spare = torch.where(open_GNE & ~chosen, r, worst).amax(-1)
        floor = torch.where(chosen.sum(-1) > k_min, 0.0, worst)
        index = candidate.unsqueeze(1).expand(-1, u_GNE.shape[1], -1)
        loses = chosen.gather(-1, index).squeeze(-1) & real_GN
        loss = torch.where(loses, r.gather(-1, index).squeeze(-1) - torch.maximum(spare, floor), 0).sum(1)
        pays = price * open_cost.expand_as(opened).gather(-1, candidate).squeeze(-1) > loss
        may_close = opened.sum(-1) > max(k_min, 1)
        if drop == "phase2":
            may_close &= ~favourite.gather(-1, candidate).squeeze(-1)
        close = torch.zeros_like(opened).scatter(-1, candidate, (pays & may_close).unsqueeze(-1))
        opened = opened & ~close
    return opened


def take_open(key: Tensor, r: Tensor, opened: Tensor, k_min: int, k_max: int) -> tuple[Tensor, Tensor]:
    """Return each token's k_max best opened experts (..., K) and which of these slots it uses.

    A slot is used when its expert is open and either r > 0 or it is one of the first k_min. Ties keep their order.
    """
    ranked = torch.where(opened, key, torch.finfo(key.dtype).min)
    index = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k_max]
    first = torch.arange(k_max, device=key.device) < k_min
    return index, ((r.gather(-1, index) > 0) | first) & opened.gather(-1, index)


def close_by_distortion(
    p_GNE: Tensor,
    real_GN: Tensor,
    open_price: Tensor,
    sensitivity: Tensor,
    k_min: int,
    k_max: int,
    drop: DropPass,
    favourite_weight: float = 1.0,
) -> Tensor:
    """Return bool (G, E): what is open after closing what brings less than it costs, from the union of all top-k.

    Closing an expert makes each token that uses it take its best open one instead. A token that pays for one of its
    own k_min best experts pays ``favourite_weight`` times; where its output comes closer to its own, nothing changes.

    Args:
        p_GNE: the router's probabilities, at least 0.
        real_GN: bool, false for padding.
        open_price: (E,) or (G, E), price times cost of opening.
        sensitivity: (E,), s.
        k_min: at least so many experts stay open.
        k_max: experts per token.
        drop: "all" may close any expert, "phase2" none that is among some token's k_min best, "none" closes nothing.
        favourite_weight: at least 1 and finite; "phase2" is what "all" tends to as it grows.
    """
    real = real_GN.unsqueeze(-1)
    own = p_GNE.topk(k_max, -1)
    opened = _union(own.indices, p_GNE, real)
    if drop == "none":
        return opened
    first = torch.zeros_like(p_GNE, dtype=torch.bool).scatter(-1, own.indices[..., :k_min], True)
    kept = (first & real).any(1) if drop == "phase2" else torch.zeros_like(opened)
    first_padded = F.pad(first, (0, 1))
    w_GNE = torch.zeros_like(p_GNE).scatter(-1, own.indices, _share(own.values))
    p_padded, s, w_padded = F.pad(p_GNE, (0, 1), value=-1.0), F.pad(sensitivity, (0, 1)), F.pad(w_GNE, (0, 1))
    for _ in range(ROUNDS):
        ranked = p_padded.masked_fill(~F.pad(opened, (0, 1)).unsqueeze(1), -1.0)
        value, index = ranked.topk(k_max + 1, -1)
        p, s_of, w = value.clamp(min=0), s[index], w_padded.gather(-1, index)
        take, spare = slice(k_max), slice(k_max, None)  # the spare expert is the best open one outside the choice
        square, product = s_of * p.square(), s_of * p * w
        mass = p[..., take].sum(-1, keepdim=True)
        squares, products = square[..., take].sum(-1, keepdim=True), product[..., take].sum(-1, keepdim=True)
        now = _distortion(squares, products, mass)
        then = _distortion(
            squares - square[..., take] + square[..., spare],
            products - product[..., take] + product[..., spare],
            mass - p[..., take] + p[..., spare],
        )
        loss = torch.where((p[..., take] > 0) & real, then - now, 0)
        dear = first_padded.gather(-1, index[..., take]) & (loss > 0)
        loss = torch.where(dear, favourite_weight * loss, loss)
        of_expert = torch.zeros_like(F.pad(p_GNE[:, 0], (0, 1)))
        of_expert = of_expert.scatter_add(-1, index[..., take].flatten(1), loss.flatten(1))[:, :-1]
        saving = torch.where(opened & ~kept, open_price - of_expert, 0).clamp(min=0)
        wanted = (saving > 0).sum(-1, keepdim=True)
        number = torch.minimum((wanted * SHARE).ceil(), opened.sum(-1, keepdim=True) - max(k_min, 1))
        rank = saving.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        opened = opened & ~((rank < number) & (saving > 0))
    return opened


def drop_by_distortion(
    index_TK: Tensor, p_TE: Tensor, own_TK: Tensor, pair_price: Tensor, sensitivity: Tensor, k_min: int
) -> Tensor:
    """Return ids (T, K) after each token gave up experts that bring it less than they cost, the least useful first.

    Args:
        index_TK: ids of the choice, E for none.
        p_TE: the router's probabilities, at least 0.
        own_TK: the token's own top-k, whose output is the measure.
        pair_price: (E,) or (T, E), price times cost of a token-expert pair.
        sensitivity: (E,), s.
        k_min: experts a token keeps.
    """
    experts, slots = p_TE.shape[-1], torch.arange(index_TK.shape[-1], device=index_TK.device)
    w_TE = torch.zeros_like(p_TE).scatter(-1, own_TK, _share(p_TE.gather(-1, own_TK)))
    p_padded, w_padded = F.pad(p_TE, (0, 1)), F.pad(w_TE, (0, 1))
    s, price_TE = F.pad(sensitivity, (0, 1)), F.pad(pair_price, (0, 1)).expand(len(p_TE), -1)
    for _ in range(index_TK.shape[-1] - k_min):
        live = index_TK < experts
        p, s_of, w = p_padded.gather(-1, index_TK), s[index_TK], w_padded.gather(-1, index_TK)
        square, product, mass = s_of * p.square(), s_of * p * w, p.sum(-1, keepdim=True)
        squares, products = square.sum(-1, keepdim=True), product.sum(-1, keepdim=True)
        loss = _distortion(squares - square, products - product, mass - p) - _distortion(squares, products, mass)
        saving = torch.where(live, price_TE.gather(-1, index_TK) - loss, -1)
        best, slot = saving.max(-1, keepdim=True)
        gives_up = (best > 0) & (live.sum(-1, keepdim=True) > k_min) & (slots == slot)
        index_TK = torch.where(gives_up, experts, index_TK)
    return index_TK


def _distortion(squares: Tensor, products: Tensor, mass: Tensor) -> Tensor:
    """Return sum s (w' - w)^2 less the constant sum s w^2, with w' = p / mass; 0 where nothing is left."""
    inverse = torch.where(mass > 0, 1 / mass.clamp(min=1e-20), 0)
    return inverse * (inverse * squares - 2 * products)


def _share(p: Tensor) -> Tensor:
    return p / p.sum(-1, keepdim=True).clamp(min=1e-20)


def _union(index: Tensor, like: Tensor, real: Tensor) -> Tensor:
    return (torch.zeros_like(like, dtype=torch.bool).scatter(-1, index, True) & real).any(1)
