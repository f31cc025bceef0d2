"""What the routing leaves to learning: joules that were spent on it are paid back by the tokens served after it.

Learning comes in bursts, and a budget is a mean. So what an update cost is a debt, and each later step pays a part of
it: the target of the routing is lowered by

    levy of a phase = debt / (HORIZON_STEPS * mean joules served in a step) * (joules per token of the phase)

in J/token. With learning at a steady rate the levy becomes that rate; after one burst the debt fades over some 32
steps. All phases that are limited pay for what falls on any of them, as they share the joules of a sensor's window:
tokens generated after a prompt pay for what was learned from it. What was paid beyond the debt is a credit for what
comes. Before anything was learned the levy is exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thermoe.adapt.budget import PHASES, Phase

#: Steps over which a debt is paid back.
HORIZON_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedStep:
    """What a step served in one phase.

    Args:
        tokens: above 0.
        served_j: modelled joules of its forwards.
        learning_j: modelled joules of learning that fall on its tokens.
        levied_j: J/token that its routing left to learning.
    """

    tokens: int
    served_j: float
    learning_j: float
    levied_j: float


class LearningLevy:
    """The debt of the phases that a budget limits, in modelled joules."""

    def __init__(self) -> None:
        self._debt_j = 0.0
        self._served_j = 0.0
        self._steps = 0
        self._token_j: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    def note(self, parts: Mapping[Phase, ServedStep]) -> None:
        """Note a step: what it served in each phase that is limited; one that served nothing there changes nothing."""
        if not parts:
            return
        self._debt_j += sum(part.learning_j - part.levied_j * part.tokens for part in parts.values())
        self._steps += 1
        rate = 1 / min(self._steps, HORIZON_STEPS)
        self._served_j += rate * (sum(part.served_j for part in parts.values()) - self._served_j)
        for phase, part in parts.items():
            self._token_j[phase] = part.served_j / part.tokens

    def of(self, phase: Phase) -> float:
        """Return what a phase has to leave to learning now, in J/token."""
        if self._debt_j <= 0 or self._served_j <= 0:
            return 0.0
        return self._debt_j / (HORIZON_STEPS * self._served_j) * self._token_j[phase]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "debt_j": self._debt_j,
            "served_j": self._served_j,
            "steps": self._steps,
            "token_j": dict(self._token_j),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LearningLevy:
        """Build what `state_dict` returned; an error of its own for a damaged one is left to the caller."""
        levy = cls()
        levy._debt_j, levy._served_j = float(state["debt_j"]), float(state["served_j"])
        levy._steps = int(state["steps"])
        levy._token_j = {phase: float(state["token_j"][phase]) for phase in PHASES}
        return levy
