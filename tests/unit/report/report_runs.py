"""Writes synthetic runs, whole or arm by arm, for the tests of the report."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from thermoe.results import RunFolder

ARMS = {
    "dense": ("Dense model", "The model as it was before the conversion.", 0.0, 52e-6),
    "baseline": (
        "MoE, capacity top-k",
        "Two experts for every token, with a limit on how full an expert gets.",
        0.06,
        41e-6,
    ),
    "priced": ("MoE, energy-aware", "An expert is used where its benefit exceeds its price.", 0.05, 33e-6),
    "priced_ttt": ("MoE, energy-aware + learning", "The same router, learning at test time.", 0.0, 34e-6),
}
SEGMENTS = (("prose-1", "prose", 4.1), ("code", "code", 5.6), ("prose-2", "prose", 4.15))
NO_READING = {"value": None, "provenance": None, "reason": "RAPL counters are not readable"}
EXPERTS, LAYERS, BATCHES, TOKENS = 8, 4, 24, 512


def write_manifest(run: RunFolder, **changes: Any) -> None:
    """Write a manifest with every entry a report can use."""
    entries: dict[str, Any] = {
        "command": "thermoe demo --out runs/demo --seed 0",
        "created_at": "2025-01-31T09:00:00+00:00",
        "finished": True,
        "config": {"seed": 0, "moe": {"num_experts": EXPERTS, "top_k": 2}, "resume": False, "limit": None},
        "environment": {
            "python": "3.11.9",
            "platform": "Linux",
            "cpu_count": 2,
            "gpus": [],
            "versions": {"torch": "2.11"},
        },
        "device": {"name": "cpu", "reason": "no CUDA device is visible"},
        "data": {
            "prose": {"source": "embedded prose", "bytes": 400_000, "tokens": 110_000},
            "code": {"source": "Python standard library", "bytes": 300_000, "tokens": 90_000},
        },
        "tokenizer": {"kind": "bpe", "vocab_size": 2048},
        "sizes": {
            "dense": {"parameters": 4_210_000, "active_parameters": 4_210_000},
            "moe": {"parameters": 4_300_000, "active_parameters": 2_900_000},
        },
        "moe": {"layers": [0, 1, 2, 3], "num_experts": EXPERTS, "top_k": 2, "method": "partition"},
        "exactness": {"max_abs_diff": 3.1e-6, "logit_kl": 2.2e-9},
        "unigram_ppl": 610.0,
        "telemetry": {
            "energy": {"provenance": None, "reason": "RAPL counters are not readable"},
            "power": {"provenance": None, "reason": "no sensor"},
            "memory_rss": {"provenance": "measured", "reason": None},
        },
        "cost_model": {
            "basis": "prior of the package",
            "provenance": "estimated",
            "reference": "NVIDIA H200, bf16",
            "terms": {"pair_cost": {"value": 2.2e-5, "unit": "J"}, "open_cost": {"value": 2.9e-3, "unit": "J"}},
        },
        "price": {"value_nats_per_j": 812.0, "normalised": 0.2, "target": None},
        "arms": [{"name": k, "title": v[0], "description": v[1]} for k, v in ARMS.items()],
        "segments": [{"name": n, "domain": d, "tokens": BATCHES * TOKENS} for n, d, _ in SEGMENTS],
        "durations_s": {"train_dense": 312.4, "recovery": 95.0, "stream": 48.2},
    }
    run.write_manifest(**{**entries, **changes})


def _estimate(nll: float) -> dict[str, float]:
    return {"value": math.exp(nll), "lo": math.exp(nll - 0.03), "hi": math.exp(nll + 0.03)}


def write_training(run: RunFolder) -> None:
    for phase, steps, start in (("dense", 120, 7.4), ("recovery", 60, 4.9)):
        for step in range(steps):
            loss = 4.0 + (start - 4.0) * math.exp(-step / 25) + random.gauss(0, 0.05)
            run.append("train", phase=phase, step=step, tokens=(step + 1) * 2048, loss=loss)
            if step % 30 == 29:
                run.append(
                    "eval", phase=phase, step=step, split="prose held out", nll=loss + 0.1, ppl=math.exp(loss + 0.1)
                )


def write_arm(run: RunFolder, name: str, *, measured: dict[str, Any] | None = None) -> None:
    title, _, offset, joules = ARMS[name]
    for segment, _, level in SEGMENTS:
        for batch in range(BATCHES):
            gain = 0.5 * (1 - math.exp(-batch / 8)) if segment == "code" and name == "priced_ttt" else 0.0
            nll = level + offset - gain + random.gauss(0, 0.06)
            run.append(
                "score", arm=name, seed=0, segment=segment, batch=batch, tokens=TOKENS, bytes=TOKENS * 3,
                nll_sum=nll * TOKENS, sequence_nll=[nll * 128] * 4, experts_per_token=2.0, distinct_experts=8,
                energy_modelled_j=joules * TOKENS, energy_learning_modelled_j=3e-6 * TOKENS if "ttt" in name else 0.0,
                energy_measured_j=None, energy_provenance=None, power_w=None, temp_c=None, duration_s=0.2,
            )  # fmt: skip
        for layer in range(LAYERS if name != "dense" else 0):
            load = [random.gammavariate(2.0 if name == "baseline" else 0.9, 1.0) for _ in range(EXPERTS)]
            run.append(
                "load", arm=name, segment=segment, layer=layer, load=[share / sum(load) for share in load],
                effective_experts=6.1, max_vio=0.8, gini=0.3, cv=0.5, dead_experts=0, token_entropy=1.6,
                mutual_information=0.2,
            )  # fmt: skip
            for router in {name, "random", "oracle"}:
                skill = {"random": 0.0, "oracle": 1.0, "baseline": 0.22, "priced": 0.31}.get(router, 0.4)
                run.append(
                    "accuracy", arm=router, segment=segment, layer=layer, tokens=256, tolerant=0.1 + 0.9 * skill,
                    tolerant_chance=0.1, tolerant_corrected=skill, overlap=0.25 + 0.75 * skill, overlap_chance=0.25,
                    overlap_corrected=skill * 0.9, regret=0.05 * (1 - skill),
                )  # fmt: skip
    dense = name == "dense"
    run.append(
        "summary", arm=name, title=title,
        ppl={**{segment: _estimate(level + offset) for segment, _, level in SEGMENTS}, "all": _estimate(4.6 + offset)},
        bits_per_byte={segment: level / 3 / math.log(2) for segment, _, level in SEGMENTS},
        accuracy_corrected=None if dense else {"all": 0.3, "code": 0.25, "prose-1": 0.34, "prose-2": 0.33},
        effective_experts=None if dense else 6.2, experts_per_token=None if dense else 1.9,
        distinct_experts=None if dense else 7.8,
        j_per_token_modelled={"value": joules, "provenance": "estimated"},
        j_per_token_measured=measured or NO_READING,
        tokens_per_s=2412.0,
    )  # fmt: skip


def write_comparisons(run: RunFolder) -> None:
    for arm, diff in (("dense", -0.060), ("priced", -0.011), ("priced_ttt", -0.142)):
        for segment in (*(s for s, _, _ in SEGMENTS), "all"):
            run.append(
                "comparison", arm=arm, against="baseline", segment=segment, metric="nll", diff=diff, lo=diff - 0.015,
                hi=diff + 0.015, n=96, unit="nats per token",
            )  # fmt: skip
    run.append("verdict", text="Learning at test time lowers the loss on the code segment.", holds=True)
    run.append(
        "verdict", text="The energy-aware router saves 10 % of modelled joules at equal perplexity.", holds=False
    )
    run.append("verdict", text="Measured joules per token fall.", holds=None)


def write_run(path: Path, *, measured: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a complete run into ``path``; ``changes`` replace manifest entries."""
    random.seed(0)
    run = RunFolder.create(path)
    write_manifest(run, **changes)
    write_training(run)
    for name in ARMS:
        write_arm(run, name, measured=measured)
    write_comparisons(run)
    return run.path
