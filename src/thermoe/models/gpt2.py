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
from transformers import initialization as init

# From their own modules: this one is imported while `transformers` is still resolving its lazy names.
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from thermoe import __version__
from thermoe.models.gpt2_config import MoEGPT2Config
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer, moe_layers
from thermoe.routers.base import Router
from thermoe.routers.swap import build_router


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


AutoModelForCausalLM.register(MoEGPT2Config, MoEGPT2LMHeadModel, exist_ok=True)
