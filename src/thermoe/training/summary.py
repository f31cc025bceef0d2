"""The few figures that stand on the terminal when a training is done."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from thermoe.results import RunFolder


def _energy(row: dict[str, Any]) -> str:
    if row.get("energy_j") is None:
        return f"not measured: {row.get('energy_reason') or 'no sensor'}"
    partial = f", not all of it: {row['energy_reason']}" if row.get("energy_partial") else ""
    return f"{row['energy_j']:,.0f} J ({row['energy_provenance']}{partial})"


def print_summary(console: Console, run: RunFolder) -> None:
    """Print perplexity, bits per byte, speed, experts in use and joules of a finished run."""
    row = next(run.rows("summary"), None)
    if row is None:
        return
    table = Table(show_header=False, box=None)
    for title, value in (
        ("perplexity on held-out text", _number(row.get("ppl"), ".2f")),
        ("bits per byte", _number(row.get("bits_per_byte"), ".4f")),
        ("tokens", _number(row.get("tokens"), ",d")),
        ("tokens per second", _number(row.get("tokens_per_s"), ",.0f")),
        ("effective experts per layer", _number(row.get("effective_experts"), ".2f")),
        ("convergence", (row.get("convergence") or {}).get("text")),
        ("energy", _energy(row)),
    ):
        if value is not None:
            table.add_row(title, escape(value))
    console.print(table, highlight=False)


def _number(value: Any, form: str) -> str | None:
    return format(value, form) if isinstance(value, (int, float)) else value
