"""How much learning may cost, and how often it is worth it.

The bucket earns a share of the joules that are served and pays for updates, judges, shadows and audits; it holds one
update's worth, so that the joules of learning never exceed

    frac * (joules served) + (one update)

and the first update may come at once. `Cadence` lets updates become rarer where they stop paying.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from thermoe.errors import CheckpointError, ConfigError

#: Judged updates that are looked at together, and how sure one has to be that they gained something (one-sided 95 %).
GAIN_WINDOW, SURE = 8, 1.64
MOST_INTERVAL = 32
#: A batch is a shift when its loss is this many deviations above what was usual, after so many batches.
SHIFT_SD, SHIFT_AFTER = 4.0, 8


class LearningBucket:
    """A bucket of joules for learning.

    Args:
        frac: share of the served joules that learning may cost, from 0 to 1; ``None`` is no cap.

    Attributes:
        earns_scoring: whether the forwards with which the adapter scores earn here by themselves; false where somebody
            else counts every served forward and calls `earn`.
        level_j: joules at hand; ``None`` before the first update was asked for, which may come at once.
        capacity_j: what the bucket holds, the dearest update that was asked for; ``None`` likewise.

    Raises:
        ConfigError: ``frac`` is no number from 0 to 1.
    """

    def __init__(self, frac: float | None = 0.05) -> None:
        number = isinstance(frac, (int, float)) and not isinstance(frac, bool)
        if frac is not None and not (number and 0 <= frac <= 1):
            raise ConfigError(
                f"the bucket is {frac!r}",
                where="adapt.bucket",
                accepted="the share of the served joules that learning may cost, from 0 to 1; or None for no cap",
                fix="leave it at 0.05",
            )
        self.frac = frac
        self.earns_scoring = True
        self.level_j: float | None = None
        self.capacity_j: float | None = None
        self.served_j = 0.0
        self.spent_j = 0.0

    def earn(self, energy_j: float) -> None:
        """Add the share of joules that were served.

        Raises:
            ConfigError: they are no finite number of at least 0.
        """
        number = isinstance(energy_j, (int, float)) and not isinstance(energy_j, bool)
        if not number or not 0 <= energy_j < math.inf:
            raise ConfigError(
                f"{energy_j!r} J were served",
                where="bucket.earn(energy_j)",
                accepted="a finite number of joules, at least 0",
                fix="leave the call out where the joules are not known",
            )
        self.served_j += energy_j
        if self.frac is not None and self.level_j is not None and self.capacity_j is not None:
            self.level_j = max(self.level_j, min(self.capacity_j, self.level_j + self.frac * energy_j))

    def allows(self, most_j: float) -> bool:
        """Return whether work that costs at most so much may be done now."""
        if self.frac is None:
            return True
        if self.frac == 0:
            return False
        if self.level_j is None:
            self.level_j = self.capacity_j = most_j
        assert self.capacity_j is not None
        self.capacity_j = max(self.capacity_j, most_j)
        return self.level_j >= most_j

    def spend(self, energy_j: float) -> None:
        """Take joules out; more than there are is a debt, which has to be earned first."""
        self.spent_j += energy_j
        if self.level_j is not None:
            self.level_j -= energy_j

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: getattr(self, name) for name in ("level_j", "capacity_j", "served_j", "spent_j")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            CheckpointError: it is incomplete; nothing is changed then.
        """
        try:
            found = {name: state[name] for name in self.state_dict()}
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"the state of the bucket lacks {error}",
                where="LearningBucket.load_state_dict",
                accepted="what state_dict returned",
                fix="start afresh, without the state",
            ) from error
        for name, value in found.items():
            setattr(self, name, None if value is None else float(value))


@dataclass(slots=True)
class Cadence:
    """How many batches lie between two updates: more where updates do not pay, fewer where the text changes.

    A judged update gains (nats saved per token) * (tokens served since the last verdict), 0 if it was rejected. Where
    the mean of the last eight gains is not above 0 by 1.64 standard errors, or their nats per joule are below
    ``min_gain_per_j``, the interval doubles, up to 32; where it is, and where a loss jumps, it halves. The relative
    rule is the default because nats and joules have no exchange rate of their own: what cannot be told from nothing
    is worth no joule at any rate.

    Attributes:
        min_gain_per_j: least gain, in nats per joule of learning, or ``None`` for the relative rule alone.
        interval: batches from one update to the next.
        gain_per_j: exponentially averaged nats per joule; ``None`` before the first verdict.
        reason: why the interval is what it is.
    """

    min_gain_per_j: float | None = None
    interval: int = 1
    gain_per_j: float | None = None
    reason: str = "updates are made at every batch"
    gains: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=GAIN_WINDOW))
    scores: int = 0
    mean_nll: float = 0.0
    var_nll: float = 0.0

    def note_verdict(self, gain: float, energy_j: float) -> None:
        """Note what a judged update gained, in nats, and what learning cost since the verdict before."""
        if energy_j > 0:
            rate = gain / energy_j
            self.gain_per_j = rate if self.gain_per_j is None else 0.9 * self.gain_per_j + 0.1 * rate
        self.gains.append((gain, energy_j))
        if len(self.gains) < GAIN_WINDOW:
            return
        values = [value for value, _ in self.gains]
        mean = sum(values) / GAIN_WINDOW
        se = math.sqrt(sum((v - mean) ** 2 for v in values) / (GAIN_WINDOW - 1) / GAIN_WINDOW)
        cost_j = sum(energy for _, energy in self.gains)
        if not mean > SURE * se:
            self._set(2 * self.interval, f"the last {GAIN_WINDOW} judged updates cannot be told from no gain")
        elif self.min_gain_per_j is not None and sum(values) < self.min_gain_per_j * cost_j:
            self._set(2 * self.interval, f"updates gain less than {self.min_gain_per_j:g} nats per joule")
        elif self.interval > 1:
            self._set(self.interval // 2, "updates pay again")

    def note_score(self, nll: float) -> bool:
        """Note the mean nats per token of a batch, and return whether the text changed: the loss jumped, up or down."""
        noise = max(math.sqrt(self.var_nll), 1e-3 * abs(self.mean_nll))
        if self.scores >= SHIFT_AFTER and abs(nll - self.mean_nll) > SHIFT_SD * noise:
            self.scores, self.mean_nll, self.var_nll = 1, nll, 0.0
            self.note_shift("the loss of the text jumped")
            return True
        self.scores += 1
        rate = max(0.05, 1 / self.scores)
        away = nll - self.mean_nll
        self.mean_nll += rate * away
        self.var_nll = (1 - rate) * (self.var_nll + rate * away * away)
        return False

    def note_shift(self, why: str) -> None:
        """Update more often again."""
        if self.interval > 1:
            self._set(self.interval // 2, why)
        self.gains.clear()

    def _set(self, interval: int, why: str) -> None:
        self.interval = max(1, min(MOST_INTERVAL, interval))
        self.reason = (
            f"updates are made at every {self.interval}th batch: {why}"
            if self.interval > 1
            else (f"updates are made at every batch: {why}")
        )
        self.gains.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        names = ("interval", "gain_per_j", "reason", "scores", "mean_nll", "var_nll")
        return {"gains": [list(pair) for pair in self.gains], **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], min_gain_per_j: float | None) -> Cadence:
        """Build what `state_dict` returned."""
        plain = dict(state)
        gains = deque([(float(gain), float(cost)) for gain, cost in plain.pop("gains")], maxlen=GAIN_WINDOW)
        return cls(min_gain_per_j=min_gain_per_j, gains=gains, **plain)
