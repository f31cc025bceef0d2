"""Attaching leaves a model's bits alone until a price or fast weights ask otherwise, and detaching undoes all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_native_experts import FAMILIES, SPECS, moe_blocks, tiny_native
from torch import Tensor, nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.models.attach import AttachedRouter, attach_router, detach_router
from thermoe.models.native_experts import IMPLEMENTATION
from thermoe.routers.base import ROUTERS
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.swap import set_router
from thermoe.testing import tiny_gpt2

IDS = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
#: A price at which some tokens use fewer experts in every family, by kind of score.
PRICE = {"deepseek_v3": 0.6}


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def _first(model: Any) -> AttachedRouter:
    return next(module for module in model.modules() if isinstance(module, AttachedRouter))


def _add_fast(model: nn.Module, std: float = 0.0) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, AttachedRouter):
            module.router.fast = FastWeights(module.hidden_dim, module.num_experts)
            parameters += module.router.fast.parameters()
    for parameter in parameters:
        nn.init.normal_(parameter, std=std)
    return parameters


def test_what_was_matched_is_counted_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_native("mixtral")
    attachment = attach_router(model, "priced", layers=[1])
    said = capsys.readouterr().out.strip()
    assert said == str(attachment) == f"PricedRouter attached to 1 of 2 MoE blocks: {attachment.matched[0]}"
    attachment.detach()
    attach_router(model, verbose=False)
    assert capsys.readouterr().out == ""


@EVERY_FAMILY
def test_attach_and_detach_leave_every_bit(family: str) -> None:
    model = tiny_native(family)
    before, modules, keys = _logits(model), list(model.named_modules()), list(model.state_dict())
    implementation = model.config._experts_implementation
    attachment = attach_router(model, "topk")
    assert len(attachment.matched) == 2 and all(name in dict(model.named_modules()) for name in attachment.matched)
    assert model.config._experts_implementation == IMPLEMENTATION
    assert torch.equal(_logits(model), before)
    assert all(attached.last_routing is not None for attached in attachment.routers.values())
    attachment.detach()
    attachment.detach()
    assert torch.equal(_logits(model), before)
    assert [(name, id(module)) for name, module in model.named_modules()] == [(n, id(m)) for n, m in modules]
    assert list(model.state_dict()) == keys
    assert model.config._experts_implementation == implementation
    assert not any(block._forward_pre_hooks for block in moe_blocks(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_FAMILY
def test_price_zero_and_fast_weights_of_zero_leave_every_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_native(family).to(dtype)
    with torch.no_grad():  # ties, and experts that underflow
        for block in moe_blocks(model):
            router = block.gate if hasattr(block, "gate") else block.router
            router.weight[1] = router.weight[0]
            router.weight[3] *= 40
    before = _logits(model)
    with attach_router(model, "priced", price=0.0, pair_cost=None) as attachment:
        assert torch.equal(_logits(model), before)
        _add_fast(model)
        assert torch.equal(_logits(model), before)
        for attached in attachment.routers.values():
            assert attached.last_routing.active.all()


@EVERY_FAMILY
def test_a_price_uses_fewer_experts_and_keeps_k_min(family: str) -> None:
    model = tiny_native(family)
    for k_min in (1, 2):
        with attach_router(model, "priced", price=PRICE.get(family, 0.2), k_min=k_min) as attachment:
            logits = _logits(model)
            for attached in attachment.routers.values():
                used = attached.last_routing.active.sum(-1)
                assert used.min() >= k_min and used.float().mean() < 3
                assert (attached.last_routing.weights[~attached.last_routing.active] == 0).all()
            assert torch.isfinite(logits).all()
    with attach_router(model, "priced", price=1e6, k_min=1) as attachment:
        _logits(model)
        assert all((attached.last_routing.active.sum(-1) == 1).all() for attached in attachment.routers.values())


def _reference_weights(family: str, base: Any, x: Tensor, chosen: list[int]) -> Tensor:
    """One token's combine weights, written down family by family."""
    z = base.weight.float() @ x
    if family == "gpt_oss":
        return torch.softmax((z + base.bias.float())[chosen], -1)
    if family == "deepseek_v3":
        s = z.sigmoid()[chosen]
        return 2.5 * s / s.sum()
    p = torch.softmax(z, -1)[chosen]
    return p / p.sum() if family in ("mixtral", "qwen3_moe") else p


