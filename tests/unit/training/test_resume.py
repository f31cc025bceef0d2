"""A training that was cut short, wherever, goes on to the same weights, rows and joules as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import HELD, ROWS, assert_same_weights, biased_moe, interrupt_at, routers, train
from transformers import TrainerCallback

from thermoe import EnergyCallback
from thermoe.errors import CheckpointError
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.plant import Board
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.training.loop import checkpoint_step, last_checkpoint
from thermoe.training.trainer import ROUTING_STATE, Validation

#: Router state, accumulation, random k, the ramp, sampling and dropped tokens at once; an epoch has 4 steps, the last
#: of them with one micro-batch only.
PLAN: dict[str, Any] = {
    "save_every": 4,
    "eval_every": 3,
    "gradient_accumulation_steps": 2,
    "random_k": True,
    "ramp_frac": 0.9,
    "seed": 3,
    "validation": Validation(HELD, 1.5, 2),
}
MODEL: dict[str, Any] = {"capacity_factor": 1.0, "temperature": 0.7}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    torch.manual_seed(0)
    model = biased_moe(**MODEL)
    _, rows = train(model, tmp_path_factory.mktemp("whole"), **PLAN)
    return model, rows


def kept_rows(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Return the rows a run folder keeps when it is taken up at a step; at 0 it begins anew."""
    return [row for row in rows if row["step"] <= step] if step else []


def test_the_plan_is_not_trivial(whole: tuple[Any, list[dict[str, Any]]]) -> None:
    model, rows = whole
    assert all(router.bias.abs().max() > 0 for router in routers(model))
    assert all(router.average.abs().max() > 0 for router in routers(model))
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 3, 6, 9, 10]
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [row["tokens"] for row in train_rows][:2] == [2 * 4 * 16, (3 * 4 + 2) * 16]
    assert any(row["drop_rate"] > 0 for row in train_rows)
    assert len({row["experts_per_token"] for row in train_rows}) > 1


@pytest.mark.parametrize("stop", [3, 5, 8, 10])
def test_interrupted_at_any_step_it_ends_the_same(
    stop: int, whole: tuple[Any, list[dict[str, Any]]], tmp_path: Path
) -> None:
    model, rows = whole
    folder = tmp_path
    torch.manual_seed(0)
    cut_rows: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        cut_rows = train(biased_moe(**MODEL), folder, on_step=interrupt_at(stop), **PLAN)[1]
    reached = checkpoint_step(last_checkpoint(folder / "checkpoints"))
    assert reached == (stop - 1) // 4 * 4
    torch.manual_seed(0 if not reached else 999)  # behind a checkpoint nothing but it may count
    fresh = biased_moe(0 if not reached else 9, **MODEL)
    _, more = train(fresh, folder, resume=True, **PLAN)
    assert_same_weights(model, fresh)
    assert all(torch.equal(a.average, b.average) for a, b in zip(routers(model), routers(fresh), strict=True))
    assert kept_rows(rows, reached) + more == rows
    assert cut_rows == []


def test_a_finished_training_is_taken_up_without_another_step(
    whole: tuple[Any, list[dict[str, Any]]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    train(biased_moe(**MODEL), tmp_path, keep_checkpoint=True, **PLAN)
    fresh = biased_moe(9, **MODEL)
    outcome, rows = train(fresh, tmp_path, resume=True, keep_checkpoint=True, **PLAN)
    assert_same_weights(whole[0], fresh)
    assert (outcome.steps, outcome.session_tokens, rows) == (10, 0, [])
    last = [row for row in whole[1] if row["kind"] == "eval"][-1]
    assert outcome.validation == {name: last[name] for name in ("ppl", "bits_per_byte")}


def test_validation_does_not_touch_the_training(whole: tuple[Any, list[dict[str, Any]]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = biased_moe(**MODEL)
    train(model, tmp_path, **{**PLAN, "eval_every": 0, "validation": None})
    assert_same_weights(whole[0], model)


def test_a_checkpoint_whose_last_file_was_cut_is_passed_over(tmp_path: Path) -> None:
    train(biased_moe(), tmp_path, keep_checkpoint=True, save_every=4)
    torn = tmp_path / "checkpoints" / "checkpoint-12"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": 1.2, "glob')
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-10"


def test_a_checkpoint_of_another_program_is_refused(tmp_path: Path) -> None:
    train(biased_moe(), tmp_path, keep_checkpoint=True, save_every=4, steps=9)
    (tmp_path / "checkpoints" / "checkpoint-9" / ROUTING_STATE).unlink()
    with pytest.raises(CheckpointError, match=ROUTING_STATE):
        train(biased_moe(), tmp_path, resume=True, save_every=4, steps=12)


class _Work(TrainerCallback):
    """Lets virtual time pass in every step."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.sleep_s(6.0)


def _energy(monkeypatch: pytest.MonkeyPatch) -> EnergyCallback:
    """Return a callback that reads a simulated board of 300 W; each training step takes 6 s of its time."""
    clock = VirtualClock()
    board = SimulatedSource(3, clock=clock, board=Board(gain_rel_limit=0.0), load=lambda t_s: 300.0)
    energy = EnergyCallback(board)
    work = _Work(clock)
    monkeypatch.setattr(energy, "on_step_end", work.on_step_end)
    return energy


def test_joules_go_on_through_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"save_every": 4, "steps": 12, "gradient_accumulation_steps": 2}
    reference = _energy(monkeypatch)
    _, rows = train(biased_moe(), tmp_path / "whole", ROWS[:12], energy=reference, **plan)
    whole_j = reference.totals.energy_j
    assert whole_j > 10_000
    with pytest.raises(KeyboardInterrupt):
        train(biased_moe(), tmp_path / "cut", ROWS[:12], energy=_energy(monkeypatch), on_step=interrupt_at(7), **plan)
    again = _energy(monkeypatch)
    outcome, more = train(biased_moe(9), tmp_path / "cut", ROWS[:12], energy=again, resume=True, **plan)
    assert again.totals.energy_j == pytest.approx(whole_j, rel=0.03)
    assert again.totals.tokens == reference.totals.tokens == outcome.tokens
    assert outcome.session_tokens < outcome.tokens
    assert not again.totals.partial
    energies = [row for row in rows if row["kind"] == "energy"]
    assert len(energies) >= 6
    assert {row["provenance"] for row in energies} == {"simulated"}
    for row in energies[:-1]:
        assert row["energy_j"] / row["duration_s"] == pytest.approx(row["power_w"], rel=1e-6)
        assert row["j_per_token"] == pytest.approx(row["energy_j"] / (2 * 4 * 16), rel=1e-6)
        assert row["temp_c"] > 20
    last = [row for row in more if row["kind"] == "energy"][-1]
    assert last["total_j"] == pytest.approx(again.totals.energy_j)


def test_without_a_sensor_there_is_no_energy_row_and_no_zero(tmp_path: Path) -> None:
    _, rows = train(biased_moe(), tmp_path, energy=EnergyCallback("off"))
    assert rows
    assert not [row for row in rows if row["kind"] == "energy" or "energy_j" in row]


def test_rows_count_packed_tokens_on_the_host(tmp_path: Path) -> None:
    outcome, rows = train(biased_moe(), tmp_path, ROWS[:8], steps=4)
    assert outcome.tokens == 4 * 4 * 16
    assert [row["tokens"] for row in rows if row["kind"] == "train"] == [128, 256]
