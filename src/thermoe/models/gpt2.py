"""GPT-2 with Mixture-of-Experts layers in chosen blocks, as a Hugging Face model of its own.

`MoEGPT2LMHeadModel` is a subclass of transformers' `GPT2LMHeadModel`: same forward, cache, generation and weight names,
but the `mlp` of the chosen blocks is an `MoELayer`. Its configuration holds one entry per layer with the router's name
and options, so that a saved model comes back with the routers it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers import initialization as init

from thermoe import __version__
from thermoe.errors import ConfigError
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer, moe_layers
from thermoe.routers.base import Router
from thermoe.routers.swap import build_router


class MoEGPT2Config(GPT2Config):
    """Configuration of a GPT-2 with MoE layers; the fields of `GPT2Config` and these.

    Args:
        num_experts: E per MoE layer.
        num_experts_per_tok: most experts per token, k.
        expert_intermediate_size: F of one expert; ``None`` divides the dense width by E.
        moe_layers: positions of the blocks with an MoE layer; ``None`` is all.
        expert_bias: whether each expert has its own output bias.
        layer_bias: whether the layer adds one output bias per token.
        gated_experts: SwiGLU experts instead of GPT-2's ungated ones.
        routers: by block position (as a string), ``{"name": ..., "top_k": ..., "options": {...}}``; missing ones are
            the baseline.
        thermoe_version: the version that wrote the configuration.

    Raises:
        ConfigError: a block position does not exist, or k and E do not fit.
    """

    model_type = "thermoe_gpt2"

    num_experts: int = 8
    num_experts_per_tok: int = 2
    expert_intermediate_size: int | None = None
    moe_layers: list[int] | None = None
    expert_bias: bool = False
    layer_bias: bool = True
    gated_experts: bool = False
    routers: dict[str, Any] | None = None
    thermoe_version: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and check what belongs together."""
        inner = self.n_inner if self.n_inner is not None else 4 * self.n_embd
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok} with {self.num_experts} experts",
                where="num_experts_per_tok",
                accepted=f"an integer from 1 to {self.num_experts}",
                fix="lower it or raise num_experts",
            )
        if self.expert_intermediate_size is None:
            self.expert_intermediate_size = max(1, inner // self.num_experts)
        self.moe_layers = list(range(self.n_layer)) if self.moe_layers is None else sorted(set(self.moe_layers))
        if any(not 0 <= i < self.n_layer for i in self.moe_layers):
            raise ConfigError(
                f"MoE layers {self.moe_layers} in a model of {self.n_layer} blocks",
                where="moe_layers",
                accepted=f"positions from 0 to {self.n_layer - 1}",
            )
        self.routers = dict(self.routers or {})
        self.thermoe_version = self.thermoe_version or __version__
        super().__post_init__(**kwargs)


def _build_layer(config: MoEGPT2Config, position: int) -> MoELayer:
    entry: Mapping[str, Any] = (config.routers or {}).get(str(position), {})
    router = build_router(
        entry.get("name", "topk"),
        config.n_embd,
        config.num_experts,
        entry.get("top_k", config.num_experts_per_tok),
        entry.get("options"),
    )
    experts = Experts(
        config.num_experts,
        config.n_embd,
        config.expert_intermediate_size or 1,
        activation="silu" if config.gated_experts else config.activation_function,
        gated=config.gated_experts,
        up_bias=not config.gated_experts,
        down_bias=config.expert_bias,
    )
    return MoELayer(router, experts, output_bias=config.layer_bias, dropout=config.resid_pdrop)


class _MoEWeights:
    """Initialisation of MoE parts, shared by the two model classes."""

    # Prices and costs stay precise when the weights are loaded in half precision.
    _keep_in_fp32_modules_strict = ("router.price", "router.kappa", "router.pair_cost", "router.open_cost")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' own initialisers leave alone what a checkpoint has filled.
        if isinstance(module, Experts):
            for weight in (module.up_weight, module.down_proj):
                init.normal_(weight, std=self.config.initializer_range)  # type: ignore[attr-defined]
            for bias in (module.up_bias, module.down_bias):
                if bias is not None:
                    init.zeros_(bias)
        elif isinstance(module, Router):
            init.normal_(module.weight, std=0.02 * (768 / module.hidden_size) ** 0.5)
            init.zeros_(module.ramp)
        elif isinstance(module, MoELayer):
            if module.output_bias is not None:
                init.zeros_(module.output_bias)
        else:
            super()._init_weights(module)  # type: ignore[misc]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Experts dispatch through thermoe's own backends, so transformers must not offer to switch them."""
        return False


class MoEGPT2Model(_MoEWeights, GPT2Model):
    """GPT-2's trunk with MoE layers."""

    config_class = MoEGPT2Config

    def __init__(self, config: MoEGPT2Config) -> None:
        super().__init__(config)
        for position in config.moe_layers or []:
            self.h[position].mlp = _build_layer(config, position)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the trunk; tokens that ``attention_mask`` marks as padding are routed nowhere."""
        given = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        mask = None
        if attention_mask is not None and given is not None and attention_mask.ndim == 2:
            mask = attention_mask[:, -given.shape[1] :].bool()  # with a cache it covers the past too
        for _, layer in moe_layers(self):
            layer.padding_mask = mask
        return super().forward(input_ids, past_key_values, attention_mask, **kwargs)


class MoEGPT2LMHeadModel(_MoEWeights, GPT2LMHeadModel):
    """GPT-2 with MoE layers and a language-modelling head.

    Made by `thermoe.convert_to_moe` from a dense model, by `from_pretrained`, or from a configuration.
    """

    config_class = MoEGPT2Config

    def __init__(self, config: MoEGPT2Config) -> None:
        super(GPT2LMHeadModel, self).__init__(config)  # not GPT2LMHeadModel's own: it would build a dense trunk first
        self.transformer = MoEGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save weights and configuration, with the routers as they are now."""
        self.config.routers = {
            name.split(".")[-2]: describe_router(layer.router)
            for name, layer in moe_layers(self)
            if isinstance(layer.router, Router)
        }
        self.config.thermoe_version = __version__
        return super().save_pretrained(save_directory, *args, **kwargs)


def describe_router(router: Router) -> dict[str, Any]:
    """Return name, top_k and options: what the configuration needs to build ``router`` again."""
    from thermoe.routers.base import ROUTERS

    return {"name": ROUTERS.name_of(type(router)), "top_k": router.top_k, "options": router.options()}


AutoConfig.register(MoEGPT2Config.model_type, MoEGPT2Config, exist_ok=True)
AutoModelForCausalLM.register(MoEGPT2Config, MoEGPT2LMHeadModel, exist_ok=True)
