"""Training on the Hugging Face Trainer: auxiliary losses, random k, the gate's ramp, and a stop at the first bad loss.

`train_language_model` serves both the dense model and recovery training after conversion. In recovery, each layer draws
its number of experts anew at every step (a router trained at one k degrades when k moves, arXiv 2509.26520), and the
gate "ramped" goes from its exact start (0) to the learned gate (1) over the first part of the run.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thermoe.errors import ConfigError, DataError, TrainingDivergedError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import collect_routing, routed_modules
from thermoe.moe.losses import DEFAULT_BALANCE, check_loss_terms, routing_loss
from thermoe.routers.base import Router

#: NumPy takes seeds of 32 bits.
MAX_SEED = 2**32 - 1
#: Receives (step, fields of the row) every `log_every` steps.
LogRow = Callable[[int, dict[str, Any]], None]


@dataclass(kw_only=True, slots=True)
class TrainSettings:
    """How to train.

    Args:
        steps: optimiser steps.
        batch_size: sequences per step.
        lr: peak learning rate of AdamW; linear warm-up, then cosine decay.
        warmup_steps: steps of warm-up.
        weight_decay: on matrices.
        max_grad_norm: gradients are scaled down to this norm.
        balance: auxiliary losses and coefficients; no effect on a dense model.
        random_k: draw each layer's number of experts from 1..top_k at every step.
        ramp_frac: share of the steps over which the gate "ramped" goes to 1; 0 leaves it as it is.
        log_every: steps between rows.
        save_every: steps between checkpoints; 0 saves none.
        seed: of the order of the data, of random k and of dropout.
    """

    steps: int = 400
    batch_size: int = 16
    lr: float = 2e-3
    warmup_steps: int = 40
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    balance: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_BALANCE))
    random_k: bool = False
    ramp_frac: float = 0.0
    log_every: int = 10
    save_every: int = 100
    seed: int = 0

    def check(self, where: str = "training") -> None:
        """Raise a ConfigError for a value outside its range."""
        for name, low in (
            ("steps", 1),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("log_every", 1),
            ("save_every", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}",
                    where=f"{where}.{name}",
                    accepted=f"an integer of at least {low}",
                    fix=f"raise {where}.{name}",
                )
        if self.seed > MAX_SEED:
            raise ConfigError(
                f"seed is {self.seed}",
                where=f"{where}.seed",
                accepted=f"an integer from 0 to {MAX_SEED}",
                fix=f"lower {where}.seed",
            )
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every is {self.save_every} and log_every {self.log_every}",
                where=f"{where}.save_every",
                accepted="a multiple of log_every, so that the loss is looked at before a checkpoint is written",
                fix=f"use {where}.save_every={max(1, self.save_every // self.log_every) * self.log_every}",
            )
        if not 0 < self.lr < math.inf:
            raise ConfigError(
                f"lr is {self.lr}", where=f"{where}.lr", accepted="a finite number above 0", fix="use 1e-3"
            )
        for name in ("weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}",
                    where=f"{where}.{name}",
                    accepted="a finite number of at least 0",
                    fix="0 switches it off",
                )
        if not 0 <= self.ramp_frac <= 1:
            raise ConfigError(
                f"ramp_frac is {self.ramp_frac}",
                where=f"{where}.ramp_frac",
                accepted="0 to 1",
                fix="0 leaves the gate as it is",
            )
        for loss, coefficient in self.balance.items():
            if not isinstance(loss, str) or isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
                raise ConfigError(
                    f"balance holds {loss!r}: {coefficient!r}",
                    where=f"{where}.balance",
                    accepted="names of losses, each with a number",
                    fix="for example {switch: 0.01}",
                )
        check_loss_terms(self.balance, where=f"{where}.balance")


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of packed tokens as the Trainer wants them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class MoETrainer(Trainer):
    """The Hugging Face Trainer with routing losses added to the model's own.

    Args:
        balance: auxiliary losses and coefficients.
        args, kwargs: those of `transformers.Trainer`.
    """

    def __init__(self, *args: Any, balance: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.balance = check_loss_terms(DEFAULT_BALANCE if balance is None else balance)
        self.last_routing_loss: Tensor | None = None
        # GPT-2's configuration names no loss; the Trainer would count the first token of a row as predicted too.
        self._loss_shifts_labels = True

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the language-modelling loss plus the routing losses of this forward."""
        wants_outputs = kwargs.get("return_outputs", args[0] if args else False)
        kwargs["return_outputs"] = True
        loss, outputs = super().compute_loss(model, inputs, *args[1:], **kwargs)
        auxiliary = routing_loss(collect_routing(model).values(), self.balance) if model.training else None
        if auxiliary is not None:
            self.last_routing_loss = auxiliary.detach()
            # A loss averaged over all micro-batches of a step is not divided by their number any more.
            averaged = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
            averaged = averaged or self.compute_loss_func is not None
            loss = loss + (auxiliary / self.current_gradient_accumulation_steps if averaged else auxiliary)
        return (loss, outputs) if wants_outputs else loss


def _routers(model: nn.Module) -> list[Router]:
    return [module.router for _, module in routed_modules(model) if isinstance(module.router, Router)]


