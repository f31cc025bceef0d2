"""Routing statistics that show collapse and diversity, from one decision or from accumulated counts.

Definitions: load f_e = n_e / sum n; effective experts exp(H(f)) and inverse Simpson 1 / sum f^2; MaxVio = max n /
mean n - 1 (arXiv 2408.15664); Gini (arXiv 2506.21328); mutual information H(mean_t p_t) - mean_t H(p_t). "Fired at
least once" is left out on purpose: it saturates at 1 and hides collapse. What cannot be known is ``None``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from thermoe.moe.decision import RoutingDecision

#: An expert is dead below this share of an even load, over at least so many tokens per expert.
DEAD_SHARE, DEAD_TOKENS = 0.1, 100


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Statistics of one layer over the tokens counted; entropies in nats.

    Attributes:
        load: share f_e of each expert.
        effective_experts: exp H(f): E when even, 1 when one expert takes all.
        inverse_simpson: 1 / sum f^2 = E / (1 + cv^2), which heeds the busy experts more.
        max_vio: busiest over mean load, minus 1.
        gini: Gini coefficient of the load.
        cv: coefficient of variation of the load.
        top1_share: share of the busiest expert.
        min_max_ratio: load of the idlest over that of the busiest expert; ``None`` when nothing was routed.
        dead_experts: experts below a tenth of an even load; ``None`` with fewer than 100 E tokens.
        token_entropy: mean entropy of a token's probabilities.
        mutual_information: between token and expert.
        coactivation_entropy: of the pairs of experts that tokens use together, log(E (E - 1) / 2) at most; ``None``
            when no token uses two.
        logit_std: mean standard deviation of a token's logits; near 0 the choice is among ties.
        experts_per_token: mean number of experts of a token.
        distinct_experts: experts opened in a forward, T, mean over forwards.
        expected_distinct_experts: what T would be, were the experts of each token drawn evenly and independently.
        drop_rate: share of the slots that a capacity dropped; ``None`` where an empty slot can have another reason.
        unpriced_effective_experts: exp H(f) of the selection without its price; ``None`` where there is no price.
        unpriced_dead_experts: likewise; ``None`` with too few tokens too.
        tokens: real tokens counted.
    """

    load: list[float]
    effective_experts: float
    inverse_simpson: float
    max_vio: float
    gini: float
    cv: float
    top1_share: float
    min_max_ratio: float | None
    dead_experts: int | None
    token_entropy: float
    mutual_information: float
    coactivation_entropy: float | None
    logit_std: float
    experts_per_token: float
    distinct_experts: float
    expected_distinct_experts: float
    drop_rate: float | None
    unpriced_effective_experts: float | None
    unpriced_dead_experts: int | None
    tokens: int

    def as_dict(self) -> dict[str, float | int | list[float] | None]:
        """Return the fields as a dictionary for a result row."""
        return asdict(self)


def entropy(p: Tensor) -> Tensor:
    """Return -sum p log p over the last dimension, in nats; 0 log 0 is 0 and has the gradient 0, not infinity."""
    return torch.special.entr(torch.where(p == 0, 1, p)).sum(-1)


def gini(load: Tensor) -> Tensor:
    """Return the Gini coefficient of a load (E,): 0 when even, (E-1)/E when one expert takes all."""
    size = load.numel()
    ordered = torch.sort(load).values
    ranks = torch.arange(1, size + 1, device=load.device, dtype=load.dtype)
    total = ordered.sum()
    return torch.where(total > 0, 2 * (ranks * ordered).sum() / (size * total) - (size + 1) / size, 0.0)


