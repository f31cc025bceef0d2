"""Routing statistics that show collapse and diversity, from one decision or from accumulated counts.

Definitions: load f_e = n_e / sum n; effective experts exp(H(f)); MaxVio = max n / mean n - 1 (arXiv 2408.15664); Gini
(arXiv 2506.21328); mutual information H(mean_t p_t) - mean_t H(p_t). "Fired at least once" is left out on purpose: it
saturates at 1 and hides collapse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from thermoe.moe.decision import RoutingDecision


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Statistics of one layer over the tokens counted; entropies in nats."""

    load: list[float]
    effective_experts: float
    max_vio: float
    gini: float
    cv: float
    dead_experts: int
    token_entropy: float
    mutual_information: float
    experts_per_token: float
    distinct_experts: float
    tokens: int

    def as_dict(self) -> dict[str, float | int | list[float]]:
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

    def add(self, decision: RoutingDecision) -> None:
        """Count one forward of the layer."""
        counts, p = decision.counts, decision.probabilities
        mask = decision.padding_mask
        real = torch.ones(p.shape[0], device=p.device) if mask is None else mask.to(p.dtype)
        parts = {
            "counts": counts,
            "probability": (p * real.unsqueeze(-1)).sum(0),
            "token_entropy": (entropy(p) * real).sum(),
            "tokens": real.sum(),
            "distinct": decision.opened.sum().float(),
            "forwards": torch.ones((), device=p.device),
        }
        for name, value in parts.items():
            new = value.detach()
            self._sums[name] = self._sums[name] + new if name in self._sums else new

    def result(self) -> RoutingStats | None:
        """Return the statistics; ``None`` when nothing was counted."""
        if not self._sums or float(self._sums["tokens"]) == 0:
            return None
        s = {name: value.double().cpu() for name, value in self._sums.items()}
        counts, tokens = s["counts"], s["tokens"]
        experts = counts.numel()
        load = counts / counts.sum().clamp(min=1)
        mean = counts.mean().clamp(min=1e-12)
        marginal = s["probability"] / tokens
        token_entropy = s["token_entropy"] / tokens
        return RoutingStats(
            load=[float(v) for v in load],
            effective_experts=float(entropy(load).exp()),
            max_vio=float(counts.max() / mean - 1),
            gini=float(gini(load)),
            cv=float(counts.std(correction=0) / mean),
            dead_experts=int((load < 0.1 / experts).sum()),
            token_entropy=float(token_entropy),
            mutual_information=float(entropy(marginal) - token_entropy),
            experts_per_token=float(counts.sum() / tokens),
            distinct_experts=float(s["distinct"] / s["forwards"]),
            tokens=int(tokens),
        )


def routing_stats(decision: RoutingDecision) -> RoutingStats | None:
    """Return the statistics of a single decision; reads the device, so not for a forward pass."""
    accumulator = StatsAccumulator()
    accumulator.add(decision)
    return accumulator.result()
