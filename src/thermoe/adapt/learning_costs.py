"""What learning costs by the cost model, from shapes and from what the routers just did.

Every joule of learning goes through a `LearningAccount`: it times the work, prices it, puts it into the ledger and
takes it out of the bucket. Forwards that serve nobody run inside `LearningAccount.forward`.

Shape letters: L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from thermoe.adapt.learning_bucket import LearningBucket
from thermoe.adapt.learning_work import LearningKind, LearningLedger, LearningWork, serving_nothing
from thermoe.energy.cost_model import CostModel
from thermoe.energy.cost_table import CostTable
from thermoe.energy.work import ModelWork
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import Routed, routed_modules
from thermoe.routers.base import Router


class LearningCosts:
    """Joules of forwards of one model, by its cost model.

    Args:
        model: a model with routed modules.
        cost_model: the joules of work.

    Raises:
        ConfigError: the work of the model cannot be counted.
    """

    def __init__(self, model: nn.Module, cost_model: CostModel) -> None:
        self.table = CostTable.of(cost_model, ModelWork.of(model))
        self.provenance = cost_model.provenance
        self._modules: list[Routed] = [module for _, module in routed_modules(model)]

    def last_forward_j(self, tokens: int, *, all_experts: bool = False) -> float:
        """Return the joules of the forward just made, from the decisions on record; waits for the device once.

        Args:
            tokens: real tokens of the forward.
            all_experts: every expert ran on every token, whatever was chosen, as in an audit.
        """
        decisions = [module.last_routing for module in self._modules]
        ran = [(row, decision) for row, decision in enumerate(decisions) if decision is not None]
        pairs = torch.zeros_like(self.table.pair_j)
        if ran:
            width, device = pairs.shape[1], ran[0][1].expert_index.device
            counts = [F.pad(d.counts.detach(), (0, width - d.num_experts)).to(device) for _, d in ran]
            pairs[[row for row, _ in ran]] = torch.stack(counts).cpu().double()
        if all_experts:
            for row, decision in ran:
                pairs[row, : decision.num_experts] = tokens
        count = torch.tensor([float(tokens)], dtype=torch.float64)
        return float(self.table.joules(count, pairs.unsqueeze(0), (pairs > 0).unsqueeze(0)))

    def decisions(self) -> list[RoutingDecision | None]:
        """Return the decisions on record, layer by layer."""
        return [module.last_routing for module in self._modules]

    def set_decisions(self, decisions: Sequence[RoutingDecision | None]) -> None:
        """Put decisions on record."""
        for module, decision in zip(self._modules, decisions, strict=True):
            module.last_routing = decision

    def bound_j(self, tokens: int, *, forwards: int = 1, all_experts: bool = False) -> float:
        """Return the most joules that forwards over so many tokens together can cost: every expert opened each time.

        Args:
            tokens: of all forwards together.
            forwards: how many.
            all_experts: every expert runs on every token.
        """
        total = forwards * (self.table.forward_j + float(self.table.open_j.sum())) + tokens * self.table.token_j
        for row, module in enumerate(self._modules):
            router = module.router
            slots = router.num_slots if isinstance(router, Router) else self.table.pair_j.shape[1]
            dearest = self.table.pair_j[row].sort(descending=True).values
            total += tokens * float((dearest if all_experts else dearest[:slots]).sum())
        return total


@dataclass(slots=True)
class Paid:
    """Joules of a forward; ``None`` until it was made."""

    energy_j: float | None = None


class LearningAccount:
    """Prices and notes the work of learning.

    Args:
        costs: joules of forwards.
        ledger: gets every piece of work.
        bucket: pays for it.
    """

    def __init__(self, costs: LearningCosts, ledger: LearningLedger, bucket: LearningBucket) -> None:
        self.costs, self.ledger, self.bucket = costs, ledger, bucket

    def spend(self, kind: LearningKind, tokens: int, energy_j: float, since_s: float) -> None:
        """Note work that is done and began at ``since_s`` on the ledger's clock."""
        now_s = self.ledger.clock.now_s()
        self.ledger.append(
            LearningWork(
                kind=kind,
                tokens=tokens,
                energy_j=energy_j,
                duration_s=max(0.0, now_s - since_s),
                t_end_s=now_s,
                provenance=self.costs.provenance,
            )
        )
        self.bucket.spend(energy_j)

    @contextmanager
    def forward(self, kind: LearningKind, tokens: int, *, all_experts: bool = False) -> Iterator[Paid]:
        """Make one forward that serves nobody inside the context; it is priced by what its routers decided.

        Args:
            kind: of the work.
            tokens: real tokens of the forward.
            all_experts: as in `LearningCosts.last_forward_j`.

        Yields:
            What it cost, known when the context is left.
        """
        since_s = self.ledger.clock.now_s()
        with self.aside(tokens, all_experts=all_experts) as paid:
            yield paid
        assert paid.energy_j is not None
        self.spend(kind, tokens, paid.energy_j, since_s)

    @contextmanager
    def aside(self, tokens: int, *, all_experts: bool = False) -> Iterator[Paid]:
        """Make one forward that serves nobody inside the context, as `forward` does, and leave paying to the caller."""
        paid, served = Paid(), self.costs.decisions()
        try:
            with serving_nothing():
                yield paid
            paid.energy_j = self.costs.last_forward_j(tokens, all_experts=all_experts)
        finally:  # who looks at the model afterwards sees the routing of what was served
            self.costs.set_decisions(served)
