"""The kernel of top-k and combine weights, in Triton's interpreter, against the PyTorch code."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.fused_count import count_experts
from thermoe.routers import base, fused_choice, priced, topk
from thermoe.routers.base import Router
from thermoe.routers.fused_choice import best, can_choose, choose_and_weigh
from thermoe.routers.fused_selection import select_by_distortion
from thermoe.routers.priced import PricedRouter
from thermoe.routers.swap import build_router
from thermoe.routers.topk import TopKRouter

D, E, K = 16, 24, 3
here = pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs the package triton, and with a GPU the kernel is compiled, see tests/gpu",
)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels run on the CPU, where they would on a GPU."""
    for module in (base, topk, priced):
        monkeypatch.setattr(module, "can_choose", lambda p, slots: not torch.is_grad_enabled() and slots <= 8)
    monkeypatch.setattr(priced, "can_fuse", lambda scores, groups, k_max: True)


def _router(name: str, options: dict[str, Any]) -> Router:
    router = build_router(name, D, E, K, options).eval()
    with torch.no_grad():
        for weight in router.parameters():
            weight.normal_(std=0.5)
    return router


def _routed(router: Router, x: Tensor, context: RoutingContext, *, fused: bool) -> RoutingDecision:
    """Route without a gradient, which the kernels want, or with one."""
    with torch.set_grad_enabled(not fused):
        return router(x, context)


COSTS: dict[str, Any] = {"price": 0.05, "open_cost": [1.0] * E}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "topk, probability": ("topk", {"gate": "probability"}),
    "topk, ramped": ("topk", {"gate": "ramped"}),
    "topk of shards": ("topk", {"group_size": 3}),
    "topk with a capacity": ("topk", {"eval_capacity_factor": 0.5}),
    "noisy topk": ("noisy_topk", {}),
    "null": ("null", {"num_identity": 2, "num_zero": 3}),
    "null, ramped": ("null", {"num_identity": 2, "num_zero": 3, "gate": "ramped"}),
    "oea": ("oea", {"k0": 1}),
    "top_p": ("top_p", {"theta": 0.3}),
    "priced by gate": ("priced", COSTS),
    "priced by distortion": ("priced", {**COSTS, "benefit": "distortion"}),
    "priced by distortion, ramped": ("priced", {**COSTS, "benefit": "distortion", "gate": "ramped", "k_min": 0}),
}


@here
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_router_answers_as_it_does_without_the_kernel(fused: None, case: str, dtype: torch.dtype) -> None:
    router = _router(*CASES[case])
    router.ramp.fill_(0.3)
    router.ramp = router.ramp.to(dtype)
    x = torch.randn(14, D).to(dtype)
    for context in (RoutingContext(14, 1), RoutingContext(2, 7, torch.rand(14) < 0.7)):
        mine, theirs = (_routed(router, x, context, fused=on) for on in (True, False))
        assert torch.equal(mine.expert_index, theirs.expert_index)
        assert not router.num_zero or (mine.weights[~mine.active & ~mine.identity] == 0).any()
        assert mine.weights.dtype == dtype and not mine.weights.requires_grad
        torch.testing.assert_close(mine.weights, theirs.weights, rtol=2e-7 if dtype == torch.float32 else 1e-3, atol=0)


