"""Zero-compute experts: they cost nothing, weigh nothing or the token itself, and are counted apart."""

from __future__ import annotations

import pytest
import torch

from thermoe.errors import ConfigError
from thermoe.moe.decision import RoutingContext
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer, moe_layers
from thermoe.moe.losses import LOSSES, routing_loss
from thermoe.moe.stats import routing_stats
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.null import NullRouter
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe

D, E, K = 16, 4, 2


def _router(**options: object) -> NullRouter:
    router = NullRouter(D, E, K, **options).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.null_weight.normal_(std=0.3)
    return router


def _layer(router: NullRouter, **settings: object) -> MoELayer:
    experts = Experts(E, D, 24, activation="silu", gated=True)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return MoELayer(router, experts, **settings).eval()  # type: ignore[arg-type]


def _prefer(router: NullRouter, column: int) -> None:
    """Let every token that sums to something positive want ``column`` most."""
    with torch.no_grad():
        row = router.weight[column] if column < E else router.null_weight[column - E]
        row.fill_(100.0)


@pytest.mark.parametrize("gate", ["renormalized", "probability", "ramped"])
@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_a_token_with_zero_experts_alone_gives_exactly_zero(gate: str, backend: str) -> None:
    router = _router(num_zero=2, gate=gate)
    layer = _layer(router, backend=backend)
    _prefer(router, E)
    _prefer(router, E + 1)
    x = torch.rand(5, D, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.zeros_like(y))
    (x + y).sum().backward()  # with the residual, as in a model
    decision = layer.last_routing
    assert decision is not None
    assert not decision.active.any() and decision.counts.sum() == 0 and not decision.opened.any()
    for parameter in (router.weight, router.null_weight):
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_a_token_with_the_identity_alone_gives_exactly_itself() -> None:
    router = _router(num_zero=0, num_identity=2)
    layer = _layer(router)
    _prefer(router, E)
    _prefer(router, E + 1)
    x = torch.rand(5, D)
    router.active_top_k = 1
    assert torch.equal(layer(x), x)
    router.active_top_k = None
    torch.testing.assert_close(layer(x), x)


def test_zero_experts_are_left_out_of_the_renormalisation() -> None:
    router = _router(num_zero=1)
    layer = _layer(router)
    x = torch.randn(200, D)
    decision = router(x)
    zero = decision.expert_index == E
    assert zero.any() and (decision.weights[zero] == 0).all()
    torch.testing.assert_close(decision.weights.sum(-1), torch.ones(200))
    p = decision.probabilities.gather(-1, decision.expert_index)
    alone = zero.any(-1)
    torch.testing.assert_close(decision.weights[~alone], p[~alone] / p[~alone].sum(-1, keepdim=True))
    one = decision.expert_index[alone].amin(-1)
    expected = layer.experts.forward_all(x)[one, alone.nonzero().flatten()]
    torch.testing.assert_close(layer(x)[alone], expected)


def test_an_identity_expert_weighs_like_any() -> None:
    router = _router(num_zero=1, num_identity=1)
    layer = _layer(router, output_bias=True)
    x = torch.randn(300, D)
    y, decision = layer(x), router(x)
    outputs = torch.cat((layer.experts.forward_all(x), x.unsqueeze(0), torch.zeros(1, 300, D)))
    p = decision.probabilities.scatter(1, torch.full((300, 1), E + 1), 0)
    for token in range(300):
        chosen = decision.expert_index[token]
        weights = p[token][chosen]
        expected = (weights / weights.sum().clamp(min=1e-30)) @ outputs[chosen, token]
        torch.testing.assert_close(y[token], expected, rtol=1e-4, atol=1e-5)


def test_only_experts_that_compute_are_counted() -> None:
    router = _router(num_zero=2, num_identity=1)
    decision = router(torch.randn(300, D))
    index = decision.expert_index
    assert decision.num_experts == E and decision.logits.shape == (300, E + 3)
    assert torch.equal(decision.active, index < E) and torch.equal(decision.identity, index == E)
    assert decision.counts.shape == (E,) and float(decision.counts.sum()) == float((index < E).sum()) < 300 * K
    stats = routing_stats(decision)
    assert stats is not None and len(stats.load) == E
    assert stats.experts_per_token == pytest.approx(float((index < E).sum()) / 300)
    ids, weights = decision.pairs()
    assert ids.max() == E and (weights[ids == E] == 0).all()
    detached = decision.detach()
    assert (detached.num_identity, detached.num_zero) == (1, 2) and not detached.weights.requires_grad


