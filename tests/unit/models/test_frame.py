"""The frame: equal parameters where claimed, and training with our block equals training with transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.models.frame import (
    SAME_WEIGHT,
    block_of,
    build_frame,
    copy_frame_weights,
    dense_width_of,
    native_aux_loss,
    native_routers,
)
from thermoe.moe.layer import collect_routing, moe_layers

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "sequence_length": 16,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "num_experts": 6,
    "top_k": 2,
    "expert_width": 24,
}
EPS = torch.finfo(torch.float32).eps


def _batch(step: int) -> Tensor:
    return torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(step))


def _pair(seed: int = 0) -> tuple[Any, Any]:
    ours, theirs = build_frame("moe", **TINY, seed=seed), build_frame("mixtral", **TINY, seed=seed + 1)
    copy_frame_weights(ours, theirs)
    return ours.train(), theirs.train()


def _paired_parameters(ours: nn.Module, theirs: nn.Module) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
    other = dict(theirs.named_parameters())
    found = []
    for name, parameter in ours.named_parameters():
        there = name
        for mine, native in SAME_WEIGHT:
            there = there.replace(mine, native)
        found.append((name, parameter, other.pop(there)))
    assert not other, "every weight of the one has its counterpart in the other"
    return found


def _hf_balance(model: nn.Module) -> Tensor:
    """HF's form on our decisions: layers pooled first, and summed over the K slots."""
    decisions = list(collect_routing(model).values())
    rows = sum(d.logits.shape[0] for d in decisions)
    load = torch.stack([d.counts for d in decisions]).sum(0) / rows
    probability = torch.stack([d.probabilities.sum(0) for d in decisions]).sum(0) / rows
    return decisions[0].num_experts * (load * probability).sum()


def test_first_step_chooses_the_same_experts_and_has_the_same_loss_and_gradients() -> None:
    ours, theirs = _pair()
    batch = _batch(0)
    losses = [model(batch, labels=batch).loss for model in (ours, theirs)]
    for decision, router in zip(collect_routing(ours).values(), native_routers(theirs), strict=True):
        torch.testing.assert_close(decision.expert_index, router.last_index, rtol=0, atol=0)
        torch.testing.assert_close(decision.logits, router.last_logits, rtol=0, atol=4 * EPS)
    torch.testing.assert_close(_hf_balance(ours), native_aux_loss(theirs), rtol=8 * EPS, atol=0)
    (losses[0] + 0.01 * _hf_balance(ours)).backward()
    (losses[1] + 0.01 * native_aux_loss(theirs)).backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=4 * EPS, atol=0)
    for name, mine, native in _paired_parameters(ours, theirs):
        assert mine.grad is not None and native.grad is not None and bool(mine.grad.abs().sum() > 0), name
        scale = float(native.grad.abs().max())
        torch.testing.assert_close(mine.grad, native.grad, rtol=0, atol=1e-5 * scale, msg=name)


def _train(model: Any, balance: Any, coefficient: float, steps: int = 30) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step in range(steps):
        batch = _batch(step % 3)  # few batches, so that the loss falls and the router moves
        loss = model(batch, labels=batch).loss
        losses.append(loss.item())
        total = loss if coefficient == 0 else loss + coefficient * balance(model)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("coefficient", [0.0, 0.02])
def test_thirty_steps_of_training_give_the_same_loss_curve(coefficient: float) -> None:
    """Measured over 30 steps: 5e-7 nats at most, one unit in the last place of a float32 of 4 nats.

    Sums are taken in another order, and AdamW divides by the root of tiny second moments, so rounding is the difference
    there is; a different choice of one expert for one token shows as 1e-4 and more.
    """
    ours, theirs = _pair()
    before = ours.transformer.h[0].mlp.router.weight.detach().clone()
    curve, native = _train(ours, _hf_balance, coefficient), _train(theirs, native_aux_loss, coefficient)
    assert curve[-1] < curve[0] - 0.3, "the comparison is of training, so there has to be some"
    assert (ours.transformer.h[0].mlp.router.weight - before).abs().max().item() > 1e-3
    assert max(abs(a - b) for a, b in zip(curve, native, strict=True)) < 1e-5
    if coefficient:
        assert max(abs(a - b) for a, b in zip(curve, _train(_pair()[0], _hf_balance, 0.0), strict=True)) > 1e-5


def test_other_weights_give_another_curve() -> None:
    """The tolerance of the parity test tells models apart."""
    curves = [_train(_pair(seed)[0], _hf_balance, 0.0, steps=3) for seed in (0, 10)]
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) > 1e-3


