"""What a session is given wrongly is refused in words, and what is done to its model inside is undone all the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_rig import scaled_cost
from torch import nn

from thermoe import AdaptiveSession, EnergyMeter, set_router
from thermoe.errors import CheckpointError, ConfigError, TelemetryError, ThermoeError
from thermoe.moe.layer import routed_modules
from thermoe.routers.priced import PricedRouter
from thermoe.telemetry.clock import VirtualClock
from thermoe.testing import random_tokens, tiny_moe

STEP = random_tokens(6, 1, seed=4)
COST = scaled_cost(1e6)


@pytest.fixture
def meter() -> EnergyMeter:
    return EnergyMeter(telemetry="off", clock=VirtualClock())


def priced_model() -> Any:
    model = tiny_moe(num_experts=8, top_k=3)
    set_router(model, "priced", price=0.02, k_min=2, open_cost=[0.5] * 8)
    return model


def told(error: ThermoeError) -> None:
    assert error.what and error.where and error.accepted and error.fix


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("on_step", 3),
        ("meter", 3),
        ("meter", "auto"),
        ("router", 3),
        ("router", {1: 2}),
        ("control", 3),
        ("control", {1: 2}),
        ("control", "dual"),
        ("window_s", "x"),
        ("window_s", float("nan")),
        ("window_s", True),
        ("cost_model", 3),
        ("feedback", 3),
        ("auto_step", 2.0),
        ("solve_every", "8"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        AdaptiveSession(tiny_moe(), 1.0, **{name: value})
    told(caught.value)


def test_a_window_is_checked_also_where_the_controller_has_a_period_of_its_own() -> None:
    with pytest.raises(ConfigError, match="window_s"):
        AdaptiveSession(tiny_moe(), 1.0, window_s="x", control={"period_s": 2.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [3, None, nn.Linear, "gpt2"])
def test_what_is_no_model_is_refused(model: Any) -> None:
    for budget in (None, 1.0, -1.0):
        with pytest.raises(ConfigError, match="model") as caught:
            AdaptiveSession(model, budget)
        told(caught.value)


@pytest.mark.parametrize("sizes", [("x", None), (0, 1), (1, -1), (True, 1), (1.5, 1), (None, 1)])
def test_sizes_that_are_none_are_not_observed(sizes: Any, meter: EnergyMeter) -> None:
    model = tiny_moe()
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session, torch.no_grad():
        model(STEP)
        with pytest.raises(ConfigError, match="forward of") as caught:
            session.observe(*sizes)
        told(caught.value)
        assert session.pending == 1


@pytest.mark.parametrize("state", [3, None, [], "x"])
def test_a_state_that_is_none_is_refused(state: Any, meter: EnergyMeter) -> None:
    session = AdaptiveSession(tiny_moe(), 1.0, meter=meter)
    before = session.state_dict()
    with pytest.raises(CheckpointError) as caught:
        session.load_state_dict(state)
    told(caught.value)
    assert session.state_dict() == before


def test_leaving_what_was_not_entered_is_a_clear_error(meter: EnergyMeter) -> None:
    session = AdaptiveSession(tiny_moe(), 1.0, meter=meter)
    with pytest.raises(TelemetryError, match="not open") as caught:
        session.__exit__(None, None, None)
    told(caught.value)
    with session:
        pass
    with pytest.raises(TelemetryError, match="not open"):
        session.__exit__(None, None, None)


def test_a_step_inside_on_step_is_refused_and_the_session_goes_on(meter: EnergyMeter) -> None:
    model, errors = tiny_moe(), []

    def again(metrics: dict[str, Any]) -> None:
        if not errors:
            try:
                session.step()
            except TelemetryError as error:
                errors.append(error)

    session = AdaptiveSession(model, 1.0, meter=meter, cost_model=COST, on_step=again)
    with session:
        model(STEP)
        assert session.step()["tokens"] == 6
        assert len(errors) == 1 and "on_step" in str(errors[0])
        told(errors[0])
        model(STEP)
        assert session.step()["tokens_total"] == 12


def test_on_step_may_run_the_model_and_change_the_budget(meter: EnergyMeter) -> None:
    model = tiny_moe()

    def work(metrics: dict[str, Any]) -> None:
        if metrics["tokens_total"] < 24:
            with torch.no_grad():
                model(STEP)  # noted for the next step, which auto_step does not take from in here
            session.set_budget(0.5)

    session = AdaptiveSession(model, 1.0, meter=meter, cost_model=COST, auto_step=1, on_step=work)
    with session, torch.no_grad():
        model(STEP)
        assert session.pending == 1 and session.tally.steps == 1
        model(STEP)
    assert session.tally.tokens == 24
    assert str(session.budget) == "0.5 J/token"


def test_a_callback_that_fails_leaves_a_session_that_can_step(meter: EnergyMeter) -> None:
    model, fail = tiny_moe(), [True]

    def failing(metrics: dict[str, Any]) -> None:
        if fail[0]:
            raise KeyError("the user's own")

    with AdaptiveSession(model, 1.0, meter=meter, cost_model=COST, on_step=failing) as session:
        model(STEP)
        with pytest.raises(KeyError):
            session.step()
        fail[0] = False
        model(STEP)
        assert session.step()["tokens_total"] == 12


# -- what is done to the model inside ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "priced"])
def test_a_model_that_is_cast_inside_is_cast_whole(kind: str, meter: EnergyMeter) -> None:
    model = tiny_moe(num_experts=8, top_k=3) if kind == "topk" else priced_model()
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session, torch.no_grad():
        model(STEP)
        model.to(torch.bfloat16)
        model(STEP)
        session.step()
    routers = [module.router for _, module in routed_modules(model)]
    assert {router.weight.dtype for router in routers} == {torch.bfloat16}  # type: ignore[union-attr]
    expected = tiny_moe(num_experts=8, top_k=3) if kind == "topk" else priced_model()
    expected.to(torch.bfloat16)
    for name, tensor in expected.state_dict().items():
        found = model.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    with torch.no_grad():
        assert torch.equal(model(STEP).logits, expected(STEP).logits)


def test_a_router_that_is_swapped_inside_while_the_model_is_cast_follows_too(meter: EnergyMeter) -> None:
    model = priced_model()
    with AdaptiveSession(model, meter=meter, cost_model=COST):
        set_router(model, "topk")
        model.to(torch.bfloat16)
    assert {m.router.weight.dtype for _, m in routed_modules(model)} == {torch.bfloat16}  # type: ignore[union-attr]
    assert all(isinstance(m.router, PricedRouter) for _, m in routed_modules(model))
    with torch.no_grad():
        model(STEP)


@pytest.mark.parametrize("kind", ["topk", "priced"])
@pytest.mark.parametrize("swap", ["topk", "random", "priced"])
def test_leaving_puts_back_what_was_there_whoever_changed_it(kind: str, swap: str, meter: EnergyMeter) -> None:
    model = tiny_moe(num_experts=8, top_k=3) if kind == "topk" else priced_model()
    modules = [module for _, module in routed_modules(model)]
    before, logits = [module.router for module in modules], model(STEP).logits
    with AdaptiveSession(model, 1e-3, meter=meter, cost_model=COST, solve_every=1) as session, torch.no_grad():
        model(STEP)
        session.step()
        set_router(model, swap)
        model(STEP)
        session.step()
    assert all(module.router is old for module, old in zip(modules, before, strict=True))
    assert torch.equal(model(STEP).logits, logits)


def test_a_priced_router_put_in_inside_gets_costs_and_prices(meter: EnergyMeter) -> None:
    model = tiny_moe(num_experts=8, top_k=3)
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session, torch.no_grad():
        modules = [module for _, module in routed_modules(model)]
        costs = [module.router.open_cost.clone() for module in modules]  # type: ignore[union-attr]
        set_router(model, "topk")
        set_router(model, "priced")
        model(STEP)
        session.step()
        session.set_price(3.0)
        for module, cost in zip(modules, costs, strict=True):
            assert torch.equal(module.router.open_cost, cost) and float(module.router.price) > 0  # type: ignore[union-attr]


# -- threads ----------------------------------------------------------------------------------------------------------


def during(call: Callable[[], Any]) -> Any:
    """Return what ``call`` returned in another thread; it has to end by itself."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert found, "it waits for what waits for it"
    return found[0]


