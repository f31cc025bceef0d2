"""Configuration of a GPT-2 with Mixture-of-Experts layers, apart from the model: reading one builds no model."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config

from thermoe import __version__
from thermoe.errors import ConfigError


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


AutoConfig.register(MoEGPT2Config.model_type, MoEGPT2Config, exist_ok=True)