@pytest.mark.parametrize(("first", "second"), [("moe", "mixtral"), ("mixtral", "moe"), ("moe", "moe")])
def test_weights_go_over_in_both_directions(first: Any, second: Any) -> None:
    source, target = build_frame(first, **TINY).eval(), build_frame(second, **TINY, seed=5).eval()
    batch = _batch(1)
    with torch.no_grad():
        assert float((source(batch).logits - target(batch).logits).abs().max()) > 1e-2
        copy_frame_weights(source, target)
        torch.testing.assert_close(source(batch).logits, target(batch).logits, rtol=1e-5, atol=1e-6)


def test_between_moe_and_dense_the_frame_goes_over_and_the_network_stays() -> None:
    source, target = build_frame("moe", **TINY), build_frame("dense", **TINY, seed=5)
    before = target.transformer.h[0].mlp.c_fc.weight.clone()
    copy_frame_weights(source, target)
    torch.testing.assert_close(source.transformer.wte.weight, target.transformer.wte.weight)
    torch.testing.assert_close(before, target.transformer.h[0].mlp.c_fc.weight)


def test_copy_refuses_other_shapes_and_copies_nothing() -> None:
    source, target = build_frame("moe", **TINY), build_frame("mixtral", **{**TINY, "expert_width": 16}, seed=5)
    before = target.transformer.wte.weight.clone()
    with pytest.raises(ConfigError, match="differs in shape"):
        copy_frame_weights(source, target)
    torch.testing.assert_close(before, target.transformer.wte.weight)
    with pytest.raises(ConfigError, match="no GPT-2 frame"):
        copy_frame_weights(nn.Linear(2, 2), target)


def _matrices(model: nn.Module, place: str) -> int:
    return sum(
        p.numel() for name, p in model.named_parameters() if place in name and p.ndim > 1 and not name.endswith("bias")
    )


@pytest.mark.parametrize("gated", [True, False])
def test_dense_has_the_active_parameters_of_the_moe(gated: bool) -> None:
    moe, dense = build_frame("moe", **TINY, gated=gated), build_frame("dense", **TINY, gated=gated)
    experts = _matrices(moe, ".mlp.experts.") * TINY["top_k"] // TINY["num_experts"]
    assert _matrices(dense, ".mlp.") == experts
    shared = [sum(p.numel() for n, p in m.named_parameters() if ".mlp." not in n) for m in (moe, dense)]
    assert shared[0] == shared[1]
    assert dense_width_of(4, 768) == 4608


def test_blocks_are_what_they_say() -> None:
    for kind in ("moe", "dense", "mixtral"):
        assert block_of(build_frame(kind, **TINY)) == kind  # type: ignore[arg-type]
    moe = build_frame("moe", **TINY, router="topk", router_options={"temperature": 2.0})
    for _, layer in moe_layers(moe):
        assert layer.router.temperature == 2.0 and layer.router.capacity_factor is None
        assert layer.output_bias is None and layer.experts.up_bias is None and layer.experts.down_bias is None
    routers = list(native_routers(build_frame("mixtral", **TINY)))
    assert len(routers) == TINY["layers"] and len({id(r.weight) for r in routers}) == TINY["layers"]


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (build_frame("mixtral", **TINY, seed=s) for s in (3, 3, 4))
    torch.testing.assert_close(torch.get_rng_state(), state)
    a, b, c = (m.transformer.h[1].mlp.experts.down_proj for m in (first, again, other))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert 0.015 < float(a.std()) < 0.025 and not torch.equal(a, c)


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "thermoe"])
def test_a_mixtral_frame_is_saved_and_loaded_and_may_compute_its_experts_in_every_way(tmp_path: Any, how: str) -> None:
    reference = build_frame("mixtral", **TINY).eval()
    model = build_frame("mixtral", **TINY, native_experts=how).eval()
    batch = _batch(2)
    with torch.no_grad():
        before = reference(batch).logits
        torch.testing.assert_close(model(batch).logits, before, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.transformer.h[1].mlp.experts.config._experts_implementation == how
        torch.testing.assert_close(again(batch).logits, before, rtol=1e-5, atol=1e-6)


def test_frames_refuse_what_they_cannot_be() -> None:
    with pytest.raises(UnknownNameError, match="mixtrall"):
        build_frame("mixtrall", **TINY)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="grouped_m'"):
        build_frame("mixtral", **TINY, native_experts="grouped_m")
    with pytest.raises(ConfigError, match="router that Mixtral brings"):
        build_frame("mixtral", **TINY, router="priced")
    with pytest.raises(ConfigError, match=r"37\.5"):
        build_frame("dense", **{**TINY, "top_k": 1, "expert_width": 25})
    assert build_frame("dense", **{**TINY, "top_k": 1, "expert_width": 25}, dense_width=40).config.n_inner == 40
    with pytest.raises(ConfigError, match="heads"):
        build_frame("moe", **{**TINY, "heads": 5})
    with pytest.raises(ConfigError, match="after a forward"):
        native_aux_loss(build_frame("mixtral", **TINY))
    with pytest.raises(ConfigError, match="0 of 0 routers"):
        native_aux_loss(build_frame("moe", **TINY))
