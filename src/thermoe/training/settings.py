"""How to train: one dataclass with its checks, used by `thermoe train` and by the phases of a comparison."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from thermoe.config import within
from thermoe.errors import ConfigError, UnknownNameError
from thermoe.moe.losses import DEFAULT_BALANCE, check_loss_terms
from thermoe.training.under_price import PriceSettings

#: NumPy takes seeds of 32 bits.
MAX_SEED = 2**32 - 1
#: Our name of a learning-rate schedule, and that of transformers. All begin with the linear warm-up.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
TRAINABLE = ("all", "routers")


@dataclass(kw_only=True, slots=True)
class TrainSettings:
    """How to train.

    Args:
        steps: optimiser steps.
        epochs: passes over the training text; when given, ``steps`` follows from it.
        batch_size: sequences per step.
        gradient_accumulation_steps: parts into which a step's batch is divided to save memory.
        lr: peak learning rate of AdamW.
        schedule: of the learning rate after the linear warm-up: cosine, linear (both to 0) or constant.
        warmup_steps: steps of warm-up.
        weight_decay: on matrices.
        max_grad_norm: gradients are scaled down to this norm.
        balance: auxiliary losses and coefficients; no effect on a dense model.
        random_k: draw each layer's number of experts from 1..top_k at every step.
        ramp_frac: share of the steps over which the gate "ramped" goes to 1; 0 leaves it as it is.
        trainable: "all" weights, or "routers" alone with everything else frozen.
        bf16: autocast to bfloat16; weights and optimiser stay in float32.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        torch_compile: compile the model.
        log_every: steps between rows.
        eval_every: steps between validations; 0 validates at the end alone.
        stop_when_converged: end as soon as the validations say "converged" (`thermoe.convergence`); suits a constant
            schedule, since a learning rate that falls to 0 flattens any curve.
        save_every: steps between checkpoints; 0 saves none.
        dataloader_num_workers: processes that load batches; 0 is this one, and enough for packed tokens in memory.
        seed: of the order of the data, of random k and of dropout.
        price: training under the price that the model will be served under; see `PriceSettings`.
    """

    steps: int = 400
    epochs: float | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    lr: float = 2e-3
    schedule: str = "cosine"
    warmup_steps: int = 40
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    balance: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_BALANCE))
    random_k: bool = False
    ramp_frac: float = 0.0
    trainable: str = "all"
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    log_every: int = 10
    eval_every: int = 0
    stop_when_converged: bool = False
    save_every: int = 100
    dataloader_num_workers: int = 0
    seed: int = 0
    price: PriceSettings = field(default_factory=PriceSettings)

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one forward."""
        return self.batch_size // self.gradient_accumulation_steps

    def for_rows(self, rows: int) -> TrainSettings:
        """Return the settings with ``epochs`` turned into ``steps`` for a text of that many sequences."""
        if self.epochs is None:
            return self
        per_epoch = math.ceil(rows // self.micro_batch_size / self.gradient_accumulation_steps)
        return replace(self, steps=max(1, math.ceil(self.epochs * per_epoch)), epochs=None)

    def check(self, where: str = "training") -> None:
        """Raise a ConfigError for a value outside its range."""
        for name, low in (
            ("steps", 1),
            ("batch_size", 1),
            ("gradient_accumulation_steps", 1),
            ("warmup_steps", 0),
            ("log_every", 1),
            ("eval_every", 0),
            ("save_every", 0),
            ("dataloader_num_workers", 0),
        ):
            within(f"{where}.{name}", getattr(self, name), low)
        within(f"{where}.seed", self.seed, 0, MAX_SEED)
        for name in ("weight_decay", "max_grad_norm"):
            within(f"{where}.{name}", getattr(self, name), 0.0)
        within(f"{where}.ramp_frac", self.ramp_frac, 0.0, 1.0)
        for name, value in (("lr", self.lr), ("epochs", self.epochs)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"{name} is {value}",
                    where=f"{where}.{name}",
                    accepted="a finite number above 0",
                    fix="use 1e-3" if name == "lr" else "use 1, or leave it out and give steps",
                )
        for name, options in (("schedule", SCHEDULES), ("trainable", TRAINABLE)):
            if getattr(self, name) not in options:
                raise UnknownNameError.of(name, str(getattr(self, name)), options, where=f"{where}.{name}")
        self._check_multiples(where)
        self._check_balance(where)
        self.price.check(f"{where}.price", self.micro_batch_size)

    def _check_multiples(self, where: str) -> None:
        if self.stop_when_converged and not self.eval_every:
            raise ConfigError(
                "stop_when_converged is true and eval_every 0",
                where=f"{where}.eval_every",
                accepted="an integer of at least 1, so that there are validations to judge by",
                fix=f"use {where}.eval_every=100",
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"{self.batch_size} sequences cannot be divided into {self.gradient_accumulation_steps} equal parts",
                where=f"{where}.gradient_accumulation_steps",
                accepted="a divisor of batch_size",
                fix=f"change {where}.batch_size or {where}.gradient_accumulation_steps",
            )
        if self.save_every % self.log_every:
            raise ConfigError(
                f"save_every is {self.save_every} and log_every {self.log_every}",
                where=f"{where}.save_every",
                accepted="a multiple of log_every, so that the loss is looked at before a checkpoint is written",
                fix=f"use {where}.save_every={max(1, self.save_every // self.log_every) * self.log_every}",
            )

    def _check_balance(self, where: str) -> None:
        for loss, coefficient in self.balance.items():
            if not isinstance(loss, str) or isinstance(coefficient, bool) or not isinstance(coefficient, (int, float)):
                raise ConfigError(
                    f"balance holds {loss!r}: {coefficient!r}",
                    where=f"{where}.balance",
                    accepted="names of losses, each with a number",
                    fix="for example {switch: 0.01}",
                )
        check_loss_terms(self.balance, where=f"{where}.balance")
