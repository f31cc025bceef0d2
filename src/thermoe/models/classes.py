"""Mixture-of-Experts classes for the dense classes of transformers, one made from each as it is needed.

`MoELlamaForCausalLM` is a subclass of `LlamaForCausalLM`: same forward, cache, generation and weight names, but the
feed-forward network of chosen blocks is an `MoELayer`. Its configuration, `MoELlamaConfig`, adds the experts' sizes and
one entry per layer with the router's name and options, so that a saved model comes back with the routers it had. The
classes are attributes of this module by name, which is how pickle and `from thermoe.models.classes import ...` find
them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init

# From their own modules: this one is imported while `transformers` is still resolving its lazy names.
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from thermoe import __version__
from thermoe.errors import ConfigError
from thermoe.models import native_experts  # noqa: F401  (registers the experts implementation "thermoe")
from thermoe.models.card import write_card
from thermoe.models.checkpoint import check_blocks, check_loaded, check_reachable, damaged, incomplete, why_incomplete
from thermoe.models.config_fields import FIELDS, check_fields
from thermoe.models.families import FAMILIES, Family
from thermoe.models.learned import learned_in
from thermoe.models.padding import note_padding
from thermoe.moe.experts import Experts, split_widths
from thermoe.moe.layer import MoELayer
from thermoe.moe.offload import is_offloaded, readable, whole_state
from thermoe.routers.base import ROUTERS, Router
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.swap import build_router

PREFIX = "thermoe_"
#: Auto classes that learn of an MoE class when its dense class is known to them.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
_CONFIG_DOC = """Configuration of a {name} with MoE layers: the fields of `{name}` and these.

Args:
    num_experts: E per MoE layer.
    num_experts_per_tok: most experts per token, k.
    expert_intermediate_size: F of one expert; ``None`` divides the dense width by E. With `expert_widths` it follows
        from them: the width of the blocks in which they are kept, their greatest common divisor.
    expert_widths: neurons of each expert where they differ; ``None`` is the same for all.
    shared_intermediate_size: neurons of an always-on part beside the experts; 0 is none.
    moe_layers: positions of the blocks with an MoE layer; ``None`` is all.
    expert_bias: whether each expert has its own output bias.
    layer_bias: whether the layer adds one output bias per token; ``None`` as in the dense network.
    gated_experts: SwiGLU experts or ungated ones; ``None`` as in the dense network.
    conversion_method: how the dense model was converted, or ``None``.
    routers: by block position (as a string), ``{{"name": ..., "top_k": ..., "options": {{...}}}}``; the baseline where
        one is missing.
    thermoe_version: the version that wrote the configuration.

Raises:
    ConfigError: a block position does not exist, or k and E do not fit.
"""


def _complete(config: Any) -> None:
    """Fill in what follows from other fields, and check what belongs together."""
    check_fields(config)
    shape = config.moe_family.shape(config)
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ConfigError(
            f"num_experts_per_tok is {config.num_experts_per_tok} with {config.num_experts} experts",
            where="num_experts_per_tok",
            accepted=f"an integer from 1 to {config.num_experts}",
            fix="lower it or raise num_experts",
        )
    blocks = config.num_hidden_layers
    if config.expert_widths is not None:
        _complete_widths(config)
    if config.expert_intermediate_size is None:
        config.expert_intermediate_size = max(1, shape.intermediate_size // config.num_experts)
    config.moe_layers = list(range(blocks)) if config.moe_layers is None else sorted(set(config.moe_layers))
    if any(not 0 <= i < blocks for i in config.moe_layers):
        raise ConfigError(
            f"MoE layers {config.moe_layers} in a model of {blocks} blocks",
            where="moe_layers",
            accepted=f"positions from 0 to {blocks - 1}",
            fix="name blocks that exist, or leave moe_layers out for all",
        )
    config.layer_bias = shape.down_bias if config.layer_bias is None else config.layer_bias
    config.gated_experts = shape.gated if config.gated_experts is None else config.gated_experts
    config.routers = dict(config.routers or {})
    config.thermoe_version = config.thermoe_version or __version__


def _complete_widths(config: Any) -> None:
    """Set what follows from the experts' widths: that of a block; experts of one width are no unequal ones."""
    widths = list(config.expert_widths)
    block = widths[0] if len(set(widths)) == 1 else split_widths(widths)[0]
    given = config.expert_intermediate_size
    if len(widths) != config.num_experts or given not in (None, block):
        raise ConfigError(
            f"expert_widths are {widths} with {config.num_experts} experts and expert_intermediate_size {given}",
            where="expert_widths",
            accepted=f"{config.num_experts} widths, and expert_intermediate_size {block} (their divisor) or none",
            fix="leave expert_intermediate_size out, and give one width per expert",
        )
    if config.expert_bias and len(set(widths)) > 1:
        raise ConfigError(
            "experts of unequal widths cannot have output biases of their own",
            where="expert_bias",
            accepted="False with expert_widths",
            fix="use layer_bias=True, one output bias for the whole layer",
        )
    config.expert_intermediate_size, config.expert_widths = block, widths if len(set(widths)) > 1 else None


