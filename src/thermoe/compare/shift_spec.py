"""The configuration of a shift study: small models read a stream whose domain changes, frozen and learning.

A file holds `settings` (scalars of `ShiftSpec`, which `--set` may change) and `arms`, each with what learns, whether a
budget holds, and what is predicted of it in words and as a condition on the rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from thermoe.compare.study_base import StudyBase, parse_prediction
from thermoe.config import packaged_names, read_packaged, within
from thermoe.errors import UnknownNameError
from thermoe.routers.fast_weights import FAST_FAMILIES

#: The stream: name of a segment, and the text it is cut from. "manual" is the text that no model was trained on.
SEGMENTS = (("prose-1", "prose"), ("python", "python"), ("manual", "manual"), ("prose-2", "prose"))
ORDERS = ("segments", "interleaved")
LEARNS = ("nothing", "routers", "all")
#: What may be predicted, with the words of a verdict.
METRICS = {
    "nll": "loss (nats per token)",
    "j_per_token": "modelled joules per token, learning inside",
    "learning_frac": "share of learning in the modelled joules",
    "worst_window": "loss above frozen over the worst window (nats per token)",
}


@dataclass(kw_only=True, slots=True)
class ShiftPrediction:
    """What is expected of an arm.

    Args:
        text: the expectation and its ground, in words.
        metric: a key of `METRICS`.
        relation: below, above or near.
        order: how the stream is read.
        segment: of the stream, or "all"; only a loss has segments.
        value: the number compared with, when ``reference`` is ``None``.
        reference: the arm compared with: losses by difference, joules by ratio.
        margin: of `near`: the largest distance; else what is added to what is compared with.
    """

    text: str
    metric: str
    relation: str
    order: str = "segments"
    segment: str = "all"
    value: float | None = None
    reference: str | None = None
    margin: float = 0.0


@dataclass(kw_only=True, slots=True)
class ShiftArm:
    """One way to read the stream.

    Args:
        name: key of the arm.
        title: for tables and figures.
        description: in plain words.
        learns: "nothing", "routers" or "all" weights.
        budget: whether the price holds the routing, learning included, to `ShiftSpec.budget_frac`.
        bucket: share of the served joules that learning may cost; ``None`` is no cap.
        predictions: checked against the rows.
    """

    name: str
    title: str
    description: str
    learns: str = "nothing"
    budget: bool = False
    bucket: float | None = None
    predictions: list[ShiftPrediction] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class ShiftSpec(StudyBase):
    """A shift study.

    Args:
        seed: the first seed; a seed sets the initial weights and the order of the training text.
        seeds: how many, counted up from ``seed``.
        workers: processes, one thread each; with 1 the study runs in the process it was called in.
        steps, batch_size, lr: of training; AdamW, warm-up over a tenth, then a cosine down to a tenth.
        python_frac: share of the rows of a training batch that is Python; the rest is prose.
        balance: coefficient of the Switch loss in training.
        sequence_length, vocab_size, hidden_size, layers, heads, num_experts, top_k, expert_width: of the model.
        prose_bytes, python_bytes: training text used.
        segment_batches: batches of each segment.
        decoded: sequences of a batch of the stream, routed as if decoded together.
        calibration_batches: batches of prose and of Python on which the price is set.
        window: batches of the window that must never be worse.
        adapt_lr, adapt_anchor, adapt_family, adapt_kl_cap: of the routers that learn.
        all_lr: of the rival that learns all weights.
        budget_frac: what the budget leaves of the modelled joules of routing with all experts.
        arms: names of arms, in order; the first is what the others are compared with.
    """

    seed: int = 0
    seeds: int = 3
    workers: int = 2
    steps: int = 400
    batch_size: int = 16
    lr: float = 3e-3
    python_frac: float = 0.375
    balance: float = 0.01
    sequence_length: int = 128
    vocab_size: int = 1024
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    num_experts: int = 16
    top_k: int = 4
    expert_width: int = 64
    prose_bytes: int = 1_500_000
    python_bytes: int = 1_000_000
    segment_batches: int = 10
    decoded: int = 16
    calibration_batches: int = 2
    window: int = 8
    adapt_lr: float = 1e-3
    adapt_anchor: float = 0.99
    adapt_family: str = "full"
    adapt_kl_cap: float = 0.05
    all_lr: float = 3e-4
    budget_frac: float = 0.6
    arms: list[str] = field(default_factory=list)
    definitions: dict[str, ShiftArm] = field(default_factory=dict)

    def check(self) -> None:
        """Raise an error for a value out of range or an arm that is not defined."""
        least = {"seed": 0, "sequence_length": 2, "vocab_size": 257, "adapt_lr": 0.0, "all_lr": 0.0, "balance": 0.0}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, int):
                within(entry.name, value, int(least.get(entry.name, 1)))
            elif isinstance(value, float):
                top = 1.0 if entry.name in ("python_frac", "adapt_anchor", "budget_frac") else float("inf")
                within(entry.name, value, least.get(entry.name, 0.0 if entry.name == "python_frac" else 1e-12), top)
        if self.adapt_family not in FAST_FAMILIES:
            raise UnknownNameError.of("family of fast weights", self.adapt_family, FAST_FAMILIES, where="adapt_family")
        self.check_arms_and_sizes(first=next(iter(self.definitions), "frozen"))

    def passes(self) -> list[tuple[str, str]]:
        """Return (arm, order) of every reading of the stream: what learns nothing reads every order alike."""
        learning = [(arm, order) for arm in self.arms for order in ORDERS]
        return [(a, o) for a, o in learning if self.definitions[a].learns != "nothing" or o == ORDERS[0]]


def shift_names() -> list[str]:
    """Return the names of the shift studies that ship with the package."""
    return packaged_names("compare", "shifts")


def load_shift(name: str, overrides: list[str] | None = None) -> ShiftSpec:
    """Return a shift study with ``key=value`` overrides applied.

    Raises:
        UnknownNameError: no such study, arm, metric, segment or order.
        ConfigError: an unknown key, or a value that does not fit.
    """
    loaded = read_packaged(name, "compare", "shifts", what="shift study")
    definitions = {key: _arm(key, entry, loaded["arms"]) for key, entry in loaded["arms"].items()}
    spec = ShiftSpec(arms=list(definitions), definitions=definitions)
    return spec.filled(loaded.get("settings", {}), overrides, example="segment_batches=4")


def _arm(name: str, entry: dict[str, Any], arms: dict[str, Any]) -> ShiftArm:
    given = dict(entry)
    if given.get("learns", "nothing") not in LEARNS:
        raise UnknownNameError.of("learner", str(given["learns"]), LEARNS, where=f"arms.{name}.learns")
    predictions = [_prediction(name, part, arms) for part in given.pop("predictions", [])]
    return ShiftArm(name=name, predictions=predictions, **given)


def _prediction(arm: str, entry: dict[str, Any], arms: dict[str, Any]) -> ShiftPrediction:
    segments = ("all", *dict(SEGMENTS))
    given, relation, against = parse_prediction(arm, entry, metric=METRICS, segment=segments, order=ORDERS)
    if isinstance(against, str):
        if against not in arms:
            raise UnknownNameError.of("arm", against, arms, where=f"arms.{arm}.predictions")
        return ShiftPrediction(relation=relation, reference=against, **given)
    return ShiftPrediction(relation=relation, value=float(against), **given)
