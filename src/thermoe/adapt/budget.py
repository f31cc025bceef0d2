"""What a user may spend: joules per token, watts, degrees, alone or together, checked once with the unit it came in."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from thermoe.errors import ConfigError, near_match

Phase = Literal["prefill", "decode"]
#: Everything that is controlled has one state for each of these.
PHASES: tuple[Phase, Phase] = ("prefill", "decode")
Field = Literal["j_per_token", "power_w", "temp_c"]
#: What this machine and model can hold, in words, by field.
Feasible = Mapping[str, str]

#: What each field means, an example of it, the highest value that can be meant, and its units as factors of the SI one.
_FIELDS: dict[Field, tuple[str, str, float, dict[str, float]]] = {
    "j_per_token": (
        "joules per token",
        "20 mJ/token",
        1e6,
        {"j/token": 1.0, "mj/token": 1e-3, "uj/token": 1e-6, "µj/token": 1e-6, "kj/token": 1e3},
    ),
    "power_w": ("watts", "350 W", 1e6, {"w": 1.0, "mw": 1e-3, "kw": 1e3, "watt": 1.0, "watts": 1.0}),
    "temp_c": ("degrees Celsius", "70 C", 150.0, {"c": 1.0, "°c": 1.0, "degc": 1.0, "celsius": 1.0}),
}
_EXAMPLES = "0.02 (J/token), '20 mJ/token', '350 W', '70 C', '20 mJ/token, 350 W', {'j_per_token': 0.02, 'temp_c': 70}"
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf(?:inity)?))\s*(.*?)\s*", re.I)


def _accepted(field: Field | None, feasible: Feasible) -> str:
    if field is None:
        told = ", ".join(feasible[name] for name in _FIELDS if name in feasible)
        return _EXAMPLES + (f"; on this machine and model {told}" if told else "")
    meaning, example, most, _ = _FIELDS[field]
    text = f"a finite number of {meaning} above 0 and at most {most:g}, such as {example!r}"
    return text + (f"; on this machine and model {feasible[field]}" if field in feasible else "")


def _refuse(what: str, field: Field | None, feasible: Feasible, *, where: str = "", fix: str = "") -> ConfigError:
    return ConfigError(
        what,
        where=f"budget{'.' + field if field else ''}{where}",
        accepted=_accepted(field, feasible),
        fix=fix or "give a budget inside that range, or None to hold none",
    )


def _field_of(unit: str) -> Field | None:
    return next((name for name, (_, _, _, units) in _FIELDS.items() if unit in units), None)


def _with_unit(text: str, expected: Field | None, feasible: Feasible, where: str = "") -> tuple[Field, float]:
    """Return the field and the SI value of a number with its unit.

    A prefix is read with its case: mW and MW are not the same, and only the first is a unit of a budget.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise _refuse(f"{text!r} is not a number with a unit", expected, feasible, where=where)
    number, written = float(found[1]), found[2]
    unit = re.sub(r"\s*/\s*(tokens?|tok)$", "/token", written, flags=re.I)
    if not unit:
        meant = _FIELDS[expected or "j_per_token"][1]
        raise _refuse(f"{text!r} has no unit", expected, feasible, where=where, fix=f"write it like {meant!r}")
    field = None if unit.startswith("M") else _field_of(unit.lower())
    if field is None:
        near = f"{unit}/token" if unit.lower() in ("j", "mj", "uj", "kj") else None
        raise _refuse(
            f"{text!r} has the unknown unit {written!r}",
            expected,
            feasible,
            where=where,
            fix=f"did you mean {near!r}?" if near else "use J/token, mJ/token, W or C",
        )
    if expected is not None and field != expected:
        raise _refuse(
            f"{text!r} is in {_FIELDS[field][0]}, not in {_FIELDS[expected][0]}",
            expected,
            feasible,
            where=where,
            fix=f"give it as {field}, or write {expected} like {_FIELDS[expected][1]!r}",
        )
    return field, number * _FIELDS[field][3][unit.lower()]


