"""How a budget is held: the law, its gain and its safeguards, checked once.

Loop gain is eta times (true slope / assumed slope). With a delay of d whole windows the integral law is stable below
2 sin(pi / (2 (2 d + 1))) and free of overshoot up to d^d / (d + 1)^(d + 1): 1, 0.25, 0.148 and 0.082 at 0, 1, 2 and 4.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

from thermoe.errors import ConfigError

Law = Literal["cascade", "dual"]
LARGEST_GAIN = 0.25


def stability_bound(delay_windows: int) -> float:
    """Return the loop gain from which on the integral law diverges with ``delay_windows`` whole windows of delay."""
    return 2.0 * math.sin(math.pi / (2 * (2 * delay_windows + 1)))


def smooth_gain(delay_windows: int) -> float:
    """Return the largest loop gain without overshoot."""
    return float(delay_windows**delay_windows / (delay_windows + 1) ** (delay_windows + 1))


def _between(value: Any, low: float, high: float) -> bool:
    """Return whether ``value`` is a number above ``low`` and at most ``high``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low < value <= high


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """How a budget is held.

    Attributes:
        law: ``cascade`` moves a cost target, ``dual`` a price.
        delay_windows: whole windows from a decision to the first reading that shows it.
        period_s: nominal length of a window, in seconds.
        eta: loop gain; ``None`` takes the largest without overshoot for the delay, at most 0.25.
        dead_band: largest dead-band, relative to the limit; 0 switches it off.
        slew: largest move by feedback in one window, as a part of the cost range; ``inf`` switches it off.
        refine_slope: follow the measured slope within [0.5, 2] of the modelled one.
        feed_forward: act at once on a change of the limit and on the second reading; off leaves the feedback alone.
        price_max: highest price in nats per joule, for the dual law.
        proportional: weight of the change of the error in the dual law; 0 is textbook dual ascent.
        temp_margin_c: how far below a temperature limit the loop aims.

    Raises:
        ConfigError: a value is outside its range, or the dual law lacks its highest price.
    """

    law: Law = "cascade"
    delay_windows: int = 2
    period_s: float = 2.0
    eta: float | None = None
    dead_band: float = 0.01
    slew: float = 0.1
    refine_slope: bool = True
    feed_forward: bool = True
    price_max: float | None = None
    proportional: float = 0.0
    temp_margin_c: float = 4.0

    def __post_init__(self) -> None:
        delay, most = self.delay_windows, sys.float_info.max
        no_price = self.price_max is None and self.law == "cascade"
        rules: dict[str, tuple[bool, str, str]] = {
            "law": (self.law in ("cascade", "dual"), "'cascade', 'dual'", "'cascade'"),
            "delay_windows": (isinstance(delay, int) and _between(delay, -1, 20), "an integer from 0 to 20", "2"),
            "period_s": (_between(self.period_s, 0, 3600), "seconds above 0, at most 3600", "2.0"),
            "eta": (self.eta is None or _between(self.eta, 0, most), "a finite number above 0, or None", "None"),
            "dead_band": (self.dead_band == 0 or _between(self.dead_band, 0, 0.5), "a number from 0 to 0.5", "0.01"),
            "slew": (_between(self.slew, 0, math.inf), "a number above 0; inf for none", "0.1"),
            "price_max": (
                no_price or _between(self.price_max, 0, most),
                "a finite number of nats per joule above 0, which the dual law needs",
                "the price at which the routing is as cheap as it can be",
            ),
            "proportional": (
                self.proportional == 0 or _between(self.proportional, 0, most),
                "a finite number of at least 0",
                "0",
            ),
            "temp_margin_c": (self.temp_margin_c == 4 or _between(self.temp_margin_c, 4, 50), "4 to 50 K", "4.0"),
        }
        for name, (fits, accepted, usual) in rules.items():
            if not fits:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}", where=f"control.{name}", accepted=accepted, fix=f"use {usual}"
                )

    @property
    def gain(self) -> float:
        """The loop gain for a slope that is right."""
        return self.eta if self.eta is not None else min(LARGEST_GAIN, smooth_gain(self.delay_windows))
