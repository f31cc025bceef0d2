"""One step of an open session: count, measure, control, tell.

What is open holds the parts together: the instrument on the model, the meter and its windows, the holder of prices, and
what learns. It knows no locks and no arguments; those are the session's (`session.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.instrument import Instrument
from thermoe.adapt.learning_work import LearningWork
from thermoe.adapt.price_holder import SEARCH_SHARE, WINDOW_SHARE, PriceHolder
from thermoe.adapt.readings import ControlReading
from thermoe.adapt.sensing import Sensing
from thermoe.adapt.session_learning import Learn, SessionLearning
from thermoe.adapt.steps import ForwardCount
from thermoe.adapt.tally import Tally, step_metrics
from thermoe.adapt.windows import ClosedWindow, EnergyWindows, modelled_reading
from thermoe.energy.cost_model import CostModel
from thermoe.energy.profile import cost_model_of
from thermoe.energy.read_cost import ReadCost
from thermoe.models.attach import attach_router
from thermoe.moe.layer import routed_modules
from thermoe.telemetry.meter import EnergyMeter

_NO_FORWARD = "no forward of this phase was held to anything yet"


@dataclass(slots=True, kw_only=True)
class SessionLoop:
    """The parts of an open session.

    Attributes:
        instrument: on the model.
        sensing: the meter.
        windows: of the sensor.
        holder: of the prices.
        learning: what learns, or ``None``.
        tally: gets the sums.
        feedback: as a session is told.
        window_s: nominal length of a window.
        solve_every: steps from one search for the price to the next.
        provenance_modelled: label of modelled joules.
        cost_reason: why it is this cost model.
    """

    instrument: Instrument
    sensing: Sensing
    windows: EnergyWindows
    holder: PriceHolder
    learning: SessionLearning | None
    tally: Tally
    feedback: str
    window_s: float
    solve_every: int
    provenance_modelled: str
    cost_reason: str

    @classmethod
    def opened(
        cls,
        stack: ExitStack,
        model: nn.Module,
        *,
        meter: EnergyMeter | None,
        cost_model: CostModel | None,
        read_cost: ReadCost,
        router: Mapping[str, Any],
        after_forward: Callable[[], None],
        holder: PriceHolder,
        tally: Tally,
        learn: Learn,
        learned: Mapping[str, Any] | None,
        feedback: str,
        window_s: float,
        solve_every: int,
    ) -> SessionLoop:
        """Open everything on ``model``; ``stack`` undoes it.

        Args:
            stack: gets what undoes each part.
            model: as the session's.
            meter: given by the user, or ``None``.
            cost_model: likewise.
            read_cost: as a session is told.
            router: options of priced routers.
            after_forward: called after each served forward.
            holder: of the prices, which come into force at once.
            tally: gets the sums.
            learn: as a session is told.
            learned: what an adapter of the session's own goes on from.
            feedback: as a session is told.
            window_s: nominal length of a window.
            solve_every: steps between searches.
        """
        if next(routed_modules(model), None) is None:
            stack.callback(attach_router(model, verbose=False).detach)
        sensing = Sensing.of(meter, model, stack)
        cost, reason = (cost_model, "given") if cost_model is not None else cost_model_of(model, sensing.meter)
        learning = None
        if learn is not None:  # first, so that the work of fast weights is counted; routers hand them on
            learning = SessionLearning(learn, model, cost, read_cost, sensing.meter.clock, learned, stack)
        instrument = Instrument(
            model,
            cost,
            sensing.meter.clock,
            read_cost=read_cost,
            router=router,
            needs_price=holder.budget is not None,
            after_forward=after_forward,
        )
        stack.callback(instrument.remove)
        instrument.push(holder.prices)
        holder.begin()
        return cls(
            instrument=instrument,
            sensing=sensing,
            windows=EnergyWindows(sensing.meter, window_s),
            holder=holder,
            learning=learning,
            tally=tally,
            feedback=feedback,
            window_s=window_s,
            solve_every=solve_every,
            provenance_modelled=cost.provenance,
            cost_reason=reason,
        )

    @property
    def held_against(self) -> Literal["measured", "modelled", "nothing"]:
        """What the budget is held against."""
        no_sensor = self.sensing.no_sensor is not None
        if self.holder.budget is None or (self.feedback == "measured" and no_sensor):
            return "nothing"
        return "measured" if self.feedback != "modelled" and not no_sensor else "modelled"

    def account(
        self, counts: list[ForwardCount], *, last: bool = False
    ) -> tuple[ClosedWindow | None, dict[Phase, float]]:
        """Add up work, close a window if one is due, and say what learning falls on the tokens of each phase.

        Args:
            counts: the forwards since the last call.
            last: there will be no further call.
        """
        works: list[LearningWork] = []
        if self.learning is not None:
            works = self.learning.take(self.tally.learning)
            self.learning.earn(sum(count.energy_j for count in counts))
        learning_j = self.tally.learning.fall_on(counts)
        self.tally.add(counts, learning_j)
        self.holder.note_step(counts, learning_j)
        if self.sensing.no_sensor is not None:
            self.tally.energy.note_gap(self.sensing.no_sensor)
            now_s = self.sensing.meter.clock.now_s()
            self.tally.note_step(counts, learning_j, now_s, self.holder.prices, self.holder.outputs)
            return None, learning_j
        self.windows.add(counts)
        self.windows.add_learning(works)
        closed = self.windows.close(last=last)
        if closed is not None:
            self.tally.note_window(closed, self.holder.prices, self.holder.outputs)
        return closed, learning_j

    def step(self) -> dict[str, Any]:
        """Count what ran since the last step, control, and return the metrics; waits for the device."""
        meter = self.sensing.meter
        counts = self.instrument.take()
        closed, learning_j = self.account(counts)
        readings = self._readings(counts, closed, learning_j)
        for phase in PHASES:
            ran = any(count.phase == phase for count in counts)
            window = phase in readings and self.held_against == "measured"
            if self.holder.due(phase, ran=ran, solve_every=self.solve_every) or window:
                self.ask(phase, readings.get(phase), WINDOW_SHARE if window else SEARCH_SHARE)
        self.instrument.push(self.holder.prices)
        self.instrument.renew_clock()
        self.tally.steps += 1
        states = {phase: self.state_of(phase) for phase in PHASES}
        for phase in {count.phase for count in counts}:
            spent = self.tally.phases[phase].states
            spent[states[phase][0]] = spent.get(states[phase][0], 0) + 1
        outputs = self.holder.outputs
        return step_metrics(
            counts,
            self.tally,
            learning_j=learning_j,
            prices=self.holder.prices,
            states=states,
            targets_j={p: None if (o := outputs.get(p)) is None else o.cost_target_j for p in PHASES},
            sensors=meter.snapshot(),
            provenance_modelled=self.provenance_modelled,
            provenance_sensors=self.sensing.provenance,
            t_s=meter.clock.now_s(),
        )

    def _readings(
        self, counts: list[ForwardCount], closed: ClosedWindow | None, learning_j: Mapping[Phase, float]
    ) -> dict[Phase, ControlReading]:
        if self.held_against == "measured":
            return {part.phase: part.reading() for part in closed.parts} if closed is not None else {}
        if self.held_against == "nothing":
            return {}
        return {
            phase: modelled_reading(
                phase,
                counts,
                learning_j=learning_j[phase],
                t_s=self.sensing.meter.clock.now_s(),
                window_s=self.window_s,
                reason=self.sensing.no_sensor or "feedback is modelled",
            )
            for phase in {count.phase for count in counts}
        }

    def ask(self, phase: Phase, reading: ControlReading | None, share: float) -> None:
        """Ask what a phase may cost, and for the price of that; nothing where the budget is held against nothing."""
        held = self.held_against
        if held == "nothing":
            return
        with self.instrument.searching:
            self.holder.ask(
                self.instrument.solver,
                self.sensing.meter.clock,
                phase,
                reading,
                share,
                modelled=held == "modelled",
            )

    def state_of(self, phase: Phase) -> tuple[str, str]:
        """Return the state of a phase and the reason, in a sentence."""
        if self.holder.budget is not None and self.held_against == "nothing":
            return "OFF", f"no energy sensor, and feedback is measured: {self.sensing.no_sensor}"
        return state_of(self.holder, phase)


def state_of(holder: PriceHolder, phase: Phase) -> tuple[str, str]:
    """Return the state of a phase and the reason, by what was last held."""
    price = holder.prices[phase]
    if holder.budget is None:
        return "OFF", "no budget" + (f"; the price is fixed at {price:.4g} nats/J" if price else "")
    output = holder.outputs.get(phase)
    return ("OFF", _NO_FORWARD) if output is None else (output.state, output.reason)
