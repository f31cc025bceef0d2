"""Dense to Mixture-of-Experts, exact at the start.

- `partition` (MoEfication, arXiv 2110.01786; D2DMoE, arXiv 2310.04361): the F neurons of a feed-forward network are
  divided among E experts. A dense output is the sum of all experts' outputs, so that k = E with unit weights is the
  dense model; fewer experts save compute and lose some of it, which recovery training wins back. With `widths` the
  experts differ in size, and so in what they cost.
- `copy` (upcycling, arXiv 2212.05055): E copies of the whole network with renormalised weights: exact for every router
  and every k, and k times the compute. Noise or a partial re-initialisation (drop-upcycling, arXiv 2502.19261) make the
  copies differ, at the price of exactness.
- `virtual` (arXiv 2410.07524): the network is divided into G shards, each in R = E / G copies. The router chooses k / G
  copies first and then takes all G shards of each, so that the start is exact for every k that is a multiple of G; the
  weights of k experts add up to 1 while a dense output is the sum of G shards, so the output projection is scaled by G.

The output bias stays outside the experts and is added once per token; inside, k experts would add it k times.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thermoe.errors import ConversionError, UnknownNameError
from thermoe.models.classes import base_model_of, build_layer, moe_config_class, moe_model_class, place_layer
from thermoe.models.families import Family, FFNShape, FFNWeights, family_of
from thermoe.models.neurons import Grouping, check_widths, divide_neurons, largest_neurons, order_neurons
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer
from thermoe.routers.base import Gate, Router

Method = Literal["partition", "copy", "virtual"]
METHODS: tuple[Method, ...] = ("partition", "copy", "virtual")


def _whole(name: str, value: Any) -> int:
    """Return ``value`` if it is an integer."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**48:
        raise ConversionError(
            f"{name} is {value!r}",
            where=name,
            accepted="an integer below 2**48",
            fix=f"write {name}=8, without quotes or a fraction",
        )
    return value


def _chosen_blocks(count: int, layers: Iterable[int] | None) -> list[int]:
    given: Any = range(count) if layers is None else layers
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    chosen = sorted(set(listed), key=str)
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count for i in chosen):
        raise ConversionError(
            f"layers {chosen} of a model with {count} blocks",
            where="layers",
            accepted=f"at least one position from 0 to {count - 1}",
            fix="name blocks the model has as a list of integers, or leave layers out to convert all",
        )
    return sorted(chosen)


def _shards(ffn_width: int, num_experts: int, method: Method, groups: int | None, shared: int, widths: Any) -> int:
    """Return into how many shards the network is divided, after checking that it can be."""
    if num_experts < 1:
        raise ConversionError(
            f"num_experts is {num_experts}",
            where="num_experts",
            accepted="an integer of at least 1",
            fix="leave it out for the default of 8",
        )
    if groups is not None and method != "virtual":
        raise ConversionError(
            f"groups is {groups} with method {method!r}",
            where="groups",
            accepted="None, or method='virtual'",
            fix="leave groups out",
        )
    if shared and method != "partition":
        raise ConversionError(
            f"shared_size is {shared} with method {method!r}",
            where="shared_size",
            accepted="0, or method='partition'",
            fix="leave shared_size out",
        )
    if widths is not None and method != "partition":
        raise ConversionError(
            f"widths are given with method {method!r}",
            where="widths",
            accepted="None, or method='partition'",
            fix="leave widths out",
        )
    if not 0 <= shared < ffn_width:
        raise ConversionError(
            f"shared_size is {shared} of {ffn_width} neurons",
            where="shared_size",
            accepted=f"an integer from 0 to {ffn_width - 1}",
            fix="leave some neurons to the experts",
        )
    if method == "copy":
        return 1
    shards = num_experts if method == "partition" else (2 if groups is None else groups)
    if method == "virtual" and (shards < 1 or num_experts % shards):
        raise ConversionError(
            f"{num_experts} experts cannot be {shards} shards in equal numbers of copies",
            where="groups",
            accepted=f"a divisor of {num_experts}",
            fix="choose groups so that num_experts is a multiple of it",
        )
    if widths is None and (ffn_width - shared) % shards:
        near = [n for n in range(2, min(ffn_width, 129)) if (ffn_width - shared) % n == 0]
        name = "num_experts" if method == "partition" else "groups"
        what = "experts" if method == "partition" else "shards"
        raise ConversionError(
            f"{shards} {what} do not divide the {ffn_width - shared} neurons of the feed-forward network",
            where=name,
            accepted=", ".join(map(str, near)) or "1",
            fix=f"use {name}={min(near, key=lambda n: abs(n - shards))}" if near else "use method='copy'",
        )
    return shards


