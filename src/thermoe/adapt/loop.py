"""One limit held by one integrator: a target for the modelled cost, or a price when textbook dual ascent is asked for.

The plant is taken as y = alpha + beta C with C the modelled cost and y what is measured, in units in which beta is
about 1. After each window with error eps = y - limit the cascade moves its target, and dual ascent its price:

    C* <- clip(C* - eta eps / beta, C_min, C_max)
    lambda <- clip(lambda + eta_l (eps + k_p d eps), 0, lambda_max)

Turning C* into a price by the inverse of the modelled cost makes the first a Newton-preconditioned form of the second.
A change of the limit moves C* at once by its modelled effect; readings that cannot show it yet are corrected for it.
Dual ascent on a budget: arXiv 1111.6082, 2202.06152; the proportional part damps it (2007.03964).
"""

from __future__ import annotations

import math
from typing import Any

from thermoe.adapt.control_settings import ControlSettings
from thermoe.adapt.slope import CALM, SlopeEstimate

#: Weight of a window in the filtered error.
FILTER_RATE = 0.25
#: Noise above 3 % of the limit halves the gain. An estimate from some 20 windows has to exceed it by its own error.
NOISY_REL = 0.04
#: The reading, from a start or from the end of a long stay at a bound, that is answered by a full step; an integrator
#: would only creep there. The very first may hold warm-up, so it is the second.
FULL_STEP_READING = 2
#: Beyond the delay, windows at the end of its range after which a target is there for good.
PARKED_WINDOWS = 2
#: A full step is worth it beyond this part of the limit; below, it would only follow noise.
FULL_STEP_REL = 0.05
#: A loop that does not bind waits at most this part of the range above the one that does.
HEADROOM = 0.1
#: A target this near to the end of its range, in parts of it, is there: the end itself moves with the rows it is from.
AT_END = 0.01
#: A range narrower than this part of its top leaves nothing to choose.
NO_RANGE_REL = 1e-3


