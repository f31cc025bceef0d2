"""Hugging Face models on a GPU: attached routers in bfloat16, and weights offloaded from the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from thermoe import attach_router, collect_routing, convert_to_moe, detach_router
from thermoe.models.native_experts import IMPLEMENTATION

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SM90 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="grouped products wait for the host before SM90",
)
COMMON: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts_per_tok": 3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
SPECS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 8}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig,
        {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1,
         "norm_topk_prob": True},
    ),
}  # fmt: skip
EVERY_FAMILY = pytest.mark.parametrize("family", sorted(SPECS))


def _native(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    model_class, config_class, own = SPECS[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**COMMON, **own})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3 or name.endswith("gate.weight"):
                parameter.normal_(std=0.3)
    model = model.to(device="cuda", dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    return model


def _blocks(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")]


def _ids(rows: int = 4, length: int = 24) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1)).cuda()


def _mask(ids: Tensor) -> Tensor:
    """Left padding of 0, 5, 10 ... tokens."""
    start = 5 * torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    return (torch.arange(ids.shape[1], device=ids.device) >= start).long()


@contextmanager
def _no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def _logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, attention_mask=mask).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@EVERY_FAMILY
def test_top_k_attached_equals_the_model_and_detaching_restores_it(family: str, dtype: torch.dtype) -> None:
    model = _native(family, dtype)
    for ids in (_ids(), _ids(1, 1), _ids(8, 100)):
        before = _logits(model, ids)
        with attach_router(model, "topk"):
            assert torch.equal(_logits(model, ids), before)
            assert model.config._experts_implementation == IMPLEMENTATION
        with attach_router(model, "priced", price=0.2):
            assert not torch.equal(_logits(model, ids), before)
        assert model.config._experts_implementation == "grouped_mm"
        assert torch.equal(_logits(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@EVERY_FAMILY
def test_padding_gets_no_expert_and_real_tokens_keep_their_bits(family: str, dtype: torch.dtype) -> None:
    """In bfloat16 on SM90 padded rows are left out of the products; this shows that other rows do not notice."""
    model, ids = _native(family, dtype), _ids()
    mask = _mask(ids)
    real = mask.bool()
    before = _logits(model, ids, mask)[real]
    with attach_router(model):
        assert torch.equal(_logits(model, ids, mask)[real], before)
        for decision in collect_routing(model).values():
            assert decision.active[real.flatten()].all() and not decision.active[~real.flatten()].any()
    with attach_router(model, "priced", price=0.2):
        priced = _logits(model, ids, mask)[real]
        other = torch.where(real, ids, 127 - ids)
        assert torch.equal(_logits(model, other, mask)[real], priced)


@EVERY_FAMILY
def test_generation_keeps_the_implementation(family: str) -> None:
    """At decode transformers computes "grouped_mm" by "batched_mm", which reads every slot's expert anew."""
    model, ids = _native(family), _ids()
    seen: set[str] = set()
    handles = [
        block.experts.register_forward_pre_hook(lambda m, a: seen.add(m.config._experts_implementation))
        for block in _blocks(model)
    ]
    settings = {"attention_mask": _mask(ids), "max_new_tokens": 6, "do_sample": False}
    native = model.generate(ids, **settings)
    assert seen == {"grouped_mm", "batched_mm"}  # so that what follows can fail
    seen.clear()
    with attach_router(model, "priced", price=0.2, open_cost=[1.0] * 8):
        text = model.generate(ids, **settings)
        assert text.shape == native.shape == (4, 30)
        assert seen == {IMPLEMENTATION}
        for decision in collect_routing(model).values():  # the last forward: one token of each sequence
            assert decision.expert_index.shape == (4, 3) and decision.padding_mask.all()
        assert torch.equal(model.generate(ids, **settings), text)
    assert torch.equal(model.generate(ids, **settings), native)
    for handle in handles:
        handle.remove()


@SM90
@pytest.mark.parametrize(
    ("router", "options"),
    [("topk", {}), ("topk", {"eval_capacity_factor": 1.0}), ("priced", {"price": 0.2, "open_cost": [1.0] * 8})],
)
@EVERY_FAMILY
def test_an_attached_block_never_waits_for_the_host(family: str, router: str, options: dict[str, Any]) -> None:
    model = _native(family)
    ids = _ids(16, 1)
    hidden = torch.randn(16, 1, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), attach_router(model, router, **options) as attachment:
        for mask in (None, torch.arange(16, device="cuda").unsqueeze(1) > 3):
            model(ids)
            for attached in attachment.routers.values():
                attached.padding_mask = mask
            block = _blocks(model)[0]
            block(hidden)
            with _no_sync():
                block(hidden)
            padded = attachment.routers[attachment.matched[0]].last_routing.padding_mask
            assert (padded is None) == (mask is None)


@SM90
@EVERY_FAMILY
def test_an_attached_model_never_waits_for_the_host(family: str) -> None:
    model, ids = _native(family), _ids()
    with torch.no_grad():
        model(ids, use_cache=False)
        try:
            with _no_sync():
                model(ids, use_cache=False)
        except RuntimeError as error:
            pytest.skip(f"this version's own forward waits for the host: {error}")
        with attach_router(model, "priced", price=0.2):
            model(ids, use_cache=False)
            with _no_sync():
                model(ids, use_cache=False)
    with pytest.raises(RuntimeError), _no_sync():  # so that the above can fail
        ids.sum().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_offloaded_from_the_gpu(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    moe = convert_to_moe(GPT2LMHeadModel(config).to(dtype).eval(), num_experts=8, top_k=3, router="priced", price=0.1)
    moe.save_pretrained(tmp_path / "model")
    memory = moe.cuda()
    places: dict[str, Any] = dict.fromkeys(
        ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"], 0
    )
    places |= {"transformer.h.0": 0, "transformer.h.1": place, "transformer.h.2": place}
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off")
    )
    assert all(parameter.is_meta for parameter in away.transformer.h[1].mlp.experts.parameters())
    ids = _ids()
    mask = _mask(ids)
    real = mask.bool()
    assert torch.equal(_logits(away, ids), _logits(memory, ids))
    assert torch.equal(_logits(away, ids, mask)[real], _logits(memory, ids, mask)[real])
    on_host = _logits(away, ids.cpu(), mask.cpu())  # accelerate moves the inputs, and the mask must follow
    assert torch.equal(on_host[real.cpu()].cuda(), _logits(memory, ids, mask)[real])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(away.generate(ids, **settings), memory.generate(ids, **settings))
    away.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").cuda()
    state = memory.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_an_attachment_outlives_a_move() -> None:
    model, ids = _native("olmoe").cpu(), _ids()
    attach_router(model, "priced", price=0.2)
    model.cuda()
    priced = _logits(model, ids)
    detach_router(model)
    with attach_router(model, "priced", price=0.2):
        assert torch.equal(_logits(model, ids), priced)
