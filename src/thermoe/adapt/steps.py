"""What ran between two steps of a session: forwards as their routers saw them, and counted late.

A hook keeps references to the decisions of a forward and, on a GPU, an event behind its work; nothing is read and
nothing waits. Counting happens in `ForwardLog.take`, in one read for all forwards since the last.

Shape letters: F forwards, L routed layers, E experts, K slots, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thermoe.adapt.budget import Phase
from thermoe.energy.cost_table import CostTable
from thermoe.moe.decision import RoutingDecision
from thermoe.telemetry.window import Mark

#: Rows of forwards that are held by reference; beyond, counts are formed on the device and the references let go.
HELD_ROWS = 32_768


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """One forward as the routers saw it: references, nothing read.

    Args:
        phase: "decode" when each sequence contributed one position.
        batch_size: sequences.
        rows: rows that are held, padding included.
        decisions: one per routed module; ``None`` where a module did not run.
        kept_frac: share of the forward's rows that is held.
    """

    phase: Phase
    batch_size: int
    rows: int
    decisions: tuple[RoutingDecision | None, ...]
    kept_frac: float = 1.0

    @classmethod
    def of(cls, decisions: Iterable[RoutingDecision | None], shape: tuple[int, int] | None) -> Forward | None:
        """Return the forward of ``decisions``; ``None`` when no module ran.

        Args:
            decisions: of the routed modules.
            shape: (sequences, positions) of the call; one sequence where it is not known or does not fit.
        """
        held = tuple(None if d is None else d.detach() for d in decisions)
        rows = max((d.expert_index.shape[0] for d in held if d is not None), default=0)
        if not rows:
            return None
        batch, length = shape if shape is not None and shape[0] * shape[1] == rows else (1, rows)
        return cls("decode" if length == 1 else "prefill", batch, rows, held)

    @property
    def device(self) -> torch.device:
        """Where the decision of the first module that ran is."""
        return next(d.expert_index.device for d in self.decisions if d is not None)

    def tail(self, rows: int) -> Forward:
        """Return a copy of the last whole sequences that fit into ``rows``, or of the end of the last one."""
        length = self.rows // self.batch_size
        batch = max(1, rows // length)
        kept = min(rows, batch * length)
        copies = tuple(None if d is None else _last(d, kept) for d in self.decisions)
        return replace(self, batch_size=batch, rows=kept, decisions=copies, kept_frac=self.kept_frac * kept / self.rows)


def _last(decision: RoutingDecision, rows: int) -> RoutingDecision:
    mask = decision.padding_mask
    return replace(
        decision,
        logits=decision.logits[-rows:].clone(),
        probabilities=decision.probabilities[-rows:].clone(),
        expert_index=decision.expert_index[-rows:].clone(),
        weights=decision.weights[-rows:].clone(),
        padding_mask=None if mask is None else mask[-rows:].clone(),
    )


@dataclass(frozen=True, slots=True)
class HostMark:
    """The end of a forward on a device that works while the host waits."""

    t_s: float

    def time_s(self) -> float:
        """Return it."""
        return self.t_s


@dataclass(frozen=True, slots=True, eq=False)
class ForwardCount:
    """One forward, counted.

    Args:
        phase: of the forward.
        tokens: real tokens.
        finished_s: when the device had done it, on the meter's clock.
        pairs: float32 (L, E), tokens per expert; 0 in a layer that did not run.
        layers: layers that ran.
        energy_j: modelled joules.
    """

    phase: Phase
    tokens: int
    finished_s: float
    pairs: Tensor
    layers: int
    energy_j: float


class ForwardLog:
    """Holds forwards until they are counted.

    Args:
        table: the joules of work.
        layers: L.
    """

    def __init__(self, table: CostTable, layers: int) -> None:
        self._table = table
        self._shape = layers, table.pair_j.shape[-1]
        self._held: list[tuple[int, Forward, Mark]] = []
        self._held_rows = 0
        self._noted = 0
        # Counts on the device: (places and marks of F forwards, float32 (F, 1 + L * E) with their tokens in front).
        self._folded: list[tuple[list[tuple[int, Phase, Mark, int]], Tensor]] = []

    def add(self, forward: Forward, mark: Mark) -> None:
        """Note a forward; reads nothing."""
        self._held.append((self._noted, forward, mark))
        self._noted += 1
        self._held_rows += forward.rows
        if self._held_rows > HELD_ROWS:
            self._fold()

    @property
    def phases(self) -> set[Phase]:
        """The phases of the forwards not yet counted."""
        folded = {phase for marks, _ in self._folded for _, phase, _, _ in marks}
        return folded | {forward.phase for _, forward, _ in self._held}

    def __len__(self) -> int:
        return len(self._held) + sum(len(marks) for marks, _ in self._folded)

    @torch.no_grad()
    def _fold(self) -> None:
        """Form the counts of all forwards held, on the device: those of one shape together."""
        alike: dict[Any, list[tuple[int, Forward, Mark]]] = defaultdict(list)
        for entry in self._held:
            decisions = entry[1].decisions
            kind = tuple(None if d is None else (d.expert_index.shape, d.expert_index.device) for d in decisions)
            alike[kind].append(entry)
        for entries in alike.values():
            forwards = [forward for _, forward, _ in entries]
            layers = sum(decision is not None for decision in forwards[0].decisions)
            marks = [(place, forward.phase, mark, layers) for place, forward, mark in entries]
            self._folded.append((marks, self._count(forwards)))
        self._held, self._held_rows = [], 0

    def _count(self, forwards: Sequence[Forward]) -> Tensor:
        device = forwards[0].device
        counts = torch.zeros(len(forwards), *self._shape, device=device)
        for layer, decision in enumerate(forwards[0].decisions):
            if decision is None:
                continue
            chosen = [f.decisions[layer] for f in forwards]
            index = torch.stack([d.expert_index for d in chosen if d is not None]).flatten(1)
            experts = decision.num_experts  # zero-compute experts and empty slots fall into one more column
            per_expert = torch.zeros(len(forwards), experts + 1, device=index.device)
            per_expert.scatter_add_(1, index.clamp(max=experts), torch.ones_like(index, dtype=torch.float32))
            counts[:, layer, :experts] = per_expert[:, :experts].to(device)
        tokens = torch.full((len(forwards),), float(forwards[0].rows), device=device)
        masks = [next(d for d in f.decisions if d is not None).padding_mask for f in forwards]
        if any(mask is not None for mask in masks):
            tokens = torch.stack([t if m is None else m.sum() for t, m in zip(tokens.unbind(), masks, strict=True)])
        return torch.cat([tokens.unsqueeze(1).float(), counts.flatten(1)], 1)

    def take(self) -> list[ForwardCount]:
        """Return the counts of all forwards since the last call, in order; waits for the device."""
        self._fold()
        found: list[tuple[int, ForwardCount]] = []
        for marks, counts in self._folded:
            read = counts.cpu()
            tokens, pairs = read[:, 0], read[:, 1:].unflatten(1, self._shape)
            joules = self._table.joules(tokens, pairs, (pairs > 0).float()).tolist()
            for row, (place, phase, mark, layers) in enumerate(marks):
                count = ForwardCount(phase, int(tokens[row]), mark.time_s(), pairs[row], layers, joules[row])
                found.append((place, count))
        self._folded = []
        return [count for _, count in sorted(found, key=lambda pair: pair[0])]
