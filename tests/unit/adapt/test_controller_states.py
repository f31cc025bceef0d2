"""Every state is reached when it should be, says why, and holds what it promises; a saved state goes on bit by bit."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from typing import Any

import pytest
from control_plant import FULL_J, BoardPlant, ControlPlant, tracking

from thermoe.adapt.budget import Budget
from thermoe.adapt.controller import BudgetController, ControlReading, CostRange
from thermoe.errors import CheckpointError, ConfigError

COSTS = CostRange(low_j=0.01, high_j=0.05)
BUDGET = Budget(j_per_token=0.03)


def _reading(window: int, j: float | None = 0.03, cost_j: float | None = 0.03, **changes: Any) -> ControlReading:
    fields: dict[str, Any] = {
        "phase": "decode",
        "t_s": 2.0 * (window + 1),
        "window_s": 2.0,
        "tokens": 100,
        "j_per_token": j,
        "cost_j": cost_j,
    }
    return ControlReading(**(fields | changes))


# OFF, the start, SLACK, INFEASIBLE


def test_no_budget_is_off_and_runs_at_price_0() -> None:
    output = BudgetController(None).update(_reading(0), COSTS)
    assert (output.state, output.cost_target_j, output.binding, output.reason) == ("OFF", None, None, "no budget")


def test_a_phase_without_a_limit_is_off() -> None:
    controller = BudgetController(Budget(j_per_token={"prefill": 0.03}))
    output = controller.update(_reading(0), COSTS)
    assert output.state == "OFF" and "does not limit decode" in output.reason
    assert controller.output("prefill", COSTS).cost_target_j == 0.03


def test_before_the_first_window_the_model_says_what_may_be_spent() -> None:
    output = BudgetController(BUDGET).output("decode", COSTS)
    assert (output.state, output.cost_target_j, output.binding) == ("TRACKING", 0.03, "j_per_token")
    assert output.reason == "0.03 J/token at decode is held by the model alone, waiting for the first window"


def test_a_budget_above_the_joules_of_price_0_is_slack() -> None:
    plant = tracking(part=1.3)
    assert set(plant.states) <= {"TRACKING", "SLACK"} and plant.states[-20:] == ["SLACK"] * 20
    assert plant.targets[-20:] == [None] * 20
    assert plant.output is not None and plant.output.binding is None and "does not bind" in plant.output.reason


def test_a_budget_below_the_floor_is_infeasible_after_the_readings_show_it() -> None:
    plant = tracking(part=0.3, windows=40)
    first = plant.states.index("INFEASIBLE")
    assert plant.costs[first] == pytest.approx(plant.cost_range().low_j)
    assert plant.states[first:].count("INFEASIBLE") == len(plant.states) - first and first <= 15
    assert plant.output is not None and plant.output.cost_target_j == plant.cost_range().low_j


# NO_AUTHORITY (T11)


def test_a_routing_with_one_cost_has_no_authority() -> None:
    """k_min = k_max and no opening cost: there is nothing to choose."""
    plant = tracking(fixed=True, windows=40)
    assert plant.states == ["NO_AUTHORITY"] * 40 and plant.targets == [None] * 40
    assert plant.output is not None and "only one cost" in plant.output.reason
    plant.fixed = False  # a router with a choice is put in
    plant.run(60)
    assert plant.states[-1] == "TRACKING"
    assert plant.true_j[-1] == pytest.approx(0.7 * FULL_J, rel=0.05)


@pytest.mark.parametrize(("slope", "says"), [(0.0, "does not change"), (-1.0, "raises")])
@pytest.mark.parametrize("seed", range(12))
def test_joules_that_do_not_follow_the_cost_end_at_price_0(slope: float, says: str, seed: int) -> None:
    plant = ControlPlant(BudgetController(Budget(j_per_token=0.7 * FULL_J)), seed=seed)
    plant.model_slope, plant.static = slope, 1.0 - slope * 0.65
    plant.start()
    plant.run(40)
    first = plant.states.index("NO_AUTHORITY")
    assert first <= 20
    since = plant.states[first:]
    assert since.count("NO_AUTHORITY") == len(since) and plant.targets[first:] == [None] * len(since)
    assert plant.output is not None and "a lower modelled cost " in plant.output.reason
    if slope < 0:
        assert says in plant.output.reason


def test_a_loop_that_gave_up_tries_again_when_the_plant_has_changed() -> None:
    plant = ControlPlant(BudgetController(Budget(j_per_token=0.7 * FULL_J)), seed=1)
    plant.model_slope, plant.static = 0.0, 1.0
    plant.start()
    plant.run(40)
    assert plant.states[-1] == "NO_AUTHORITY"
    plant.model_slope, plant.static = 1.0, 0.6
    plant.run(60)
    assert plant.states[-1] == "TRACKING"
    assert plant.true_j[-1] == pytest.approx(0.7 * FULL_J, rel=0.05)


def test_evidence_of_no_authority_fades_in_minutes() -> None:
    plant = ControlPlant(BudgetController(Budget(j_per_token=0.7 * FULL_J)), seed=1)
    plant.model_slope, plant.static = 0.0, 1.0
    plant.start()
    plant.run(600)
    first = plant.states.index("NO_AUTHORITY")
    again = next(i for i in range(first, 600) if plant.states[i] != "NO_AUTHORITY")
    assert 30 <= again - first <= 450
    assert "NO_AUTHORITY" in plant.states[again:]


@pytest.mark.parametrize("fields", [{}, {"delay": 1, "sensor_delay": 1}, {"delay": 0, "sensor_delay": 2}])
@pytest.mark.parametrize("seed", range(6))
def test_authority_is_not_lost_to_steps_drift_or_a_late_sensor(fields: dict[str, int], seed: int) -> None:
    """A loop that regulates keeps the joules constant while the cost moves; that must not look like no authority."""
    plant = ControlPlant(BudgetController(Budget(j_per_token=0.9 * FULL_J)), seed=seed, **fields)
    plant.start()
    plant.run(40)
    for part, level in ((0.6, 1.0), (0.6, 1.3), (0.9, 1.3), (0.5, 0.8), (0.8, 1.2)):
        plant.controller.set_budget(Budget(j_per_token=part * FULL_J))
        plant.level = level
        plant.start()
        plant.run(40)
    for window in range(200):
        plant.level = 1.2 + 0.3 * math.sin(window / 20)
        plant.step()
    assert "NO_AUTHORITY" not in plant.states


# STALE and hold (T10)

CORRUPT: dict[str, dict[str, Any]] = {
    "counter reset": {"status": "invalid", "reason": "the counter went backwards", "j_per_token": None},
    "stale sample": {"age_s": 6.5},
    "negative joules": {"j_per_token": -0.4},
    "no joules at all": {"j_per_token": 0.0},
    "not a number": {"j_per_token": math.nan},
    "infinite": {"j_per_token": math.inf},
}
MISSING: dict[str, dict[str, Any]] = {
    "no reading": {"j_per_token": None},
    "flagged": {"status": "flagged", "reason": "another process used the device", "j_per_token": 9.0},
    "short": {"window_s": 0.4, "j_per_token": 9.0},
    "unknown work": {"cost_j": None, "j_per_token": 9.0},
    "odd work": {"cost_j": math.nan, "j_per_token": 9.0},
}


@pytest.mark.parametrize("fault", CORRUPT)
def test_a_reading_that_cannot_be_true_makes_the_loop_stale_and_moves_nothing(fault: str) -> None:
    plant = tracking()
    held = plant.targets[-1]
    for _ in range(5):
        output = plant.step(**CORRUPT[fault])
        assert (output.state, output.cost_target_j) == ("STALE", held)
        assert output.reason.endswith("the last target at decode is held")
    first = plant.step()
    assert (first.state, first.cost_target_j) == ("STALE", held)
    second = plant.step()
    assert second.state == "TRACKING"
    span_j = plant.cost_range().high_j - plant.cost_range().low_j
    assert held is not None and second.cost_target_j is not None
    assert abs(second.cost_target_j - held) <= 0.1 * span_j


@pytest.mark.parametrize("fault", MISSING)
def test_a_window_without_a_usable_reading_holds_and_is_stale_after_three(fault: str) -> None:
    plant = tracking()
    held = plant.targets[-1]
    states = []
    for _ in range(5):
        window_s = MISSING[fault].get("window_s", 2.0)
        output = plant.step(**MISSING[fault])
        states.append(output.state)
        assert output.cost_target_j == held
        if window_s == 2.0 and output.state == "TRACKING":
            assert "(held: " in output.reason
    assert states[:2] == ["TRACKING", "TRACKING"] and states[-1] == "STALE"
    if MISSING[fault].get("window_s", 2.0) == 2.0:
        assert states == ["TRACKING"] * 2 + ["STALE"] * 3
    single = tracking()
    single.step(**MISSING[fault])
    single.step()
    assert single.states[-2:] == ["TRACKING", "TRACKING"]


def test_a_bad_run_leaves_no_trace_in_the_target() -> None:
    plant = tracking(noise=0.0, quantum_j=0.0, windows=80)
    before = plant.true_j[-1]
    for fault in itertools.chain(CORRUPT.values(), MISSING.values()):
        plant.step(**fault)
    plant.run(20)
    assert plant.states[-1] == "TRACKING"
    assert max(abs(j - before) for j in plant.true_j[80:]) < 2e-3 * before


def test_a_stale_loop_keeps_its_target_while_the_range_narrows_and_widens_again() -> None:
    controller = BudgetController(BUDGET)
    for window in range(10):
        controller.update(_reading(window), COSTS)
    lost = {"status": "invalid", "reason": "device lost", "j": None}
    bad = controller.update(_reading(10, **lost), COSTS)
    assert bad.state == "STALE" and bad.reason.startswith("device lost") and bad.cost_target_j == pytest.approx(0.03)
    narrow = controller.update(_reading(11, **lost), CostRange(low_j=0.01, high_j=0.02))
    assert narrow.state == "STALE" and narrow.cost_target_j is None
    again = controller.update(_reading(12, **lost), COSTS)
    assert again.cost_target_j == bad.cost_target_j


def test_a_range_that_widens_does_not_open_a_loop_beyond_its_limit() -> None:
    """From 64 to 16 sequences a token costs three times as much; a target that was the top of its range meant no more
    than that the budget was above it."""
    controller = BudgetController(Budget(j_per_token=0.04), delay_windows=0)
    wide, narrow = CostRange(low_j=0.017, high_j=0.086), CostRange(low_j=0.008, high_j=0.025)
    output = controller.output("decode", narrow)
    for window in range(20):
        cost_j = output.cost_target_j or narrow.high_j
        output = controller.update(_reading(window, j=cost_j + 0.002, cost_j=cost_j), narrow)
    assert output.state == "SLACK"
    seen = []
    for window in range(20, 40):
        output = controller.output("decode", wide) if window == 20 else output
        cost_j = output.cost_target_j or wide.high_j
        seen.append(cost_j + 0.002)
        output = controller.update(_reading(window, j=cost_j + 0.002, cost_j=cost_j), wide)
    assert output.state == "TRACKING"
    assert seen == pytest.approx([0.04] * 20, rel=0.05)


@pytest.mark.parametrize(("part", "state"), [(0.3, "INFEASIBLE"), (1.3, "SLACK"), (0.7, "TRACKING")])
def test_a_range_that_trembles_changes_no_state(part: float, state: str) -> None:
    """The reservoir of the inner loop is a sample: both ends of the range move by a percent from window to window."""
    plant = ControlPlant(BudgetController(Budget(j_per_token=part * FULL_J)))
    exact, draw = plant.cost_range, random.Random(0)

    def trembling() -> CostRange:
        costs = exact()
        return CostRange(low_j=costs.low_j * draw.uniform(0.99, 1.01), high_j=costs.high_j * draw.uniform(0.99, 1.01))

    plant.cost_range = trembling  # type: ignore[method-assign]
    plant.start()
    plant.run(100)
    assert set(plant.states[-60:]) == {state}
    if state == "TRACKING":
        assert sum(plant.true_j[-60:]) / 60 == pytest.approx(part * FULL_J, rel=0.01)


def test_a_power_reading_that_is_missing_stops_the_power_loop_alone() -> None:
    plant = BoardPlant(Budget(j_per_token=0.045, power_w=400))
    plant.run(40)
    plant.run(4, power_w=None)
    loops = plant.output.loops
    assert loops["power_w"].state == "STALE" and loops["j_per_token"].state != "STALE"
    assert plant.output.binding == "power_w" and plant.output.state == "STALE"


# Without a sensor


@pytest.mark.parametrize(
    ("limit", "state", "target"), [(0.03, "TRACKING", 0.03), (0.005, "INFEASIBLE", 0.01), (0.06, "SLACK", None)]
)
def test_without_a_sensor_the_model_is_held_to_the_budget(limit: float, state: str, target: float | None) -> None:
    controller = BudgetController(Budget(j_per_token=limit, power_w=300))
    for window in range(5):
        output = controller.update(_reading(window, j=None, status="modelled"), COSTS)
        assert (output.state, output.cost_target_j) == (state, target)
        assert "no sensor" in output.reason and "watts and degrees are not held" in output.reason


@pytest.mark.parametrize("budget", [Budget(power_w=300), Budget(temp_c=60)])
def test_watts_and_degrees_without_a_sensor_are_off(budget: Budget) -> None:
    output = BudgetController(budget).update(_reading(0, j=None, status="modelled"), COSTS)
    assert output.state == "OFF" and output.cost_target_j is None and "no sensor" in output.reason


def test_without_a_sensor_a_phase_without_a_limit_blames_no_sensor() -> None:
    controller = BudgetController(Budget(j_per_token={"prefill": 0.03}))
    output = controller.update(_reading(0, j=None, status="modelled"), COSTS)
    assert output.state == "OFF" and "does not limit decode" in output.reason


def test_at_the_floor_the_limit_that_cannot_be_held_is_the_one_that_is_named() -> None:
    controller = BudgetController(Budget(j_per_token=0.01, power_w=100))
    for window in range(30):
        output = controller.update(_reading(window, j=0.01, cost_j=0.01, power_w=150), COSTS)
    assert output.loops["j_per_token"].state == "TRACKING"
    assert (output.state, output.binding, output.cost_target_j) == ("INFEASIBLE", "power_w", 0.01)


# Saving


@pytest.mark.parametrize("options", [{}, {"law": "dual", "price_max": 1.5}])
@pytest.mark.parametrize("after", [0, 1, 3, 47, 150])
def test_a_saved_controller_goes_on_bit_by_bit(options: dict[str, Any], after: int) -> None:
    budget = Budget(j_per_token={"decode": 0.045, "prefill": 0.002}, power_w=450, temp_c=52)
    plant = BoardPlant(budget, **options)
    plant.run(after)
    saved = json.loads(json.dumps(plant.controller.state_dict()))
    other = BudgetController(None, **options)
    other.load_state_dict(saved)
    assert other.budget == plant.controller.budget
    assert other.state_dict() == plant.controller.state_dict()
    first, second = plant.controller, other
    for window in range(after, after + 60):
        reading = _reading(
            window, j=0.04 + 0.01 * math.sin(window), power_w=500 + 50 * math.cos(window), temp_c=40 + window % 20
        )
        if window % 7 == 0:
            reading = _reading(window, j=None)
        assert first.update(reading, COSTS) == second.update(reading, COSTS)
    first.set_budget(Budget(power_w=200))
    second.set_budget(Budget(power_w=200))
    assert first.output("decode", COSTS) == second.output("decode", COSTS)
    assert first.state_dict() == second.state_dict()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    controller = tracking().controller
    before = copy.deepcopy(controller.state_dict())
    dual = BudgetController(BUDGET, law="dual", price_max=1.0).state_dict()
    cut = copy.deepcopy(before)
    del cut["loops"][0][2]["target"]
    for wrong in (dual, {**before, "version": 99}, {}, {**before, "budget": {"power_w": -1}}, cut):
        with pytest.raises(CheckpointError) as refused:
            controller.load_state_dict(wrong)
        assert refused.value.fix and refused.value.accepted
        assert controller.state_dict() == before


# Refusals


@pytest.mark.parametrize(
    "options",
    [
        {"law": "primal"},
        {"law": "dual"},
        {"law": "dual", "price_max": 0.0},
        {"delay_windows": -1},
        {"delay_windows": 2.5},
        {"delay_windows": True},
        {"period_s": 0},
        {"period_s": math.nan},
        {"eta": -0.1},
        {"eta": math.inf},
        {"dead_band": -0.01},
        {"slew": 0},
        {"proportional": -1},
        {"temp_margin_c": 2},
        {"gain": 0.1},
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        BudgetController(BUDGET, **options)
    assert all((refused.value.what, refused.value.where, refused.value.accepted, refused.value.fix))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_cost_range_that_cannot_be_is_refused(low: float, high: float) -> None:
    with pytest.raises(ConfigError, match="CostRange"):
        CostRange(low_j=low, high_j=high)


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown phase 'encode'"):
        BudgetController(BUDGET).update(_reading(0, phase="encode"), COSTS)