@EVERY_FAMILY
def test_weights_and_choice_follow_the_family(family: str) -> None:
    model, price = tiny_native(family), PRICE.get(family, 0.2)
    with attach_router(model, "priced", price=price) as attachment:
        attached = attachment.routers[attachment.matched[0]]
        x = torch.randn(30, 32)
        attached(x)
        decision = attached.last_routing
        for token in range(30):
            chosen = decision.expert_index[token][decision.active[token]].tolist()
            weights = decision.weights[token][decision.active[token]]
            torch.testing.assert_close(weights, _reference_weights(family, attached.base, x[token], chosen))
            z = attached.base.weight @ x[token] + getattr(attached.base, "bias", torch.zeros(()))
            u = z.softmax(-1)
            if family == "deepseek_v3":
                u = z.sigmoid() + attached.e_score_correction_bias
                groups = u.view(4, 2).sum(-1).topk(2).indices.tolist()
                u = torch.tensor([v if e // 2 in groups else -1.0 for e, v in enumerate(u.tolist())])
            best = u.topk(3).indices.tolist()
            assert set(chosen) == {e for rank, e in enumerate(best) if rank == 0 or u[e] > price}


@pytest.mark.parametrize("captured_first", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek_v3"])
def test_recorded_logits_and_auxiliary_loss_stay(family: str, captured_first: bool) -> None:
    model = tiny_native(family)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        expected = plain(IDS, labels=IDS, output_router_logits=True)
        if captured_first:
            model(IDS, output_router_logits=True)
        attachment = attach_router(model)
        for _ in range(2):
            got = model(IDS, labels=IDS, output_router_logits=True)
            assert len(got.router_logits) == 2
            assert all(torch.equal(a, b) for a, b in zip(got.router_logits, expected.router_logits, strict=True))
            assert torch.equal(got.aux_loss, expected.aux_loss) and torch.equal(got.loss, expected.loss)
            attachment.detach()


@pytest.mark.parametrize(("router", "options"), [("topk", {}), ("priced", {"price": 0.2, "open_cost": [0.5] * 6})])
def test_generation_with_a_cache_equals_generation_without(router: str, options: dict[str, Any]) -> None:
    options = {**options, "batch_invariant": True} if options else options
    model = tiny_native("olmoe")
    with attach_router(model, router, **options):
        cached = model.generate(IDS, max_new_tokens=8, do_sample=False)
        again = model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(cached, again) and cached.shape == (3, 20)
        assert model.config._experts_implementation == IMPLEMENTATION


@EVERY_FAMILY
def test_every_family_generates(family: str) -> None:
    model = tiny_native(family)
    with attach_router(model, "priced", price=PRICE.get(family, 0.2)):
        cached = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
        assert torch.equal(cached, model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=False))


@EVERY_FAMILY
def test_opening_costs_act_where_each_sequence_brings_one_token(family: str) -> None:
    model = tiny_native(family)
    count = moe_blocks(model)[0].experts.num_experts
    with attach_router(model, "priced", price=0.1, pair_cost=[0.0] * count, open_cost=[30.0] * count) as attachment:
        attached = attachment.routers[attachment.matched[0]]
        _logits(model)
        prompt = int(attached.last_routing.opened.sum())
        _logits(model, IDS.reshape(-1, 1))
        assert int(attached.last_routing.opened.sum()) < prompt


@EVERY_FAMILY
def test_gradients_reach_fast_weights_alone(family: str) -> None:
    model = tiny_native(family)
    with attach_router(model, "priced", price=PRICE.get(family, 0.2)):
        fast = _add_fast(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in fast:
            parameter.requires_grad_(True)
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fast)
        assert any(p.grad.any() for p in fast)
        assert all(p.grad is None for p in model.parameters() if not any(p is f for f in fast))


@EVERY_FAMILY
def test_training_through_an_attached_router_is_training_the_model(family: str) -> None:
    model = tiny_native(family)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(
        model(IDS, labels=IDS).loss, [model.get_parameter(n) for n in names], allow_unused=True
    )
    parameters = [model.get_parameter(n) for n in names]
    with attach_router(model):
        assert {id(p) for p in model.parameters()} >= {id(p) for p in parameters}
        assert len(list(model.parameters())) == len(list(copy.deepcopy(model).parameters())) == len(names)
        for fast in (False, True):
            if fast:
                _add_fast(model)
            got = torch.autograd.grad(model(IDS, labels=IDS).loss, parameters, allow_unused=True)
            for a, b in zip(got, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


@EVERY_FAMILY
def test_an_expert_that_is_never_chosen_costs_nothing(family: str) -> None:
    model = tiny_native(family)
    with attach_router(model, "priced", price=PRICE.get(family, 0.2), k_min=1) as attachment:
        before = _logits(model, IDS[:1, :2])
        idle = [~attached.last_routing.opened for attached in attachment.routers.values()]
        assert all(mask.any() for mask in idle)
        with torch.no_grad():
            for block, mask in zip(moe_blocks(model), idle, strict=True):
                for parameter in block.experts.parameters():
                    parameter[mask] = float("nan")
        assert torch.equal(_logits(model, IDS[:1, :2]), before)


@EVERY_FAMILY
def test_a_model_saved_while_attached_is_the_plain_model(family: str, tmp_path: Path) -> None:
    model = tiny_native(family)
    before, keys = _logits(model), list(model.state_dict())
    with attach_router(model, "priced", price=PRICE.get(family, 0.2)):
        _add_fast(model, std=1.0)
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    loaded = SPECS[family][0].from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == keys
    assert loaded.config._experts_implementation == "grouped_mm"
    assert torch.equal(_logits(loaded.eval()), before)


def test_a_plain_state_loads_while_attached() -> None:
    model, other = tiny_native("deepseek_v3"), tiny_native("deepseek_v3")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    with attach_router(model, "priced", price=0.5):
        attached = _first(model)
        attached.router.fast = FastWeights(32, 8)
        fast = attached.router.fast
        nn.init.ones_(fast.delta)
        model.load_state_dict(other.state_dict(), strict=True)
        assert float(attached.router.price) == 0.5 and fast.delta.eq(1).all()
        assert attached.router.weight is attached.base.weight
    assert torch.equal(_logits(model), _logits(other))
    with attach_router(model), pytest.raises(RuntimeError, match="Unexpected"):
        model.load_state_dict({**other.state_dict(), "model.layers.0.mlp.gate.nonsense": torch.zeros(1)})


def test_attached_routers_read_like_the_routers_they_replace() -> None:
    model = tiny_native("deepseek_v3")
    attached = _first(attach_router(model).model)
    assert (attached.num_experts, attached.top_k, attached.hidden_dim) == (8, 3, 32)
    assert attached.weight is attached.base.weight
    assert attached.e_score_correction_bias is attached.base.e_score_correction_bias
    assert not hasattr(attached, "_hf_hook") and not hasattr(attached, "nonsense")


def test_copies_are_attached_on_their_own() -> None:
    model = tiny_native("mixtral")
    before = _logits(model)
    attach_router(model, "priced", price=0.2)
    priced = _logits(model)
    twin = copy.deepcopy(model)
    assert _first(twin).router.weight is _first(twin).base.weight is not _first(model).base.weight
    detach_router(model)
    assert torch.equal(_logits(model), before) and torch.equal(_logits(twin), priced)
    detach_router(twin)
    assert torch.equal(_logits(twin), before)


#: What cannot choose for a model's own router, by the kind of its scores, and a word of the reason.
REFUSED = {
    "softmax": {"hash": "token ids", "noisy_topk": "noise", "null": "no scores"},
    "sigmoid": {"sigmoid_bias": "already", "threshold": "probabilities"},
}


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_registered_router_attaches_or_says_why_not(name: str) -> None:
    model = tiny_native("qwen3_moe")
    if name in REFUSED["softmax"]:
        before = _logits(model)
        with pytest.raises(RoutingError, match=REFUSED["softmax"][name]) as caught:
            attach_router(model, name)
        assert "topk" in str(caught.value.accepted) and caught.value.fix and "gate" in str(caught.value.where)
        with attach_router(model) as attachment:  # and by exchange
            routers = [attached.router for attached in attachment.routers.values()]
            with pytest.raises(RoutingError, match=REFUSED["softmax"][name]):
                set_router(model, name)
            assert [attached.router for attached in attachment.routers.values()] == routers
        assert torch.equal(_logits(model), before)
        return
    state = torch.random.get_rng_state()
    with attach_router(model, name) as attachment:
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.isfinite(_logits(model)).all()
        decision = attachment.routers[attachment.matched[0]].last_routing
        torch.testing.assert_close(decision.weights.sum(-1), torch.ones(36))


@pytest.mark.parametrize("name", sorted({**REFUSED["softmax"], **REFUSED["sigmoid"]}))
def test_a_model_of_sigmoid_scores_refuses_more(name: str) -> None:
    reasons = {**REFUSED["softmax"], **REFUSED["sigmoid"]}
    with pytest.raises(RoutingError, match=reasons[name]):
        attach_router(tiny_native("deepseek_v3"), name)


@EVERY_FAMILY
def test_an_attached_top_p_takes_fewer_experts_the_lower_theta_is(family: str) -> None:
    model, used = tiny_native(family), []
    for theta in (1.0, 0.5, 0.0):
        with attach_router(model, "top_p", theta=theta) as attachment:
            logits = _logits(model)
            assert torch.isfinite(logits).all()
            used.append(float(attachment.routers[attachment.matched[0]].last_routing.active.sum()) / 36)
    assert used[0] == 3 > used[1] > used[2] == 1


@EVERY_FAMILY
def test_an_attached_oea_keeps_prompts_and_saves_at_decode(family: str) -> None:
    model = tiny_native(family)
    before = _logits(model)
    with attach_router(model, "oea", k0=1) as attachment:
        assert torch.equal(_logits(model), before)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        decision = attachment.routers[attachment.matched[0]].last_routing
        assert decision.expert_index.shape == (3, 3)
        assert decision.opened.sum() <= 3 and decision.active.any(-1).all()


@EVERY_FAMILY
def test_an_attached_fixed_choice_is_weighed_as_the_family_does(family: str) -> None:
    model = tiny_native(family)
    with attach_router(model, "fixed", experts=[5, 1]) as attachment:
        attached = attachment.routers[attachment.matched[0]]
        x = torch.randn(4, 32)
        attached(x)
        decision = attached.last_routing
        assert torch.equal(decision.expert_index, torch.tensor([[5, 1]]).expand(4, -1))
        for token in range(4):
            expected = _reference_weights(family, attached.base, x[token], [5, 1])
            torch.testing.assert_close(decision.weights[token], expected)
        assert torch.isfinite(_logits(model)).all()


def test_an_attached_balance_adapts_between_steps() -> None:
    model = tiny_native("mixtral")
    before = _logits(model)
    with attach_router(model, "sigmoid_bias", gamma=0.5) as attachment:
        assert torch.equal(_logits(model), before)
        for attached in attachment.routers.values():
            attached.router.observe(attached.last_routing)
            attached.router.after_step()
        assert not torch.equal(_logits(model), before)
    assert torch.equal(_logits(model), before)


def test_options_capacity_and_fewer_experts() -> None:
    model = tiny_native("mixtral")
    with attach_router(model, "topk", top_k=2, eval_capacity_factor=0.5) as attachment:
        assert torch.isfinite(_logits(model)).all()
        decision = attachment.routers[attachment.matched[1]].last_routing
        assert decision.expert_index.shape == (36, 2) and decision.counts.max() <= 6 < decision.counts.sum()


def test_chosen_layers() -> None:
    model = tiny_native("olmoe")
    with attach_router(model, layers=[1]) as attachment:
        assert attachment.matched == ("model.layers.1.mlp.gate",)
        assert torch.isfinite(_logits(model)).all()
    with attach_router(model, layers=["model.layers.0.mlp.gate"]) as attachment:
        assert attachment.matched == ("model.layers.0.mlp.gate",)
    for wrong in (2, -1, "model.layers.0"):
        with pytest.raises(ConfigError, match="no MoE block"):
            attach_router(model, layers=[wrong])


def test_a_changed_experts_implementation_is_refused() -> None:
    model = tiny_native("olmoe")
    attach_router(model, "priced", price=0.2)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(RoutingError, match="experts implementation was changed"):
        _logits(model)
    detach_router(model)
    assert torch.isfinite(_logits(model)).all()


def test_errors_say_what_was_looked_for() -> None:
    dense = tiny_gpt2()
    with pytest.raises(RoutingError) as caught:
        attach_router(dense)
    assert caught.value.where == "GPT2LMHeadModel"
    assert "gate or a router" in caught.value.what
    assert "Mixtral" in str(caught.value.accepted) and "convert_to_moe" in str(caught.value.fix)
    with pytest.raises(RoutingError, match="no attached router"):
        detach_router(dense)

    model = tiny_native("olmoe")
    with pytest.raises(UnknownNameError, match="prised"):
        attach_router(model, "prised")
    with pytest.raises(ConfigError, match="gate was given"):
        attach_router(model, gate="probability")
    with pytest.raises(ConfigError, match="cannot be built"):
        attach_router(model, cost=1)
    assert not any(isinstance(module, AttachedRouter) for module in model.modules())
    attach_router(model)
    with pytest.raises(RoutingError, match="attached already"):
        attach_router(model)


def test_routers_without_the_contract_are_refused() -> None:
    config = SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        num_experts=4,
        num_sparse_encoder_layers=1,
    )
    with pytest.raises(RoutingError, match="experts interface") as caught:
        attach_router(SwitchTransformersForConditionalGeneration(config))
    assert "router" in str(caught.value.where)


def test_unknown_scores_are_refused() -> None:
    class Cubed(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.weight, self.top_k = base.weight, base.top_k

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = x @ self.weight.T
            weights, index = (logits**3).topk(self.top_k, -1)
            return logits, weights, index

    model = tiny_native("mixtral")
    block = moe_blocks(model)[1]
    block.gate = Cubed(block.gate)
    with pytest.raises(RoutingError, match="weigh its experts"):
        attach_router(model)
    block.gate.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RoutingError, match=r"\(logits, weights, ids\)"):
        attach_router(model)