@torch.no_grad()
def _fill(experts: Experts, ffn: FFNWeights, neurons: Tensor, scale: float = 1.0) -> None:
    """Give each block (an expert, where all are alike) its neurons (G, F); ``scale`` is on the output projection."""
    up, bias = ffn.up[neurons], None if ffn.up_bias is None else ffn.up_bias[neurons]
    if ffn.gate is not None:
        up = torch.cat([ffn.gate[neurons], up], dim=1)
        if bias is not None:
            assert ffn.gate_bias is not None
            bias = torch.cat([ffn.gate_bias[neurons], bias], dim=1)
    experts.up_weight.copy_(up)
    experts.down_proj.copy_(scale * ffn.down.T[neurons].transpose(1, 2))
    if experts.up_bias is not None:
        assert bias is not None
        experts.up_bias.copy_(bias)


@torch.no_grad()
def _diversify(experts: Experts, noise: float, reinit_frac: float, seed: int) -> None:
    """Make copies differ: noise relative to each weight's spread, and a share of neurons drawn anew per expert."""
    generator = torch.Generator().manual_seed(seed)
    for weight, neuron_dim in ((experts.up_weight, 1), (experts.down_proj, 2)):
        std, mean = weight.float().std(), weight.float().mean()
        fresh = torch.randn(weight.shape, generator=generator).to(weight.device)
        if noise:
            weight.add_((noise * std * fresh).to(weight.dtype))
        if reinit_frac:
            shape = [weight.shape[0], 1, 1]
            shape[neuron_dim] = weight.shape[neuron_dim]
            # The same neurons on both sides: the choice is drawn from a generator of its own.
            chosen = torch.rand(weight.shape[0], experts.intermediate_size, generator=_again(seed)) < reinit_frac
            if weight.shape[neuron_dim] != experts.intermediate_size:  # gate and up rows of one neuron go together
                chosen = torch.cat([chosen, chosen], dim=1)
            weight.copy_(torch.where(chosen.view(shape).to(weight.device), mean + std * fresh, weight))


def _again(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + 1)


