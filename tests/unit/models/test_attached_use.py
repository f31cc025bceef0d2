"""What works on a converted model works on an attached one: statistics, swapping, adapting, all undone by detaching."""

from __future__ import annotations

import pytest
import torch
from test_native_experts import FAMILIES, moe_blocks, tiny_native

from thermoe import RouterAdapter, attach_router, collect_routing, detach_router, set_router
from thermoe.energy.work import ModelWork

IDS = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attached_model_is_a_model_like_any_other(family: str) -> None:
    model = tiny_native(family).eval()
    with torch.no_grad():
        native = model(IDS).logits
    attached = attach_router(model)
    with torch.no_grad():
        model(IDS)
    routing = collect_routing(model)
    assert list(routing) == list(attached.matched)
    pairs = sum(int(decision.active.sum()) for decision in routing.values())

    replaced = set_router(model, "priced", price=0.2, k_min=1)
    with torch.no_grad():
        priced = model(IDS).logits
    assert sum(int(decision.active.sum()) for decision in collect_routing(model).values()) < pairs
    assert not torch.equal(priced, native)
    set_router(model, replaced)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with RouterAdapter(model, lr=3e-2, anchor=1.0, bucket=None) as adapter:
        scores = [adapter.score_and_learn(IDS).sequence_nll for _ in range(12)]
        assert adapter.updates == 12
    assert float(scores[-1].sum()) < float(scores[0].sum())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name

    detach_router(model)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, native)
    assert not collect_routing(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_of_an_attached_model_is_counted_from_its_own_experts(family: str) -> None:
    model = tiny_native(family)
    blocks = moe_blocks(model)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim >= 2 and not name.endswith("_bias"))
    lookups = model.get_input_embeddings().weight.numel()
    attach_router(model, verbose=False)
    work = ModelWork.of(model)
    assert len(work.layers) == len(blocks) == 2
    for layer, block in zip(work.layers, blocks, strict=True):
        stacks = [p for p in block.experts.parameters() if p.ndim == 3]
        assert layer.num_experts == block.experts.num_experts
        assert layer.bytes_per_expert == 2 * sum(p.numel() for p in stacks) // layer.num_experts
        assert layer.flops_per_pair == layer.bytes_per_expert  # two operations and two bytes a weight
    experts = sum(sum(layer.bytes_by_expert) for layer in work.layers)
    assert work.shared_bytes + experts == 2 * (matrices - lookups)
    detach_router(model)
