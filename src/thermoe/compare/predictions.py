"""When a prediction holds: the whole interval of what was found lies where it was predicted to lie; and its words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thermoe.convergence import mean_interval

RELATIONS = ("below", "above", "near")
#: How a verdict begins.
SAID = {True: "As predicted", False: "Not as predicted", None: "Left open"}


def bound_words(relation: str, margin: float, against: str) -> str:
    """Return a prediction's condition in words, such as `below switch plus 0.1`."""
    if relation == "near":
        return f"within {margin:g} of {against}"
    return f"{relation} {against}" + (f" plus {margin:g}" if margin else "")


def estimate(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return mean and 95 % t interval over seeds; unknown where a seed's value is."""
    known = [float(value) for value in values if value is not None]
    if len(known) < len(values):
        return {"value": None, "lo": None, "hi": None}
    return dict(zip(("value", "lo", "hi"), mean_interval(known), strict=True))


def holds(relation: str, margin: float, target: float, low: float, high: float) -> bool | None:
    """Return whether the whole of low..high is on the predicted side, on the other (false), or on both (``None``).

    Args:
        relation: below, above or near.
        margin: of `near`: the largest distance; else what is added to the target.
        target: what is compared with.
        low: lower end of the interval.
        high: upper end.
    """
    if not (math.isfinite(low) and math.isfinite(high)):  # something diverged
        return False
    if relation == "near":
        inside = (target - margin, target + margin)
        if inside[0] <= low and high <= inside[1]:
            return True
        return False if high < inside[0] or low > inside[1] else None
    target += margin
    above = True if low > target else False if high < target else None
    if above is None:
        return None
    return above if relation == "above" else not above
