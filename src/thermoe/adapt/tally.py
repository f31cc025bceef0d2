"""What a session has done so far, added up, and the numbers and sentences that people and dashboards get of it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.lags import Lag, LagWindow, ReactionLags, reaction_lags
from thermoe.adapt.learning_tally import LearningTally
from thermoe.adapt.readings import ControlOutput
from thermoe.adapt.steps import ForwardCount
from thermoe.adapt.windows import ClosedWindow, PhaseWindow
from thermoe.telemetry.totals import EnergyTotals

#: Rows of the history that are kept: more than an hour of windows.
HISTORY = 4096


@dataclass(slots=True)
class PhaseTally:
    """Sums of one phase.

    Attributes:
        forwards: how many.
        tokens: real tokens.
        energy_modelled_j: joules that the cost model gives their routing.
        learning_j: modelled joules of learning that fall on these tokens.
        experts: token-expert pairs per layer, so that divided by tokens it is k.
        distinct: distinct experts per layer and forward, summed over forwards.
        states: steps spent in each state.
    """

    forwards: int = 0
    tokens: int = 0
    energy_modelled_j: float = 0.0
    learning_j: float = 0.0
    experts: float = 0.0
    distinct: float = 0.0
    states: dict[str, int] = field(default_factory=dict)

    def add(self, counts: Iterable[ForwardCount]) -> None:
        """Add forwards of this phase."""
        for count in counts:
            self.forwards += 1
            self.tokens += count.tokens
            self.energy_modelled_j += count.energy_j
            layers = max(1, count.layers)
            self.experts += float(count.pairs.sum()) / layers
            self.distinct += float((count.pairs > 0).sum()) / layers

    @property
    def numbers(self) -> dict[str, float | None]:
        """Return tokens and what each cost, learning included, and used; ``None`` where nothing ran."""
        whole_j = self.energy_modelled_j + self.learning_j
        return {
            "tokens": self.tokens,
            "forwards": self.forwards,
            "experts_per_token": self.experts / self.tokens if self.tokens else None,
            "distinct_experts": self.distinct / self.forwards if self.forwards else None,
            "j_per_token_modelled": whole_j / self.tokens if self.tokens else None,
            "j_per_token_routing": self.energy_modelled_j / self.tokens if self.tokens else None,
        }


@dataclass(slots=True)
class Tally:
    """Sums of a session.

    Attributes:
        steps: steps taken.
        phases: the sums of each phase.
        energy: measured joules, with the tokens of the same time.
        learning: what was learned and what that took; its joules are in those above.
        windows: the last window of each phase that had a reading. It, `history` and `budgets` are of this process
            alone and no part of a saved state.
        history: a row for each window and phase, or for each step where there is no sensor; the latest 4096.
        budgets: (time, words) of each change of the budget.
    """

    steps: int = 0
    phases: dict[Phase, PhaseTally] = field(default_factory=lambda: {phase: PhaseTally() for phase in PHASES})
    energy: EnergyTotals = field(default_factory=EnergyTotals)
    learning: LearningTally = field(default_factory=LearningTally)
    windows: dict[Phase, PhaseWindow] = field(default_factory=dict)
    history: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=HISTORY))
    budgets: list[tuple[float, str]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of both phases."""
        return sum(part.tokens for part in self.phases.values())

    @property
    def served_j(self) -> float:
        """Modelled joules of the forwards of both phases, without learning."""
        return sum(part.energy_modelled_j for part in self.phases.values())

    def add(self, counts: Iterable[ForwardCount], learning_j: Mapping[Phase, float]) -> None:
        """Add forwards, and the joules of learning that fall on the tokens of each phase."""
        listed = list(counts)
        for phase, part in self.phases.items():
            part.add(count for count in listed if count.phase == phase)
            part.learning_j += learning_j.get(phase, 0.0)

    def note_window(
        self, closed: ClosedWindow, prices: Mapping[Phase, float], outputs: Mapping[Phase, ControlOutput]
    ) -> None:
        """Add the joules of a window, and a row of history for each phase in it."""
        self.energy.add(closed.window, sum(part.tokens for part in closed.parts))
        self.learning.note_window(closed)
        for part in closed.parts:
            if part.measured_j is not None:
                self.windows[part.phase] = part
            self.history.append({**part.as_row(), **_controls(part.phase, prices, outputs)})

    def note_step(
        self,
        counts: Iterable[ForwardCount],
        learning_j: Mapping[Phase, float],
        t_s: float,
        prices: Mapping[Phase, float],
        outputs: Mapping[Phase, ControlOutput],
    ) -> None:
        """Add a row of history for each phase of a step, where there is no sensor to make windows."""
        listed = list(counts)
        for phase in PHASES:
            part = PhaseTally()
            part.add(count for count in listed if count.phase == phase)
            part.learning_j = learning_j.get(phase, 0.0)
            if part.tokens:
                known = {"t_s": t_s, "phase": phase, "tokens": part.tokens}
                modelled = {name: part.numbers[name] for name in ("j_per_token_modelled", "j_per_token_routing")}
                self.history.append({**_NO_WINDOW, **known, **modelled, **_controls(phase, prices, outputs)})

    def reaction(self, phase: Phase, watched: str = "j_per_token_routing") -> ReactionLags:
        """Return how a phase answered the last change of the budget; windows before the change before it do not count.

        Args:
            phase: of the work.
            watched: a name in `history`: the modelled cost of the routing, or for example ``power_w``.
        """
        if not self.budgets:
            return ReactionLags(reason="the budget was not changed")
        after_s = self.budgets[-2][0] if len(self.budgets) > 1 else -math.inf
        rows = [row for row in self.history if row["phase"] == phase and row["t_s"] > after_s]
        windows = [LagWindow(t_s=row["t_s"], tokens=row["tokens"], value=row[watched]) for row in rows]
        return reaction_lags(windows, self.budgets[-1][0])

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain values."""
        return {
            "steps": self.steps,
            "phases": {phase: asdict(part) for phase, part in self.phases.items()},
            "energy": asdict(self.energy),
            "learning": asdict(self.learning),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Build the sums that `state_dict` returned."""
        return cls(
            steps=int(state["steps"]),
            phases={phase: PhaseTally(**state["phases"][phase]) for phase in PHASES},
            energy=EnergyTotals.from_state(state["energy"]),
            learning=LearningTally.from_state(state["learning"]),
        )


