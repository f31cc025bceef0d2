"""One row per architecture: where its feed-forward networks sit, and how their weights read.

`read` returns the network in one neutral form, (F, D) up and (D, F) down, whatever the checkpoint's own layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from thermoe.errors import ConversionError, near_match


@dataclass(frozen=True, slots=True)
class FFNWeights:
    """A dense feed-forward network, down(act(up x + b) [* gate x]) + c, in a neutral layout.

    Args:
        up: (F, D).
        up_bias: (F,) or ``None``.
        gate: (F, D), or ``None`` when ungated.
        down: (D, F).
        down_bias: (D,) or ``None``.
        activation: a name of `transformers.activations.ACT2FN`.
        dropout: dropout probability after the network.
    """

    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture that can be converted.

    Args:
        model_type: `config.model_type` of the dense model.
        blocks: dotted path from the causal model to its list of blocks.
        ffn: attribute of a block that holds the feed-forward network.
        read: reads that network's weights.
    """

    model_type: str
    blocks: str
    ffn: str
    read: Callable[[Any, Any], FFNWeights]


def _read_gpt2(ffn: Any, config: Any) -> FFNWeights:
    """GPT-2's Conv1D stores (in, out): c_fc (D, F), c_proj (F, D)."""
    return FFNWeights(
        up=ffn.c_fc.weight.T,
        up_bias=ffn.c_fc.bias,
        gate=None,
        down=ffn.c_proj.weight.T,
        down_bias=ffn.c_proj.bias,
        activation=config.activation_function,
        dropout=config.resid_pdrop,
    )


FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", "transformer.h", "mlp", _read_gpt2),  # GPT-2 and DistilGPT2
}


def family_of(model: nn.Module) -> Family:
    """Return the row for ``model``.

    Raises:
        ConversionError: no row for its `config.model_type`, or it is an MoE already.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = near_match(model_type, FAMILIES)
    if model_type == "thermoe_gpt2":
        raise ConversionError(
            "the model is a Mixture-of-Experts already",
            where=f"config.model_type = {model_type!r}",
            accepted="a dense model",
            fix="to change its routers use thermoe.set_router(model, name)",
        )
    raise ConversionError(
        f"no feed-forward network to convert is known for the architecture {model_type!r}",
        where=f"config.model_type of {type(model).__name__}",
        accepted=", ".join(sorted(FAMILIES)),
        fix=f"did you mean a {near!r} model?" if near else "convert a model of an accepted architecture",
    )
