"""The kernel of the priced selection, compiled: as the PyTorch code, never waiting, in graphs, under compilation."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext
from thermoe.routers import priced as priced_module
from thermoe.routers.priced import PricedRouter
from thermoe.routers.topk import TopKRouter

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "routers"))
from selection_cases import SHAPES, cases, compare_near_ties, near_ties

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
]
LARGE = [(64, 1, 64, 8), (128, 1, 128, 8), (256, 1, 64, 4), (2, 1, 128, 1), (16, 40, 32, 4)]


def _router(experts: int = 32, top_k: int = 4, width: int = 256, **options: Any) -> PricedRouter:
    router = PricedRouter(width, experts, top_k, benefit="distortion", open_cost=[1.0] * experts, **options)
    with torch.no_grad():
        router.weight.normal_(std=2 * width**-0.5)
    return router.eval().cuda()


@pytest.mark.parametrize("shape", SHAPES[1:5:3] + LARGE[:1] + LARGE[-3:])  # each takes eight compilations
@torch.no_grad()
def test_the_kernel_chooses_as_the_pytorch_code_does(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums run in another order, so that a near tie may fall the other way: in at most one group of a hundred."""
    differ = tokens = 0
    for router, x, context in cases(shape, "cuda"):
        found = router(x, context).expert_index
        with monkeypatch.context() as patch:
            patch.setattr(priced_module, "can_fuse", lambda *_: False)
            expected = router(x, context).expert_index
        differ += int((found != expected).any(-1).sum())
        tokens += len(x)
    assert differ <= 0.01 * tokens


@torch.no_grad()
def test_differences_are_near_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups in which two experts each are worth the same but for rounding: whichever is closed costs the same."""
    case = near_ties("cuda")
    router, logits, context = case
    found = router.select(logits, logits.softmax(-1), context)
    monkeypatch.setattr(priced_module, "can_fuse", lambda *_: False)
    compare_near_ties(found, router.select(logits, logits.softmax(-1), context), case)


@torch.no_grad()
def test_a_large_batch_is_routed_as_several_of_the_served_size() -> None:
    router = _router(price=0.05, group_by_position=True)
    x = torch.randn(64, 8, 256, device="cuda")
    one = router(x.flatten(0, 1), RoutingContext(64, 8)).expert_index
    router.group_rows = 16
    several = router(x.flatten(0, 1), RoutingContext(64, 8)).expert_index.view(64, 8, -1)
    assert not torch.equal(one.view(64, 8, -1), several)
    for part in range(4):
        alone = router(x[part::4].flatten(0, 1), RoutingContext(16, 8)).expert_index
        assert torch.equal(several[part::4].flatten(0, 1), alone)


@torch.no_grad()
def test_it_never_waits_and_price_zero_is_the_baseline() -> None:
    router, x = _router(), torch.randn(16, 256, device="cuda")
    baseline = TopKRouter(256, 32, 4).eval().cuda()
    baseline.weight.copy_(router.weight)
    router(x, RoutingContext(16, 1))  # compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine = router(x, RoutingContext(16, 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    theirs = baseline(x, RoutingContext(16, 1))
    assert torch.equal(mine.expert_index, theirs.expert_index) and torch.equal(mine.weights, theirs.weights)


@torch.no_grad()
def test_a_captured_graph_follows_a_price_that_is_pushed_in() -> None:
    router, x = _router(), torch.randn(16, 256, device="cuda")
    context = RoutingContext(16, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            router(x, context)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opened: Tensor = router(x, context).opened
    seen = []
    for price in (0.0, 0.02, 0.1, 10.0):
        router.set_price(price)
        graph.replay()
        seen.append(int(opened.sum()))
        assert seen[-1] == int(router(x, context).opened.sum())
    assert seen == sorted(seen, reverse=True) and seen[0] > seen[1] > seen[-1] == 1


@torch.no_grad()
def test_it_compiles_without_a_break() -> None:
    router, x = _router(price=0.05), torch.randn(16, 256, device="cuda")

    def route(x: Tensor) -> tuple[Tensor, Tensor]:
        decision = router(x, RoutingContext(16, 1))
        return decision.expert_index, decision.weights

    compiled = torch.compile(route, fullgraph=True)(x)
    assert torch.equal(compiled[0], route(x)[0])
    torch.testing.assert_close(compiled[1], route(x)[1])