def _checked(value: Any, field: Field, feasible: Feasible, where: str = "") -> float:
    """Return ``value`` as a float of the field's SI unit."""
    if isinstance(value, str):
        value = _with_unit(value, field, feasible, where)[1]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _refuse(f"{field} is {value!r}, which is no number", field, feasible, where=where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number <= _FIELDS[field][2]:
        raise _refuse(f"{field} is {number!r}", field, feasible, where=where)
    return number


def _per_phase(value: Any, feasible: Feasible) -> float | dict[str, float]:
    if not isinstance(value, Mapping):
        return _checked(value, "j_per_token", feasible)
    for phase in value:
        if phase not in PHASES:
            near = near_match(str(phase), PHASES)
            raise _refuse(
                f"unknown phase {phase!r}",
                "j_per_token",
                feasible,
                fix=f"did you mean {near!r}?" if near else "use 'prefill', 'decode' or both",
            )
    if not value:
        raise _refuse("j_per_token names no phase", "j_per_token", feasible, fix="use 'prefill', 'decode' or both")
    return {phase: _checked(value[phase], "j_per_token", feasible, f".{phase}") for phase in PHASES if phase in value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Upper limits on what the work may spend; those given hold together and the tightest one acts.

    A number is in the unit of its name; a text carries its own unit and must fit (``j_per_token="20 mJ/token"``).

    Attributes:
        j_per_token: gross joules per token, one number for each phase by itself, or ``{"prefill": x, "decode": y}``;
            a phase that is left out is not limited.
        power_w: mean power of the measured devices, in watts.
        temp_c: temperature of the hottest measured device, in degrees Celsius.

    Raises:
        ConfigError: a limit is zero, negative, not finite, no number, beyond anything a machine can mean, or has a
            unit that is unknown or belongs to another limit; or nothing is limited at all.
    """

    j_per_token: float | Mapping[str, float] | None = None
    power_w: float | None = None
    temp_c: float | None = None

    def __post_init__(self) -> None:
        self._check({})

    def _check(self, feasible: Feasible) -> None:
        if self.j_per_token is not None:
            object.__setattr__(self, "j_per_token", _per_phase(self.j_per_token, feasible))
        if self.power_w is not None:
            object.__setattr__(self, "power_w", _checked(self.power_w, "power_w", feasible))
        if self.temp_c is not None:
            object.__setattr__(self, "temp_c", _checked(self.temp_c, "temp_c", feasible))
        if self.j_per_token is None and self.power_w is None and self.temp_c is None:
            raise _refuse("the budget limits nothing", None, feasible, fix="give one limit, or None for no budget")

    @classmethod
    def parse(
        cls, given: Budget | float | str | Mapping[str, Any], *, feasible: str | Feasible | None = None
    ) -> Budget:
        """Return the budget that ``given`` means.

        Args:
            given: a budget; joules per token as a number; a text such as ``"20 mJ/token"``, ``"350 W"``, ``"70 C"`` or
                several of them with commas; or a mapping with the fields of this class.
            feasible: the range that this machine and model can hold, in words, by field, or of the joules alone; it
                goes into the refusal.

        Raises:
            ConfigError: as the class, and for a text without a unit or a field that is unknown or given twice.
        """
        if isinstance(given, Budget):
            return given
        known: Feasible = {"j_per_token": feasible} if isinstance(feasible, str) else feasible or {}
        if isinstance(given, str):
            fields: dict[str, Any] = {}
            for part in given.split(","):
                field, value = _with_unit(part.strip(), None, known)
                if field in fields:
                    raise _refuse(f"{given!r} gives {field} twice", field, known, fix="give each limit once")
                fields[field] = value
        elif isinstance(given, Mapping):
            fields = dict(given)
        else:
            fields = {"j_per_token": _checked(given, "j_per_token", known)}
        for name in fields:
            if name not in _FIELDS:
                near = near_match(str(name), _FIELDS)
                raise _refuse(
                    f"unknown limit {name!r}",
                    None,
                    known,
                    fix=f"did you mean {near!r}?" if near else "use j_per_token, power_w or temp_c",
                )
        budget = object.__new__(cls)
        for name in _FIELDS:
            object.__setattr__(budget, name, fields.get(name))
        budget._check(known)
        return budget

    def j_per_token_of(self, phase: str) -> float | None:
        """Return the limit in joules per token of one phase, ``None`` where there is none."""
        if isinstance(self.j_per_token, Mapping):
            return self.j_per_token.get(phase)
        return self.j_per_token

    def as_dict(self) -> dict[str, Any]:
        """Return the limits that are set, as plain numbers; `parse` takes them back."""
        limits: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS if getattr(self, name) is not None}
        if isinstance(self.j_per_token, Mapping):
            limits["j_per_token"] = dict(self.j_per_token)
        return limits

    def __str__(self) -> str:
        parts: list[str] = []
        if isinstance(self.j_per_token, Mapping):
            parts += [f"{value:.4g} J/token at {phase}" for phase, value in self.j_per_token.items()]
        elif self.j_per_token is not None:
            parts.append(f"{self.j_per_token:.4g} J/token")
        parts += [f"{self.power_w:.4g} W"] if self.power_w is not None else []
        parts += [f"{self.temp_c:.4g} C"] if self.temp_c is not None else []
        return ", ".join(parts)
