"""The settings of an adapter, checked, and the layers they name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from thermoe.adapt.reading import RouterInput
from thermoe.adapt.safeguards import Safeguards
from thermoe.energy.cost_model import CostModel
from thermoe.errors import ConfigError, UnknownNameError
from thermoe.routers.fast_weights import FastWeights

LAYER_CHOICES = ("all", "top_half")
#: The largest number that a float holds: an integer may be larger without being infinite.
LARGEST = sys.float_info.max
LEARN_ON = ("served", "unsteered", "both")


def check_number(name: str, value: Any, fits: bool, accepted: str, usual: object) -> None:
    """Raise a ConfigError unless ``value`` is a number that fits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits:
        raise ConfigError(f"{name} is {value!r}", where=f"adapt.{name}", accepted=accepted, fix=f"leave it at {usual}")


def check_settings(**settings: Any) -> None:
    """Check numbers by name; ``None`` is left alone where it means that there is none.

    Raises:
        ConfigError: one is outside its range.
    """
    rules: dict[str, tuple[Any, str, object]] = {
        "lr": (lambda x: 0 <= x <= LARGEST, "a finite number of at least 0", 1e-3),
        "anchor": (lambda x: 0 < x <= 1, "a number above 0 and at most 1", 0.99),
        "max_grad_norm": (lambda x: 0 < x <= LARGEST, "a finite number above 0", 1.0),
        "min_tokens": (lambda x: isinstance(x, int) and x >= 0, "an integer of at least 0", 0),
        "held_frac": (lambda x: 0 <= x < 1, "a number from 0 to below 1", 0.125),
        "steps": (lambda x: isinstance(x, int) and x >= 1, "an integer of at least 1", 16),
        "seed": (lambda x: isinstance(x, int), "an integer", 0),
        "min_gain_per_j": (lambda x: 0 <= x <= LARGEST, "a finite number of at least 0, or None", None),
    }
    for name, value in settings.items():
        if value is None and name in ("anchor", "min_gain_per_j"):
            continue
        fits, accepted, usual = rules[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        check_number(name, value, number and fits(value), accepted, usual)


def check_flag(name: str, value: Any) -> None:
    """Raise a ConfigError unless ``value``, True by default, is True or False."""
    if not isinstance(value, bool):
        raise ConfigError(
            f"{name} is {value!r}", where=f"adapt.{name}", accepted="True or False", fix=f"leave {name} at True"
        )


def check_reading(by_text: Any, learn_on: Any, percentiles: Any) -> None:
    """Check how batches are read.

    Raises:
        ConfigError: ``by_text`` is not True or False, or ``percentiles`` not (low, high) in 0..100 or ``None``.
        UnknownNameError: ``learn_on`` is no such choice.
    """
    check_flag("by_text", by_text)
    if not isinstance(learn_on, str) or learn_on not in LEARN_ON:
        raise UnknownNameError.of("choice to learn on", str(learn_on), LEARN_ON, where="adapt.learn_on")
    check_percentiles(percentiles)


def cost_model_of(given: Any) -> CostModel:
    """Return the joules of work that are meant, the prior by default.

    Raises:
        ConfigError: these are none.
    """
    _check_kind(given, CostModel, "cost_model", "None for the prior", "use CostModel.prior(), or leave it out")
    return given or CostModel.prior()


def guards_of(given: Any, anchor: float | None) -> Safeguards:
    """Return the safeguards that are meant, all by default, with the anchor that is given beside them.

    Raises:
        ConfigError: these are none.
    """
    _check_kind(given, Safeguards, "safeguards", "None for all", "use Safeguards(kl_cap=0.3, judge=True)")
    guards = given or Safeguards()
    return guards if anchor is None else replace(guards, anchor=anchor)


def _check_kind(given: Any, kind: type, name: str, none: str, fix: str) -> None:
    if given is not None and not isinstance(given, kind):
        raise ConfigError(
            f"{name} is {given!r}", where=f"adapt.{name}", accepted=f"a {kind.__name__}, or {none}", fix=fix
        )


def check_percentiles(given: Any) -> None:
    """Raise a ConfigError unless these are (low, high) with 0 <= low < high <= 100, or ``None``."""
    pair = isinstance(given, (tuple, list)) and len(given) == 2
    numbers = pair and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in given)
    if given is not None and not (numbers and 0 <= given[0] < given[1] <= 100):
        raise ConfigError(
            f"percentiles are {given!r}",
            where="adapt.percentiles",
            accepted="(low, high) with 0 <= low < high <= 100, or None for every token",
            fix="use (20, 95), or leave it out",
        )


def chosen_layers(
    given: str | Sequence[int | str], fast: Mapping[str, FastWeights], seen: Mapping[str, RouterInput] | None = None
) -> list[str]:
    """Return the names of the layers that learn.

    Args:
        given: "all", "top_half", or positions and names.
        fast: the fast weights of all layers, in the order of the model.
        seen: what the routers got, for "top_half": the layers whose trained routers give their favourite the highest
            mean probability (as in arXiv 2510.14853); all while it is not known.

    Raises:
        UnknownNameError: a text that is no such choice.
        ConfigError: a layer that is not there, or none.
    """
    names = list(fast)
    if isinstance(given, str):
        if given not in LAYER_CHOICES:
            raise UnknownNameError.of("choice of layers", given, LAYER_CHOICES, where="adapt.layers")
        if given == "all" or not seen:
            return names
        sure = {name: float(torch.softmax(one.slow, -1).amax(-1).mean()) for name, one in seen.items()}
        best = sorted(sure, key=lambda name: -sure[name])[: max(1, len(names) // 2)]
        return [name for name in names if name in best]
    found = []
    for entry in given if isinstance(given, Sequence) else [given]:
        place = isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < len(names)
        name = names[entry] if place else entry  # type: ignore[index]
        if not isinstance(name, str) or name not in fast:
            raise ConfigError(
                f"there is no layer {entry!r} to adapt",
                where="adapt.layers",
                accepted=f"'all', 'top_half', positions 0..{len(names) - 1}, or names: {', '.join(names)}",
                fix="name layers that the model has",
            )
        found.append(name)
    if not found:
        raise ConfigError(
            "no layer is to be adapted",
            where="adapt.layers",
            accepted="at least one layer",
            fix="leave layers at 'all'",
        )
    return [name for name in names if name in found]
