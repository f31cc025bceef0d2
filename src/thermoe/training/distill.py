"""Distillation from the dense model during recovery training: its logits, and the output of each of its FFNs.

    loss = kl * KL(teacher || student) + layer_mse * mean over layers of |y - y_t|^2 / |y_t|^2 + lm * next-token loss

The squared error of a layer is divided by the teacher's mean square, so that it has no unit and one weight suits every
layer and model: 0 is the dense layer, 1 is an output of zeros. Teacher and student each run on their own hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from thermoe.errors import ConfigError
from thermoe.models.classes import base_model_of, placed_layers
from thermoe.models.families import family_of


class Distiller:
    """Compares a model with its teacher, forward by forward.

    Args:
        teacher: a dense model; it is frozen and put into evaluation mode.
        student: the MoE model made from one like it.
        kl: weight of KL(teacher || student) per token, in nats.
        layer_mse: weight of the layers' relative squared error.
        lm: weight of the language-modelling loss.

    Raises:
        ConfigError: teacher and student differ in vocabulary, width or depth, or the student has no MoE layer.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        *,
        kl: float = 1.0,
        layer_mse: float = 0.1,
        lm: float = 0.0,
    ) -> None:
        self.kl, self.layer_mse, self.lm = kl, layer_mse, lm
        self.teacher = teacher.requires_grad_(False).eval()
        layers = placed_layers(student) if hasattr(student.config, "moe_family") else {}
        for what, mine, theirs in (
            ("vocabulary", student.config.vocab_size, teacher.config.vocab_size),
            ("width", student.config.hidden_size, teacher.config.hidden_size),
            ("number of blocks", student.config.num_hidden_layers, teacher.config.num_hidden_layers),
        ):
            if mine != theirs:
                raise ConfigError(
                    f"the teacher's {what} is {theirs}, the student's {mine}",
                    where="distill.teacher",
                    accepted="the dense model that the student was converted from, or one of the same sizes",
                    fix="name another teacher",
                )
        if not layers:
            raise ConfigError(
                f"{type(student).__name__} has no MoE layer to teach",
                where="distill.teacher",
                accepted="a converted model",
                fix="set model.convert.method, or leave distill.teacher out",
            )
        self._open = False
        self._outputs: dict[str, dict[int, Tensor]] = {"teacher": {}, "student": {}}
        family = family_of(teacher)
        blocks = base_model_of(teacher).get_submodule(family.blocks)
        last = (family.place, *family.passed)[-1]  # where the feed-forward network has several parts, its last one
        self._handles = [layer.register_forward_hook(self._keep("student", i)) for i, layer in layers.items()]
        for i in layers:
            ffn = blocks.get_submodule(f"{i}.{last}")
            self._handles.append(ffn.register_forward_hook(self._keep("teacher", i)))

    def _keep(self, who: str, position: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._open:  # a forward recomputed in the backward pass is not kept
                self._outputs[who][position] = output

        return hook

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the layers' outputs of the forwards inside."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def terms(self, inputs: dict[str, Any], logits: Tensor) -> dict[str, Tensor]:
        """Return `distill_kl` and `distill_layer_mse` of the student's forward that was just watched, unweighted.

        Args:
            inputs: those of that forward; labels are left out.
            logits: (B, S, V), the student's.
        """
        with torch.no_grad(), self.watching():
            known = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
            taught: Tensor = self.teacher(**known, use_cache=False).logits
        student, teacher = self._outputs["student"], self._outputs["teacher"]
        self._outputs = {"teacher": {}, "student": {}}
        kl = F.kl_div(
            logits.float().log_softmax(-1).flatten(0, -2),
            taught.float().log_softmax(-1).flatten(0, -2),
            reduction="batchmean",
            log_target=True,
        )
        errors = []
        for position, wanted in teacher.items():
            got, target = student[position].float(), wanted.float().view_as(student[position])
            errors.append((got - target).square().mean() / target.square().mean().clamp(min=1e-12))
        return {"distill_kl": kl, "distill_layer_mse": torch.stack(errors).mean()}

    def weights(self) -> dict[str, float]:
        """Return the weight of each term."""
        return {"distill_kl": self.kl, "distill_layer_mse": self.layer_mse}

    def close(self) -> None:
        """Take the hooks off both models."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
