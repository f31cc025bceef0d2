"""The reaction to a step, against answers whose lags are known on paper."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe.adapt.lags import Lag, LagWindow, ReactionLags, reaction_lags
from thermoe.errors import ConfigError

STEP_S = 20.0


def _windows(answer: list[float | None], *, before: float = 10.0, noise: float = 0.0) -> list[LagWindow]:
    """Ten windows of 2 s before the step at 20 s, then the answer."""
    draw = random.Random(0)
    values = [before + noise * draw.gauss(0, 1) for _ in range(10)] + answer
    return [LagWindow(t_s=2.0 * (i + 1), tokens=100, value=value) for i, value in enumerate(values)]


def test_a_jump_after_two_windows_is_seen_and_settled_in_the_third() -> None:
    lags = reaction_lags(_windows([10.0, 10.0] + [6.0] * 10), STEP_S)
    third = Lag(ms=6000.0, tokens=300.0, windows=3)
    assert (lags.detection, lags.rise_63, lags.settling) == (third, third, third)
    assert (lags.before, lags.final, lags.overshoot, lags.reason) == (10.0, 6.0, 0.0, None)
    assert lags.absolute_error == pytest.approx(2 * 2 * 4.0)


def test_a_first_order_answer_has_the_lags_of_its_time_constant() -> None:
    tau_s = 9.9
    answer = [6.0 + 4.0 * math.exp(-2.0 * (i + 1) / tau_s) for i in range(60)]
    lags = reaction_lags(_windows(answer, noise=0.01), STEP_S)
    assert lags.detection is not None and lags.detection.windows == 1
    assert lags.rise_63 is not None and lags.rise_63.ms == 10_000.0  # the window in which tau falls
    # inside 5 % from 3 time constants on: exp(-3) = 0.0498, so in the window that ends at 30 s
    assert lags.settling is not None and lags.settling.windows == 15
    assert lags.absolute_error == pytest.approx(2.0 * 4.0 / (math.exp(2.0 / tau_s) - 1), rel=1e-2)


def test_overshoot_is_a_part_of_the_change_in_either_direction() -> None:
    down = reaction_lags(_windows([5.0, 6.5, 6.0] + [6.0] * 8), STEP_S)
    up = reaction_lags(_windows([15.0, 13.5, 14.0] + [14.0] * 8), STEP_S)
    assert down.overshoot == pytest.approx(0.25) == up.overshoot
    assert down.settling == up.settling == Lag(ms=6000.0, tokens=300.0, windows=3)


def test_settling_needs_five_windows_in_a_row() -> None:
    leaves = [6.0, 6.0, 6.0, 6.0, 7.0, 6.0, 6.0, 6.0, 6.0, 6.0]
    lags = reaction_lags(_windows(leaves), STEP_S)
    assert lags.settling is not None and lags.settling.windows == 6
    never = reaction_lags(_windows([6.0, 8.0] * 8), STEP_S, final=7.0)
    assert never.settling is None and never.detection is not None
    assert never.reason == "not reached in 16 windows: settling"


def test_a_change_within_the_noise_is_no_reaction() -> None:
    lags = reaction_lags(_windows([10.2] * 10, noise=0.5), STEP_S)
    assert (lags.detection, lags.rise_63, lags.settling, lags.overshoot) == (None, None, None, None)
    assert lags.reason is not None and "within 3 sd" in lags.reason
    still = reaction_lags(_windows([10.0] * 10), STEP_S)
    assert still.detection is None and still.absolute_error == 0.0


def test_a_final_value_that_is_not_reached_has_no_settling() -> None:
    lags = reaction_lags(_windows([8.0] * 10), STEP_S, final=6.0)
    assert lags.detection is not None and lags.rise_63 is None and lags.settling is None
    assert lags.reason == "not reached in 10 windows: 63 %, settling"


def test_a_window_without_a_number_counts_as_time_and_tokens_but_not_as_a_value() -> None:
    lags = reaction_lags(_windows([None, math.nan, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0]), STEP_S)
    assert lags.detection == lags.settling == Lag(ms=6000.0, tokens=300.0, windows=3)


def test_too_little_to_judge_says_so() -> None:
    few = reaction_lags(_windows([6.0] * 3), STEP_S)
    assert few == ReactionLags(reason="10 windows before the step and 3 after it; 3 and 5 are needed")
    assert reaction_lags(_windows([6.0] * 9), 3.0).reason is not None
    assert reaction_lags([], STEP_S).as_dict()["detection"] is None


@pytest.mark.parametrize(("step_s", "final"), [(math.nan, None), (STEP_S, math.inf)])
def test_numbers_that_are_not_finite_are_refused(step_s: float, final: float | None) -> None:
    with pytest.raises(ConfigError, match="reaction_lags"):
        reaction_lags(_windows([6.0] * 9), step_s, final=final)


def test_windows_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="rising t_s"):
        reaction_lags(list(reversed(_windows([6.0] * 9))), STEP_S)


@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=40), st.floats(-1e3, 1e3))
def test_lags_come_in_order_and_scale_with_nothing(answer: list[float], shift: float) -> None:
    lags = reaction_lags(_windows(list(answer)), STEP_S)
    if lags.detection and lags.rise_63:
        assert lags.detection.windows <= lags.rise_63.windows
    if lags.overshoot is not None:
        assert lags.overshoot >= 0 and lags.absolute_error is not None and lags.absolute_error >= 0
    mirrored = reaction_lags(_windows([20.0 - value for value in answer]), STEP_S)
    assert (mirrored.detection, mirrored.rise_63) == (lags.detection, lags.rise_63)