@here
def test_the_kernel_is_what_ran(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noted(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(args[2] is None)  # whether the kernel ranks
        return choose_and_weigh(*args)

    monkeypatch.setattr(base, "choose_and_weigh", noted)
    x = torch.randn(6, D)
    for name, options in CASES.values():
        _routed(_router(name, options), x, RoutingContext(6, 1), fused=True)
    ranks = {"topk", "topk, probability", "topk, ramped", "noisy topk"}
    assert calls == [case in ranks for case in CASES]
    _routed(_router("topk", {}), x, RoutingContext(6, 1), fused=False)
    assert len(calls) == len(CASES)  # with a gradient it does not


@here
@pytest.mark.parametrize("benefit", ["gate", "distortion"])
@pytest.mark.parametrize("open_cost", [0.0, 1.0])
def test_price_zero_is_top_k_bit_for_bit_at_ties_too(fused: None, benefit: str, open_cost: float) -> None:
    router = PricedRouter(D, E, K, benefit=benefit, open_cost=[open_cost] * E).eval()  # type: ignore[arg-type]
    baseline = TopKRouter(D, E, K).eval()
    with torch.no_grad():
        router.weight.copy_(torch.randint(-1, 2, (E, D)))
    baseline.weight = router.weight
    x = torch.randint(-1, 2, (12, D)).float()
    for context in (RoutingContext(12, 1), RoutingContext(3, 4, torch.rand(12) < 0.7)):
        mine, theirs = (_routed(one, x, context, fused=True) for one in (router, baseline))
        ranked = theirs.logits.sort(dim=-1, descending=True).values
        assert (ranked[:, K - 1] == ranked[:, K]).any()  # ties there are
        assert torch.equal(mine.expert_index, theirs.expert_index) and torch.equal(mine.weights, theirs.weights)


@here
def test_equal_scores_go_by_number_and_what_is_no_number_comes_last() -> None:
    scores = torch.randint(0, 3, (5, 20)).float()
    scores[0], scores[1], scores[2, 2:], scores[3, ::2] = 0.0, torch.nan, torch.nan, -torch.inf
    ranked = torch.where(scores.isnan(), -torch.inf, scores).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(best(scores, 6), ranked[:, :6])


@here
def test_a_token_without_experts_has_no_weight() -> None:
    p = torch.softmax(torch.randn(3, E), -1)
    nothing = torch.full((3, K), E)
    for gate in ("renormalized", "probability", "ramped"):
        index, weights = choose_and_weigh(p, None, nothing, None, torch.zeros(()), K, gate, E, E, torch.float32)
        assert torch.equal(index, nothing) and (weights == 0).all()
    real = torch.tensor([True, False, True])
    index, weights = choose_and_weigh(p, p, None, real, torch.zeros(()), K, "renormalized", E, E, torch.float32)
    assert (index[1] == E).all() and (weights[1] == 0).all()
    torch.testing.assert_close(weights[real].sum(-1), torch.ones(2))


@here
def test_the_operators_say_what_they_return() -> None:
    """Shapes and dtypes under compilation are those of a run, and nothing that is given is written to."""
    p, ones, zero = torch.softmax(torch.randn(6, E), -1), torch.ones(E), torch.zeros(())
    checks: Any = {"test_utils": ("test_schema", "test_faketensor")}
    kind = zero, K, "renormalized", E, E, torch.float16
    torch.library.opcheck(choose_and_weigh, (p, p.log(), None, None, *kind), **checks)
    torch.library.opcheck(choose_and_weigh, (p, None, p.topk(K).indices, torch.ones(6) > 0, *kind), **checks)
    chosen = p, p.log(), None, None, zero, zero + 1, ones, ones, ones, 1, 1, K, True, False, 2.0
    torch.library.opcheck(select_by_distortion, chosen, **checks)
    torch.library.opcheck(count_experts, (p.topk(K).indices, E), **checks)


def test_the_kernel_takes_a_few_tokens_on_a_gpu_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_choice, "HAS_TRITON", True)
    with torch.no_grad():
        assert not can_choose(torch.zeros(16, 32), 4), "the CPU runs the PyTorch code"

    class OnGPU:
        is_cuda, dtype = True, torch.float32

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(fused_choice, "HAS_TRITON", False)
        assert not can_choose(OnGPU(16, 32), 8), "without Triton there is no kernel"  # type: ignore[arg-type]
    fits = {(16, 32): True, (1024, 256): True, (1025, 32): False, (16, 257): False, (0, 32): False}
    with torch.no_grad():
        for shape, expected in fits.items():
            assert can_choose(OnGPU(*shape), 8) == expected, shape  # type: ignore[arg-type]
        assert not can_choose(OnGPU(16, 32), 9)  # type: ignore[arg-type]
    assert not can_choose(OnGPU(16, 32), 4)  # type: ignore[arg-type]
