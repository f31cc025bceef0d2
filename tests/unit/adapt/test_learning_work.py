"""What learning spends is counted once, by kind, and forwards that serve nobody are known as such."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from thermoe.adapt.learning_work import MOST_PENDING, LearningLedger, LearningWork, is_serving, serving_nothing
from thermoe.errors import CheckpointError, ConfigError, UnknownNameError


def work(kind: Any = "update", **changed: Any) -> LearningWork:
    return LearningWork(**{"kind": kind, "tokens": 8, "energy_j": 2.0, "duration_s": 0.5, "t_end_s": 1.0, **changed})


def test_serving_is_said_by_context_and_ends_with_it() -> None:
    assert is_serving()
    with serving_nothing():
        assert not is_serving()
        with serving_nothing():
            assert not is_serving()
        assert not is_serving()
    assert is_serving()
    with pytest.raises(KeyError), serving_nothing():
        raise KeyError
    assert is_serving()


def test_another_thread_serves_all_the_same() -> None:
    seen: list[bool] = []
    with serving_nothing():
        thread = threading.Thread(target=lambda: seen.append(is_serving()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_taking_forgets_the_pieces_and_keeps_the_totals() -> None:
    ledger = LearningLedger()
    assert ledger.take() == [] and ledger.provenance is None and ledger.counts["update"] == 0
    pieces = [work(), work("judge", tokens=3, energy_j=1.0, provenance="simulated"), work()]
    for piece in pieces:
        ledger.append(piece)
    ledger.note_verdict("accepted")
    assert ledger.take() == pieces and ledger.take() == []
    assert (ledger.energy_j, ledger.duration_s, ledger.tokens) == (5.0, 1.5, 19)
    assert ledger.counts == {"update": 2, "judge": 1, "shadow": 0, "audit": 0, "read": 0}
    assert ledger.verdicts == {"accepted": 1} and ledger.provenance == "simulated"


def test_a_stream_that_nobody_takes_from_stays_small_and_loses_no_joule() -> None:
    ledger = LearningLedger()
    for number in range(3 * MOST_PENDING):
        ledger.append(work("update" if number % 2 else "judge", t_end_s=float(number)))
    taken = ledger.take()
    assert len(taken) <= MOST_PENDING
    for name, total in (("energy_j", ledger.energy_j), ("tokens", ledger.tokens), ("duration_s", ledger.duration_s)):
        assert sum(getattr(piece, name) for piece in taken) == total
    by_kind = {kind: sum(p.energy_j for p in taken if p.kind == kind) for kind in ("update", "judge")}
    assert by_kind["update"] == by_kind["judge"]


@pytest.mark.parametrize("name", ["tokens", "energy_j", "duration_s", "t_end_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True])
def test_numbers_that_mean_nothing_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        work(**{name: value})


def test_negative_work_and_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="energy_j"):
        work(energy_j=-1.0)
    assert work(t_end_s=-1.0).t_end_s == -1.0
    with pytest.raises(UnknownNameError, match="'judge'"):
        work("judgee")


def test_totals_go_on_from_a_state_and_a_damaged_one_changes_nothing() -> None:
    ledger = LearningLedger()
    ledger.append(work("shadow"))
    ledger.note_verdict("rejected")
    other = LearningLedger()
    other.load_state_dict(ledger.state_dict())
    assert other.state_dict() == ledger.state_dict() and other.take() == []
    other.append(work())
    assert other.energy_j == 4.0
    before = other.state_dict()
    for damaged in ({}, {**before, "tokens": None}, {**before, "energy_j": "x"}):
        with pytest.raises(CheckpointError):
            other.load_state_dict(damaged)
        assert other.state_dict() == before
