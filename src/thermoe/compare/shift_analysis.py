"""From the rows of a shift study to summaries and verdicts, without torch.

Arms read the same sequences with the same models, so differences are paired by seed and sequence. The interval is a
percentile bootstrap over both, resampled each by itself (10,000 draws, fixed seed): seeds stand for initial weights and
the order of training, sequences for what is read. Few seeds make a coarse bootstrap, and neighbouring sequences are not
independent, so that intervals are somewhat too narrow.

Shape letters: K seeds, N sequences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from thermoe.compare.analysis import RESAMPLES, perplexity
from thermoe.compare.predictions import SAID, bound_words, estimate, holds
from thermoe.compare.shift_spec import METRICS, ORDERS, SEGMENTS, ShiftPrediction, ShiftSpec
from thermoe.convergence import mean_interval
from thermoe.errors import ConfigError
from thermoe.results import RunFolder, weakest_provenance

Row = Mapping[str, Any]
#: (arm, order) -> seed -> the batches in the order read.
Passes = dict[tuple[str, str], dict[int, list[dict[str, Any]]]]
Interval = tuple[float, float, float]


def paired_interval(values_KN: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Return the mean over seeds and sequences, and its 95 % percentile bootstrap interval over both.

    Args:
        values_KN: a difference for each seed and sequence.
        seed: of the resampling.

    Raises:
        ConfigError: there is no value, or not as many sequences for each seed.
    """
    if not values_KN or not values_KN[0] or len({len(row) for row in values_KN}) != 1:
        raise ConfigError(
            f"there are {[len(row) for row in values_KN]} values by seed",
            where="paired_interval",
            accepted="at least one seed, and for each as many sequences",
            fix="give a difference for each seed and sequence",
        )
    table = np.asarray(values_KN, dtype=np.float64)
    seeds, sequences = table.shape
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(seeds, [1 / seeds] * seeds, size=RESAMPLES) / seeds
    weights = generator.multinomial(sequences, [1 / sequences] * sequences, size=RESAMPLES) / sequences
    means = np.einsum("rn,rn->r", drawn @ table, weights)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(table.mean()), float(low), float(high)


def passes_of(run: RunFolder) -> Passes:
    """Return the batches of the run by arm and order and seed, in the order read."""
    found: Passes = {}
    for row in run.rows("batch"):
        found.setdefault((row["arm"], row["order"]), {}).setdefault(row["seed"], []).append(row)
    for by_seed in found.values():
        for rows in by_seed.values():
            rows.sort(key=lambda row: int(row["at"]))
    return found


def of(passes: Passes, arm: str, order: str) -> dict[int, list[dict[str, Any]]]:
    """Return what an arm read in an order; what does not learn read one order, and answers for both."""
    return passes.get((arm, order)) or passes[arm, ORDERS[0]]


def per_sequence(rows: Sequence[Row], segment: str = "all") -> list[float]:
    """Return nats per token of each sequence, by segment and number, whatever the order read."""
    places = [name for name, _ in SEGMENTS]
    own = [row for row in rows if segment in ("all", row["segment"])]
    own.sort(key=lambda row: (places.index(row["segment"]), row["number"]))
    return [float(value) / (row["tokens"] / len(row["sequence_nll"])) for row in own for value in row["sequence_nll"]]


def difference(passes: Passes, arm: str, other: str, order: str, segment: str = "all") -> Interval:
    """Return the paired difference of two arms, nats per token, with its interval."""
    mine, theirs = of(passes, arm, order), of(passes, other, order)
    return paired_interval(
        [
            [a - b for a, b in zip(per_sequence(mine[s], segment), per_sequence(theirs[s], segment), strict=True)]
            for s in sorted(mine)
        ]
    )


def worst_window(rows: Sequence[Row], base: Sequence[Row], width: int) -> float | None:
    """Return the largest mean difference, nats per token, of ``width`` batches read after one another.

    ``None`` when the stream is shorter than a window.
    """
    there = {(row["segment"], row["number"]): _nats(row) for row in base}
    gaps = [_nats(row) - there[row["segment"], row["number"]] for row in rows]
    sums = np.concatenate([[0.0], np.cumsum(gaps)])
    return float(((sums[width:] - sums[:-width]) / width).max()) if len(gaps) >= width else None


def _nats(row: Row) -> float:
    return sum(map(float, row["sequence_nll"])) / float(row["tokens"])


def joules_per_token(rows: Sequence[Row]) -> tuple[float, float]:
    """Return modelled joules per token of serving and learning together, and of learning alone."""
    tokens = sum(row["tokens"] for row in rows)
    learning = sum(row["learning_j"] for row in rows) / tokens
    return sum(row["served_j"] for row in rows) / tokens + learning, learning


def summarise_shift(run: RunFolder, spec: ShiftSpec) -> None:
    """Append `summary` and `verdict` rows to a study whose passes are all there."""
    passes = passes_of(run)
    for arm, order in spec.passes():
        run.append("summary", arm=arm, order=order, **_summary(passes, spec, arm, order))
    for arm in spec.arms:
        for prediction in spec.definitions[arm].predictions:
            if prediction.reference is None or prediction.reference in spec.arms:
                run.append("verdict", arm=arm, **check_shift(passes, spec, arm, prediction))


