"""The exceptions of thermoe, and the four parts every message has: what, where, what is accepted, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_match(name: str, options: Iterable[str]) -> str | None:
    """Return the option closest to ``name``, or ``None`` when nothing is close."""
    by_lower = {option.lower(): option for option in options}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


class ThermoeError(Exception):
    """Base of every error raised on purpose.

    Args:
        what: what happened, with the values that matter.
        where: the dotted configuration key, module path or file it concerns.
        accepted: what would have been accepted.
        fix: what to do next.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, accepted: str | None = None, fix: str | None = None
    ) -> None:
        self.what, self.where, self.accepted, self.fix = what, where, accepted, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("accepted", self.accepted), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class ConfigError(ThermoeError, ValueError):
    """A setting has an unknown key, a wrong type or a value outside its range."""


class UnknownNameError(ConfigError):
    """A name is not in the registry it was looked up in."""

    @classmethod
    def of(cls, kind: str, name: str, options: Iterable[str], *, where: str | None = None) -> UnknownNameError:
        """Build the message for an unknown ``name`` of a ``kind``, with the near match if there is one."""
        names = sorted(options)
        near = near_match(name, names)
        return cls(
            f"unknown {kind} {name!r}",
            where=where,
            accepted=", ".join(names) or "nothing is registered",
            fix=f"did you mean {near!r}?" if near else f"choose one of the accepted {kind} names",
        )


class ConversionError(ThermoeError, ValueError):
    """A model cannot be converted as asked."""


class CheckpointError(ThermoeError, RuntimeError):
    """A saved model is incomplete, damaged, or does not fit its configuration."""


class RoutingError(ThermoeError, ValueError):
    """A router was built or called with values it cannot route."""


class DataError(ThermoeError, ValueError):
    """A text source is missing, unreadable, empty or too small."""


class RunFolderError(ThermoeError, ValueError):
    """A run folder is in the way, unreadable, or belongs to another configuration."""


class TelemetryError(ThermoeError, RuntimeError):
    """A telemetry object was used wrongly. Hardware faults never raise; they are recorded."""


class TrainingDivergedError(ThermoeError, RuntimeError):
    """Training met a loss or gradient that is not finite."""

    exit_code = 3


class MissingDependencyError(ThermoeError, ImportError):
    """An optional dependency is needed and not installed."""

    exit_code = 3


class MachineError(ThermoeError, RuntimeError):
    """This machine cannot do what was asked."""

    exit_code = 3
