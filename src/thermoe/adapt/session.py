"""`AdaptiveSession`: holds a budget in joules per token, watts or degrees around a loop of the user's own.

    with AdaptiveSession(model, budget="20 mJ/token") as session:
        for batch in batches:
            model(batch)               # or model.generate(...): every forward is seen through a hook
            metrics = session.step()
    print(session.report())

Inside, the model has priced routers whose costs come from the cost model; leaving puts back what was there. A step
counts what ran, closes a window of the sensor when one is due, asks the controller what the routing may cost
(`controller.py`), turns that into a price (`price.py`) and pushes it into the routers. A forward gains a hook that
keeps references (`instrument.py`); it reads no device and no sensor.

A model runs one forward at a time, as any module with a state does. Steps, changes of the budget and reports may come
from another thread than the forwards: they wait for one another, and a forward waits for none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal

from torch import nn

from thermoe.adapt.budget import PHASES, Budget, Phase
from thermoe.adapt.controller import BudgetController
from thermoe.adapt.instrument import Instrument
from thermoe.adapt.price import feasible_range
from thermoe.adapt.price_holder import SEARCH_SHARE, WINDOW_SHARE, PriceHolder
from thermoe.adapt.readings import ControlReading
from thermoe.adapt.sensing import Sensing
from thermoe.adapt.session_arguments import Feedback, check_session_arguments, check_shape, not_open
from thermoe.adapt.session_state import STATE_VERSION, take_up
from thermoe.adapt.steps import EnergyWindows, ForwardCount, PhaseWindow, modelled_reading
from thermoe.adapt.tally import Tally, step_metrics, text_report
from thermoe.energy.cost_model import CostModel
from thermoe.energy.profile import cost_model_of
from thermoe.errors import ConfigError, TelemetryError
from thermoe.models.attach import attach_router
from thermoe.moe.layer import routed_modules
from thermoe.telemetry.meter import EnergyMeter

_NO_FORWARD = "no forward of this phase was held to anything yet"
_Given = Budget | float | str | Mapping[str, Any] | None
#: A price acts in the next forward; the window after the one that it came in is all of its making.
DELAY_WINDOWS = 1


class AdaptiveSession:
    """A context manager that holds a budget by the price of its model's experts.

    Args:
        model: a model with routers of ours, or a Hugging Face MoE, which gets them for the time being.
        budget: see `Budget.parse`; ``None`` is OFF: price 0, the baseline bit for bit, and everything is reported.
        meter: what measures; by default a meter of its own on the devices of the model, closed at the end.
        cost_model: the joules of work; by default what was calibrated on this machine, else the prior.
        feedback: "measured" corrects the model by the sensor; "modelled" holds the budget against modelled joules on
            purpose; "auto" is the first where there is a sensor, else the second, and the reason says which.
        window_s: length of a window of the sensor, in seconds; at least two periods of the sampler.
        auto_step: take a step after so many forwards, for work that leaves no room for one, such as `generate`.
        on_step: called with the metrics of each step; it may do anything but step.
        solve_every: steps from one search for the price to the next; a new window or budget searches at once. Where
            a search is slow it waits, so that searches take no more than 5 % of the time, or 25 % after windows.
        router: options of the priced routers that are put in, such as ``{"k_min": 2}``; their benefit is "distortion".
        control: options of `BudgetController`, such as ``{"law": "dual", "price_max": 5.0}``.

    Attributes:
        metrics: of the last step.
        tally: sums, the history of windows, and how the last change of the budget was answered.

    Raises:
        ConfigError: the budget or an option is outside its range or of the wrong kind; the error names the range for
            this model.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: _Given = None,
        *,
        meter: EnergyMeter | None = None,
        cost_model: CostModel | None = None,
        feedback: Feedback = "auto",
        window_s: float = 2.0,
        auto_step: int | None = None,
        on_step: Callable[[dict[str, Any]], object] | None = None,
        solve_every: int = 8,
        router: Mapping[str, Any] | None = None,
        control: Mapping[str, Any] | None = None,
    ) -> None:
        check_session_arguments(
            model,
            meter=meter,
            cost_model=cost_model,
            feedback=feedback,
            window_s=window_s,
            auto_step=auto_step,
            on_step=on_step,
            solve_every=solve_every,
            router=router,
            control=control,
        )
        self.model = model
        self._cost_model = cost_model
        self._instrument: Instrument | None = None
        parsed = self._parsed(budget)
        settings = {"period_s": window_s, "delay_windows": DELAY_WINDOWS, **(control or {})}
        self._holder = PriceHolder(BudgetController(parsed, **settings))
        self._meter_given, self._meter = meter, meter
        self._sensing: Sensing | None = None
        self._provenance_modelled, self._cost_reason = "estimated", "not chosen yet"
        self._feedback: Feedback = feedback
        self._window_s, self._auto_step, self._on_step, self._solve_every = window_s, auto_step, on_step, solve_every
        self._router_options = dict(router or {})
        self.metrics: dict[str, Any] = {}
        self.tally = Tally()
        self._stack: ExitStack | None = None
        self._lock = threading.RLock()
        self._stepping = False

    @property
    def budget(self) -> Budget | None:
        """What is held."""
        return self._holder.budget

    @property
    def prices(self) -> dict[Phase, float]:
        """Nats per joule in force, by phase."""
        return self._holder.prices

    # -- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> AdaptiveSession:
        with self._lock, ExitStack() as stack:
            if self._stack is not None:
                raise TelemetryError(
                    "the session is open already",
                    where="AdaptiveSession",
                    accepted="one with block at a time",
                    fix="make another session, or leave this one first",
                )
            if next(routed_modules(self.model), None) is None:
                stack.callback(attach_router(self.model, verbose=False).detach)
            self._sensing = Sensing.of(self._meter_given, self.model, stack)
            self._meter = self._sensing.meter
            cost, self._cost_reason = self._cost_model, "given"
            if cost is None:
                cost, self._cost_reason = cost_model_of(self.model, self._meter)
            self._provenance_modelled = cost.provenance
            self._instrument = Instrument(
                self.model,
                cost,
                self._meter.clock,
                router=self._router_options,
                needs_price=self.budget is not None,
                after_forward=self._after_forward,
            )
            stack.callback(self._instrument.remove)
            self._instrument.push(self.prices)
            self._windows = EnergyWindows(self._meter, self._window_s)
            self._holder.begin()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            instrument, stack = self._opened("__exit__"), self._stack
            self._stack = None
            assert stack is not None
            with stack:
                if kind is None:
                    self._account(instrument.take(), last=True)

    def _after_forward(self) -> None:
        # What runs inside on_step, or while another thread is at a step, is noted and waits for the next one.
        if self._auto_step is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self._stepping or self._stack is None or self._instrument is None:
                return
            log = self._instrument.log
            # The first forward of a phase counts at once: a short generation would be over before it is held to
            # anything.
            unknown = self.budget is not None and bool(log.phases - set(self._holder.outputs))
            if len(log) >= self._auto_step or (unknown and self._held_against != "nothing"):
                self.step()
        finally:
            self._lock.release()

    def observe(self, batch_size: int, sequence_length: int) -> None:
        """Note the forward just made, where no hook runs: a model compiled whole, or a replayed CUDA graph.

        The decisions are copied on the device, because a graph writes the next ones over them.

        Raises:
            ConfigError: a size is no integer of at least 1.
            TelemetryError: the session is not open.
        """
        self._opened("observe").note(check_shape(batch_size, sequence_length), copy=True)

    # -- stepping -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Count what ran since the last step, control, and return plain numbers; waits for the device.

        Raises:
            TelemetryError: the session is not open, or this is the ``on_step`` of another step.
        """
        with self._lock:
            instrument = self._opened("step")
            if self._stepping:
                raise TelemetryError(
                    "a step was asked for inside on_step, which is part of a step",
                    where="AdaptiveSession.step",
                    accepted="one step at a time",
                    fix="leave the step to whoever runs the model; on_step is given its metrics",
                )
            self._stepping = True
            try:
                self.metrics = self._stepped(instrument)
                if self._on_step is not None:
                    self._on_step(self.metrics)
            finally:
                self._stepping = False
            return self.metrics

    def _stepped(self, instrument: Instrument) -> dict[str, Any]:
        assert self._meter is not None
        counts = instrument.take()
        closed = self._account(counts)
        readings = {part.phase: part.reading() for part in closed} if self._held_against == "measured" else {}
        if self._held_against == "modelled":
            now_s, why = self._meter.clock.now_s(), self._no_sensor or "feedback is modelled"
            for phase in {count.phase for count in counts}:
                readings[phase] = modelled_reading(phase, counts, t_s=now_s, window_s=self._window_s, reason=why)
        for phase in PHASES:
            ran = any(count.phase == phase for count in counts)
            window = phase in readings and self._held_against == "measured"
            if self._holder.due(phase, ran=ran, solve_every=self._solve_every) or window:
                self._ask(instrument, phase, readings.get(phase), WINDOW_SHARE if window else SEARCH_SHARE)
        instrument.push(self.prices)
        instrument.renew_clock()
        self.tally.steps += 1
        states = {phase: self.state_of(phase) for phase in PHASES}
        for phase in {count.phase for count in counts}:
            spent = self.tally.phases[phase].states
            spent[states[phase][0]] = spent.get(states[phase][0], 0) + 1
        outputs = self._holder.outputs
        return step_metrics(
            counts,
            self.tally,
            prices=self.prices,
            states=states,
            targets_j={p: None if (o := outputs.get(p)) is None else o.cost_target_j for p in PHASES},
            sensors=self._meter.snapshot(),
            provenance_modelled=self._provenance_modelled,
            provenance_sensors=None if self._sensing is None else self._sensing.provenance,
            t_s=self._meter.clock.now_s(),
        )

    @property
    def pending(self) -> int:
        """Forwards that the next step will count."""
        return len(self._opened("pending").log)

    @property
    def _held_against(self) -> Literal["measured", "modelled", "nothing"]:
        if self.budget is None or (self._feedback == "measured" and self._no_sensor is not None):
            return "nothing"
        return "measured" if self._feedback != "modelled" and self._no_sensor is None else "modelled"

    def _account(self, counts: list[ForwardCount], *, last: bool = False) -> list[PhaseWindow]:
        """Add up work and close a window if one is due."""
        self.tally.add(counts)
        if self._no_sensor is not None:
            assert self._meter is not None
            self.tally.energy.note_gap(self._no_sensor)
            self.tally.note_step(counts, self._meter.clock.now_s(), self.prices, self._holder.outputs)
            return []
        self._windows.add(counts)
        closed = self._windows.close(last=last)
        self.tally.note_windows(closed, self.prices, self._holder.outputs)
        return closed

    def _ask(self, instrument: Instrument, phase: Phase, reading: ControlReading | None, share: float) -> None:
        if self._held_against == "nothing" or self._meter is None:
            return
        with instrument.searching:
            self._holder.ask(instrument.solver, self._meter.clock, phase, reading, share)

    def state_of(self, phase: Phase) -> tuple[str, str]:
        """Return the state of a phase and the reason, in a sentence."""
        if self.budget is None:
            fixed = f"; the price is fixed at {self.prices[phase]:.4g} nats/J" if self.prices[phase] else ""
            return "OFF", f"no budget{fixed}"
        if self._stack is not None and self._held_against == "nothing":
            return "OFF", f"no energy sensor, and feedback is measured: {self._no_sensor}"
        output = self._holder.outputs.get(phase)
        return ("OFF", _NO_FORWARD) if output is None else (output.state, output.reason)

    @property
    def _no_sensor(self) -> str | None:
        return None if self._sensing is None else self._sensing.no_sensor

    # -- settings -----------------------------------------------------------------------------------------------------

    def set_budget(self, budget: _Given) -> None:
        """Hold another budget from now on.

        Raises:
            ConfigError: it is none; the error names what this machine and model can hold.
        """
        with self._lock:
            self._holder.set_budget(self._parsed(budget))
            if self._meter is not None:
                self.tally.budgets.append((self._meter.clock.now_s(), str(self.budget or "no budget")))
            if self._stack is not None and self._instrument is not None:
                for phase in PHASES:
                    self._ask(self._instrument, phase, None, share=1.0)
            self._push()

    def set_price(self, price: float, phase: Phase | None = None) -> None:
        """Fix the price, in nats per joule, of a phase or of both; for sweeps, and without a budget only.

        Raises:
            ConfigError: the price is no number of at least 0 that routers can hold, or there is a budget.
            UnknownNameError: no such phase.
        """
        with self._lock:
            self._holder.set_price(price, phase)
            self._push()

    def _parsed(self, budget: _Given) -> Budget | None:
        if budget is None:
            return None
        try:
            return Budget.parse(budget)
        except ConfigError:
            return Budget.parse(budget, feasible=self.feasible())

    def _push(self) -> None:
        if self._stack is not None and self._instrument is not None:
            self._instrument.push(self.prices)

    def feasible(self) -> str | None:
        """Return in words what this model can be held to, in J/token by the cost model; ``None`` where it cannot."""
        cost = self._cost_model or CostModel.prior()
        if self._instrument is None:
            return feasible_range(self.model, cost, None)
        with self._instrument.searching:
            return feasible_range(self.model, cost, self._instrument.solver)

    def _opened(self, name: str) -> Instrument:
        if self._stack is None or self._instrument is None:
            raise not_open(name)
        return self._instrument

    # -- what is left ------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Return what happened so far, for people."""
        return text_report(
            self.tally,
            budget=None if self.budget is None else str(self.budget),
            prices=self.prices,
            states={phase: self.state_of(phase) for phase in PHASES},
            cost_model=self._cost_reason,
            provenance_modelled=self._provenance_modelled,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return prices, controller, budget and totals as plain values; `load_state_dict` goes on from there."""
        with self._lock:
            return {"version": STATE_VERSION, **self._holder.state_dict(), "tally": self.tally.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, the budget included.

        Raises:
            CheckpointError: it is of another version, or incomplete; nothing is changed then.
        """

        def take(state: Mapping[str, Any]) -> None:
            tally = Tally.from_state(state["tally"])
            self._holder.load_state_dict(state)
            self.tally = tally

        with self._lock:
            take_up(state, take)
            self._push()
