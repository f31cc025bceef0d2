"""The configuration of a study: trainings of one small model, arms x starts x seeds, with predictions to check.

A study's file holds `settings` (scalars of `StudySpec`, which `--set` may change) and `arms`, each with what is trained
and what is predicted of it in words and as a condition on the rows.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from thermoe.compare.predictions import RELATIONS
from thermoe.compare.shift_spec import shift_names
from thermoe.compare.spec import preset_names
from thermoe.config import apply_overrides, apply_tree, read_yaml
from thermoe.errors import ConfigError, UnknownNameError
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
class StudySpec:
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

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration for the manifest."""
        return dict(json.loads(json.dumps(dataclasses.asdict(self))))  # as a manifest read back holds it

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
        for name in self.arms:
            if name not in self.definitions:
                raise UnknownNameError.of("arm", name, self.definitions, where="arms")
        if not self.arms or len(set(self.arms)) < len(self.arms):
            raise ConfigError(
                f"the arms are {self.arms}",
                where="arms",
                accepted="at least one arm, each once",
                fix="choose from " + ", ".join(self.definitions),
            )
        if self.top_k >= self.num_experts or self.hidden_size % self.heads:
            raise ConfigError(
                f"top_k {self.top_k} of {self.num_experts} experts, {self.heads} heads of width {self.hidden_size}",
                where="top_k, heads",
                accepted="top_k below num_experts, so that experts can be left out; heads dividing hidden_size",
                fix="lower top_k or change heads",
            )


def study_names() -> list[str]:
    """Return the names of the studies that ship with the package."""
    folder = files("thermoe").joinpath("compare", "studies")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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
    if name not in study_names():
        raise UnknownNameError.of("preset", name, study_names(), where="--preset")
    text = files("thermoe").joinpath("compare", "studies", f"{name}.yaml").read_text(encoding="utf-8")
    loaded = read_yaml(text, where=f"study {name}")
    spec = StudySpec()
    spec.definitions = {key: _arm(key, entry) for key, entry in loaded["arms"].items()}
    spec.arms = list(spec.definitions)
    apply_tree(spec, loaded.get("settings", {}))
    apply_overrides(spec, overrides or [], example="steps=100")
    spec.check()
    return spec


def _arm(name: str, entry: dict[str, Any]) -> StudyArm:
    given = dict(entry)
    ROUTERS.get(given.get("router", "topk"), where=f"arms.{name}.router")
    predictions = [_prediction(name, part) for part in given.pop("predictions", [])]
    return StudyArm(name=name, predictions=predictions, **given)


def _prediction(arm: str, entry: dict[str, Any]) -> Prediction:
    given = dict(entry)
    (relation,) = [key for key in RELATIONS if key in given]
    against = given.pop(relation)
    for kind, value, known in (("metric", given["metric"], METRICS), ("start", given["start"], STARTS)):
        if value not in known:
            raise UnknownNameError.of(kind, value, known, where=f"arms.{arm}.predictions")
    if isinstance(against, dict):
        reference = (against.get("arm", arm), against.get("start", given["start"]))
        return Prediction(relation=relation, reference=reference, **given)
    return Prediction(relation=relation, value=float(against), **given)
