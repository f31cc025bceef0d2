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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import nn

from thermoe.adapt.budget import PHASES, Budget, Phase
from thermoe.adapt.controller import BudgetController
from thermoe.adapt.instrument import Instrument
from thermoe.adapt.price import feasible_range
from thermoe.adapt.readings import ControlOutput, ControlReading, CostRange
from thermoe.adapt.steps import EnergyWindows, ForwardCount, PhaseWindow, modelled_reading
from thermoe.adapt.tally import Tally, step_metrics, text_report
from thermoe.energy.cost_model import CostModel
from thermoe.energy.profile import cost_model_of
from thermoe.errors import CheckpointError, ConfigError, TelemetryError, UnknownNameError
from thermoe.models.attach import attach_router
from thermoe.moe.layer import routed_modules
from thermoe.telemetry.meter import EnergyMeter

Feedback = Literal["auto", "measured", "modelled"]
FEEDBACKS: tuple[Feedback, ...] = get_args(Feedback)
STATE_VERSION = 1
#: Most time that searches for the price may take: those after a window, and those in between.
WINDOW_SHARE, SEARCH_SHARE = 0.25, 0.05
#: Nats per joule; times the joules of a token-expert pair it stays far below what float32 holds.
HIGHEST_PRICE = 1e30
_NO_FORWARD = "no forward of this phase was held to anything yet"
_Given = Budget | float | str | Mapping[str, Any] | None


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
        on_step: called with the metrics of each step.
        solve_every: steps from one search for the price to the next; a new window or budget searches at once. Where
            a search is slow it waits, so that searches take no more than 5 % of the time, or 25 % after windows.
        router: options of the priced routers that are put in, such as ``{"k_min": 2}``; their benefit is "distortion".
        control: options of `BudgetController`, such as ``{"law": "dual", "price_max": 5.0}``.

    Attributes:
        metrics: of the last step.
        tally: sums, the history of windows, and how the last change of the budget was answered.
        prices: nats per joule in force, by phase.

    Raises:
        ConfigError: the budget or an option is outside its range; the error names the range for this model.
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
        if feedback not in FEEDBACKS:
            raise UnknownNameError.of("feedback", str(feedback), FEEDBACKS, where="AdaptiveSession(feedback=...)")
        for name, value in (("auto_step", 1 if auto_step is None else auto_step), ("solve_every", solve_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"{name} is {value!r}",
                    where=f"AdaptiveSession({name}=...)",
                    accepted="an integer of at least 1",
                    fix=f"leave {name} out",
                )
        self.model = model
        self._cost_model = cost_model
        self._instrument: Instrument | None = None
        self.budget = self._parsed(budget)
        self._controller = BudgetController(self.budget, **{"period_s": window_s, **(control or {})})
        self._meter_given, self._meter = meter, meter
        self._no_sensor: str | None = None
        self._provenance_sensors: str | None = None
        self._provenance_modelled, self._cost_reason = "estimated", "not chosen yet"
        self._feedback: Feedback = feedback
        self._window_s, self._auto_step, self._on_step, self._solve_every = window_s, auto_step, on_step, solve_every
        self._router_options = dict(router or {})
        self.prices: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.metrics: dict[str, Any] = {}
        self.tally = Tally()
        self._outputs: dict[Phase, ControlOutput] = {}
        self._since_solved: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._searched: dict[Phase, tuple[float, float, int]] = {}
        self._costs: dict[Phase, CostRange] = {}
        self._stack: ExitStack | None = None

    # -- entering and leaving -----------------------------------------------------------------------------------------

    def __enter__(self) -> AdaptiveSession:
        if self._stack is not None:
            raise TelemetryError(
                "the session is open already",
                where="AdaptiveSession",
                accepted="one with block at a time",
                fix="make another session, or leave this one first",
            )
        with ExitStack() as stack:
            if next(routed_modules(self.model), None) is None:
                stack.callback(attach_router(self.model, verbose=False).detach)
            self._meter = self._opened_meter(stack)
            described = self._meter.describe()
            energy, self._provenance_sensors = described["energy_j"], described["power_w"]["provenance"]
            self._no_sensor = None if energy["provenance"] and self._meter.devices else str(energy["reason"])
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
            self._searched, self._costs, self._outputs = {}, {}, {}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None and self._instrument is not None
        with stack:
            if kind is None:
                self._account(self._instrument.log.take(), last=True)

    def _opened_meter(self, stack: ExitStack) -> EnergyMeter:
        if self._meter_given is not None:
            return self._meter_given.open()
        devices = {p.device for p in self.model.parameters()}
        boards = [torch.cuda.get_device_properties(device) for device in devices if device.type == "cuda"]
        return stack.enter_context(EnergyMeter(devices=boards or "cpu"))

    def _after_forward(self) -> None:
        if self._auto_step is None:
            return
        log = self._opened("step").log
        # The first forward of a phase counts at once: a short generation would be over before it is held to anything.
        unknown = self.budget is not None and bool(log.phases - set(self._outputs))
        if len(log) >= self._auto_step or (unknown and self._held_against != "nothing"):
            self.step()

    def observe(self, batch_size: int, sequence_length: int) -> None:
        """Note the forward just made, where no hook runs: a model compiled whole, or a replayed CUDA graph.

        The decisions are copied on the device, because a graph writes the next ones over them.
        """
        self._opened("observe").note((batch_size, sequence_length), copy=True)

    # -- stepping -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Count what ran since the last step, control, and return plain numbers; waits for the device.

        Raises:
            TelemetryError: the session is not open.
        """
        instrument = self._opened("step")
        assert self._meter is not None
        counts = instrument.log.take()
        closed = self._account(counts)
        readings = {part.phase: part.reading() for part in closed} if self._held_against == "measured" else {}
        if self._held_against == "modelled":
            now_s, why = self._meter.clock.now_s(), self._no_sensor or "feedback is modelled"
            for phase in {count.phase for count in counts}:
                readings[phase] = modelled_reading(phase, counts, t_s=now_s, window_s=self._window_s, reason=why)
        for phase in PHASES:
            self._since_solved[phase] += any(count.phase == phase for count in counts)
            window = phase in readings and self._held_against == "measured"
            if window or phase not in self._outputs or self._since_solved[phase] >= self._solve_every:
                self._control(instrument, phase, readings.get(phase), WINDOW_SHARE if window else SEARCH_SHARE)
        instrument.push(self.prices)
        instrument.renew_clock()
        self.tally.steps += 1
        states = {phase: self.state_of(phase) for phase in PHASES}
        for phase in {count.phase for count in counts}:
            spent = self.tally.phases[phase].states
            spent[states[phase][0]] = spent.get(states[phase][0], 0) + 1
        self.metrics = step_metrics(
            counts,
            self.tally,
            prices=self.prices,
            states=states,
            targets_j={p: None if (o := self._outputs.get(p)) is None else o.cost_target_j for p in PHASES},
            sensors=self._meter.snapshot(),
            provenance_modelled=self._provenance_modelled,
            provenance_sensors=self._provenance_sensors,
            t_s=self._meter.clock.now_s(),
        )
        if self._on_step is not None:
            self._on_step(self.metrics)
        return self.metrics

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
            self.tally.note_step(counts, self._meter.clock.now_s(), self.prices, self._outputs)
            return []
        self._windows.add(counts)
        closed = self._windows.close(last=last)
        self.tally.note_windows(closed, self.prices, self._outputs)
        return closed

    def _control(self, instrument: Instrument, phase: Phase, reading: ControlReading | None, share: float) -> None:
        """Ask the controller what a phase may cost, and the solver for the price of that.

        Args:
            instrument: of the model.
            phase: of the work.
            reading: a new window of it, or ``None``.
            share: most time that searches for the price may take; the last price stays in force until then.
        """
        if self._held_against == "nothing" or self._meter is None:
            return
        clock, solver = self._meter.clock, instrument.solver
        began_s = clock.now_s()
        ended_s, took_s, rows = self._searched.get(phase, (began_s, 0.0, 0))
        searches = solver.rows(phase) >= 2 * rows or began_s - ended_s >= took_s * (1 / share - 1)
        costs = solver.cost_range(phase) if searches else self._costs.get(phase)
        if costs is None:
            return
        self._costs[phase] = costs
        # A reading of a price that could not follow its target yet would make the target run away from it.
        if reading is None or (reading.status == "valid" and not searches):
            output = self._controller.output(phase, costs)
        else:
            output = self._controller.update(reading, costs)
        self._outputs[phase] = output
        if searches:
            self._since_solved[phase] = 0
            if output.price is not None or output.cost_target_j is None:
                self.prices[phase] = output.price or 0.0
            else:
                self.prices[phase] = solver.price_for(phase, output.cost_target_j)
            # The first search compiles kernels; it says nothing of how long the next will take.
            took_s = clock.now_s() - began_s if phase in self._searched else 0.0
            self._searched[phase] = clock.now_s(), took_s, solver.rows(phase)

    def state_of(self, phase: Phase) -> tuple[str, str]:
        """Return the state of a phase and the reason, in a sentence."""
        if self.budget is None:
            fixed = f"; the price is fixed at {self.prices[phase]:.4g} nats/J" if self.prices[phase] else ""
            return "OFF", f"no budget{fixed}"
        if self._stack is not None and self._held_against == "nothing":
            return "OFF", f"no energy sensor, and feedback is measured: {self._no_sensor}"
        output = self._outputs.get(phase)
        return ("OFF", _NO_FORWARD) if output is None else (output.state, output.reason)

    # -- settings -----------------------------------------------------------------------------------------------------

    def set_budget(self, budget: _Given) -> None:
        """Hold another budget from now on.

        Raises:
            ConfigError: it is none; the error names what this machine and model can hold.
        """
        self.budget = self._parsed(budget)
        self._controller.set_budget(self.budget)
        if self._meter is not None:
            self.tally.budgets.append((self._meter.clock.now_s(), str(self.budget or "no budget")))
        self.prices, self._outputs = dict.fromkeys(PHASES, 0.0), {}
        if self._stack is not None and self._instrument is not None:
            for phase in PHASES:
                self._control(self._instrument, phase, None, share=1.0)
        self._push()

    def set_price(self, price: float, phase: Phase | None = None) -> None:
        """Fix the price, in nats per joule, of a phase or of both; for sweeps, and without a budget only.

        Raises:
            ConfigError: the price is no number of at least 0 that routers can hold, or there is a budget.
            UnknownNameError: no such phase.
        """
        if phase is not None and phase not in PHASES:
            raise UnknownNameError.of("phase", str(phase), PHASES, where="phase")
        is_number = isinstance(price, (int, float)) and not isinstance(price, bool)
        if self.budget is not None or not is_number or not 0 <= price < HIGHEST_PRICE:
            raise ConfigError(
                f"the price is to be {price!r}" + (f" beside the budget {self.budget}" if self.budget else ""),
                where="AdaptiveSession.set_price",
                accepted=f"nats per joule from 0 to {HIGHEST_PRICE:g}, in a session without a budget",
                fix="call set_budget(None) first" if self.budget else "use 0 for the baseline",
            )
        for name in PHASES if phase is None else (phase,):
            self.prices[name] = float(price)
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
        solver = None if self._instrument is None else self._instrument.solver
        return feasible_range(self.model, self._cost_model or CostModel.prior(), solver)

    def _opened(self, name: str) -> Instrument:
        if self._stack is None or self._instrument is None:
            raise TelemetryError(
                "the session is not open",
                where=f"AdaptiveSession.{name}",
                accepted="a session inside its with block",
                fix="write: with AdaptiveSession(model, budget=...) as session: ...",
            )
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
        return {
            "version": STATE_VERSION,
            "prices": dict(self.prices),
            "controller": self._controller.state_dict(),
            "tally": self.tally.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, the budget included.

        Raises:
            CheckpointError: it is of another version, or incomplete; nothing is changed then.
        """
        if state.get("version") != STATE_VERSION or not {"prices", "controller", "tally"} <= set(state):
            raise CheckpointError(
                f"a session state of version {state.get('version')!r} with {', '.join(map(str, state)) or 'nothing'}",
                where="AdaptiveSession.load_state_dict",
                accepted=f"what state_dict returned, version {STATE_VERSION}",
                fix="start afresh, without the state",
            )
        before = self._controller.state_dict()
        try:
            tally = Tally.from_state(state["tally"])
            prices: dict[Phase, float] = {phase: float(state["prices"][phase]) for phase in PHASES}
            if not all(0 <= price < HIGHEST_PRICE for price in prices.values()):
                raise ValueError(f"prices of {prices}")
            self._controller.load_state_dict(state["controller"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._controller.load_state_dict(before)
            raise CheckpointError(
                f"the session state cannot be taken up: {type(error).__name__}: {error}",
                where="AdaptiveSession.load_state_dict",
                accepted="what state_dict returned",
                fix="start afresh, without the state",
            ) from error
        self.tally, self.budget, self.prices, self._outputs = tally, self._controller.budget, prices, {}
        self._push()
