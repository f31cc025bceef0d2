"""What goes into the controller and what comes out of it: plain numbers with their units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from thermoe.errors import ConfigError

ControlState = Literal["OFF", "TRACKING", "INFEASIBLE", "SLACK", "NO_AUTHORITY", "STALE"]
Limit = Literal["j_per_token", "power_w", "temp_c"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlReading:
    """One window of one phase.

    Attributes:
        phase: ``prefill`` or ``decode``.
        t_s: when the window ended, on a monotonic clock.
        window_s: how long it was.
        tokens: tokens of this phase in it.
        j_per_token: measured gross joules per token of this phase; ``None`` when not measured.
        rel_sd: relative standard deviation of it, where the sensor knows.
        power_w: mean power of the whole window, in watts.
        temp_c: hottest device at its end, in degrees Celsius.
        age_s: age of the newest sample when the reading was made.
        status: ``valid``; ``flagged`` (a number with a caveat); ``invalid`` (a number that cannot be true, such as
            after a reset of the counter); ``modelled`` (there is no sensor: the model alone is to be held).
        reason: why it is not ``valid``.
        cost_j: modelled cost of the routing that really ran in the window, in J/token of this phase.
    """

    phase: str
    t_s: float
    window_s: float
    tokens: float
    j_per_token: float | None = None
    rel_sd: float | None = None
    power_w: float | None = None
    temp_c: float | None = None
    age_s: float = 0.0
    status: Literal["valid", "flagged", "invalid", "modelled"] = "valid"
    reason: str | None = None
    cost_j: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRange:
    """What a phase can cost now: modelled J/token at the highest price and at price 0.

    Raises:
        ConfigError: the ends are not finite, not above 0, or the wrong way round.
    """

    low_j: float
    high_j: float

    def __post_init__(self) -> None:
        if not 0 < self.low_j <= self.high_j < math.inf:
            raise ConfigError(
                f"a cost from {self.low_j!r} to {self.high_j!r} J/token",
                where="CostRange",
                accepted="0 < low_j <= high_j, both finite",
                fix="give the modelled cost at the highest price and at price 0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopReport:
    """One limit in one phase.

    Attributes:
        state: its state by itself.
        reason: the same in a sentence.
        limit: what it holds, in joules per token or watts.
        measured: the filtered reading in the same unit; ``None`` before the first.
        cost_target_j: the modelled cost that it asks for, J/token; ``None`` for none, and in the dual law.
        price: nats per joule that it asks for, in the dual law only.
        slope: measured answer as a part of the modelled one, in use.
        gain: loop gain in force.
    """

    state: ControlState
    reason: str
    limit: float
    measured: float | None
    cost_target_j: float | None
    price: float | None
    slope: float
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlOutput:
    """What to do in the next window of a phase, and why.

    Attributes:
        cost_target_j: modelled J/token to stay within; ``None``: run at price 0 (or at ``price`` in the dual law).
        state: the state of the phase.
        reason: the same in a sentence.
        binding: the limit that set the target; ``None`` when none does.
        price: nats per joule, in the dual law only.
        power_cap_w: power cap in force, the user's or the one a temperature limit lowered it to.
        loops: each limit by itself.
    """

    cost_target_j: float | None
    state: ControlState
    reason: str
    binding: Limit | None = None
    price: float | None = None
    power_cap_w: float | None = None
    loops: Mapping[Limit, LoopReport] = field(default_factory=dict)
