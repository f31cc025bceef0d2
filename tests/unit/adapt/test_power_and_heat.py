"""Power and temperature caps on the simulated board: they tighten, release, combine, and do not wind up."""

from __future__ import annotations

import statistics

import pytest
from control_plant import PERIOD_S, BoardPlant

from thermoe.adapt.budget import Budget
from thermoe.adapt.heat import HeatLoop
from thermoe.adapt.lags import LagWindow, reaction_lags

#: At price 0 the plant draws about 620 W and would reach 59 C; the cheapest routing draws about 165 W.
FREE_W = 620


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)


@pytest.mark.parametrize("cap_w", [250, 400, 550])
def test_a_power_cap_is_held(cap_w: float) -> None:
    plant = BoardPlant(Budget(power_w=cap_w), seed=1)
    plant.run(80)
    assert _mean(plant.power_w[-40:]) == pytest.approx(cap_w, rel=0.02)
    assert plant.output.state == "TRACKING" and plant.output.binding == "power_w"
    settled = next(i for i in range(80) if all(abs(p / cap_w - 1) < 0.05 for p in plant.power_w[i : i + 10]))
    assert settled <= 15


def test_a_power_cap_tightens_and_releases_and_the_lags_can_be_read() -> None:
    plant = BoardPlant(Budget(power_w=700), seed=2)
    plant.run(20)
    assert plant.output.state == "SLACK" and plant.output.cost_target_j is None and plant.output.binding is None
    plant.set_budget(Budget(power_w=350))
    plant.run(40)
    assert _mean(plant.power_w[-20:]) == pytest.approx(350, rel=0.02)
    windows = [LagWindow(t_s=PERIOD_S * (i + 1), tokens=25_000, value=cost) for i, cost in enumerate(plant.cost)]
    lags = reaction_lags(windows, 20 * PERIOD_S)
    assert lags.detection is not None and lags.rise_63 is not None and lags.settling is not None
    assert lags.detection.windows <= lags.rise_63.windows <= lags.settling.windows <= 15
    assert lags.settling.tokens == 25_000 * lags.settling.windows
    plant.set_budget(Budget(power_w=700))
    plant.run(20)
    assert plant.output.state == "SLACK" and plant.cost[-1] == 1.0


def test_a_cap_below_the_floor_is_infeasible_and_the_cheapest_routing_is_held() -> None:
    plant = BoardPlant(Budget(power_w=120), seed=3)
    plant.run(30)
    assert plant.output.state == "INFEASIBLE" and plant.output.binding == "power_w"
    assert plant.output.cost_target_j == pytest.approx(plant.range.low_j)
    assert "W, above 120 W; it is held" in plant.output.reason


def test_a_cap_holds_when_the_work_changes() -> None:
    """Watts depend on how much work there is; the target is a part of the full cost, so it carries over."""
    plant = BoardPlant(Budget(power_w=300), seed=4)
    plant.run(40)
    plant.rate = 20_000
    plant.run(40)
    assert _mean(plant.power_w[-20:]) == pytest.approx(300, rel=0.03)
    plant.rate = 3_000  # not enough work to reach the cap
    plant.run(60)
    assert plant.output.state == "SLACK" and plant.cost[-1] == 1.0


def test_the_tightest_limit_binds_and_the_others_do_not_wind_up() -> None:
    """Joules bind, then power does; once power is released the joules are held again without an unwinding."""
    both = Budget(j_per_token=0.040, power_w=600)  # 0.04 J/token is 500 W at 12,500 tokens/s
    plant = BoardPlant(both, seed=5)
    plant.run(60)
    assert plant.output.binding == "j_per_token"
    assert _mean(plant.power_w[-20:]) == pytest.approx(500, rel=0.03)
    span_j = plant.range.high_j - plant.range.low_j
    waiting = plant.output.loops["power_w"].cost_target_j
    applied = plant.output.cost_target_j
    assert applied is not None
    assert waiting is None or waiting <= applied + 0.1 * span_j + 1e-12
    plant.set_budget(Budget(j_per_token=0.040, power_w=300))
    plant.run(100)
    assert plant.output.binding == "power_w"
    assert _mean(plant.power_w[-20:]) == pytest.approx(300, rel=0.03)
    waiting, applied = plant.output.loops["j_per_token"].cost_target_j, plant.output.cost_target_j
    assert applied is not None and waiting is not None and waiting <= applied + 0.1 * span_j + 1e-12
    plant.set_budget(both)
    plant.run(30)
    assert max(plant.power_w[-30:]) < 1.1 * 500
    assert _mean(plant.power_w[-10:]) == pytest.approx(500, rel=0.05)
    assert plant.output.binding == "j_per_token"


