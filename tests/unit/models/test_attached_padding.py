"""Attached routers know padding: it gets no expert and is not counted, and real tokens keep their bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_native_experts import FAMILIES, moe_blocks, tiny_native
from torch import Tensor, nn

from thermoe import RouterAdapter, attach_router, collect_routing, detach_router, set_router
from thermoe.models.attach import AttachedRouter
from thermoe.moe.losses import routing_loss
from thermoe.moe.stats import routing_stats
from thermoe.routers.fast_weights import FastWeights

IDS = torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(1))
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_SIDE = pytest.mark.parametrize("side", ["left", "right"])
PRICE = {"deepseek_v3": 0.6}


def _mask(side: str = "left") -> Tensor:
    mask = torch.ones_like(IDS)
    for row, padding in enumerate((6, 0, 3)):
        mask[row, slice(0, padding) if side == "left" else slice(10 - padding, 10)] = 0
    return mask


def _priced(model: Any, family: str) -> Any:
    return attach_router(model, "priced", price=PRICE.get(family, 0.2))


@torch.no_grad()
def _real_logits(model: nn.Module, mask: Tensor, ids: Tensor = IDS) -> Tensor:
    return model(ids, attention_mask=mask).logits[mask.bool()]


def _routers(model: nn.Module) -> list[AttachedRouter]:
    return [module for module in model.modules() if isinstance(module, AttachedRouter)]


@EVERY_SIDE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_FAMILY
def test_real_tokens_keep_their_bits(family: str, dtype: torch.dtype, side: str) -> None:
    model, mask = tiny_native(family).to(dtype), _mask(side)
    before, alone = _real_logits(model, mask), _real_logits(model, torch.ones_like(mask))
    for router, options in (("topk", {}), ("priced", {"price": 0.0})):
        with attach_router(model, router, **options):
            assert torch.equal(_real_logits(model, mask), before)
            assert torch.equal(_real_logits(model, torch.ones_like(mask)), alone)
            _real_logits(model, mask)
            for decision in collect_routing(model).values():
                real = mask.bool().reshape(-1)
                assert torch.equal(decision.padding_mask, real)
                assert decision.active[real].all() and not decision.active[~real].any()
                assert (decision.weights[~real] == 0).all()
                assert float(decision.counts.sum()) == 3 * int(mask.sum())
    assert torch.equal(_real_logits(model, mask), before)


@EVERY_SIDE
@EVERY_FAMILY
def test_what_stands_in_the_padding_does_not_matter(family: str, side: str) -> None:
    model, mask = tiny_native(family), _mask(side)
    other = torch.where(mask.bool(), IDS, 63 - IDS)
    options = {"price": 0.1, "open_cost": [3.0] * moe_blocks(model)[0].experts.num_experts, "group_by_position": True}
    for router, settings in (("topk", {"eval_capacity_factor": 1.0}), ("priced", options)):
        with attach_router(model, router, **settings):
            first = _real_logits(model, mask)
            opened = [decision.opened for decision in collect_routing(model).values()]
            assert torch.equal(_real_logits(model, mask, other), first)
            for decision, before in zip(collect_routing(model).values(), opened, strict=True):
                assert torch.equal(decision.opened, before)


@EVERY_FAMILY
def test_padding_opens_nothing_once_a_router_departs_from_the_model(family: str) -> None:
    """Experts that only padding would use hold NaN, and nobody meets it."""
    model, mask = tiny_native(family), torch.zeros_like(IDS)
    mask[1, 7:] = 1
    with attach_router(model, "priced", price=1e6):
        before = _real_logits(model, mask)
        idle = [~decision.opened for decision in collect_routing(model).values()]
        assert all(int(unused.sum()) >= 3 for unused in idle)
        with torch.no_grad():
            for block, unused in zip(moe_blocks(model), idle, strict=True):
                for parameter in block.experts.parameters():
                    parameter[unused] = float("nan")
        assert torch.equal(_real_logits(model, mask), before)


@pytest.mark.parametrize("router", ["topk", "priced"])
@EVERY_FAMILY
def test_generation_with_left_padding(family: str, router: str) -> None:
    model, mask = tiny_native(family), _mask("left")
    settings = {"max_new_tokens": 5, "do_sample": False}
    native = model.generate(IDS, attention_mask=mask, **settings)
    options = {"price": PRICE.get(family, 0.2)} if router == "priced" else {}
    with attach_router(model, router, **options):
        together = model.generate(IDS, attention_mask=mask, **settings)
        assert all(decision.padding_mask.all() for decision in collect_routing(model).values())
        if router == "topk":
            assert torch.equal(together, native)
        uncached = model.generate(IDS, attention_mask=mask, use_cache=False, **settings)
        assert torch.equal(together, uncached)
        for row, real in zip(range(3), mask.bool(), strict=True):
            alone = model.generate(IDS[row][real].unsqueeze(0), **settings)
            assert torch.equal(together[row, 10:], alone[0, -5:])


@EVERY_FAMILY
def test_a_mask_that_covers_the_past(family: str) -> None:
    model, mask = tiny_native(family), _mask("left")
    with torch.no_grad(), attach_router(model) as attachment:
        attached = attachment.routers[attachment.matched[-1]]
        cache = model(IDS[:, :8], attention_mask=mask[:, :8], use_cache=True).past_key_values
        assert torch.equal(attached.last_routing.padding_mask.view(3, 8), mask[:, :8].bool())
        model(IDS[:, 8:], attention_mask=mask, past_key_values=cache)
        assert torch.equal(attached.last_routing.padding_mask.view(3, 2), mask[:, 8:].bool())
        assert attached.last_routing.active.all()


@EVERY_FAMILY
def test_other_masks_make_every_token_real(family: str) -> None:
    model = tiny_native(family)
    causal = torch.full((10, 10), torch.finfo(torch.float32).min).triu(1).expand(3, 1, 10, 10)
    if family == "gpt_oss":  # takes one mask per kind of layer
        causal = {"full_attention": causal, "sliding_attention": causal}  # type: ignore[assignment]
    with torch.no_grad(), attach_router(model) as attachment:
        attached = attachment.routers[attachment.matched[0]]
        for mask in (None, causal):
            model(IDS, attention_mask=_mask())
            assert not attached.last_routing.active.all()
            model(IDS, attention_mask=mask)
            assert attached.last_routing.padding_mask is None and attached.last_routing.active.all()


def test_however_the_model_is_called() -> None:
    model, mask = tiny_native("mixtral"), _mask()
    with torch.no_grad(), attach_router(model):
        expected = _real_logits(model, mask)
        embeds = model.get_input_embeddings()(IDS)
        assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()], expected)
        trunk = model.model(IDS, mask).last_hidden_state  # by position, and without the head
        assert torch.equal(model.lm_head(trunk)[mask.bool()], expected)
        assert not _routers(model)[0].last_routing.active.all()
        block = moe_blocks(model)[0]
        for shape in ((2, 5, 32), (1, 3, 32)):  # a block by itself knows no padding
            block(torch.randn(shape))
            assert _routers(model)[0].last_routing.active.all()


@EVERY_FAMILY
def test_detaching_and_copying(family: str) -> None:
    model, mask = tiny_native(family), _mask()
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    _priced(model, family)
    twin = copy.deepcopy(model)
    expected = _real_logits(twin, mask)
    assert all(router.last_routing is None and router.padding_mask is None for router in _routers(model))
    detach_router(model)
    assert {name: len(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert torch.equal(_real_logits(twin, mask), expected)
    detach_router(twin)
    assert {name: len(module._forward_pre_hooks) for name, module in twin.named_modules()} == hooks
    assert torch.equal(_real_logits(twin, mask), _real_logits(model, mask))


# --- statistics, losses, swapping, adapting


@EVERY_FAMILY
def test_statistics_and_losses_leave_padding_out(family: str) -> None:
    """A padded batch counts and weighs what its sequences do, one after the other."""
    model, mask = tiny_native(family), _mask("right")
    with torch.no_grad(), attach_router(model) as attachment:
        name = attachment.matched[0]
        model(IDS, attention_mask=mask)
        padded = collect_routing(model)[name]
        stats = routing_stats(padded)
        parts = []
        for row, real in zip(IDS, mask.bool(), strict=True):
            model(row[real].unsqueeze(0))
            parts.append(collect_routing(model)[name])
    assert stats.tokens == int(mask.sum()) and stats.experts_per_token == 3
    assert torch.equal(padded.counts, sum(part.counts for part in parts))
    joined = type(padded)(*(torch.cat([getattr(p, f) for p in parts]) for f in padded.__slots__[:4]))
    expected = routing_stats(joined)
    for key, value in stats.as_dict().items():
        assert value == pytest.approx(getattr(expected, key), abs=1e-4), key
    terms = {"switch": 1.0, "z_loss": 1.0}
    torch.testing.assert_close(routing_loss([padded], terms), routing_loss([joined], terms), atol=1e-4, rtol=1e-4)


@EVERY_FAMILY
def test_another_router_goes_on_knowing_padding(family: str) -> None:
    model, mask = tiny_native(family), _mask()
    native = _real_logits(model, mask)
    with attach_router(model):
        replaced = set_router(model, "priced", price=PRICE.get(family, 0.2))
        priced = _real_logits(model, mask)
        for decision in collect_routing(model).values():
            assert not decision.active[~mask.bool().reshape(-1)].any()
            assert float(decision.counts.sum()) < 3 * int(mask.sum())
        set_router(model, replaced)
        assert torch.equal(_real_logits(model, mask), native)
    with _priced(model, family):
        assert torch.equal(_real_logits(model, mask), priced)


@pytest.mark.parametrize("router", ["topk", "priced"])
@EVERY_FAMILY
def test_gradients_reach_fast_weights_from_real_tokens_alone(family: str, router: str) -> None:
    model, mask = tiny_native(family), _mask()
    labels = torch.where(mask.bool(), IDS, -100)
    options = {"price": PRICE.get(family, 0.2)} if router == "priced" else {}
    with attach_router(model, router, **options):
        fast = []
        for attached in _routers(model):
            attached.router.fast = FastWeights(attached.hidden_dim, attached.num_experts)
            fast += list(attached.router.fast.parameters())
        found = []
        for ids in (IDS, torch.where(mask.bool(), IDS, 63 - IDS)):
            loss = model(ids, attention_mask=mask, labels=labels).loss
            found.append(torch.autograd.grad(loss, fast, materialize_grads=True))
        for a, b in zip(*found, strict=True):
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)
        assert any(bool(g.any()) for g in found[0])


@EVERY_FAMILY
def test_adapting_after_a_padded_batch(family: str) -> None:
    steps = []
    for padded_before in (False, True):
        model = tiny_native(family)
        with attach_router(model), RouterAdapter(model, lr=3e-2, anchor=1.0, bucket=None) as adapter:
            scores = []
            for _ in range(4):
                if padded_before:
                    _real_logits(model, _mask())
                scores.append(adapter.score_and_learn(IDS).sequence_nll)
            assert adapter.updates == 4
        steps.append(torch.stack(scores))
    assert torch.equal(*steps)
    assert float(steps[0][-1].sum()) < float(steps[0][0].sum())