#: What a row of history has from the sensor.
_NO_WINDOW = dict.fromkeys(("j_per_token_measured", "power_w", "temp_c", "window_s", "provenance", "reason"))


def _controls(
    phase: Phase, prices: Mapping[Phase, float], outputs: Mapping[Phase, ControlOutput]
) -> dict[str, float | str | None]:
    output = outputs.get(phase)
    return {
        "price": prices[phase],
        "state": None if output is None else output.state,
        "cost_target_j": None if output is None else output.cost_target_j,
    }


def step_metrics(
    counts: Iterable[ForwardCount],
    tally: Tally,
    *,
    learning_j: Mapping[Phase, float],
    prices: Mapping[Phase, float],
    states: Mapping[Phase, tuple[str, str]],
    targets_j: Mapping[Phase, float | None],
    sensors: Mapping[str, float | None],
    provenance_modelled: str,
    provenance_sensors: str | None,
    t_s: float,
) -> dict[str, Any]:
    """Return one flat dictionary of plain numbers and words; unknown is ``None``.

    Names with ``prefill/`` or ``decode/`` in front are of that phase. Those without are of the step: its sums, and
    price, state, reason and measured joules of the phase that most of its modelled joules went into. Joules per token
    include learning, but for ``j_per_token_routing``. ``learning_j_modelled`` is of the step; the other numbers of
    learning are of the session so far.
    """
    found: dict[str, Any] = {}
    whole, listed, weight = PhaseTally(), list(counts), dict.fromkeys(PHASES, 0.0)
    whole.add(listed)
    whole.learning_j = sum(learning_j.values())
    for phase in PHASES:
        part = PhaseTally(learning_j=learning_j.get(phase, 0.0))
        part.add(count for count in listed if count.phase == phase)
        weight[phase] = part.energy_modelled_j
        window = tally.windows.get(phase)
        state, reason = states[phase]
        own = {
            **part.numbers,
            "price": prices[phase],
            "state": state,
            "reason": reason,
            "cost_target_j": targets_j[phase],
            "j_per_token_measured": None if window is None else window.j_per_token,
            "provenance": None if window is None else window.window.provenance,
        }
        found |= {f"{phase}/{name}": value for name, value in own.items()}
    seen = [phase for phase in PHASES if tally.phases[phase].tokens]
    main = max(seen or PHASES, key=lambda phase: (weight[phase], tally.phases[phase].energy_modelled_j))
    names = ("price", "state", "reason", "cost_target_j", "j_per_token_measured", "provenance")
    return {
        "step": tally.steps,
        "t_s": t_s,
        "phase": main,
        **whole.numbers,
        **{name: found[f"{main}/{name}"] for name in names},
        **tally.learning.metrics(whole.learning_j, tally.served_j),
        "provenance_modelled": provenance_modelled,
        "tokens_total": tally.tokens,
        "energy_measured_j": tally.energy.energy_j if tally.energy.provenance is not None else None,
        "provenance_sensors": provenance_sensors,
        "power_w": sensors.get("power_w"),
        "temp_c": sensors.get("temp_c"),
        "memory_used_bytes": sensors.get("memory_used_bytes"),
        "process_memory_bytes": sensors.get("process_memory_bytes"),
        **found,
    }


