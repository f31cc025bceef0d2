"""What an expert's capacity keeps and drops."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermoe.errors import UnknownNameError
from thermoe.moe.dispatch import apply_capacity, expert_capacity


@st.composite
def routes(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Ids (T, K), distinct within a row but for sentinels, and probabilities (T, E) with ties."""
    experts = draw(st.integers(1, 6))
    tokens = draw(st.integers(0, 10))
    top_k = draw(st.integers(1, experts))
    rows = []
    for _ in range(tokens):
        row = draw(st.permutations(range(experts)))[:top_k]
        rows.append([e if draw(st.booleans()) or draw(st.booleans()) else experts for e in row])
    ids = torch.tensor(rows, dtype=torch.long).view(tokens, top_k)
    values = draw(st.lists(st.integers(0, 4), min_size=tokens * experts, max_size=tokens * experts))
    return ids, torch.tensor(values, dtype=torch.float32).view(tokens, experts) / 4


def _naive(ids: Tensor, probabilities: Tensor, capacity: int, drop_order: str) -> Tensor:
    experts = probabilities.shape[-1]
    result = ids.clone()
    for e in range(experts):
        slots = [(t, k) for t in range(ids.shape[0]) for k in range(ids.shape[1]) if ids[t, k] == e]
        if drop_order == "probability":
            slots.sort(key=lambda slot: -float(probabilities[slot[0], e]))  # stable: ties keep the earliest
        for slot in slots[capacity:]:
            result[slot] = experts
    return result


@given(routes(), st.integers(0, 11), st.sampled_from(["position", "probability"]))
def test_equals_the_naive_loop(case: tuple[Tensor, Tensor], capacity: int, drop_order: str) -> None:
    ids, probabilities = case
    kept = apply_capacity(ids, probabilities, capacity, drop_order=drop_order)  # type: ignore[arg-type]
    assert torch.equal(kept, _naive(ids, probabilities, capacity, drop_order))


@given(routes(), st.integers(0, 11), st.sampled_from(["position", "probability"]))
def test_no_expert_is_over_capacity(case: tuple[Tensor, Tensor], capacity: int, drop_order: str) -> None:
    ids, probabilities = case
    experts = probabilities.shape[-1]
    kept = apply_capacity(ids, probabilities, capacity, drop_order=drop_order)  # type: ignore[arg-type]
    before = torch.bincount(ids.flatten(), minlength=experts + 1)[:experts]
    after = torch.bincount(kept.flatten(), minlength=experts + 1)[:experts]
    assert torch.equal(after, before.clamp(max=capacity)), "full experts are filled to the brim, others lose nothing"
    assert ((kept == ids) | (kept == experts)).all(), "a slot is kept or dropped, never sent elsewhere"


@given(routes())
def test_position_keeps_the_earliest(case: tuple[Tensor, Tensor]) -> None:
    ids, probabilities = case
    experts = probabilities.shape[-1]
    kept = apply_capacity(ids, probabilities, 2)
    for e in range(experts):
        wanted = (ids == e).any(-1).nonzero().flatten()[:2]
        assert torch.equal((kept == e).any(-1).nonzero().flatten(), wanted)


@given(routes())
def test_probability_keeps_the_surest(case: tuple[Tensor, Tensor]) -> None:
    ids, probabilities = case
    experts = probabilities.shape[-1]
    kept = apply_capacity(ids, probabilities, 2, drop_order="probability")
    for e in range(experts):
        stays, goes = (kept == e).any(-1), (ids == e).any(-1) & ~(kept == e).any(-1)
        if goes.any():
            assert probabilities[stays, e].min() >= probabilities[goes, e].max()


@given(routes(), st.sampled_from(["position", "probability"]))
def test_enough_capacity_drops_nothing(case: tuple[Tensor, Tensor], drop_order: str) -> None:
    ids, probabilities = case
    assert torch.equal(apply_capacity(ids, probabilities, ids.shape[0], drop_order=drop_order), ids)  # type: ignore[arg-type]


@given(routes(), st.sampled_from(["position", "probability"]))
def test_capacity_zero_drops_everything(case: tuple[Tensor, Tensor], drop_order: str) -> None:
    ids, probabilities = case
    assert (apply_capacity(ids, probabilities, 0, drop_order=drop_order) == probabilities.shape[-1]).all()  # type: ignore[arg-type]


@given(st.integers(0, 200), st.integers(1, 8), st.integers(1, 64), st.sampled_from([0.5, 1.0, 1.25, 1.5, 2.0]))
def test_expert_capacity(tokens: int, top_k: int, experts: int, factor: float) -> None:
    assert expert_capacity(tokens, top_k, experts, factor) == ceil(Fraction(factor) * tokens * top_k / experts)


def test_capacity_factor_one_holds_a_balanced_batch() -> None:
    assert expert_capacity(64, 2, 8, 1.0) == 16


def test_unknown_drop_order() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'position'"):
        apply_capacity(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 3), 1, drop_order="positon")  # type: ignore[arg-type]
