"""When forwards of learning are recorded, and which recording makes room; what one is, is for tests on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thermoe.adapt.forwards import MOST_RECORDED, RECORD_AT_USE, Forwards, _Recorded
from thermoe.adapt.test_time import RouterAdapter
from thermoe.moe.layer import routed_modules
from thermoe.testing import random_tokens, tiny_moe


class _Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the shapes that were recorded, one after the other."""
    rows: list[int] = []

    def record(self: Forwards, work: Any, given: dict[str, torch.Tensor]) -> _Recorded:
        rows.append(given["input_ids"].shape[0])
        decisions = [module.last_routing for _, module in routed_modules(self._model)]
        inputs = {name: value.clone() for name, value in given.items()}
        return _Recorded(_Graph(), inputs, work(given), decisions, torch.zeros(1))

    monkeypatch.setattr(Forwards, "_made", record)
    return rows


def _run(forwards: Forwards, rows: int) -> None:
    forwards.why_not = None
    forwards.nll(random_tokens(rows, 4), None)


def test_a_shape_is_recorded_when_it_has_come_back(made: list[int]) -> None:
    with RouterAdapter(tiny_moe(), bucket=None) as adapter:
        forwards = adapter._learner.live.forwards
        for use in range(1, RECORD_AT_USE + 3):
            _run(forwards, 2)
            assert len(made) == (use >= RECORD_AT_USE)


def test_more_shapes_than_there_is_room_for_are_not_recorded_at_every_use(made: list[int]) -> None:
    with RouterAdapter(tiny_moe(), bucket=None) as adapter:
        forwards = adapter._learner.live.forwards
        for _ in range(4 * RECORD_AT_USE):
            for rows in range(1, MOST_RECORDED + 2):
                _run(forwards, rows)
        assert forwards.recorded == MOST_RECORDED
        assert len(made) <= 4 * (MOST_RECORDED + 1), "at most at every third use"


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("not\nthis")], ids=repr)
def test_what_fails_to_be_recorded_runs_all_the_same(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> _Recorded:
        raise error

    monkeypatch.setattr(Forwards, "_made", fail)
    with RouterAdapter(tiny_moe(), bucket=None) as adapter:
        forwards = adapter._learner.live.forwards
        for _ in range(RECORD_AT_USE):
            _run(forwards, 2)
        assert forwards.recorded == 0 and str(forwards.why_not).startswith("the model cannot be recorded")
