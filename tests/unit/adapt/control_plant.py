"""A plant for the controller: a small routed model with prices, a board that answers late and noisily, a dull counter.

Eight experts of widths 1, 1/2 and 1/4 in three layers are chosen by benefit minus price times width, one to four a
token, so that C(price) is a real staircase. A decision reaches the routing `delay` windows later. Joules per token are
a static part that the model does not know, plus `slope` times the modelled cost.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from thermoe.adapt.budget import Budget
from thermoe.adapt.controller import BudgetController, ControlOutput, ControlReading, CostRange
from thermoe.telemetry.plant import Board, Plant, StepLoad

FULL_J = 0.05  # joules per token at price 0 with the plant in its first state
STATIC = 0.35
PERIOD_S = 2.0
TOKENS = 2000
WIDTHS = np.array([1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25])


class Routing:
    """Cost of the routing against its price, in parts of the cost at price 0 of the first state."""

    def __init__(self, sharpness: float = 1.0) -> None:
        draw = np.random.default_rng(1)
        prices = np.concatenate([[0.0], np.geomspace(1e-4, 10.0, 1200)])
        costs = np.zeros(len(prices))
        for _ in range(3):
            logits = sharpness * draw.normal(size=(256, 8))
            benefit = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            for position, price in enumerate(prices):
                surplus = -np.sort(-(benefit - price * WIDTHS), axis=1)
                order = np.argsort(-(benefit - price * WIDTHS), axis=1)[:, :4]
                chosen = surplus[:, :4] > 0
                chosen[:, 0] = True
                costs[position] += (WIDTHS[order] * chosen).sum() / 256
        self.prices, self.costs = prices, np.minimum.accumulate(costs)

    def price_for(self, cost: float) -> float:
        """The smallest price whose cost is at most ``cost``, the highest where there is none."""
        return float(np.interp(-cost, -self.costs, self.prices))

    def cost_at(self, price: float) -> float:
        return float(np.interp(price, self.prices, self.costs))


@cache
def routing(sharpness: float = 1.0) -> Routing:
    return Routing(sharpness)


@dataclass
class ControlPlant:
    """Runs windows against a controller.

    Attributes:
        controller: what is tested.
        delay: whole windows from a decision to the routing it changes.
        sensor_delay: whole windows by which the joules lag behind the cost reported with them.
        slope: true joules per modelled joule.
        level: factor on all joules, for a step of the plant.
        extra: further joules per token, in parts of the full ones, for a step that leaves the slope alone.
        noise: relative standard deviation of a window's joules.
        dropouts: part of the windows whose reading is missing.
        quantum_j: step of the energy counter.
        sharpness: of the router; the inner loop learns of a change one window late.
        fixed: only one routing is allowed.
    """

    controller: BudgetController
    phase: str = "decode"
    delay: int = 2
    sensor_delay: int = 0
    slope: float = 1.0
    level: float = 1.0
    extra: float = 0.0
    noise: float = 0.03
    dropouts: float = 0.0
    quantum_j: float = 0.05
    seed: int = 0
    sharpness: float = 1.0
    fixed: bool = False
    static: float = STATIC
    output: ControlOutput | None = None
    t_s: float = 0.0
    true_j: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    targets: list[float | None] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.known = self.sharpness
        self.counter_j = 0.0
        self.waiting: deque[ControlOutput] = deque()
        self.late: deque[float] = deque()
        self.price = 0.0
        self.unit_j = FULL_J * (1 - STATIC) / float(routing().costs[0]) / abs(self.slope or 1.0)
        self.model_slope = self.slope

    def cost_range(self) -> CostRange:
        costs = routing(self.known).costs
        low, high = float(costs[-1]), float(costs[0])
        return CostRange(low_j=self.unit_j * (high if self.fixed else low), high_j=self.unit_j * high)

    def joules(self, cost_j: float) -> float:
        return self.level * (FULL_J * (self.static + self.extra) + self.model_slope * cost_j)

    @property
    def range_j(self) -> tuple[float, float]:
        """True joules per token at the highest price and at price 0."""
        costs = routing(self.sharpness).costs
        return self.joules(self.unit_j * costs[-1]), self.joules(self.unit_j * costs[0])

    def start(self) -> None:
        """Apply what the controller says before the first window."""
        self.output = self.controller.output(self.phase, self.cost_range())

    def step(self, **changes: object) -> ControlOutput:
        """Run one window; ``changes`` overwrite fields of its reading."""
        if self.output is not None:
            self.waiting.append(self.output)
        if len(self.waiting) > self.delay:
            acted = self.waiting.popleft()
            inverse = routing(self.known)  # the reservoir of the inner loop is one window old
            if acted.price is not None:
                self.price = acted.price
            elif acted.cost_target_j is None:
                self.price = 0.0
            else:
                self.price = inverse.price_for(acted.cost_target_j / self.unit_j)
        self.known = self.sharpness
        cost_j = self.unit_j * routing(self.sharpness).cost_at(0.0 if self.fixed else self.price)
        true_j = self.joules(cost_j)
        self.late.append(true_j)
        seen_j = self.late.popleft() if len(self.late) > self.sensor_delay else true_j
        before_j = math.floor(self.counter_j / self.quantum_j) * self.quantum_j if self.quantum_j else self.counter_j
        self.counter_j += seen_j * TOKENS * (1 + self.noise * self.draw.gauss(0, 1))
        after_j = math.floor(self.counter_j / self.quantum_j) * self.quantum_j if self.quantum_j else self.counter_j
        self.t_s += PERIOD_S
        fields: dict = {
            "phase": self.phase,
            "t_s": self.t_s,
            "window_s": PERIOD_S,
            "tokens": TOKENS,
            "j_per_token": (after_j - before_j) / TOKENS,
            "power_w": (after_j - before_j) / PERIOD_S,
            "cost_j": cost_j,
        }
        if self.draw.random() < self.dropouts:
            fields |= {"j_per_token": None, "power_w": None}
        self.output = self.controller.update(ControlReading(**(fields | changes)), self.cost_range())
        self.true_j.append(true_j)
        self.costs.append(cost_j)
        self.targets.append(self.output.cost_target_j)
        self.states.append(self.output.state)
        return self.output

    def run(self, windows: int) -> None:
        for _ in range(windows):
            self.step()

    def settled(self, limit: float, since: int, *, within: float = 0.05, hold: int = 10) -> int | None:
        """Windows from ``since`` until the true joules stay inside for ``hold`` windows; ``None`` if they never do."""
        inside = [abs(j - limit) <= within * limit for j in self.true_j[since:]]
        for position in range(len(inside) - hold + 1):
            if all(inside[position : position + hold]):
                return position
        return None


def tracking(windows: int = 30, part: float = 0.7, **fields: Any) -> ControlPlant:
    """A plant that has held ``part`` of its full joules for some windows."""
    plant = ControlPlant(BudgetController(Budget(j_per_token=part * FULL_J)), **fields)
    plant.start()
    plant.run(windows)
    return plant


class BoardPlant:
    """The same routing on the simulated board of `thermoe.telemetry`, with its heat, its noise and its counter.

    Work draws `rate` tokens a second times the modelled cost on top of the board's power at rest; a decision reaches
    the routing in the next window.
    """

    FULL_COST_J = 0.04

    def __init__(self, budget: Budget, *, rate: float = 12_500, seed: int = 0, **options: object) -> None:
        self.controller = BudgetController(budget, **options)
        self.load = StepLoad()
        self.board = Plant(0.0, self.load, board=Board(), seed=seed)
        self.rate = rate
        self.unit_j = self.FULL_COST_J / float(routing().costs[0])
        self.range = CostRange(low_j=self.unit_j * float(routing().costs[-1]), high_j=self.FULL_COST_J)
        self.output = self.controller.output("decode", self.range)
        self.t_s, self.energy_j = 0.0, self.board.sensors.energy_j
        self.power_w: list[float] = []
        self.temp_c: list[float] = []
        self.cost: list[float] = []  # in parts of the cost at price 0
        self.outputs: list[ControlOutput] = []

    def set_budget(self, budget: Budget) -> None:
        self.controller.set_budget(budget)
        self.output = self.controller.output("decode", self.range)

    def run(self, windows: int, **changes: object) -> None:
        for _ in range(windows):
            target_j = self.output.cost_target_j
            price = 0.0 if target_j is None else routing().price_for(target_j / self.unit_j)
            cost_j = self.unit_j * routing().cost_at(price)
            self.load.set(self.t_s, self.rate * cost_j)
            self.t_s += PERIOD_S
            self.board.advance(self.t_s)
            used_j, self.energy_j = self.board.sensors.energy_j - self.energy_j, self.board.sensors.energy_j
            fields: dict = {
                "phase": "decode",
                "t_s": self.t_s,
                "window_s": PERIOD_S,
                "tokens": self.rate * PERIOD_S,
                "j_per_token": used_j / (self.rate * PERIOD_S),
                "power_w": used_j / PERIOD_S,
                "temp_c": float(math.floor(self.board.die_c)),
                "cost_j": cost_j,
            }
            self.output = self.controller.update(ControlReading(**(fields | changes)), self.range)
            self.power_w.append(used_j / PERIOD_S)
            self.temp_c.append(self.board.die_c)
            self.cost.append(cost_j / self.FULL_COST_J)
            self.outputs.append(self.output)
