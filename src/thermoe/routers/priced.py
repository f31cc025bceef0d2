"""The energy-aware router: an expert is used when its benefit exceeds its price times its cost.

Per layer and forward, with u_te = kappa * p_te the benefit of expert e for token t, c_e the cost of a token-expert
pair, a_e the cost of opening an expert at all, and pi the price,

    maximise  sum_t sum_{e in S_t} (u_te - pi c_e)  -  pi sum_e a_e [e opened],      k_min <= |S_t| <= k_max = top_k.

With r = u - pi c: every token's k_min best experts are opened; another is opened when the surplus max(r, 0) of the
tokens that would use it pays pi a_e; then an opened expert is closed again when that costs less than it saves (one
pass, smallest surplus first); each token takes its best opened experts with r > 0. With a = 0 this is the exact
maximiser per token, and cost falls monotonically with the price. At price 0 the selection is the baseline's own, bit
for bit.

Experts are ranked by u - pi (c - min c), which keeps the order of u in float32 however large the price is. Opening
costs couple the tokens of a batch; they act only where each sequence contributes one position (decode), or within the
groups of equal position when `group_by_position` asks to score a prompt as if it were decoded. Prefill stays causal.

Shape letters: T tokens, E experts, K slots, G groups, N tokens of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from thermoe.errors import RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.base import ROUTERS
from thermoe.routers.topk import TopKRouter

DropPass = Literal["all", "phase2", "none"]
DROP_PASSES: tuple[DropPass, ...] = ("all", "phase2", "none")


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
        best, used = _take_open(key, r, open_GNE, k_min, k_max)
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


def _take_open(key: Tensor, r: Tensor, opened: Tensor, k_min: int, k_max: int) -> tuple[Tensor, Tensor]:
    """Return each token's k_max best opened experts (..., K) and which of these slots it uses.

    A slot is used when its expert is open and either r > 0 or it is one of the first k_min. Ties keep their order.
    """
    ranked = torch.where(opened, key, torch.finfo(key.dtype).min)
    index = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k_max]
    first = torch.arange(k_max, device=key.device) < k_min
    return index, ((r.gather(-1, index) > 0) | first) & opened.gather(-1, index)


@ROUTERS.register("priced")
class PricedRouter(TopKRouter):
    """Top-k routing under a price on what each expert costs.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token, k_max.
        k_min: experts every token keeps.
        pair_cost: c_e, relative to their mean (so of order 1); ``None`` is 1 for each expert.
        open_cost: a_e in the same unit; ``None`` is 0.
        price: benefit per unit of relative cost; 0 is the baseline.
        kappa: nats of loss per unit of benefit in this layer; lets one price serve layers that matter unequally.
        drop: the drop pass: "all", "phase2" or "none".
        batch_invariant: ignore opening costs, so that an output never depends on the batch around it.
        group_by_position: score a prompt in decode grouping: tokens at one position are routed as one batch.
        options: those of `TopKRouter`.

    Attributes:
        price, pair_cost, open_cost, kappa: float32 buffers, updated in place (`set_price`, `set_costs`), so that a
            captured graph sees the new value.
        couples_tokens: whether any opening cost is above 0, known on the host.

    Raises:
        RoutingError: k_min is not in 0..top_k, a cost is negative or not finite, or the price is.
    """

    fixed_k: ClassVar[bool] = False
    float32_buffers = ("price", "kappa", "pair_cost", "open_cost")

    price: Tensor
    kappa: Tensor
    pair_cost: Tensor
    open_cost: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        k_min: int = 1,
        pair_cost: Sequence[float] | None = None,
        open_cost: Sequence[float] | None = None,
        price: float = 0.0,
        kappa: float = 1.0,
        drop: DropPass = "all",
        batch_invariant: bool = False,
        group_by_position: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        if not 0 <= k_min <= top_k:
            raise RoutingError(
                f"k_min is {k_min} with top_k {top_k}",
                where="k_min",
                accepted=f"an integer from 0 to {top_k}",
                fix="lower k_min",
            )
        if drop not in DROP_PASSES:
            raise UnknownNameError.of("drop pass", str(drop), DROP_PASSES, where="drop")
        self.k_min = k_min
        self.drop: DropPass = drop
        self.batch_invariant = batch_invariant
        self.group_by_position = group_by_position
        for name, size in (("price", ()), ("kappa", ()), ("pair_cost", (num_experts,)), ("open_cost", (num_experts,))):
            self.register_buffer(name, torch.zeros(size, dtype=torch.float32))
        self.set_costs(pair_cost, open_cost)
        self.set_price(price)
        self.kappa.fill_(kappa)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router; reads the device."""
        return {
            **super().options(),
            "k_min": self.k_min,
            "pair_cost": self.pair_cost.tolist(),
            "open_cost": self.open_cost.tolist(),
            "price": float(self.price),
            "kappa": float(self.kappa),
            "drop": self.drop,
            "batch_invariant": self.batch_invariant,
            "group_by_position": self.group_by_position,
        }

    def set_price(self, price: float) -> None:
        """Push a new price in, between forwards."""
        if not 0 <= price < float("inf"):
            raise RoutingError(
                f"the price is {price}",
                where="price",
                accepted="a finite number of at least 0",
                fix="use 0 for the baseline router",
            )
        self.price.fill_(price)

    def set_costs(self, pair_cost: Sequence[float] | None, open_cost: Sequence[float] | None) -> None:
        """Push the costs of the E experts in; ``None`` restores 1 per pair or 0 per opening."""
        checked: dict[str, list[float]] = {}
        for name, values, default in (("pair_cost", pair_cost, 1.0), ("open_cost", open_cost, 0.0)):
            costs = [default] * self.num_experts if values is None else [float(v) for v in values]
            if len(costs) != self.num_experts or not all(0 <= cost < float("inf") for cost in costs):
                raise RoutingError(
                    f"{name} is {values}",
                    where=name,
                    accepted=f"{self.num_experts} finite numbers of at least 0",
                    fix="take them from CostModel.relative_costs()",
                )
            checked[name] = costs
        for name, costs in checked.items():
            buffer = getattr(self, name)
            buffer.copy_(torch.tensor(costs, device=buffer.device))
        self.couples_tokens = any(cost > 0 for cost in checked["open_cost"])

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return each token's priced selection; at price 0 the baseline's own."""
        baseline = self._rank(logits)
        k_max = baseline.shape[-1]
        k_min = min(self.k_min, k_max)
        u = self.kappa * probabilities
        r = u - self.price * self.pair_cost
        key = u - self.price * (self.pair_cost - self.pair_cost.min())
        grouped = self.group_by_position or context.is_decode
        if self.couples_tokens and grouped and not self.batch_invariant and k_max:
            opened = self._opened_by_group(u, context, k_min, k_max)
        else:
            opened = torch.ones_like(u, dtype=torch.bool)
        # In the order of the logits, which differ where probabilities are equal in float32 or underflow to 0.
        first = logits.argsort(dim=-1, descending=True, stable=True)
        key, r, opened = (values.gather(-1, first) for values in (key, r, opened))
        index, keep = _take_open(key, r, opened, k_min, k_max)
        priced = torch.where(keep, first.gather(-1, index), self.num_experts)
        return self._limit(torch.where(self.price > 0, priced, baseline), probabilities, context)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load, and know again on the host whether an opening cost is above 0."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = state_dict.get(prefix + "open_cost")
        if loaded is not None and not loaded.is_meta:
            self.couples_tokens = bool((loaded > 0).any())

    def _opened_by_group(self, u_TE: Tensor, context: RoutingContext, k_min: int, k_max: int) -> Tensor:
        """Return bool (T, E): what the group of each token opened; a group is one position of every sequence."""
        batch, length = context.batch_size, context.sequence_length
        u, real = context.by_position(u_TE), context.by_position(context.real(u_TE))
        opened_GE = open_experts(u, real, self.price, self.pair_cost, self.open_cost, k_min, k_max, self.drop)
        return opened_GE.unsqueeze(0).expand(batch, -1, -1).reshape(batch * length, self.num_experts)


def price_for_pairs(probabilities: Sequence[Tensor], *, k_min: int, k_max: int, pairs_frac: float) -> float:
    """Return the lowest price at which a share of the baseline's token-expert pairs is left (no opening costs).

    Per token the best k_max experts stay while p > price, and k_min in any case, so that the price is a quantile of the
    probabilities of the optional pairs.

    Args:
        probabilities: (T, E) per layer, from held-out text.
        k_min: experts every token keeps.
        k_max: the baseline's experts per token.
        pairs_frac: share of T * k_max pairs to keep, in (0, 1].

    Raises:
        RoutingError: no price leaves so few pairs, because k_min is more.
    """
    if pairs_frac * k_max < k_min:
        raise RoutingError(
            f"a share of {pairs_frac} of {k_max} experts is fewer than k_min {k_min}",
            where="price.pairs_frac",
            accepted=f"{k_min / k_max:.3f} to 1",
            fix="raise pairs_frac or lower k_min",
        )
    optional = torch.cat([p.topk(k_max, -1).values[:, k_min:].flatten().float() for p in probabilities])
    if pairs_frac >= 1 or not optional.numel():
        return 0.0
    keep = round((pairs_frac * k_max - k_min) / (k_max - k_min) * optional.numel())
    ordered = optional.sort(descending=True).values
    # An expert is used while p > price: at the price p_(keep+1) exactly `keep` optional pairs are left.
    return float(ordered[min(keep, ordered.numel() - 1)])
