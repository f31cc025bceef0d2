"""Dense to Mixture-of-Experts, exact at the start.

- `partition` (MoEfication, arXiv 2110.01786; D2DMoE, arXiv 2310.04361): the F neurons of a feed-forward network are
  divided among E experts. A dense output is the sum of all experts' outputs, so that k = E with unit weights is the
  dense model; fewer experts save compute and lose some of it, which recovery training wins back.
- `copy` (upcycling, arXiv 2212.05055): E copies of the whole network with renormalised weights: exact for every router
  and every k, and k times the compute.

The output bias stays outside the experts and is added once per token; inside, k experts would add it k times.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from thermoe.errors import ConversionError, UnknownNameError
from thermoe.models.families import FFNWeights, family_of
from thermoe.models.gpt2 import MoEGPT2LMHeadModel
from thermoe.models.gpt2_config import MoEGPT2Config
from thermoe.moe.layer import MoELayer
from thermoe.routers.base import Gate

Method = Literal["partition", "copy"]
METHODS: tuple[Method, ...] = ("partition", "copy")


def _chosen_blocks(count: int, layers: Iterable[int] | None) -> list[int]:
    chosen = list(range(count)) if layers is None else sorted({int(i) for i in layers})
    if not chosen or any(not 0 <= i < count for i in chosen):
        raise ConversionError(
            f"layers {chosen} of a model with {count} blocks",
            where="layers",
            accepted=f"at least one position from 0 to {count - 1}",
            fix="name blocks the model has, or leave layers out to convert all",
        )
    return chosen


def _expert_width(ffn_width: int, num_experts: int, method: Method) -> int:
    if num_experts < 1:
        raise ConversionError(
            f"num_experts is {num_experts}",
            where="num_experts",
            accepted="an integer of at least 1",
            fix="leave it out for the default of 8",
        )
    if method == "copy":
        return ffn_width
    if ffn_width % num_experts:
        near = [n for n in range(2, min(ffn_width, 129)) if ffn_width % n == 0]
        raise ConversionError(
            f"{num_experts} experts do not divide the {ffn_width} neurons of the feed-forward network",
            where="num_experts",
            accepted=", ".join(map(str, near)) or "1",
            fix=f"use num_experts={min(near, key=lambda n: abs(n - num_experts))}" if near else "use method='copy'",
        )
    return ffn_width // num_experts


@torch.no_grad()
def _fill_experts(layer: MoELayer, ffn: FFNWeights, method: Method) -> None:
    """Write the dense weights into the experts: shards of neurons, or E copies."""
    experts = layer.experts
    count, width = experts.num_experts, experts.intermediate_size
    if method == "partition":
        experts.up_weight.copy_(ffn.up.reshape(count, width, -1))
        experts.down_proj.copy_(ffn.down.reshape(-1, count, width).transpose(0, 1))
    else:
        experts.up_weight.copy_(ffn.up.expand_as(experts.up_weight))
        experts.down_proj.copy_(ffn.down.expand_as(experts.down_proj))
    if experts.up_bias is not None:
        assert ffn.up_bias is not None
        experts.up_bias.copy_(ffn.up_bias.reshape(count, width) if method == "partition" else ffn.up_bias)
    if layer.output_bias is not None:
        assert ffn.down_bias is not None
        layer.output_bias.copy_(ffn.down_bias)


@torch.no_grad()
def convert_to_moe(
    model: nn.Module,
    *,
    num_experts: int = 8,
    top_k: int | None = None,
    method: Method = "partition",
    layers: Iterable[int] | None = None,
    gate: Gate | None = None,
    router: str = "topk",
    **router_options: Any,
) -> MoEGPT2LMHeadModel:
    """Convert a dense model; the given model stays as it is.

    Args:
        model: a Hugging Face causal language model of a known architecture.
        num_experts: E per converted layer.
        top_k: experts per token; ``None`` is half of E for "partition" and 1 for "copy".
        method: "partition" or "copy"; see the module's text.
        layers: positions of the blocks to convert; ``None`` is all.
        gate: how combine weights are formed; ``None`` is "ramped" for "partition" and "renormalized" for "copy", with
            which the conversion is exact at the start.
        router: a registered router name.
        router_options: passed to the router.

    Returns:
        A new model in the dtype, device and training mode of the given one.

    Raises:
        ConversionError: unknown architecture, no causal language model, an expert count that does not divide the
            network, no such layer, or a top_k outside 1..E.
        UnknownNameError: unknown method or router.
    """
    if method not in METHODS:
        raise UnknownNameError.of("conversion method", str(method), METHODS, where="method")
    family = family_of(model)
    if not isinstance(model, GPT2LMHeadModel):  # a trunk or another head would lose parts on the way
        raise ConversionError(
            f"{type(model).__name__} is no causal language model",
            where="model",
            accepted="GPT2LMHeadModel",
            fix="load it with transformers.AutoModelForCausalLM",
        )
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    chosen = _chosen_blocks(len(blocks), layers)
    dense_config: Any = model.config
    weights = {i: family.read(getattr(blocks[i], family.ffn), dense_config) for i in chosen}
    ffn_width = weights[chosen[0]].up.shape[0]
    width = _expert_width(ffn_width, num_experts, method)
    top_k = (max(1, num_experts // 2) if method == "partition" else 1) if top_k is None else top_k
    if not 1 <= top_k <= num_experts:
        raise ConversionError(
            f"top_k is {top_k} with {num_experts} experts",
            where="top_k",
            accepted=f"an integer from 1 to {num_experts}",
            fix="lower top_k or raise num_experts",
        )
    gate = gate or ("ramped" if method == "partition" else "renormalized")
    entry = {"name": router, "top_k": top_k, "options": {"gate": gate, **router_options}}
    fields = {key: value for key, value in dense_config.to_dict().items() if key not in ("model_type", "architectures")}
    config = MoEGPT2Config(
        **fields,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        expert_intermediate_size=width,
        moe_layers=chosen,
        routers={str(i): entry for i in chosen},
    )
    converted = MoEGPT2LMHeadModel(config).to(dtype=model.dtype, device=model.device)
    state = {name: value for name, value in model.state_dict().items() if name in converted.state_dict()}
    converted.load_state_dict(state, strict=False)
    for i, ffn in weights.items():
        layer = converted.transformer.h[i].mlp
        assert isinstance(layer, MoELayer)
        _fill_experts(layer, ffn, method)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted.train(model.training)
