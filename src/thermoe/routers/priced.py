"""The energy-aware router: an expert is used when its benefit exceeds its price times its cost.

Per layer and forward, with u_te = kappa * p_te the benefit of expert e for token t, c_e the cost of a token-expert
pair, a_e the cost of opening an expert at all, and pi the price,

    maximise  sum_t sum_{e in S_t} (u_te - pi c_e)  -  pi sum_e a_e [e opened],      k_min <= |S_t| <= k_max = top_k.

With r = u - pi c: every token's k_min best experts are opened; another is opened when the surplus max(r, 0) of the
tokens that would use it pays pi a_e; then an opened expert is closed again when that costs less than it saves (one
pass, smallest surplus first); each token takes its best opened experts with r > 0. With a = 0 this is the exact
maximiser per token, and cost falls monotonically with the price. At price 0 the selection is the baseline's own, bit
for bit.

That is the benefit "gate". With the benefit "distortion" the loss of a choice is how far it moves the output, weighted
by what that does to the loss of the model; starting from the baseline's choice, experts are closed, then pairs given
up, as long as that saves more than it loses (`thermoe.routers.selection`). In decode grouping it keeps more quality at
the same number of distinct experts (docs/results/energy-router).

Experts are ranked by u - pi (c - min c), which keeps the order of u in float32 however large the price is. Opening
costs couple the tokens of a batch; they act only where each sequence contributes one position (decode), or within the
groups of equal position when `group_by_position` asks to score a prompt as if it were decoded. Prefill stays causal.

Shape letters: T tokens, E experts, K slots, G groups, N tokens of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from thermoe.errors import RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.base import ROUTERS
from thermoe.routers.fused_choice import can_choose
from thermoe.routers.fused_selection import ROWS_PER_GROUP, can_fuse, select_by_distortion
from thermoe.routers.selection import DropPass, close_by_distortion, drop_by_distortion, open_experts, take_open
from thermoe.routers.topk import TopKRouter

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
Benefit = Literal["gate", "distortion"]
BENEFITS: tuple[Benefit, ...] = ("gate", "distortion")
DROP_PASSES: tuple[DropPass, ...] = ("all", "phase2", "none")


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
        prefill_price: the price where opening costs do not act; ``None`` is the same.
        benefit: "gate" or "distortion", what an expert is worth.
        sensitivity: s_e of "distortion", from `thermoe.sensitivity`; ``None`` is 1 for each expert.
        kappa: nats of loss per unit of benefit in this layer; lets one price serve layers that matter unequally.
        drop: the drop pass: "all", "phase2" or "none".
        favourite_weight: of "distortion" with "all": what a token loses by the closing of one of its own k_min best
            experts counts so many times, from 1 towards "phase2", which never closes them.
        batch_invariant: ignore opening costs, so that an output never depends on the batch around it.
        group_by_position: score a prompt in decode grouping: tokens at one position are routed as one batch.
        options: those of `TopKRouter`.

    Attributes:
        price, prefill_price, pair_cost, open_cost, kappa, sensitivity: float32 buffers, updated in place (`set_price`,
            `set_costs`, `set_sensitivity`), so that a captured graph sees the new value.
        couples_tokens: whether any opening cost is above 0, known on the host.
        group_rows: when set, a batch of a multiple of so many sequences is routed as so many batches, with
            `group_by_position`: rows r*n to r*n + n - 1 bring one sequence to each of n batches.

    Raises:
        RoutingError: k_min is no integer in 0..top_k, or a cost, a sensitivity, kappa or a price is no number, negative
            or not finite in float32, or favourite_weight is no number from 1, or not 1 with the benefit "gate".
        UnknownNameError: no such benefit or drop pass.
    """

    fixed_k: ClassVar[bool] = False
    float32_buffers = ("price", "prefill_price", "kappa", "pair_cost", "open_cost", "sensitivity")

    price: Tensor
    prefill_price: Tensor
    sensitivity: Tensor
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
        prefill_price: float | None = None,
        benefit: Benefit = "gate",
        sensitivity: Sequence[float] | None = None,
        kappa: float = 1.0,
        drop: DropPass = "all",
        favourite_weight: float = 1.0,
        batch_invariant: bool = False,
        group_by_position: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        if isinstance(k_min, bool) or not isinstance(k_min, int) or not 0 <= k_min <= top_k:
            raise RoutingError(
                f"k_min is {k_min!r} with top_k {top_k}",
                where="k_min",
                accepted=f"an integer from 0 to {top_k}",
                fix="lower k_min",
            )
        if drop not in DROP_PASSES:
            raise UnknownNameError.of("drop pass", str(drop), DROP_PASSES, where="drop")
        if benefit not in BENEFITS:
            raise UnknownNameError.of("benefit", str(benefit), BENEFITS, where="benefit")
        if not _is_amount(favourite_weight) or favourite_weight < 1:
            raise RoutingError(
                f"favourite_weight is {favourite_weight!r}",
                where="favourite_weight",
                accepted="a number of at least 1, finite in float32",
                fix='leave favourite_weight out for 1, or never close favourites with drop="phase2"',
            )
        if favourite_weight != 1 and benefit == "gate":
            raise RoutingError(
                f"favourite_weight is {favourite_weight!r} with the benefit 'gate', which does not know it",
                where="favourite_weight",
                accepted="1 with the benefit 'gate'",
                fix='choose benefit="distortion", or leave favourite_weight out',
            )
        self.k_min = k_min
        self.favourite_weight = float(favourite_weight)
        self.drop: DropPass = drop
        self.benefit: Benefit = benefit
        self.batch_invariant = batch_invariant
        self.group_by_position = group_by_position
        self.group_rows: int | None = None
        for name in ("price", "prefill_price", "kappa"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))
        for name in ("pair_cost", "open_cost", "sensitivity"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.float32))
        self.set_costs(pair_cost, open_cost)
        self.set_sensitivity(sensitivity)
        self.set_price(price)
        if prefill_price is not None:
            self.set_price(prefill_price, "prefill")
        if not _is_amount(kappa):
            raise RoutingError(
                f"kappa is {kappa!r}",
                where="kappa",
                accepted="a number of at least 0, finite in float32",
                fix="leave kappa out for 1",
            )
        self.kappa.fill_(kappa)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router; reads the device."""
        return {
            **super().options(),
            "k_min": self.k_min,
            "pair_cost": self.pair_cost.tolist(),
            "open_cost": self.open_cost.tolist(),
            "price": float(self.price),
            # One price stays one: whoever sets another does not leave the old one in prefill.
            "prefill_price": None if bool(self.prefill_price == self.price) else float(self.prefill_price),
            "benefit": self.benefit,
            "sensitivity": self.sensitivity.tolist(),
            "kappa": float(self.kappa),
            "drop": self.drop,
            "favourite_weight": self.favourite_weight,
            "batch_invariant": self.batch_invariant,
            "group_by_position": self.group_by_position,
        }

    def set_price(self, price: float, phase: Phase | None = None) -> None:
        """Push a new price in, between forwards.

        Args:
            price: at least 0.
            phase: "decode" where opening costs act, "prefill" elsewhere, ``None`` for both.
        """
        if phase is not None and phase not in PHASES:
            raise UnknownNameError.of("phase", str(phase), PHASES, where="phase")
        if not _is_amount(price):
            raise RoutingError(
                f"the price is {price!r}",
                where="price",
                accepted="a number of at least 0, finite in float32",
                fix="use 0 for the baseline router",
            )
        for name, buffer in (("decode", self.price), ("prefill", self.prefill_price)):
            if phase in (None, name):
                buffer.fill_(price)

    def set_costs(self, pair_cost: Sequence[float] | None, open_cost: Sequence[float] | None) -> None:
        """Push the costs of the E experts in; ``None`` restores 1 per pair or 0 per opening."""
        source = "take them from CostModel.relative_costs()"
        pair = self._per_expert("pair_cost", pair_cost, 1.0, source)
        opening = self._per_expert("open_cost", open_cost, 0.0, source)
        for buffer, costs in ((self.pair_cost, pair), (self.open_cost, opening)):
            buffer.copy_(torch.tensor(costs, device=buffer.device))
        self.couples_tokens = any(cost > 0 for cost in opening)

    def set_sensitivity(self, sensitivity: Sequence[float] | None) -> None:
        """Push in what each of the E experts' deviations do to the loss, in nats; ``None`` restores 1."""
        values = self._per_expert("sensitivity", sensitivity, 1.0, "take them from measure_sensitivity()")
        self.sensitivity.copy_(torch.tensor(values, device=self.sensitivity.device))

    def _per_expert(self, name: str, given: Sequence[float] | None, default: float, source: str) -> list[float]:
        values: list[Any] = [default] * self.num_experts
        if given is not None:
            values = list(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else []
        if len(values) != self.num_experts or not all(_is_amount(value) for value in values):
            raise RoutingError(
                f"{name} is {given!r}",
                where=name,
                accepted=f"{self.num_experts} numbers of at least 0, finite in float32",
                fix=source,
            )
        return [float(value) for value in values]

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return each token's priced selection; at price 0 the baseline's own."""
        context = self._in_groups(context)
        grouped = self.group_by_position or context.is_decode
        price = self.price if grouped else self.prefill_price
        coupled = self.couples_tokens and grouped and not self.batch_invariant
        coupling = context if coupled else None
        index = self._in_one_kernel(logits, probabilities, price, coupling) if self.benefit == "distortion" else None
        if index is None:
            baseline = self._rank(logits)
            k_max = baseline.shape[-1]
            choose = self._by_distortion if self.benefit == "distortion" else self._by_gate
            index = choose(logits, probabilities, baseline, price, coupling, min(self.k_min, k_max), k_max)
        return self._limit(index, probabilities, context)

    def _in_groups(self, context: RoutingContext) -> RoutingContext:
        """Return the layout in which a batch of several served batches is one of the served size, and longer."""
        rows = self.group_rows
        if rows is None or not self.group_by_position or context.batch_size % rows:
            return context
        parts = context.batch_size // rows
        return replace(context, batch_size=rows, sequence_length=parts * context.sequence_length)

    def _in_one_kernel(
        self, logits: Tensor, probabilities: Tensor, price: Tensor, coupling: RoutingContext | None
    ) -> Tensor | None:
        """Return the choice by distortion from the kernel, or ``None`` where it does not take this."""
        k_max = self.active_top_k or self.top_k
        if self.drop == "none":  # what is never closed is open to all
            coupling = None
        groups = -(-len(logits) // ROWS_PER_GROUP) if coupling is None else coupling.sequence_length
        # The kernel takes the top-k by logits for the baseline, which it is not with shards or with sampled scores.
        if not (self._ranks_by_logits and can_fuse(probabilities, groups, k_max)):
            return None
        p, logits = probabilities.detach(), logits.detach()  # a choice of ids has no gradient
        mask = None if coupling is None else coupling.padding_mask
        # At price 0 the kernel's own top-k is the baseline's where that comes from a kernel too, at ties as well.
        baseline = None if can_choose(p, k_max) else self._rank(logits)
        given = (p, logits, mask, baseline, price, self.kappa, self.pair_cost, self.open_cost, self.sensitivity)
        rule = groups, min(self.k_min, k_max), k_max, coupling is not None, self.drop == "phase2", self.favourite_weight
        return select_by_distortion(*given, *rule)

    def _by_gate(
        self,
        logits: Tensor,
        probabilities: Tensor,
        baseline: Tensor,
        price: Tensor,
        coupling: RoutingContext | None,
        k_min: int,
        k_max: int,
    ) -> Tensor:
        u = self.kappa * probabilities
        opened = torch.ones_like(u, dtype=torch.bool)
        if coupling is not None:
            groups, real = coupling.by_position(u), coupling.by_position(coupling.real(u))
            opened_GE = open_experts(groups, real, price, self.pair_cost, self.open_cost, k_min, k_max, self.drop)
            opened = _of_tokens(opened_GE, coupling)
        r, key = u - price * self.pair_cost, u - price * (self.pair_cost - self.pair_cost.min())
        # In the order of the logits, which differ where probabilities are equal in float32 or underflow to 0.
        first = logits.argsort(dim=-1, descending=True, stable=True)
        key, r, opened = (values.gather(-1, first) for values in (key, r, opened))
        index, keep = take_open(key, r, opened, k_min, k_max)
        return torch.where(price > 0, torch.where(keep, first.gather(-1, index), self.num_experts), baseline)

    def _by_distortion(
        self,
        logits: Tensor,
        probabilities: Tensor,
        baseline: Tensor,
        price: Tensor,
        coupling: RoutingContext | None,
        k_min: int,
        k_max: int,
    ) -> Tensor:
        logits, probabilities = logits.detach(), probabilities.detach()  # a choice of ids has no gradient
        if self.drop == "none":  # what is never closed is open to all
            coupling = None
        p = probabilities.clamp(min=0)
        weight = self.kappa * self.sensitivity
        index = logits.topk(k_max, -1).indices
        if coupling is not None:
            groups_GNE, real = coupling.by_position(p), coupling.by_position(coupling.real(p))
            opened = close_by_distortion(
                groups_GNE, real, price * self.open_cost, weight, k_min, k_max, self.drop, self.favourite_weight
            )
            ranked = torch.where(_of_tokens(opened, coupling), logits, -torch.inf)
            # Stable, as torch.topk is not: what is closed comes last.
            index = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :k_max]
            index = torch.where(ranked.gather(-1, index) > -torch.inf, index, self.num_experts)
        priced = drop_by_distortion(index, p, baseline, price * self.pair_cost, weight, k_min)
        return torch.where(price > 0, priced, baseline)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load, and know again on the host whether an opening cost is above 0."""
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        loaded = state_dict.get(prefix + "open_cost")
        if loaded is not None and not loaded.is_meta:
            self.couples_tokens = bool((loaded > 0).any())


def _is_amount(value: object) -> bool:
    """Whether a value is a number of at least 0 that float32 can hold; a tensor of one is read."""
    if isinstance(value, (bool, str)):
        return False
    try:
        return 0 <= float(value) <= torch.finfo(torch.float32).max  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False


def _of_tokens(opened_GE: Tensor, context: RoutingContext) -> Tensor:
    """Return bool (T, E): what the group of each token opened; a group is one position of every sequence."""
    return opened_GE.unsqueeze(0).expand(context.batch_size, -1, -1).flatten(0, 1)


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
