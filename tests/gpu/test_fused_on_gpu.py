"""Fused experts, compiled for the GPU: right in bfloat16, repeatable, never waiting for the host, traceable."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.moe import dispatch
from thermoe.moe.dispatch import choose_backend, plan_dispatch, run_experts, run_loop
from thermoe.moe.experts import Experts
from thermoe.moe.kernels import products, reference
from thermoe.moe.layer import MoELayer
from thermoe.routers.swap import build_router

_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _SM90, reason="needs an NVIDIA GPU of compute capability 9.0 or more"),
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
]

E, D, F = 16, 256, 192
FORMS: dict[str, dict[str, Any]] = {
    "gated silu": {"gated": True, "activation": "silu"},
    "gelu_new with bias": {"gated": False, "activation": "gelu_new", "up_bias": True},
    "gated gelu with bias": {"gated": True, "activation": "gelu", "up_bias": True},
    "relu": {"gated": False, "activation": "relu"},
}
ROUTES = {
    "distinct": lambda: torch.rand(500, E).argsort(-1)[:, :4],
    "sentinels": lambda: torch.where(torch.rand(500, 4) < 0.4, E, torch.randint(0, E, (500, 4))),
    "empty experts": lambda: 5 * torch.randint(0, 3, (300, 2)),
    "one expert takes all": lambda: torch.full((300, 2), 7),
    "all sentinels": lambda: torch.full((300, 2), E),
    "one slot": lambda: torch.randint(0, E, (700, 1)),
}


def _experts(form: str, dtype: torch.dtype = torch.float32) -> Experts:
    experts = Experts(E, D, F, **FORMS[form])
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.1)
    return experts.cuda().to(dtype)


def _inputs(route: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    ids = ROUTES[route]().cuda()
    weights = torch.where(ids < E, torch.rand(ids.shape, device="cuda") + 0.1, 0)
    return torch.randn(len(ids), D, device="cuda", dtype=dtype).requires_grad_(), ids, weights.requires_grad_()


def _gradients(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    found = torch.autograd.grad((out * probe).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def _exact(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> list[Tensor]:
    doubled = Experts(E, D, F, gated=experts.gated, activation=experts.activation, up_bias=experts.up_bias is not None)
    doubled = doubled.cuda().double()
    doubled.load_state_dict(experts.state_dict())
    x, weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    out = run_loop(x, ids, weights, doubled)
    wanted = [x, weights, *doubled.parameters()]
    return [out, *(_gradients(out, wanted) if out.requires_grad else [torch.zeros_like(w) for w in wanted])]


def _poison() -> None:
    """Leave NaN in the memory that the next call is given."""
    blocks = [torch.full((n,), float("nan"), device="cuda") for n in (1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22) * 6]
    del blocks


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "float32 weights"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference(form: str, route: str, how: str) -> None:
    experts = _experts(form, torch.bfloat16 if how == "bfloat16" else torch.float32)
    x, ids, weights = _inputs(route, torch.float32 if how == "autocast" else torch.bfloat16)
    # What is rounded on the way in is rounded for both: relu's gradient jumps where a tiny value changes its sign.
    rounded = copy.deepcopy(experts).bfloat16()
    expected = _exact(x.detach().bfloat16(), ids, weights, rounded)
    wanted = [x, weights, *experts.parameters()]
    _poison()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=how == "autocast"):
        out = run_experts(x, ids, weights, experts, backend="fused")
    _poison()
    found = [out, *_gradients(out, wanted)]
    for name, a, b, like in zip(
        ("out", "x", "weights", *dict(experts.named_parameters())), found, expected, [x, *wanted], strict=True
    ):
        assert a.dtype == like.dtype, name
        assert torch.isfinite(a).all(), name
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-6)
        assert float(error) < 1.5e-2, f"{name}: relative error {float(error):.2e}"
    assert (found[2][ids == E] == 0).all()
    assert (found[1][(ids == E).all(1)] == 0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", sorted(set(reference.ACTIVATIONS.values())))
def test_compiled_kernels_equal_their_reference(activation: str, gated: bool) -> None:
    from thermoe.moe.kernels import activation as kernels
    from thermoe.moe.kernels import rows

    for width, biased in ((8, True), (24, False), (768, True), (1024, False), (2056, True)):
        ids = ROUTES["sentinels"]().cuda()
        plan = plan_dispatch(ids.to(torch.int16), E)
        row = torch.empty_like(plan.order, dtype=torch.int32)
        row[plan.order] = torch.arange(row.numel(), dtype=torch.int32, device="cuda")
        row, live = row.view(ids.shape), int(plan.ends[-1])
        x = torch.randn(len(ids), width, device="cuda")
        assert torch.equal(
            rows.spread(x, row, plan.ends, torch.bfloat16), reference.spread(x, row, plan.ends, torch.bfloat16)
        )
        y = torch.randn(ids.numel(), width, device="cuda", dtype=torch.bfloat16)
        h = 3 * torch.randn(ids.numel(), width * (1 + gated), device="cuda", dtype=torch.bfloat16)
        for dead in (y, h):
            dead[live:] = float("nan")
        torch.testing.assert_close(
            rows.combine(y, row, plan.ends, torch.float32), reference.combine(y, row, plan.ends, torch.float32)
        )
        bias = torch.randn(E, h.shape[1], device="cuda", dtype=torch.bfloat16) if biased else None
        weight = torch.rand(ids.numel(), device="cuda")
        arguments = (h, bias, weight, plan.order, plan.expert, plan.ends, activation, gated)
        found = (kernels.activate(*arguments), *kernels.activate_backward(y, *arguments))
        wanted = (reference.activate(*arguments), *reference.activate_backward(y, *arguments))
        for a, b in zip(found[:3], wanted[:3], strict=True):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-2)  # one rounding to bfloat16
        torch.testing.assert_close(found[3], wanted[3], atol=1e-3, rtol=1e-4)
        assert (found[3][ids.flatten() == E] == 0).all()


def test_products_equal_their_reference() -> None:
    ids = ROUTES["empty experts"]().cuda()
    plan = plan_dispatch(ids, E)
    left, right, weight = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((600, D), (600, F), (E, D, F))
    )
    torch.testing.assert_close(
        products.grouped_product(left, weight, plan.ends),
        reference.grouped_product(left, weight, plan.ends),
        atol=0.1,
        rtol=2e-2,
    )
    outer = products.grouped_outer(left, right, plan.ends)
    torch.testing.assert_close(outer, reference.grouped_outer(left, right, plan.ends), atol=0.5, rtol=2e-2)
    assert (outer[1] == 0).all(), "an expert without rows"


def test_repeats_bit_for_bit() -> None:
    experts = _experts("gelu_new with bias")
    x, ids, weights = _inputs("sentinels", torch.bfloat16)
    wanted = [x, weights, *experts.parameters()]
    runs = []
    for _ in range(3):
        _poison()
        out = run_experts(x, ids, weights, experts, backend="fused")
        runs.append([out, *_gradients(out, wanted)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_forward_and_backward_never_wait_for_the_host() -> None:
    experts = _experts("gelu_new with bias")
    x, ids, weights = _inputs("sentinels", torch.bfloat16)
    probe = torch.randn_like(x)
    for mode in ("default", "error"):  # the first run compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run_experts(x, ids, weights, experts, backend="fused").backward(probe)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_equals_eager() -> None:
    experts = _experts("gated silu", torch.bfloat16)
    x, ids, weights = _inputs("sentinels", torch.bfloat16)
    with torch.no_grad():
        ids_in = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run_experts(x, ids_in, weights, experts, backend="fused")
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_experts(x, ids_in, weights, experts, backend="fused")
        for _ in range(3):
            ids_in.copy_(ROUTES["sentinels"]().cuda())
            graph.replay()
            assert torch.equal(captured, run_experts(x, ids_in, weights, experts, backend="fused"))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_compiles_as_one_graph_forward_and_backward(autocast: bool) -> None:
    torch.manual_seed(0)
    layer = MoELayer(build_router("topk", D, E, 4, {}), Experts(E, D, F), backend="fused").cuda()
    if not autocast:
        layer = layer.bfloat16()
    x = torch.randn(4, 256, D, device="cuda", dtype=torch.float32 if autocast else torch.bfloat16)
    probe = torch.randn_like(x)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            out = run(x)
        out.backward(probe)
        results.append([out.detach(), *(p.grad.clone() for p in layer.parameters())])
    for eager, compiled in zip(*results, strict=True):
        error = (eager.float() - compiled.float()).norm() / eager.float().norm()
        assert float(error) < 3e-2


def test_auto_is_fused_in_training_and_prefill() -> None:
    experts = _experts("gated silu")
    x, ids, _ = _inputs("distinct", torch.bfloat16)
    assert choose_backend(x, ids, experts) == "fused"
    assert choose_backend(x[:4], ids[:4], experts) == "grouped"
    assert choose_backend(x.float(), ids, experts) == "loop"
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert choose_backend(x.float(), ids, experts) == "fused"
    assert ids.numel() >= dispatch.FUSED_MIN_ROWS


def test_learns() -> None:
    """Steps on the same batch bring the loss down as far as grouped products do."""
    ends = {}
    for backend in ("grouped", "fused"):
        torch.manual_seed(0)
        layer = MoELayer(build_router("topk", D, E, 4, {}), Experts(E, D, F), backend=backend).cuda()
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
        x, target = torch.randn(1024, D, device="cuda"), torch.randn(1024, D, device="cuda")
        for _ in range(30):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = (layer(x) - target).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends[backend] = float(loss)
    assert ends["fused"] < 0.2
    assert ends["fused"] == pytest.approx(ends["grouped"], rel=0.2)
