"""What learning costs by the cost model, from shapes and from what the routers just did.

Every joule of learning goes through a `LearningAccount`: it times the work, prices it, puts it into the ledger and
takes it out of the bucket. Forwards that serve nobody run inside `LearningAccount.forward`.

Shape letters: L routed layers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thermoe.adapt.learning_bucket import LearningBucket
from thermoe.adapt.learning_work import LearningKind, LearningLedger, LearningWork, serving_nothing
from thermoe.energy.cost_model import CostModel
from thermoe.energy.cost_table import CostTable
from thermoe.energy.read_cost import ReadCost
from thermoe.energy.work import ModelWork
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import Routed, routed_modules
from thermoe.routers.base import Router


class LearningCosts:
    """Joules of forwards of one model, by its cost model.

    Args:
        model: a model with routed modules.
        cost_model: the joules of work.
        read_cost: what a byte of expert weights costs more or less than usual; see `ModelWork.of`.

    Raises:
        ConfigError: the work of the model cannot be counted.
    """

    def __init__(self, model: nn.Module, cost_model: CostModel, *, read_cost: ReadCost | None = None) -> None:
        self.table = CostTable.of(cost_model, ModelWork.of(model, read_cost=read_cost))
        self.provenance = cost_model.provenance
        self._modules: list[Routed] = [module for _, module in routed_modules(model)]

    def last_forward_j(self, tokens: int, *, all_experts: bool = False) -> float:
        """Return the joules of the forward just made, from the decisions on record; waits for the device once.

        Args:
            tokens: real tokens of the forward.
            all_experts: every expert ran on every token, whatever was chosen, as in an audit.
        """
        return self.joules([(tokens, self.last_counts(tokens, all_experts=all_experts))])

    def last_counts(self, tokens: int, *, all_experts: bool = False) -> Tensor:
        """Return float32 (L, E), tokens by layer and expert of the forward just made, on its device, without waiting.

        Args:
            tokens: real tokens of the forward.
            all_experts: every expert ran on every token.
        """
        decisions, width = self.decisions(), self.table.pair_j.shape[1]
        device = next((d.expert_index.device for d in decisions if d is not None), torch.device("cpu"))
        rows = [torch.zeros(width + 1, device=device)] * len(decisions)
        # Layers of one shape together: launches cost more than the counting.
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for layer, decision in enumerate(decisions):
            if decision is not None:
                alike[decision.expert_index.numel(), decision.num_experts].append(layer)
        for (_, experts), layers in alike.items():
            counts = torch.zeros(len(layers), width + 1, device=device)
            if all_experts:
                counts[:, :experts] = float(tokens)
            else:
                index = torch.stack([d.expert_index.reshape(-1).to(device) for i in layers if (d := decisions[i])])
                index = torch.where(index < experts, index, width)
                counts.scatter_add_(1, index, torch.ones((), device=device).expand_as(index))
            for layer, row in zip(layers, counts, strict=True):
                rows[layer] = row
        return torch.stack(rows)[:, :-1]

    def joules(self, forwards: Sequence[tuple[int, Tensor]]) -> float:
        """Return the joules of forwards together, each given by its real tokens and its counts; waits for the device.

        Args:
            forwards: any number of (tokens, counts as `last_counts` returns them).
        """
        if not forwards:
            return 0.0
        tokens = torch.tensor([float(count) for count, _ in forwards], dtype=torch.float64)
        pairs = torch.stack([counts for _, counts in forwards]).cpu().double()
        return float(self.table.joules(tokens, pairs, pairs > 0).sum())

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


@dataclass(slots=True, eq=False)
class Paid:
    """What a forward costs: its real tokens; its counts, on the device; its joules. ``None`` until they are known.

    Counts that are not given inside the context are taken from the decisions on record.
    """

    tokens: int
    counts: Tensor | None = None
    energy_j: float | None = None

    @property
    def forwards(self) -> list[tuple[int, Tensor]]:
        """What `LearningCosts.joules` takes: the forward, or none."""
        return [] if self.counts is None else [(self.tokens, self.counts)]


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
            What it cost; the joules are known when the context is left.
        """
        since_s = self.ledger.clock.now_s()
        with self.aside(tokens, all_experts=all_experts) as paid:
            yield paid
        paid.energy_j = self.costs.joules(paid.forwards)
        self.spend(kind, tokens, paid.energy_j, since_s)

    @contextmanager
    def aside(self, tokens: int, *, all_experts: bool = False) -> Iterator[Paid]:
        """Make one forward that serves nobody inside the context, and leave paying to the caller; waits for nothing."""
        paid, served = Paid(tokens), self.costs.decisions()
        try:
            with serving_nothing():
                yield paid
            if paid.counts is None:
                paid.counts = self.costs.last_counts(tokens, all_experts=all_experts)
        finally:  # who looks at the model afterwards sees the routing of what was served
            self.costs.set_decisions(served)
