"""The configuration of a study: trainings of one small model, arms x starts x seeds, with predictions to check.

A study's file holds `settings` (scalars of `StudySpec`, which `--set` may change) and `arms`, each with what is trained
and what is predicted of it in words and as a condition on the rows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from thermoe.compare.shift_spec import shift_names
from thermoe.compare.spec import preset_names
from thermoe.compare.study_base import StudyBase, parse_prediction
from thermoe.config import packaged_names, read_packaged
from thermoe.errors import ConfigError
from thermoe.routers.base import ROUTERS

STARTS = ("balanced", "collapsed")
#: What may be predicted, with the words of a verdict.
METRICS = {
    "nll": "validation loss (nats per token)",
    "effective_experts": "effective experts of the worst layer",
    "effective_experts_training": "effective experts of the worst layer in training",
    "max_vio": "overload of the busiest expert (MaxVio)",
    "dead_experts": "dead experts of all layers",
    "token_entropy": "entropy per token (nats)",
}


@dataclass(kw_only=True, slots=True)
class Prediction:
    """What is expected of an arm at the end of training.

    Args:
        text: the expectation and its ground, in words.
        start: the start it speaks of.
        metric: a key of `METRICS`.
        relation: below, above or near.
        value: the number compared with, when ``reference`` is ``None``.
        reference: (arm, start) compared with, seed by seed.
        step: the training step it speaks of; the last validation before it counts; ``None`` is the end of training.
        margin: of `near`: the largest distance; else what is added to the value compared with.
    """

    text: str
    start: str
    metric: str
    relation: str
    value: float | None = None
    reference: tuple[str, str] | None = None
    margin: float = 0.0
    step: int | None = None


@dataclass(kw_only=True, slots=True)
class StudyArm:
    """One way to train: the router, its options, the auxiliary losses, and what is predicted."""

    name: str
    title: str
    description: str
    router: str = "topk"
    options: dict[str, Any] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class StudySpec(StudyBase):
    """A study.

    Args:
        seed: the first seed.
        seeds: how many, counted up from ``seed``.
        steps, batch_size, sequence_length, lr: of training; AdamW, warm-up over a tenth, then a cosine down to a tenth.
        vocab_size, hidden_size, layers, heads, num_experts, top_k, expert_width: of the model.
        offset_nats: lead of the favoured experts' logits in the collapsed start.
        eval_every: steps between two validations.
        eval_rows: held-out sequences of a validation.
        text_bytes: training text used.
        workers: processes, one thread each; with 1 the study runs in the process it was called in.
        arms: names of arms, in order.
    """

    seed: int = 0
    seeds: int = 3
    steps: int = 250
    batch_size: int = 16
    sequence_length: int = 64
    lr: float = 3e-3
    vocab_size: int = 512
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 64
    offset_nats: float = 4.0
    eval_every: int = 10
    eval_rows: int = 64
    text_bytes: int = 1_000_000
    workers: int = 2
    arms: list[str] = field(default_factory=list)
    definitions: dict[str, StudyArm] = field(default_factory=dict)

    def check(self) -> None:
        """Raise an error for a value out of range or an arm that is not defined."""
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            low = {"seed": 0, "offset_nats": 0, "sequence_length": 2, "lr": 1e-12}.get(entry.name, 1)
            if isinstance(value, (int, float)) and not low <= value < float("inf"):
                raise ConfigError(
                    f"{entry.name} is {value}",
                    where=entry.name,
                    accepted=f"a finite number of at least {low}",
                    fix=f"raise {entry.name}",
                )
        self.check_arms_and_sizes()


def study_names() -> list[str]:
    """Return the names of the studies that ship with the package."""
    return packaged_names("compare", "studies")


def preset_kinds() -> list[str]:
    """Return a line per preset of `thermoe compare`: its name and its kind, stream, study or shift study."""
    kinds = {**dict.fromkeys(preset_names(), "stream"), **dict.fromkeys(study_names(), "study")}
    kinds |= dict.fromkeys(shift_names(), "shift study")
    return [f"{name:10} {kinds[name]}" for name in sorted(kinds)]


def load_study(name: str, overrides: list[str] | None = None) -> StudySpec:
    """Return a study with ``key=value`` overrides applied.

    Raises:
        UnknownNameError: no such study, arm, metric or start.
        ConfigError: an unknown key, or a value that does not fit.
    """
    loaded = read_packaged(name, "compare", "studies", what="study")
    definitions = {key: _arm(key, entry) for key, entry in loaded["arms"].items()}
    spec = StudySpec(arms=list(definitions), definitions=definitions)
    return spec.filled(loaded.get("settings", {}), overrides, example="steps=100")


def _arm(name: str, entry: dict[str, Any]) -> StudyArm:
    given = dict(entry)
    ROUTERS.get(given.get("router", "topk"), where=f"arms.{name}.router")
    predictions = [_prediction(name, part) for part in given.pop("predictions", [])]
    return StudyArm(name=name, predictions=predictions, **given)


def _prediction(arm: str, entry: dict[str, Any]) -> Prediction:
    given, relation, against = parse_prediction(arm, entry, metric=METRICS, start=STARTS)
    if isinstance(against, dict):
        reference = (against.get("arm", arm), against.get("start", given["start"]))
        return Prediction(relation=relation, reference=reference, **given)
    return Prediction(relation=relation, value=float(against), **given)
