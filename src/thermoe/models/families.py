"""One row per architecture: where its feed-forward networks sit, what shape they have, and how their weights read.

Everything else about conversion is the same for all. `read` returns the network in one neutral form, (F, D) up and
(D, F) down, whatever the checkpoint's own layout; `shape` says the same from a configuration alone, so that a saved
model can be built without a dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from thermoe.errors import ConversionError, near_match


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNShape:
    """The shape of a dense feed-forward network.

    Args:
        hidden_size: D.
        intermediate_size: F.
        activation: a name of `transformers.activations.ACT2FN`.
        gated: whether there is a gate projection.
        up_bias: whether up and gate have biases.
        down_bias: whether the output has one.
        dropout: dropout probability inside the part that is replaced.
    """

    hidden_size: int
    intermediate_size: int
    activation: str
    gated: bool = False
    up_bias: bool = True
    down_bias: bool = True
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNWeights:
    """A dense feed-forward network, down(act(up x + b)) or down(act(gate x) * up x), in a neutral layout.

    Args:
        up: (F, D).
        up_bias: (F,) or ``None``.
        gate: (F, D), or ``None`` when ungated.
        gate_bias: (F,) or ``None``.
        down: (D, F).
        down_bias: (D,) or ``None``.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture that can be converted.

    Args:
        model_type: `config.model_type` of the dense model.
        blocks: dotted path from the base model to its list of blocks.
        place: path from a block to the module that the MoE layer replaces.
        entry: path from the base model to the module that every head calls with token ids and attention mask.
        passed: paths from a block to modules whose work the MoE layer does too; they become the identity.
        shape: the network's shape from a configuration.
        read: the network's weights from a block.
    """

    model_type: str
    blocks: str
    place: str
    shape: Callable[[Any], FFNShape]
    read: Callable[[Any], FFNWeights]
    passed: tuple[str, ...] = ()
    entry: str = ""


FAMILIES: dict[str, Family] = {}


def add_family(family: Family) -> Family:
    """Make an architecture known; its models can then be converted, saved and loaded.

    Raises:
        ConversionError: the architecture is known already.
    """
    if family.model_type in FAMILIES:
        raise ConversionError(
            f"the family {family.model_type!r} is known already",
            where="add_family",
            accepted="a model_type without a row",
            fix="use the row there is: thermoe.models.families.FAMILIES",
        )
    FAMILIES[family.model_type] = family
    return family


def _two_linears(up: Any, down: Any) -> FFNWeights:
    return FFNWeights(up=up.weight, up_bias=up.bias, down=down.weight, down_bias=down.bias)


def _read_conv1d(block: Any) -> FFNWeights:
    """GPT-2's Conv1D stores (in, out): c_fc (D, F), c_proj (F, D)."""
    ffn = block.mlp
    return FFNWeights(up=ffn.c_fc.weight.T, up_bias=ffn.c_fc.bias, down=ffn.c_proj.weight.T, down_bias=ffn.c_proj.bias)


def _read_gated(block: Any) -> FFNWeights:
    ffn = block.mlp
    return FFNWeights(
        gate=ffn.gate_proj.weight,
        gate_bias=ffn.gate_proj.bias,
        up=ffn.up_proj.weight,
        up_bias=ffn.up_proj.bias,
        down=ffn.down_proj.weight,
        down_bias=ffn.down_proj.bias,
    )


def _gpt2_shape(config: Any) -> FFNShape:
    return FFNShape(
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner if config.n_inner is not None else 4 * config.n_embd,
        activation=config.activation_function,
        dropout=config.resid_pdrop,
    )


def _plain_shape(config: Any) -> FFNShape:
    return FFNShape(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, activation=config.hidden_act
    )


def _gated_shape(config: Any) -> FFNShape:
    bias = bool(getattr(config, "mlp_bias", False))
    return FFNShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        activation=config.hidden_act,
        gated=True,
        up_bias=bias,
        down_bias=bias,
    )


def _opt_shape(config: Any) -> FFNShape:
    return FFNShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_dim,
        activation=config.activation_function,
        up_bias=config.enable_bias,
        down_bias=config.enable_bias,
    )


def _distilbert_shape(config: Any) -> FFNShape:
    return FFNShape(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        activation=config.activation,
        dropout=config.dropout,
    )


for _row in (
    # GPT-2 and DistilGPT2
    Family(model_type="gpt2", blocks="h", place="mlp", shape=_gpt2_shape, read=_read_conv1d),
    Family(
        model_type="gpt_neox",
        blocks="layers",
        place="mlp",
        shape=_plain_shape,
        read=lambda block: _two_linears(block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h),
    ),
    # OPT calls its two projections and the activation in the block itself, and its head goes past the base model.
    Family(
        model_type="opt",
        blocks="decoder.layers",
        place="fc1",
        passed=("activation_fn", "fc2"),
        entry="decoder",
        shape=_opt_shape,
        read=lambda block: _two_linears(block.fc1, block.fc2),
    ),
    # BERT's output projection sits beside the dropout, norm and residual that stay.
    *(
        Family(
            model_type=name,
            blocks="encoder.layer",
            place="intermediate",
            passed=("output.dense",),
            shape=_plain_shape,
            read=lambda block: _two_linears(block.intermediate.dense, block.output.dense),
        )
        for name in ("bert", "roberta")
    ),
    Family(
        model_type="distilbert",
        blocks="transformer.layer",
        place="ffn",
        shape=_distilbert_shape,
        read=lambda block: _two_linears(block.ffn.lin1, block.ffn.lin2),
    ),
    *(
        Family(model_type=name, blocks="layers", place="mlp", shape=_gated_shape, read=_read_gated)
        for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")
    ),
    Family(
        model_type="phi",
        blocks="layers",
        place="mlp",
        shape=_plain_shape,
        read=lambda block: _two_linears(block.mlp.fc1, block.mlp.fc2),
    ),
):
    add_family(_row)


def family_of(model: nn.Module) -> Family:
    """Return the row for ``model``.

    Raises:
        ConversionError: no row for its `config.model_type`, or it is an MoE already.
    """
    model_type = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith("thermoe_"):
        raise ConversionError(
            "the model is a Mixture-of-Experts already",
            where=f"config.model_type = {model_type!r}",
            accepted="a dense model",
            fix="to change its routers use thermoe.set_router(model, name)",
        )
    near = near_match(model_type, FAMILIES)
    raise ConversionError(
        f"no feed-forward network to convert is known for the architecture {model_type!r}",
        where=f"config.model_type of {type(model).__name__}",
        accepted=", ".join(sorted(FAMILIES)),
        fix=(f"did you mean a {near!r} model? If not, " if near else "")
        + "describe it with thermoe.models.families.add_family(Family(model_type=..., blocks=..., place=..., "
        "shape=..., read=...)); the rows of that file show how",
    )
