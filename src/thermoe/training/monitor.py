"""What is logged of the routing at a log step: collapse and diversity per layer, and their figures over all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from thermoe.moe.layer import routed_modules
from thermoe.moe.monitor import CollapseMonitor


def make_monitor(model: nn.Module) -> CollapseMonitor | None:
    """Return the monitor of a training of ``model``; ``None`` for a model without routers of ours."""
    return CollapseMonitor(model) if any(True for _ in routed_modules(model)) else None


def over_layers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of a training row: the worst MaxVio, the mean and least effective experts, all dead ones.

    What is unknown in a layer, such as its dead experts after too few tokens, is left out.
    """
    if not rows:
        return {}
    found: dict[str, float] = {
        "max_vio": max(row["max_vio"] for row in rows),
        "effective_experts": sum(row["effective_experts"] for row in rows) / len(rows),
        "effective_experts_min": min(row["effective_experts"] for row in rows),
        "experts_per_token": sum(row["experts_per_token"] for row in rows) / len(rows),
    }
    dead = [row["dead_experts"] for row in rows]
    if None not in dead:
        found["dead_experts"] = sum(dead)
    rates = [row["drop_rate"] for row in rows]
    if None not in rates:
        found["drop_rate"] = sum(rates) / len(rates)
    return found