def _summary(passes: Passes, spec: ShiftSpec, arm: str, order: str) -> dict[str, Any]:
    by_seed, base = of(passes, arm, order), spec.arms[0]
    rows = [row for seed in sorted(by_seed) for row in by_seed[seed]]
    names = (*dict(SEGMENTS), "all")
    joules = [joules_per_token(by_seed[seed]) for seed in sorted(by_seed)]
    losses = {name: [_mean(per_sequence(own, name)) for own in by_seed.values()] for name in names}
    windows = [worst_window(by_seed[s], of(passes, base, order)[s], spec.window) for s in sorted(by_seed)]
    known = [window for window in windows if window is not None]
    return {
        "seeds": len(by_seed),
        "nll": {name: estimate(values) for name, values in losses.items()},
        "ppl": {name: perplexity(_mean(values)) for name, values in losses.items()},
        "to_frozen": {name: _named(difference(passes, arm, base, order, name)) for name in names},
        "j_per_token_modelled": {**estimate([total for total, _ in joules]),
                                 "provenance": weakest_provenance(row["energy_provenance"] for row in rows)},
        "learning_frac": _mean([learning / total for total, learning in joules]),
        "worst_window_nats": max(known) if len(known) == len(windows) else None,
        "distinct_experts": _mean([row["distinct_experts"] for row in rows]),
        "experts_per_token": _mean([row["experts_per_token"] for row in rows]),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        "updates_per_batch": sum(bool(row["learned"]) for row in rows) / len(rows),
        "batches": len(rows),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _named(interval: Interval) -> dict[str, float]:
    return dict(zip(("value", "lo", "hi"), interval, strict=True))


def check_shift(passes: Passes, spec: ShiftSpec, arm: str, prediction: ShiftPrediction) -> dict[str, Any]:
    """Hold a prediction against the rows.

    Losses are compared by the paired bootstrap, joules and shares by a t interval over seeds, the worst window by the
    worst of all seeds.

    Returns:
        `holds` (true, false or ``None`` where the interval leaves it open), `text`, and the numbers.
    """
    title = spec.definitions[arm].title
    about = f"{title}, {prediction.order}, {prediction.text}"
    found = _found(passes, spec, arm, prediction)
    facts = {"metric": prediction.metric, "order": prediction.order, "segment": prediction.segment}
    if found is None:
        words = f"Left open: {about}. The stream is shorter than a window of {spec.window} batches."
        return {"holds": None, "text": words, **facts, "value": None, "lo": None, "hi": None}
    value, low, high = found
    ratio = prediction.metric == "j_per_token" and prediction.reference is not None
    target = (1.0 if ratio else 0.0) if prediction.reference is not None else prediction.value
    assert target is not None
    verdict = holds(prediction.relation, prediction.margin, target, low, high)
    against = spec.definitions[prediction.reference].title if prediction.reference is not None else f"{target:g}"
    where = "" if prediction.segment == "all" else f" on {prediction.segment}"
    bound = bound_words(prediction.relation, prediction.margin, against)
    if ratio and prediction.relation != "near":
        bound = f"{prediction.relation} {target + prediction.margin:g} times {against}"
    kind = "ratio" if ratio else "difference" if prediction.reference is not None else ""
    spread = "worst of all seeds" if prediction.metric == "worst_window" else f"95 % {low:.4f} to {high:.4f}"
    return {
        "holds": verdict,
        "text": f"{SAID[verdict]}: {about}. Condition: {METRICS[prediction.metric]}{where} {bound}. "
        f"Found: {kind}{' ' if kind else ''}{value:.4f} ({spread}).",
        **facts,
        "value": value,
        "lo": low,
        "hi": high,
    }


def _found(passes: Passes, spec: ShiftSpec, arm: str, prediction: ShiftPrediction) -> Interval | None:
    by_seed = of(passes, arm, prediction.order)
    if prediction.metric == "nll":
        if prediction.reference is None:
            return paired_interval([per_sequence(by_seed[s], prediction.segment) for s in sorted(by_seed)])
        return difference(passes, arm, prediction.reference, prediction.order, prediction.segment)
    if prediction.metric == "worst_window":
        base = of(passes, spec.arms[0], prediction.order)
        windows = [worst_window(by_seed[s], base[s], spec.window) for s in by_seed]
        if None in windows:
            return None
        worst = max(window for window in windows if window is not None)
        return worst, worst, worst
    values = []
    for s in sorted(by_seed):
        total, learning = joules_per_token(by_seed[s])
        values.append(total if prediction.metric == "j_per_token" else learning / total)
        if prediction.metric == "j_per_token" and prediction.reference is not None:
            values[-1] /= joules_per_token(of(passes, prediction.reference, prediction.order)[s])[0]
    mean, low, high = mean_interval(values)
    return (mean, mean, mean) if low is None or high is None else (mean, low, high)
