"""Prices in force, and why: asks the controller what a phase may cost, and searches for the price of that.

A search takes time, so it waits its turn: no more than a share of the time goes into searches, and in between the last
price stays in force. A budget is for the routing and for learning together: the controller is told the sum, and the
routing gets what the levy of learning leaves of its target (`learning_levy.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from thermoe.adapt.budget import PHASES, Budget, Phase
from thermoe.adapt.controller import BudgetController
from thermoe.adapt.learning_levy import LearningLevy, ServedStep
from thermoe.adapt.price import PriceSolver
from thermoe.adapt.readings import ControlOutput, ControlReading, CostRange
from thermoe.adapt.steps import ForwardCount
from thermoe.errors import ConfigError, UnknownNameError
from thermoe.telemetry.clock import Clock

#: Most time that searches for the price may take: those after a window, and those in between.
WINDOW_SHARE, SEARCH_SHARE = 0.25, 0.05
#: Nats per joule; times the joules of a token-expert pair it stays far below what float32 holds.
HIGHEST_PRICE = 1e30


class PriceHolder:
    """Holds the prices of both phases.

    Args:
        controller: knows the budget.

    Attributes:
        prices: nats per joule in force, by phase.
        outputs: what the controller said last, for each phase it was asked about.
        levy: what learning has spent and the routing has not paid back yet.
        levied_j: J/token that the prices in force leave to learning, by phase.
    """

    def __init__(self, controller: BudgetController) -> None:
        self._controller = controller
        self.prices: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.outputs: dict[Phase, ControlOutput] = {}
        self.levy = LearningLevy()
        self.levied_j: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._since_solved: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        #: When the last search of a phase ended, how long it took, and the rows it had.
        self._searched: dict[Phase, tuple[float, float, int]] = {}
        #: When the first search of a phase was done.
        self._ready_s: dict[Phase, float] = {}
        self._costs: dict[Phase, CostRange] = {}

    @property
    def budget(self) -> Budget | None:
        """What is held."""
        return self._controller.budget

    def begin(self) -> None:
        """Forget what was known of the model; prices stay."""
        self._searched, self._ready_s, self._costs, self.outputs = {}, {}, {}, {}

    def note_step(self, counts: Sequence[ForwardCount], learning_j: Mapping[Phase, float]) -> None:
        """Note what was served, and what learning falls on it, by phase, where the budget limits joules per token."""
        parts = {}
        for phase in PHASES:
            own = [count for count in counts if count.phase == phase]
            tokens = sum(count.tokens for count in own)
            if tokens and self.budget is not None and self.budget.j_per_token_of(phase) is not None:
                parts[phase] = ServedStep(
                    tokens=tokens,
                    served_j=sum(count.energy_j for count in own),
                    learning_j=learning_j[phase],
                    levied_j=self.levied_j[phase],
                )
        self.levy.note(parts)

    def due(self, phase: Phase, *, ran: bool, solve_every: int) -> bool:
        """Count a step in which a phase ``ran`` or not, and return whether it is time to ask about its price again."""
        self._since_solved[phase] += ran
        return phase not in self.outputs or self._since_solved[phase] >= solve_every

    def ask(
        self,
        solver: PriceSolver,
        clock: Clock,
        phase: Phase,
        reading: ControlReading | None,
        share: float,
        *,
        modelled: bool,
    ) -> None:
        """Ask the controller what a phase may cost, and the solver for the price of that.

        Args:
            solver: of the model.
            clock: times the searches.
            phase: of the work.
            reading: a new window of it, or ``None``.
            share: most time that searches for the price may take; the last price stays in force until then.
            modelled: the budget is held against modelled joules.
        """
        began_s = clock.now_s()
        ended_s, took_s, rows = self._searched.get(phase, (began_s, 0.0, 0))
        searches = solver.rows(phase) >= 2 * rows or began_s - ended_s >= took_s * (1 / share - 1)
        costs = solver.cost_range(phase) if searches else self._costs.get(phase)
        if costs is None:
            return
        self._costs[phase] = costs
        limited = self.budget is not None and self.budget.j_per_token_of(phase) is not None
        levy_j = (self.levy.of(phase) if searches else self.levied_j[phase]) if limited else 0.0
        whole = CostRange(low_j=costs.low_j + levy_j, high_j=costs.high_j + levy_j)
        # A reading of a price that could not follow its target yet would make the target run away from it.
        # In one that the first search fell into, the device waited for the host to compile.
        began_ready = reading is not None and reading.t_s - reading.window_s >= self._ready_s.get(phase, began_s)
        if reading is None or (reading.status == "valid" and not (searches and began_ready)):
            output = self._controller.output(phase, whole)
        else:
            output = self._controller.update(reading, whole)
        output = self._with_learning(output, phase, levy_j, whole, modelled)
        self.outputs[phase] = output
        if searches:
            self._since_solved[phase], self.levied_j[phase] = 0, levy_j
            if output.price is not None or output.cost_target_j is None:
                self.prices[phase] = output.price or 0.0
            else:
                self.prices[phase] = solver.price_for(phase, output.cost_target_j - levy_j)
            # The first search compiles kernels; it says nothing of how long the next will take.
            took_s = clock.now_s() - began_s if phase in self._searched else 0.0
            self._searched[phase] = clock.now_s(), took_s, solver.rows(phase)
            self._ready_s.setdefault(phase, clock.now_s())

    def _with_learning(
        self, output: ControlOutput, phase: Phase, levy_j: float, whole: CostRange, modelled: bool
    ) -> ControlOutput:
        """Say what part of the budget learning has."""
        limit_j = None if self.budget is None else self.budget.j_per_token_of(phase)
        if levy_j <= 0 or limit_j is None:
            return output
        if modelled and levy_j >= limit_j:
            reason = (
                f"learning alone is modelled at {levy_j:.4g} J/token at {phase}, above {limit_j:.4g} J/token; the "
                "cheapest allowed routing is held"
            )
            return replace(output, state="INFEASIBLE", reason=reason, cost_target_j=whole.low_j)
        return replace(output, reason=f"{output.reason}; {levy_j:.4g} J/token of it is left to learning")

    def set_budget(self, budget: Budget | None) -> None:
        """Hold another budget; prices begin at 0 until it is asked about them."""
        self._controller.set_budget(budget)
        self.prices, self.levied_j = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self.outputs = {}

    def set_price(self, price: float, phase: Phase | None = None) -> None:
        """Fix the price, in nats per joule, of a phase or of both.

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

    def state_dict(self) -> dict[str, Any]:
        """Return the prices and what the controller knows, as plain values."""
        return {
            "prices": dict(self.prices),
            "levied_j": dict(self.levied_j),
            "levy": self.levy.state_dict(),
            "controller": self._controller.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, the budget included; nothing is changed when it cannot be.

        Raises:
            CheckpointError, KeyError, TypeError, ValueError or AttributeError: it is damaged.
        """
        prices: dict[Phase, float] = {phase: float(state["prices"][phase]) for phase in PHASES}
        if not all(0 <= price < HIGHEST_PRICE for price in prices.values()):
            raise ValueError(f"prices of {prices}")
        levied_j: dict[Phase, float] = {phase: float(state["levied_j"][phase]) for phase in PHASES}
        levy = LearningLevy.from_state(state["levy"])
        self._controller.load_state_dict(state["controller"])
        self.prices, self.levied_j, self.levy, self.outputs = prices, levied_j, levy, {}