def test_a_forward_of_another_thread_is_noted_while_a_price_is_searched(
    meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_moe(num_experts=8, top_k=4)
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, auto_step=1, solve_every=1) as session:
        solver = session._instrument.solver  # type: ignore[union-attr]
        price_for, kept, inside = solver.price_for, [], []

        def interrupted(phase: Any, target_j: float) -> float:
            if not inside:
                inside.append(1)
                kept.append(solver.rows("decode"))
                with torch.no_grad():
                    result = during(lambda: model(STEP))
                assert not isinstance(result, BaseException), result
                kept.append(solver.rows("decode"))
            return price_for(phase, target_j)

        monkeypatch.setattr(solver, "price_for", interrupted)
        with torch.no_grad():
            for _ in range(3):
                model(STEP)
        assert inside and kept[0] == kept[1], "rows must not change under a search"
        session.step()
    assert session.tally.tokens == 4 * 6


def test_steps_and_forwards_of_many_threads_lose_nothing(meter: EnergyMeter) -> None:
    model, errors = tiny_moe(num_experts=8, top_k=4), []
    one_at_a_time, rounds = threading.Lock(), 12
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, solve_every=1) as session:

        def forwards() -> None:
            try:
                with torch.no_grad():
                    for seed in range(rounds):
                        with one_at_a_time:
                            model(random_tokens(6, 1, seed=seed))
            except BaseException as error:
                errors.append(error)

        def steps() -> None:
            try:
                for _ in range(rounds):
                    session.step()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=target, daemon=True) for target in (forwards, steps, forwards, steps)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not errors, errors
        session.step()
        assert session.tally.tokens == 2 * rounds * 6 and session.tally.steps == 2 * rounds + 1
