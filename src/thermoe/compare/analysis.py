"""From rows to summaries, paired differences and verdicts, without torch.

Arms read the same sequences in the same order, so differences are paired by sequence; the interval is a percentile
bootstrap over sequences (10,000 resamples, fixed seed). Neighbouring sequences of one book or file are not independent,
so that the intervals are somewhat too narrow; the report says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from thermoe.results import RunFolder, weakest_provenance

RESAMPLES = 10_000


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean and its 95 % percentile bootstrap interval."""
    sample = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(sample), size=(RESAMPLES, len(sample)))
    means = sample[draws].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(sample.mean()), float(low), float(high)


def _sequence_nll(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Return nats per token of every sequence, by (arm, segment), in reading order."""
    collected: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        per_sequence = row["tokens"] / len(row["sequence_nll"])
        collected[row["arm"], row["segment"]] += [float(value) / per_sequence for value in row["sequence_nll"]]
    return dict(collected)


def _ratio(rows: Sequence[dict[str, Any]], top: str, bottom: str) -> float | None:
    total = sum(float(row[bottom]) for row in rows)
    if not total or any(row.get(top) is None for row in rows):
        return None
    return sum(float(row[top]) for row in rows) / total


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss in nats per token."""
    return math.inf if nats > 700 else math.exp(nats)  # beyond, a float overflows; a lost model may well get there


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _by_segment(names: Sequence[str], value: Any) -> dict[str, Any]:
    return {name: value(name) for name in (*names, "all")}


def summarise(run: RunFolder) -> None:
    """Append the rows `summary`, `comparison` and `verdict` to a run whose arms are scored."""
    manifest = run.manifest
    segments = [entry["name"] for entry in manifest["segments"]]
    arms = [entry["name"] for entry in manifest["arms"]]
    titles = {entry["name"]: entry["title"] for entry in manifest["arms"]}
    rows = list(run.rows())
    score = [row for row in rows if row["kind"] == "score"]
    nll = _sequence_nll(score)
    for arm in arms:
        run.append("summary", arm=arm, title=titles[arm], **_summary(arm, segments, rows, score, nll))
    for reference, title in (("random", "Random routing"), ("oracle", "Best possible routing (oracle)")):
        corrected = _accuracy(reference, segments, rows)
        if corrected["all"] is not None:
            run.append("summary", arm=reference, title=title, accuracy_corrected=corrected)
    against = {entry["name"]: entry.get("against") for entry in manifest["arms"]}
    differences = _compare(arms, against, segments, nll)
    for difference in differences:
        run.append("comparison", **difference)
    for text, holds in _verdicts(run, differences, titles):
        run.append("verdict", text=text, holds=holds)


def _accuracy(arm: str, segments: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    own = [row for row in rows if row["kind"] == "accuracy" and row["arm"] == arm]
    return _by_segment(
        segments,
        lambda name: _mean(row["tolerant_corrected"] for row in own if name in (row["segment"], "all")),
    )


def _summary(
    arm: str,
    segments: Sequence[str],
    rows: Sequence[dict[str, Any]],
    score: Sequence[dict[str, Any]],
    nll: dict[tuple[str, str], list[float]],
) -> dict[str, Any]:
    own = [row for row in score if row["arm"] == arm]
    energy = [row for row in rows if row["kind"] == "energy" and row["arm"] == arm]
    loads = [row for row in rows if row["kind"] == "load" and row["arm"] == arm]
    bytes_per_token = {row["segment"]: row["bytes_per_token"] for row in energy}

    def ppl(name: str) -> dict[str, float]:
        values = [v for s in segments if name in (s, "all") for v in nll[arm, s]]
        mean, low, high = bootstrap_mean(values)
        return {"value": perplexity(mean), "lo": perplexity(low), "hi": perplexity(high)}

    measured = [row["energy_measured_j"] for row in energy]
    all_measured = bool(measured) and all(value is not None for value in measured)
    tokens = sum(row["tokens"] for row in energy)
    return {
        "ppl": _by_segment(segments, ppl),
        "bits_per_byte": {
            name: sum(nll[arm, name]) / len(nll[arm, name]) / math.log(2) / bytes_per_token[name] for name in segments
        },
        "accuracy_corrected": _accuracy(arm, segments, rows),
        "effective_experts": _mean(row["effective_experts"] for row in loads),
        "dead_experts": _total(row["dead_experts"] for row in loads),
        "experts_per_token": _mean(row["experts_per_token"] for row in own),
        "distinct_experts": _mean(row["distinct_experts"] for row in own),
        "j_per_token_modelled": {
            "value": _ratio(own, "energy_modelled_j", "tokens"),
            "provenance": own[0]["energy_provenance"] if own else None,
        },
        "learning_j_per_token_modelled": _ratio(own, "energy_learning_modelled_j", "tokens"),
        "j_per_token_measured": {
            "value": sum(measured) / tokens if all_measured else None,
            "provenance": weakest_provenance(row["provenance"] for row in energy) if all_measured else None,
            "reason": None if all_measured else next((row["reason"] for row in energy if row["reason"]), None),
        },
        "tokens_per_s": sum(row["tokens"] for row in own) / sum(row["duration_s"] for row in own) if own else None,
    }


def _total(counts: Iterable[int | None]) -> int | None:
    """Sum of counts; ``None`` when there is none or one of them is unknown."""
    known = list(counts)
    return None if not known or None in known else sum(count for count in known if count is not None)


def _compare(
    arms: Sequence[str],
    against: Mapping[str, str | None],
    segments: Sequence[str],
    nll: dict[tuple[str, str], list[float]],
) -> list[dict[str, Any]]:
    """Return paired differences in nats per token: each arm with the one it is meant for, the one before, the first."""
    pairs = []
    for i, arm in enumerate(arms):
        others = dict.fromkeys((against[arm], *((arms[i - 1], arms[0]) if i else ())))
        pairs += [(arm, other) for other in others if other in arms and other != arm]
    found = []
    for arm, other in pairs:
        for segment in segments:
            difference = [a - b for a, b in zip(nll[arm, segment], nll[other, segment], strict=True)]
            mean, low, high = bootstrap_mean(difference)
            found.append(
                {
                    "arm": arm,
                    "against": other,
                    "segment": segment,
                    "metric": "nll",
                    "diff": mean,
                    "lo": low,
                    "hi": high,
                    "n": len(difference),
                    "unit": "nats per token",
                }
            )
    return found


def _verdicts(
    run: RunFolder, differences: Sequence[dict[str, Any]], titles: dict[str, str]
) -> list[tuple[str, bool | None]]:
    """Return sentences that the rows support or refute, each with whether it came out as hoped."""
    manifest = run.manifest
    summary = {row["arm"]: row for row in run.rows("summary")}
    said: list[tuple[str, bool | None]] = []
    evals = {row["phase"]: float(row["ppl"]) for row in run.rows("eval")}
    unigram = manifest.get("unigram_ppl")
    if "dense" in evals and unigram:
        said.append(
            (
                f"The dense model learned: its perplexity on held-out prose is {evals['dense']:.1f}, "
                f"that of token frequencies alone {unigram:.1f}.",
                evals["dense"] < 0.5 * unigram,
            )
        )
    if "baseline" in summary and summary["baseline"]["effective_experts"] is not None:
        dead = summary["baseline"]["dead_experts"]
        found = f"{dead} experts of any layer were dead in some segment"
        if dead is None:
            found = "a segment has too few tokens to tell whether an expert is dead"
        said.append(
            (
                f"The baseline router keeps {summary['baseline']['effective_experts']:.1f} of "
                f"{manifest['moe']['num_experts']} experts effectively in use; {found}.",
                None if dead is None else dead == 0,
            )
        )
    if {"baseline", "priced"} <= set(summary):
        said.append(_price_verdict(summary["baseline"], summary["priced"]))
    for arm, against in (("adapted", "priced"), ("baseline_adapted", "baseline")):
        for row in differences:
            if (row["arm"], row["against"], row["segment"]) == (arm, against, "code"):
                # A number that is not finite is a word in a row.
                before, after = (float(summary[name]["ppl"]["code"]["value"]) for name in (against, arm))
                said.append(
                    (
                        "On code, which the model was never trained on, test-time training of the routers moved the "
                        f"perplexity from {before:.0f} to {after:.0f} ({row['diff']:+.3f} nats per token, 95 % "
                        f"interval {row['lo']:+.3f} to {row['hi']:+.3f}; scored before learning), {titles[arm]} "
                        f"against {titles[against]}.",
                        row["hi"] < 0,
                    )
                )
    adapted = [row for row in differences if (row["arm"], row["against"]) == ("adapted", "priced")]
    for row in adapted:
        if row["segment"] == "prose-2":
            said.append(
                (
                    "Back on prose after the code, the adapted routers differ from the frozen ones by "
                    f"{row['diff']:+.3f} nats per token (95 % interval {row['lo']:+.3f} to {row['hi']:+.3f}); above 0 "
                    "means that what they learned from code costs something here.",
                    row["hi"] <= 0 if not row["lo"] <= 0 <= row["hi"] else None,
                )
            )
    if {"adapted", "priced"} <= set(summary):
        learning = summary["adapted"]["learning_j_per_token_modelled"]
        total = summary["adapted"]["j_per_token_modelled"]["value"]
        if learning is not None and total:
            said.append(
                (
                    f"Learning after each batch is {100 * learning / total:.0f} % of the adapted arm's modelled joules "
                    "(an estimate); they are counted in its joules per token.",
                    None,
                )
            )
    return said


def _price_verdict(baseline: dict[str, Any], priced: dict[str, Any]) -> tuple[str, bool | None]:
    before, after = baseline["j_per_token_modelled"]["value"], priced["j_per_token_modelled"]["value"]
    saving = 1 - after / before
    ppl_before, ppl_after = float(baseline["ppl"]["all"]["value"]), float(priced["ppl"]["all"]["value"])
    return (
        f"The price lowers the experts per token from {baseline['experts_per_token']:.2f} to "
        f"{priced['experts_per_token']:.2f} and the modelled joules per token by {100 * saving:.1f} % (an estimate), "
        f"while the perplexity of the whole stream goes from {ppl_before:.1f} to {ppl_after:.1f}.",
        saving > 0,
    )