def test_padding_is_nobodys_identity() -> None:
    router = _router(num_zero=0, num_identity=1)
    layer = _layer(router)
    layer.padding_mask = torch.tensor([[True, False, True, False]])
    y = layer(torch.randn(1, 4, D))
    assert (y[0, 1] == 0).all() and (y[0, 3] == 0).all() and (y[0, 0] != 0).any()


def test_every_loss_sees_zero_compute_experts_as_experts() -> None:
    router = _router(num_zero=1, num_identity=1)
    decision = router(torch.randn(60, D))
    for name in LOSSES:
        loss = routing_loss([decision], {name: 1.0})
        assert loss is not None and torch.isfinite(loss)
    flat = decision.over_outputs()
    assert flat.num_experts == E + 2 and float(flat.counts.sum()) == 60 * K
    _prefer(router, E)
    collapsed = routing_loss([router(torch.rand(60, D))], {"switch": 1.0})
    even = routing_loss([decision], {"switch": 1.0})
    assert collapsed is not None and even is not None and collapsed > even


def test_a_swap_keeps_the_slow_weights_and_the_fast_ones() -> None:
    model = tiny_moe()
    ids = random_tokens(2, 8)
    for _, layer in moe_layers(model):
        layer.router.fast = FastWeights(32, 8)
        torch.nn.init.normal_(layer.router.fast.matrix, std=0.1)
    with torch.no_grad():
        before = model(ids).logits
        replaced = set_router(model, "null", num_zero=3)
        for name, layer in moe_layers(model):
            assert torch.equal(layer.router.weight, replaced[name].weight)
            assert layer.router.null_weight.shape == (3, 32) and layer.router.fast is replaced[name].fast
        nulled = model(ids).logits
        assert not torch.equal(nulled, before)
        routing = next(layer for _, layer in moe_layers(model)).last_routing
        assert routing is not None and 0 < float(routing.active.float().mean()) < 1
        set_router(model, "null", gate="probability")  # what it has learned beside the slow weights stays
        for _, layer in moe_layers(model):
            assert layer.router.num_zero == 3
        set_router(model, replaced)
        assert torch.equal(model(ids).logits, before)


def test_learned_rows_of_zero_compute_experts_are_handed_on() -> None:
    model = tiny_moe()
    old = set_router(model, "null", num_zero=2) and [layer.router.null_weight for _, layer in moe_layers(model)]
    set_router(model, "null", gate="probability")
    new = [layer.router.null_weight for _, layer in moe_layers(model)]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(old, new, strict=True))
    set_router(model, "null", num_zero=4)
    assert all(layer.router.null_weight.shape == (4, 32) for _, layer in moe_layers(model))


def test_without_zero_compute_experts_it_is_another_router() -> None:
    for options, match in (
        ({"num_zero": 0}, "both 0"),
        ({"num_zero": -1}, "num_zero is"),
        ({"num_zero": 1.5}, "num_zero is"),
        ({"num_identity": -1}, "num_ide"),
    ):
        with pytest.raises(ConfigError, match=match) as error:
            NullRouter(D, E, K, **options)  # type: ignore[arg-type]
        assert error.value.where and error.value.accepted and error.value.fix


def test_the_choice_between_one_expert_and_nothing_learns_with_the_gate_probability() -> None:
    """Renormalised, an expert beside nothing weighs 1 whatever the scores are; a probability tells the router more."""
    x = torch.randn(64, D)
    gradients = {}
    for gate in ("renormalized", "probability"):
        router = _router(num_zero=1, gate=gate)
        router.active_top_k = 1
        decision = router(x, RoutingContext(1, 64))
        (gradients[gate],) = torch.autograd.grad(decision.weights.sum(), router.null_weight)
    assert float(gradients["renormalized"].abs().max()) < 1e-5 < 1e-2 < float(gradients["probability"].abs().max())
