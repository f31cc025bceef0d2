"""The layer as a drop-in for a feed-forward network, and the block around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoEBlock, MoELayer, collect_routing, moe_layers
from thermoe.moe.losses import DEFAULT_BALANCE, routing_loss
from thermoe.routers.priced import PricedRouter
from thermoe.routers.topk import TopKRouter

D, E, K, HIDDEN = 16, 8, 2, 24


def _layer(router: nn.Module | None = None, **settings: object) -> MoELayer:
    experts = Experts(E, D, HIDDEN, up_bias=True, down_bias=True)
    layer = MoELayer(router or TopKRouter(D, E, K), experts, output_bias=True, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer.eval()


class _Dense(nn.Module):
    """The network of one expert, written out."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        experts = layer.experts
        self.gate_up, self.gate_up_bias = experts.gate_up_proj[0], experts.up_bias[0]
        self.down, self.down_bias = experts.down_proj[0], experts.down_bias[0] + layer.output_bias

    def forward(self, x: Tensor) -> Tensor:
        gate, value = F.linear(x, self.gate_up, self.gate_up_bias).chunk(2, -1)
        return F.linear(F.silu(gate) * value, self.down, self.down_bias)


@pytest.mark.parametrize("backend", ["loop", "grouped", "dense"])
@pytest.mark.parametrize("top_k", [1, 2, 5, 8])
def test_identical_experts_with_renormalised_weights_are_the_dense_layer(top_k: int, backend: str) -> None:
    layer = _layer(TopKRouter(D, E, top_k, gate="renormalized"), backend=backend)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.randn(3, 7, D)
    torch.testing.assert_close(layer(x), _Dense(layer)(x), atol=1e-5, rtol=1e-5)


def test_identical_experts_with_unnormalised_weights_are_not_the_dense_layer() -> None:
    layer = _layer(TopKRouter(D, E, K, gate="probability"))
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = torch.randn(3, 7, D)
    assert not torch.allclose(layer(x), _Dense(layer)(x), atol=1e-2)


