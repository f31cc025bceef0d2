"""The experts implementation "thermoe" equals the model's own, and an empty slot costs and touches nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from thermoe.models.native_experts import IMPLEMENTATION, thermoe_experts_forward, why_not_native

COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "intermediate_size": 48,
}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
NARROW = {"moe_intermediate_size": 16, "num_experts": 6, "decoder_sparse_step": 1}
SPECS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 6}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 6}),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, {**NARROW, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**NARROW, "head_dim": 8, "norm_topk_prob": True}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 6, "head_dim": 8, "sliding_window": 8}),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, DEEPSEEK),
}
FAMILIES = sorted(SPECS)


def tiny_native(family: str, **changes: Any) -> Any:
    """Build a random model of two layers whose routers are decided enough to choose differently per token."""
    model_class, config_class, own = SPECS[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**COMMON, **own, **changes})).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 3 or name.endswith(("gate.weight", "router.weight", "_proj_bias")):
                tensor.normal_(std=0.3)
            elif name.endswith(("e_score_correction_bias", "router.bias")):
                tensor.normal_(std=0.1)
    return model


def moe_blocks(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "experts") and (hasattr(m, "gate") or hasattr(m, "router"))]


def _call(experts: Any, x: Tensor, index: Tensor, weights: Tensor, implementation: str) -> Tensor:
    experts.config._experts_implementation_internal = implementation
    return experts(x, index, weights)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_equal_those_of_eager(family: str, tokens: int) -> None:
    experts = moe_blocks(tiny_native(family))[0].experts
    x = torch.randn(tokens, 32)
    index = torch.rand(tokens, experts.num_experts).topk(3).indices
    weights = torch.rand(tokens, 3)
    results = {}
    for implementation in ("eager", IMPLEMENTATION):
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = _call(experts, inputs[0], index, inputs[1], implementation)
        gradients = torch.autograd.grad(out.square().sum(), [*inputs, *experts.parameters()])
        results[implementation] = [out, *gradients]
    for ours, theirs in zip(results[IMPLEMENTATION], results["eager"], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_bits_are_those_of_grouped_mm(family: str, dtype: torch.dtype) -> None:
    experts = moe_blocks(tiny_native(family))[0].experts.to(dtype)
    for tokens in (1, 7, 300):
        x, weights = torch.randn(tokens, 32).to(dtype), torch.rand(tokens, 3).to(dtype)
        index = torch.rand(tokens, experts.num_experts).topk(3).indices
        with torch.no_grad():
            ours = _call(experts, x, index, weights, IMPLEMENTATION)
            theirs = _call(experts, x, index, weights, "grouped_mm")
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_slot_adds_nothing_and_carries_no_gradient(family: str) -> None:
    experts = moe_blocks(tiny_native(family))[0].experts
    count = experts.num_experts
    with torch.no_grad():  # the last expert is never chosen; an empty slot must not read it either
        for parameter in experts.parameters():
            parameter[-1] = float("nan")
    x = torch.randn(20, 32, requires_grad=True)
    index = torch.rand(20, count - 1).topk(3).indices
    weights = torch.rand(20, 3)
    empty = torch.rand(20, 3) < 0.5
    empty[0] = True
    index, weights = torch.where(empty, count, index), torch.where(empty, 0, weights).requires_grad_()
    out = _call(experts, x, index, weights, IMPLEMENTATION)
    expected = torch.zeros(20, 32)
    for token in range(20):
        for slot in range(3):
            if index[token, slot] < count:
                one = _call(
                    experts, x[token : token + 1], index[token : token + 1, slot : slot + 1], torch.ones(1, 1), "eager"
                )
                expected[token] += (weights[token, slot] * one[0]).detach()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    dx, dw, *dparameters = torch.autograd.grad(out.square().sum(), [x, weights, *experts.parameters()])
    assert not dx[0].any() and not dw[empty].any() and dw[~empty].all()
    assert torch.isfinite(dx).all() and torch.isfinite(dw).all()
    assert not any(gradient[-1].any() for gradient in dparameters)


def test_nothing_chosen_and_no_tokens() -> None:
    experts = moe_blocks(tiny_native("gpt_oss"))[0].experts
    none = torch.full((4, 2), experts.num_experts)
    assert not _call(experts, torch.randn(4, 32), none, torch.zeros(4, 2), IMPLEMENTATION).any()
    empty = _call(experts, torch.randn(0, 32), none[:0], torch.zeros(0, 2), IMPLEMENTATION)
    assert empty.shape == (0, 32)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 16), (torch.float32, 15)])
def test_dtypes_and_widths_that_grouped_mm_refuses(dtype: torch.dtype, width: int) -> None:
    model = tiny_native("qwen3_moe", moe_intermediate_size=width).to(dtype)
    experts = moe_blocks(model)[0].experts
    x, weights, index = torch.randn(9, 32, dtype=dtype), torch.rand(9, 3, dtype=dtype), torch.rand(9, 6).topk(3).indices
    index[:, 1], weights[:, 1] = 6, 0
    out = _call(experts, x, index, weights, IMPLEMENTATION)
    expected = _call(experts, x, index[:, ::2], weights[:, ::2], "eager")
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_experts_without_a_gate() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.has_gate, self.has_bias, self.is_transposed = 4, False, True, True
            self.config = None
            self.act_fn = nn.functional.relu
            self.up_proj = nn.Parameter(torch.randn(4, 8, 16))
            self.up_proj_bias = nn.Parameter(torch.randn(4, 16))
            self.down_proj = nn.Parameter(torch.randn(4, 16, 8))
            self.down_proj_bias = nn.Parameter(torch.randn(4, 8))

    experts = Plain()
    assert why_not_native(experts) is None
    x, index, weights = torch.randn(5, 8), torch.tensor([[0, 4], [3, 1], [4, 4], [2, 2], [1, 0]]), torch.rand(5, 2)
    out = thermoe_experts_forward(experts, x, index, weights)
    expected = torch.zeros(5, 8)
    for token in range(5):
        for slot in range(2):
            if (e := int(index[token, slot])) < 4:
                hidden = torch.relu(x[token] @ experts.up_proj[e] + experts.up_proj_bias[e])
                expected[token] += weights[token, slot] * (hidden @ experts.down_proj[e] + experts.down_proj_bias[e])
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_computed_is_said() -> None:
    experts = moe_blocks(tiny_native("olmoe"))[0].experts
    assert why_not_native(experts) is None
    experts._is_expert_parallel = True
    assert "several devices" in str(why_not_native(experts))
    assert "experts interface" in str(why_not_native(nn.Linear(2, 2)))
    experts._is_expert_parallel = False
    experts.down_proj = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)
    assert "quantised" in str(why_not_native(experts))


def test_models_compile_with_it() -> None:
    model = tiny_native("olmoe")
    model.config._experts_implementation_internal = IMPLEMENTATION
    experts = moe_blocks(model)[0].experts
    x, index, weights = torch.randn(8, 32), torch.rand(8, 7).topk(3).indices, torch.rand(8, 3)
    compiled = torch.compile(thermoe_experts_forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(experts, x, index, weights), thermoe_experts_forward(experts, x, index, weights), atol=1e-5, rtol=1e-4
    )