class StatsAccumulator:
    """Adds up the decisions of one layer without waiting for the device; `result` reads them once."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._fixed_k = True

    @torch.no_grad()
    def add(self, decision: RoutingDecision, *, fixed_k: bool = False, unpriced_counts: Tensor | None = None) -> None:
        """Count one forward of the layer.

        Args:
            decision: of this forward.
            fixed_k: whether every real token wanted all K slots, so that an empty one is a dropped one. The decision
                does not tell; the router does (`Router.fixed_k`).
            unpriced_counts: (E,) tokens per expert, had there been no price; at every forward or at none.
        """
        counts, p, z = decision.counts, decision.probabilities, decision.logits
        mask, experts = decision.padding_mask, decision.num_experts
        real = torch.ones(p.shape[0], device=p.device) if mask is None else mask.to(p.dtype)
        index = decision.expert_index.clamp(max=experts)
        chosen = torch.zeros(p.shape[0], experts + 1, device=p.device).scatter(1, index, 1.0)[:, :experts]
        absent = torch.log1p(-chosen.sum(-1) / experts).sum()  # log of the chance that a given expert stays closed
        with torch.autocast(p.device.type, enabled=False):  # products of 0 and 1: exact, were the sums not rounded
            pairs = chosen.T @ chosen
        parts = {
            "counts": counts,
            "probability": (p * real.unsqueeze(-1)).sum(0),
            "token_entropy": (entropy(p) * real).sum(),
            "logit_std": (z.std(-1, correction=0) * real).sum(),
            "pairs": pairs,
            "tokens": real.sum(),
            "slots": real.sum() * index.shape[1],
            "distinct": (counts > 0).sum().float(),
            "expected_distinct": experts * -torch.expm1(absent),
            "forwards": torch.ones((), device=p.device),
        }
        if unpriced_counts is not None:
            parts["unpriced"] = unpriced_counts
        self._fixed_k = self._fixed_k and fixed_k
        for name, value in parts.items():
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value

    @property
    def used(self) -> bool:
        """Whether a forward was counted."""
        return bool(self._sums)

    def result(self) -> RoutingStats | None:
        """Return the statistics; ``None`` when nothing was counted."""
        (flat,) = read_sums([self])
        return None if flat is None else self.summarise(flat)

    def state_dict(self) -> dict[str, Any]:
        """Return what was counted, on the CPU, so that a resumed run goes on with it."""
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "fixed_k": self._fixed_k}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts of `state_dict`; they move to the layer's device with the next forward."""
        self._sums, self._fixed_k = dict(state["sums"]), state["fixed_k"]

    def flat(self) -> Tensor:
        """Return all sums in one vector; the order of names is that in which `add` makes them."""
        return torch.cat([value.reshape(-1) for value in self._sums.values()])

    def summarise(self, flat: Tensor) -> RoutingStats | None:
        """Return the statistics of sums laid out as `flat` does, float64 on the CPU."""
        sizes = [value.numel() for value in self._sums.values()]
        parts = zip(self._sums.items(), flat.split(sizes), strict=True)
        s = {name: part.view(value.shape) for (name, value), part in parts}
        counts, tokens = s["counts"], s["tokens"]
        if float(tokens) == 0:
            return None
        experts = counts.numel()
        load = counts / counts.sum().clamp(min=1)
        mean = counts.mean().clamp(min=1e-12)
        marginal = s["probability"] / tokens
        token_entropy = s["token_entropy"] / tokens
        pairs = s["pairs"].triu(1).reshape(-1)
        unpriced = s["unpriced"] / s["unpriced"].sum().clamp(min=1) if "unpriced" in s else None
        judged = float(tokens) >= DEAD_TOKENS * experts
        return RoutingStats(
            load=[float(v) for v in load],
            effective_experts=float(entropy(load).exp()),
            inverse_simpson=float(experts / (1 + (counts.std(correction=0) / mean).square())),
            max_vio=float(counts.max() / mean - 1),
            gini=float(gini(load)),
            cv=float(counts.std(correction=0) / mean),
            top1_share=float(load.max()),
            min_max_ratio=float(counts.min() / counts.max()) if float(counts.max()) else None,
            dead_experts=_dead(load) if judged else None,
            token_entropy=float(token_entropy),
            mutual_information=float(entropy(marginal) - token_entropy),
            coactivation_entropy=float(entropy(pairs / pairs.sum())) if float(pairs.sum()) else None,
            logit_std=float(s["logit_std"] / tokens),
            experts_per_token=float(counts.sum() / tokens),
            distinct_experts=float(s["distinct"] / s["forwards"]),
            expected_distinct_experts=float(s["expected_distinct"] / s["forwards"]),
            drop_rate=float(1 - counts.sum() / s["slots"]) if self._fixed_k and float(s["slots"]) else None,
            unpriced_effective_experts=None if unpriced is None else float(entropy(unpriced).exp()),
            unpriced_dead_experts=None if unpriced is None or not judged else _dead(unpriced),
            tokens=int(tokens),
        )


def _dead(load: Tensor) -> int:
    return int((load < DEAD_SHARE / load.numel()).sum())


def read_sums(accumulators: Sequence[StatsAccumulator], *, across_ranks: bool = False) -> list[Tensor | None]:
    """Return the sums of several layers, laid out as `StatsAccumulator.flat` does, in one wait for the device.

    Args:
        accumulators: one per layer.
        across_ranks: add up the counts of all ranks, which all have to call this with the same layers.

    Returns:
        float64 on the CPU, ``None`` for a layer that counted nothing.
    """
    parts = [accumulator.flat() for accumulator in accumulators if accumulator.used]
    if not parts:
        return [None for _ in accumulators]
    flat = torch.cat([part.to(parts[0].device) for part in parts])
    if across_ranks and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(flat)
    read = iter(flat.cpu().double().split([part.numel() for part in parts]))
    return [next(read) if accumulator.used else None for accumulator in accumulators]


def routing_stats(decision: RoutingDecision, *, fixed_k: bool = False) -> RoutingStats | None:
    """Return the statistics of a single decision; reads the device, so not for a forward pass."""
    accumulator = StatsAccumulator()
    accumulator.add(decision, fixed_k=fixed_k)
    return accumulator.result()