@functools.cache
def moe_config_class(dense: type) -> Any:
    """Return the configuration class of MoE models made from the configuration class ``dense``."""
    family = FAMILIES[dense.model_type]  # type: ignore[attr-defined]
    name = f"MoE{dense.__name__}"

    def __post_init__(self: Any, **kwargs: Any) -> None:  # noqa: N807
        dense.__post_init__(self, **kwargs)  # type: ignore[attr-defined]
        _complete(self)
        register_models(made)

    made = type(
        name,
        (dense,),
        {
            "__module__": __name__,
            "__doc__": _CONFIG_DOC.format(name=dense.__name__),
            "__annotations__": {field: kind for field, (kind, *_) in FIELDS.items()},
            **{field: default for field, (_, default, *_) in FIELDS.items()},
            "__post_init__": __post_init__,
            "model_type": PREFIX + family.model_type,
            "moe_family": family,
        },
    )
    return made


def build_layer(config: Any, position: int) -> MoELayer:
    """Return the MoE layer of block ``position``, freshly initialised."""
    shape = config.moe_family.shape(config)
    entry: Mapping[str, Any] = config.routers.get(str(position), {})
    router = build_router(
        entry.get("name", "topk"),
        shape.hidden_size,
        config.num_experts,
        entry.get("top_k", config.num_experts_per_tok),
        entry.get("options"),
    )
    form = {
        "activation": shape.activation if config.gated_experts == shape.gated else "silu",
        "gated": config.gated_experts,
        "up_bias": shape.up_bias and config.gated_experts == shape.gated,
    }
    if entry.get("fast") is not None:  # the model was saved with what it learned at test time
        router.fast = FastWeights(shape.hidden_size, config.num_experts, **entry["fast"])
    experts = Experts(
        config.num_experts,
        shape.hidden_size,
        config.expert_intermediate_size,
        **form,
        down_bias=config.expert_bias,
        blocks=None if config.expert_widths is None else split_widths(config.expert_widths)[1],
    )
    shared = None
    if config.shared_intermediate_size:
        shared = Experts(1, shape.hidden_size, config.shared_intermediate_size, **form)
    return MoELayer(router, experts, shared=shared, output_bias=config.layer_bias, dropout=shape.dropout)


def place_layer(base: nn.Module, family: Family, position: int, layer: MoELayer) -> None:
    """Put ``layer`` where block ``position`` of the base model has its feed-forward network."""
    block = base.get_submodule(f"{family.blocks}.{position}")
    for path, module in ((family.place, layer), *((path, nn.Identity()) for path in family.passed)):
        owner, _, attribute = path.rpartition(".")
        setattr(block.get_submodule(owner), attribute, module)


def placed_layers(model: Any) -> dict[int, MoELayer]:
    """Return the MoE layers of a model by block position."""
    family: Family = model.config.moe_family
    base = base_model_of(model)
    return {i: base.get_submodule(f"{family.blocks}.{i}.{family.place}") for i in model.config.moe_layers}  # type: ignore[misc]


def base_model_of(model: Any) -> nn.Module:
    """Return the part of a model that holds the blocks."""
    base: nn.Module = model.base_model
    return base


