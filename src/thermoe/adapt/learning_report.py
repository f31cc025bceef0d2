"""What an adapter tells of itself: one record per batch, a flat dictionary of numbers, and a text for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from thermoe.adapt.learning_bucket import LearningBucket
from thermoe.adapt.learning_work import LearningKind, LearningLedger
from thermoe.adapt.safeguards import Paired
from thermoe.adapt.stream_state import COUNTERS, Stream
from thermoe.results import Provenance

StepVerdict = Literal["accepted", "rejected", "deferred", "collected", "skipped", "reset"]


@dataclass(frozen=True, slots=True)
class AdaptStep:
    """One batch: what it scored before learning, and what learning did.

    Args:
        sequence_nll: float32 (B,), nats per sequence over its real predicted tokens, scored before the update.
        learned: whether the fast weights moved and stayed so.
        reason: why not; of updates that wait for a verdict, what for; ``None`` when one was accepted.
        change_norm: Euclidean norm of the change of all fast weights; 0 when nothing moved, or was undone.
        tokens: int64 (B,), real predicted tokens of each sequence.
        verdict: "accepted"; "deferred" (it moved, and waits for a verdict); "rejected" (undone, together with those
            that waited); "collected" (gradients put aside for a larger chunk); "skipped"; "reset".
        judged: paired difference, after minus before, on held-back tokens; ``None`` where nothing was judged.
        cost_ratio: modelled joules of the judged forwards, after over before; ``None`` where that is not known.
        kl: by layer, mean KL(trained, adapted) after the update, in nats; ``None`` where it was not measured.
        learning_j: modelled joules that learning cost at this batch, judge and shadow included.
        provenance: of ``learning_j``.
        shadow: adapted minus trained on held-back tokens; ``None`` where there was no shadow.
        stream: name of the stream.
        text: which of the texts of the stream it was, from 0 in the order in which they came up.
    """

    sequence_nll: Tensor
    learned: bool
    reason: str | None
    change_norm: float
    tokens: Tensor
    verdict: StepVerdict
    judged: Paired | None = None
    cost_ratio: float | None = None
    kl: Mapping[str, float] | None = None
    learning_j: float = 0.0
    provenance: Provenance = "estimated"
    shadow: Paired | None = None
    stream: str = "default"
    text: int = 0


def step_metrics(
    step: AdaptStep | None, stream: Stream, lr: float, ledger: LearningLedger, bucket: LearningBucket
) -> dict[str, Any]:
    """Return plain numbers and words; unknown is ``None``."""
    judged, state = None if step is None else step.judged, stream.state
    return {
        **{name: stream.count(name) for name in COUNTERS},
        "texts": len(stream.texts),
        "text": stream.at,
        "lr": lr,
        "interval": state.cadence.interval,
        "interval_reason": state.cadence.reason,
        "gain_nats_per_j": state.cadence.gain_per_j,
        "verdict": None if step is None else step.verdict,
        "reason": None if step is None else step.reason,
        "judged_nats": None if judged is None else judged.mean,
        "judged_se": None if judged is None else judged.se,
        "judged_tokens": None if judged is None else judged.tokens,
        "shadow_nats": state.shadow_nats,
        "kl_max": None if step is None or not step.kl else max(step.kl.values()),
        "learning_j_modelled": ledger.energy_j,
        "served_j_modelled": bucket.served_j,
        "learning_frac": ledger.energy_j / bucket.served_j if bucket.served_j else None,
        "bucket_frac": bucket.frac,
        "bucket_level_j": bucket.level_j,
        "bucket_capacity_j": bucket.capacity_j,
        "provenance_modelled": ledger.provenance,
    }


def text_report(metrics: Mapping[str, Any], counts: Mapping[LearningKind, int], *, stream: str, family: str) -> str:
    """Return what happened, in lines."""
    m = metrics
    lines = [
        f"test-time training of the routers ({family} fast weights), stream {stream!r}: {m['batches']} batches read",
        f"updates: {m['updates']} made, {m['accepted']} accepted, {m['rejected']} rejected, {m['deferred']} waiting at "
        f"some time, {m['skipped']} batches without one, {m['resets']} resets",
        f"step size: {m['lr']:.3g}; {m['interval_reason']}",
    ]
    if m["texts"] > 1:
        lines.append(f"texts: {m['texts']} told apart, number {m['text']} is read; figures below are of that one")
    if m["gain_nats_per_j"] is not None:
        lines.append(f"gain: {m['gain_nats_per_j']:.4g} nats per joule of learning, averaged over verdicts")
    if m["shadow_nats"] is not None:
        lines.append(
            f"last shadow: adapted minus trained {m['shadow_nats']:+.4g} nats per token, {m['shadows']} in all"
        )
    spent = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "nothing"
    share = "" if m["learning_frac"] is None else f", {100 * m['learning_frac']:.2g} % of what was served"
    cap = "no cap" if m["bucket_frac"] is None else f"cap {100 * m['bucket_frac']:g} %"
    label = m["provenance_modelled"] or "nothing spent"
    lines.append(f"learning: {m['learning_j_modelled']:.4g} J modelled ({label}): {spent}{share}; {cap}")
    held = f"{m['graphs']} forwards of learning are recorded"
    lines.append(f"CUDA graphs: {held if m['graphs_reason'] is None else 'none, for ' + m['graphs_reason']}")
    if m["reason"] is not None:
        lines.append(f"last batch: {m['verdict']}: {m['reason']}")
    return "\n".join(lines)
