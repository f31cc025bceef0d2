"""The model that a training begins with: a new frame, a loaded model, or a loaded dense one that is converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from thermoe.errors import CheckpointError, ConfigError, ThermoeError
from thermoe.models.convert import convert_to_moe
from thermoe.models.frame import build_frame, native_aux_loss
from thermoe.routers.swap import set_router
from thermoe.training.spec import DENSE, TrainSpec
from thermoe.training.texts import TrainingText
from thermoe.training.trainer import OwnLoss


@dataclass(frozen=True, slots=True)
class Prepared:
    """The model to train, and the dense model it is taught by, if there is one."""

    model: PreTrainedModel
    teacher: PreTrainedModel | None


def load_model(folder: str, *, where: str) -> PreTrainedModel:
    """Load a causal language model in float32 from a local folder.

    Raises:
        CheckpointError: there is no model, or it cannot be read.
    """
    place = Path(folder).expanduser()
    accepted = "a folder written by save_pretrained: config.json and weights"
    if not (place / "config.json").is_file():
        raise CheckpointError(
            f"{place} has no config.json" if place.is_dir() else f"{place} is no folder",
            where=where,
            accepted=accepted,
            fix="check the path; the model of an earlier run is in its folder `model`",
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(place, local_files_only=True, dtype=torch.float32)
    except ThermoeError:
        raise
    except Exception as error:  # transformers raises whatever the format's reader raised
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the model in {place} cannot be read: {reason}",
            where=where,
            accepted=accepted,
            fix="copy the model again; --debug before the command shows where reading stopped",
        ) from error
    return model


def new_model(spec: TrainSpec, vocab_size: int) -> PreTrainedModel:
    """Return a new model of the sizes in ``spec``."""
    sizes = spec.model
    vocab_size = -(-vocab_size // sizes.pad_vocab_to) * sizes.pad_vocab_to
    return build_frame(
        sizes.block,  # type: ignore[arg-type]
        vocab_size=vocab_size,
        sequence_length=sizes.sequence_length,
        hidden_size=sizes.hidden_size,
        layers=sizes.layers,
        heads=sizes.heads,
        num_experts=sizes.num_experts,
        top_k=sizes.top_k,
        expert_width=sizes.expert_width,
        gated=sizes.gated,
        router=spec.router.name or "topk",
        router_options=spec.router.options,
        seed=spec.seed,
    )


def own_losses(spec: TrainSpec) -> dict[str, OwnLoss]:
    """Return the losses that a foreign block brings along: Mixtral's own balance loss, logged as `aux_native`.

    It sums over the k slots, so that the coefficient a of `switch` is a / k of it.
    """
    if spec.model.from_pretrained is not None or spec.model.block != "mixtral":
        return {}
    return {"aux_native": (spec.training.balance.get("switch", 0.0) / spec.model.top_k, native_aux_loss)}


def prepare_model(spec: TrainSpec, text: TrainingText, device: torch.device) -> Prepared:
    """Return the model of ``spec`` on ``device``, and its teacher.

    Raises:
        CheckpointError: a folder holds no readable model.
        ConfigError: the model does not fit the tokenizer or the length of a sequence.
        ConversionError: the model cannot be converted as asked.
    """
    vocab_size = len(text.tokenizer)
    if spec.model.from_pretrained is None:
        model, dense = new_model(spec, vocab_size), None
    else:
        dense = load_model(spec.model.from_pretrained, where="model.from_pretrained")
        _check_fit(dense, vocab_size, spec)
        model = _converted(dense, spec)
    teacher: PreTrainedModel | None = None
    if spec.distill.teacher == DENSE:
        teacher = dense
    elif spec.distill.teacher is not None:
        teacher = load_model(spec.distill.teacher, where="distill.teacher")
    return Prepared(model.to(device), None if teacher is None else teacher.to(device))


def _converted(loaded: PreTrainedModel, spec: TrainSpec) -> PreTrainedModel:
    """Return the loaded model as it is to be trained: converted, with another router, or unchanged."""
    convert, router = spec.model.convert, spec.router
    if convert.method is not None:
        return convert_to_moe(
            loaded,
            num_experts=convert.num_experts,
            top_k=convert.top_k,
            method=convert.method,  # type: ignore[arg-type]
            neurons=convert.neurons,  # type: ignore[arg-type]
            shared_size=convert.shared_size,
            groups=convert.groups,
            seed=spec.seed,
            router=router.name or "topk",
            **router.options,
        )
    if router.name is not None:
        set_router(loaded, router.name, **router.options)
    elif router.options:
        raise ConfigError(
            "router.options are given without a name, and the loaded model keeps its own routers",
            where="router.name",
            accepted="the name of a router with its options",
            fix="set router.name, or leave router.options out",
        )
    return loaded


def _check_fit(model: PreTrainedModel, vocab_size: int, spec: TrainSpec) -> None:
    config: Any = model.config
    if vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, the model an embedding of {config.vocab_size}",
            where="tokenizer.path",
            accepted="the tokenizer that the model was trained with",
            fix="leave tokenizer.path out if it lies beside the model",
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and spec.model.sequence_length > most:
        raise ConfigError(
            f"sequence_length is {spec.model.sequence_length}, the model has {most} positions",
            where="model.sequence_length",
            accepted=f"2 to {most}",
            fix=f"use model.sequence_length={most}",
        )
