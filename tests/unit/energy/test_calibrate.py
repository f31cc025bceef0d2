"""Calibration against a simulated board whose true costs are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from thermoe.energy.calibrate import CellResult, calibrate, plan_cells
from thermoe.energy.profile import ProfileKey, load_cost_model, read_profiles, save_profile
from thermoe.energy.work import LayerWork, StepWork
from thermoe.energy.workload import Cell, MoEStack
from thermoe.errors import MachineError
from thermoe.telemetry import EnergyMeter
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.plant import Board, Fault
from thermoe.telemetry.simulated import SimulatedSource

LAYER = LayerWork(64, 12_582_912, 12_582_912)
LAYERS = 8
IDLE_W = 100.0
#: Joules on top of idle power, and the time model, of the simulated device.
TRUE_OPEN, TRUE_PAIR = 1.5e-10, 1.2e-12
SECONDS_PER_BYTE, SECONDS_PER_FLOP, SECONDS_PER_STEP = 1 / 3.5e12, 1 / 0.25e15, 4e-4


class SimulatedStack:
    """Draws the power that its work needs while virtual time passes."""

    layer, layers = LAYER, LAYERS

    def __init__(self, source: SimulatedSource, clock: VirtualClock) -> None:
        self.source, self.clock = source, clock

    def prepare(self, cell: Cell) -> tuple[Callable[[], object], int, StepWork]:
        pairs = cell.tokens * cell.top_k * LAYERS
        work = StepWork(
            layers=LAYERS,
            read_bytes=cell.active_experts * LAYERS * LAYER.bytes_per_expert,
            flops=pairs * LAYER.flops_per_pair,
            layer_tokens=cell.tokens * LAYERS,
        )
        seconds = SECONDS_PER_STEP + work.read_bytes * SECONDS_PER_BYTE + work.flops * SECONDS_PER_FLOP
        watts = (work.read_bytes * TRUE_OPEN + work.flops * TRUE_PAIR) / seconds
        repeats = max(1, round(0.010 / seconds))

        def step() -> None:
            self.source.load.set(self.clock.now_s(), watts)
            self.clock.sleep_s(repeats * seconds)
            if cell.duty < 1:
                self.source.load.set(self.clock.now_s(), 0.0)
                self.clock.sleep_s(repeats * seconds * (1 / cell.duty - 1))

        return step, repeats, work


def _run(faults: tuple[Fault, ...] = (), seed: int = 0, **options: float):
    clock = VirtualClock()
    faults = tuple(replace(fault, start_s=clock.now_s() + fault.start_s) for fault in faults)
    board = Board(idle_w=IDLE_W, limit_w=2000.0, gain_rel_limit=0.0, noise_rel_sd=0.01, slowdown_c=500.0)
    source = SimulatedSource(seed, clock=clock, board=board, faults=faults)
    cells = plan_cells(64, seed=seed)
    with EnergyMeter(source=source, clock=clock) as meter:
        return calibrate(
            meter,
            SimulatedStack(source, clock),
            cells,
            settle_s=0.2,
            window_s=1.5,
            warmup_s=2.0,
            idle_s=1.5,
            seed=seed,
            **options,
        )


@pytest.fixture(scope="module")
def outcome():
    return _run()


def test_cells_that_were_held_out_are_predicted(outcome) -> None:
    assert outcome.quality == "good"
    assert outcome.held_out_mape_frac < 0.05
    assert abs(outcome.anchor_drift_frac) < 0.02


def test_gross_costs_hold_the_static_power_of_the_time_that_work_takes(outcome) -> None:
    # The board leaks 0.3 % per kelvin, so the truth is known to a few per cent only.
    gross_open = TRUE_OPEN + IDLE_W * SECONDS_PER_BYTE
    gross_pair = TRUE_PAIR + IDLE_W * SECONDS_PER_FLOP
    assert outcome.model.open_j_per_byte == pytest.approx(gross_open, rel=0.15)
    assert outcome.model.pair_j_per_flop == pytest.approx(gross_pair, rel=0.15)
    assert outcome.model.terms["open_j_per_byte"].identified


def test_pauses_tell_static_power_from_work(outcome) -> None:
    assert outcome.net.terms["static_power_w"].value == pytest.approx(IDLE_W, rel=0.25)
    assert outcome.net.terms["net_open_j_per_byte"].value == pytest.approx(TRUE_OPEN, rel=0.25)


def test_what_was_simulated_says_so_and_is_refused_on_hardware(outcome, tmp_path) -> None:
    assert outcome.model.provenance == "simulated"
    key = _key()
    save_profile(outcome.as_profile(), key, tmp_path)
    model, why = load_cost_model(key, tmp_path)
    assert model.basis == "prior"
    assert "simulated" in why


def _key(**changes: object) -> ProfileKey:
    fields = {
        "device_uuid": "GPU-1",
        "device_name": "H200",
        "driver": "580",
        "power_limit_w": 700.0,
        "dtype": "bfloat16",
        "expert_shape": (64, 2048, 1024, 1),
        "dispatch_backend": "grouped",
    }
    return ProfileKey(**{**fields, **changes})


@pytest.fixture
def measured(outcome) -> dict:
    return {**outcome.as_profile(), "source_provenance": "measured"}


def test_a_profile_serves_its_own_key(measured, outcome, tmp_path) -> None:
    save_profile(measured, _key(), tmp_path)
    model, why = load_cost_model(_key(), tmp_path)
    assert (model.basis, model.provenance) == ("calibrated", "estimated")
    assert model.terms == outcome.model.terms
    assert "this device" in why
    assert model.extrapolates(tokens=10**6) == ["tokens"]
    assert model.extrapolates(tokens=64) == []


def test_a_profile_of_another_board_is_flagged_and_widened(measured, outcome, tmp_path) -> None:
    save_profile(measured, _key(device_uuid="GPU-2"), tmp_path)
    model, why = load_cost_model(_key(), tmp_path)
    assert model.flags == ("transferred",)
    assert model.terms["open_j_per_byte"].sd > outcome.model.terms["open_j_per_byte"].sd
    assert "another board" in why


@pytest.mark.parametrize(
    "change",
    [
        {"driver": "581"},
        {"power_limit_w": 500.0},
        {"dtype": "float16"},
        {"dispatch_backend": "loop"},
        {"expert_shape": (8, 2048, 1024, 1)},
        {"device_name": "H100"},
    ],
)
def test_any_other_difference_means_the_prior(measured, tmp_path, change) -> None:
    save_profile(measured, _key(**change), tmp_path)
    model, why = load_cost_model(_key(), tmp_path)
    assert model.basis == "prior"
    assert "thermoe calibrate" in why


def test_corrupt_foreign_and_newer_profiles_are_passed_over_and_kept(measured, tmp_path) -> None:
    path = save_profile(measured, _key(), tmp_path)
    newer = {**json.loads(path.read_text()), "schema_version": 99}
    (tmp_path / "newer.json").write_text(json.dumps(newer))
    (tmp_path / "torn.json").write_text('{"schema": "thermoe.cost_pro')
    (tmp_path / "other.json").write_text('{"schema": "something else"}')
    path.unlink()
    found = {p.name: reason for p, profile, reason in read_profiles(tmp_path) if profile is None}
    assert set(found) == {"newer.json", "torn.json", "other.json"}
    assert "update thermoe" in found["newer.json"]
    assert load_cost_model(_key(), tmp_path)[0].basis == "prior"
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_a_poor_fit_serves_nobody(measured, tmp_path) -> None:
    measured["fit"] = {**measured["fit"], "quality": "poor"}
    save_profile(measured, _key(), tmp_path)
    assert load_cost_model(_key(), tmp_path)[0].basis == "prior"


def test_a_shared_device_is_refused() -> None:
    with pytest.raises(MachineError, match="another process") as caught:
        _run(faults=(Fault(kind="foreign", start_s=20.0, duration_s=5.0, value=1),))
    assert caught.value.exit_code == 3
    assert "stop other work" in str(caught.value)


def test_drifting_work_is_refused() -> None:
    with pytest.raises(MachineError, match="scattered"):
        _run(faults=(Fault(kind="gain", start_s=25.0, value=1.6),))


def test_a_lost_device_leaves_too_few_windows() -> None:
    with pytest.raises(MachineError, match="windows gave a number"):
        _run(faults=(Fault(kind="lost", start_s=12.0),))


def test_without_a_sensor_the_prior_is_returned_with_the_reason() -> None:
    with EnergyMeter(source="off") as meter:
        outcome = calibrate(meter, SimulatedStack(None, None), plan_cells(8))  # type: ignore[arg-type]
    assert outcome.quality == "prior"
    assert outcome.model.basis == "prior"
    assert outcome.reason
    assert outcome.as_profile()["source_provenance"] == "estimated"


def test_the_plan_varies_what_it_must() -> None:
    cells = plan_cells(64)
    assert cells[0].role == cells[-1].role == "anchor"
    assert sum(cell.role == "anchor" for cell in cells) >= 4
    fit = [cell for cell in cells if cell.role == "fit"]
    assert len({cell.tokens for cell in fit}) >= 4
    assert len({cell.active_experts for cell in fit}) >= 4
    assert len({cell.top_k for cell in fit}) >= 3
    assert all(cell.top_k <= cell.active_experts <= 64 for cell in cells)
    assert plan_cells(64, seed=1) != plan_cells(64, seed=2)
    assert all(cell.top_k <= cell.active_experts <= 4 for cell in plan_cells(4))


def test_a_window_row_keeps_none_for_what_was_not_measured() -> None:
    row = CellResult(
        Cell(tokens=1, active_experts=1, top_k=1), StepWork(1, 1, 1, 1), None, 0.1, None, None, None, (), "lost", None
    ).as_dict()
    assert row["energy_j"] is None
    assert row["reason"] == "lost"


def test_the_real_stack_counts_its_work_and_captures_only_what_can_be() -> None:
    stack = MoEStack(4, 16, 8, layers=2, dtype=torch.float32, device="cpu", step_s=0.001)
    assert stack.backend == "loop"  # it reads counts on the host, which a CUDA graph cannot hold
    step, repeats, work = stack.prepare(Cell(tokens=6, active_experts=2, top_k=2))
    assert step() is None
    assert repeats >= 1
    matrices = 3 * 16 * 8
    assert work == StepWork(layers=2, read_bytes=2 * 2 * matrices * 2, flops=6 * 2 * 2 * 2 * matrices, layer_tokens=12)
