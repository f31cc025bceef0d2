"""The outer loop: after each window of the sensor it says what the routing may cost, so that a budget is held.

Limits in joules per token, watts and degrees each have a loop of their own (`loop.py`), one per phase; a temperature
limit lowers a power cap (`heat.py`). In the cascade the tightest target is applied and the other loops are kept close
above it; in the dual law the prices add up. A window that is flagged, short or without a reading moves nothing, and
after three windows' time, or a reading that cannot be true, the loop is stale: its target is held until two good ones.
The controller holds numbers only. It touches no sensor, no model and no tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from thermoe.adapt.budget import PHASES, Budget
from thermoe.adapt.control_settings import ControlSettings, Law
from thermoe.adapt.control_state import judge
from thermoe.adapt.heat import HeatLoop
from thermoe.adapt.loop import Loop
from thermoe.adapt.readings import ControlOutput, ControlReading, ControlState, CostRange, Limit, LoopReport
from thermoe.errors import CheckpointError, ConfigError

__all__ = ["BudgetController", "ControlOutput", "ControlReading", "ControlState", "CostRange", "LoopReport"]

#: A window shorter than this part of the nominal one has too few counter ticks.
SHORTEST_REL = 0.5
STATE_VERSION = 1
_Name = Literal["j_per_token", "power_w"]


class BudgetController:
    """Holds a budget by moving what the routing may cost.

    Args:
        budget: the limits; ``None`` holds none.
        law: ``cascade`` (a cost target) or ``dual`` (textbook dual ascent on a price, for comparison).
        delay_windows: whole windows from a decision to the first reading that shows it.
        options: the other fields of `ControlSettings`.

    Raises:
        ConfigError: an option is unknown or outside its range.
    """

    def __init__(self, budget: Budget | None, *, law: Law = "cascade", delay_windows: int = 2, **options: Any) -> None:
        unknown = sorted(set(options) - set(ControlSettings.__dataclass_fields__))
        if unknown:
            raise ConfigError(
                f"unknown option {unknown[0]!r}",
                where="BudgetController",
                accepted=", ".join(ControlSettings.__dataclass_fields__),
                fix="leave it out",
            )
        self.settings = ControlSettings(law=law, delay_windows=delay_windows, **options)
        self.budget: Budget | None = None
        self._loops: dict[tuple[_Name, str], Loop] = {}
        self._heat: HeatLoop | None = None
        self._modelled: dict[str, bool] = dict.fromkeys(PHASES, False)
        self._now_s: float | None = None
        self.set_budget(budget)

    @property
    def power_cap_w(self) -> float | None:
        """The power cap in force, in watts."""
        caps = (self.budget.power_w if self.budget else None, self._heat.cap_w if self._heat else None)
        return min((cap for cap in caps if cap is not None), default=None)

    def set_budget(self, budget: Budget | None) -> None:
        """Hold another budget from now on; what is known of the plant is kept, and targets move at once.

        `output` says what the new budget asks for before the next window ends.
        """
        self.budget = budget
        for phase in PHASES:
            self._set_limit("j_per_token", phase, None if budget is None else budget.j_per_token_of(phase))
        temp_c = None if budget is None else budget.temp_c
        if temp_c is None:
            self._heat = None
        elif self._heat is None:
            self._heat = HeatLoop(temp_c, self.settings.temp_margin_c)
        else:
            self._heat.limit_c = temp_c
        self._spread_power_cap()

    def _set_limit(self, name: _Name, phase: str, limit: float | None) -> None:
        loop = self._loops.get((name, phase))
        if limit is None:
            self._loops.pop((name, phase), None)
        elif loop is not None:
            loop.set_limit(limit / loop.scale)
        elif name == "j_per_token":
            self._loops[name, phase] = Loop(self.settings, limit, starts_at_limit=True)
        else:
            # In parts of the cap and of the cost at price 0, power answers cost with a slope of about 1.
            self._loops[name, phase] = Loop(self.settings, 1.0, scale=limit, starts_at_limit=False)

    def _spread_power_cap(self) -> None:
        for phase in PHASES:
            self._set_limit("power_w", phase, self.power_cap_w)

    def update(self, reading: ControlReading, cost_range: CostRange) -> ControlOutput:
        """Take one window of a phase and return what the next one may cost.

        Raises:
            ConfigError: the phase is unknown.
        """
        self._check_phase(reading.phase)
        self._now_s = reading.t_s
        trouble, corrupt = self._trouble_of(reading)
        power_w, temp_c = _sound(reading.power_w), _sound(reading.temp_c)
        if self._heat is not None and power_w is not None and temp_c is not None and self._fresh(reading):
            # Protection goes on in windows whose joules are in doubt.
            self._heat.update(reading.t_s, temp_c, power_w)
            self._spread_power_cap()
        self._modelled[reading.phase] = reading.status == "modelled"
        if not self._modelled[reading.phase]:
            for name in ("j_per_token", "power_w"):
                loop = self._loops.get((name, reading.phase))
                if loop is not None:
                    self._feed(loop, name, reading, cost_range, trouble, corrupt)
        return self.output(reading.phase, cost_range)

    def _feed(
        self, loop: Loop, name: _Name, reading: ControlReading, costs: CostRange, trouble: str | None, corrupt: bool
    ) -> None:
        value = getattr(reading, name)
        if trouble is None and value is None:
            trouble = reading.reason or f"no {'joules per token' if name == 'j_per_token' else 'power'} measured"
        elif trouble is None and _sound(value) is None:
            trouble, corrupt = f"{name} reads {value!r}", True
        if loop.admit(reading.t_s, reading.window_s, trouble, corrupt=corrupt):
            assert reading.cost_j is not None
            unit_j = self._unit_j(name, costs)
            if loop.slope.noise_rel_var is None and reading.rel_sd:
                loop.slope.noise_rel_sd = min(0.2, max(0.01, reading.rel_sd))
            loop.update(value / loop.scale, reading.cost_j / unit_j, costs.low_j / unit_j, costs.high_j / unit_j)

    @staticmethod
    def _unit_j(name: _Name, costs: CostRange) -> float:
        """Return the unit of cost of a loop: power goes by the part of the full cost, whatever the work is."""
        return 1.0 if name == "j_per_token" else costs.high_j

    def _fresh(self, reading: ControlReading) -> bool:
        return reading.age_s <= 3 * self.settings.period_s

    def _trouble_of(self, reading: ControlReading) -> tuple[str | None, bool]:
        """Return why a window cannot move any loop, and whether that makes them stale at once."""
        if reading.status == "invalid":
            return reading.reason or "the reading is invalid", True
        if not self._fresh(reading):
            return f"the newest sample is {reading.age_s:.3g} s old", True
        if reading.status == "flagged":
            return reading.reason or "the reading is flagged", False
        if not reading.window_s >= SHORTEST_REL * self.settings.period_s:
            return f"a window of {reading.window_s:.3g} s is too short", False
        if _sound(reading.cost_j) is None:
            return f"the modelled cost of the window is {reading.cost_j!r}", False
        return None, False

    def output(self, phase: str, cost_range: CostRange) -> ControlOutput:
        """Return what a phase may cost now: before the first window, or after a change of the budget.

        Raises:
            ConfigError: the phase is unknown.
        """
        self._check_phase(phase)
        loops: dict[Limit, Loop] = {}
        for name in ("j_per_token", "power_w"):
            loop = self._loops.get((name, phase))
            if loop is not None:
                unit_j = self._unit_j(name, cost_range)
                loop.see_range(cost_range.low_j / unit_j, cost_range.high_j / unit_j)
                loops[self._limit_name(name)] = loop
        modelled = self._modelled[phase]
        if modelled:
            loops = {name: loop for name, loop in loops.items() if name == "j_per_token"}
            for loop in loops.values():
                loop.target = min(loop.high, max(loop.low, loop.limit))
        if loops:
            states = {name: judge(loop, name, phase, modelled=modelled) for name, loop in loops.items()}
            output = self._combine(loops, states, cost_range)
            if modelled and (self._heat is not None or ("power_w", phase) in self._loops):
                output = replace(output, reason=f"{output.reason}; watts and degrees are not held without a sensor")
        else:
            state, reason = self._nothing_held(phase, modelled)
            output = ControlOutput(cost_target_j=None, state=state, reason=reason, price=self._price(0.0))
        if self._heat is not None and self._now_s is not None and self._heat.blind(self._now_s):
            cap_w = self._heat.cap_w
            last = f"its power cap of {cap_w:.4g} W is held" if cap_w else "it held nothing back when last seen"
            output = replace(output, state="STALE", reason=f"the temperature is not measured any more; {last}")
        return output

    def _nothing_held(self, phase: str, modelled: bool) -> tuple[ControlState, str]:
        if self.budget is None:
            return "OFF", "no budget"
        heat = self._heat
        if heat is not None and heat.seen_c is not None:
            return "SLACK", f"{heat.limit_c:.4g} C does not bind: {heat.seen_c:.4g} C at price 0"
        if heat is not None or (modelled and self.budget.power_w is not None):
            return "OFF", f"no sensor for what the budget limits at {phase}: {self.budget}"
        return "OFF", f"the budget does not limit {phase}: {self.budget}"

    def _limit_name(self, name: _Name) -> Limit:
        if name == "j_per_token":
            return name
        user_w = self.budget.power_w if self.budget else None
        return "power_w" if user_w is not None and user_w == self.power_cap_w else "temp_c"

    def _price(self, price: float) -> float | None:
        return price if self.settings.law == "dual" else None

    def _combine(
        self, loops: dict[Limit, Loop], states: dict[Limit, tuple[ControlState, str]], costs: CostRange
    ) -> ControlOutput:
        dual = self.settings.law == "dual"
        units = {name: self._unit_j("j_per_token" if name == "j_per_token" else "power_w", costs) for name in loops}
        able = {name: loop for name, loop in loops.items() if states[name][0] != "NO_AUTHORITY"}
        targets = {name: loop.asked * units[name] for name, loop in able.items() if loop.asked is not None}
        applied = min(targets.values(), default=None)
        binding: Limit | None = None
        if dual and able:
            binding = max(able.items(), key=lambda item: item[1].price)[0]
        elif applied is not None:
            tightest = [name for name, target_j in targets.items() if target_j <= applied * (1 + 1e-9)]
            binding = next((name for name in tightest if states[name][0] == "INFEASIBLE"), tightest[0])
            for name, loop in able.items():
                loop.active = name == binding and not (loop.at_floor or loop.at_ceiling)
                if name != binding and not loop.stale:
                    loop.wait_above(applied / units[name])
        reports = {name: self._report(loop, *states[name], units[name]) for name, loop in loops.items()}
        said = reports[binding] if binding is not None else next(iter(reports.values()))
        free = binding is None or able[binding].at_ceiling
        prices = math.fsum(loop.price for loop in able.values())
        return ControlOutput(
            cost_target_j=None if dual or free else applied,
            state=said.state,
            reason=said.reason,
            binding=None if free else binding,
            price=self._price(min(prices, self.settings.price_max or 0.0)),
            power_cap_w=self.power_cap_w,
            loops=reports,
        )

    def _report(self, loop: Loop, state: ControlState, reason: str, unit_j: float) -> LoopReport:
        asks = self.settings.law == "cascade" and not loop.at_ceiling and state != "NO_AUTHORITY"
        return LoopReport(
            state=state,
            reason=reason,
            limit=loop.limit * loop.scale,
            measured=loop.measured,
            cost_target_j=loop.asked * unit_j if asks and loop.asked is not None else None,
            price=self._price(loop.price),
            slope=loop.slope.value,
            gain=loop.gain,
        )

    @staticmethod
    def _check_phase(phase: str) -> None:
        if phase not in PHASES:
            raise ConfigError(
                f"unknown phase {phase!r}",
                where="ControlReading.phase",
                accepted=", ".join(PHASES),
                fix="use one of them",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything a later controller needs to go on bit by bit, as plain values that JSON keeps."""
        return {
            "version": STATE_VERSION,
            "law": self.settings.law,
            "budget": None if self.budget is None else self.budget.as_dict(),
            "loops": [[name, phase, loop.state_dict()] for (name, phase), loop in self._loops.items()],
            "heat": None if self._heat is None else self._heat.state_dict(),
            "modelled": dict(self._modelled),
            "now_s": self._now_s,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, the budget included.

        Raises:
            CheckpointError: the state is of another version or law, or incomplete; nothing is changed then.
        """
        fresh = BudgetController(None)
        fresh.settings = self.settings
        try:
            if state["version"] != STATE_VERSION or state["law"] != self.settings.law:
                raise CheckpointError(
                    f"a controller state of version {state['version']!r} and law {state['law']!r}",
                    where="BudgetController.load_state_dict",
                    accepted=f"version {STATE_VERSION}, law {self.settings.law!r}",
                    fix="make the controller with the law the state was saved with, or start afresh",
                )
            fresh.set_budget(None if state["budget"] is None else Budget.parse(state["budget"]))
            fresh._loops = {}
            for name, phase, saved in state["loops"]:
                loop = Loop(self.settings, 1.0, starts_at_limit=name == "j_per_token")
                loop.load_state_dict(saved)
                fresh._loops[name, phase] = loop
            if fresh._heat is not None:
                fresh._heat.load_state_dict(state["heat"])
            fresh._modelled = {phase: bool(state["modelled"][phase]) for phase in PHASES}
            fresh._now_s = state["now_s"]
        except (KeyError, TypeError, ValueError) as cause:
            raise CheckpointError(
                f"the controller state lacks {cause}",
                where="BudgetController.load_state_dict",
                accepted="what state_dict returned",
                fix="start afresh, without the state",
            ) from cause
        self.budget, self._loops, self._heat = fresh.budget, fresh._loops, fresh._heat
        self._modelled, self._now_s = fresh._modelled, fresh._now_s


def _sound(value: float | None) -> float | None:
    """Return a reading that can be true: finite and above 0."""
    return value if value is not None and 0 < value < math.inf else None
