"""What learning costs is paid back by what is served after it: all of it, and nothing where nothing was learned."""

from __future__ import annotations

import json

import pytest

from thermoe.adapt.budget import Phase
from thermoe.adapt.learning_levy import HORIZON_STEPS, LearningLevy, ServedStep


def step(levy: LearningLevy, learning_j: float = 0.0, *, phase: Phase = "decode", tokens: int = 4) -> float:
    """Serve tokens of 2 J each, less the levy, and return what they paid."""
    levied_j = levy.of(phase)
    served_j = (2.0 - levied_j) * tokens
    part = ServedStep(tokens=tokens, served_j=served_j, learning_j=learning_j, levied_j=levied_j)
    levy.note({phase: part})
    return levied_j * tokens


def test_nothing_is_levied_where_nothing_was_learned() -> None:
    levy = LearningLevy()
    assert levy.of("decode") == 0
    for _ in range(50):
        assert step(levy) == 0
    levy.note({})
    assert levy.of("prefill") == 0


def test_a_burst_is_paid_back_whole_and_gently() -> None:
    levy = LearningLevy()
    for _ in range(5):
        step(levy)
    step(levy, 30.0)
    paid = [step(levy) for _ in range(8 * HORIZON_STEPS)]
    assert max(paid) <= 1.2 * 30.0 / HORIZON_STEPS
    assert sum(paid[:HORIZON_STEPS]) == pytest.approx(0.65 * 30.0, rel=0.1)
    assert sum(paid) == pytest.approx(30.0, rel=0.01)


@pytest.mark.parametrize("every", [1, 7])
def test_a_steady_rate_becomes_the_levy(every: int) -> None:
    levy = LearningLevy()
    for number in range(12 * HORIZON_STEPS):
        step(levy, every * 1.2 if number % every == 0 else 0.0)
    late = [step(levy, every * 1.2 if number % every == 0 else 0.0) for number in range(every * 20)]
    assert sum(late) / len(late) == pytest.approx(1.2, rel=0.03)  # joules a step


def test_phases_pay_for_one_another_in_proportion_to_their_joules() -> None:
    levy = LearningLevy()
    step(levy, 10.0, phase="prefill", tokens=100)
    assert levy.of("decode") == 0  # it has served nothing yet
    step(levy, phase="decode")
    assert levy.of("decode") == pytest.approx(levy.of("prefill"), rel=0.01)  # tokens of both cost the same here
    paid = sum(step(levy, phase="decode", tokens=16) for _ in range(10 * HORIZON_STEPS))
    assert paid == pytest.approx(10.0, rel=0.05)


def test_what_was_paid_too_much_is_a_credit() -> None:
    levy = LearningLevy()
    step(levy, 8.0)
    levy.note({"decode": ServedStep(tokens=100, served_j=200.0, learning_j=0.0, levied_j=0.2)})  # 20 J at once
    assert levy.of("decode") == 0
    step(levy, 12.0)
    assert levy.of("decode") == 0
    step(levy, 1.0)
    assert levy.of("decode") > 0


def test_a_state_goes_on() -> None:
    levy = LearningLevy()
    step(levy, 5.0)
    other = LearningLevy.from_state(json.loads(json.dumps(levy.state_dict())))
    assert [step(levy, 1.0) for _ in range(5)] == [step(other, 1.0) for _ in range(5)]
