"""What a session has learned and what that took, added up, and on which tokens its joules fall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.learning_work import LearningWork
from thermoe.adapt.steps import ForwardCount
from thermoe.adapt.windows import ClosedWindow
from thermoe.results import Provenance, weakest_provenance


@dataclass(slots=True)
class LearningTally:
    """Sums of what was learned.

    Attributes:
        energy_j: modelled joules.
        pending_j: the part of them that waits for tokens to fall on.
        duration_s: seconds.
        attributed_j: joules of the sensor's windows times the share of their time in which something was learned; over
            the windows that have a figure, ``None`` before the first.
        provenance: weakest label of these windows.
        counts: pieces of work by kind.
        verdicts: updates by what became of them.
    """

    energy_j: float = 0.0
    pending_j: float = 0.0
    duration_s: float = 0.0
    attributed_j: float | None = None
    provenance: Provenance | None = None
    counts: dict[str, int] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)

    def add(self, works: Iterable[LearningWork], counts: Mapping[str, int], verdicts: Mapping[str, int]) -> None:
        """Add work, and how many pieces and verdicts of each kind that is."""
        for work in works:
            self.energy_j += work.energy_j
            self.pending_j += work.energy_j
            self.duration_s += work.duration_s
        self.counts = dict(Counter(self.counts) + Counter(counts))
        self.verdicts = dict(Counter(self.verdicts) + Counter(verdicts))

    def fall_on(self, counts: Iterable[ForwardCount]) -> dict[Phase, float]:
        """Return the waiting joules by phase, in proportion to the modelled joules that the phases were served with.

        That is how the joules of a sensor are split too. Without a served token they go on waiting.
        """
        served = dict.fromkeys(PHASES, 0.0)
        for count in counts:
            if count.tokens:
                served[count.phase] += count.energy_j
        whole = sum(served.values())
        if whole <= 0:
            return dict.fromkeys(PHASES, 0.0)
        falling, self.pending_j = self.pending_j, 0.0
        return {phase: falling * part / whole for phase, part in served.items()}

    def note_window(self, closed: ClosedWindow) -> None:
        """Add the joules that a window of the sensor attributes to learning."""
        if closed.attributed_j is not None:
            self.attributed_j = (self.attributed_j or 0.0) + closed.attributed_j
            label = closed.window.provenance
            self.provenance = weakest_provenance([label, self.provenance or label])

    def metrics(self, step_j: float, served_j: float) -> dict[str, Any]:
        """Return plain numbers.

        Args:
            step_j: modelled joules of learning that fell on the tokens of the step.
            served_j: modelled joules of everything served so far.
        """
        whole_j = served_j + self.energy_j
        attributed = self.counts and self.attributed_j is not None
        return {
            "learning_j_modelled": step_j,
            "learning_frac": self.energy_j / whole_j if whole_j > 0 else None,
            "learning_updates": self.counts.get("update", 0),
            "learning_accepted": self.verdicts.get("accepted", 0),
            "learning_rejected": self.verdicts.get("rejected", 0),
            "learning_j_attributed": self.attributed_j if attributed else None,
            "provenance_learning_attributed": f"{self.provenance}, attributed by time" if attributed else None,
        }

    def lines(self, served_j: float, provenance_modelled: str) -> list[str]:
        """Return what happened, for people; nothing where nothing was learned."""
        if not self.counts:
            return []
        made = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        became = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.items())
        share = 100 * self.energy_j / (served_j + self.energy_j) if served_j + self.energy_j > 0 else 0.0
        told = [
            f"learning: {made}" + (f" ({became})" if became else ""),
            f"  modelled: {self.energy_j:.4g} J, {share:.3g} % of all, inside the joules per token "
            f"({provenance_modelled})",
        ]
        if self.pending_j > 0:
            told.append(f"  of these {self.pending_j:.4g} J came after the last token that was counted")
        if self.attributed_j is not None:
            told.append(f"  {self.provenance}: {self.attributed_j:.4g} J, attributed by time")
        return told

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> LearningTally:
        """Build what was saved; an error of its own for a damaged state is left to the caller."""
        attributed_j = state["attributed_j"]
        return cls(
            energy_j=float(state["energy_j"]),
            pending_j=float(state["pending_j"]),
            duration_s=float(state["duration_s"]),
            attributed_j=None if attributed_j is None else float(attributed_j),
            provenance=state["provenance"],
            counts={str(kind): int(count) for kind, count in dict(state["counts"]).items()},
            verdicts={str(verdict): int(count) for verdict, count in dict(state["verdicts"]).items()},
        )
