"""`train_language_model`: one training of a model on packed rows, from the beginning or from its last whole checkpoint.

It serves dense models, MoE models from scratch, and recovery training after conversion. In recovery, each layer draws
its number of experts anew at every step (a router trained at one k degrades when k moves, arXiv 2509.26520), the gate
"ramped" goes from its exact start (0) to the learned gate (1), and a dense teacher may be followed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from thermoe.energy_callback import EnergyCallback
from thermoe.errors import ConfigError, DataError, MachineError, TrainingDivergedError
from thermoe.moe.layer import routed_modules
from thermoe.training.callbacks import PricedSteps, RouterSteps, Schedule, Watch, Write
from thermoe.training.distill import Distiller
from thermoe.training.language_loss import fused_loss
from thermoe.training.settings import SCHEDULES, TrainSettings
from thermoe.training.trainer import MoETrainer, OwnLoss, TokenRows, Validation, routers_of, validate
from thermoe.training.under_price import UnderPrice


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a training came to.

    Args:
        steps: optimiser steps in all.
        tokens: tokens learned from in all.
        session_tokens: those since the start or the last resume.
        session_s: seconds of the same, validations included.
        validation: `ppl` and `bits_per_byte` at the end, and what `UnderPrice.held_out` says; empty without held-out
            text.
    """

    steps: int
    tokens: int
    session_tokens: int
    session_s: float
    validation: dict[str, float] = field(default_factory=dict)


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


