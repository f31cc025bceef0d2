"""Joules in a Trainer's logs: equal to what the simulated board used, through a resume, and never in the way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import thermoe.energy_callback as module
from thermoe import EnergyCallback
from thermoe.errors import ConfigError
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.plant import Board, Fault
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import NullSource
from thermoe.telemetry.totals import EnergyTotals

STEP_S = 1.0
SIM = "simulated/"


class Line(torch.nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = input_ids.float() * self.weight
        return {"loss": logits.mean(), "logits": logits}


class Work(TrainerCallback):
    """Lets virtual time pass and the sampler poll, as a step and its background thread would."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.sleep_s(STEP_S)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.sleep_s(0.5)


class Report(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))

    def of(self, name: str) -> list[float]:
        return [log[name] for log in self.logs if name in log]


class WatchedSource(SimulatedSource):
    """Notes every reading."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads = 0

    def read(self, device: Any, metrics: Any) -> Any:
        self.reads += 1
        return super().read(device, metrics)


@pytest.fixture(autouse=True)
def telemetry_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THERMOE_TELEMETRY", raising=False)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def source(clock: VirtualClock) -> WatchedSource:
    board = Board(gain_rel_limit=0.0)
    return WatchedSource(3, clock=clock, board=board, load=lambda t_s: 300.0)


def train(folder: Path, callbacks: list[TrainerCallback], *, resume: bool = False, **options: Any) -> Trainer:
    settings = {
        "max_steps": 20,
        "logging_steps": 5,
        "save_strategy": "no",
        "include_num_input_tokens_seen": True,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        **options,
    }
    rows = [{"input_ids": torch.ones(8), "labels": torch.ones(8)} for _ in range(64)]
    trainer = Trainer(
        Line(),
        TrainingArguments(str(folder), **settings),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=callbacks,
    )
    trainer.remove_callback(module_printer())
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def module_printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def true_j(source: SimulatedSource, start_s: float, end_s: float) -> float:
    source.plants[0].advance(end_s)
    return source.plants[0].true_between(start_s, end_s)


def test_windows_and_total_equal_what_the_board_used(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    report, energy = Report(), EnergyCallback(source)
    began_s = clock.now_s()
    train(tmp_path, [report, Work(clock), energy])
    total_j = report.of(SIM + "energy/total_j")[-1]
    assert total_j == pytest.approx(true_j(source, began_s, clock.now_s()), rel=0.02)
    assert total_j == pytest.approx(sum(report.of(SIM + "energy/energy_j")))
    assert len(report.of(SIM + "energy/energy_j")) == 4
    assert report.of(SIM + "energy/power_w")[-1] == pytest.approx(total_j / energy.totals.measured_s, rel=0.05)
    tokens = 20 * 2 * 8
    assert energy.totals.tokens == tokens
    assert report.of(SIM + "energy/total_j_per_token")[-1] == pytest.approx(total_j / tokens)
    assert report.of(SIM + "energy/j_per_token")[0] == pytest.approx(
        report.of(SIM + "energy/energy_j")[0] / (tokens / 4)
    )
    assert not energy.totals.partial


def test_temperature_and_memory_are_logged_and_nothing_is_ever_none(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    report = Report()
    train(tmp_path, [report, Work(clock), EnergyCallback(source)])
    for name in ("thermal/gpu_temp_c", "thermal/memory_temp_c", "memory/used_bytes", "energy/window_s"):
        assert all(value > 0 for value in report.of(SIM + name)) and report.of(SIM + name)
    assert all(value is not None for log in report.logs for value in log.values())
    assert not [name for log in report.logs for name in log if name.startswith(("energy/", "thermal/"))]


def test_the_logs_reach_a_reporter_that_was_added_first_and_the_history(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    first, last = Report(), Report()
    trainer = train(tmp_path, [first, Work(clock), EnergyCallback(source), last])
    assert first.logs == last.logs and first.of(SIM + "energy/energy_j")
    history = [entry for entry in trainer.state.log_history if SIM + "energy/energy_j" in entry]
    assert [entry["step"] for entry in history] == [5, 10, 15, 20]
    assert sum(isinstance(callback, Report) for callback in trainer.callback_handler.callbacks) == 2


def test_every_other_callback_still_gets_every_event(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    class Count(TrainerCallback):
        begun = 0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun += 1

    before, after = Count(), type("Later", (Count,), {})()
    train(tmp_path, [before, EnergyCallback(source), after], max_steps=1)
    assert (before.begun, after.begun) == (1, 1)


def test_nothing_is_read_in_a_step(tmp_path: Path, clock: VirtualClock, source: WatchedSource) -> None:
    class Watch(TrainerCallback):
        """Runs after the energy callback, which is always first."""

        during: list[int] = []  # noqa: RUF012

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.reads = source.reads

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.during.append(source.reads - self.reads)

    watch = Watch()
    train(tmp_path, [EnergyCallback(source), watch, Work(clock)], logging_steps=1)
    assert watch.during == [0] * 20
    overridden = {name for name in vars(EnergyCallback) if name.startswith("on_")}
    assert overridden == {"on_init_end", "on_train_begin", "on_prediction_step", "on_log", "on_train_end"}


def test_frequent_logs_share_a_window(tmp_path: Path, clock: VirtualClock, source: WatchedSource) -> None:
    report = Report()
    train(tmp_path, [report, Work(clock), EnergyCallback(source, min_window_s=4.0)], logging_steps=1)
    assert min(report.of(SIM + "energy/window_s")) >= 4.0
    assert 4 <= len(report.of(SIM + "energy/energy_j")) <= 5
    assert source.reads < 40


def test_a_short_tail_is_measured_together_with_the_window_before(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    class Tail(Work):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.clock.sleep_s(STEP_S if state.global_step <= 5 else 0.1)

    report = Report()
    began_s = clock.now_s()
    train(tmp_path, [report, Tail(clock), EnergyCallback(source)], max_steps=9)
    assert report.of(SIM + "energy/total_j")[-1] == pytest.approx(true_j(source, began_s, clock.now_s()), rel=0.03)
    assert report.of(SIM + "energy/total_j")[-1] > sum(report.of(SIM + "energy/energy_j")) + 100
    assert not report.of(SIM + "energy/total_partial_j")


def test_a_training_of_less_than_a_second_has_no_joules(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report()
    train(tmp_path, [report, EnergyCallback(source)], max_steps=2, logging_steps=1)
    assert not [name for log in report.logs for name in log if "energy/" in name]
    assert "too short" in caplog.text


def test_a_resume_keeps_the_totals(tmp_path: Path, clock: VirtualClock, source: WatchedSource) -> None:
    saving = {"save_strategy": "steps", "save_steps": 8}
    began_s = clock.now_s()
    train(tmp_path, [Work(clock), EnergyCallback(source)], max_steps=8, **saving)
    first_j = true_j(source, began_s, clock.now_s())
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    kept = saved["stateful_callbacks"]["EnergyCallback"]["attributes"]["saved_totals"]
    # The last log was at step 5; the checkpoint holds what ran up to step 8 all the same.
    assert kept["energy_j"] == pytest.approx(first_j, rel=0.03)
    clock.sleep_s(1000.0)  # the machine does other things in between
    again_s, energy = clock.now_s(), EnergyCallback(source)
    train(tmp_path, [Work(clock), energy], resume=True, max_steps=16, **saving)
    second_j = true_j(source, again_s, clock.now_s())
    assert energy.totals.energy_j == pytest.approx(first_j + second_j, rel=0.03)
    assert energy.totals.tokens == 16 * 16 and not energy.totals.partial


def test_a_resume_by_the_trainers_own_restoring_keeps_them_too(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.SOURCES._entries, "simulated", lambda clock=None: source)
    options = {"save_strategy": "steps", "save_steps": 8, "restore_callback_states_from_checkpoint": True}
    train(tmp_path, [Work(clock), EnergyCallback("simulated")], max_steps=8, **options)
    report = Report()
    trainer = train(tmp_path, [report, Work(clock), EnergyCallback("simulated")], resume=True, max_steps=16, **options)
    restored = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EnergyCallback))
    assert restored.totals.tokens == 16 * 16
    assert report.of(SIM + "energy/total_j")[-1] == pytest.approx(restored.totals.energy_j)


def test_a_resume_from_a_checkpoint_without_totals_is_partial(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 8}
    train(tmp_path, [], max_steps=8, **saving)
    report, energy = Report(), EnergyCallback(source)
    train(tmp_path, [report, Work(clock), energy], resume=True, max_steps=16, **saving)
    assert energy.totals.partial and "8 steps" in energy.totals.gaps[0]
    assert report.of(SIM + "energy/total_partial_j")[-1] == pytest.approx(energy.totals.energy_j)
    assert not report.of(SIM + "energy/total_j") and not report.of(SIM + "energy/total_j_per_token")


def test_a_second_training_starts_from_zero(tmp_path: Path, clock: VirtualClock, source: WatchedSource) -> None:
    energy = EnergyCallback(source)
    train(tmp_path, [Work(clock), energy])
    first = energy.totals.energy_j
    train(tmp_path, [Work(clock), energy])
    assert energy.totals.energy_j == pytest.approx(first, rel=0.05)


def test_a_counter_reset_leaves_a_gap_that_is_named(tmp_path: Path, clock: VirtualClock) -> None:
    faults = [Fault(kind="reset", start_s=clock.now_s() + 7.0)]
    report = Report()
    energy = EnergyCallback(SimulatedSource(3, clock=clock, faults=faults, load=lambda t_s: 300.0))
    train(tmp_path, [report, Work(clock), energy])
    assert len(report.of(SIM + "energy/energy_j")) == 3
    assert energy.totals.partial and energy.totals.unmeasured_s == pytest.approx(5.0, abs=0.1)
    assert report.of(SIM + "energy/total_j") and report.of(SIM + "energy/total_partial_j")
    assert report.of(SIM + "thermal/gpu_temp_c")


def test_a_window_with_an_evaluation_has_no_joules_per_token(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource
) -> None:
    report = Report()
    train(
        tmp_path, [report, Work(clock), EnergyCallback(source)], eval_strategy="steps", eval_steps=10,
        per_device_eval_batch_size=1,
    )  # fmt: skip
    evaluations = [log for log in report.logs if "eval_loss" in log]
    assert len(evaluations) == 2
    assert all(SIM + "energy/energy_j" in log and SIM + "energy/j_per_token" not in log for log in evaluations)
    assert len(report.of(SIM + "energy/j_per_token")) == 4


def test_without_a_sensor_nothing_is_logged_but_one_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    with caplog.at_level(logging.WARNING, logger="thermoe"):
        train(tmp_path, [report, EnergyCallback(NullSource("no GPU (NVIDIA driver library not found)"))])
    assert not [name for log in report.logs for name in log if "/" in name]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("thermoe")]
    assert len(said) == 1 and "energy is not measured" in said[0] and "thermoe doctor" in said[0]


def test_without_a_count_of_tokens_joules_are_logged_and_the_option_is_named(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report()
    train(tmp_path, [report, Work(clock), EnergyCallback(source)], include_num_input_tokens_seen=False)
    assert report.of(SIM + "energy/energy_j") and not report.of(SIM + "energy/j_per_token")
    assert caplog.text.count("include_num_input_tokens_seen") == 1


def test_boards_that_cannot_be_read_from_here_make_the_total_partial(
    tmp_path: Path, clock: VirtualClock, source: WatchedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EnergyCallback, "_boards_used", staticmethod(lambda args: 4))
    report = Report()
    train(tmp_path, [report, Work(clock), EnergyCallback(source)])
    assert report.of(SIM + "energy/total_partial_j") and not report.of(SIM + "energy/j_per_token")


@pytest.mark.parametrize("method", ["open", "direct_edges", "close_window", "describe", "close"])
def test_a_failing_meter_never_stops_the_training(
    tmp_path: Path,
    clock: VirtualClock,
    source: WatchedSource,
    method: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the driver went away")

    monkeypatch.setattr(module.EnergyMeter, method, fail)
    trainer = train(tmp_path, [Work(clock), EnergyCallback(source)], save_strategy="steps", save_steps=7)
    assert trainer.state.global_step == 20
    assert caplog.text.count("the driver went away") == 1


def test_a_saved_state_is_plain_and_builds_the_callback_again(source: WatchedSource) -> None:
    kept = json.loads(json.dumps(EnergyCallback("off", devices=["GPU-1"], min_window_s=7).state()))
    built = EnergyCallback.from_state(kept)
    assert (built.source, built.devices, built.min_window_s) == ("off", ["GPU-1"], 7.0)
    assert EnergyCallback(source, devices=object()).state()["args"]["devices"] is None
    assert EnergyTotals.from_state({"energy_j": 5.0, "unknown": 1}).energy_j == 5.0


@pytest.mark.parametrize("bad", [0.5, 0, -1, float("nan"), 1e9, "5s", True])
def test_a_bad_length_is_refused_at_once(bad: Any) -> None:
    with pytest.raises(ConfigError, match="min_window_s"):
        EnergyCallback(min_window_s=bad)
