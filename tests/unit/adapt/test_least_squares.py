"""Recursive least squares: the same answer as fitting everything at once, whatever the order of the pieces."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thermoe.adapt.least_squares import RecursiveLeastSquares
from thermoe.errors import CheckpointError, ConfigError


def _observations(seed: int, count: int, features: int, outputs: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    f, r = (torch.randn(count, n, generator=generator, dtype=torch.float64) for n in (features, outputs))
    return f, r, 3 * torch.rand(count, generator=generator, dtype=torch.float64)


def _batch(f: torch.Tensor, r: torch.Tensor, w: torch.Tensor, prior: float) -> torch.Tensor:
    """Solve the same problem as one least-squares problem: the prior is F rows that ask for 0."""
    root = w.sqrt().unsqueeze(-1)
    rows = torch.cat([root * f, math.sqrt(prior) * torch.eye(f.shape[1], dtype=torch.float64)])
    asked = torch.cat([root * r, torch.zeros(f.shape[1], r.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(rows, asked, driver="gelsd").solution


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    features=st.integers(1, 9),
    outputs=st.integers(1, 8),
    prior=st.floats(1e-2, 1e2),
)
def test_without_forgetting_it_is_the_weighted_fit_of_everything(
    seed: int, sizes: list[int], features: int, outputs: int, prior: float
) -> None:
    f, r, w = _observations(seed, sum(sizes), features, outputs)
    fit = RecursiveLeastSquares(features, outputs, prior_precision=prior, forgetting=1.0)
    for piece in zip(f.split(sizes), r.split(sizes), w.split(sizes), strict=True):
        assert fit.update(*piece)
    torch.testing.assert_close(fit.solution(), _batch(f, r, w, prior), rtol=1e-7, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), forgetting=st.floats(0.1, 1.0), updates=st.integers(1, 6))
def test_forgetting_weights_evidence_by_its_age_and_leaves_the_prior(
    seed: int, forgetting: float, updates: int
) -> None:
    f, r, w = _observations(seed, 5 * updates, 3, 2)
    fit = RecursiveLeastSquares(3, 2, prior_precision=0.7, forgetting=forgetting)
    for piece in zip(f.split(5), r.split(5), w.split(5), strict=True):
        fit.update(*piece)
    age = torch.arange(updates - 1, -1, -1, dtype=torch.float64).repeat_interleave(5)
    torch.testing.assert_close(fit.solution(), _batch(f, r, w * forgetting**age, 0.7), rtol=1e-7, atol=1e-9)


def test_nothing_known_is_exactly_zero_and_no_weight_teaches_nothing() -> None:
    fit = RecursiveLeastSquares(3, 2)
    assert torch.equal(fit.solution(), torch.zeros(3, 2, dtype=torch.float64))
    f, r, w = _observations(0, 6, 3, 2)
    assert fit.update(f, r, torch.zeros_like(w)) and (fit.solution() == 0).all()
    assert fit.update(f, r, w) and (fit.solution() != 0).all()
    fit.reset()
    assert (fit.solution() == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_is_not_taken_in(value: float, which: int) -> None:
    fit = RecursiveLeastSquares(3, 2)
    fit.update(*_observations(0, 6, 3, 2))
    before = {name: tensor.clone() for name, tensor in fit.state_dict().items()}
    broken = list(_observations(1, 6, 3, 2))
    broken[which].view(-1)[2] = value
    assert not fit.update(*broken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fit.state_dict().items())


def test_fading_lets_new_evidence_win() -> None:
    f, _, w = _observations(0, 200, 3, 2)
    ends = []
    for factor in (1.0, 0.01):
        fit = RecursiveLeastSquares(3, 2)
        fit.update(f, f @ torch.ones(3, 2, dtype=torch.float64), w)
        fit.fade(factor)
        fit.update(f[:20], -(f[:20] @ torch.ones(3, 2, dtype=torch.float64)), w[:20])
        ends.append(float(fit.solution().mean()))
    assert ends[0] > 0.5 and ends[1] < -0.5


def test_a_saved_state_does_not_change_and_gives_the_same_fit() -> None:
    fit, twin = RecursiveLeastSquares(3, 2), RecursiveLeastSquares(3, 2)
    fit.update(*_observations(0, 6, 3, 2))
    saved, solution = fit.state_dict(), fit.solution()
    fit.update(*_observations(1, 6, 3, 2))
    twin.load_state_dict(saved)
    assert torch.equal(twin.solution(), solution) and not torch.equal(fit.solution(), solution)


def test_what_does_not_fit_is_refused_whole() -> None:
    for name, value in (("prior_precision", 0.0), ("forgetting", 1.1), ("forgetting", math.nan), ("forgetting", True)):
        with pytest.raises(ConfigError) as error:
            RecursiveLeastSquares(3, 2, **{name: value})
        assert error.value.where == name and error.value.accepted
    with pytest.raises(ConfigError):
        RecursiveLeastSquares(0, 2)
    fit = RecursiveLeastSquares(3, 2)
    fit.update(*_observations(0, 6, 3, 2))
    solution = fit.solution()
    good = RecursiveLeastSquares(3, 2).state_dict()
    for state in ({}, {**good, "projection": torch.zeros(2, 2)}, {**good, "projection": torch.full((3, 2), torch.nan)}):
        with pytest.raises(CheckpointError):
            fit.load_state_dict(state)
        assert torch.equal(fit.solution(), solution)
