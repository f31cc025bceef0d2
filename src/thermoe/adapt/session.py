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

With ``learn=True`` the routers learn from what is read (`test_time.py`), and the joules of that are inside the joules
per token, always: the budget is for the sum.

A model runs one forward at a time, as any module with a state does. Steps, changes of the budget and reports may come
from another thread than the forwards: they wait for one another, and a forward waits for none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from thermoe.adapt import session_arguments as arguments
from thermoe.adapt.budget import PHASES, Budget, Phase
from thermoe.adapt.controller import BudgetController
from thermoe.adapt.instrument import Instrument
from thermoe.adapt.price import feasible_range
from thermoe.adapt.price_holder import PriceHolder
from thermoe.adapt.sensing import sensed_range
from thermoe.adapt.session_arguments import Feedback, check_session_arguments, check_shape
from thermoe.adapt.session_learning import Learn
from thermoe.adapt.session_loop import SessionLoop, state_of
from thermoe.adapt.session_state import STATE_VERSION, take_up
from thermoe.adapt.tally import Tally, text_report
from thermoe.adapt.test_time import AdaptStep, RouterAdapter
from thermoe.energy.cost_model import CostModel
from thermoe.energy.read_cost import ReadCost, checked_read_cost
from thermoe.errors import ConfigError
from thermoe.telemetry.meter import EnergyMeter

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
        read_cost: what a byte of expert weights costs where dtype and shape do not show it, by name of a layer; see
            `ModelWork.of`. Modelled joules, routers and learning all count with it.
        feedback: "measured" corrects the model by the sensor; "modelled" holds the budget against modelled joules on
            purpose; "auto" is the first where there is a sensor, else the second, and the reason says which.
        window_s: length of a window of the sensor, in seconds; at least two periods of the sampler.
        auto_step: take a step after so many forwards, for work that leaves no room for one, such as `generate`.
        on_step: called with the metrics of each step; it may do anything but step.
        solve_every: steps from one search for the price to the next; a new window or budget searches at once. Where
            a search is slow it waits, so that searches take no more than 5 % of the time, or 25 % after windows.
        router: options of the priced routers that are put in, such as ``{"k_min": 2}``; their benefit is "distortion",
            with a weight of 4 on a token's favourites.
        control: options of `BudgetController`, such as ``{"law": "dual", "price_max": 5.0}``.
        learn: True for a `RouterAdapter` of the session's own, or its options; an adapter that is open on the model
            already is taken in and left open. What was learned goes when the session is left, and comes back with its
            state.

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
        read_cost: ReadCost | None = None,
        feedback: Feedback = "auto",
        window_s: float = 2.0,
        auto_step: int | None = None,
        on_step: Callable[[dict[str, Any]], object] | None = None,
        solve_every: int = 8,
        router: Mapping[str, Any] | None = None,
        control: Mapping[str, Any] | None = None,
        learn: Learn = None,
    ) -> None:
        check_session_arguments(
            model,
            meter=meter,
            cost_model=cost_model,
            read_cost=read_cost,
            feedback=feedback,
            window_s=window_s,
            auto_step=auto_step,
            on_step=on_step,
            solve_every=solve_every,
            router=router,
            control=control,
            learn=learn,
        )
        self.model = model
        self._cost_model, self._read_cost = cost_model, checked_read_cost(read_cost)
        self._instrument: Instrument | None = None
        self._loop: SessionLoop | None = None
        self._meter_given, self._meter = meter, meter
        parsed = self._parsed(budget)
        settings = {"period_s": window_s, "delay_windows": DELAY_WINDOWS, **(control or {})}
        self._holder = PriceHolder(BudgetController(parsed, **settings))
        self._provenance_modelled, self._cost_reason = "estimated", "not chosen yet"
        self._feedback: Feedback = feedback
        self._window_s, self._auto_step, self._on_step, self._solve_every = window_s, auto_step, on_step, solve_every
        self._router_options = dict(router or {})
        self.metrics: dict[str, Any] = {}
        self.tally = Tally()
        self._learn: Learn = learn if learn is not False else None
        #: What an adapter of the session's own knows while the session is not open.
        self._learned: Mapping[str, Any] | None = None
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
                raise arguments.open_already()
            loop = SessionLoop.opened(
                stack,
                self.model,
                meter=self._meter_given,
                cost_model=self._cost_model,
                read_cost=self._read_cost,
                router=self._router_options,
                after_forward=self._after_forward,
                holder=self._holder,
                tally=self.tally,
                learn=self._learn,
                learned=self._learned,
                feedback=self._feedback,
                window_s=self._window_s,
                solve_every=self._solve_every,
            )
            self._loop, self._instrument, self._meter = loop, loop.instrument, loop.sensing.meter
            self._provenance_modelled, self._cost_reason = loop.provenance_modelled, loop.cost_reason
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            loop, stack = self._opened("__exit__"), self._stack
            assert stack is not None
            try:
                with stack:
                    if kind is None:
                        loop.account(loop.instrument.take(), last=True)
                    if loop.learning is not None and not isinstance(self._learn, RouterAdapter):
                        self._learned = loop.learning.state_dict()
            finally:
                self._loop = self._stack = None

    def _after_forward(self) -> None:
        # What runs inside on_step, or while another thread is at a step, is noted and waits for the next one.
        if self._auto_step is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self._stepping or self._loop is None:
                return
            log = self._loop.instrument.log
            # The first forward of a phase counts at once: a short generation would be over before it is held to
            # anything.
            unknown = self.budget is not None and bool(log.phases - set(self._holder.outputs))
            if len(log) >= self._auto_step or (unknown and self._loop.held_against != "nothing"):
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
        self._opened("observe").instrument.note(check_shape(batch_size, sequence_length), copy=True)

    # -- stepping -----------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Any]:
        """Count what ran since the last step, control, and return plain numbers; waits for the device.

        Raises:
            TelemetryError: the session is not open, or this is the ``on_step`` of another step.
        """
        with self._lock:
            loop = self._opened("step")
            self._enter_step("step")
            try:
                self.metrics = loop.step()
                if self._on_step is not None:
                    self._on_step(self.metrics)
            finally:
                self._stepping = False
            return self.metrics

    def _enter_step(self, name: str) -> None:
        if self._stepping:
            raise arguments.inside_on_step(name)
        self._stepping = True

    def read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        served: bool = True,
    ) -> AdaptStep:
        """Score int64 (B, S) token ids, learn from them as far as the bucket allows, and take a step.

        A stream is read batch by batch, and its scores are the service. A prompt that `generate` is to go on from is
        read before it with ``served=False``: generate reads it once more, with the routers that have learned from it,
        and only there its tokens are counted; all joules of reading it here are those of learning.

        Args:
            input_ids: the batch.
            attention_mask: (B, S), 0 or false at padding.
            weights: float (B, S) of at least 0, what a predicted token counts in learning; see `RouterAdapter`.
            served: count the scoring as served tokens.

        Returns:
            The scores, of before anything was learned from these tokens, and what learning did.

        Raises:
            TelemetryError: the session is not open, or this is ``on_step``.
            ConfigError: it does not learn, or the token ids are none.
        """
        with self._lock:
            loop = self._opened("read")
            if loop.learning is None:
                raise arguments.not_learning()
            self._enter_step("read")
            try:  # a step between a forward and what is learned from it would be half of one
                found = loop.learning.read(
                    loop.instrument, input_ids, attention_mask=attention_mask, weights=weights, served=served
                )
            finally:
                self._stepping = False
            self.step()
            return found

    @property
    def adapter(self) -> RouterAdapter | None:
        """What learns; ``None`` where nothing does, and outside of the session if the adapter is its own."""
        if isinstance(self._learn, RouterAdapter):
            return self._learn
        return None if self._loop is None or self._loop.learning is None else self._loop.learning.adapter

    @property
    def pending(self) -> int:
        """Forwards that the next step will count."""
        return len(self._opened("pending").instrument.log)

    def state_of(self, phase: Phase) -> tuple[str, str]:
        """Return the state of a phase and the reason, in a sentence."""
        return state_of(self._holder, phase) if self._loop is None else self._loop.state_of(phase)

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
            if self._loop is not None:
                for phase in PHASES:
                    self._loop.ask(phase, None, 1.0)
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
            meter = self._meter_given if self._loop is None else self._meter
            told = {"j_per_token": self.feasible(), **sensed_range(meter, self.model)}
            return Budget.parse(budget, feasible={name: words for name, words in told.items() if words is not None})

    def _push(self) -> None:
        if self._loop is not None:
            self._loop.instrument.push(self.prices)

    def feasible(self) -> str | None:
        """Return in words what this model can be held to, in J/token by the cost model; ``None`` where it cannot."""
        cost = self._cost_model or CostModel.prior()
        if self._instrument is None:
            return feasible_range(self.model, cost, None, self._read_cost)
        with self._instrument.searching:
            return feasible_range(self.model, cost, self._instrument.solver)

    def _opened(self, name: str) -> SessionLoop:
        if self._loop is None:
            raise arguments.not_open(name)
        return self._loop

    # -- what is left ------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Return what happened so far, for people."""
        with self._lock:
            return text_report(
                self.tally,
                budget=None if self.budget is None else str(self.budget),
                prices=self.prices,
                states={phase: self.state_of(phase) for phase in PHASES},
                cost_model=self._cost_reason,
                provenance_modelled=self._provenance_modelled,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return prices, controller, budget and totals as plain values; `load_state_dict` goes on from there.

        With what was learned, where something learns: tensors, under "adapter".
        """
        with self._lock:
            state = {"version": STATE_VERSION, **self._holder.state_dict(), "tally": self.tally.state_dict()}
            learned = self._learned if self.adapter is None else self.adapter.state_dict()
            return state if learned is None else {**state, "adapter": learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, the budget included.

        Raises:
            CheckpointError: it is of another version, or incomplete; nothing is changed then.
        """

        def take(state: Mapping[str, Any]) -> None:
            tally, learned, before = Tally.from_state(state["tally"]), state.get("adapter"), self._holder.state_dict()
            if learned is not None and self._learn is None:
                raise ValueError("it holds what was learned, and this session does not learn (learn=True)")
            self._holder.load_state_dict(state)
            try:
                if learned is not None and self._loop is not None and self._loop.learning is not None:
                    self._loop.learning.load(learned)
                elif learned is not None and self.adapter is not None:
                    self.adapter.load_state_dict(learned)
                else:
                    self._learned = learned
            except BaseException:
                self._holder.load_state_dict(before)
                raise
            self.tally = tally
            if self._loop is not None:
                self._loop.tally = tally

        with self._lock:
            take_up(state, take)
            self._push()