class Loop:
    """The integrator of one limit in one phase.

    Args:
        settings: how it moves.
        limit: what y may be, in units in which y answers the cost with a slope of about 1.
        scale: the size of that unit, for people: ``y * scale`` is in joules per token or watts.
        starts_at_limit: whether the model predicts y = C, so that the limit itself is the first target.
    """

    _FIELDS = (
        *("limit", "scale", "target", "price", "low", "high", "error", "last_error", "readings", "at_bound"),
        *("jump", "jump_windows", "active", "bad_since_s", "stale", "good_windows", "trouble", "gave_up"),
    )

    def __init__(self, settings: ControlSettings, limit: float, *, scale: float = 1.0, starts_at_limit: bool) -> None:
        self.settings = settings
        self.limit, self.scale = limit, scale
        self.starts_at_limit = starts_at_limit
        self.slope = SlopeEstimate(delay_windows=settings.delay_windows, refine=settings.refine_slope)
        self.target: float | None = None
        self.price = 0.0
        self.low = self.high = 0.0
        self.error = self.last_error = 0.0
        self.readings = 0
        #: For how many windows the limit has lain beyond the floor, or, counted downwards, beyond the ceiling.
        self.at_bound = 0
        self.jump = 0.0
        self.jump_windows = 0
        #: Whether the target was inside its range and the tightest when it was last applied; the controller says so.
        self.active = False
        self.bad_since_s: float | None = None
        self.stale = False
        self.good_windows = 0
        self.trouble: str | None = None
        self.gave_up = False

    @property
    def band(self) -> float:
        """The dead-band in force, in units of y: 2 standard deviations of the filtered error, at most its limit."""
        sd = self.slope.noise_sd * math.sqrt(FILTER_RATE / (2 - FILTER_RATE))
        return min(2 * sd, self.settings.dead_band * self.limit)

    @property
    def gain(self) -> float:
        """The loop gain in force."""
        noisy = self.slope.noise_sd > NOISY_REL * (self.limit + max(0.0, self.error))
        return self.settings.gain / 2 if noisy and self.settings.eta is None else self.settings.gain

    @property
    def measured(self) -> float | None:
        """The filtered reading in its own unit, ``None`` before the first."""
        return (self.limit + self.error) * self.scale if self.readings else None

    @property
    def asked(self) -> float | None:
        """The target inside the range that the cost has now."""
        return None if self.target is None else min(self.high, max(self.low, self.target))

    def see_range(self, low: float, high: float) -> None:
        """Take the range that the cost has now; the first call sets the first target.

        A target that has been at the end of its range for long says only that the limit lies beyond; when the end moves
        away, it goes where the readings put the limit. Any other stays, so that a range may narrow for a while.
        """
        end, was = (low, self.low) if self.at_bound > 0 else (high, self.high)
        moved = self.parked and abs(end - was) > CALM * (high - low)
        self.low, self.high = low, high
        if self.target is None:
            self.target = self.limit if self.starts_at_limit and self.settings.feed_forward else high
        elif moved and self.settings.feed_forward:
            self._jump(self.slope.last_cost - self.error / self.slope.value - self.target)

    def set_limit(self, limit: float) -> None:
        """Change the limit; a cost target moves with it at once."""
        if limit == self.limit:
            return
        reading = self.limit + self.error
        held, self.limit, executed = self.limit, limit, 0.0
        if self.target is not None and self.settings.feed_forward and not self.gave_up:
            # A loop at the end of its range, or waiting above another, is not where its old limit would have put it.
            start = held if self.active or not self.readings else reading
            executed = self._jump((limit - start) / self.slope.value)
        if self.readings:
            self.error = reading + self.slope.value * executed - limit
        if self.at_bound * self.error <= 0:
            self.at_bound = 0

    def _jump(self, move: float) -> float:
        """Move the target by ``move`` as far as the range allows; return how far."""
        assert self.target is not None
        before = self.target
        self.target = min(self.high, max(self.low, before + move))
        pending = self.jump if self.jump_windows else 0.0
        self.jump = pending + self.target - before
        self.jump_windows = self.settings.delay_windows + 2
        return self.target - before

    def _not_shown_yet(self, cost: float) -> float:
        """Return the part of the latest jumps that the window, with its ``cost``, did not run with."""
        if not self.jump_windows or self.target is None:
            return 0.0
        self.jump_windows -= 1
        behind = self.target - cost
        return min(max(behind, 0.0), self.jump) if self.jump > 0 else max(min(behind, 0.0), self.jump)

    def update(self, y: float, cost: float, low: float, high: float) -> None:
        """Take one good window: ``y`` measured, ``cost`` modelled for what ran, and the range of the cost now."""
        self.see_range(low, high)
        self.target = self.asked
        assert self.target is not None
        span = high - low
        if span <= NO_RANGE_REL * high:
            self.error, self.readings, self.price = y - self.limit, 0, 0.0
            self.slope.interrupt()
            return
        self.slope.observe(cost, y, span)
        if self.gave_up:
            self.slope.fade()
        self.readings += 1
        error = y - self.limit + self.slope.value * self._not_shown_yet(cost)
        away = -error if self.at_bound > 0 else error
        if self.parked and away > FULL_STEP_REL * self.limit:
            self.readings = 1
        self.error = error if self.readings == 1 else self.error + FILTER_RATE * (error - self.error)
        # Only a loop that has gone as far as it can and is still above its limit asks whether going there helps at all;
        # a drift as fast as the moves that answer it can hide their effect, but does not lead there.
        stuck = self.at_floor and self.error > 0
        lacking = (self.gave_up or stuck) and self.slope.lacks_authority(gave_up=self.gave_up)
        if lacking:
            self.target, self.price, self.readings, self.jump_windows = high, 0.0, 1, 0
        elif self.settings.law == "dual":
            self._ascend(error, span)
        else:
            self._move(error, y, cost, span)
        self.gave_up, self.last_error = lacking, error
        if self.error > 0:
            self.at_bound = max(0, self.at_bound) + 1 if self.at_floor else 0
        else:
            self.at_bound = min(0, self.at_bound) - 1 if self.at_ceiling else 0

    def _move(self, error: float, y: float, cost: float, span: float) -> None:
        assert self.target is not None
        off = y - self.limit
        full = self.readings == FULL_STEP_READING and self.settings.feed_forward
        if full and abs(off) > FULL_STEP_REL * self.limit:
            self._jump(cost - off / self.slope.value - self.target)
            self.error = 0.0
        elif abs(self.error) > self.band:
            most = self.settings.slew * span
            step = min(most, max(-most, -self.gain * error / self.slope.value))
            self.target = min(self.high, max(self.low, self.target + step))

    def _ascend(self, error: float, span: float) -> None:
        # With this step the loop gain is that of the cascade if the cost falls linearly from price 0 to the highest.
        assert self.settings.price_max is not None
        step = self.gain * self.settings.price_max / span
        change = error - self.last_error if self.readings > 1 else 0.0
        self.price += step * (error + self.settings.proportional * change)
        self.price = min(self.settings.price_max, max(0.0, self.price))

    @property
    def at_floor(self) -> bool:
        """Whether nothing cheaper is left to ask for."""
        if self.settings.law == "dual":
            return self.price == self.settings.price_max
        return self.asked is not None and self.asked - self.low <= AT_END * (self.high - self.low)

    @property
    def at_ceiling(self) -> bool:
        """Whether nothing is asked for."""
        return self.price == 0.0 if self.settings.law == "dual" else self.asked == self.high

    @property
    def parked(self) -> bool:
        """Whether the target has been at the end of its range, with the readings beyond it, for long."""
        return abs(self.at_bound) > self.settings.delay_windows + PARKED_WINDOWS

    def wait_above(self, applied: float) -> None:
        """Hold a target that does not bind close above the one that does, so that it does not wind up."""
        if self.target is not None:
            self.target = min(self.target, applied + HEADROOM * (self.high - self.low))

    def admit(self, t_s: float, window_s: float, trouble: str | None, *, corrupt: bool) -> bool:
        """Return whether a window may move the loop, and keep the account of windows that may not.

        Args:
            t_s: when the window ended.
            window_s: how long it was.
            trouble: why its reading cannot be used; ``None`` for a good one.
            corrupt: whether the reading is wrong rather than missing: stale at once.
        """
        if trouble is None:
            self.good_windows += 1
            if self.stale and self.good_windows < 2:
                self.trouble = "one good window; the next one moves the loop again"
                return False
            self.bad_since_s, self.stale, self.trouble = None, False, None
            return True
        self.good_windows = 0
        self.trouble = trouble
        self.slope.interrupt()
        if self.bad_since_s is None:
            self.bad_since_s = t_s - window_s
        # The tolerance keeps three windows of the nominal length from counting as less for rounding.
        if corrupt or t_s - self.bad_since_s >= (3 - 1e-6) * self.settings.period_s:
            self.stale = True
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {name: getattr(self, name) for name in self._FIELDS} | {"slope": self.slope.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self.slope.load_state_dict(state["slope"])
