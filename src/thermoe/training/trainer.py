"""`MoETrainer`: the Hugging Face Trainer with routing losses, distillation, routing statistics and exact resuming.

Nothing waits for the device between two log steps: losses and statistics add up on it and are read once per log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from thermoe.errors import CheckpointError
from thermoe.evaluation import sequence_nll
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.global_load import GlobalLoad
from thermoe.moe.layer import collect_routing, routed_modules
from thermoe.moe.losses import DEFAULT_BALANCE, LOSSES, ModelLoss, check_loss_terms, routing_loss
from thermoe.routers.base import Router
from thermoe.training.distill import Distiller
from thermoe.training.monitor import make_monitor, over_layers

ROUTING_STATE = "routing_state.pt"
#: A loss that a block brings along: its coefficient, and what computes it from the model after a forward.
OwnLoss = tuple[float, Callable[[nn.Module], Tensor]]


class TokenRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Packed rows of tokens (N, S) of any integer type, fetched a batch at a time."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__(index)  # type: ignore[arg-type]

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        ids = self.rows[indices].long()
        return {"input_ids": ids, "labels": ids}


def _as_fetched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


@dataclass(frozen=True, slots=True)
class Validation:
    """Held-out text.

    Args:
        rows: (N, S) token ids.
        bytes_per_token: UTF-8 bytes a token of it stands for on average.
        batch_size: sequences of one forward.
    """

    rows: Tensor
    bytes_per_token: float
    batch_size: int = 16


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Return the routers of ``model`` by the dotted name of their layer."""
    return {name: module.router for name, module in routed_modules(model) if isinstance(module.router, Router)}


@contextmanager
def full_top_k(model: nn.Module) -> Iterator[None]:
    """Let every router use its whole top_k, whatever random k has drawn."""
    routers = routers_of(model)
    drawn = {name: router.active_top_k for name, router in routers.items()}
    try:
        for router in routers.values():
            router.active_top_k = None
        yield
    finally:
        for name, router in routers.items():
            router.active_top_k = drawn[name]


@torch.no_grad()
def validate(model: nn.Module, held_out: Validation, on_batch: Callable[[], Any] | None = None) -> dict[str, float]:
    """Return `loss` (nats per predicted token), `ppl` and `bits_per_byte` on held-out text.

    The model is left in its mode, and no random number is drawn.
    """
    was_training = model.training
    device = next(model.parameters()).device
    sums: list[Tensor] = []
    model.eval()
    try:
        with full_top_k(model):
            for batch in held_out.rows.split(held_out.batch_size):
                ids = batch.to(device=device, dtype=torch.long)
                sums.append(sequence_nll(model(input_ids=ids).logits, ids).sum())
                if on_batch is not None:
                    on_batch()
    finally:
        model.train(was_training)
    nats = float(torch.stack(sums).double().sum()) / (held_out.rows.shape[0] * (held_out.rows.shape[1] - 1))
    return {
        "loss": nats,
        "ppl": math.inf if nats > 700 else math.exp(nats),  # beyond, a float overflows
        "bits_per_byte": nats / math.log(2) / held_out.bytes_per_token,
    }


