"""What is logged of the routing at a log step: collapse and diversity per layer, without waiting for the device before.

`make_monitor` is the one place where a training gets its monitor; whatever has `update`, `flush`, `state_dict` and
`load_state_dict` may take the place of `RoutingMonitor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from thermoe.moe.decision import RoutingDecision
from thermoe.moe.stats import StatsAccumulator


class Monitor(Protocol):
    """Adds up decisions and turns them into rows at log steps."""

    def update(self, decisions: Mapping[str, RoutingDecision]) -> None:
        """Count the decisions of one micro-batch, by dotted layer name; nothing is read from the device."""

    def flush(self, step: int) -> list[dict[str, Any]]:
        """Return one row per layer for what was counted since the last call, and begin anew."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that a checkpoint keeps."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""


class RoutingMonitor:
    """`RoutingStats` per layer. At a checkpoint nothing is under way, because rows are written before it."""

    def __init__(self) -> None:
        self._layers: dict[str, StatsAccumulator] = {}
        self._slots: dict[str, int] = {}
        self._padded = False

    def update(self, decisions: Mapping[str, RoutingDecision]) -> None:
        """Count the decisions of one micro-batch."""
        for name, decision in decisions.items():
            self._layers.setdefault(name, StatsAccumulator()).add(decision)
            self._slots[name] = self._slots.get(name, 0) + decision.expert_index.numel()
            self._padded = self._padded or decision.padding_mask is not None

    def flush(self, step: int) -> list[dict[str, Any]]:
        """Return one row per layer, and begin anew.

        `drop_rate` is the share of the slots of tokens that hold no expert: dropped by a capacity, or left empty by a
        price. With padding it is unknown and left out.
        """
        rows: list[dict[str, Any]] = []
        for index, (name, accumulator) in enumerate(self._layers.items()):
            stats = accumulator.result()
            if stats is None:
                continue
            row: dict[str, Any] = {"layer": index, "name": name, **stats.as_dict()}
            if not self._padded:
                row["drop_rate"] = 1 - round(stats.experts_per_token * stats.tokens) / self._slots[name]
            rows.append(row)
        self._layers, self._slots, self._padded = {}, {}, False
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: see the class."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin anew."""
        self._layers, self._slots, self._padded = {}, {}, False


def make_monitor(model: nn.Module) -> Monitor:
    """Return the monitor that a training of ``model`` uses."""
    return RoutingMonitor()


def over_layers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of a training row: the worst MaxVio, the mean and least effective experts, all dead ones."""
    if not rows:
        return {}
    found: dict[str, float] = {
        "max_vio": max(row["max_vio"] for row in rows),
        "effective_experts": sum(row["effective_experts"] for row in rows) / len(rows),
        "effective_experts_min": min(row["effective_experts"] for row in rows),
        "dead_experts": sum(row["dead_experts"] for row in rows),
        "experts_per_token": sum(row["experts_per_token"] for row in rows) / len(rows),
    }
    rates = [row["drop_rate"] for row in rows if "drop_rate" in row]
    if len(rates) == len(rows):
        found["drop_rate"] = sum(rates) / len(rates)
    return found
