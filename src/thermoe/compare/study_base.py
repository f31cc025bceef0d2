"""What the configurations of all studies share: seeds, arms by name, a small model, and how a preset is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

from thermoe.compare.predictions import RELATIONS
from thermoe.config import apply_overrides, apply_tree
from thermoe.errors import ConfigError, UnknownNameError


class StudyBase:
    """The base of a study's dataclass, which declares the fields itself, in the order in which they are shown."""

    __slots__ = ()

    seed: int
    seeds: int
    steps: int
    batch_size: int
    sequence_length: int
    lr: float
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    num_experts: int
    top_k: int
    expert_width: int
    workers: int
    arms: list[str]
    definitions: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration for the manifest."""
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]  # what inherits is a dataclass
        return dict(json.loads(json.dumps(fields)))  # as a manifest read back holds it

    @property
    def seed_range(self) -> range:
        """The seeds."""
        return range(self.seed, self.seed + self.seeds)

    def arm_texts(self) -> list[dict[str, str]]:
        """Return name, title and description of each arm, for the manifest."""
        arms = [self.definitions[name] for name in self.arms]
        return [{"name": arm.name, "title": arm.title, "description": arm.description} for arm in arms]

    def check(self) -> None:
        """Raise an error for a value out of range or an arm that is not defined."""
        raise NotImplementedError

    def check_arms_and_sizes(self, *, first: str | None = None) -> None:
        """Raise an error for arms that are not defined or doubled, and for sizes that do not fit each other.

        Args:
            first: the arm that has to come first, if any.
        """
        for name in self.arms:
            if name not in self.definitions:
                raise UnknownNameError.of("arm", name, self.definitions, where="arms")
        if not self.arms or len(set(self.arms)) < len(self.arms) or first not in (None, self.arms[0]):
            accepted = f"{first} first, which the others are compared with, and each arm once"
            raise ConfigError(
                f"the arms are {self.arms}",
                where="arms",
                accepted="at least one arm, each once" if first is None else accepted,
                fix="choose from " + ", ".join(self.definitions),
            )
        if self.top_k >= self.num_experts or self.hidden_size % self.heads:
            raise ConfigError(
                f"top_k {self.top_k} of {self.num_experts} experts, {self.heads} heads of width {self.hidden_size}",
                where="top_k, heads",
                accepted="top_k below num_experts, so that experts can be left out; heads dividing hidden_size",
                fix="lower top_k or change heads",
            )

    def filled(self, settings: Mapping[str, Any], overrides: list[str] | None, *, example: str) -> Self:
        """Return the study itself with a preset's settings, then ``key=value`` overrides, checked."""
        apply_tree(self, settings)
        apply_overrides(self, overrides or [], example=example)
        self.check()
        return self


def parse_prediction(arm: str, entry: Mapping[str, Any], **known: Iterable[str]) -> tuple[dict[str, Any], str, Any]:
    """Return a prediction's fields, its relation, and what it is compared with.

    Args:
        arm: the arm it is about.
        entry: as a preset states it.
        known: what a field may be, by name of the field.

    Raises:
        UnknownNameError: a field is something else.
    """
    given = dict(entry)
    (relation,) = [key for key in RELATIONS if key in given]
    against = given.pop(relation)
    for kind, names in known.items():
        if kind in given and given[kind] not in names:
            raise UnknownNameError.of(kind, str(given[kind]), names, where=f"arms.{arm}.predictions")
    return given, relation, against
