"""A running total of windows that says when it is not the whole: joules, tokens, seconds, and why there are gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from thermoe.results import Provenance, weakest_provenance
from thermoe.telemetry.window import EnergyWindow

#: Different reasons that are remembered; the first ones tell the most.
KEPT_GAPS = 8


@dataclass(slots=True, kw_only=True)
class EnergyTotals:
    """What a piece of work has used so far, over all its resumed parts.

    Attributes:
        energy_j: gross joules of the windows that have a figure.
        tokens: tokens of the same time; 0 when nobody counts them.
        measured_s: seconds the joules are of.
        unmeasured_s: seconds without a figure.
        provenance: weakest label of any part; ``None`` before the first.
        gaps: why ``energy_j`` is less than all there was; empty when it is complete.
    """

    energy_j: float = 0.0
    tokens: float = 0.0
    measured_s: float = 0.0
    unmeasured_s: float = 0.0
    provenance: Provenance | None = None
    gaps: list[str] = field(default_factory=list)

    @property
    def partial(self) -> bool:
        """Whether some part has no joule figure."""
        return bool(self.gaps)

    def add(self, window: EnergyWindow, tokens: float) -> None:
        """Add one window, or the gap it leaves."""
        self.tokens += tokens
        if window.energy_j is None:
            self.unmeasured_s += window.duration_s
            self.note_gap(window.reason or "not measured")
            return
        self.energy_j += window.energy_j
        self.measured_s += window.duration_s
        self.provenance = weakest_provenance([window.provenance, self.provenance or window.provenance])

    def note_gap(self, reason: str) -> None:
        """Remember why the total is less than all there was."""
        if reason not in self.gaps and len(self.gaps) < KEPT_GAPS:
            self.gaps.append(reason)

    def copy(self) -> EnergyTotals:
        """Return an independent copy."""
        return replace(self, gaps=list(self.gaps))

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> EnergyTotals:
        """Build totals from what a checkpoint holds; unknown entries are passed over."""
        return cls(**{name: saved[name] for name in cls.__slots__ if name in saved})


def labelled(values: Mapping[str, float | None], label: Provenance | None) -> dict[str, float]:
    """Return the numbers there are; the name of one that is not measured has its label in front."""
    prefix = "" if label == "measured" else f"{label}/"
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None and label is not None}