def millijoules(value_j: float | None) -> str:
    """Return joules per token for people."""
    return "not measured" if value_j is None else f"{1e3 * value_j:.4g} mJ/token"


def millijoule_span(low_j: float, high_j: float) -> str:
    """Return a range of joules per token for people."""
    return f"{1e3 * low_j:.3g} to {millijoules(high_j)}"


def text_report(
    tally: Tally,
    *,
    budget: str | None,
    prices: Mapping[Phase, float],
    states: Mapping[Phase, tuple[str, str]],
    cost_model: str,
    provenance_modelled: str,
) -> str:
    """Return what happened, in lines."""
    lines = [f"budget: {budget or 'none'}"]
    for phase, part in tally.phases.items():
        if not part.tokens:
            continue
        state, reason = states[phase]
        numbers = part.numbers
        lines += [
            f"{phase}: {part.tokens} tokens in {part.forwards} forwards",
            f"  state: {state}: {reason}",
            f"  price: {prices[phase]:.4g} nats/J",
            f"  experts: {numbers['distinct_experts']:.4g} distinct per layer and forward, "
            f"{numbers['experts_per_token']:.4g} per token",
            f"  modelled: {millijoules(numbers['j_per_token_modelled'])} ({provenance_modelled})"
            + (f", {millijoules(part.learning_j / part.tokens)} of it learning" if part.learning_j else ""),
        ]
        window = tally.windows.get(phase)
        if window is not None and window.j_per_token is not None:
            label = window.window.provenance
            lines.append(f"  {label}: {millijoules(window.j_per_token)} in the last window")
        if len(part.states) > 1:
            shares = ", ".join(f"{name} {count}" for name, count in part.states.items())
            lines.append(f"  steps by state: {shares}")
        if tally.budgets:
            lines.append(f"  answer to {tally.budgets[-1][1]}: {_answer(tally.reaction(phase))}")
    lines += tally.learning.lines(tally.served_j, provenance_modelled)
    energy = tally.energy
    if energy.provenance is not None and energy.tokens > 0:
        per_token = millijoules(energy.energy_j / energy.tokens)
        part_of = f", {energy.unmeasured_s:.3g} s without a figure" if energy.partial else ""
        spent = f"{energy.energy_j:.4g} J in {energy.measured_s:.4g} s"
        lines.append(f"{energy.provenance}: {spent}, {per_token} over both phases{part_of}")
    else:
        lines.append(f"measured: nothing ({'; '.join(energy.gaps) or 'no window was long enough'})")
    lines.append(f"cost model: {cost_model}")
    return "\n".join(lines)


def _answer(lags: ReactionLags) -> str:
    def told(name: str, lag: Lag | None) -> str:
        if lag is None:
            return f"{name} not seen"
        return f"{name} after {lag.ms:.0f} ms, {lag.tokens:.0f} tokens, {lag.windows} windows"

    if lags.final is None or lags.overshoot is None:
        return lags.reason or "not seen"
    parts = (("detected", lags.detection), ("63 %", lags.rise_63), ("settled", lags.settling))
    return "; ".join(told(name, lag) for name, lag in parts)
