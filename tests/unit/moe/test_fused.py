"""Fused experts equal a naive loop over tokens in float64, in output and in every gradient, dead slots included.

On a CPU the algebra runs on the kernels' PyTorch reference; `test_kernels` holds the kernels to that, and with Triton
installed they also run here, in its interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.errors import ConfigError, MachineError, UnknownNameError
from thermoe.moe import dispatch, fused
from thermoe.moe.dispatch import BACKENDS, choose_backend, plan_dispatch, run_experts, run_loop
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer
from thermoe.routers.swap import build_router

T, E, K, D, F = 12, 5, 3, 16, 24
FORMS: dict[str, dict[str, Any]] = {
    "gated silu": {"gated": True, "activation": "silu"},
    "gated gelu with bias": {"gated": True, "activation": "gelu", "up_bias": True},
    "gelu_new with bias": {"gated": False, "activation": "gelu_new", "up_bias": True},
    "relu": {"gated": False, "activation": "relu"},
}
ROUTES = {
    "distinct": lambda: torch.rand(T, E).argsort(-1)[:, :K],
    "sentinels": lambda: torch.where(torch.rand(T, K) < 0.4, E, torch.randint(0, E, (T, K))),
    "empty experts": lambda: torch.randint(0, 2, (T, K)) * 3,
    "one expert takes all": lambda: torch.full((T, K), 4),
    "all sentinels": lambda: torch.full((T, K), E),
    "one slot": lambda: torch.randint(0, E, (T, 1)),
}


@pytest.fixture(params=["reference", "interpreter"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "interpreter":
        if find_spec("triton") is None:
            pytest.skip("needs the package triton")
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels are compiled, see tests/gpu")
        # Products that leave NaN in dead rows, as the memory behind `grouped_mm` may.
        kernels = replace(
            fused._triton(),
            grouped_product=fused.REFERENCE.grouped_product,
            grouped_outer=fused.REFERENCE.grouped_outer,
        )
        monkeypatch.setattr(fused, "kernels_for", lambda device: kernels)
    return request.param


def _experts(form: str, dtype: torch.dtype = torch.float32, width: int = F) -> Experts:
    experts = Experts(E, D, width, **FORMS[form]).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def _inputs(route: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = ROUTES[route]()
    weights = torch.where(ids < E, torch.rand(ids.shape, dtype=dtype) + 0.1, 0)
    return torch.randn(T, D, dtype=dtype).requires_grad_(), ids, weights.requires_grad_()


def _run(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    plan = plan_dispatch(ids.to(torch.int16), E)
    return fused.fused_experts(
        x,
        weights,
        experts.up_weight,
        experts.down_proj,
        experts.up_bias,
        plan.order,
        plan.expert,
        plan.ends,
        experts.activation,
    )


def _naive(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    rows = []
    for t in range(len(x)):
        row = 0 * x[t]
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e == E:
                continue
            up = experts.up_weight[e] @ x[t]
            if experts.up_bias is not None:
                up = up + experts.up_bias[e]
            if experts.gated:
                gate, value = up.split(experts.intermediate_size)
                hidden = experts.act_fn(gate) * value
            else:
                hidden = experts.act_fn(up)
            row = row + weights[t, k] * (experts.down_proj[e] @ hidden)
        rows.append(row)
    return torch.stack(rows)


def _gradients(out: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * probe).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_naive_loop(form: str, route: str, implementation: str) -> None:
    exact = _experts(form, torch.float64)
    x, ids, weights = _inputs(route, torch.float64)
    expected = _naive(x, ids, weights, exact)
    reference = _gradients(expected, [x, weights, *exact.parameters()])

    single = _experts(form)
    single.load_state_dict(exact.state_dict())
    x32, w32 = x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
    out = _run(x32, ids, w32, single)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)
    found = _gradients(out, [x32, w32, *single.parameters()])
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=1e-4)
    assert (found[1][ids == E] == 0).all()
    assert (found[0][(ids == E).all(1)] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    experts = Experts(3, 4, 3, **FORMS[form]).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    ids = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 1]])
    plan = plan_dispatch(ids, 3)
    weights = torch.where(ids < 3, torch.rand(ids.shape).double(), 0)
    bias = [experts.up_bias] if experts.up_bias is not None else []

    def run(x: Tensor, w: Tensor, up: Tensor, down: Tensor, *bias: Tensor) -> Tensor:
        one = bias[0] if bias else None
        return fused.fused_experts(x, w, up, down, one, plan.order, plan.expert, plan.ends, experts.activation)

    arguments = (torch.randn(4, 4).double(), weights, experts.up_weight, experts.down_proj, *bias)
    assert torch.autograd.gradcheck(run, tuple(a.detach().requires_grad_() for a in arguments))


def test_garbage_in_a_token_without_an_expert_stays_there(implementation: str) -> None:
    experts = _experts("gated silu")
    x, ids, weights = _inputs("sentinels")
    ids[[0, T - 1]] = E
    clean = _run(x, ids, weights, experts)
    with torch.no_grad():
        x[[0, T - 1]] = float("nan")
    out = _run(x, ids, weights, experts)
    assert torch.equal(out, clean)
    assert all(torch.isfinite(g).all() for g in _gradients(out, [x, weights, *experts.parameters()]))


def test_frozen_experts_and_inputs_get_no_gradient(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = _experts("gelu_new with bias")
    x, ids, weights = _inputs("sentinels")
    full = _gradients(_run(x, ids, weights, experts), [x, weights])
    kernels = replace(fused.kernels_for(x.device), grouped_outer=lambda *_: pytest.fail("a weight's gradient"))
    monkeypatch.setattr(fused, "kernels_for", lambda device: kernels)
    experts.requires_grad_(False)
    assert all(
        torch.equal(a, b) for a, b in zip(_gradients(_run(x, ids, weights, experts), [x, weights]), full, strict=True)
    )
    kernels = replace(kernels, combine=fused.REFERENCE.combine)
    out = _run(x.detach(), ids, weights, experts)
    calls: list[int] = []
    counted = replace(kernels, combine=lambda *a: (calls.append(1), kernels.combine(*a))[1])
    monkeypatch.setattr(fused, "kernels_for", lambda device: counted)
    assert torch.equal(_gradients(out, [weights])[0], full[1])
    assert not calls, "the gradient of x was computed"


def test_repeats_bit_for_bit(implementation: str) -> None:
    experts = _experts("gated gelu with bias")
    x, ids, weights = _inputs("sentinels")
    wanted = [x, weights, *experts.parameters()]
    first, second = (_run(x, ids, weights, experts) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(first, wanted), _gradients(second, wanted), strict=True))


def test_without_gradients_nothing_is_kept() -> None:
    experts = _experts("gated silu")
    x, ids, weights = _inputs("sentinels")
    with torch.no_grad():
        plain = _run(x, ids, weights, experts)
    assert torch.equal(plain, _run(x, ids, weights, experts))
    plan = plan_dispatch(ids, E)
    row = torch.empty(T * K, dtype=torch.int32)
    row[plan.order] = torch.arange(T * K, dtype=torch.int32)
    arguments = (x, weights.flatten(), experts.up_weight, experts.down_proj, None, plan.order, row.view(T, K))
    kept = torch.ops.thermoe.fused_experts(*arguments, plan.expert, plan.ends, "silu", False)[1:]
    assert [t.numel() for t in kept] == [0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_operators_keep_their_contract(form: str) -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    experts = _experts(form)
    x, ids, weights = _inputs("distinct")  # a dead row of h is NaN, which equals nothing
    plan = plan_dispatch(ids.to(torch.int16), E)
    row = torch.empty(T * K, dtype=torch.int32)
    row[plan.order] = torch.arange(T * K, dtype=torch.int32)
    weight = weights.detach().flatten().requires_grad_()
    kind = fused.reference.ACTIVATIONS[experts.activation]
    shared = (
        experts.up_weight,
        experts.down_proj,
        experts.up_bias,
        plan.order,
        row.view(T, K),
        plan.expert,
        plan.ends,
        kind,
    )
    torch.library.opcheck(torch.ops.thermoe.fused_experts.default, (x, weight, *shared, True))
    _, x_RD, h_RH = torch.ops.thermoe.fused_experts(x, weight, *shared, True)
    saved = [t.detach() for t in (torch.randn(T, D), x_RD, h_RH, weight, *shared[:2])]
    for all_wanted in (True, False):
        wanted = [all_wanted, True, all_wanted, all_wanted, all_wanted and experts.up_bias is not None]
        bias = None if experts.up_bias is None else experts.up_bias.detach()
        torch.library.opcheck(torch.ops.thermoe.fused_experts_backward.default, (*saved, bias, *shared[3:], wanted))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_forward_and_backward(dynamic: bool) -> None:
    experts = _experts("gated gelu with bias")
    compiled = torch.compile(_run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    x, ids, weights = _inputs("sentinels")
    wanted = [x, weights, *experts.parameters()]
    eager, traced = _run(x, ids, weights, experts), compiled(x, ids, weights, experts)
    assert torch.equal(eager, traced)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(eager, wanted), _gradients(traced, wanted), strict=True))


def test_half_precision_rows_of_float32_tokens() -> None:
    """As under autocast: tokens and output in float32, products in bfloat16, gradients in the dtype of their tensor."""
    experts = _experts("gated silu")
    x, ids, weights = _inputs("sentinels")
    plan = plan_dispatch(ids, E)
    up, down = experts.up_weight.bfloat16(), experts.down_proj.bfloat16()
    out = fused.fused_experts(x, weights, up, down, None, plan.order, plan.expert, plan.ends, "silu")
    exact = run_loop(x, ids, weights, experts)
    wanted = [x, weights, *experts.parameters()]
    assert out.dtype == torch.float32
    for a, b in zip([out, *_gradients(out, wanted)], [exact, *_gradients(exact, wanted)], strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() / b.abs().max() < 2e-2


def test_refused_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("this machine has such a GPU")
    x, ids, weights = _inputs("distinct")
    with pytest.raises(MachineError, match="no fused experts on cpu") as error:
        run_experts(x, ids, weights, _experts("gated silu"), backend="fused")
    assert error.value.where and error.value.accepted and error.value.fix


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_grouped_mm", lambda device: True)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "quick_gelu"}, "quick_gelu"),
        ({"down_bias": True}, "output bias"),
    ],
)
def test_experts_without_a_kernel(as_if_on_a_gpu: None, change: dict[str, Any], reason: str) -> None:
    experts = Experts(E, D, F, **change).bfloat16()
    x, ids, weights = _inputs("distinct")
    with pytest.raises(ConfigError, match=reason):
        run_experts(x.bfloat16(), ids, weights, experts, backend="fused")
    big = torch.zeros(dispatch.FUSED_MIN_ROWS, 1, dtype=torch.long)
    assert choose_backend(x.bfloat16(), big, experts) == "grouped"


def test_an_activation_of_its_own_is_not_fused() -> None:
    class Clamped(Experts):
        def activate(self, up: Tensor) -> Tensor:
            return super().activate(up.clamp(max=7))

    assert "Clamped" in str(fused.why_not_fused(Clamped(2, 8, 8)))
    assert fused.why_not_fused(Experts(2, 8, 8)) is None
    assert "multiple of 8" in str(fused.why_not_fused(Experts(2, 8, 12)))
    assert "1024 experts" in str(fused.why_not_fused(Experts(1024, 8, 8)))


def test_float32_outside_of_autocast_is_refused(as_if_on_a_gpu: None) -> None:
    x, ids, weights = _inputs("distinct")
    with pytest.raises(ConfigError, match="float32"):
        run_experts(x, ids, weights, _experts("gated silu"), backend="fused")


def test_auto_takes_fused_where_it_can(as_if_on_a_gpu: None) -> None:
    experts = _experts("gated silu")
    many = torch.zeros(dispatch.FUSED_MIN_ROWS // 4, 4, dtype=torch.long)
    x = torch.randn(len(many), D)
    assert choose_backend(x.bfloat16(), many, experts) == "fused"
    assert choose_backend(x.bfloat16()[:8], many[:8], experts) == "grouped"
    assert choose_backend(x, many, experts) == "loop"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert choose_backend(x, many, experts) == "fused"
    assert dispatch.default_backend(x.device, torch.bfloat16) == "fused"
    assert dispatch.default_backend(x.device, torch.float32) == "loop"


def test_auto_without_triton(as_if_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    many = torch.zeros(dispatch.FUSED_MIN_ROWS, 1, dtype=torch.long)
    assert choose_backend(torch.randn(len(many), D).bfloat16(), many, _experts("gated silu")) == "grouped"


def test_every_name_of_the_table_is_an_activation_of_transformers() -> None:
    x = torch.linspace(-6, 6, 201, dtype=torch.float64).requires_grad_()
    for name, kind in fused.reference.ACTIVATIONS.items():
        value, slope = fused.reference.value_and_slope(x, kind)
        expected = Experts(1, 1, 1, activation=name).act_fn(x)
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), x)[0], atol=1e-5, rtol=1e-5)


def test_grouped_follows_autocast() -> None:
    experts = _experts("gated silu")
    x, ids, weights = _inputs("sentinels")
    exact = run_loop(x, ids, weights, experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run_experts(x, ids, weights, experts, backend="grouped")
    assert out.dtype == torch.float32
    assert 1e-5 < (out - exact).abs().max() / exact.abs().max() < 2e-2


def test_a_backend_of_a_third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS._entries, "doubled", lambda x, ids, weights, experts: 2 * x)
    x, ids, weights = _inputs("distinct")
    assert torch.equal(run_experts(x, ids, weights, _experts("relu"), backend="doubled"), 2 * x)
    layer = MoELayer(build_router("topk", D, E, K, {}), _experts("relu"), backend="doubled")
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), 2 * x)


def test_a_layer_refuses_an_unknown_backend_when_it_is_made() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'fused'"):
        MoELayer(build_router("topk", D, E, K, {}), _experts("relu"), backend="fuse")
