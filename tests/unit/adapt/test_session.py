"""A session leaves the model as it was, changes nothing without a budget, counts what ran, and reads late."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from session_rig import joules_of, scaled_cost
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from thermoe import AdaptiveSession, Budget, CostModel, EnergyMeter, attach_router, detach_router, set_router
from thermoe.energy.cost_table import CostTable
from thermoe.energy.work import ModelWork
from thermoe.errors import CheckpointError, ConfigError, RoutingError, TelemetryError, UnknownNameError
from thermoe.moe.layer import routed_modules
from thermoe.routers.priced import PricedRouter
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.plant import Board
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

IDS = random_tokens(3, 12)
STEP = random_tokens(6, 1, seed=4)
#: Joules per token of the tiny models are those of a model a million times as large.
COST = scaled_cost(1e6)
MODELS = pytest.mark.parametrize("kind", ["topk", "priced", "mixtral", "mixtral, attached"])


@pytest.fixture
def meter() -> EnergyMeter:
    """Return a meter without a sensor, on a clock that stands still, so that no search for a price is ever too slow."""
    return EnergyMeter(telemetry="off", clock=VirtualClock())


def tiny_mixtral() -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=6, num_experts_per_tok=3,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 3 or name.endswith("gate.weight"):
                tensor.normal_(std=0.3)
    return model


def build(kind: str) -> Any:
    if kind.startswith("mixtral"):
        model = tiny_mixtral()
        if kind.endswith("attached"):
            attach_router(model, verbose=False)
        return model
    model = tiny_moe(num_experts=8, top_k=3)
    if kind == "priced":
        set_router(model, "priced", price=0.02, k_min=2, open_cost=[0.5] * 8)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def priced(model: nn.Module) -> list[PricedRouter]:
    return [m.router for _, m in routed_modules(model) if isinstance(m.router, PricedRouter)]


@MODELS
@pytest.mark.parametrize("fails", [False, True])
def test_leaving_undoes_entering(kind: str, fails: bool, meter: EnergyMeter) -> None:
    model = build(kind)
    before, free, objects = (
        logits(model),
        logits(model, STEP),
        {name: id(module) for name, module in model.named_modules()},
    )
    state = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    session = AdaptiveSession(model, 1e-3, meter=meter, cost_model=COST, solve_every=1)
    try:
        with session:
            for _ in range(3):
                logits(model, STEP)
                session.step()
            assert all(float(p.price.max()) > 0 for p in priced(model))
            assert not torch.equal(logits(model, STEP), free)
            if fails:
                raise KeyError("the user's own")
    except KeyError:
        assert fails
    assert {name: id(module) for name, module in model.named_modules()} == objects
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(logits(model), before)
    with session:  # and again
        logits(model)
    assert torch.equal(logits(model), before)


@MODELS
def test_without_a_budget_every_bit_is_the_baselines(kind: str, meter: EnergyMeter) -> None:
    model = build(kind)
    if kind == "priced":  # the baseline of a priced router is its choice at price 0
        for router in priced(model):
            router.set_price(0.0)
    prompt = IDS[:, :5]
    plain = {"prefill": logits(model), "decode": logits(model, STEP)}
    generated = model.generate(prompt, max_new_tokens=6, do_sample=False)
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        assert len(priced(model)) == len(list(routed_modules(model))) > 0
        assert torch.equal(logits(model), plain["prefill"])
        assert torch.equal(logits(model, STEP), plain["decode"])
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), generated)
        metrics = session.step()
    assert metrics["state"] == "OFF" and metrics["reason"] == "no budget"
    assert metrics["price"] == 0 and metrics["tokens"] == IDS.numel() + STEP.numel() + 15 + 3 * 5
    assert metrics["experts_per_token"] == 3


@pytest.mark.parametrize("kind", ["topk", "mixtral", "mixtral, attached"])
def test_the_joules_reported_are_the_cost_model_of_what_ran(kind: str, meter: EnergyMeter) -> None:
    model = build(kind)
    with AdaptiveSession(model, 0.4, meter=meter, cost_model=COST, solve_every=1) as session:
        expected: dict[str, list[float]] = {"prefill": [], "decode": []}
        distinct, total = [], 0.0
        for seed in range(4):
            for phase, ids in (("decode", random_tokens(5, 1, seed=seed)), ("prefill", random_tokens(2, 9, seed=seed))):
                logits(model, ids)
                expected[phase].append(joules_of(model, COST, ids.numel()))
                distinct += [float(m.last_routing.opened.sum()) for _, m in routed_modules(model)]  # type: ignore[union-attr]
            metrics = session.step()
            for phase, tokens in (("decode", 5), ("prefill", 18)):
                assert metrics[f"{phase}/j_per_token_modelled"] == pytest.approx(expected[phase][-1] / tokens, rel=1e-9)
            assert metrics["distinct_experts"] == pytest.approx(sum(distinct[-4:]) / 4)
            total += metrics["j_per_token_modelled"] * metrics["tokens"]
        assert total == pytest.approx(sum(expected["decode"]) + sum(expected["prefill"]), rel=1e-9)
        assert session.tally.phases["decode"].energy_modelled_j == pytest.approx(sum(expected["decode"]), rel=1e-9)
        assert session.tally.tokens == 4 * 23


def test_padding_is_no_token(meter: EnergyMeter) -> None:
    model = build("topk")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        model(IDS, attention_mask=mask)
        assert session.step()["tokens"] == IDS.numel() - 5
        model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
        metrics = session.step()
    assert metrics["prefill/tokens"] == IDS.numel() - 5 and metrics["decode/tokens"] == 9


def test_without_a_sensor_the_budget_is_held_against_the_model_and_says_so(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        for seed in range(5):
            logits(model, random_tokens(6, 1, seed=seed))
        session.step()
        low_j, high_j = (lambda c: (c.low_j, c.high_j))(session._instrument.solver.cost_range("decode"))  # type: ignore[union-attr]
        for share, state in ((0.5, "TRACKING"), (-0.2, "INFEASIBLE"), (1.2, "SLACK")):
            session.set_budget(low_j + share * (high_j - low_j))
            for seed in range(20):
                logits(model, random_tokens(6, 1, seed=seed))
                metrics = session.step()
            assert metrics["state"] == state, metrics["reason"]
            assert "no sensor" in metrics["reason"]
            assert metrics["j_per_token_measured"] is None and metrics["provenance"] is None
            assert metrics["provenance_modelled"] == "estimated"
        assert metrics["price"] == 0
    assert "measured: nothing" in session.report() and "(estimated)" in session.report()


def test_the_modelled_budget_is_met(meter: EnergyMeter) -> None:
    model = build("topk")
    used: list[float] = []
    with AdaptiveSession(model, 0.55, meter=meter, cost_model=COST, feedback="modelled") as session:
        session.set_budget(Budget(j_per_token={"decode": 0.6 * _free_j(model, session)}))
        for seed in range(60):
            logits(model, random_tokens(6, 1, seed=seed))
            used.append(session.step()["decode/j_per_token_modelled"])
        assert session.budget is not None
        wanted = session.budget.j_per_token_of("decode")
        assert sum(used[20:]) / 40 == pytest.approx(wanted, rel=0.05)
        assert session.metrics["prefill/price"] == 0  # that phase has no limit


def _free_j(model: nn.Module, session: AdaptiveSession) -> float:
    session.set_budget(None)
    logits(model, STEP)
    return float(session.step()["j_per_token_modelled"])


def test_feedback_that_needs_a_sensor_holds_nothing_without_one(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, 1e-3, meter=meter, cost_model=COST, feedback="measured") as session:
        for _ in range(10):
            logits(model, STEP)
            metrics = session.step()
    assert metrics["state"] == "OFF" and "no energy sensor" in metrics["reason"] and metrics["price"] == 0


def test_generate_with_one_step_after_it_and_with_steps_inside(meter: EnergyMeter) -> None:
    model = build("topk")
    steps: list[dict[str, Any]] = []
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST) as session:
        model.generate(IDS, **options)
        metrics = session.step()
        assert (
            metrics["prefill/tokens"] == 36 and metrics["decode/tokens"] == 3 * 19 and metrics["decode/forwards"] == 19
        )
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST, auto_step=4, on_step=steps.append) as session:
        model.generate(IDS, **options)
        assert [m["forwards"] for m in steps] == [1, 1, 4, 4, 4, 4], "at once where a phase begins"
        assert session.step()["tokens_total"] == 36 + 3 * 19
        assert {m["decode/price"] > 0 for m in steps[1:]} == {True}
        assert session.metrics is steps[-1] and steps[-1]["forwards"] == 2


def test_a_forward_reads_no_device(meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("topk")
    plain: list[str] = []
    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")

    def watch(seen: list[str]) -> None:
        for name in names:
            own = getattr(Tensor, name)

            def counted(self: Tensor, *args: Any, _name: str = name, _own: Any = own, **kwargs: Any) -> Any:
                seen.append(_name)
                return _own(self, *args, **kwargs)

            monkeypatch.setattr(Tensor, name, counted)

    set_router(model, "priced")
    for layer in (module for _, module in routed_modules(model)):
        layer.backend = "dense"  # type: ignore[assignment]
    watch(plain)
    logits(model), logits(model, STEP)
    monkeypatch.undo()
    inside: list[str] = []
    with AdaptiveSession(model, 0.3, meter=meter, cost_model=COST) as session:
        watch(inside)
        for _ in range(5):
            logits(model), logits(model, STEP)
        monkeypatch.setattr("thermoe.adapt.steps.HELD_ROWS", 50)  # counts are formed on the device before that much
        logits(model), logits(model, STEP)
        assert inside == 6 * plain
        monkeypatch.undo()
        assert session.step()["forwards"] == 12


def test_many_forwards_are_folded_and_still_counted(meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("topk")
    monkeypatch.setattr("thermoe.adapt.steps.HELD_ROWS", 40)
    spent_j = 0.0
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        for seed in range(7):
            ids = random_tokens(1 + seed % 3, 5, seed=seed)
            logits(model, ids)
            spent_j += joules_of(model, COST, ids.numel())
        assert len(session._instrument.log) == 7  # type: ignore[union-attr]
        metrics = session.step()
    assert metrics["forwards"] == 7
    assert metrics["j_per_token_modelled"] * metrics["tokens"] == pytest.approx(spent_j, rel=1e-9)


def test_metrics_are_plain_and_serialise(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, "0.3 J/token", meter=meter, cost_model=COST) as session:
        empty = session.step()
        logits(model, STEP)
        metrics = session.step()
    for found in (empty, metrics):
        assert all(value is None or type(value) in (int, float, str) for value in found.values())
        assert not any(isinstance(value, float) and not math.isfinite(value) for value in found.values())
        json.dumps(found)
    assert empty["tokens"] == 0 and empty["j_per_token_modelled"] is None and empty["state"] == "OFF"
    assert set(empty) == set(metrics)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf, True, "12 Newton", "0 W", "20", {"watts": 3}, {}])
def test_bad_budgets_are_refused_with_the_range(budget: Any, meter: EnergyMeter) -> None:
    model = build("topk")
    before = logits(model)
    with pytest.raises(ConfigError) as caught:
        AdaptiveSession(model, budget, meter=meter, cost_model=COST)
    told = str(caught.value)
    assert caught.value.what and caught.value.where and caught.value.accepted and caught.value.fix
    if "power_w" not in str(caught.value.where):
        assert "mJ/token at decode of one sequence (estimated)" in told
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        logits(model, STEP)
        session.step()
        with pytest.raises(ConfigError) as caught:
            session.set_budget(budget)
        assert session.budget is None
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (
            "0 W",
            "on this machine and model less than the 700 W of the board's limit, "
            "with {power_w:.0f} W drawn now (simulated)",
        ),
        ({"temp_c": math.nan}, "on this machine and model more than at rest, with {temp_c:.0f} C now (simulated)"),
        ("20 mW/token", "of several together, less than the 700 W"),
    ],
)
def test_a_refusal_names_the_watts_and_degrees_of_the_board(budget: Any, says: str) -> None:
    clock = VirtualClock()
    source = SimulatedSource(clock=clock, board=Board(limit_w=700.0))
    with EnergyMeter(source, clock=clock) as meter:
        with pytest.raises(ConfigError) as caught:
            AdaptiveSession(build("topk"), budget, meter=meter, cost_model=COST)
        assert says.format(**meter.snapshot()) in str(caught.value.accepted)
        assert meter.snapshot()["power_limit_w"] == 700.0, "the meter of the user stays open"
    with pytest.raises(ConfigError) as caught:
        AdaptiveSession(build("topk"), budget, meter=EnergyMeter("off"), cost_model=COST)
    assert "700 W" not in str(caught.value) and "C now" not in str(caught.value)


def test_the_range_of_one_sequence_is_what_it_costs(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        told = AdaptiveSession(model, cost_model=COST).feasible()
        logits(model, STEP[:1])
        high_j = session.step()["j_per_token_modelled"]
        costs = session._instrument.solver.cost_range("decode")  # type: ignore[union-attr]
        assert costs is not None
        assert told == (
            f"about {1e3 * costs.low_j:.3g} to {1e3 * high_j:.4g} mJ/token at decode of one sequence (estimated), "
            "less of several together"
        )
        assert (
            session.feasible() == f"about {1e3 * costs.low_j:.3g} to {1e3 * high_j:.4g} mJ/token at decode (estimated)"
        )


def test_bad_options_are_refused() -> None:
    model = build("topk")
    for options in ({"auto_step": 0}, {"solve_every": True}, {"window_s": -1.0}, {"control": {"law": "best"}}):
        with pytest.raises(ConfigError):
            AdaptiveSession(model, 1.0, **options)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="modelled"):
        AdaptiveSession(model, 1.0, feedback="model")  # type: ignore[arg-type]
    session = AdaptiveSession(model, 1.0)
    for call in (session.step, lambda: session.observe(1, 1)):
        with pytest.raises(TelemetryError, match="not open"):
            call()


def test_a_model_without_experts_is_refused_and_left_alone(meter: EnergyMeter) -> None:
    model = tiny_gpt2()
    with pytest.raises(RoutingError, match="convert"), AdaptiveSession(model, 1.0, meter=meter):
        pass
    moe = build("topk")
    set_router(moe, "random")
    before = [m.router for _, m in routed_modules(moe)]
    with pytest.raises(RoutingError, match="RandomRouter"), AdaptiveSession(moe, 1.0, meter=meter, cost_model=COST):
        pass
    assert [m.router for _, m in routed_modules(moe)] == before and not moe._forward_hooks
    with AdaptiveSession(moe, meter=meter, cost_model=COST) as session:  # what cannot be priced can be counted
        logits(moe)
        assert session.step()["experts_per_token"] == 3


def test_a_session_is_entered_once_at_a_time(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, 1.0, meter=meter) as session:
        with pytest.raises(TelemetryError, match="open already"):
            session.__enter__()
        assert len(priced(model)) == 2
    with AdaptiveSession(model, 1.0) as own:
        mine = own._meter
    assert mine is not None
    with pytest.raises(TelemetryError, match="closed"):  # a meter of its own is closed, one that was given is not
        mine.open()
    meter.open()


def test_the_price_is_fixed_where_there_is_no_budget(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        logits(model, STEP)
        free = session.step()
        session.set_price(50.0, "decode")
        logits(model, STEP), logits(model)
        held = session.step()
        assert held["decode/price"] == 50.0 and held["prefill/price"] == 0.0
        assert held["decode/experts_per_token"] < free["decode/experts_per_token"]
        assert held["prefill/experts_per_token"] == 3 and "fixed at 50" in held["decode/reason"]
        for price in (-1.0, math.nan, math.inf, True):
            with pytest.raises(ConfigError):
                session.set_price(price)
        session.set_budget(0.5)
        with pytest.raises(ConfigError, match="budget"):
            session.set_price(1.0)


def test_the_costs_of_the_routers_are_those_of_the_cost_model(meter: EnergyMeter) -> None:
    model = tiny_moe(num_experts=4, top_k=2, widths=[64, 16, 32, 16])
    with AdaptiveSession(model, 1.0, meter=meter, cost_model=COST, router={"k_min": 2}):
        table = CostTable.of(COST, ModelWork.of(model))
        for place, router in enumerate(priced(model)):
            assert router.k_min == 2 and router.top_k == 2
            for mine, theirs in ((router.pair_cost, table.pair_j), (router.open_cost, table.open_j)):
                assert torch.allclose(mine.double() * table.unit_j, theirs[place], rtol=1e-6)


def test_a_state_is_taken_up(meter: EnergyMeter, tmp_path: Path) -> None:
    model = build("topk")
    with AdaptiveSession(model, 0.35, meter=meter, cost_model=COST, solve_every=1) as session:
        for seed in range(6):
            logits(model, random_tokens(6, 1, seed=seed))
            session.step()
        state = json.loads(json.dumps(session.state_dict()))
        routed = logits(model, STEP)
    other = AdaptiveSession(model, meter=EnergyMeter(telemetry="off"), cost_model=COST)
    other.load_state_dict(state)
    assert other.budget == session.budget and json.loads(json.dumps(other.state_dict())) == state
    with other:
        assert torch.equal(logits(model, STEP), routed)  # the price is in force before the first step
        assert other.step()["tokens_total"] == 6 * 6 + 6
    for broken in ({}, {**state, "version": 99}, {**state, "controller": {}}):
        before = json.dumps(other.state_dict())
        with pytest.raises(CheckpointError):
            other.load_state_dict(broken)
        assert json.dumps(other.state_dict()) == before


def test_a_compiled_model_is_observed_by_hand_or_from_outside(meter: EnergyMeter) -> None:
    model = build("topk")
    with AdaptiveSession(model, meter=meter, cost_model=COST) as session:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            compiled(STEP)
        assert session.step()["forwards"] == 0  # its hooks are compiled away
        session.observe(6, 1)
        kept = session._instrument.log._held[0][1].decisions[0]  # type: ignore[union-attr]
        present = next(m for _, m in routed_modules(model)).last_routing
        assert kept is not None and present is not None
        assert kept.expert_index.data_ptr() != present.expert_index.data_ptr()  # a graph writes over the latter
        assert session.step()["decode/tokens"] == 6
    with AdaptiveSession(compiled, meter=meter, cost_model=COST) as session, torch.no_grad():
        compiled(STEP)
        assert session.step()["decode/tokens"] == 6


def test_gradients_and_a_layer_that_did_not_run(meter: EnergyMeter) -> None:
    model = build("topk")
    layers = [module for _, module in routed_modules(model)]
    with AdaptiveSession(model, meter=meter, cost_model=CostModel.prior()) as session:
        model(IDS).logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.ndim == 3)
        blocks = model.transformer.h
        model.transformer.h = blocks[:1]
        logits(model)
        model.transformer.h = blocks
        session.step()
    assert session.tally.phases["prefill"].forwards == 2
    assert len(layers) == 2


def test_detach_after_a_session_finds_the_own_routers(meter: EnergyMeter) -> None:
    model = build("mixtral")
    with AdaptiveSession(model, 1.0, meter=meter, cost_model=COST):
        logits(model)
    with pytest.raises(RoutingError, match="no attached router"):
        detach_router(model)


def test_a_slow_search_waits_its_turn(meter: EnergyMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("topk")
    clock = VirtualClock()
    own = EnergyMeter(telemetry="off", clock=clock)
    with AdaptiveSession(model, 0.9, meter=own, cost_model=COST, solve_every=1) as session:
        solver, searches = session._instrument.solver, []  # type: ignore[union-attr]
        price_for = solver.price_for

        def slow(phase: Any, target: float) -> float:
            searches.append(clock.now_s())
            clock.sleep_s(1.0)
            return price_for(phase, target)

        monkeypatch.setattr(solver, "price_for", slow)
        for seed in range(120):
            logits(model, random_tokens(6, 1, seed=seed))
            clock.sleep_s(0.5)
            session.step()
        # At 6, 12, ... 192 rows, then every 20 s at most: 5 % of the time.
        late = [t_s for t_s in searches if t_s > clock.now_s() - 40]
        assert 7 <= len(searches) <= 10 and len(late) <= 3
        session.set_budget(0.8)
        assert searches[-1] >= clock.now_s() - 1.5  # a new budget is not kept waiting


@MODELS
def test_leaving_does_not_turn_back_the_mode_of_the_model(kind: str, meter: EnergyMeter) -> None:
    model = build(kind)
    with AdaptiveSession(model, 1e-6, meter=meter):
        model.train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("price", [-1.0, float("nan"), 1e39, 10**400, True, "1"])
def test_a_price_that_is_refused_changes_nothing(price: Any) -> None:
    with AdaptiveSession(tiny_moe(), meter=EnergyMeter(telemetry="off")) as session:
        session.set_price(0.5)
        with pytest.raises(ConfigError, match="the price is to be"):
            session.set_price(price)
        with pytest.raises(UnknownNameError, match="phase"):
            session.set_price(0.1, "train")  # type: ignore[arg-type]
        assert session.prices == {"prefill": 0.5, "decode": 0.5}


@pytest.mark.parametrize("change", [{"tally": {}}, {"tally": None}, {"prices": {}}, {"controller": []}])
def test_a_damaged_state_is_refused_whole(change: dict[str, Any]) -> None:
    model, meter = tiny_moe(), EnergyMeter(telemetry="off")
    good = AdaptiveSession(model, "3 mJ/token", meter=meter).state_dict()
    session = AdaptiveSession(model, "5 mJ/token", meter=meter)
    before = session.state_dict()
    with pytest.raises(CheckpointError):
        session.load_state_dict({**good, **change})
    assert session.state_dict() == before and session.budget == Budget.parse("5 mJ/token")


def test_a_generation_shorter_than_the_steps_is_held_from_its_second_token() -> None:
    model = tiny_moe(num_experts=8, top_k=4)
    with AdaptiveSession(model, 1e-12, meter=EnergyMeter(telemetry="off"), auto_step=8) as session:
        model.generate(random_tokens(4, 5), max_new_tokens=5, do_sample=False, pad_token_id=0)
        session.step()
        assert session.prices["decode"] > 0 and session.state_of("decode")[0] == "INFEASIBLE"
