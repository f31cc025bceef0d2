"""What came of reading a stream: paired differences, the worst stretch, and whether the targets are met.

Everything works on rows, one per batch, as `test_time_training.py` writes them: `segment`, `number` within it,
`tokens`, `sequence_nll` (nats per sequence), `learned` and `verdict`, in the order read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from shifting_text import ORDERS, SEGMENTS, TRAINED_ON

from thermoe.compare.analysis import bootstrap_mean

#: Batches over which learning may never be worse: the window of the 0.2 % rule.
WINDOW = 8
NEVER_WORSE = math.log(1.002)

Scores = dict[tuple[str, str, str], list[dict[str, Any]]]  # (policy, learner, order) -> batches in the order read


def nats(rows: list[dict[str, Any]]) -> float:
    """Return nats per token over batches."""
    return sum(map(sum, (row["sequence_nll"] for row in rows))) / sum(row["tokens"] for row in rows)


def by_place(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Return rows by (segment, number), whatever the order they were read in."""
    return {(row["segment"], row["number"]): row for row in rows}


def paired(rows: list[dict[str, Any]], others: list[dict[str, Any]], segment: str) -> tuple[float, float, float]:
    """Return the mean difference in nats per token over sequences of a segment, and its 95 % bootstrap interval."""
    there, values = by_place(others), []
    for row in rows:
        if segment in ("all", row["segment"]):
            per_sequence = row["tokens"] / len(row["sequence_nll"])
            other = there[row["segment"], row["number"]]["sequence_nll"]
            values += [(a - b) / per_sequence for a, b in zip(row["sequence_nll"], other, strict=True)]
    return bootstrap_mean(values)


def running(rows: list[dict[str, Any]], frozen: list[dict[str, Any]]) -> list[float]:
    """Return adapted minus frozen, nats per token, batch by batch in the order read."""
    there = by_place(frozen)
    return [nats([row]) - nats([there[row["segment"], row["number"]]]) for row in rows]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what became of the batches."""
    counts: dict[str, int] = defaultdict(int)
    for row in rows:
        counts[row["verdict"]] += 1
    updates, worked = (sum(row[name] for row in rows) for name in ("learned", "worked"))
    return {"verdicts": dict(counts), "updates": updates, "worked": worked, "batches": len(rows)}


def targets(scores: Scores, orders: list[str]) -> Iterator[tuple[str, bool | None]]:
    """Yield each target in words, and whether it is met: the whole interval on one side, or open."""
    base = scores.get(("all", "frozen", ORDERS[0]))
    if base is None:
        return
    for order in orders:
        shifted = tuple(name for name, text in SEGMENTS if text not in TRAINED_ON)
        known = tuple(name for name, text in SEGMENTS if text in TRAINED_ON)
        for policy, segments in (("quarter", shifted), ("quarter-of-layer", shifted), ("half", known)):
            if (policy, "adapted", order) not in scores:
                continue
            for segment in segments:
                mean, low, high = paired(scores[policy, "adapted", order], base, segment)
                yield (
                    f"{order}, {segment}: adapted with a {policy} of the distinct experts against frozen with all: "
                    f"{mean:+.4f} nats per token (95 % {low:+.4f} to {high:+.4f})",
                    True if high <= 0 else False if low > 0 else None,
                )  # fmt: skip
        if ("all", "adapted", order) in scores:
            found = worst_windows(running(scores["all", "adapted", order], base), WINDOW)
            for name, what in (("worst_window_nats", f"over any {WINDOW} batches"), ("worst_beginning_nats", "so far")):
                worst = found[name]
                if worst is not None:
                    said = f"at worst {100 * math.expm1(worst):+.3f} % in perplexity {what} (at most +0.2 %)"
                    yield f"{order}: with all experts, adapted is {said}", worst <= NEVER_WORSE


def worst_windows(difference: list[float], width: int) -> dict[str, float | None]:
    """Return the largest mean of ``width`` consecutive differences (``None`` if there are fewer), and of any beginning.

    Args:
        difference: adapted minus frozen, nats per token, batch by batch in the order read.
        width: batches of a window.
    """
    sums = np.concatenate([[0.0], np.cumsum(difference)])
    windows = (sums[width:] - sums[:-width]) / width if len(difference) >= width else np.array([])
    beginnings = sums[1:] / np.arange(1, len(sums))
    return {
        "worst_window_nats": float(windows.max()) if len(windows) else None,
        "worst_beginning_nats": float(beginnings.max()) if len(beginnings) else None,
        "worst_batch_nats": max(difference) if difference else None,
    }


def perplexity_of(nats_per_token: float) -> float:
    """Return exp of the loss, infinite where a float overflows."""
    return math.inf if nats_per_token > 700 else math.exp(nats_per_token)


def signed(nats_per_token: float | None) -> str:
    """Return a difference for a table."""
    return "unknown" if nats_per_token is None else f"{nats_per_token:+.5f}"