@torch.no_grad()
def _fill_layer(layer: MoELayer, ffn: FFNWeights, method: Method, shards: int, grouping: Grouping, seed: int) -> None:
    """Write the dense weights into a layer."""
    experts = layer.experts
    everything = torch.arange(ffn.up.shape[0], device=ffn.up.device)
    if layer.shared is not None:
        always, everything = largest_neurons(ffn, layer.shared.intermediate_size)
        _fill(layer.shared, ffn, always.unsqueeze(0))
    if experts.blocks is not None:
        ordered = order_neurons(ffn, everything, experts.widths, grouping, seed=seed)
        _fill(experts, ffn, ordered.view(experts.num_blocks, -1))
    else:
        parts = divide_neurons(ffn, everything, shards, grouping, seed=seed).repeat(experts.num_experts // shards, 1)
        _fill(experts, ffn, parts, scale=shards if method == "virtual" else 1.0)
    if method == "virtual":
        router = layer.router
        assert isinstance(router, Router)
        rows = router.weight.view(-1, shards, router.hidden_size)
        router.weight.copy_(rows[:, :1].expand_as(rows).reshape_as(router.weight))
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
    neurons: Grouping = "contiguous",
    shared_size: int = 0,
    widths: Sequence[int] | None = None,
    groups: int | None = None,
    noise: float = 0.0,
    reinit_frac: float = 0.0,
    seed: int = 0,
    gate: Gate | None = None,
    router: str = "topk",
    **router_options: Any,
) -> PreTrainedModel:
    """Convert a dense model; the given model stays as it is.

    Args:
        model: a Hugging Face model of a known architecture, with any head or none.
        num_experts: E per converted layer.
        top_k: experts per token; ``None`` is half of E for "partition", 1 for "copy" and the number of shards for
            "virtual".
        method: "partition", "copy" or "virtual"; see the module's text.
        layers: positions of the blocks to convert; ``None`` is all.
        neurons: "contiguous" or "clustered": how neurons are divided into shards.
        shared_size: neurons of an always-on part beside the experts ("partition").
        widths: neurons of each of the E experts ("partition"), which add up to the network's less ``shared_size``, such
            as ``[1024, 512, 512, 256, 256, 256, 128, 128]``; ``None`` is equal shares. Experts are kept in blocks of
            their greatest common divisor, at most 1023 of them; multiples of 64 or more suit a GPU.
        groups: shards of "virtual"; 2 when ``None``.
        noise: standard deviation of noise on the experts' weights, relative to theirs ("copy", "virtual").
        reinit_frac: share of each expert's neurons drawn anew ("copy", "virtual").
        seed: of clusters, noise and re-initialisation.
        gate: how combine weights are formed; ``None`` is "ramped" for "partition" and "renormalized" otherwise, with
            which the conversion is exact at the start.
        router: a registered router name.
        router_options: passed to the router.

    Returns:
        A new model, `MoE` + the class of the given one, in its dtype, device and training mode.

    Raises:
        ConversionError: unknown architecture, quantised weights, an expert count that does not divide the network or
            widths that do not add up to it, no such layer, or a top_k outside 1..E.
        UnknownNameError: unknown method or router.
    """
    if method not in METHODS:
        raise UnknownNameError.of("conversion method", str(method), METHODS, where="method")
    family = family_of(model)
    _check_model(model)
    num_experts, shared_size = _whole("num_experts", num_experts), _whole("shared_size", shared_size)
    top_k = None if top_k is None else _whole("top_k", top_k)
    groups = None if groups is None else _whole("groups", groups)
    seed = _whole("seed", seed)
    base = base_model_of(model)
    blocks = base.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    chosen = _chosen_blocks(len(blocks), layers)
    dense_config: Any = model.config
    _check_blocks(blocks, chosen, family, dense_config)
    config_class: Any = type(dense_config)
    ffn_width = family.shape(dense_config).intermediate_size
    shards = _shards(ffn_width, num_experts, method, groups, shared_size, widths)
    unequal = check_widths(widths, num_experts, ffn_width, shared_size)
    if top_k is None:
        top_k = max(1, num_experts // 2) if method == "partition" else shards
    _check_numbers(num_experts, top_k, method, shards, noise, reinit_frac)
    gate = gate or ("ramped" if method == "partition" else "renormalized")
    options = {"gate": gate, **({"group_size": shards} if method == "virtual" else {}), **router_options}
    entry = {"name": router, "top_k": top_k, "options": options}
    fields = {key: value for key, value in dense_config.to_dict().items() if key not in ("model_type", "architectures")}
    config = moe_config_class(config_class)(
        **fields,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        expert_intermediate_size=None if unequal else (ffn_width - shared_size) // shards,
        expert_widths=unequal,
        shared_intermediate_size=shared_size,
        moe_layers=chosen,
        conversion_method=method,
        routers={str(i): entry for i in chosen},
    )
    config._attn_implementation = dense_config._attn_implementation
    filled: dict[int, MoELayer] = {}
    for i in chosen:
        layer = build_layer(config, i).to(dtype=model.dtype, device=next(blocks[i].parameters()).device)
        _fill_layer(layer, family.read(blocks[i]), method, shards, neurons, seed)
        if noise or reinit_frac:
            _diversify(layer.experts, noise, reinit_frac, seed + 1000 * i)
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


def _check_numbers(num_experts: int, top_k: int, method: Method, shards: int, noise: float, reinit_frac: float) -> None:
    if not 1 <= top_k <= num_experts:
        raise ConversionError(
            f"top_k is {top_k} with {num_experts} experts",
            where="top_k",
            accepted=f"an integer from 1 to {num_experts}",
            fix="lower top_k or raise the number of experts",
        )
    if method == "virtual" and top_k % shards:
        raise ConversionError(
            f"top_k is {top_k} with {shards} shards",
            where="top_k",
            accepted=f"a multiple of {shards}, so that every chosen copy has all its shards",
            fix=f"use top_k={max(shards, top_k // shards * shards)}, or other groups",
        )
    for name, value, most in (("noise", noise, float("inf")), ("reinit_frac", reinit_frac, 1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ConversionError(
                f"{name} is {value!r}",
                where=name,
                accepted="a number of at least 0" if most > 1 else "0 to 1",
                fix=f"leave {name} out for 0",
            )
        if value and method == "partition":
            raise ConversionError(
                f"{name} is {value} with method 'partition'",
                where=name,
                accepted="0, or method='copy' or 'virtual'",
                fix="the experts of a partition differ already",
            )


def _check_model(model: Any) -> None:
    """Refuse what cannot be split."""
    if not isinstance(model, PreTrainedModel) or type(model).config_class is not type(model.config):
        raise ConversionError(
            f"{type(model).__name__} is no model class of transformers for this architecture",
            where="model",
            accepted="a model loaded with from_pretrained or an Auto class",
            fix="load it with transformers.AutoModelForCausalLM, AutoModel or the class of its head",
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ConversionError(
            "weights of the model are offloaded or not loaded (they are on the meta device), and cannot be divided",
            where="model",
            accepted="a model whose weights are all in memory",
            fix="load it without device_map, convert it and save it; the result may be loaded with any device_map",
        )
    said = getattr(model.config, "quantization_config", None)
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None or said:
        said = said if isinstance(said, dict) else vars(said or object)
        kind = said.get("quant_method", "unknown method")
        raise ConversionError(
            f"the weights are quantised ({kind}) and cannot be divided among experts",
            where="model",
            accepted="float32, bfloat16 or float16 weights",
            fix="load the model without quantization_config, convert it, and quantise the result",
        )


def _check_blocks(blocks: nn.ModuleList, chosen: list[int], family: Family, config: Any) -> None:
    """Refuse feed-forward networks that are not what the configuration and the family's row say."""
    if len(blocks) != config.num_hidden_layers:
        raise ConversionError(
            f"the model has {len(blocks)} blocks, its configuration says {config.num_hidden_layers}",
            where="config.num_hidden_layers",
            accepted="a model that its configuration describes, or the result could not be loaded again",
            fix="correct the configuration: model.config.num_hidden_layers = len(...)",
        )
    shape = family.shape(config)
    for i in chosen:
        why = _why_unfit(blocks[i], family, shape)
        if why:
            raise ConversionError(
                f"the feed-forward network of block {i} {why}",
                where=f"{family.blocks}.{i}.{family.place}",
                accepted=f"the plain network of {family.model_type}: {shape.intermediate_size} neurons of width "
                f"{shape.hidden_size} as config.json says, in float64, float32, bfloat16 or float16, without adapters",
                fix="merge adapters (merge_and_unload), undo quantisation, or leave this block out with layers=[...]",
            )


def _why_unfit(block: nn.Module, family: Family, shape: FFNShape) -> str | None:
    wide, narrow = (shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)
    try:
        ffn = family.read(block)
        replaced = [block.get_submodule(path) for path in (family.place, *family.passed)]
    except AttributeError as error:
        return f"is not the one that is known: {error}"
    for name, weight, expected in (("gate", ffn.gate, wide), ("up", ffn.up, wide), ("down", ffn.down, narrow)):
        if weight is None:
            continue
        if tuple(weight.shape) != expected:
            return f"has a {name} projection of {tuple(weight.shape)}"
        if weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"has a {name} projection in {weight.dtype}, quantised or no weights at all"
    read = [ffn.gate, ffn.gate_bias, ffn.up, ffn.up_bias, ffn.down, ffn.down_bias]
    held = sum(p.numel() for module in replaced for p in module.parameters())
    known = sum(weight.numel() for weight in read if weight is not None)
    if held != known:
        return f"holds {held} weights, of which {known} are known: it has adapters or other parts that would be lost"
    inner = (ffn.up_bias, ffn.gate_bias) if shape.gated else (ffn.up_bias,)
    if any((bias is not None) != shape.up_bias for bias in inner) or (ffn.down_bias is not None) != shape.down_bias:
        return "has biases where the configuration says none, or the other way round"
    return None
