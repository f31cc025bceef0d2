"""What state a control loop is in, and the sentence for people that goes with it."""

from __future__ import annotations

from thermoe.adapt.loop import NO_RANGE_REL, Loop
from thermoe.adapt.readings import ControlState, Limit
from thermoe.adapt.slope import NEGLIGIBLE

_UNITS: dict[Limit, str] = {"j_per_token": "J/token", "power_w": "W", "temp_c": "W"}


def _amount(value: float, unit: str) -> str:
    return f"{value:.4g} {unit}"


def judge(loop: Loop, name: Limit, phase: str, *, modelled: bool) -> tuple[ControlState, str]:
    """Return the state of a loop that has seen the range of the cost, and the reason."""
    unit = _UNITS[name]
    limit, measured = _amount(loop.limit * loop.scale, unit), loop.measured
    if name == "temp_c":
        limit = f"{limit}, which the temperature allows,"
    if loop.high - loop.low <= NO_RANGE_REL * loop.high:
        return "NO_AUTHORITY", f"the routing at {phase} has only one cost, so that no price can change it"
    if modelled:
        if loop.limit < loop.low:
            floor = _amount(loop.low * loop.scale, unit)
            return "INFEASIBLE", f"no sensor; the cheapest routing at {phase} is modelled at {floor}, above {limit}"
        if loop.limit >= loop.high:
            return "SLACK", f"no sensor; {limit} is above the modelled joules of {phase} at price 0"
        return "TRACKING", f"no sensor: {limit} at {phase} is held against the modelled joules (feed-forward only)"
    if loop.stale:
        return "STALE", f"{loop.trouble}; the last target at {phase} is held"
    if loop.gave_up:
        low, high = loop.slope.interval()
        fact = "raises" if high < -NEGLIGIBLE else "does not change"
        slope = f"slope {low:.2f} to {high:.2f} of the modelled one"
        return "NO_AUTHORITY", f"a lower modelled cost {fact} what is measured at {phase} ({slope})"
    if measured is None:
        waits = f": {loop.trouble}" if loop.trouble else " for the first window"
        return "TRACKING", f"{limit} at {phase} is held by the model alone, waiting{waits}"
    seen = _amount(measured, unit)
    if loop.parked and loop.at_floor and loop.error > loop.band:
        return "INFEASIBLE", f"the cheapest allowed routing at {phase} measures {seen}, above {limit}; it is held"
    if loop.at_ceiling and loop.error <= 0:
        return "SLACK", f"{limit} at {phase} does not bind: {seen} at price 0"
    held = f" (held: {loop.trouble})" if loop.trouble else ""
    return "TRACKING", f"{limit} at {phase}, measured {seen}{held}"
