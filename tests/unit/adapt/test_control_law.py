"""The small print of the law: slew, dead-band, gain, feed-forward, and the slope that is learned in a closed loop."""

from __future__ import annotations

import itertools
import random

import pytest
from control_plant import FULL_J, BoardPlant, ControlPlant, tracking

from thermoe.adapt.budget import Budget
from thermoe.adapt.controller import BudgetController, ControlReading, CostRange
from thermoe.adapt.slope import SlopeEstimate

COSTS = CostRange(low_j=0.01, high_j=0.05)


def test_feedback_is_slew_limited_and_a_new_budget_is_not() -> None:
    plant = tracking(part=0.9, windows=40, noise=0.0, quantum_j=0.0)
    span_j = plant.cost_range().high_j - plant.cost_range().low_j
    plant.level = 1.8
    plant.run(10)
    targets = [t if t is not None else plant.cost_range().high_j for t in plant.targets]
    moves = [abs(b - a) for a, b in itertools.pairwise(targets[40:])]
    assert max(moves) <= 0.1 * span_j * (1 + 1e-9) and max(moves) > 0.09 * span_j
    held = targets[-1]
    plant.controller.set_budget(Budget(j_per_token=1.2 * FULL_J))
    after = plant.controller.output("decode", plant.cost_range()).cost_target_j
    assert after is None or after - held > 0.1 * span_j


def test_a_dead_band_keeps_a_noisy_loop_still_within_one_percent() -> None:
    with_band, without = (
        ControlPlant(BudgetController(Budget(j_per_token=0.7 * FULL_J), dead_band=band)) for band in (0.01, 0)
    )
    still = {}
    for name, plant in (("with", with_band), ("without", without)):
        plant.start()
        plant.run(200)
        still[name] = sum(a == b for a, b in itertools.pairwise(plant.targets[50:]))
        assert sum(plant.true_j[50:]) / 150 == pytest.approx(0.7 * FULL_J, rel=0.01)
    assert still["with"] > 50 > 10 * still["without"]


def test_noise_above_3_percent_halves_the_gain_and_noise_of_3_does_not() -> None:
    gains = {}
    for noise in (0.03, 0.08):
        plant = tracking(windows=100, noise=noise)
        assert plant.output is not None
        gains[noise] = plant.output.loops["j_per_token"].gain
    assert gains == pytest.approx({0.03: 4 / 27, 0.08: 2 / 27})


@pytest.mark.parametrize("slope", [0.6, 1.0, 1.7])
def test_the_slope_is_learned_from_moves(slope: float) -> None:
    plant = tracking(part=0.9, windows=40, slope=slope)
    for part in (0.6, 0.9, 0.6, 0.9):
        plant.controller.set_budget(Budget(j_per_token=part * FULL_J))
        plant.start()
        plant.run(20)
    assert plant.output is not None
    assert plant.output.loops["j_per_token"].slope == pytest.approx(slope, rel=0.15)


def test_a_slope_far_from_the_modelled_one_is_clamped() -> None:
    for slope, clamped in ((5.0, 2.0), (0.3, 0.5)):
        estimate = SlopeEstimate()
        for window in range(100):
            cost = 0.3 if (window // 10) % 2 else 0.7
            estimate.observe(cost, 3.0 + slope * cost, 1.0)
        assert estimate.value == clamped
        assert estimate.interval()[0] <= slope <= estimate.interval()[1] and not estimate.lacks_authority()


def test_a_reading_that_lags_behind_its_cost_does_not_flatten_the_slope() -> None:
    answers: dict[int, float] = {}
    for delay in (0, 2):
        estimate = SlopeEstimate(delay_windows=delay)
        costs = [0.3 if (window // 7) % 2 else 0.7 for window in range(100)]
        for window, cost in enumerate(costs):
            estimate.observe(cost, 3.0 + costs[max(0, window - 2)], 1.0)
        answers[delay] = sum(estimate.interval()) / 2
    assert answers[2] == pytest.approx(1.0, abs=0.05)
    assert answers[0] < 0.7  # the control: without the wait it would


def test_a_disturbance_is_not_taken_for_noise() -> None:
    estimate = SlopeEstimate()
    draw = random.Random(0)
    for _ in range(60):
        estimate.observe(0.5, 1.0 + 0.03 * draw.gauss(0, 1), 1.0)
    before = estimate.noise_sd
    assert before == pytest.approx(0.03, rel=0.3)
    estimate.observe(0.5, 1.5, 1.0)
    assert estimate.noise_sd / 1.5 < 1.1 * before


def test_what_happens_in_missing_windows_teaches_nothing_about_the_slope() -> None:
    """The budget and the plant change while the sensor is away; the readings before and after do not make a pair."""
    plant = tracking(part=0.9, windows=40, noise=0.0, quantum_j=0.0, delay=0)
    assert plant.output is not None
    before = plant.output.loops["j_per_token"].slope
    plant.step(j_per_token=None)
    plant.controller.set_budget(Budget(j_per_token=0.6 * FULL_J))
    plant.extra = 0.3
    plant.start()
    plant.step(j_per_token=None)
    for _ in range(12):
        after = plant.step().loops["j_per_token"].slope
    assert after == pytest.approx(before, abs=0.02)


def test_a_change_of_budget_keeps_what_is_known_and_a_dropped_limit_is_forgotten() -> None:
    plant = tracking(windows=60)
    controller = plant.controller
    controller.set_budget(Budget(power_w=80))
    assert plant.step().binding in ("power_w", None)
    controller.set_budget(None)
    output = plant.step()
    assert (output.state, output.cost_target_j, output.power_cap_w) == ("OFF", None, None)


def test_dual_mode_yields_a_price_and_sums_the_prices_of_the_limits() -> None:
    plant = BoardPlant(Budget(j_per_token=0.040, power_w=450), law="dual", price_max=1.5)
    plant.run(80)
    output = plant.output
    assert output.cost_target_j is None and output.price is not None
    prices = [loop.price or 0.0 for loop in output.loops.values()]
    assert output.price == pytest.approx(min(1.5, sum(prices))) and output.price > 0
    assert all(loop.cost_target_j is None for loop in output.loops.values())
    off = BudgetController(None, law="dual", price_max=1.5).output("decode", COSTS)
    assert (off.state, off.price) == ("OFF", 0.0)


def test_feedback_starts_from_the_range_that_there_is() -> None:
    """A target above a range that has narrowed would need windows of feedback before it moved anything."""
    controller = BudgetController(Budget(j_per_token=0.03), delay_windows=0, refine_slope=False)

    def window(number: int, j: float, cost_j: float, costs: CostRange) -> float | None:
        reading = ControlReading(
            phase="decode", t_s=2.0 * number + 2, window_s=2.0, tokens=100, j_per_token=j, cost_j=cost_j
        )
        return controller.update(reading, costs).cost_target_j

    for number in range(10):
        assert window(number, 0.03, 0.03, COSTS) == 0.03
    narrow = CostRange(low_j=0.01, high_j=0.02)
    assert window(10, 0.034, 0.02, narrow) == pytest.approx(0.02 - 0.25 * 0.004)
