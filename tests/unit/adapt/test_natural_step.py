"""Natural-gradient steps: what a step is, that it does not depend on how features are scaled, and that it pays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.natural_step import BETAS, DIRECTIONS, SPARE, NaturalStep
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.moe.layer import moe_layers
from thermoe.routers.fast_weights import FAST_FAMILIES, FastWeights
from thermoe.testing import random_tokens, tiny_moe

EXPERTS, LR = 6, 0.1


def _drawn(tokens: int, width: int, seed: int = 0, *, scales: Tensor | None = None) -> Tensor:
    """Return features (T, C - 1) with a mean of their own; ``scales`` (C - 1,) of their random directions."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, width, generator=generator) + 0.5
    if scales is None:
        return values
    return values * scales @ torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def _gradients(width: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(EXPERTS, generator=generator), torch.randn(EXPERTS, width, generator=generator)]


def _whole(fast: FastWeights) -> Tensor:
    """Return matrix and delta (E, C)."""
    assert fast.matrix is not None
    return torch.cat([fast.matrix.detach(), fast.delta.detach().unsqueeze(1)], 1)


def _stepped(features: Tensor, gradients: list[Tensor], lr: float = LR) -> Tensor:
    fast = FastWeights(features.shape[1], EXPERTS)
    NaturalStep({"layer": fast}, lr).step(["layer"], gradients, {"layer": features})
    return _whole(fast)