class _Schedule(TrainerCallback):
    """Sets random k and the gate's ramp from the step number alone, so that a resumed run repeats."""

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.routers = _routers(model)
        self.settings = settings

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, settings = state.global_step, self.settings
        if settings.random_k:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            for router in self.routers:
                # Shards of a copy come together, so k moves by whole copies.
                size = getattr(router, "group_size", 1)
                router.active_top_k = size * int(torch.randint(1, router.top_k // size + 1, (), generator=generator))
        if settings.ramp_frac > 0:
            for router in self.routers:
                router.ramp.fill_(min(1.0, step / (settings.ramp_frac * settings.steps)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.settings.ramp_frac > 0:
            for router in self.routers:
                router.ramp.fill_(1.0)


class _Watch(TrainerCallback):
    """Writes rows, and stops at a loss that is not finite, before a checkpoint could be written with it."""

    def __init__(
        self, model: nn.Module, tokens_per_step: int, log: LogRow | None, on_step: Callable[[int], None] | None
    ):
        self.model, self.tokens_per_step, self.log, self.on_step = model, tokens_per_step, log, on_step
        self.diverged_at: int | None = None
        self.trainer: MoETrainer | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or control.should_training_stop:
            control.should_log = True  # no checkpoint and no end without a look at the loss
        if self.on_step is not None:
            self.on_step(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        loss = float(logs["loss"])
        # A gradient can be bad one step before the loss is, and a step can overflow with both of them finite.
        good = math.isfinite(loss) and math.isfinite(float(logs.get("grad_norm", 0.0)))
        if good and (control.should_save or control.should_training_stop):
            good = all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        if not good:
            self.diverged_at = state.global_step
            control.should_training_stop = True
            control.should_save = False
            return
        if self.log is None:
            return
        fields: dict[str, Any] = {"tokens": state.global_step * self.tokens_per_step, "loss": loss}
        if "learning_rate" in logs:
            fields["lr"] = float(logs["learning_rate"])
        routing = collect_routing(self.model)
        if routing and self.trainer is not None and self.trainer.last_routing_loss is not None:
            fields["balance_loss"] = float(self.trainer.last_routing_loss)
            fields["max_vio"] = max(_max_vio(decision) for decision in routing.values())
        self.log(state.global_step, fields)


def _max_vio(decision: RoutingDecision) -> float:
    counts = decision.counts
    return float(counts.max() / counts.mean().clamp(min=1e-12) - 1)


def check_batch(rows: Tensor, settings: TrainSettings, where: str = "training") -> None:
    """Raise a DataError when ``rows`` (N, S) do not fill one batch."""
    if rows.shape[0] < settings.batch_size:
        raise DataError(
            f"the training text has {rows.shape[0]} sequences of {rows.shape[1]} tokens, fewer than one batch of "
            f"{settings.batch_size}",
            where=f"{where}.batch_size",
            accepted=f"at most {rows.shape[0]}",
            fix="give more text, or lower the batch size or the sequence length",
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; one cut short while it was written is passed over.

    The Trainer writes `trainer_state.json` last.
    """
    if not folder.is_dir():
        return None
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=checkpoint_step, default=None)


def checkpoint_step(checkpoint: Path | None) -> int:
    """Return the step a checkpoint was written at; 0 when there is none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def train_language_model(
    model: nn.Module,
    rows: Tensor,
    settings: TrainSettings,
    *,
    checkpoint_dir: Path,
    log: LogRow | None = None,
    on_step: Callable[[int], None] | None = None,
    resume: bool = False,
) -> None:
    """Train ``model`` in place on packed token rows.

    Args:
        model: a causal language model, dense or with MoE layers.
        rows: int64 (N, S).
        settings: how to train.
        checkpoint_dir: where the Trainer keeps its checkpoints; left in place when training diverges or is interrupted,
            removed when it is done.
        log: receives a row every `log_every` steps.
        on_step: called after every step with its number, for a progress bar.
        resume: go on from the last checkpoint in ``checkpoint_dir``, if there is one.

    Raises:
        ConfigError: a setting is outside its range.
        DataError: there are fewer rows than one batch.
        TrainingDivergedError: a loss, gradient or weight was not finite; the message names the last good checkpoint.
    """
    settings.check()
    check_batch(rows, settings)
    arguments = TrainingArguments(
        output_dir=str(checkpoint_dir),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=1,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # replicas of DataParallel would keep the routing decisions to themselves
    watch = _Watch(model, settings.batch_size * rows.shape[1], log, on_step)
    trainer = MoETrainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(rows),
        balance=settings.balance,
        callbacks=[_Schedule(model, settings), watch],
    )
    trainer.remove_callback(_printer_callback())
    watch.trainer = trainer
    model.train()
    last = last_checkpoint(checkpoint_dir) if resume else None
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    finally:
        for _, layer in routed_modules(model):
            layer.last_routing = None  # let go of the last step's autograd history
        for router in _routers(model):
            router.active_top_k = None
        model.eval()
    if watch.diverged_at is not None:
        kept = last_checkpoint(checkpoint_dir)
        raise TrainingDivergedError(
            f"the loss, its gradient or a weight was not finite around step {watch.diverged_at}",
            where=str(checkpoint_dir),
            accepted="finite numbers",
            fix=f"lower the learning rate (it is {settings.lr}) and start again; "
            + (f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet"),
        )
    shutil.rmtree(checkpoint_dir, ignore_errors=True)


def _printer_callback() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