def test_a_temperature_limit_is_kept_through_a_step_of_the_air() -> None:
    limit_c = 55.0
    plant = BoardPlant(Budget(temp_c=limit_c), seed=6)
    plant.run(200)
    assert plant.output.state == "TRACKING" and plant.output.binding == "temp_c"
    assert plant.output.power_cap_w is not None and plant.output.power_cap_w < FREE_W
    assert "which the temperature allows" in plant.output.reason
    object.__setattr__(plant.board.board, "ambient_c", plant.board.board.ambient_c + 5.0)
    plant.run(150)
    assert max(plant.temp_c) < limit_c  # the margin takes the overshoot
    assert _mean(plant.temp_c[150:200]) == pytest.approx(limit_c - 4, abs=1.5)
    assert _mean(plant.temp_c[-50:]) == pytest.approx(limit_c - 4, abs=1.5)


def test_a_temperature_limit_tightens_faster_than_it_releases() -> None:
    plant = BoardPlant(Budget(temp_c=75), seed=7)
    plant.run(150)
    assert plant.output.state == "SLACK" and plant.cost[-1] == 1.0
    free_c = plant.temp_c[-1]
    assert 55 < free_c < 65
    plant.set_budget(Budget(temp_c=56))
    plant.run(150)
    tightened = plant.cost[150:300]
    assert plant.temp_c[-1] < 56
    plant.set_budget(Budget(temp_c=75))
    plant.run(400)
    released = plant.cost[300:]
    assert plant.output.state == "SLACK" and released[-1] == 1.0
    change = 1.0 - tightened[-1]
    assert change > 0.1
    down = next(i for i, cost in enumerate(tightened) if cost < 1.0 - 0.63 * change)
    assert down <= 60


def test_heat_loop_engages_below_the_limit_and_lets_go_when_it_holds_nothing() -> None:
    loop = HeatLoop(70.0, 4.0)
    t_s = 0.0

    def feed(temp_c: float, power_w: float, readings: int = 5) -> float | None:
        nonlocal t_s
        for _ in range(readings):
            t_s += PERIOD_S
            loop.update(t_s, temp_c, power_w)
        return loop.cap_w

    assert feed(60.0, 500.0, 10) is None
    first = feed(64.0, 500.0, 10)
    assert first is not None and first > 500.0
    hotter = [feed(temp, 500.0) for temp in (66.0, 68.0, 70.0)]
    assert all(a is not None and b is not None and a > b for a, b in zip([first, *hotter], hotter, strict=False))
    tight = [feed(70.0, 500.0) for _ in range(30)][-1]
    assert tight == pytest.approx(0.8 * 500.0)  # power that does not follow is no reason to wind up
    assert feed(50.0, 100.0, 200) is None


def test_integral_release_is_three_times_slower_than_tightening() -> None:
    moves = {}
    for off_k in (-2.0, 2.0):
        loop = HeatLoop(70.0, 4.0)
        loop.cap_w, loop.last_room_k, loop.acted_s = 500.0, off_k, 0.0
        loop.update(10.0, 66.0 - off_k, 500.0)
        assert loop.cap_w is not None and loop.kelvin_per_watt is not None
        moves[off_k] = (loop.cap_w - 500.0) * loop.kelvin_per_watt
    assert moves[-2.0] == pytest.approx(-2.0 / 6)  # 10 s of the 60 s of the heat sink
    assert moves[2.0] == pytest.approx(-moves[-2.0] / 3)


def test_a_temperature_that_goes_missing_is_stale_and_the_cap_is_held() -> None:
    plant = BoardPlant(Budget(temp_c=55), seed=8)
    plant.run(200)
    cap_w = plant.output.power_cap_w
    plant.run(14, temp_c=None)
    assert plant.output.state == "TRACKING"
    plant.run(1, temp_c=None)
    assert plant.output.state == "STALE" and plant.output.power_cap_w == cap_w
    assert "the temperature is not measured any more; its power cap of" in plant.output.reason
    plant.run(1)
    assert plant.output.state == "TRACKING"


def test_heat_is_watched_in_windows_whose_joules_are_in_doubt() -> None:
    plant = BoardPlant(Budget(temp_c=55), seed=9)
    plant.run(10)
    plant.run(190, status="flagged", reason="shared device")
    assert plant.output.power_cap_w is not None
    assert plant.controller._heat is not None and plant.controller._heat.seen_s == plant.t_s


def test_a_temperature_that_the_cheapest_routing_exceeds_is_infeasible() -> None:
    plant = BoardPlant(Budget(temp_c=41), seed=10)
    plant.run(150)
    assert plant.output.state == "INFEASIBLE" and plant.output.binding == "temp_c"
    assert plant.cost[-1] == pytest.approx(plant.range.low_j / plant.range.high_j)
    assert [output.state for output in plant.outputs[-50:]].count("INFEASIBLE") >= 45
