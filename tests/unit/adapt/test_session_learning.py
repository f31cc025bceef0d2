"""A session that learns: joules of learning are inside joules per token, add up, and the budget is for the sum."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from session_rig import Rig, joules_of, one_layer, scaled_cost
from torch import nn

from thermoe import AdaptiveSession, EnergyMeter, RouterAdapter
from thermoe.adapt.learning_work import LearningWork, is_serving, serving_nothing
from thermoe.adapt.safeguards import Safeguards
from thermoe.errors import CheckpointError, ConfigError, RoutingError, TelemetryError
from thermoe.moe.layer import routed_modules
from thermoe.telemetry.clock import VirtualClock
from thermoe.testing import random_tokens, tiny_moe

IDS, STEP = random_tokens(4, 12), random_tokens(6, 1, seed=4)
COST = scaled_cost(1e6)
#: Every batch is learned from, in one step that takes the graph of the forward that scored, and nothing else is done.
ALWAYS: dict[str, Any] = {"bucket": None, "lr": 1e-4, "steps": 1, "safeguards": Safeguards(judge=False, shadow=False)}


@pytest.fixture(autouse=True)
def telemetry_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THERMOE_TELEMETRY", raising=False)


@pytest.fixture
def meter() -> EnergyMeter:
    return EnergyMeter(telemetry="off", clock=VirtualClock())


def moe() -> Any:
    return tiny_moe(num_experts=8, top_k=4)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def work(energy_j: float, *, t_end_s: float = 0.0, duration_s: float = 0.0) -> LearningWork:
    return LearningWork(kind="judge", tokens=4, energy_j=energy_j, duration_s=duration_s, t_end_s=t_end_s)


# -- what is counted --------------------------------------------------------------------------------------------------


def test_forwards_that_serve_nobody_are_neither_tokens_nor_rows_of_the_search(meter: EnergyMeter) -> None:
    model = moe()
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, auto_step=2) as session, torch.no_grad():
        model(STEP)
        rows, steps = session._instrument.solver.rows("decode"), session.tally.steps  # type: ignore[union-attr]
        with serving_nothing():
            for _ in range(5):
                model(STEP)
        assert session.pending == 0 and session.tally.steps == steps
        assert session._instrument.solver.rows("decode") == rows  # type: ignore[union-attr]
        model(STEP)
        assert session.step()["tokens"] == 6
    assert session.tally.tokens == 12


@pytest.mark.parametrize("restored", [False, True], ids=["left", "restored"])
def test_a_layer_that_did_not_run_is_not_counted_by_what_served_nobody(restored: bool, meter: EnergyMeter) -> None:
    """Whoever makes a forward for nobody may put the decisions on record back to those that were served."""
    model = moe()
    modules = [module for _, module in routed_modules(model)]
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session, torch.no_grad():
        model(STEP)
        served = [module.last_routing for module in modules]
        with serving_nothing():
            model(STEP)
        for module, decision in zip(modules, served, strict=True):
            module.last_routing = decision if restored else module.last_routing
        blocks, model.transformer.h = model.transformer.h, model.transformer.h[:1]
        model(STEP)
        model.transformer.h = blocks
        held = session._instrument.log._held[-1][1].decisions  # type: ignore[union-attr]
        assert held[0] is not None and held[1] is None


def test_modelled_joules_of_learning_are_inside_those_per_token(meter: EnergyMeter) -> None:
    model = moe()
    with AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS) as session:
        for seed in range(3):
            found = session.read(random_tokens(4, 12, seed=seed))
            metrics = session.metrics
            assert found.learned and metrics["tokens"] == 48
            # An update costs a backward to the activations: as much as the forward that scored.
            routing_j = metrics["j_per_token_routing"] * 48
            assert metrics["learning_j_modelled"] == pytest.approx(routing_j)
            assert metrics["j_per_token_modelled"] * 48 == pytest.approx(routing_j + metrics["learning_j_modelled"])
            assert metrics["prefill/j_per_token_modelled"] == metrics["j_per_token_modelled"]
        assert metrics["learning_updates"] == 3 and metrics["learning_frac"] == pytest.approx(0.5)
        assert metrics["learning_j_attributed"] is None  # no sensor
        assert session.adapter is not None
        assert session.tally.learning.energy_j == pytest.approx(session.adapter.ledger.energy_j)
        assert session.adapter.bucket.served_j == pytest.approx(session.tally.served_j)
    assert "learning: 3 update" in session.report() and "of it learning" in session.report()


def test_modelled_joules_of_parts_that_are_read_again_are_counted_too(meter: EnergyMeter) -> None:
    """With the steps that are taken by default: a forward and a backward of each part."""
    model, again_j = moe(), []

    def price(module: nn.Module, args: Any, output: Any) -> None:
        if not is_serving():
            again_j.append(joules_of(model, COST, output.logits.shape[0] * output.logits.shape[1]))

    model.register_forward_hook(price)
    learn = {name: value for name, value in ALWAYS.items() if name != "steps"}
    with AdaptiveSession(model, meter=meter, cost_model=COST, learn=learn) as session:
        assert session.read(IDS).learned
        metrics = session.metrics
        assert len(again_j) == 3, "one of four sequences is held back, the others are a part each"
        assert metrics["learning_j_modelled"] == pytest.approx(2 * sum(again_j))
        total_j = metrics["j_per_token_routing"] * 48 + metrics["learning_j_modelled"]
        assert metrics["j_per_token_modelled"] * 48 == pytest.approx(total_j)


def test_learning_without_tokens_waits_for_some_and_falls_on_phases_by_their_joules(meter: EnergyMeter) -> None:
    model = moe()
    with AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS) as session, torch.no_grad():
        assert session.adapter is not None
        session.adapter.ledger.append(work(2.0))
        empty = session.step()
        assert empty["learning_j_modelled"] == 0 and session.tally.learning.pending_j == 2.0
        session.adapter.ledger.append(work(1.0))
        model(STEP), model(IDS)
        full = session.step()
        assert full["learning_j_modelled"] == pytest.approx(3.0) and session.tally.learning.pending_j == 0
        parts = session.tally.phases
        assert parts["prefill"].learning_j + parts["decode"].learning_j == pytest.approx(3.0)
        for one, other in (("prefill", "decode"), ("decode", "prefill")):
            served_j = parts[one].energy_modelled_j + parts[other].energy_modelled_j  # type: ignore[index]
            share = parts[one].energy_modelled_j / served_j  # type: ignore[index]
            assert parts[one].learning_j == pytest.approx(3.0 * share)  # type: ignore[index]
        session.adapter.ledger.append(work(5.0))
    assert session.tally.learning.pending_j == 5.0 and "5 J came after the last token" in session.report()


def test_a_prompt_that_is_read_to_learn_from_it_is_all_learning(meter: EnergyMeter) -> None:
    model = moe()
    with AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS) as session:
        found = session.read(IDS, served=False)
        assert found.learned and session.metrics["tokens"] == 0
        kinds = session.tally.learning.counts
        assert kinds == {"update": 1, "read": 1}
        read_j = session.tally.learning.pending_j
        served = session.read(IDS)  # the same text, with routers that hardly moved
        assert torch.allclose(served.sequence_nll, found.sequence_nll, rtol=0.02)
        counts = session.metrics
        routing_j = counts["j_per_token_routing"] * 48
        assert read_j == pytest.approx(2 * routing_j, rel=0.05)
        assert counts["learning_j_modelled"] == pytest.approx(read_j + routing_j, rel=0.05)
        assert session.tally.tokens == 48


# -- the sensor --------------------------------------------------------------------------------------------------------


def learned(rig: Rig, session: AdaptiveSession, rounds: int, every: int = 1, length: int = 6) -> None:
    """Read so many batches, with an update at every ``every``th."""
    assert session.adapter is not None
    for number in range(rounds):
        weights = None if number % every == 0 else torch.zeros(rig.batch, length)
        session.read(rig.ids(length), weights=weights)


def opened(rig: Rig, session: AdaptiveSession) -> AdaptiveSession:
    assert session.adapter is not None
    rig.charge_updates(session.adapter)
    return session


def test_the_joules_of_a_window_are_on_its_tokens_learning_included() -> None:
    rig = Rig(noise=0.0)
    windows: list[Any] = []
    with rig.session(learn=ALWAYS) as session:
        opened(rig, session)
        seen = session._loop.windows.close  # type: ignore[union-attr]

        def close(*, last: bool = False) -> Any:
            closed = seen(last=last)
            if closed is not None:
                windows.append(closed)
            return closed

        session._loop.windows.close = close  # type: ignore[union-attr, method-assign]
        learned(rig, session, 60, every=2)
        with torch.no_grad():
            for _ in range(20):
                rig.model(rig.ids())
                session.step()
    measured = [closed for closed in windows if closed.window.energy_j is not None]
    assert len(measured) >= 8 and any(len(closed.parts) == 2 for closed in measured)
    for closed in measured:
        assert sum(part.measured_j for part in closed.parts) == pytest.approx(closed.window.energy_j, rel=1e-9)
    rows = [row for row in session.tally.history if row["j_per_token_measured"] is not None]
    total_j = sum(row["j_per_token_measured"] * row["tokens"] for row in rows)
    energy = session.tally.energy
    assert total_j == pytest.approx(energy.energy_j, rel=1e-9)
    # And these are the board's own: over all of the session's time, but for its ragged ends.
    true_j = rig.source.plants[0].true_between(1001.0, 1001.0 + energy.measured_s)
    assert energy.energy_j == pytest.approx(true_j, rel=0.08)


def test_learning_costs_tokens_what_the_board_draws_for_it() -> None:
    found = {}
    for every in (1, 10**6):
        rig = Rig(noise=0.0)
        with rig.session(learn=ALWAYS) as session:
            opened(rig, session)
            learned(rig, session, 60, every=every)
        energy = session.tally.energy
        found[every] = energy.energy_j / energy.tokens
        learning = session.tally.learning
    # The second never learned, but for its first batch: one update as dear as a forward doubles what a token costs,
    # the board's power at rest included, which both times run on.
    assert found[1] == pytest.approx(2 * found[10**6], rel=0.08)
    assert learning.counts == {"update": 1}


def test_joules_are_attributed_by_time() -> None:
    rig = Rig(noise=0.0)
    with rig.session(learn=ALWAYS) as session:
        opened(rig, session)
        learned(rig, session, 60)
        metrics = session.metrics
    energy = session.tally.energy
    assert metrics["provenance_learning_attributed"] == "simulated, attributed by time"
    # Scoring and learning take the same time in turn.
    assert session.tally.learning.attributed_j == pytest.approx(0.5 * energy.energy_j, rel=0.03)
    assert session.tally.learning.duration_s == pytest.approx(60 * 0.2, rel=0.03)


def test_a_window_in_which_nothing_was_served_goes_on_until_something_is() -> None:
    rig = Rig(noise=0.0)
    with rig.session(learn=ALWAYS) as session:
        opened(rig, session)
        assert session.adapter is not None
        with torch.no_grad():
            for _ in range(20):
                rig.model(rig.ids())
            session.step()
            for _ in range(30):
                since_s = rig.clock.now_s()
                with serving_nothing():
                    rig.model(rig.ids())
                spent_s = rig.clock.now_s() - since_s
                session.adapter.ledger.append(work(1.0, t_end_s=rig.clock.now_s(), duration_s=spent_s))
                session.step()
            closed_before = len(session.tally.history)
            for _ in range(20):
                rig.model(rig.ids())
                session.step()
        later = list(session.tally.history)[closed_before:]
        energy, learning = session.tally.energy, session.tally.learning
        assert energy.energy_j == pytest.approx(
            sum(r["j_per_token_measured"] * r["tokens"] for r in session.tally.history if r["j_per_token_measured"])
        )
        assert max(r["window_s"] for r in later) > 4  # the six seconds of the judge are in one window with tokens
        assert learning.attributed_j is not None and learning.attributed_j > 0


def test_joules_of_learning_at_the_very_end_are_not_lost() -> None:
    rig = Rig(noise=0.0)
    with rig.session(learn=ALWAYS) as session:
        assert session.adapter is not None
        with torch.no_grad():
            for _ in range(20):
                rig.model(rig.ids())
            session.step()
            for _ in range(30):
                with serving_nothing():
                    rig.model(rig.ids())
                session.adapter.ledger.append(work(1.0, t_end_s=rig.clock.now_s(), duration_s=0.2))
    energy = session.tally.energy
    assert energy.measured_s == pytest.approx(50 * 0.2, abs=2.1)


# -- the budget --------------------------------------------------------------------------------------------------------


def per_token(rows: list[dict[str, Any]]) -> float:
    return sum(r["j_per_token_modelled"] * r["tokens"] for r in rows) / sum(r["tokens"] for r in rows)


@pytest.mark.parametrize("every", [1, 8])
def test_a_modelled_budget_holds_for_routing_and_learning_together(every: int, meter: EnergyMeter) -> None:
    model, none = one_layer(), torch.zeros(2, 4)
    session = AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS, feedback="modelled", solve_every=4)
    with session:
        for seed in range(8):
            session.read(random_tokens(2, 4, seed=seed), weights=none)
        costs = session._instrument.solver.cost_range("prefill")  # type: ignore[union-attr]
        assert costs is not None
        budget = (1 + 1 / every) * (costs.low_j + 0.6 * (costs.high_j - costs.low_j))
        session.set_budget(budget)
        rows = []
        for seed in range(192):
            session.read(random_tokens(2, 4, seed=seed), weights=None if seed % every == 0 else none)
            rows.append(session.metrics)
        late = rows[-96:]
        assert late[-1]["state"] == "TRACKING" and "is left to learning" in late[-1]["reason"]
        assert per_token(late) == pytest.approx(budget, rel=0.04)
        routing = statistics.fmean(r["j_per_token_routing"] for r in late)
        assert routing < 0.95 * budget and late[-1]["price"] > 0


@pytest.mark.tuned
def test_a_burst_of_learning_is_paid_back_by_the_tokens_after_it(meter: EnergyMeter) -> None:
    model = one_layer()
    session = AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS, feedback="modelled", solve_every=4)
    with session, torch.no_grad():
        for seed in range(8):
            model(random_tokens(6, 1, seed=seed))
            session.step()
        costs = session._instrument.solver.cost_range("decode")  # type: ignore[union-attr]
        assert costs is not None and session.adapter is not None
        budget = costs.low_j + 0.7 * (costs.high_j - costs.low_j)
        session.set_budget(budget)
        session.step()
        rows = []
        burst_j = 6 * 6 * (costs.high_j - costs.low_j)  # six forwards' worth of all that routing can save
        session.adapter.ledger.append(work(burst_j))
        for seed in range(144):
            model(random_tokens(6, 1, seed=seed))
            rows.append(session.step())
        assert rows[0]["learning_j_modelled"] == pytest.approx(burst_j)
        dearest = statistics.fmean(r["j_per_token_routing"] for r in rows[1:9])
        assert dearest < budget - 0.1 * (costs.high_j - costs.low_j)  # it saves at first
        assert per_token(rows) == pytest.approx(budget, rel=0.02)  # and over the whole the budget is held
        assert session._holder.levy.of("decode") < 0.01 * budget


@pytest.mark.tuned
def test_learning_that_alone_is_above_the_budget_is_infeasible(meter: EnergyMeter) -> None:
    model = one_layer()
    session = AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS, feedback="modelled", solve_every=4)
    with session:
        session.read(IDS)
        assert session.metrics["j_per_token_routing"] is not None
        costs = session._instrument.solver.cost_range("prefill")  # type: ignore[union-attr]
        assert costs is not None
        session.set_budget(0.8 * costs.low_j)
        for seed in range(150):
            session.read(random_tokens(4, 12, seed=seed))
        metrics = session.metrics
        assert metrics["state"] == "INFEASIBLE" and "learning alone" in metrics["reason"], metrics["reason"]
        assert metrics["j_per_token_routing"] == pytest.approx(costs.low_j, rel=0.05)


def test_a_measured_budget_is_reached_with_learning_in_it() -> None:
    rig = Rig(gain=1.3)
    with rig.session(learn=ALWAYS) as session:
        opened(rig, session)
        learned(rig, session, 40, every=4)
        free_j = session.tally.energy.energy_j / session.tally.energy.tokens
    budget = 0.96 * free_j
    with rig.session(budget, learn=ALWAYS) as session:
        opened(rig, session)
        began_s = rig.clock.now_s()
        learned(rig, session, 200, every=4)
        late = [r for r in session.tally.history if r["t_s"] > began_s + 24 and r["j_per_token_measured"] is not None]
        assert session.metrics["state"] == "TRACKING", session.metrics["reason"]
        mean_j = sum(r["j_per_token_measured"] * r["tokens"] for r in late) / sum(r["tokens"] for r in late)
        assert mean_j == pytest.approx(budget, rel=0.05)
        assert session.metrics["price"] > 0


# -- whose adapter it is -----------------------------------------------------------------------------------------------


def test_an_adapter_of_the_sessions_own_is_closed_and_the_model_is_as_before(meter: EnergyMeter) -> None:
    model = moe()
    before, state = logits(model), copy.deepcopy(model.state_dict())
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, learn={**ALWAYS, "lr": 0.05}) as session:
        assert isinstance(session.adapter, RouterAdapter) and session.adapter.ledger.clock is meter.clock
        session.set_budget(None)
        session.read(IDS)
        assert not torch.equal(logits(model), before)
    assert session.adapter is None
    assert torch.equal(logits(model), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_the_users_is_taken_in_and_left_open(meter: EnergyMeter) -> None:
    model = moe()
    with RouterAdapter(model, **ALWAYS) as adapter:
        adapter.score_and_learn(IDS)
        clock, spent_j = adapter.ledger.clock, adapter.ledger.energy_j
        with AdaptiveSession(model, meter=meter, cost_model=COST, learn=adapter) as session:
            assert session.adapter is adapter and adapter.ledger.clock is meter.clock
            assert not adapter.bucket.earns_scoring
            session.read(IDS)
            # What it learned before is none of the session's.
            assert session.tally.learning.energy_j == pytest.approx(adapter.ledger.energy_j - spent_j)
            assert session.metrics["learning_updates"] == 1
            adapter.score_and_learn(IDS)  # what the user does with it is counted as well
            assert session.step()["learning_updates"] == 2
        assert adapter.ledger.clock is clock and adapter.bucket.earns_scoring
        assert adapter.score_and_learn(IDS).learned
        assert session.state_dict()["adapter"]["streams"]
        with session:  # entering again does not turn the user's adapter back
            assert session.adapter is not None and session.adapter.updates == 4


def test_learning_is_refused_where_it_cannot_be(meter: EnergyMeter) -> None:
    model = moe()
    for learn in (3, "yes", {"learning_rate": 1.0}, {1: 2}):
        with pytest.raises(ConfigError, match=r"learn|option"):
            AdaptiveSession(model, meter=meter, learn=learn)  # type: ignore[arg-type]
    with RouterAdapter(model) as adapter:
        with pytest.raises(ConfigError, match="another model"):
            AdaptiveSession(moe(), meter=meter, learn=adapter)
        with pytest.raises(RoutingError), AdaptiveSession(model, meter=meter, learn=True):
            pass
        assert not model._forward_hooks  # nothing half-done
    with pytest.raises(ConfigError), AdaptiveSession(model, meter=meter, learn={"lr": -1.0}):
        pass
    assert not model._forward_hooks and all(m.router.fast is None for _, m in routed_modules(model))  # type: ignore[union-attr]
    with pytest.raises(RoutingError, match="closed"), AdaptiveSession(model, meter=meter, learn=adapter):
        pass
    with AdaptiveSession(model, meter=meter, learn=False) as session:
        assert session.adapter is None
        with pytest.raises(ConfigError, match="does not learn"):
            session.read(IDS)
    with pytest.raises(TelemetryError, match="not open"):
        session.read(IDS)
    with AdaptiveSession(model, meter=meter, learn=True) as session:
        with pytest.raises(ConfigError, match="nothing to score"):
            session.read(torch.zeros(1, 1))
        assert session.read(IDS).sequence_nll.shape == (4,)


def test_reading_inside_on_step_is_refused(meter: EnergyMeter) -> None:
    model, errors = moe(), []

    def again(metrics: dict[str, Any]) -> None:
        try:
            session.read(IDS)
        except TelemetryError as error:
            errors.append(str(error))

    session = AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS, on_step=again)
    with session:
        session.read(IDS)
    assert len(errors) == 1 and "read was called inside on_step" in errors[0]


def test_steps_are_not_taken_in_the_middle_of_reading(meter: EnergyMeter) -> None:
    model = moe()
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, learn=ALWAYS, auto_step=1) as session:
        session.read(IDS)
        assert session.tally.steps == 1 and session.metrics["tokens"] == 48
        assert session.metrics["learning_updates"] == 1


# -- the state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["closed", "open"])
def test_the_state_of_a_session_holds_what_was_learned(when: str, meter: EnergyMeter) -> None:
    model, learn = moe(), {**ALWAYS, "lr": 0.05}
    with AdaptiveSession(model, meter=meter, cost_model=COST, learn=learn) as session:
        session.read(IDS)
        session.read(random_tokens(4, 12, seed=9))
        adapted, state = logits(model), copy.deepcopy(session.state_dict())
    assert session.state_dict().keys() == state.keys()
    other = AdaptiveSession(model, meter=EnergyMeter(telemetry="off"), cost_model=COST, learn=learn)
    if when == "closed":
        other.load_state_dict(state)
    with other:
        if when == "open":
            assert not torch.equal(logits(model), adapted)
            other.load_state_dict(state)
        assert torch.equal(logits(model), adapted)
        other.step()
        assert other.tally.learning.counts == {"update": 2}
        again = other.read(IDS)
        assert other.metrics["learning_updates"] == 3 and again.learned
    with session:  # what a session learned comes back with it
        assert torch.equal(logits(model), adapted)
        assert session.adapter is not None
        session.adapter.close()  # and what somebody closed inside does not
    with session:
        assert not torch.equal(logits(model), adapted)


def test_without_a_sensor_no_list_grows_with_what_is_learned(meter: EnergyMeter) -> None:
    model = one_layer()
    with AdaptiveSession(model, meter=meter, cost_model=COST, learn=ALWAYS) as session:
        for seed in range(3):
            session.read(random_tokens(2, 4, seed=seed))
        assert session.adapter is not None and session.adapter.ledger.take() == []
        assert session._loop.windows._learning == [] and len(session._loop.windows._work) == 1  # type: ignore[union-attr]


def test_a_state_that_does_not_fit_changes_nothing(meter: EnergyMeter) -> None:
    model = moe()
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, learn=ALWAYS) as session:
        session.read(IDS)
        state = copy.deepcopy(session.state_dict())
    plain = AdaptiveSession(model, 0.5, meter=meter, cost_model=COST)
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(CheckpointError, match="does not learn"):
        plain.load_state_dict(state)
    assert plain.state_dict() == before
    with AdaptiveSession(model, 0.5, meter=meter, cost_model=COST, learn=ALWAYS) as other:
        before = copy.deepcopy(other.state_dict())
        bits = logits(model)
        for broken in ({**state, "adapter": {}}, {**state, "adapter": 3}, {**state, "levy": {}}):
            with pytest.raises(CheckpointError):
                other.load_state_dict(broken)
            after = other.state_dict()
            assert {k: after[k] for k in after if k != "adapter"} == {k: before[k] for k in before if k != "adapter"}
            assert torch.equal(logits(model), bits)