class MoETrainer(Trainer):
    """The Hugging Face Trainer with what a model with experts needs.

    At log steps these join the logs: `lm_loss`; `balance_loss`, the weighted sum of the routing losses, and each of
    them unweighted as `aux_NAME`; `distill_kl` and `distill_layer_mse`; `max_vio`, `effective_experts`,
    `effective_experts_min`, `dead_experts`, `experts_per_token`, `drop_rate`. All are means over the steps since the
    last log, statistics over their tokens.

    Args:
        balance: auxiliary losses and coefficients.
        distiller: compares the model with a dense teacher.
        own_losses: losses that foreign blocks bring along, by the name they are logged under.
        validation: what `evaluate` reads; without it `evaluate` is that of the Trainer.
        args, kwargs: those of `transformers.Trainer`.

    Attributes:
        routing_rows: statistics per layer at the last log.
    """

    def __init__(
        self,
        *args: Any,
        balance: Mapping[str, float] | None = None,
        distiller: Distiller | None = None,
        own_losses: Mapping[str, OwnLoss] | None = None,
        validation: Validation | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(kwargs.get("train_dataset"), TokenRows):
            kwargs.setdefault("data_collator", _as_fetched)
        super().__init__(*args, **kwargs)
        self.balance = check_loss_terms(DEFAULT_BALANCE if balance is None else balance)
        self.distiller, self.own_losses, self.validation = distiller, dict(own_losses or {}), validation
        self.monitor = make_monitor(self.model)
        self.loads = GlobalLoad()
        self._loads_of_step = -1
        self.routing_rows: list[dict[str, Any]] = []
        self._decisions: dict[str, RoutingDecision] = {}
        self._sums: dict[str, Tensor] = {}
        self._summed_from = 0
        # GPT-2's configuration names no loss; the Trainer would count the first token of a row as predicted too.
        self._loss_shifts_labels = True

    # -- losses -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the language-modelling loss plus, in training, the routing losses and the distillation."""
        wants_outputs = kwargs.get("return_outputs", args[0] if args else False)
        kwargs["return_outputs"] = True
        if not model.training:
            loss, outputs = super().compute_loss(model, inputs, *args[1:], **kwargs)
            return (loss, outputs) if wants_outputs else loss
        if self.distiller is None:
            loss, outputs = super().compute_loss(model, inputs, *args[1:], **kwargs)
        else:
            with self.distiller.watching():
                loss, outputs = super().compute_loss(model, inputs, *args[1:], **kwargs)
        # A loss averaged over all micro-batches of a step is not divided by their number any more.
        averaged = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        averaged = averaged or self.compute_loss_func is not None
        share = 1 / self.current_gradient_accumulation_steps
        self._note("lm_loss", loss if averaged else loss * share)
        total = loss if self.distiller is None else loss * self.distiller.lm
        added = self._routing_terms(model, share) + self._distilled(inputs, outputs, share)
        for term in added:
            total = total + (term * share if averaged else term)
        return (total, outputs) if wants_outputs else total

    def _routing_terms(self, model: nn.Module, share: float) -> list[Tensor]:
        """Return the weighted routing losses of this micro-batch, and note each of them for the log.

        The hard share of the balancing losses is that of the optimiser step so far, over micro-batches and ranks.
        """
        decisions = collect_routing(self.model)
        if self._loads_of_step != self.state.global_step:
            self.loads.start_step()
            self._loads_of_step = self.state.global_step
        self.loads.add(decisions.values())
        self._decisions = {name: decision.detach() for name, decision in decisions.items()}
        weighted: list[Tensor] = []
        for name, coefficient in self.balance.items():
            term = routing_loss(decisions.values(), {name: coefficient}, loads=self.loads)
            if term is not None:
                # Logged as a mean over layers, so that 1 is an even load of `switch` whatever the depth.
                layers = 1 if isinstance(LOSSES.get(name), ModelLoss) else len(decisions)
                self._note(f"aux_{name}", term * (share / (coefficient * layers)))
                weighted.append(term)
        for name, (coefficient, compute) in self.own_losses.items():
            own = compute(self.model)
            self._note(name, own * share)
            weighted.append(coefficient * own)
        if weighted:
            self._note("balance_loss", torch.stack([term.detach() for term in weighted]).sum() * share)
        return weighted

    def _distilled(self, inputs: dict[str, Any], outputs: Any, share: float) -> list[Tensor]:
        """Return the weighted terms of the distillation, if there is one."""
        if self.distiller is None:
            return []
        with self.accelerator.autocast():
            terms = self.distiller.terms(inputs, outputs["logits"])
        for name, value in terms.items():
            self._note(name, value * share)
        return [self.distiller.weights()[name] * value for name, value in terms.items()]

    def _note(self, name: str, value: Tensor) -> None:
        """Add to the sum of a loss since the last log, on the device."""
        if not self._sums:
            self._summed_from = self.state.global_step
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Learn from one micro-batch, then show its decisions to the routers and the monitor.

        Only then, so that a forward recomputed in the backward pass meets the routers as the first one did, and is
        counted once.
        """
        loss = super().training_step(*args, **kwargs)
        decisions, self._decisions = self._decisions, {}
        for name, module in routed_modules(self.model):
            module.last_routing = None  # let go of the autograd history
            if name in decisions and isinstance(module.router, Router):
                module.router.observe(decisions[name])
        if self.monitor is not None:
            self.monitor.update(decisions)
        return loss

    # -- what is logged -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add losses and statistics to the logs of a log step, for every reporter."""
        if "loss" in logs:
            if self._sums:
                steps = max(1, self.state.global_step - self._summed_from)
                values = torch.stack(list(self._sums.values())).cpu()
                logs.update({name: float(value) / steps for name, value in zip(self._sums, values, strict=True)})
                self._sums = {}
            self.routing_rows = [] if self.monitor is None else self.monitor.flush(self.state.global_step)
            logs.update(over_layers(self.routing_rows))
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Return and log loss, perplexity and bits per byte on the held-out text."""
        if self.validation is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

        def seen() -> None:
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        found = validate(self.model, self.validation, seen)
        for _, module in routed_modules(self.model):
            module.last_routing = None
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of packed rows on the host; the Trainer would wait for the device at every micro-batch."""
        if "attention_mask" in inputs or self.args.include_num_input_tokens_seen == "no":
            super()._track_num_input_tokens(inputs)
        else:
            self.state.num_input_tokens_seen += inputs["input_ids"].numel() * self.args.world_size

    # -- resuming -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in a checkpoint what else the routing needs to go on as if nothing had happened."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            buffers = {name: _unsaved_buffers(router) for name, router in routers_of(self.model).items()}
            state = {"monitor": None if self.monitor is None else self.monitor.state_dict(), "buffers": buffers}
            torch.save(state, Path(output_dir) / ROUTING_STATE)

    def take_up(self, checkpoint: Path) -> None:
        """Load the state of a training that is at its end, without a step."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / ROUTING_STATE
        if not path.is_file():
            raise CheckpointError(
                f"the checkpoint has no {ROUTING_STATE}",
                where=resume_from_checkpoint,
                accepted="a checkpoint written by thermoe",
                fix="start again in another folder; a model alone can be given as model.from_pretrained",
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.load_state_dict(state["monitor"])
        routers = routers_of(self.model)
        for name, kept in state["buffers"].items():
            present = dict(routers[name].named_buffers())
            for key, value in kept.items():
                present[key].copy_(value)


def _unsaved_buffers(router: Router) -> dict[str, Tensor]:
    """Return the buffers that are no part of a saved model, such as counts of the step under way."""
    saved = router.state_dict()
    return {name: value.detach().cpu() for name, value in router.named_buffers() if name not in saved}
