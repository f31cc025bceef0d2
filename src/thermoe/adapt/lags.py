"""How fast a loop answers a step: of the budget, of a cap, of the load.

What is watched is a number per window, usually the mean active cost of the routing. With `before` its mean and `sd` its
standard deviation up to the step and `final` its mean over the last windows, and `change = final - before`:

    detection   the first window beyond 3 sd of before, on the side of the change
    63 %        the first window that has made 1 - 1/e of the change
    settling    the first of 5 windows in a row inside +-5 % of the change around final
    overshoot   how far it goes beyond final, as a part of the change
    absolute error   the integral of |value - final| from the step on

Each time is given in milliseconds, tokens and windows, and is ``None`` when the thing did not happen.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from thermoe.errors import ConfigError

DETECTION_SD = 3.0
ANSWERED = 1.0 - math.exp(-1.0)
SETTLED_REL = 0.05
SETTLED_WINDOWS = 5
FEWEST_BEFORE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LagWindow:
    """One window of what is watched.

    Attributes:
        t_s: when it ended, on a monotonic clock.
        tokens: tokens processed in it.
        value: what is watched; ``None`` when the window has no number.
    """

    t_s: float
    tokens: float
    value: float | None


@dataclass(frozen=True, slots=True)
class Lag:
    """A time after the step: to the end of the window in which something was first seen, that window counted."""

    ms: float
    tokens: float
    windows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReactionLags:
    """The answer to one step.

    Attributes:
        detection: when the change was first seen.
        rise_63: when 63 % of it was made.
        settling: when it was inside for good.
        overshoot: part of the change by which it went too far; 0 when it did not, ``None`` without a change.
        absolute_error: integral of the distance from the final value, in units of the value times seconds.
        before: mean of the value before the step.
        final: its final value.
        reason: why something is ``None``.
    """

    detection: Lag | None = None
    rise_63: Lag | None = None
    settling: Lag | None = None
    overshoot: float | None = None
    absolute_error: float | None = None
    before: float | None = None
    final: float | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a result row."""
        return asdict(self)


def reaction_lags(windows: Iterable[LagWindow], step_t_s: float, *, final: float | None = None) -> ReactionLags:
    """Measure the answer to a step at ``step_t_s``.

    Args:
        windows: what was watched, in the order of time; those that end after the step belong to the answer, so the
            window in which the step falls counts as the first of it.
        step_t_s: when the step was made, on the clock of the windows.
        final: the value that the answer leads to; ``None`` takes the mean of the last 5 windows, which must then be
            past the answer.

    Raises:
        ConfigError: the windows are not in the order of time, or the step or ``final`` is not finite.
    """
    listed = list(windows)
    ordered = all(a.t_s < b.t_s for a, b in itertools.pairwise(listed))
    if not (ordered and math.isfinite(step_t_s) and (final is None or math.isfinite(final))):
        raise ConfigError(
            f"windows out of order, or step_t_s={step_t_s!r} or final={final!r} is not finite",
            where="reaction_lags",
            accepted="windows with rising t_s, and finite numbers",
            fix="give the windows as they were measured",
        )
    earlier = [w.value for w in listed if w.t_s <= step_t_s and w.value is not None and math.isfinite(w.value)]
    later = [w for w in listed if w.t_s > step_t_s]
    values = [w.value for w in later if w.value is not None and math.isfinite(w.value)]
    if len(earlier) < FEWEST_BEFORE or len(values) < SETTLED_WINDOWS:
        return ReactionLags(
            reason=f"{len(earlier)} windows before the step and {len(values)} after it; "
            f"{FEWEST_BEFORE} and {SETTLED_WINDOWS} are needed"
        )
    before, sd = statistics.fmean(earlier), statistics.stdev(earlier)
    end = statistics.fmean(values[-SETTLED_WINDOWS:]) if final is None else final
    change = end - before
    area = _absolute_error(later, step_t_s, end)
    # A constant has no scatter but rounding, and that is no change.
    if abs(change) <= max(DETECTION_SD * sd, 1e-9 * abs(before)):
        reason = f"the value changed by {change:.4g}, which is within {DETECTION_SD:g} sd ({sd:.4g}) of before"
        return ReactionLags(before=before, final=end, absolute_error=area, reason=reason)
    side = math.copysign(1.0, change)
    moved = [None if w.value is None or not math.isfinite(w.value) else (w.value - before) * side for w in later]
    size = abs(change)
    detected = _first(m is not None and m > DETECTION_SD * sd for m in moved)
    risen = _first(m is not None and m >= ANSWERED * size for m in moved)
    # A hair of room, so that a value at the very edge is inside whichever way it was rounded.
    inside = [m is not None and abs(m - size) <= SETTLED_REL * size * (1 + 1e-9) for m in moved]
    runs = range(len(inside) - SETTLED_WINDOWS + 1)
    settled = _first(all(inside[start : start + SETTLED_WINDOWS]) for start in runs)
    names = ("detection", "63 %", "settling")
    missing = [name for name, found in zip(names, (detected, risen, settled), strict=True) if found is None]
    return ReactionLags(
        detection=_lag(later, detected, step_t_s),
        rise_63=_lag(later, risen, step_t_s),
        settling=_lag(later, settled, step_t_s),
        overshoot=max(0.0, max(m for m in moved if m is not None) / size - 1.0),
        absolute_error=area,
        before=before,
        final=end,
        reason=f"not reached in {len(later)} windows: {', '.join(missing)}" if missing else None,
    )


def _first(happened: Iterable[bool]) -> int | None:
    return next((position for position, yes in enumerate(happened) if yes), None)


def _lag(later: list[LagWindow], position: int | None, step_t_s: float) -> Lag | None:
    if position is None:
        return None
    tokens = math.fsum(window.tokens for window in later[: position + 1])
    return Lag(ms=(later[position].t_s - step_t_s) * 1e3, tokens=tokens, windows=position + 1)


def _absolute_error(later: list[LagWindow], step_t_s: float, final: float) -> float:
    """Return the integral, each value held over its window; a window without a number takes that of the next one."""
    parts: list[float] = []
    start_s = step_t_s
    for window in later:
        if window.value is not None and math.isfinite(window.value):
            parts.append(abs(window.value - final) * (window.t_s - start_s))
            start_s = window.t_s
    return math.fsum(parts)
