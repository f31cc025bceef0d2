"""Training: what the loss is made of, random k and the ramp, resuming bit for bit, stopping at a bad number."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from thermoe.errors import ConfigError, DataError, TrainingDivergedError
from thermoe.moe.global_load import GlobalLoad
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.moe.losses import routing_loss
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe
from thermoe.training.loop import last_checkpoint, train_language_model
from thermoe.training.settings import TrainSettings
from thermoe.training.trainer import MoETrainer, TokenRows

ROWS = random_tokens(12, 16)
BALANCE = {"switch": 0.15, "z_loss": 0.025}  # in each of two layers


def settings(**changes: Any) -> TrainSettings:
    fields: dict[str, Any] = {
        "steps": 9,
        "batch_size": 4,
        "lr": 3e-3,
        "warmup_steps": 1,
        "log_every": 2,
        "save_every": 0,
        "balance": BALANCE,
        **changes,
    }
    return TrainSettings(**fields)


def train(model: nn.Module, folder: Path, rows: Tensor = ROWS, **changes: Any) -> list[dict[str, Any]]:
    logged: list[dict[str, Any]] = []
    options = {name: changes.pop(name) for name in ("on_step", "resume") if name in changes}
    train_language_model(
        model,
        rows,
        settings(**changes),
        checkpoint_dir=folder / "checkpoints",
        write=lambda kind, step, fields: logged.append({"step": step, **fields}) if kind == "train" else None,
        **options,
    )
    return logged


def interrupt_at(step: int) -> Callable[[int], None]:
    def on_step(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_moe])
def test_loss_falls_on_a_tiny_corpus(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    logged = train(build(), tmp_path, steps=30, log_every=10, lr=1e-2)
    losses = [row["loss"] for row in logged]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
    assert [row["tokens"] for row in logged] == [step * 4 * 16 for step in (10, 20, 30)]


def test_only_a_model_with_experts_logs_routing_figures(tmp_path: Path) -> None:
    dense, moe = train(tiny_gpt2(), tmp_path)[0], train(tiny_moe(), tmp_path)[0]
    assert "balance_loss" not in dense
    assert moe["balance_loss"] > 0
    assert moe["max_vio"] >= 0


class _Gradients(TrainerCallback):
    """Keeps the model before each step, the batches of the step, and its gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.steps[-1]["batches"].append(kwargs["input_ids"].clone())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.steps.append({"before": state, "batches": []})

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.steps[-1]["gradients"] = {n: p.grad.clone() for n, p in self.model.named_parameters()}