def check_precision(settings: TrainSettings, device: torch.device, where: str = "training") -> None:
    """Raise a MachineError when the device cannot compute in bfloat16 and ``bf16`` is on."""
    able = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if settings.bf16 and not able:
        raise MachineError(
            f"the device {device} does not compute in bfloat16",
            where=f"{where}.bf16",
            accepted="an NVIDIA GPU of compute capability 8.0 or newer, or the CPU",
            fix=f"use {where}.bf16=false",
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; one cut short while it was written is passed over.

    The Trainer writes `trainer_state.json` last.
    """
    if not folder.is_dir():
        return None
    return max((path for path in folder.glob("checkpoint-*") if _is_whole(path)), key=checkpoint_step, default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_step(checkpoint: Path | None) -> int:
    """Return the step a checkpoint was written at; 0 when there is none."""
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def train_language_model(
    model: nn.Module,
    rows: Tensor,
    settings: TrainSettings,
    *,
    checkpoint_dir: Path,
    write: Write | None = None,
    on_step: Callable[[int], None] | None = None,
    resume: bool = False,
    validation: Validation | None = None,
    distiller: Distiller | None = None,
    own_losses: Mapping[str, OwnLoss] | None = None,
    energy: EnergyCallback | None = None,
    report_to: str | list[str] = "none",
    keep_checkpoint: bool = False,
) -> Outcome:
    """Train ``model`` in place on packed token rows.

    Args:
        model: a causal language model, dense or with MoE layers.
        rows: integers (N, S).
        settings: how to train.
        checkpoint_dir: where the Trainer keeps its checkpoints; left in place when training diverges or is interrupted,
            removed when it is done unless ``keep_checkpoint``.
        write: receives rows of the kinds `train`, `load` (one per MoE layer), `eval` and `energy`.
        on_step: called after every step with its number, for a progress bar.
        resume: go on from the last whole checkpoint in ``checkpoint_dir``, if there is one.
        validation: held-out text, read at the beginning, every `eval_every` steps and at the end.
        distiller: follow a dense teacher.
        own_losses: losses that foreign blocks bring along.
        energy: puts joules into logs and rows.
        report_to: names of reporters as transformers knows them.
        keep_checkpoint: leave the last checkpoint for the caller to remove.

    Raises:
        ConfigError: a setting is outside its range, or does not go with the model.
        DataError: there are fewer rows than one batch.
        MachineError: bfloat16 was asked for and the device has none.
        TrainingDivergedError: a loss, gradient or weight was not finite; the message names the last good checkpoint.
    """
    settings.check()
    check_batch(rows, settings)
    settings = settings.for_rows(rows.shape[0])
    device = next(model.parameters()).device
    check_precision(settings, device)
    last = last_checkpoint(checkpoint_dir) if resume else None
    fresh = last is None
    if settings.eval_every and validation is None:
        raise ConfigError(
            f"eval_every is {settings.eval_every} and there is no held-out text",
            where="training.eval_every",
            accepted="0, or a training with held-out text",
            fix="use 0",
        )
    _freeze(model, settings)
    if settings.gradient_checkpointing:
        # The reentrant kind runs the forward without autograd, and the routing losses would not reach the routers.
        _checkpointing(model, "enable")({"use_reentrant": False})
    watch = Watch(model, settings, write, on_step)
    with UnderPrice(model, settings.price, rows, settings.steps, settings.seed) as under_price:
        steps = [Schedule(model, settings), RouterSteps(model), PricedSteps(under_price)]
        trainer = MoETrainer(
            model=model,
            args=_arguments(
                settings, checkpoint_dir, device, report_to, eval_on_start=fresh and validation is not None
            ),
            train_dataset=TokenRows(rows),
            balance=settings.balance,
            distiller=distiller,
            own_losses=own_losses,
            validation=validation,
            callbacks=[*([] if energy is None else [energy]), *steps, watch],
        )
        trainer.remove_callback(_printer_callback())
        watch.trainer = trainer
        model.train()
        started = time.monotonic()
        try:
            if last is not None and checkpoint_step(last) >= settings.steps:  # the Trainer would take one step more
                trainer.take_up(last)
            else:
                with fused_loss(model):
                    trainer.train(resume_from_checkpoint=None if last is None else str(last))
            priced: dict[str, float] = {}
            if validation is not None and watch.diverged_at is None:
                priced = under_price.held_out(lambda: validate(model, validation)["ppl"])
        finally:
            for _, layer in routed_modules(model):
                layer.last_routing = None  # let go of the last step's autograd history
            for router in routers_of(model).values():
                router.active_top_k = None
            if settings.bf16:
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if settings.gradient_checkpointing:
                _checkpointing(model, "disable")()
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
    if not keep_checkpoint:
        shutil.rmtree(checkpoint_dir, ignore_errors=True)
    tokens = trainer.state.num_input_tokens_seen
    return Outcome(
        steps=trainer.state.global_step,
        tokens=tokens,
        session_tokens=tokens - int(getattr(trainer, "_initial_num_input_tokens_seen", 0)),
        session_s=time.monotonic() - started,
        validation={**(watch.last_validation or _validated(model, validation)), **priced},
    )


def _arguments(
    settings: TrainSettings, folder: Path, device: torch.device, report_to: str | list[str], *, eval_on_start: bool
) -> TrainingArguments:
    on_gpu = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        optim="adamw_torch_fused" if device.type in ("cuda", "cpu") else "adamw_torch",
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        torch_compile=settings.torch_compile,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        eval_on_start=eval_on_start,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=1,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=report_to,
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_num_workers=settings.dataloader_num_workers,
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # replicas of DataParallel would keep the routing decisions to themselves
    return arguments


def _validated(model: nn.Module, validation: Validation | None) -> dict[str, float]:
    """Return what the last row of a validation said, where this session trained no step."""
    if validation is None:
        return {}
    found = validate(model, validation)
    return {name: found[name] for name in ("ppl", "bits_per_byte")}


def _freeze(model: nn.Module, settings: TrainSettings) -> None:
    """Freeze everything but the routers where only they are to learn."""
    if settings.trainable == "all":
        return
    routers = routers_of(model)
    if not routers:
        raise ConfigError(
            f"{type(model).__name__} has no router to train",
            where="training.trainable",
            accepted="'all' for a dense model",
            fix="use training.trainable=all",
        )
    model.requires_grad_(False)
    for router in routers.values():
        router.requires_grad_(True)


def _checkpointing(model: nn.Module, what: str) -> Callable[..., Any]:
    """Return the model's method that switches recomputing; newer versions of transformers have another name for it."""
    method: Callable[..., Any] = getattr(model, f"activation_checkpointing_{what}", None) or getattr(
        model, f"gradient_checkpointing_{what}"
    )
    return method


def _printer_callback() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