def _dense(features: Tensor, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return gradient (E, C) and its product with the inverse of the damped second moment, in float64."""
    x_TC = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    moment = x_TC.T @ x_TC / len(x_TC)
    damped = moment + moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    gradient = torch.cat([gradients[1], gradients[0].unsqueeze(1)], 1).double()
    return gradient, gradient @ torch.linalg.inv(damped)


def _first_step(features: Tensor, gradients: list[Tensor], lr: float = LR) -> Tensor:
    gradient, natural = _dense(features, gradients)
    return -lr * natural / (natural * gradient).mean(1, keepdim=True).sqrt()


# -- what a step is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 7, 32, DIRECTIONS - 1])
@pytest.mark.parametrize("tokens", [5, 400])
def test_the_first_step_is_the_damped_inverse(width: int, tokens: int) -> None:
    features, gradients = _drawn(tokens, width), _gradients(width)
    expected = _first_step(features, gradients)
    torch.testing.assert_close(_stepped(features, gradients).double(), expected, rtol=1e-3, atol=1e-5)


def test_later_steps_average_steps_and_sizes() -> None:
    width = 12
    features, fast = _drawn(200, width), FastWeights(width, EXPERTS)
    step = NaturalStep({"layer": fast}, LR)
    mean, square, at = torch.zeros(EXPERTS, width + 1).double(), torch.zeros(EXPERTS, 1).double(), 0.0
    for count in range(1, 5):
        gradients = _gradients(width, seed=count)
        # The second moment is that of the first tokens, whatever comes later.
        step.step(["layer"], gradients, {"layer": features if count == 1 else _drawn(50, width, seed=99)})
        gradient, natural = _dense(features, gradients)
        mean = BETAS[0] * mean + (1 - BETAS[0]) * natural
        square = BETAS[1] * square + (1 - BETAS[1]) * (natural * gradient).mean(1, keepdim=True)
        size = (square / (1 - BETAS[1] ** count)).sqrt()
        at = at - LR * mean / (1 - BETAS[0] ** count) / size
        torch.testing.assert_close(_whole(fast).double(), at, rtol=1e-3, atol=1e-5)


def test_a_few_directions_are_enough_where_few_are_large() -> None:
    width = 300
    scales = torch.full((width,), 0.1)
    scales[:40] = torch.linspace(20, 3, 40)
    features, gradients = _drawn(1200, width, scales=scales), _gradients(width)
    assert width > DIRECTIONS + SPARE
    expected, found = _first_step(features, gradients), _stepped(features, gradients).double()
    assert (found - expected).norm() < 0.005 * expected.norm()
    # That is owed to the directions: the gradient itself moves the logits otherwise.
    plain = torch.cat([gradients[1], gradients[0].unsqueeze(1)], 1).double()
    x_TC = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    moved, wanted, steepest = (x_TC @ step.T for step in (found, expected, -plain))
    assert (moved - wanted).norm() < 0.005 * wanted.norm()
    assert torch.cosine_similarity(steepest.flatten(), wanted.flatten(), 0) < 0.8


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_every_family_takes_its_step(family: str) -> None:
    fast, generator = FastWeights(16, EXPERTS, family, rank=4), torch.Generator().manual_seed(3)
    x, slow = torch.randn(100, 16, generator=generator), torch.randn(100, EXPERTS, generator=generator)
    gradients = [torch.randn(p.shape, generator=generator) for p in fast.parameters()]
    features = fast.features(x, slow)
    FastOptimizer({"layer": fast}, "natural", LR).step(["layer"], gradients, {"layer": features})
    matrix = gradients[1] if fast.matrix is not None else torch.zeros(EXPERTS, 0)
    expected = _first_step(features, [gradients[0], matrix]).float()
    torch.testing.assert_close(fast.delta.detach(), expected[:, -1], rtol=1e-3, atol=1e-5)
    if fast.matrix is not None:
        torch.testing.assert_close(fast.matrix.detach(), expected[:, :-1], rtol=1e-3, atol=1e-5)


def test_the_size_of_a_step_is_the_step_size_whatever_the_gradient() -> None:
    features, gradients = _drawn(300, 20), _gradients(20)
    one = _stepped(features, gradients)
    torch.testing.assert_close(_stepped(features, [1000 * g for g in gradients]), one, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(_stepped(features, gradients, lr=2 * LR), 2 * one)
    # Per expert and whitened feature, the root mean square is the step size: tr(S A S^T) = lr^2 C per expert.
    x_TC = torch.cat([features, torch.ones(300, 1)], 1).double()
    moment = x_TC.T @ x_TC / 300
    damped = moment + moment.diagonal().mean() * torch.eye(21, dtype=torch.float64)
    size = (one.double() @ damped * one.double()).mean(1).sqrt()
    torch.testing.assert_close(size, torch.full((EXPERTS,), LR, dtype=torch.float64), rtol=1e-3, atol=0)


# -- how features are scaled -------------------------------------------------------------------------------------------


def _moved_logits(kind: str, features: Tensor, errors: Tensor) -> Tensor:
    """Return what one step moves the logits by (T, E), with ``errors`` (T, E) the gradient of the loss to them."""
    fast = FastWeights(features.shape[1], EXPERTS)
    gradients = [errors.sum(0), errors.T @ features]
    FastOptimizer({"layer": fast}, kind, LR).step(["layer"], gradients, {"layer": features})
    return fast(features, errors).detach()


@given(power=st.floats(-2.0, 2.0), seed=st.integers(0, 20))
def test_the_scale_of_the_features_does_not_matter(power: float, seed: int) -> None:
    """The constant feature of delta keeps its size; beside features as large as these it is next to nothing."""
    width, scale = 10, 10.0**power
    features = 1e4 * _drawn(100, width, seed=seed)
    errors = torch.randn(100, EXPERTS, generator=torch.Generator().manual_seed(seed))
    one, two = (_moved_logits("natural", factor * features, errors) for factor in (1.0, scale))
    assert float((two - one).norm()) <= 1e-3 * float(one.norm())


def test_the_scale_of_the_features_matters_to_adamw() -> None:
    features, errors = 1e4 * _drawn(100, 10), torch.randn(100, EXPERTS)
    one, two = (_moved_logits("adamw", factor * features, errors) for factor in (1.0, 10.0))
    assert float(two.norm() / one.norm()) == pytest.approx(10, rel=0.01)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_without_a_gradient_nothing_moves() -> None:
    features, (delta, matrix) = _drawn(50, 8), _gradients(8)
    assert not _stepped(features, [0 * delta, 0 * matrix]).any()
    delta[2], matrix[2] = 0, 0
    moved = _stepped(features, [delta, matrix]).any(1)
    assert moved.tolist() == [True, True, False, True, True, True]


def test_rounding_is_not_blown_up_to_a_step() -> None:
    """The gradient of an expert that no token used is not 0 but what rounding leaves of 0."""
    features, (delta, matrix) = _drawn(50, 8), _gradients(8)
    delta[2], matrix[2] = 1e-8 * delta[2], 1e-8 * matrix[2]
    delta[4], matrix[4] = 1e-3 * delta[4], 1e-3 * matrix[4]
    moved = _stepped(features, [delta, matrix])
    assert not moved[2].any()
    expected = _first_step(features, [delta, matrix]).float()
    torch.testing.assert_close(moved[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]], rtol=1e-3, atol=1e-5)
    assert not _stepped(features, [1e-11 * delta, 1e-11 * matrix]).any(), "nor where no expert has more than that"


def test_what_is_not_finite_is_not_taken_for_rounding() -> None:
    features, (delta, matrix) = _drawn(50, 8), _gradients(8)
    delta[1] = float("nan")
    assert bool(_stepped(features, [delta, matrix])[1].isnan().any())


def test_an_expert_that_no_token_used_stays() -> None:
    model = tiny_moe(gate="renormalized")
    with RouterAdapter(model, bucket=None, lr=0.1, safeguards=Safeguards.none()) as adapter:
        step = adapter.score_and_learn(random_tokens(2, 12))
        for _, layer in moe_layers(model):
            used = layer.last_routing.counts > 0
            moved = (layer.router.fast.matrix != 0).any(1)
            assert step.learned and not used.all() and moved.any()
            assert not moved[~used].any()


def test_layers_that_are_not_named_stay() -> None:
    layers = {name: FastWeights(8, EXPERTS) for name in ("first", "second", "third")}
    step = NaturalStep(layers, LR)
    gradients = [*_gradients(8, seed=1), *_gradients(8, seed=2)]
    given_features = {name: _drawn(50, 8, seed=row) for row, name in enumerate(layers)}
    step.step(["first", "third"], gradients, given_features)
    assert not _whole(layers["second"]).any() and set(step.state) == {"first", "third"}
    # Each with its own gradient and its own features.
    for name, seed in (("first", 1), ("third", 2)):
        expected = _stepped(given_features[name], _gradients(8, seed=seed))
        torch.testing.assert_close(_whole(layers[name]), expected, rtol=1e-4, atol=1e-7)


def test_what_is_kept_is_small_and_on_record() -> None:
    width = 400
    fast = FastWeights(width, EXPERTS)
    step = NaturalStep({"layer": fast}, LR)
    assert step.state_tensors() == []
    step.step(["layer"], _gradients(width), {"layer": _drawn(600, width)})
    kept = sum(tensor.numel() for tensor in step.state_tensors())
    assert kept == EXPERTS * (width + 1) + EXPERTS + 1 + DIRECTIONS * (width + 1) + DIRECTIONS


# -- repeating ---------------------------------------------------------------------------------------------------------


def _run(optimizer: FastOptimizer, fast: FastWeights, first: int, count: int) -> None:
    for number in range(first, first + count):
        features = {"layer": _drawn(150, 90, seed=number)}
        optimizer.step(["layer"], _gradients(90, seed=number), features)


def test_what_is_kept_follows_a_model_that_is_moved() -> None:
    fast = FastWeights(90, EXPERTS)
    optimizer = FastOptimizer({"layer": fast}, "natural", LR)
    _run(optimizer, fast, 0, 2)
    fast.to("meta")
    optimizer.step(["layer"], [g.to("meta") for g in _gradients(90, seed=2)], {})
    assert all(tensor.is_meta for tensor in optimizer.state_tensors()) and optimizer.state_tensors()


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    fast, twin = FastWeights(90, EXPERTS), FastWeights(90, EXPERTS)
    one, two = (FastOptimizer({"layer": each}, "natural", LR) for each in (fast, twin))
    _run(one, fast, 0, 3)
    one.lr = 0.03
    saved = one.state_dict()
    twin.load_state_dict(fast.state_dict())
    two.load_state_dict(saved)
    assert two.lr == 0.03
    _run(one, fast, 3, 3)  # nothing that is copied changes with it
    _run(two, twin, 3, 3)
    assert torch.equal(_whole(fast), _whole(twin))
    for a, b in zip(one.state_tensors(), two.state_tensors(), strict=True):
        assert torch.equal(a, b)


def test_two_runs_give_the_same_bits_whatever_the_global_seed() -> None:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fast = FastWeights(90, EXPERTS)
        before = torch.random.get_rng_state()
        _run(FastOptimizer({"layer": fast}, "natural", LR), fast, 0, 3)
        assert torch.equal(torch.random.get_rng_state(), before), "and it draws nothing from it"
        ends.append(_whole(fast))
    assert torch.equal(*ends)


# -- does it pay -------------------------------------------------------------------------------------------------------


def _steps_needed(kind: str, lr: float, features: Tensor, wanted: Tensor, most: int) -> int:
    """Return the steps until the mean squared error of the logits is below 5 % of where it began."""
    fast = FastWeights(features.shape[1], EXPERTS)
    optimizer = FastOptimizer({"layer": fast}, kind, lr)
    first: float | None = None
    for number in range(most):
        errors = (fast(features, wanted) - wanted).detach()
        loss = float(errors.square().mean())
        first = loss if first is None else first
        if loss < 0.05 * first:
            return number
        errors = 2 * errors / errors.numel()
        optimizer.step(["layer"], [errors.sum(0), errors.T @ features], {"layer": features})
    return most


def _best(kind: str, features: Tensor, wanted: Tensor, rates: Callable[[int], float]) -> int:
    return min(_steps_needed(kind, rates(i), features, wanted, 300) for i in range(9))


def test_a_badly_conditioned_problem_is_solved_in_fewer_steps() -> None:
    """Few large directions, as hidden states have, and a target that lies in all of them alike."""
    width = 24
    scales = torch.full((width,), 1.0)
    scales[:4] = 15.0
    features = _drawn(500, width, scales=scales)
    x_TC = torch.cat([features, torch.ones(500, 1)], 1)
    # Logits that are wanted: a random mixture of whitened features.
    whitened = torch.linalg.svd(x_TC, full_matrices=False).U
    wanted = whitened @ torch.randn(width + 1, EXPERTS, generator=torch.Generator().manual_seed(5))
    wanted = wanted / wanted.square().mean().sqrt()
    found = {kind: _best(kind, features, wanted, lambda i: math.sqrt(10) ** (i - 7)) for kind in ("natural", "adamw")}
    assert found["natural"] < found["adamw"] < 300, found