@pytest.mark.parametrize("accepts_loss_kwargs", [True, False])
def test_routing_losses_enter_the_training_loss_exactly_with_accumulation_too(
    accepts_loss_kwargs: bool, tmp_path: Path
) -> None:
    """Six rows in batches of two, two batches a step: the second step of the epoch has only one batch."""
    model = tiny_moe()
    watch = _Gradients(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_grad_norm=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    trainer = MoETrainer(
        model=model, args=arguments, train_dataset=TokenRows(ROWS[:6]), balance=BALANCE, callbacks=[watch]
    )
    trainer.model_accepts_loss_kwargs = accepts_loss_kwargs
    trainer.train()
    assert [len(step["batches"]) for step in watch.steps] == [2, 1]
    for step, row in zip(watch.steps, trainer.state.log_history, strict=False):
        twin = tiny_moe().train()
        twin.load_state_dict(step["before"])
        total, loads = torch.zeros(()), GlobalLoad()
        for batch in step["batches"]:  # the hard share is that of the step so far
            language = twin(input_ids=batch, labels=batch).loss
            loads.add(collect_routing(twin).values())
            terms = routing_loss(collect_routing(twin).values(), BALANCE, loads=loads)
            assert terms is not None
            assert float(terms.detach()) > 0.3  # large enough for a wrong factor to show
            total = total + (language + terms) / len(step["batches"])
        total.backward()
        assert row["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(step["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_evaluation_reports_the_language_loss_alone(tmp_path: Path) -> None:
    model = tiny_moe()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, remove_unused_columns=False)
    trainer = MoETrainer(model=model, args=arguments, balance=BALANCE)
    with torch.no_grad():
        loss = trainer.compute_loss(model.eval(), {"input_ids": ROWS, "labels": ROWS})
        assert float(loss) == pytest.approx(float(model(input_ids=ROWS, labels=ROWS).loss), rel=1e-6)


def _drawn(tmp_path: Path, seed: int, steps: int = 24) -> list[tuple[int | None, ...]]:
    """Return the k of every layer at every step, and check that none is left set afterwards."""
    model = tiny_moe(top_k=3)
    drawn: list[list[int | None]] = []
    layers = [layer for _, layer in moe_layers(model)]
    model.register_forward_pre_hook(lambda *_: drawn.append([layer.router.active_top_k for layer in layers]))
    train(model, tmp_path, steps=steps, random_k=True, seed=seed)
    assert [layer.router.active_top_k for layer in layers] == [None, None]
    return [tuple(step) for step in drawn]


def test_random_k_is_drawn_per_layer_and_step_and_repeats(tmp_path: Path) -> None:
    first, again, other = _drawn(tmp_path, 5), _drawn(tmp_path, 5), _drawn(tmp_path, 6)
    assert len(first) == 24
    assert first == again
    assert first != other
    assert {k for step in first for k in step} == {1, 2, 3}
    assert any(a != b for a, b in first)


def test_without_random_k_every_step_uses_top_k(tmp_path: Path) -> None:
    model = tiny_moe()
    seen: list[Any] = []
    model.register_forward_pre_hook(lambda *_: seen.append([la.router.active_top_k for _, la in moe_layers(model)]))
    train(model, tmp_path)
    assert seen == [[None, None]] * 9


def test_ramp_goes_from_0_to_1_and_stays(tmp_path: Path) -> None:
    model = tiny_moe()
    ramps: list[float] = []
    router = next(layer.router for _, layer in moe_layers(model))
    model.register_forward_pre_hook(lambda *_: ramps.append(float(router.ramp)))
    train(model, tmp_path, steps=8, ramp_frac=0.5)
    assert ramps == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert [float(layer.router.ramp) for _, layer in moe_layers(model)] == [1.0, 1.0]


def test_without_ramp_the_gate_is_left_as_it_is(tmp_path: Path) -> None:
    model = tiny_moe()
    train(model, tmp_path)
    assert [float(layer.router.ramp) for _, layer in moe_layers(model)] == [0.0, 0.0]


def test_ramp_over_all_steps_still_ends_at_1(tmp_path: Path) -> None:
    model = tiny_moe()
    train(model, tmp_path, steps=3, ramp_frac=1.0)
    assert [float(layer.router.ramp) for _, layer in moe_layers(model)] == [1.0, 1.0]


@pytest.mark.parametrize("stop", [5, 7])
def test_resuming_gives_the_same_weights_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """Three steps an epoch and a checkpoint every four, so that the resumed run starts inside an epoch."""
    plan: dict[str, Any] = {"save_every": 4, "random_k": True, "ramp_frac": 0.9, "seed": 3}
    whole = tiny_moe(capacity_factor=1.0, temperature=0.7)
    resumed = copy.deepcopy(whole)
    reference = train(whole, tmp_path / "whole", **plan)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, tmp_path / "cut", on_step=interrupt_at(stop), **plan)
    assert [layer.router.active_top_k for _, layer in moe_layers(resumed)] == [None, None]
    fresh = tiny_moe(seed=9, capacity_factor=1.0, temperature=0.7)  # nothing but the checkpoint may count
    logged = train(fresh, tmp_path / "cut", resume=True, **plan)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name
    assert logged == [row for row in reference if row["step"] > 4]


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    whole, cut = tiny_moe(), tiny_moe()
    train(whole, tmp_path / "whole", save_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(cut, tmp_path / "cut", save_every=4, on_step=interrupt_at(7))
    torn = tmp_path / "cut" / "checkpoints" / "checkpoint-6"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(torn.parent) == torn.parent / "checkpoint-4"
    train(cut, tmp_path / "cut", save_every=4, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    whole, resumed = tiny_moe(), tiny_moe()
    train(whole, tmp_path / "a")
    train(resumed, tmp_path / "b", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_nothing_is_left_behind_after_success(tmp_path: Path) -> None:
    model = tiny_moe()
    train(model, tmp_path, save_every=4)
    assert list(tmp_path.rglob("*")) == []
    assert not model.training
    assert all(layer.last_routing is None for _, layer in moe_layers(model))


def _poison(model: nn.Module, at: int) -> Callable[[int], None]:
    def on_step(step: int) -> None:
        if step == at:
            with torch.no_grad():
                next(model.parameters())[1, 0] = math.nan

    return on_step


@pytest.mark.parametrize("at", [5, 7, 8, 9], ids=lambda at: f"step {at}")
def test_a_number_that_is_not_finite_stops_training_and_keeps_the_last_good_checkpoint(at: int, tmp_path: Path) -> None:
    """A checkpoint every four of nine steps: at step 8 a bad one is due, and step 9 is the end."""
    model = tiny_moe()
    with pytest.raises(TrainingDivergedError) as caught:
        train(model, tmp_path, save_every=4, on_step=_poison(model, at))
    kept = tmp_path / "checkpoints" / f"checkpoint-{8 if at == 9 else 4}"
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert str(kept) in str(caught.value.fix)
    assert caught.value.where == str(kept.parent)
    weights = load_file(kept / "model.safetensors")
    assert weights
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())
    type(model).from_pretrained(kept)


def test_a_learning_rate_that_is_too_high_is_a_divergence(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="learning rate") as caught:
        train(tiny_gpt2(), tmp_path, lr=1e38, steps=6)
    assert caught.value.exit_code == 3
    assert "no checkpoint had been written" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("warmup_steps", -1),
        ("log_every", 0),
        ("save_every", -2),
        ("save_every", 3),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("weight_decay", -0.1),
        ("max_grad_norm", math.nan),
        ("ramp_frac", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("balance", {"switch": "much"}),
        ("balance", {1: 0.1}),
        ("balance", {"switch": True}),
    ],
)
def test_a_setting_out_of_range_says_what_where_accepted_and_fix(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**{key: value}).check("recovery")
    error = caught.value
    assert error.where == f"recovery.{key}"
    assert error.what and error.accepted and error.fix
    with pytest.raises(ConfigError):
        train(tiny_gpt2(), tmp_path, **{key: value})
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_loss_shows_the_near_match() -> None:
    with pytest.raises(ConfigError, match="did you mean 'switch'") as caught:
        settings(balance={"swich": 0.1}).check()
    assert caught.value.where == "training.balance.swich"


def test_a_batch_larger_than_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than one batch of 13") as caught:
        train(tiny_gpt2(), tmp_path, batch_size=13)
    assert caught.value.where == "training.batch_size"
    assert list(tmp_path.iterdir()) == []
