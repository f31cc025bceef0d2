"""Which sequences are audited: few as a rule, more for a while when the text has changed. Seeded, host-side, exact.

Shape letters: E experts, k experts per token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from thermoe.errors import CheckpointError, ConfigError

#: After an alarm every so many sequences are audited, until so many tokens have been read.
BURST_EVERY, BURST_TOKENS = 8, 16_000
#: CUSUM: what is taken off each deviation and where the alarm goes off, in standard deviations; and observations first.
SLACK_SD, ALARM_SD, BASELINE = 0.5, 5.0, 8
_SUMS = ("mean", "squares", "above_sd", "below_sd")


def audit_rate(num_experts: int, top_k: float) -> float:
    """Return the share of sequences to audit: 1/64, or what costs 2 % more expert arithmetic if that is less.

    Auditing a share r of the text runs r * (E / k - 1) times the experts of serving it on top.

    Raises:
        ConfigError: not 0 < k <= E.
    """
    number = isinstance(top_k, (int, float)) and not isinstance(top_k, bool)
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not number or not 0 < top_k <= num_experts:
        raise ConfigError(
            f"{top_k!r} of {num_experts!r} experts",
            where="audit_rate",
            accepted="an integer number of experts, and above 0 and at most as many of them per token",
            fix="give audit_rate(layer.experts.num_experts, layer.router.top_k)",
        )
    more = num_experts / top_k - 1
    return 1 / 64 if more == 0 else min(1 / 64, 0.02 / more)


class ShiftAlarm:
    """Two-sided CUSUM on errors: goes off when they stay away from what was usual by more than half a deviation.

    Both ways, because other text may well be easier for a router. The usual is the running mean and deviation of the
    errors seen while both sums are below half of what it takes, so that a shift does not become the usual before it is
    noticed. After an alarm the usual is learned anew.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was usual."""
        self.count, self.mean, self.squares, self.above_sd, self.below_sd = 0, 0.0, 0.0, 0.0, 0.0

    def observe(self, error: float) -> bool:
        """Take in one error, and return whether it sets the alarm off. An error that is not finite is left out."""
        if not math.isfinite(error):
            return False
        if self.count >= BASELINE:
            deviation = max(math.sqrt(self.squares / (self.count - 1)), 1e-3 * abs(self.mean), 1e-12)
            away = (error - self.mean) / deviation
            self.above_sd = max(0.0, self.above_sd + away - SLACK_SD)
            self.below_sd = max(0.0, self.below_sd - away - SLACK_SD)
            if max(self.above_sd, self.below_sd) > ALARM_SD:
                self.reset()
                return True
        if max(self.above_sd, self.below_sd) < ALARM_SD / 2:
            self.count += 1
            before = error - self.mean
            self.mean += before / self.count
            self.squares += before * (error - self.mean)
        return False

    def state_dict(self) -> dict[str, float]:
        """Return what was usual, and the sums."""
        return {"count": self.count, **{name: getattr(self, name) for name in _SUMS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state.

        Raises:
            CheckpointError: it is incomplete; nothing is changed then.
        """
        (count,) = whole_fields(state, ("count",))
        try:
            sums = {name: float(state[name]) for name in _SUMS}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of the alarm cannot be taken up: {error!r}",
                where="ShiftAlarm.load_state_dict",
                accepted="what state_dict returned",
                fix="start afresh, without the state",
            ) from error
        self.count = count
        for name, value in sums.items():
            setattr(self, name, value)


class AuditSchedule:
    """Says of each sequence that is read whether it is audited.

    In every block of ceil(1 / rate) sequences one is, at a place drawn from the seed; in a burst every 8th.

    Args:
        rate: share of sequences, above 0 and at most 1.
        seed: of the places.

    Attributes:
        burst_tokens: tokens left of the burst; a new stream begins with one, for to its reader all of it is new.

    Raises:
        ConfigError: ``rate`` or ``seed`` is outside its range.
    """

    def __init__(self, rate: float, *, seed: int = 0) -> None:
        number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not number or not 0 < rate <= 1:
            raise ConfigError(
                f"the audit rate is {rate!r}",
                where="rate",
                accepted="a share of the sequences, above 0 and at most 1",
                fix="leave it out for what costs at most 2 % more",
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ConfigError(f"seed is {seed!r}", where="seed", accepted="an integer", fix="leave it at 0")
        self.rate, self.seed = float(rate), seed
        self.block = math.ceil(1 / rate)
        self.reset()

    def reset(self) -> None:
        """Begin a new stream."""
        self.sequences, self.in_burst, self.burst_tokens = 0, 0, BURST_TOKENS

    def burst(self) -> None:
        """Audit more for a while: the text may have changed."""
        self.in_burst, self.burst_tokens = 0, BURST_TOKENS

    def most(self, rows: int) -> int:
        """Return how many of the next ``rows`` sequences can be audited at most; a burst may outlast short ones."""
        burst = self.burst_tokens > 0
        return sum(
            self._due(self.sequences + row) or (burst and (self.in_burst + row) % BURST_EVERY == 0)
            for row in range(rows)
        )

    def _due(self, sequence: int) -> bool:
        block, place = divmod(sequence, self.block)
        return place == random.Random(f"{self.seed}/{block}").randrange(self.block)

    def choose(self, tokens: list[int]) -> list[int]:
        """Return which of the sequences just read are audited, given how many tokens each has, and count them."""
        chosen: list[int] = []
        for row, length in enumerate(tokens):
            due = self._due(self.sequences)
            if self.burst_tokens > 0:
                due |= self.in_burst % BURST_EVERY == 0
                self.in_burst += 1
                self.burst_tokens -= length
            self.sequences += 1
            if due and length:
                chosen.append(row)
        return chosen

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream."""
        return {"sequences": self.sequences, "in_burst": self.in_burst, "burst_tokens": self.burst_tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a position.

        Raises:
            CheckpointError: it is incomplete; nothing is changed then.
        """
        self.sequences, self.in_burst, self.burst_tokens = whole_fields(state, tuple(self.state_dict()))


def whole_fields(state: Mapping[str, Any], names: tuple[str, ...]) -> list[int]:
    """Return fields of a saved state that are integers.

    Raises:
        CheckpointError: one is missing or something else.
    """
    try:
        values = [state[name] for name in names]
    except (KeyError, TypeError) as error:
        values = [error]
    if not all(isinstance(value, int) for value in values):
        raise CheckpointError(
            f"the saved state has {values} for {', '.join(names)}",
            where="load_state_dict",
            accepted="integers, as state_dict returned",
            fix="start afresh, without the state",
        )
    return values
