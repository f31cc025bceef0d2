"""One GPT-2 frame with three kinds of feed-forward block, so that a comparison of trainings compares the block alone.

`moe` is our layer, `mixtral` the `MixtralSparseMoeBlock` of transformers with its own router, experts and auxiliary
loss, `dense` GPT-2's own network made as wide as the experts that one token uses. Attention, embeddings, norms and
initialisation are the same; dropout is 0 everywhere. The weights of `moe` and `mixtral` have the same layout, so that
both can start from the same numbers (`copy_frame_weights`).

Where the two differ: in float32 they compute the same function (softmax over all experts, top-k, renormalised). Under
bfloat16 autocast Mixtral's router multiplies in bfloat16 and takes a float32 softmax of that; ours multiplies in
float32. Mixtral's auxiliary loss sums over the k slots and pools all layers before it multiplies load and probability;
our `switch` is computed per layer and summed, and is 1 at balance for every k and layer, so that a coefficient a of
`switch` corresponds to a * L / k of Mixtral's.

Shape letters: E experts, D model width, F expert width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
    load_balancing_loss_func,
)

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.models.classes import MoEGPT2Config, MoEGPT2LMHeadModel
from thermoe.moe.layer import MoELayer

Block = Literal["moe", "dense", "mixtral"]
BLOCKS: tuple[Block, ...] = ("moe", "dense", "mixtral")
#: Names of the same weight in the two MoE blocks: (ours, Mixtral's).
SAME_WEIGHT = (
    ("router.weight", "gate.weight"),
    ("experts.gate_up_proj", "experts.gate_up_proj"),
    ("experts.down_proj", "experts.down_proj"),
)


class _RecordedRouter(MixtralTopKRouter):
    """Mixtral's router; what it answered last is kept for the auxiliary loss and for statistics."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.last_logits: Tensor | None = None
        self.last_index: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route as Mixtral does: logits (T, E), weights (T, K), ids (T, K)."""
        logits, weights, index = super().forward(hidden_states)
        self.last_logits, self.last_index = logits, index
        return logits, weights, index


class MixtralBlockGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 whose feed-forward blocks are transformers' `MixtralSparseMoeBlock`.

    Args:
        config: a `GPT2Config` that also holds `num_local_experts`, `num_experts_per_tok`, `expert_intermediate_size`
            and `native_experts`, the experts implementation of transformers.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        block_config = MixtralConfig(
            hidden_size=config.n_embd,
            intermediate_size=config.expert_intermediate_size,
            num_local_experts=config.num_local_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            hidden_act="silu",
            router_jitter_noise=0.0,
            experts_implementation=config.native_experts,
        )
        for block in self.transformer.h:
            sparse = MixtralSparseMoeBlock(block_config)
            sparse.gate = _RecordedRouter(block_config)
            for weight in (sparse.gate.weight, sparse.experts.gate_up_proj, sparse.experts.down_proj):
                init.normal_(weight, std=config.initializer_range)  # here, for GPT2Model initialises what it knows
            block.mlp = sparse


def dense_width_of(top_k: int, expert_width: int, *, gated: bool = True) -> int:
    """Return the width of an ungated dense network with the matrix weights that one token uses in an MoE layer.

    A SwiGLU expert has three matrices of D x F, GPT-2's network two, so the width is k * F * 3 / 2. The router (E x D)
    and the biases of the dense network (width + D) are outside of the count; at D = 768, k = 4 and F = 768 they are
    0.3 % and 0.08 % of it.

    Raises:
        ConfigError: the width is not an integer.
    """
    matrices = 3 if gated else 2
    width, rest = divmod(top_k * expert_width * matrices, 2)
    if rest:
        raise ConfigError(
            f"{top_k} gated experts of width {expert_width} equal a dense network of width {width}.5",
            where="expert_width",
            accepted="top_k * expert_width even, so that the active parameters can be equal",
            fix="change expert_width by one, or give dense_width and accept another number of parameters",
        )
    return width


def build_frame(
    block: Block,
    *,
    vocab_size: int,
    sequence_length: int,
    hidden_size: int = 768,
    layers: int = 6,
    heads: int = 12,
    num_experts: int = 32,
    top_k: int = 4,
    expert_width: int = 768,
    gated: bool = True,
    router: str = "topk",
    router_options: Mapping[str, Any] | None = None,
    dense_width: int | None = None,
    native_experts: str = "grouped_mm",
    seed: int = 0,
) -> PreTrainedModel:
    """Return a freshly initialised GPT-2 language model with the given kind of feed-forward block.

    Args:
        block: "moe" (ours), "dense" (GPT-2's own) or "mixtral" (transformers' own MoE block).
        vocab_size: tokens.
        sequence_length: most positions.
        hidden_size: D.
        layers: L.
        heads: attention heads.
        num_experts: E.
        top_k: experts per token, K.
        expert_width: F of one expert.
        gated: SwiGLU experts without biases (as Mixtral's), or ungated ones with GPT-2's up-bias.
        router: of `moe`: a registered name.
        router_options: of `moe`: its options.
        dense_width: of `dense`: its width; that of equal active parameters when ``None``.
        native_experts: of `mixtral`: how transformers computes its experts; "grouped_mm" is its own default with the
            versions of PyTorch supported here, "eager" its reference.
        seed: of the initial weights; the global generator is left as it was.

    Raises:
        UnknownNameError: no such block or router.
        ConfigError: sizes that do not fit, or an option that the block cannot honour.
    """
    if block not in BLOCKS:
        raise UnknownNameError.of("block", str(block), BLOCKS, where="block")
    if native_experts not in (known := ("eager", *ALL_EXPERTS_FUNCTIONS)):
        raise UnknownNameError.of("experts implementation", native_experts, known, where="native_experts")
    if hidden_size % heads:
        raise ConfigError(
            f"hidden_size {hidden_size} cannot be divided among {heads} heads",
            where="heads",
            accepted="a divisor of hidden_size",
            fix="change heads or hidden_size",
        )
    if block == "mixtral" and (not gated or router != "topk" or router_options):
        raise ConfigError(
            f"gated={gated}, router={router!r}, router_options={router_options!r} with transformers' block",
            where="block='mixtral'",
            accepted="gated experts and the router that Mixtral brings",
            fix="leave gated, router and router_options out, or use block='moe'",
        )
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "n_positions": sequence_length,
        "n_embd": hidden_size,
        "n_layer": layers,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if block == "dense":
            width = dense_width_of(top_k, expert_width, gated=gated) if dense_width is None else dense_width
            return GPT2LMHeadModel(GPT2Config(**shape, n_inner=width))
        if block == "mixtral":
            config = GPT2Config(
                **shape,
                num_local_experts=num_experts,
                num_experts_per_tok=top_k,
                expert_intermediate_size=expert_width,
                native_experts=native_experts,
            )
            return MixtralBlockGPT2LMHeadModel(config)
        entry = {"name": router, "top_k": top_k, "options": dict(router_options or {})}
        return MoEGPT2LMHeadModel(
            MoEGPT2Config(
                **shape,
                num_experts=num_experts,
                num_experts_per_tok=top_k,
                expert_intermediate_size=expert_width,
                gated_experts=gated,
                expert_bias=False,
                layer_bias=False,
                routers={str(i): dict(entry) for i in range(layers)},
            )
        )


def block_of(model: nn.Module) -> Block:
    """Return which kind of block a frame has.

    Raises:
        ConfigError: the model is no frame.
    """
    blocks = getattr(getattr(model, "transformer", None), "h", None)
    if isinstance(model, PreTrainedModel) and blocks is not None and len(blocks):
        if isinstance(model, MixtralBlockGPT2LMHeadModel):
            return "mixtral"
        return "moe" if isinstance(blocks[0].mlp, MoELayer) else "dense"
    raise ConfigError(
        f"{type(model).__name__} is no GPT-2 frame",
        where="model",
        accepted="a model of build_frame",
        fix="build it with thermoe.models.frame.build_frame",
    )


@torch.no_grad()
def copy_frame_weights(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the weights of ``source``.

    Between `moe` and `mixtral`, either way, everything is copied, and what only one of them has (a balancing bias, the
    gate's ramp) stays as it is. Between an MoE and `dense` the frame is copied and the feed-forward networks are left.

    Raises:
        ConfigError: a model is no frame, or the shapes differ; nothing is copied then.
    """
    kinds = block_of(source), block_of(target)
    given, wanted = dict(source.named_parameters()), dict(target.named_parameters())
    pairs = {name: name for name in wanted if ".mlp." not in name or kinds[0] == kinds[1]}
    if "dense" not in kinds and kinds[0] != kinds[1]:
        layers = len(target.transformer.h)  # type: ignore[union-attr,arg-type]
        for ours, theirs in SAME_WEIGHT:
            for i in range(layers):
                ends = (f"transformer.h.{i}.mlp.{ours}", f"transformer.h.{i}.mlp.{theirs}")
                pairs[ends[kinds[1] == "mixtral"]] = ends[kinds[0] == "mixtral"]
    bad = [
        name
        for name, origin in pairs.items()
        if name not in wanted or origin not in given or wanted[name].shape != given[origin].shape
    ]
    if bad:
        raise ConfigError(
            f"the weight {bad[0]} differs in shape or is missing ({len(bad)} of {len(pairs)} weights)",
            where="copy_frame_weights",
            accepted="two frames of the same sizes; gated experts between moe and mixtral",
            fix="build both with the same arguments but for block",
        )
    for name, origin in pairs.items():
        wanted[name].copy_(given[origin])


def native_routers(model: nn.Module) -> Iterator[_RecordedRouter]:
    """Yield Mixtral's routers in the order of the layers; each has `last_logits` (T, E) and `last_index` (T, K)."""
    for module in model.modules():
        if isinstance(module, _RecordedRouter):
            yield module


def native_aux_loss(model: nn.Module) -> Tensor:
    """Return transformers' `load_balancing_loss_func` of the last forward of a `mixtral` frame: K at balance.

    Raises:
        ConfigError: the model has no block of Mixtral, or has not run yet.
    """
    routers = list(native_routers(model))
    logits = tuple(router.last_logits for router in routers if router.last_logits is not None)
    if not routers or len(logits) < len(routers):
        raise ConfigError(
            f"{len(logits)} of {len(routers)} routers of {type(model).__name__} have logits",
            where="native_aux_loss",
            accepted="a frame with block='mixtral' after a forward",
            fix="run the model first; for our layers use thermoe.moe.losses.routing_loss",
        )
    loss: Tensor = load_balancing_loss_func(logits, routers[0].num_experts, routers[0].top_k)
    return loss
