"""How strongly the measured quantity answers the modelled cost, learned while the loop is closed.

A regression of readings on costs is wrong inside a closed loop: a loop that does its work keeps the reading constant
while the cost moves, and the regression finds no slope at all. So only fast moves count, as differences:

    y - y_anchor = beta (C - C_anchor) + noise         information I = sum (C - C_anchor)^2 / var(y - y_anchor)

where the anchor is the calm before the move and the move takes a few windows; a drift of the plant is slower than that,
and a jump of the reading without a move of the cost sets a new anchor. The slope in use adds a prior of 1 +- 0.5 and is
clamped to [0.5, 2]; older moves are forgotten by 0.9 for each new one. The raw estimate and its interval say whether
the cost has any authority. (Recursive least squares with forgetting; the differences are what a closed loop requires.)
"""

from __future__ import annotations

import math
from typing import Any

PRIOR_INFORMATION = 1.0 / 0.5**2
SLOPE_LOW, SLOPE_HIGH = 0.5, 2.0
#: Weight that a move keeps when the next one is learned, and evidence keeps in each window while it is acted upon.
FORGETTING, FADING = 0.9, 0.995
#: A cost that moves less than this part of its range is calm; a move of the second part is worth learning from.
CALM, MOVE = 0.05, 0.2
#: A move ends when the cost is calm again, or after so many windows.
SHORT_MOVE, LONG_MOVE = 4, 6
ANCHOR_WINDOWS = 4
#: A jump of the reading by more standard deviations than this is a disturbance of the plant.
DISTURBANCE_SD = 4.5
#: Weight that evidence keeps then: what changed the reading may have changed the slope.
AFTER_DISTURBANCE = 0.1
#: No authority: the 95 % interval of the slope reaches 0 and lies wholly below this part of the calibrated slope.
NEGLIGIBLE = 0.25
NOISE_RATE = 0.1
NOISE_FLOOR_REL = 0.002


class SlopeEstimate:
    """Slope of y against C in units in which the cost model claims 1, and the noise of y from window to window.

    Args:
        refine: let ``value`` follow what is learned; otherwise it stays at 1, and only the authority is judged.
        noise_rel_sd: relative standard deviation assumed before enough windows have been seen.
    """

    _FIELDS = (
        *("noise_rel_var", "information", "moment", "anchor_cost", "anchor_y", "anchor_windows", "moving"),
        *("last_cost", "last_y"),
    )

    def __init__(self, *, refine: bool = True, noise_rel_sd: float = 0.03) -> None:
        self.refine = refine
        self.noise_rel_sd = noise_rel_sd
        self.noise_rel_var: float | None = None
        self.information = self.moment = 0.0
        self.anchor_cost = self.anchor_y = self.last_cost = self.last_y = 0.0
        self.anchor_windows = self.moving = 0

    @property
    def value(self) -> float:
        """The slope to act upon, in [0.5, 2]."""
        if not self.refine:
            return 1.0
        blend = (PRIOR_INFORMATION + self.moment) / (PRIOR_INFORMATION + self.information)
        return min(SLOPE_HIGH, max(SLOPE_LOW, blend))

    @property
    def noise_sd(self) -> float:
        """Standard deviation of one reading, in units of y; 0 before the first."""
        return self.last_y * math.sqrt(self.noise_rel_var or 0.0)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the slope from the readings alone; infinite before any move."""
        if self.information <= 0:
            return -math.inf, math.inf
        middle, half = self.moment / self.information, 1.96 / math.sqrt(self.information)
        return middle - half, middle + half

    def lacks_authority(self) -> bool:
        """Return whether the readings show that a lower cost does not lower y."""
        low, high = self.interval()
        return low <= 0 and high < NEGLIGIBLE

    def fade(self) -> None:
        """Let the evidence fade by one window, so that a loop that gave up tries again some day."""
        self._doubt(FADING)

    def _doubt(self, kept: float) -> None:
        self.information *= kept
        self.moment *= kept

    def interrupt(self) -> None:
        """Note that windows are missing: the next reading starts a new anchor."""
        self.anchor_windows = self.moving = 0

    def observe(self, cost: float, y: float, span: float) -> None:
        """Learn from one window.

        Args:
            cost: modelled cost of what ran in it.
            y: the measured quantity.
            span: range that the cost can take, above 0.
        """
        if self.noise_rel_var is None:
            self.noise_rel_var = max(NOISE_FLOOR_REL, self.noise_rel_sd) ** 2
        if self.anchor_windows == 0:
            self._anchor(cost, y)
            return
        calm = abs(cost - self.last_cost) <= CALM * span
        disturbed = False
        if calm:
            surprise = ((y - self.last_y - self.value * (cost - self.last_cost)) / max(y, self.last_y)) ** 2 / 2
            disturbed = surprise > DISTURBANCE_SD**2 * self.noise_rel_var
            # One disturbance must not look like noise; noise that has grown looks like disturbances, window by window.
            bounded = min(surprise, (2 if disturbed else 9) * self.noise_rel_var)
            self.noise_rel_var = max(
                NOISE_FLOOR_REL**2, self.noise_rel_var + NOISE_RATE * (bounded - self.noise_rel_var)
            )
        self.last_cost, self.last_y = cost, y
        moved = cost - self.anchor_cost
        if disturbed:
            self._doubt(AFTER_DISTURBANCE)
            self._anchor(cost, y)
        elif abs(moved) <= CALM * span:
            self.moving = 0
            self.anchor_windows = min(ANCHOR_WINDOWS, self.anchor_windows + 1)
            self.anchor_cost += (cost - self.anchor_cost) / self.anchor_windows
            self.anchor_y += (y - self.anchor_y) / self.anchor_windows
        else:
            self.moving += 1
            far = abs(moved) >= MOVE * span
            if far and ((calm and self.moving > 1) or self.moving >= SHORT_MOVE):
                self._learn(moved, y - self.anchor_y)
                self._anchor(cost, y)
            elif self.moving >= LONG_MOVE:
                self._anchor(cost, y)

    def _learn(self, moved: float, answered: float) -> None:
        assert self.noise_rel_var is not None
        variance = self.noise_rel_var * (self.last_y**2 + self.anchor_y**2 / self.anchor_windows)
        self.information = FORGETTING * self.information + moved**2 / variance
        self.moment = FORGETTING * self.moment + moved * answered / variance

    def _anchor(self, cost: float, y: float) -> None:
        self.anchor_cost = self.last_cost = cost
        self.anchor_y = self.last_y = y
        self.anchor_windows, self.moving = 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned, as plain numbers."""
        return {name: getattr(self, name) for name in self._FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name in self._FIELDS:
            setattr(self, name, state[name])
