"""What the routing leaves to learning: joules that were spent on it are paid back by the tokens served after it.

Learning comes in bursts, and a budget is a mean. So what an update cost is a debt, and each later step pays a part of
it: the target of the routing is lowered by

    levy = debt / (HORIZON_STEPS * mean tokens of a step)         in J/token

With learning at a steady rate the levy becomes that rate; after one burst the debt fades over some 32 steps. What was
paid beyond the debt is kept as a credit for what comes. Before anything was learned the levy is exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thermoe.adapt.budget import PHASES, Phase

#: Steps over which a debt is paid back.
HORIZON_STEPS = 32


class LearningLevy:
    """The debt of each phase, in modelled joules."""

    def __init__(self) -> None:
        self._debt_j: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._tokens: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._steps: dict[Phase, int] = dict.fromkeys(PHASES, 0)

    def note(self, phase: Phase, tokens: int, learning_j: float, levied_j: float) -> None:
        """Note a step in which a phase served ``tokens``.

        Args:
            phase: of the work.
            tokens: above 0.
            learning_j: joules of learning that fall on these tokens.
            levied_j: J/token that their routing had left to learning.
        """
        self._debt_j[phase] += learning_j - levied_j * tokens
        self._steps[phase] += 1
        self._tokens[phase] += (tokens - self._tokens[phase]) / min(self._steps[phase], HORIZON_STEPS)

    def of(self, phase: Phase) -> float:
        """Return what a phase has to leave to learning now, in J/token."""
        if self._debt_j[phase] <= 0:
            return 0.0
        return self._debt_j[phase] / (HORIZON_STEPS * self._tokens[phase])

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"debt_j": dict(self._debt_j), "tokens": dict(self._tokens), "steps": dict(self._steps)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LearningLevy:
        """Build what `state_dict` returned; an error of its own for a damaged one is left to the caller."""
        levy = cls()
        levy._debt_j = {phase: float(state["debt_j"][phase]) for phase in PHASES}
        levy._tokens = {phase: float(state["tokens"][phase]) for phase in PHASES}
        levy._steps = {phase: int(state["steps"][phase]) for phase in PHASES}
        return levy
