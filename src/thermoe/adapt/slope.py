"""How strongly the measured quantity answers the modelled cost, learned while the loop is closed.

A regression of readings on costs is wrong inside a closed loop: a loop that does its work keeps the reading constant
while the cost moves, and the regression finds no slope at all. So only fast moves count, as differences between the
calm before a move and the calm after it:

    y_after - y_before = beta (C_after - C_before) + noise
    beta = M / I,   I = sum (C_after - C_before)^2 / v,   M = sum (C_after - C_before) (y_after - y_before) / v

with v the variance of the difference; older moves are forgotten by 0.9 for each new one (recursive least squares). A
drift of the plant is slower than a move that counts, and a jump of the reading without a move of the cost starts a new
calm and leaves no more evidence than the prior has, 1 +- 0.5. The slope in use is the mean of prior and evidence,
clamped to [0.5, 2]. The raw estimate and its interval say whether the cost has any authority.
"""

from __future__ import annotations

import math
from typing import Any

PRIOR_INFORMATION = 1.0 / 0.5**2
SLOPE_LOW, SLOPE_HIGH = 0.5, 2.0
#: Weight that a move keeps when the next one is learned, and that evidence keeps in each window of a loop that gave up.
FORGETTING, FADING = 0.9, 0.99
#: A cost that moves less than this part of its range is calm; a move of the second part is worth learning from.
CALM, MOVE = 0.05, 0.2
#: A move ends when the cost is calm for longer than the delay, or so many windows beyond it; a slower one is drift.
SHORT_MOVE, LONG_MOVE = 4, 6
CALM_WINDOWS = 4
#: A jump of the reading by more standard deviations than this is a disturbance of the plant.
DISTURBANCE_SD = 4.5
#: No authority: the 95 % interval of the slope reaches 0 and lies wholly below the first part of the calibrated slope.
#: A loop that gave up because of it comes back when the interval reaches the second.
NEGLIGIBLE, NOTICEABLE = 0.25, 0.5
NOISE_RATE = 0.1
NOISE_FLOOR_REL = 0.002


