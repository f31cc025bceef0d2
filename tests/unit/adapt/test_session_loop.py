"""The closed loop on a simulated board: a budget is reached, its states are told, and bad telemetry stops nothing."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from session_rig import FORWARD_S, Rig, joules_of

from thermoe.adapt.controller import BudgetController
from thermoe.adapt.price import PriceSolver
from thermoe.adapt.readings import ControlReading
from thermoe.adapt.steps import ForwardCount
from thermoe.adapt.windows import EnergyWindows
from thermoe.telemetry.plant import Fault


@pytest.fixture(autouse=True)
def telemetry_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THERMOE_TELEMETRY", raising=False)


def free_j(rig: Rig) -> float:
    """Return the measured J/token without a budget."""
    with rig.session() as session:
        found = rig.run(session, 12)[-1]["j_per_token_measured"]
    assert found is not None
    return float(found)


def measured(session: Any, since_s: float) -> list[float]:
    rows = [row for row in session.tally.history if row["t_s"] > since_s]
    return [row["j_per_token_measured"] for row in rows if row["j_per_token_measured"] is not None]


@pytest.mark.parametrize("gain", [1.6, 0.6])
def test_a_feasible_budget_is_reached(gain: float) -> None:
    rig = Rig(gain=gain)
    budget = 0.8 * free_j(rig)
    with rig.session(budget) as session:
        began_s = rig.clock.now_s()
        last = rig.run(session, 50)[-1]
        assert last["state"] == "TRACKING" and last["provenance"] == "simulated"
        late = measured(session, began_s + 24)
        assert len(late) >= 10
        assert statistics.fmean(late) == pytest.approx(budget, rel=0.05)
        assert last["price"] > 0 and last["distinct_experts"] < 6
    assert "TRACKING" in session.report()


def test_a_changed_budget_is_followed_and_the_lags_are_told() -> None:
    rig = Rig()
    free = free_j(rig)
    with rig.session(0.9 * free) as session:
        rig.run(session, 24)
        session.set_budget(f"{700 * free} mJ/token")
        changed_s = rig.clock.now_s()
        rig.run(session, 40)
        assert statistics.fmean(measured(session, changed_s + 20)) == pytest.approx(0.7 * free, rel=0.05)
        lags = session.tally.reaction("decode")
        assert lags.detection is not None and lags.rise_63 is not None
        assert 0 < lags.detection.ms <= lags.rise_63.ms < 20_000 and lags.detection.tokens > 0
        assert "detected after" in session.report()


def test_a_budget_below_the_floor_is_infeasible_and_one_above_is_slack() -> None:
    rig = Rig()
    free = free_j(rig)
    with rig.session(0.1 * free) as session:
        low = rig.run(session, 30)[-1]
        assert low["state"] == "INFEASIBLE" and "cheapest" in low["reason"]
        costs = session._instrument.solver.cost_range("decode")  # type: ignore[union-attr]
        assert costs is not None and low["j_per_token_modelled"] == pytest.approx(costs.low_j, rel=0.02)
        session.set_budget(2 * free)
        high = rig.run(session, 24)[-1]
        assert high["state"] == "SLACK" and high["price"] == 0
        assert high["experts_per_token"] == 4


def test_the_windows_that_the_first_search_fell_into_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    budget = 0.8 * free_j(rig)
    ready_s: list[float] = []
    moved: list[float] = []
    cost_range, update = PriceSolver.cost_range, BudgetController.update

    def slow_at_first(solver: PriceSolver, *args: Any) -> Any:
        if not ready_s:
            rig.load.set(rig.clock.now_s(), 0.0)  # the device waits for the host, which compiles
            rig.clock.sleep_s(3.0)
            ready_s.append(rig.clock.now_s())
        return cost_range(solver, *args)

    def noting(controller: BudgetController, reading: ControlReading, costs: Any) -> Any:
        if reading.status == "valid":
            moved.append(reading.t_s - reading.window_s)
        return update(controller, reading, costs)

    monkeypatch.setattr(PriceSolver, "cost_range", slow_at_first)
    monkeypatch.setattr(BudgetController, "update", noting)
    with rig.session(budget) as session:
        rig.run(session, 24)
    assert ready_s and moved and min(moved) >= ready_s[0]


def test_a_power_cap_is_held() -> None:
    rig = Rig()
    with rig.session() as session:
        free_w = rig.run(session, 12)[-1]["power_w"]
    cap_w = 0.8 * free_w
    with rig.session(f"{cap_w} W") as session:
        began_s = rig.clock.now_s()
        last = rig.run(session, 64)[-1]
        powers = [row["power_w"] for row in session.tally.history if row["t_s"] > began_s + 40]
    assert last["state"] == "TRACKING"
    assert statistics.fmean(powers) == pytest.approx(cap_w, rel=0.05)


@pytest.mark.parametrize("kind", ["lost", "nan"])
def test_telemetry_that_dies_leaves_the_work_alone(kind: Any) -> None:
    rig = Rig(faults=[Fault(kind=kind, start_s=1036.0)])
    budget = 0.8 * free_j(rig)
    with rig.session(budget) as session:
        before = rig.run(session, 1034 - rig.clock.now_s())[-1]
        assert before["state"] == "TRACKING"
        after = rig.run(session, 24)
        assert after[-1]["state"] == "STALE", after[-1]["reason"]
        tokens = [m["tokens"] for m in after]
        assert tokens == [5 * rig.batch] * len(tokens)  # work goes on
        used = statistics.fmean(m["j_per_token_modelled"] for m in after[-20:])
        assert used == pytest.approx(before["cost_target_j"], rel=0.05)  # and the target is held
    assert "STALE" in session.report()


def test_telemetry_that_comes_back_is_taken_up() -> None:
    rig = Rig(faults=[Fault(kind="dropout", start_s=1040.0, duration_s=15.0)])
    budget = 0.8 * free_j(rig)
    with rig.session(budget) as session:
        rig.run(session, 1040 - rig.clock.now_s())
        states = [m["state"] for m in rig.run(session, 60)]
        # The sampler asks a device that fails less and less often, at most every 30 s.
        assert "STALE" in states and states[-1] == "TRACKING"


def test_feed_forward_alone_misses_what_the_model_does_not_know() -> None:
    rig = Rig(gain=1.5)
    free = free_j(rig)
    with rig.session(0.8 * free, feedback="modelled") as session:
        began_s = rig.clock.now_s()
        last = rig.run(session, 40)[-1]
        found = statistics.fmean(measured(session, began_s + 10))
    assert (last["provenance"] == "simulated" and "feed-forward only" in last["reason"]) or last["state"] == "SLACK"
    assert found > 1.05 * 0.8 * free  # the honest control: measured, reported, and not used


def test_both_phases_share_a_window_by_their_modelled_joules() -> None:
    rig = Rig(noise=0.0)
    spent = {"prefill": 0.0, "decode": 0.0}
    with rig.session() as session, torch.no_grad():
        for _ in range(50):
            for phase, length in (("prefill", 4), ("decode", 1)):
                rig.model(rig.ids(length))
                spent[phase] += joules_of(rig.model, rig.cost, rig.batch * length)
            session.step()
        windows = dict(session.tally.windows)
        assert set(windows) == {"prefill", "decode"}
        for phase, part in windows.items():
            assert part.measured_j is not None and part.window.energy_j is not None
            others = [other for name, other in windows.items() if name != phase]
            whole_j = part.modelled_j + others[0].modelled_j
            assert part.measured_j == pytest.approx(part.window.energy_j * part.modelled_j / whole_j)
            own = [r for r in session.tally.history if r["phase"] == phase]
            tokens = rig.batch * (4 if phase == "prefill" else 1)
            mean_j = statistics.fmean(r["j_per_token_modelled"] for r in own)
            assert mean_j == pytest.approx(spent[phase] / 50 / tokens, rel=0.03)
            assert sum(r["tokens"] for r in own) == pytest.approx(50 * tokens, rel=0.15)
    # Windows are contiguous: what they measured is what the board gave, over the time they covered.
    energy = session.tally.energy
    assert not energy.partial and energy.measured_s > 0.85 * 100 * FORWARD_S
    plant = rig.source.plants[0]
    assert energy.energy_j / energy.measured_s == pytest.approx(
        plant.true_between(rig.clock.now_s() - 18, rig.clock.now_s() - 1) / 17, rel=0.05
    )


def test_prefill_and_decode_are_held_each_by_itself() -> None:
    rig = Rig(watts=60)
    with rig.session() as session, torch.no_grad():

        def work(rounds: int) -> dict[str, Any]:
            for _ in range(rounds):
                rig.model(rig.ids(32)), rig.model(rig.ids())
                metrics = session.step()
            return metrics

        work(25)
        free = {phase: part.j_per_token or 0.0 for phase, part in session.tally.windows.items()}
        budgets = {"prefill": 0.9 * free["prefill"], "decode": 0.85 * free["decode"]}
        session.set_budget({"j_per_token": budgets})
        began_s = rig.clock.now_s()
        metrics = work(140)
        for phase, budget in budgets.items():
            rows = [r for r in session.tally.history if r["phase"] == phase and r["t_s"] > began_s + 26]
            assert metrics[f"{phase}/state"] == "TRACKING", metrics[f"{phase}/reason"]
            found = [r["j_per_token_measured"] for r in rows]
            assert statistics.fmean(found) == pytest.approx(budget, rel=0.05)
            assert statistics.stdev(found) < 0.1 * budget  # neither swings the other


def test_a_forward_under_way_counts_in_proportion() -> None:
    rig = Rig()
    with rig.meter.open() as meter:
        windows = EnergyWindows(meter, 2.0)
        began_s = windows._from_s
        pairs = torch.zeros(1, 1)
        windows.add(ForwardCount("decode", 10, began_s + 1.0 + i, pairs, 1, 4.0) for i in range(4))
        windows.add([ForwardCount("prefill", 100, began_s + 6.0, pairs, 1, 8.0)])
        assert windows._done("decode", began_s + 0.5, began_s + 2.25) == pytest.approx((17.5, 7.0))
        assert windows._done("prefill", began_s + 3.0, began_s + 4.5) == pytest.approx((25.0, 2.0))
        assert windows._done("decode", began_s + 5.0, began_s + 9.0) == (0.0, 0.0)
