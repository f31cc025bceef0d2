"""The collapse monitor: what it counts, when it raises an alarm, what it advises, and that it goes on after a break."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import Routed, collect_routing
from thermoe.moe.monitor import Alarm, CollapseMonitor
from thermoe.moe.stats import StatsAccumulator
from thermoe.routers.priced import PricedRouter
from thermoe.routers.swap import set_router
from thermoe.routers.topk import TopKRouter
from thermoe.testing import random_tokens, tiny_moe

E, D, TOKENS = 8, 4, 1000


class _Model(nn.Module):
    """Layers that only hold a router and its decision."""

    def __init__(self, *routers: nn.Module) -> None:
        super().__init__()
        for place, router in enumerate(routers):
            layer = Routed()
            layer.router, layer.last_routing = router, None
            self.add_module(f"layer{place}", layer)


def _shares(*shares: float) -> Tensor:
    return torch.tensor(shares) / sum(shares)


def _decision(load: Tensor, *, top_k: int = 1, tokens: int = TOKENS, scale: float = 5.0) -> RoutingDecision:
    """Tokens that follow ``load`` in their first choice, and logits that say so."""
    first = torch.multinomial(load, tokens, replacement=True)
    logits = 0.1 * torch.randn(tokens, E)
    logits[torch.arange(tokens), first] += 1
    logits = logits * scale
    index = logits.topk(top_k, -1).indices
    return RoutingDecision(logits, logits.softmax(-1), index, torch.ones(index.shape))


EVEN = torch.ones(E)
TWO = _shares(1, 1, 0, 0, 0, 0, 0, 0)
ONE_DEAD = _shares(1, 1, 1, 1, 1, 1, 1, 0)


def _watch(monitor: CollapseMonitor, loads: list[Tensor], **settings: Any) -> list[list[Alarm]]:
    """Show the monitor a window of each load; return what it raised after each."""
    raised = []
    for step, load in enumerate(loads):
        monitor.update({"layer0": _decision(load, **settings)})
        monitor.flush(step)
        raised.append(monitor.raised)
    return raised


def test_rows_are_the_statistics_of_what_was_counted() -> None:
    model = tiny_moe()
    monitor = CollapseMonitor(model)
    expected = {name: StatsAccumulator() for name in collect_routing(_used(model, 0))}
    for seed in range(3):
        for name, decision in collect_routing(_used(model, seed)).items():
            expected[name].add(decision, fixed_k=True)
        monitor.update()
    rows = monitor.flush(3)
    assert [(row["layer"], row["name"]) for row in rows] == list(enumerate(expected))
    for row, accumulator in zip(rows, expected.values(), strict=True):
        stats = accumulator.result()
        assert stats is not None and stats.drop_rate == 0
        assert {name: row[name] for name in stats.as_dict()} == stats.as_dict()
    assert monitor.flush(4) == [], "a flush begins anew"


def _used(model: nn.Module, seed: int) -> nn.Module:
    with torch.no_grad():
        model(random_tokens(4, 16, seed=seed))
    return model


def test_the_summary_is_the_worst_over_layers() -> None:
    model = _Model(TopKRouter(D, E, 1), TopKRouter(D, E, 1))
    monitor = CollapseMonitor(model)
    monitor.update({"layer0": _decision(EVEN), "layer1": _decision(TWO)})
    even, two = monitor.flush(0)
    summary = monitor.summary
    assert summary["routing_effective_experts_min"] == two["effective_experts"] == pytest.approx(2, rel=0.01)
    assert summary["routing_max_vio_max"] == two["max_vio"] > even["max_vio"]
    assert summary["routing_dead_experts_max"] == 6
    assert summary["routing_effective_experts_mean"] == pytest.approx(
        (even["effective_experts"] + two["effective_experts"]) / 2
    )
    assert summary["routing_alarms"] == 0
    assert all(math.isfinite(value) for value in summary.values())
    monitor.update({"layer0": _decision(EVEN, tokens=10), "layer1": _decision(TWO, tokens=10)})
    monitor.flush(1)
    assert "routing_dead_experts_max" not in monitor.summary, "what is unknown is left out"


def test_no_alarm_without_a_collapse() -> None:
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, 1)))
    assert _watch(monitor, [EVEN] * 6) == [[]] * 6
    assert monitor.alarms == []


def test_a_collapse_raises_once_after_three_windows_and_clears() -> None:
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, 1)))
    raised = _watch(monitor, [EVEN, TWO, TWO, EVEN, TWO, TWO, TWO, TWO])
    assert [len(alarms) for alarms in raised] == [0, 0, 0, 0, 0, 0, 1, 0]
    (alarm,) = monitor.alarms
    assert (alarm.layer, alarm.kind, alarm.windows, alarm.step) == ("layer0", "collapse", 4, 7)
    assert alarm.value == pytest.approx(2, rel=0.01) and alarm.threshold == E / 2
    assert alarm.text.startswith("layer0: 2.0 of 8 experts in effective use, fewer than 4.0")
    assert "'sigmoid_bias', layers=['layer0']" in alarm.text and "{'load_std': 0.01}" in alarm.text
    assert monitor.summary["routing_alarms"] == 1
    _watch(monitor, [EVEN])
    assert monitor.alarms == [] and monitor.summary["routing_alarms"] == 0


def test_ties_are_told_from_a_trained_collapse() -> None:
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, 1)))
    for step in range(3):
        zeros = torch.zeros(TOKENS, E)
        index = torch.zeros(TOKENS, 1, dtype=torch.long)
        monitor.update({"layer0": RoutingDecision(zeros, zeros.softmax(-1), index, torch.ones(TOKENS, 1))})
        monitor.flush(step)
    (alarm,) = monitor.alarms
    assert alarm.kind == "ties" and "start the router anew" in alarm.text


def test_dead_experts_alone_raise_an_alarm_of_their_own() -> None:
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, 1)))
    _watch(monitor, [ONE_DEAD] * 3)
    (alarm,) = monitor.alarms
    assert (alarm.kind, alarm.value) == ("dead_experts", 1)
    assert "kl_uniform_reverse" in alarm.text


def test_a_tight_capacity_raises_an_alarm() -> None:
    router = TopKRouter(D, E, 2, capacity_factor=0.5, eval_capacity_factor=0.5).eval()
    model = _Model(router)
    monitor = CollapseMonitor(model)
    with torch.no_grad():
        router.weight.normal_()
    for step in range(3):
        model.layer0.last_routing = router(torch.randn(TOKENS, D))  # type: ignore[union-attr,assignment]
        monitor.update()
        (row,) = monitor.flush(step)
    drops = [alarm for alarm in monitor.alarms if alarm.kind == "drops"]
    assert len(drops) == 1
    assert drops[0].value == pytest.approx(row["drop_rate"]) and drops[0].value >= 0.5
    assert "capacity_factor" in drops[0].text


@pytest.mark.parametrize("top_k", [4, 6])
def test_a_collapse_is_seen_where_k_is_large(top_k: int) -> None:
    """With every token at the same k experts there are k effective ones: half of E at k = 4, and more at 6."""
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, top_k)))
    for step in range(3):
        logits = torch.randn(TOKENS, E) - 10 * (torch.arange(E) >= top_k)
        index = logits.topk(top_k, -1).indices
        monitor.update({"layer0": RoutingDecision(logits, logits.softmax(-1), index, torch.ones(index.shape))})
        monitor.flush(step)
    assert [alarm.kind for alarm in monitor.alarms] == ["collapse"]


def test_all_experts_for_every_token_is_no_collapse() -> None:
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, E)))
    assert _watch(monitor, [TWO] * 4, top_k=E) == [[]] * 4


def _priced(price: float, weight: Tensor) -> tuple[CollapseMonitor, dict[str, Any]]:
    """Show a monitor three windows of a router for which all experts but two are dear."""
    router = PricedRouter(D, E, 2, k_min=1, pair_cost=[1.0, 1.0, *[50.0] * (E - 2)], price=price).eval()
    with torch.no_grad():
        router.weight.copy_(weight)
    monitor = CollapseMonitor(_Model(router))
    for step in range(3):
        monitor.update({"layer0": router(torch.randn(TOKENS, D))})
        (row,) = monitor.flush(step)
    return monitor, row


def test_few_experts_under_a_price_are_no_collapse() -> None:
    weight = torch.randn(E, D) * 3
    monitor, row = _priced(0.0, weight)
    assert monitor.alarms == []
    assert row["unpriced_effective_experts"] == pytest.approx(row["effective_experts"])
    assert row["drop_rate"] is None, "an empty slot of a priced router was not dropped"
    monitor, row = _priced(0.2, weight)
    assert row["effective_experts"] < 4 < row["unpriced_effective_experts"]
    assert row["dead_experts"] > 0 == row["unpriced_dead_experts"]
    assert monitor.alarms == []


def test_a_collapse_of_the_scores_is_seen_under_a_price_too() -> None:
    monitor, _ = _priced(0.2, torch.zeros(E, D))
    (alarm,) = monitor.alarms
    assert alarm.kind == "ties" and "(price left aside)" in alarm.text


def test_shards_of_a_copy_are_counted_whole_without_the_price() -> None:
    router = PricedRouter(D, E, 4, group_size=2, price=0.0).eval()
    monitor = CollapseMonitor(_Model(router))
    mask = torch.rand(TOKENS) < 0.5
    logits = torch.randn(TOKENS, E)
    index = torch.where(mask.unsqueeze(-1), router._rank(logits), E)
    decision = RoutingDecision(logits, logits.softmax(-1), index, torch.ones(index.shape), mask)
    monitor.update({"layer0": decision})
    (row,) = monitor.flush(0)
    assert row["unpriced_effective_experts"] == pytest.approx(row["effective_experts"])


def test_small_flushes_add_up_to_a_window() -> None:
    """Rows come at every flush; only full windows count for an alarm."""
    monitor = CollapseMonitor(_Model(TopKRouter(D, E, 1)), window=1000)
    raised = []
    for step in range(12):
        monitor.update({"layer0": _decision(TWO, tokens=300)})
        (row,) = monitor.flush(step)
        assert row["tokens"] == 300 and row["dead_experts"] is None
        raised.append(len(monitor.raised))
    assert raised == [0] * 11 + [1], "four flushes fill a window, three windows raise"


def test_the_reference_may_be_that_of_another_router() -> None:
    model = _Model(TopKRouter(D, E, 1))
    three = _shares(1, 1, 1, 0, 0, 0, 0, 0)
    for reference, alarms in ((None, 1), ({"layer0": 4.0}, 0), (4.0, 0)):
        monitor = CollapseMonitor(model, reference=reference)
        _watch(monitor, [three] * 3)
        assert len([alarm for alarm in monitor.alarms if alarm.kind == "collapse"]) == alarms


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_resumed_monitor_goes_on_exactly(cut: int) -> None:
    """Cut after any update: rows, windows and alarms are those of the run that went through."""
    loads = [EVEN, TWO, TWO, TWO, TWO, TWO, TWO, EVEN, EVEN, EVEN]
    decisions = [_decision(load, tokens=500) for load in loads]

    def run(start: int, end: int, monitor: CollapseMonitor) -> tuple[list[Any], list[Any]]:
        rows, alarms = [], []
        for step in range(start, end):
            monitor.update({"layer0": decisions[step]})
            if step % 2:
                rows.append(monitor.flush(step))
                alarms.append((list(monitor.alarms), list(monitor.raised), dict(monitor.summary)))
        return rows, alarms

    model = _Model(TopKRouter(D, E, 1))
    whole = run(0, len(loads), CollapseMonitor(model, window=900, patience=2))
    assert sum(len(raised) for _, raised, _ in whole[1]) == 1, "the case has an alarm that comes and goes"
    first = CollapseMonitor(model, window=900, patience=2)
    before = run(0, cut, first)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second = CollapseMonitor(model, window=900, patience=2)
    second.load_state_dict(torch.load(stored, weights_only=True))
    after = run(cut, len(loads), second)
    assert (before[0] + after[0], before[1] + after[1]) == whole


def test_another_router_begins_a_new_window() -> None:
    model = tiny_moe()
    monitor = CollapseMonitor(model)
    _used(model, 0)
    monitor.update()
    set_router(model, "priced", price=0.1)
    _used(model, 1)
    monitor.update()
    rows = monitor.flush(0)
    assert all(row["tokens"] == 64 and row["unpriced_effective_experts"] is not None for row in rows)


def test_updating_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe()
    set_router(model, "priced", layers=[0], price=0.1)
    monitor = CollapseMonitor(model)
    _used(model, 0)

    def wait(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, wait)
    monitor.update()
    monitor.update()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(RoutingError, match="no MoE layer"):
        CollapseMonitor(nn.Linear(2, 2))
    model = _Model(TopKRouter(D, E, 1))
    for bad in ({"window": 0}, {"share": 1.5}, {"patience": 0}, {"max_drop_rate": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            CollapseMonitor(model, **bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no layer 'other'"):
        CollapseMonitor(model, reference={"other": 2.0})
    with pytest.raises(ConfigError, match="no layer 'layer0'"):
        state = CollapseMonitor(model)
        state.update({"layer0": _decision(EVEN)})
        CollapseMonitor(tiny_moe()).load_state_dict(state.state_dict())
