"""What happens between the steps: random k, the gate's ramp, routers that move by themselves, rows, a stop in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thermoe.convergence import judge_convergence
from thermoe.results import PROVENANCE_ORDER
from thermoe.training.settings import TrainSettings
from thermoe.training.trainer import MoETrainer, routers_of
from thermoe.training.under_price import UnderPrice

#: Receives (kind of row, step, fields).
Write = Callable[[str, int, dict[str, Any]], None]
#: Names in the logs that a training row holds under the same name.
_ROUTING = (
    "max_vio", "effective_experts", "effective_experts_min", "dead_experts", "experts_per_token", "drop_rate",
    "price_nats", "distinct_under_price",
)  # fmt: skip
#: Names of `EnergyCallback`, and those in a row.
_ENERGY = {
    "energy/energy_j": "energy_j",
    "energy/j_per_token": "j_per_token",
    "energy/power_w": "power_w",
    "energy/window_s": "duration_s",
    "energy/total_j": "total_j",
    "energy/total_partial_j": "total_partial_j",
    "energy/total_j_per_token": "total_j_per_token",
    "thermal/gpu_temp_c": "temp_c",
    "thermal/memory_temp_c": "memory_temp_c",
    "memory/used_bytes": "memory_used_bytes",
}


class Schedule(TrainerCallback):
    """Sets random k and the gate's ramp from the step number alone, so that a resumed run repeats."""

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        self.routers = list(routers_of(model).values())
        self.settings = settings

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw k for every layer and move the ramp."""
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
        """Leave the ramp at its end."""
        if self.settings.ramp_frac > 0:
            for router in self.routers:
                router.ramp.fill_(1.0)


class PricedSteps(TrainerCallback):
    """Puts the price on before each step and takes it off after it, so that no validation and no checkpoint has it."""

    def __init__(self, under_price: UnderPrice) -> None:
        self.under_price = under_price

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the price on."""
        self.under_price.before_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the price off."""
        self.under_price.after_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Add the price and the distinct experts it left to the logs of a log step."""
        if "loss" in logs:
            logs.update(self.under_price.figures())


class RouterSteps(TrainerCallback):
    """Lets routers move what no gradient moves, such as a balancing bias, after every optimiser step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `Router.after_step` of every router."""
        for router in routers_of(self.model).values():
            router.after_step()


class Watch(TrainerCallback):
    """Writes rows, asks for validations, and stops at a number that is not finite before it gets into a checkpoint.

    Args:
        model: the model in training.
        settings: how it is trained, with ``steps`` known.
        write: receives the rows, or ``None``.
        on_step: called after every step with its number.
    """

    def __init__(
        self, model: nn.Module, settings: TrainSettings, write: Write | None, on_step: Callable[[int], None] | None
    ) -> None:
        self.model, self.settings, self.write, self.on_step = model, settings, write, on_step
        self.diverged_at: int | None = None
        self.last_validation: dict[str, float] = {}
        self.trainer: MoETrainer | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a look at the loss before every checkpoint and at the end, and for the validations that are due."""
        last = control.should_training_stop
        if control.should_save or last:
            control.should_log = True  # no checkpoint and no end without a look at the loss
        if self.trainer is not None and self.trainer.validation is not None:
            every = self.settings.eval_every
            control.should_evaluate = last or (every > 0 and state.global_step % every == 0)
        if self.on_step is not None:
            self.on_step(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write what was logged as rows, and end a training that has converged, if that is asked for."""
        if "loss" in logs and not self._finite(state, control, logs):
            return
        if "eval_loss" in logs and self.settings.stop_when_converged:
            curve = {float(row["step"]): float(row["eval_loss"]) for row in state.log_history if "eval_loss" in row}
            control.should_training_stop |= judge_convergence(sorted(curve.items())).converged
        if self.write is None:
            return
        if "loss" in logs:
            self._write_training(state, logs)
        if "eval_loss" in logs:
            self.last_validation = {name: logs[f"eval_{name}"] for name in ("ppl", "bits_per_byte")}
            tokens = state.num_input_tokens_seen
            self.write("eval", state.global_step, {"tokens": tokens, "nll": logs["eval_loss"], **self.last_validation})
        energy = energy_fields(logs)
        if energy:
            self.write("energy", state.global_step, energy)

    def _finite(self, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any]) -> bool:
        """Return whether training may go on; otherwise stop it without a checkpoint."""
        # A gradient can be bad one step before the loss is, and a step can overflow with both of them finite.
        good = math.isfinite(float(logs["loss"])) and math.isfinite(float(logs.get("grad_norm", 0.0)))
        if good and (control.should_save or control.should_training_stop):
            good = bool(torch.stack([torch.isfinite(p).all() for p in self.model.parameters()]).all())
        if not good:
            self.diverged_at = state.global_step
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False
        return good

    def _write_training(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        assert self.write is not None
        fields: dict[str, Any] = {"tokens": state.num_input_tokens_seen, "loss": float(logs["loss"])}
        if "learning_rate" in logs:
            fields["lr"] = float(logs["learning_rate"])
        for name, value in logs.items():
            if name in ("lm_loss", "balance_loss", "grad_norm", *_ROUTING) or name.startswith(("aux_", "distill_")):
                fields[name] = float(value)
        self.write("train", state.global_step, fields)
        if self.trainer is None:
            return
        for row in self.trainer.routing_rows:
            self.write("load", state.global_step, dict(row))
        for alarm in self.trainer.monitor.raised if self.trainer.monitor is not None else ():
            fields = asdict(alarm)
            self.write("alarm", fields.pop("step"), {"alarm": fields.pop("kind"), **fields})


def energy_fields(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an energy row from what `EnergyCallback` put into the logs; empty when it put nothing.

    The row's provenance is that of its joules; a temperature or memory of another one is left to the logs.
    """
    for provenance in reversed(PROVENANCE_ORDER):
        prefix = "" if provenance == "measured" else f"{provenance}/"
        found = {field: logs[prefix + name] for name, field in _ENERGY.items() if prefix + name in logs}
        if {"energy_j", "total_j", "total_partial_j"} & set(found):
            return {**found, "provenance": provenance}
    return {}