@pytest.mark.parametrize("shape", [(5, D), (2, 3, D), (1, 1, D), (0, D), (0, 4, D)])
def test_output_has_the_shape_of_the_input(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    out = _layer()(x)
    assert out.shape == x.shape and out.dtype == x.dtype


def test_two_and_three_dimensions_agree() -> None:
    layer, x = _layer(), torch.randn(2, 6, D)
    assert torch.equal(layer(x).view(12, D), layer(x.view(12, D)))


def test_equals_router_experts_and_bias_by_hand() -> None:
    layer, x = _layer(), torch.randn(6, D)
    decision = layer.router(x)
    everything = layer.experts.forward_all(x)
    expected = torch.stack(
        [
            sum(w * everything[e, t] for w, e in zip(decision.weights[t], decision.expert_index[t], strict=True))
            + layer.output_bias
            for t in range(6)
        ]
    )
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    layer, x = _layer(dropout=0.5), torch.randn(4, D)
    assert torch.equal(layer(x), layer(x))
    layer.train()
    dropped = layer(x) == 0
    assert 0.2 < dropped.float().mean() < 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out(dtype: torch.dtype) -> None:
    layer = _layer().to(dtype)
    assert layer(torch.randn(4, D, dtype=dtype)).dtype == dtype
    assert layer.last_routing is not None and layer.last_routing.logits.dtype == torch.float32


def test_the_decision_keeps_its_gradient_in_training_and_not_in_inference() -> None:
    layer, x = _layer().train(), torch.randn(4, D)
    layer(x)
    assert layer.last_routing is not None and layer.last_routing.logits.requires_grad
    with torch.no_grad():
        layer(x)
    assert not layer.last_routing.logits.requires_grad and not layer.last_routing.weights.requires_grad


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_layer_that_has_run_can_be_copied(copier: object) -> None:
    layer, x = _layer().train(), torch.randn(4, D)
    before = layer(x)
    layer.padding_mask = torch.ones(1, 4, dtype=torch.bool)
    twin = copier(layer)  # type: ignore[operator]
    assert twin.last_routing is None and twin.padding_mask is None
    assert layer.last_routing is not None, "copying leaves the original alone"
    assert torch.equal(twin(x), before)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


def test_every_parameter_learns() -> None:
    layer = _layer(TopKRouter(D, E, K)).train()
    layer(torch.randn(64, D)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("gate", ["renormalized", "probability", "ramped"])
@pytest.mark.parametrize("backend", ["loop", "grouped", "dense"])
def test_padding_opens_no_expert_and_changes_nothing_for_others(backend: str, gate: str) -> None:
    layer = _layer(TopKRouter(D, E, K, gate=gate), backend=backend)  # type: ignore[arg-type]
    x = torch.randn(3, 5, D)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    alone = layer(x[mask])
    opened = layer.last_routing.opened  # type: ignore[union-attr]
    layer.padding_mask = mask
    out = layer(torch.where(mask.unsqueeze(-1), x, torch.tensor(1e4)))
    routing = layer.last_routing
    assert routing is not None
    torch.testing.assert_close(out[mask], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(out[~mask], layer.output_bias.detach().expand(6, D)), "a padded token gets the bias alone"
    assert torch.equal(routing.opened, opened)
    assert float(routing.counts.sum()) == K * int(mask.sum())
    assert not routing.active[~mask.view(-1)].any()


def test_padding_has_no_share_in_the_losses() -> None:
    layer, x = _layer().train(), torch.randn(12, D)
    mask = torch.arange(12) >= 5
    layer(x[mask])
    terms = {"switch": 1.0, "load_std": 0.7, "entropy": 0.3, "z_loss": 0.1}
    alone = routing_loss([layer.last_routing], terms)  # type: ignore[list-item]
    layer.padding_mask = mask.unsqueeze(0)
    x[~mask] = 50.0
    layer(x)
    padded = routing_loss([layer.last_routing], terms)  # type: ignore[list-item]
    torch.testing.assert_close(padded, alone)
    (found,) = torch.autograd.grad(padded, layer.router.weight)
    layer.padding_mask = None
    layer(x[mask])
    (wanted,) = torch.autograd.grad(routing_loss([layer.last_routing], terms), layer.router.weight)  # type: ignore[arg-type,list-item]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("drop_order", ["position", "probability"])
def test_padding_takes_no_place_of_a_full_expert(drop_order: str) -> None:
    router = TopKRouter(D, E, 1, capacity_factor=1.0, drop_order=drop_order)  # type: ignore[arg-type]
    layer = _layer(router).train()
    x = torch.randn(1, D).expand(16, -1)  # all want the same expert, which holds ceil(16 / 8) = 2
    mask = torch.arange(16) >= 10
    layer.padding_mask = mask.unsqueeze(0)
    layer(x)
    kept = layer.last_routing.active[:, 0]  # type: ignore[union-attr]
    assert kept.nonzero().flatten().tolist() == [10, 11]


def test_a_mask_of_the_wrong_size_is_refused() -> None:
    layer = _layer()
    layer.padding_mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(RoutingError, match=r"\(2, 3\)") as error:
        layer(torch.randn(2, 4, D))
    assert error.value.where and error.value.accepted and error.value.fix


def test_the_layer_tells_the_router_about_its_call() -> None:
    contexts: list[RoutingContext] = []

    class Spy(TopKRouter):
        def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> RoutingDecision:
            assert context is not None
            contexts.append(context)
            return super().forward(x_TD, context)

    layer = _layer(Spy(D, E, K))
    layer(torch.randn(3, 4, D))
    layer(torch.randn(3, 1, D))
    layer(torch.randn(5, D))
    assert [(c.batch_size, c.sequence_length, c.is_decode) for c in contexts] == [
        (3, 4, False),
        (3, 1, True),
        (1, 5, False),
    ]


def test_block_is_norm_then_moe_then_residual() -> None:
    block = MoEBlock(_layer(), norm_eps=1e-3).eval()
    x = torch.randn(2, 5, D)
    out, metrics = block(x)
    assert torch.equal(out, x + block.moe(block.norm(x)))
    assert block.norm.eps == 1e-3
    assert metrics["routing"].expert_index.shape == (10, K)
    assert torch.equal(metrics["load"], metrics["routing"].counts)
    assert float(metrics["load"].sum()) == 10 * K
    assert int(metrics["distinct_experts"]) == int((metrics["load"] > 0).sum())
    expected = routing_loss([metrics["routing"]], DEFAULT_BALANCE)
    assert torch.equal(metrics["aux_loss"], expected)  # type: ignore[arg-type]


def test_a_block_whose_experts_are_zero_is_the_identity() -> None:
    block = MoEBlock(_layer()).eval()
    with torch.no_grad():
        for parameter in [*block.moe.experts.parameters(), block.moe.output_bias]:
            parameter.zero_()
    x = torch.randn(2, 5, D)
    assert torch.equal(block(x)[0], x)


def test_dropped_tokens_pass_on_the_residual_alone() -> None:
    layer = _layer(TopKRouter(D, E, 1, eval_capacity_factor=0.01))
    with torch.no_grad():
        layer.output_bias.zero_()
    block = MoEBlock(layer).eval()
    x = torch.randn(1, 1, D).expand(1, 9, D)
    out, metrics = block(x)
    assert int(metrics["load"].sum()) == 1
    assert torch.equal(out[0, 1:], x[0, 1:]) and not torch.equal(out[0, 0], x[0, 0])


def test_block_dropout_spares_the_residual() -> None:
    block = MoEBlock(_layer(), dropout=0.999).train()
    x = torch.randn(1, 3, D)
    out, _ = block(x)
    assert (out == x).float().mean() > 0.9


def test_block_without_balance_has_no_loss() -> None:
    block = MoEBlock(_layer(), balance={})
    assert block(torch.randn(1, 3, D))[1]["aux_loss"] is None
    with pytest.raises(ConfigError, match="unknown loss 'swich'"):
        MoEBlock(_layer(), balance={"swich": 1.0})


def test_block_of_no_tokens_has_a_finite_loss() -> None:
    out, metrics = MoEBlock(_layer())(torch.randn(0, 3, D))
    assert out.shape == (0, 3, D)
    assert torch.isfinite(metrics["aux_loss"])


def test_the_block_compiles_without_a_break() -> None:
    block = MoEBlock(_layer(PricedRouter(D, E, 4, price=0.1, open_cost=[1.0] * E))).eval()
    x = torch.randn(6, 1, D)
    with torch.no_grad():
        out, metrics = block(x)
        compiled, compiled_metrics = torch.compile(block, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, out, atol=1e-5, rtol=1e-5)
    assert torch.equal(compiled_metrics["load"], metrics["load"])


def test_layers_and_decisions_are_found_by_name() -> None:
    model = nn.Sequential(nn.Linear(D, D), _layer(), nn.Sequential(_layer()))
    assert [name for name, _ in moe_layers(model)] == ["1", "2.0"]
    assert collect_routing(model) == {}
    model(torch.randn(3, D))
    found = collect_routing(model)
    assert list(found) == ["1", "2.0"]
    assert found["1"] is model[1].last_routing


def test_decision_counts_opened_and_detach() -> None:
    index = torch.tensor([[0, 2], [2, 3], [3, 3]])
    logits = torch.zeros(3, 3, requires_grad=True)
    decision = RoutingDecision(logits, logits.softmax(-1), index, logits[:, :2] * 0)
    assert decision.num_experts == 3
    assert decision.counts.tolist() == [1, 0, 2]
    assert decision.opened.tolist() == [True, False, True]
    assert decision.active.tolist() == [[True, True], [True, False], [False, False]]
    free = decision.detach()
    assert not any(t.requires_grad for t in (free.logits, free.probabilities, free.weights))
    assert free.expert_index is index
