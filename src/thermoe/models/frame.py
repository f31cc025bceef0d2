"""A GPT-2 with a choice of feed-forward block, so that a comparison of training runs compares the block alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from thermoe.errors import UnknownNameError
from thermoe.models.classes import moe_config_class, moe_model_class

Block = Literal["moe", "dense", "mixtral"]
BLOCKS: tuple[Block, ...] = ("moe", "dense")


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
    seed: int = 0,
) -> PreTrainedModel:
    """Return a freshly initialised GPT-2 language model with the given kind of feed-forward block.

    Raises:
        UnknownNameError: no such block or router.
    """
    if block not in BLOCKS:
        raise UnknownNameError.of("block", str(block), BLOCKS, where="block")
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
        "loss_type": "ForCausalLM",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if block == "dense":
            width = top_k * expert_width * (3 if gated else 2) // 2 if dense_width is None else dense_width
            return GPT2LMHeadModel(GPT2Config(**shape, n_inner=width))
        entry = {"name": router, "top_k": top_k, "options": dict(router_options or {})}
        config = moe_config_class(GPT2Config)(
            **shape,
            num_experts=num_experts,
            num_experts_per_tok=top_k,
            expert_intermediate_size=expert_width,
            gated_experts=gated,
            expert_bias=False,
            layer_bias=False,
            routers={str(i): dict(entry) for i in range(layers)},
        )
        model: PreTrainedModel = moe_model_class(GPT2LMHeadModel)(config)
        return model
