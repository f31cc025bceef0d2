"""Routing statistics against the formulas written out, and at their extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermoe.moe.decision import RoutingDecision
from thermoe.moe.stats import StatsAccumulator, entropy, gini, routing_stats

E = 5


def _decision(
    index: list[list[int]], logits: torch.Tensor | None = None, mask: list[bool] | None = None
) -> RoutingDecision:
    ids = torch.tensor(index, dtype=torch.long)
    logits = torch.randn(len(index), E) if logits is None else logits
    padding = None if mask is None else torch.tensor(mask)
    return RoutingDecision(logits, logits.softmax(-1), ids, torch.ones(ids.shape), padding)


def _entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


@given(st.lists(st.lists(st.integers(0, E), min_size=3, max_size=3), min_size=1, max_size=20), st.integers(0, 1000))
def test_equals_the_formulas(index: list[list[int]], seed: int) -> None:
    logits = torch.randn(len(index), E, generator=torch.Generator().manual_seed(seed)) * 3
    stats = routing_stats(_decision(index, logits))
    assert stats is not None
    counts = [sum(row.count(e) for row in index) for e in range(E)]
    total = sum(counts)
    load = [n / max(1, total) for n in counts]
    p = logits.double().softmax(-1)
    marginal = p.mean(0).tolist()
    token_entropy = sum(_entropy(row) for row in p.tolist()) / len(index)
    assert stats.load == pytest.approx(load)
    assert stats.tokens == len(index)
    assert stats.experts_per_token == pytest.approx(total / len(index))
    assert stats.distinct_experts == sum(n > 0 for n in counts)
    assert stats.dead_experts == sum(f < 0.1 / E for f in load)
    assert stats.token_entropy == pytest.approx(token_entropy, abs=1e-5)
    assert stats.mutual_information == pytest.approx(_entropy(marginal) - token_entropy, abs=1e-5)
    assert stats.effective_experts == pytest.approx(math.exp(_entropy(load)))
    if total:
        mean = total / E
        spread = math.sqrt(sum((n - mean) ** 2 for n in counts) / E)
        differences = sum(abs(a - b) for a in counts for b in counts)
        assert stats.max_vio == pytest.approx(max(counts) / mean - 1)
        assert stats.cv == pytest.approx(spread / mean)
        assert stats.gini == pytest.approx(differences / (2 * E * E * mean), abs=1e-9)


def test_one_expert_takes_all() -> None:
    stats = routing_stats(_decision([[2]] * 9))
    assert stats is not None
    assert stats.load == [0, 0, 1, 0, 0]
    assert stats.effective_experts == pytest.approx(1)
    assert stats.max_vio == pytest.approx(E - 1)
    assert stats.gini == pytest.approx((E - 1) / E)
    assert stats.cv == pytest.approx(math.sqrt(E - 1))
    assert stats.dead_experts == E - 1
    assert stats.distinct_experts == 1


def test_even_load_and_decisive_scores() -> None:
    stats = routing_stats(_decision([[e] for e in range(E)], torch.eye(E) * 1e4))
    assert stats is not None
    assert stats.effective_experts == pytest.approx(E)
    assert stats.max_vio == pytest.approx(0, abs=1e-9)
    assert stats.gini == pytest.approx(0, abs=1e-9)
    assert stats.cv == pytest.approx(0, abs=1e-9)
    assert stats.dead_experts == 0
    assert stats.token_entropy == pytest.approx(0, abs=1e-6)
    assert stats.mutual_information == pytest.approx(math.log(E), abs=1e-5)


def test_uniform_scores_tell_nothing_about_the_token() -> None:
    stats = routing_stats(_decision([[e] for e in range(E)], torch.zeros(E, E)))
    assert stats is not None
    assert stats.token_entropy == pytest.approx(math.log(E), abs=1e-6)
    assert stats.mutual_information == pytest.approx(0, abs=1e-6)


def test_every_token_dropped() -> None:
    stats = routing_stats(_decision([[E, E]] * 4))
    assert stats is not None
    assert stats.load == [0.0] * E and stats.experts_per_token == 0 and stats.distinct_experts == 0
    assert all(math.isfinite(v) for v in (stats.max_vio, stats.gini, stats.cv, stats.effective_experts))


def test_padding_is_not_counted() -> None:
    logits = torch.randn(4, E)
    padded = routing_stats(_decision([[0], [1], [E], [E]], logits, [True, True, False, False]))
    alone = routing_stats(_decision([[0], [1]], logits[:2]))
    assert padded is not None and alone is not None
    for name, value in alone.as_dict().items():
        assert padded.as_dict()[name] == pytest.approx(value), name


def test_several_forwards_add_up() -> None:
    first, second = torch.randn(3, E), torch.randn(4, E)
    accumulator = StatsAccumulator()
    accumulator.add(_decision([[0], [1], [1]], first))
    accumulator.add(_decision([[2], [2], [2], [2]], second))
    stats = accumulator.result()
    whole = routing_stats(_decision([[0], [1], [1], [2], [2], [2], [2]], torch.cat([first, second])))
    assert stats is not None and whole is not None
    together = stats.as_dict()
    assert together.pop("distinct_experts") == pytest.approx((2 + 1) / 2), "the mean over forwards"
    expected = whole.as_dict()
    expected.pop("distinct_experts")
    for name, value in expected.items():
        assert together[name] == pytest.approx(value, abs=1e-6), name


def test_nothing_counted_is_none_and_not_zero() -> None:
    assert StatsAccumulator().result() is None
    assert routing_stats(_decision([[E]], mask=[False])) is None


def test_statistics_keep_no_history() -> None:
    accumulator = StatsAccumulator()
    logits = torch.randn(3, E, requires_grad=True)
    accumulator.add(_decision([[0], [1], [2]], logits))
    assert not any(value.requires_grad for value in accumulator._sums.values())


def test_entropy_of_a_sure_thing_is_zero() -> None:
    assert float(entropy(torch.tensor([0.0, 1.0]))) == 0


def test_gini_of_nothing_is_zero() -> None:
    assert float(gini(torch.zeros(3))) == 0