class SlopeEstimate:
    """Slope of y against C in units in which the cost model claims 1, and the noise of y from window to window.

    Args:
        delay_windows: windows that a reading may lag behind the cost reported with it.
        refine: let ``value`` follow what is learned; otherwise it stays at 1, and only the authority is judged.
        noise_rel_sd: relative standard deviation assumed before enough windows have been seen.
    """

    _FIELDS = (
        *("noise_rel_var", "information", "moment", "calm_cost", "calm_y", "calm_windows"),
        *("before_cost", "before_y", "before_windows", "moving", "still", "last_cost", "last_y"),
    )

    def __init__(self, *, delay_windows: int = 0, refine: bool = True, noise_rel_sd: float = 0.03) -> None:
        self.delay_windows = delay_windows
        self.refine = refine
        self.noise_rel_sd = noise_rel_sd
        self.noise_rel_var: float | None = None
        self.information = self.moment = 0.0
        self.calm_cost = self.calm_y = self.before_cost = self.before_y = self.last_cost = self.last_y = 0.0
        self.calm_windows = self.before_windows = self.moving = self.still = 0

    @property
    def value(self) -> float:
        """The slope to act upon, in [0.5, 2]."""
        if not self.refine:
            return 1.0
        information, moment = self._evidence()
        return min(SLOPE_HIGH, max(SLOPE_LOW, (PRIOR_INFORMATION + moment) / (PRIOR_INFORMATION + information)))

    @property
    def noise_sd(self) -> float:
        """Standard deviation of one reading, in units of y; 0 before the first."""
        return self.last_y * math.sqrt(self.noise_rel_var or 0.0)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the slope from the readings alone; infinite before any move."""
        information, moment = self._evidence()
        if information <= 0:
            return -math.inf, math.inf
        middle, half = moment / information, 1.96 / math.sqrt(information)
        return middle - half, middle + half

    def lacks_authority(self, *, gave_up: bool = False) -> bool:
        """Return whether the readings show that a lower cost does not lower y; ``gave_up``: show nothing better yet."""
        low, high = self.interval()
        return high < NOTICEABLE if gave_up else low <= 0 and high < NEGLIGIBLE

    def fade(self) -> None:
        """Let the evidence fade by one window, so that a loop that gave up tries again in minutes."""
        if self.calm_windows == CALM_WINDOWS:
            self._close_move()
        self._keep(FADING)

    def _keep(self, part: float) -> None:
        self.information *= part
        self.moment *= part

    def interrupt(self) -> None:
        """Note that windows are missing: the next reading starts a new calm."""
        self._close_move()
        self.calm_windows = 0

    def observe(self, cost: float, y: float, span: float) -> None:
        """Learn from one window.

        Args:
            cost: modelled cost of what ran in it.
            y: the measured quantity, above 0.
            span: range that the cost can take, above 0.
        """
        if self.noise_rel_var is None:
            self.noise_rel_var = max(NOISE_FLOOR_REL, self.noise_rel_sd) ** 2
        if self.calm_windows == 0:
            self._start_calm(cost, y)
            return
        still = abs(cost - self.last_cost) <= CALM * span
        disturbed = still and self._learn_noise(cost, y)
        self.still = self.still + 1 if still else 0
        self.last_cost, self.last_y = cost, y
        moved = abs(cost - self.calm_cost)
        if disturbed:
            self._close_move()
            # What changed the reading may have changed the slope.
            self._keep(PRIOR_INFORMATION / max(self.information, PRIOR_INFORMATION))
            self._start_calm(cost, y)
        elif moved <= CALM * span:
            self.moving = 0
            self.calm_windows = min(CALM_WINDOWS, self.calm_windows + 1)
            self.calm_cost += (cost - self.calm_cost) / self.calm_windows
            self.calm_y += (y - self.calm_y) / self.calm_windows
        else:
            self.moving += 1
            ended = self.still > self.delay_windows or self.moving >= SHORT_MOVE + self.delay_windows
            if moved >= MOVE * span and ended:
                self._close_move()
                self.before_cost, self.before_y, self.before_windows = self.calm_cost, self.calm_y, self.calm_windows
                self._start_calm(cost, y)
            elif self.moving >= LONG_MOVE + self.delay_windows:
                self._close_move()
                self._start_calm(cost, y)

    def _learn_noise(self, cost: float, y: float) -> bool:
        """Take the change from the last reading as noise, and return whether it is too large for that."""
        assert self.noise_rel_var is not None
        change = y - self.last_y - self.value * (cost - self.last_cost)
        surprise = (change / max(y, self.last_y)) ** 2 / 2
        disturbed = surprise > DISTURBANCE_SD**2 * self.noise_rel_var
        # One disturbance must not look like noise; noise that has grown looks like disturbances, window by window.
        bounded = min(surprise, (2 if disturbed else 9) * self.noise_rel_var)
        self.noise_rel_var = max(NOISE_FLOOR_REL**2, self.noise_rel_var + NOISE_RATE * (bounded - self.noise_rel_var))
        return disturbed

    def _latest_move(self) -> tuple[float, float]:
        """Return information and moment of the move whose calm after it is still being averaged."""
        if self.before_windows == 0 or self.noise_rel_var is None:
            return 0.0, 0.0
        moved, answered = self.calm_cost - self.before_cost, self.calm_y - self.before_y
        variance = self.before_y**2 / self.before_windows + self.calm_y**2 / self.calm_windows
        variance *= self.noise_rel_var
        return moved**2 / variance, moved * answered / variance

    def _evidence(self) -> tuple[float, float]:
        if self.before_windows == 0:
            return self.information, self.moment
        information, moment = self._latest_move()
        return FORGETTING * self.information + information, FORGETTING * self.moment + moment

    def _close_move(self) -> None:
        self.information, self.moment = self._evidence()
        self.before_windows = 0

    def _start_calm(self, cost: float, y: float) -> None:
        self.calm_cost = self.last_cost = cost
        self.calm_y = self.last_y = y
        self.calm_windows, self.moving, self.still = 1, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned, as plain numbers."""
        return {name: getattr(self, name) for name in self._FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name in self._FIELDS:
            setattr(self, name, state[name])