class MoEModelMixin:
    """What every MoE class adds to its dense class."""

    config: Any
    _keep_in_fp32_modules_strict: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for position in config.moe_layers:
            place_layer(base_model_of(self), config.moe_family, position, build_layer(config, position))
        self.watch_padding()
        # What routers keep precise stays so when the weights are loaded in half precision.
        routers = [layer.router for layer in placed_layers(self).values() if isinstance(layer.router, Router)]
        precise = {f"router.{name}" for router in routers for name in router.float32_buffers}
        if any(router.fast is not None for router in routers):
            precise.add("router.fast")
        self._keep_in_fp32_modules_strict = {*(self._keep_in_fp32_modules_strict or ()), *precise}
        self.post_init()  # type: ignore[attr-defined]

    def watch_padding(self) -> None:
        """Route padding nowhere: note the attention mask whenever the model is called."""
        entry = base_model_of(self).get_submodule(self.config.moe_family.entry)
        note_padding(entry, placed_layers(self).values())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own initialisers leave alone what a checkpoint has filled.
        if isinstance(module, Experts):
            for weight in (module.up_weight, module.down_proj):
                init.normal_(weight, std=getattr(self.config, "initializer_range", 0.02))
            for bias in (module.up_bias, module.down_bias):
                if bias is not None:
                    init.zeros_(bias)
            if module.block_table is not None:
                init.copy_(module.block_table, torch.tensor(module.table_rows()))
        elif isinstance(module, Router):
            init.normal_(module.weight, std=0.02 * (768 / module.hidden_size) ** 0.5)
            init.zeros_(module.ramp)
        elif isinstance(module, FastWeights):
            for parameter in module.parameters():
                init.zeros_(parameter)
        elif isinstance(module, MoELayer):
            if module.output_bias is not None:
                init.zeros_(module.output_bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Experts dispatch through thermoe's own backends, so transformers must not offer to switch them."""
        return False

    def save_pretrained(self, save_directory: Any, *args: Any, keep_learned: bool = False, **kwargs: Any) -> Any:
        """Save weights and configuration, with the routers as they are now; offloaded weights are brought in.

        What is not named here is as in transformers. With ``keep_learned`` what test-time training learned is saved
        too, as fast weights beside the routers, and the loaded model scores as the adapted one, bit for bit; without
        it the loaded model is the trained one.
        """
        model: Any = self
        with learned_in(model, keep_learned, kwargs):
            return self._save_pretrained(save_directory, *args, **kwargs)

    def _save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        own: Any = self
        routers = {position: layer.router for position, layer in placed_layers(self).items()}
        with readable(*routers.values()):
            self.config.routers = {
                str(position): describe_router(router)
                for position, router in routers.items()
                if isinstance(router, Router)
            }
        if len(args) < 2 and kwargs.get("state_dict") is None and is_offloaded(own) and not self._saves_in_parts():
            kwargs["state_dict"] = whole_state(own)
        self.config.thermoe_version = __version__
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        first = args[0] if args else kwargs.get("is_main_process", True)
        if first and Path(save_directory).is_dir():
            write_card(Path(save_directory), self)
        return result

    def _saves_in_parts(self) -> bool:
        """Whether every version of transformers brings what is offloaded here in, file by file, when it saves."""
        places = set(getattr(self, "hf_device_map", {}).values())
        kept = not any(buffer.is_meta for buffer in self.buffers())  # type: ignore[attr-defined]
        return kept and len(places) > 1 and bool(places & {"cpu", "disk"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but refuse a checkpoint that does not fill the MoE layers.

        Raises:
            CheckpointError: weights of an MoE layer are missing, of another shape or too many, or a file is damaged.
            ConfigError: `device_map` leaves weights on the disk that this version of transformers does not bring in.
        """
        source = str(pretrained_model_name_or_path or "the given state_dict")
        with_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            # Mismatches are collected first, so that the error can name them.
            model, info = super().from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise damaged(error, source) from error
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            if not Path(source).is_dir() or not (why := why_incomplete(Path(source), kwargs)):
                raise
            raise incomplete(why, source) from error
        check_loaded(model.config.moe_family, info, source, ignore_mismatched=ignore_mismatched)
        check_blocks([layer.experts for layer in placed_layers(model).values()], source)
        check_reachable(model, kwargs.get("device_map"))
        return (model, info) if with_info else model


@functools.cache
def moe_model_class(dense: type) -> Any:
    """Return the MoE class made from the dense model class ``dense``."""
    return type(
        f"MoE{dense.__name__}",
        (MoEModelMixin, dense),
        {
            "__module__": __name__,
            "__doc__": f"{dense.__name__} with MoE layers; made by `thermoe.convert_to_moe` or `from_pretrained`.",
            "config_class": moe_config_class(dense.config_class),  # type: ignore[attr-defined]
        },
    )


def describe_router(router: Router) -> dict[str, Any]:
    """Return name, top_k and options, and those of its fast weights: what is needed to build ``router`` again."""
    described = {"name": ROUTERS.name_of(type(router)), "top_k": router.top_k, "options": router.options()}
    return described if router.fast is None else {**described, "fast": router.fast.options()}


@functools.cache
def register_models(config_class: type) -> None:
    """Tell the Auto classes which MoE class belongs to a configuration; done when the first one is made."""
    dense_config = config_class.__mro__[1]
    for name in AUTO_CLASSES:
        auto = getattr(modeling_auto, name)
        if dense_config not in auto._model_mapping:
            continue
        dense = auto._model_mapping[dense_config]
        auto.register(config_class, moe_model_class(dense[0] if isinstance(dense, tuple) else dense), exist_ok=True)


def __getattr__(name: str) -> Any:
    """Find `MoE...` classes by name."""
    dense = getattr(transformers, name.removeprefix("MoE"), None) if name.startswith("MoE") else None
    family = getattr(dense, "model_type", None) or getattr(getattr(dense, "config_class", None), "model_type", None)
    if dense is None or family not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return moe_config_class(dense) if hasattr(dense, "model_type") else moe_model_class(dense)


for _name in FAMILIES:
    _made = moe_config_class(CONFIG_MAPPING[_name])
    AutoConfig.register(_made.model_type, _made, exist_ok=True)
