"""The kernels of top-k, combine weights and counts, compiled: as the PyTorch code, in graphs, under compilation."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext
from thermoe.moe.fused_count import can_count
from thermoe.routers.base import Router
from thermoe.routers.fused_choice import can_choose
from thermoe.routers.swap import build_router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
]
D = 128


def _router(name: str, experts: int, top_k: int, **options: Any) -> Router:
    torch.manual_seed(0)
    router = build_router(name, D, experts, top_k, options).eval()
    with torch.no_grad():
        router.weight.normal_(std=2 * D**-0.5)
        router.ramp.fill_(0.3)
    return router.cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", ["renormalized", "probability", "ramped"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 64, 8), (16, 32, 4), (33, 128, 8), (1024, 60, 3)])
def test_top_k_answers_as_it_does_without_the_kernel(
    tokens: int, experts: int, top_k: int, gate: str, dtype: torch.dtype
) -> None:
    router = _router("topk", experts, top_k, gate=gate).to(dtype)
    x = torch.randn(tokens, D, device="cuda", dtype=dtype)
    for mask in (None, torch.rand(tokens, device="cuda") < 0.7):
        theirs = router(x, RoutingContext(tokens, 1, mask))  # with a gradient: the PyTorch code
        with torch.no_grad():
            assert can_choose(theirs.probabilities, top_k)
            mine = router(x, RoutingContext(tokens, 1, mask))
        same = (mine.expert_index == theirs.expert_index).all(-1)
        tied = theirs.logits.sort(dim=-1).values.diff(dim=-1).eq(0).any(-1)
        assert (same | tied).all()
        close = {"rtol": 3e-7 if dtype == torch.float32 else 8e-3, "atol": 0.0}
        torch.testing.assert_close(mine.weights[same], theirs.weights[same].detach(), **close)


@pytest.mark.parametrize("benefit", ["gate", "distortion"])
@pytest.mark.parametrize("tokens", [1, 16, 200])
@torch.no_grad()
def test_price_zero_is_top_k_bit_for_bit_at_ties_too(benefit: str, tokens: int) -> None:
    for experts in (32, 64):
        router = _router("priced", experts, 4, benefit=benefit, open_cost=[1.0] * experts)
        baseline = _router("topk", experts, 4)
        router.weight.copy_(torch.randint(-1, 2, router.weight.shape))
        baseline.weight.copy_(router.weight)
        x = torch.randint(-1, 2, (tokens, D), device="cuda").float()
        mine, theirs = (one(x, RoutingContext(tokens, 1)) for one in (router, baseline))
        assert torch.equal(mine.expert_index, theirs.expert_index) and torch.equal(mine.weights, theirs.weights)


@torch.no_grad()
def test_counts_are_those_of_the_ids() -> None:
    router = _router("topk", 64, 8)
    for tokens in (1, 16, 1024, 2000):
        decision = router(torch.randn(tokens, D, device="cuda"), RoutingContext(tokens, 1))
        assert can_count(decision.expert_index) == (tokens <= 1024)
        expected = torch.bincount(decision.expert_index.flatten(), minlength=64).float()
        assert torch.equal(decision.counts, expected) and torch.equal(decision.opened, expected > 0)


@pytest.mark.parametrize("name", ["topk", "priced"])
@torch.no_grad()
def test_it_never_waits_and_is_captured_and_compiled(name: str) -> None:
    options = {"benefit": "distortion", "price": 0.02, "open_cost": [1.0] * 32} if name == "priced" else {}
    router = _router(name, 32, 4, **options)

    def route(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        decision = router(x, RoutingContext(16, 1))
        return decision.expert_index, decision.weights, decision.counts, decision.opened

    x = torch.randn(16, D, device="cuda")
    expected = route(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        route(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = route(x)
    graph.replay()
    compiled = torch.compile(route, fullgraph=True)(x)
    for found in (captured, compiled):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
        torch.testing.assert_close(found[1], expected[1])
