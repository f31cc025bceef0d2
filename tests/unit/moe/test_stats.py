"""Routing statistics against the formulas written out, and at their extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thermoe.moe.decision import RoutingDecision
from thermoe.moe.stats import StatsAccumulator, entropy, gini, read_sums, routing_stats
from thermoe.routers.topk import TopKRouter

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
    assert stats.dead_experts is None, "too few tokens to say"
    assert stats.logit_std == pytest.approx(float(logits.double().std(-1, correction=0).mean()), rel=1e-5)
    closed = math.prod(1 - len({e for e in row if e < E}) / E for row in index)
    assert stats.expected_distinct_experts == pytest.approx(E * (1 - closed), abs=1e-5)
    pairs = [0] * (E * E)
    for row in index:
        for a in {e for e in row if e < E}:
            for b in {e for e in row if e < E and e > a}:
                pairs[a * E + b] += 1
    if any(pairs):
        coactivation = _entropy([n / sum(pairs) for n in pairs])
        assert stats.coactivation_entropy == pytest.approx(coactivation, abs=1e-9)
    else:
        assert stats.coactivation_entropy is None
    assert stats.token_entropy == pytest.approx(token_entropy, abs=1e-5)
    assert stats.mutual_information == pytest.approx(_entropy(marginal) - token_entropy, abs=1e-5)
    assert stats.effective_experts == pytest.approx(math.exp(_entropy(load)))
    if total:
        mean = total / E
        spread = math.sqrt(sum((n - mean) ** 2 for n in counts) / E)
        differences = sum(abs(a - b) for a in counts for b in counts)
        assert stats.max_vio == pytest.approx(max(counts) / mean - 1)
        assert stats.inverse_simpson == pytest.approx(1 / sum(f * f for f in load))
        assert stats.top1_share == pytest.approx(max(load))
        assert stats.min_max_ratio == pytest.approx(min(counts) / max(counts))
        assert stats.cv == pytest.approx(spread / mean)
        assert stats.gini == pytest.approx(differences / (2 * E * E * mean), abs=1e-9)


def test_one_expert_takes_all() -> None:
    stats = routing_stats(_decision([[2]] * 100 * E))
    assert stats is not None
    assert stats.load == [0, 0, 1, 0, 0]
    assert stats.effective_experts == pytest.approx(1)
    assert stats.max_vio == pytest.approx(E - 1)
    assert stats.gini == pytest.approx((E - 1) / E)
    assert stats.cv == pytest.approx(math.sqrt(E - 1))
    assert stats.dead_experts == E - 1
    assert stats.inverse_simpson == pytest.approx(1) and stats.top1_share == 1 and stats.min_max_ratio == 0
    assert stats.distinct_experts == 1


def test_even_load_and_decisive_scores() -> None:
    stats = routing_stats(_decision([[e] for e in range(E)] * 100, torch.eye(E).repeat(100, 1) * 1e4))
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
    assert stats.min_max_ratio is None and stats.expected_distinct_experts == 0
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
    opened = (E * (1 - 0.8**3) + E * (1 - 0.8**4)) / 2
    assert together.pop("expected_distinct_experts") == pytest.approx(opened), "likewise"
    expected.pop("expected_distinct_experts")
    for name, value in expected.items():
        assert together[name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize(("idle", "dead"), [(9, 1), (10, 0)])
def test_an_expert_is_dead_below_a_tenth_of_an_even_load(idle: int, dead: int) -> None:
    """Expert 0 gets 9 or 10 of 500 tokens; a tenth of an even load is 10."""
    index = [[0]] * idle + [[1 + i % 4] for i in range(500 - idle)]
    stats = routing_stats(_decision(index))
    assert stats is not None and stats.dead_experts == dead
    fewer = routing_stats(_decision(index[:-1]))
    assert fewer is not None and fewer.dead_experts is None


def test_drops_are_counted_only_where_an_empty_slot_is_a_dropped_one() -> None:
    logits = torch.randn(4, E)
    decision = _decision([[0, 1], [0, E], [E, E], [E, E]], logits, [True, True, True, False])
    known = routing_stats(decision, fixed_k=True)
    unknown = routing_stats(decision)
    assert known is not None and known.drop_rate == pytest.approx(3 / 6)
    assert unknown is not None and unknown.drop_rate is None
    accumulator = StatsAccumulator()
    accumulator.add(decision, fixed_k=True)
    accumulator.add(decision)
    mixed = accumulator.result()
    assert mixed is not None and mixed.drop_rate is None, "one forward that cannot say makes the sum unknown"


def test_the_drop_rate_is_that_of_the_capacity() -> None:
    router = TopKRouter(4, E, 2, capacity_factor=0.5, eval_capacity_factor=0.5).eval()
    stats = routing_stats(router(torch.randn(60, 4)), fixed_k=router.fixed_k)
    unlimited = routing_stats(TopKRouter(4, E, 2).eval()(torch.randn(60, 4)), fixed_k=True)
    assert stats is not None and unlimited is not None
    assert stats.drop_rate == pytest.approx(1 - stats.experts_per_token / 2) and stats.drop_rate >= 0.5
    assert unlimited.drop_rate == 0


def test_statistics_survive_a_round_trip_and_go_on() -> None:
    accumulator, resumed = StatsAccumulator(), StatsAccumulator()
    accumulator.add(_decision([[0], [1], [1]]), fixed_k=True)
    resumed.load_state_dict(accumulator.state_dict())
    for each in (accumulator, resumed):
        each.add(_decision([[2], [3], [E]], torch.zeros(3, E)), fixed_k=True)
    assert resumed.result() == accumulator.result()


def test_several_layers_are_read_together() -> None:
    layers = [StatsAccumulator() for _ in range(3)]
    layers[0].add(_decision([[0], [1], [1]]))
    wide = torch.randn(2, 7)
    layers[2].add(RoutingDecision(wide, wide.softmax(-1), torch.tensor([[6], [2]]), torch.ones(2, 1)))
    sums = read_sums(layers)
    assert sums[1] is None
    together = [None if flat is None else layer.summarise(flat) for layer, flat in zip(layers, sums, strict=True)]
    assert together == [layer.result() for layer in layers]
    assert together[2] is not None and len(together[2].load) == 7


def test_counting_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = _decision([[0, 1], [2, E]], mask=[True, True])
    accumulator = StatsAccumulator()

    def wait(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    accumulator.add(decision, fixed_k=True, unpriced_counts=decision.counts)
    accumulator.add(decision, fixed_k=True, unpriced_counts=decision.counts)


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
