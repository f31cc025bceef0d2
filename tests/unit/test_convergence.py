"""The stopping rule on curves whose truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe.convergence import THRESHOLD_NATS, judge_convergence, mean_interval, t95
from thermoe.errors import ConfigError


def _curve(loss: Callable[[float], float], points: int = 20, noise: float = 0.0, seed: int = 0) -> list:
    draw = random.Random(seed)
    return [(1e6 * i, loss(i / points) + draw.gauss(0, noise)) for i in range(1, points + 1)]


def _plateau(x: float) -> float:
    return 3.0 + 4.0 * math.exp(-12 * x)


def test_a_plateau_has_converged_and_says_by_how_much_it_moved() -> None:
    found = judge_convergence(_curve(_plateau, noise=0.001))
    assert found.converged and found.reason == "flat"
    assert found.low_nats < found.improvement_nats < found.high_nats < THRESHOLD_NATS
    assert found.points == 7
    assert found.text.startswith("converged: the last third improved by 0.00")
    assert "under the threshold of 0.010" in found.text


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_power_law_that_still_falls_has_not(noise: float) -> None:
    found = judge_convergence(_curve(lambda x: 2.5 + x**-0.3, noise=noise))
    assert (found.converged, found.reason) == (False, "improving")
    true_fall = (14 / 20) ** -0.3 - 1  # the last third runs from point 14 to point 20
    assert found.improvement_nats == pytest.approx(true_fall, abs=0.01)


def test_noise_larger_than_the_threshold_is_no_evidence_of_convergence() -> None:
    found = judge_convergence(_curve(_plateau, noise=0.05, seed=3))
    assert not found.converged and found.reason in ("uncertain", "improving")
    assert found.high_nats > THRESHOLD_NATS


def test_overfitting_is_seen_and_is_no_convergence() -> None:
    found = judge_convergence(_curve(lambda x: 3 + 2 * math.exp(-10 * x) + 0.3 * max(0.0, x - 0.5), noise=0.002))
    assert (found.converged, found.reason) == (False, "overfitted")
    assert "above its minimum" in found.text
    wavy = judge_convergence(_curve(_plateau, noise=0.05, seed=3))
    assert wavy.reason != "overfitted", "noise alone is no overfitting"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence(bad: float) -> None:
    curve = _curve(_plateau)
    curve[12] = (curve[12][0], bad)
    found = judge_convergence(curve)
    assert (found.converged, found.reason) == (False, "diverged")
    assert "13,000,000 tokens" in found.text
    rising = judge_convergence(_curve(lambda x: 3 + x))
    assert rising.reason == "diverged" and rising.improvement_nats is None


@pytest.mark.parametrize("points", [0, 1, 3, 8])
def test_too_few_points_are_no_convergence(points: int) -> None:
    found = judge_convergence(_curve(lambda x: 3.0, points=points))
    assert (found.converged, found.reason) == (False, "too few points")


def test_what_a_curve_may_be() -> None:
    with pytest.raises(ConfigError, match="do not grow"):
        judge_convergence([(1.0, 3.0), (1.0, 2.9)])
    with pytest.raises(ConfigError, match="threshold_nats is 0"):
        judge_convergence([], threshold_nats=0)


@given(st.floats(-5, 5), st.floats(1e3, 1e9))
def test_the_verdict_depends_on_neither_the_level_nor_the_unit_of_tokens(shift: float, unit: float) -> None:
    curve = _curve(lambda x: 2.5 + 0.02 * x**-0.3, noise=0.001)
    moved = [(tokens * unit / 1e6, loss + shift) for tokens, loss in curve]
    first, second = judge_convergence(curve), judge_convergence(moved)
    assert first.reason == second.reason
    assert first.improvement_nats == pytest.approx(second.improvement_nats, abs=1e-9)


def test_the_interval_covers_the_truth_in_95_of_100_cases() -> None:
    covered = 0
    for seed in range(400):
        found = judge_convergence(_curve(lambda x: 3.5 - 0.06 * x, noise=0.004, seed=seed))
        covered += found.low_nats <= 0.06 * 6 / 20 <= found.high_nats
    assert 0.92 <= covered / 400 <= 0.98


def test_student_t() -> None:
    assert t95(1) == 12.706 and t95(30) == 2.042
    assert t95(31) == pytest.approx(2.0395, abs=1e-3)
    assert t95(120) == pytest.approx(1.9799, abs=1e-3)
    with pytest.raises(ConfigError):
        t95(0)


def test_mean_interval() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert mean_interval([2.0]) == (2.0, None, None)
    assert mean_interval([2.0, math.inf]) == (math.inf, None, None)
    with pytest.raises(ConfigError, match="no value"):
        mean_interval([])
