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
from torch import Tensor, nn
from transformers import PreTrainedModel

from thermoe.errors import ConversionError, UnknownNameError
from thermoe.models.classes import base_model_of, build_layer, moe_config_class, moe_model_class, place_layer
from thermoe.models.families import FFNWeights, family_of
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

    def spread(rows: Tensor) -> Tensor:  # (F, ...) -> (E, F of one expert, ...)
        return rows.reshape(count, width, *rows.shape[1:]) if method == "partition" else rows.expand(count, *rows.shape)

    up, bias = spread(ffn.up), None if ffn.up_bias is None else spread(ffn.up_bias)
    if ffn.gate is not None:
        up = torch.cat([spread(ffn.gate), up], dim=1)
        if bias is not None:
            assert ffn.gate_bias is not None
            bias = torch.cat([spread(ffn.gate_bias), bias], dim=1)
    experts.up_weight.copy_(up)
    experts.down_proj.copy_(spread(ffn.down.T).transpose(1, 2))
    if experts.up_bias is not None:
        assert bias is not None
        experts.up_bias.copy_(bias)
    if layer.output_bias is not None:
        assert ffn.down_bias is not None
        layer.output_bias.copy_(ffn.down_bias)


@torch.no_grad()
def convert_to_moe(
    model: PreTrainedModel,
    *,
    num_experts: int = 8,
    top_k: int | None = None,
    method: Method = "partition",
    layers: Iterable[int] | None = None,
    gate: Gate | None = None,
    router: str = "topk",
    **router_options: Any,
) -> PreTrainedModel:
    """Convert a dense model; the given model stays as it is.

    Args:
        model: a Hugging Face model of a known architecture, with any head or none.
        num_experts: E per converted layer.
        top_k: experts per token; ``None`` is half of E for "partition" and 1 for "copy".
        method: "partition" or "copy"; see the module's text.
        layers: positions of the blocks to convert; ``None`` is all.
        gate: how combine weights are formed; ``None`` is "ramped" for "partition" and "renormalized" for "copy", with
            which the conversion is exact at the start.
        router: a registered router name.
        router_options: passed to the router.

    Returns:
        A new model, `MoE` + the class of the given one, in its dtype, device and training mode.

    Raises:
        ConversionError: unknown architecture, quantised weights, an expert count that does not divide the network, no
            such layer, or a top_k outside 1..E.
        UnknownNameError: unknown method or router.
    """
    if method not in METHODS:
        raise UnknownNameError.of("conversion method", str(method), METHODS, where="method")
    family = family_of(model)
    _check_model(model)
    base = base_model_of(model)
    blocks = base.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    chosen = _chosen_blocks(len(blocks), layers)
    dense_config: Any = model.config
    config_class: Any = type(dense_config)
    width = _expert_width(family.shape(dense_config).intermediate_size, num_experts, method)
    top_k = (max(1, num_experts // 2) if method == "partition" else 1) if top_k is None else top_k
    if not 1 <= top_k <= num_experts:
        raise ConversionError(
            f"top_k is {top_k} with {num_experts} experts",
            where="top_k",
            accepted=f"an integer from 1 to {num_experts}",
            fix="lower top_k or raise the number of experts",
        )
    gate = gate or ("ramped" if method == "partition" else "renormalized")
    entry = {"name": router, "top_k": top_k, "options": {"gate": gate, **router_options}}
    fields = {key: value for key, value in dense_config.to_dict().items() if key not in ("model_type", "architectures")}
    config = moe_config_class(config_class)(
        **fields,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        expert_intermediate_size=width,
        moe_layers=chosen,
        routers={str(i): entry for i in chosen},
    )
    config._attn_implementation = dense_config._attn_implementation
    filled: dict[int, MoELayer] = {}
    for i in chosen:
        layer = build_layer(config, i).to(dtype=model.dtype, device=next(blocks[i].parameters()).device)
        _fill_experts(layer, family.read(blocks[i]), method)
        filled[i] = layer
    converted = copy.deepcopy(model)
    for i, layer in filled.items():
        place_layer(base_model_of(converted), family, i, layer)
    for module in converted.modules():  # every part holds the configuration of the whole
        if getattr(module, "config", None) is converted.config and module is not converted:
            module.config = config
    converted.config = config
    model_class: Any = type(model)
    converted.__class__ = moe_model_class(model_class)
    converted.watch_padding()
    return converted.train(model.training)


def _check_model(model: Any) -> None:
    """Refuse what cannot be split."""
    if not isinstance(model, PreTrainedModel) or type(model).config_class is not type(model.config):
        raise ConversionError(
            f"{type(model).__name__} is no model class of transformers for this architecture",
            where="model",
            accepted="a model loaded with from_pretrained or an Auto class",
            fix="load it with transformers.AutoModelForCausalLM, AutoModel or the class of its head",
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        kind = getattr(getattr(model.config, "quantization_config", None), "quant_method", "unknown method")
        raise ConversionError(
            f"the weights are quantised ({kind}) and cannot be divided among experts",
            where="model",
            accepted="float32, bfloat16 or float16 weights",
            fix="load the model without quantization_config, convert it, and quantise the result",
        )
