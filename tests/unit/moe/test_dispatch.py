"""Every backend equals a naive loop over tokens in float64, in output and in every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.moe.dispatch import plan_dispatch, run_dense, run_experts, run_grouped, run_loop
from thermoe.moe.experts import Experts

T, E, K, D, F = 12, 5, 3, 16, 8
BACKENDS = {"loop": run_loop, "grouped": run_grouped, "dense": run_dense}
FORMS: dict[str, dict[str, Any]] = {
    "gated": {"gated": True, "activation": "silu"},
    "ungated": {"gated": False, "activation": "gelu_new"},
    "gated with biases": {"gated": True, "activation": "silu", "up_bias": True, "down_bias": True},
    "ungated with biases": {"gated": False, "activation": "gelu_new", "up_bias": True, "down_bias": True},
}


def _random_ids() -> Tensor:
    return torch.rand(T, E).argsort(-1)[:, :K]


def _some_sentinels() -> Tensor:
    ids = _random_ids()
    ids[torch.rand(T, K) < 0.4] = E
    return ids


ROUTES: dict[str, Callable[[], Tensor]] = {
    "distinct experts": _random_ids,
    "sentinels": _some_sentinels,
    "duplicate ids": lambda: torch.randint(0, E + 1, (T, K)).index_fill(1, torch.tensor([1]), 2),
    "empty experts": lambda: torch.randint(0, 2, (T, K)) * 3,
    "one expert takes all": lambda: torch.full((T, K), 4),
    "all sentinels": lambda: torch.full((T, K), E),
    "a row of sentinels": lambda: _random_ids().index_fill(0, torch.tensor([0, T - 1]), E),
    "more slots than experts": lambda: torch.randint(0, E, (T, E + 2)),
    "one slot": lambda: torch.randint(0, E, (T, 1)),
}


def _experts(form: str, dtype: torch.dtype = torch.float32) -> Experts:
    experts = Experts(E, D, F, **FORMS[form]).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def _inputs(route: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = ROUTES[route]()
    weights = torch.where(ids < E, torch.rand(ids.shape, dtype=dtype) + 0.1, torch.zeros((), dtype=dtype))
    return torch.randn(T, D, dtype=dtype).requires_grad_(), ids, weights.requires_grad_()


def _naive(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """One token and one slot at a time."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e == experts.num_experts:
                continue
            up = experts.up_weight[e] @ x[t]
            if experts.up_bias is not None:
                up = up + experts.up_bias[e]
            if experts.gated:
                gate, value = up[:F], up[F:]
                hidden = gate * torch.sigmoid(gate) * value
            else:
                hidden = torch.nn.functional.gelu(up, approximate="tanh")
            down = experts.down_proj[e] @ hidden
            if experts.down_bias is not None:
                down = down + experts.down_bias[e]
            row = row + weights[t, k] * down
        rows.append(row)
    return torch.stack(rows)


def _gradients(out: Tensor, x: Tensor, weights: Tensor, experts: Experts) -> list[Tensor]:
    wanted = [x, weights, *experts.parameters()]
    if not out.requires_grad:  # nothing was computed, so nothing has a gradient
        return [torch.zeros_like(w) for w in wanted]
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * probe).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_equals_the_naive_loop(backend: str, form: str, route: str) -> None:
    experts = _experts(form, torch.float64)
    x, ids, weights = _inputs(route, torch.float64)
    expected = _naive(x, ids, weights, experts)
    reference = _gradients(expected, x, weights, experts)

    single = _experts(form)
    single.load_state_dict(experts.state_dict())
    x32, w32 = x.detach().float().requires_grad_(), weights.detach().float().requires_grad_()
    out = BACKENDS[backend](x32, ids, w32, single)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)
    for found, wanted in zip(_gradients(out, x32, w32, single), reference, strict=True):
        torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_backend_equals_the_naive_loop_in_float64(backend: str) -> None:
    experts = _experts("gated with biases", torch.float64)
    x, ids, weights = _inputs("sentinels", torch.float64)
    out = BACKENDS[backend](x, ids, weights, experts)
    torch.testing.assert_close(out, _naive(x, ids, weights, experts), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", ["gated", "ungated with biases"])
@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_gradcheck(backend: str, form: str) -> None:
    experts = Experts(3, 4, 2, **FORMS[form]).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    ids = torch.tensor([[0, 1], [2, 3], [3, 3], [1, 1]])
    weights = torch.where(ids < 3, torch.rand(ids.shape).double(), 0)
    names, values = zip(*experts.named_parameters(), strict=True)

    def run(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
        class _Call(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.experts = experts

            def forward(self, x: Tensor, w: Tensor) -> Tensor:
                return BACKENDS[backend](x, ids, w, self.experts)

        state = {f"experts.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(_Call(), state, (x, w))

    arguments = (torch.randn(4, 4).double(), weights, *(v.detach().clone() for v in values))
    assert torch.autograd.gradcheck(run, tuple(a.requires_grad_() for a in arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_slots_get_exactly_no_gradient(backend: str) -> None:
    experts = _experts("gated")
    x, ids, weights = _inputs("sentinels")
    grad_x, grad_w, *_ = _gradients(BACKENDS[backend](x, ids, weights, experts), x, weights, experts)
    assert (grad_w[ids == E] == 0).all()
    assert (grad_w[ids < E] != 0).all()
    assert (grad_x[(ids == E).all(-1)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit(backend: str) -> None:
    experts = _experts("gated with biases")
    x, ids, weights = _inputs("duplicate ids")
    first = BACKENDS[backend](x, ids, weights, experts)
    second = BACKENDS[backend](x, ids, weights, experts)
    assert torch.equal(first, second)
    for a, b in zip(_gradients(first, x, weights, experts), _gradients(second, x, weights, experts), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_permuted_batch_gives_permuted_outputs(backend: str) -> None:
    experts = _experts("ungated with biases")
    x, ids, weights = _inputs("sentinels")
    order = torch.randperm(T)
    straight = BACKENDS[backend](x, ids, weights, experts)
    permuted = BACKENDS[backend](x[order], ids[order], weights[order], experts)
    torch.testing.assert_close(permuted, straight[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_no_tokens_and_no_slots(backend: str) -> None:
    experts = _experts("gated with biases")
    empty = run_experts(
        torch.randn(0, D), torch.zeros(0, K, dtype=torch.long), torch.zeros(0, K), experts, backend=backend
    )
    assert empty.shape == (0, D)
    no_slots = run_experts(
        torch.randn(T, D), torch.zeros(T, 0, dtype=torch.long), torch.zeros(T, 0), experts, backend=backend
    )
    assert torch.equal(no_slots, torch.zeros(T, D))


def test_all_sentinels_cost_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = _experts("gated")
    x, ids, weights = _inputs("all sentinels")
    monkeypatch.setattr(Experts, "activate", lambda *_: pytest.fail("an expert was computed"))
    assert torch.equal(run_loop(x, ids, weights, experts), torch.zeros(T, D))


def test_only_live_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = _experts("gated")
    x, ids, weights = _inputs("sentinels")
    seen: list[int] = []
    activate = Experts.activate
    monkeypatch.setattr(Experts, "activate", lambda self, up: (seen.append(len(up)), activate(self, up))[1])
    run_loop(x, ids, weights, experts)
    counts = torch.bincount(ids.flatten(), minlength=E + 1)[:E]
    assert seen == [n for n in counts.tolist() if n]


def test_garbage_in_uncomputed_rows_does_not_reach_the_output() -> None:
    experts = _experts("gated with biases")
    x, ids, weights = _inputs("a row of sentinels")
    clean = run_experts(x, ids, weights, experts)
    with torch.no_grad():
        poisoned = x.clone()
        poisoned[[0, T - 1]] = float("nan")
    for backend in ("loop", "grouped"):
        out = run_experts(poisoned, ids, weights, experts, backend=backend)
        assert torch.isfinite(out).all(), backend
        torch.testing.assert_close(out, clean, atol=1e-5, rtol=1e-5)


def test_bfloat16_sums_in_float32() -> None:
    experts = _experts("gated", torch.bfloat16)
    x, ids, weights = _inputs("distinct experts", torch.bfloat16)
    out = run_loop(x, ids, weights, experts)
    assert out.dtype == torch.bfloat16
    doubled = _experts("gated", torch.float64)
    doubled.load_state_dict(experts.state_dict())
    exact = _naive(x.double(), ids, weights.double(), doubled)
    scale = exact.abs().max()
    assert (out.double() - exact).abs().max() / scale < 2e-2


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_float32_weights_on_a_half_precision_model(backend: str) -> None:
    """Combine weights may be more precise than the activations."""
    experts = _experts("gated", torch.bfloat16)
    x, ids, weights = _inputs("distinct experts", torch.bfloat16)
    assert run_experts(x, ids, weights.float(), experts, backend=backend).dtype == torch.bfloat16


def test_compiles_without_a_break() -> None:
    experts = _experts("gated with biases")
    x, ids, weights = _inputs("sentinels")
    compiled = torch.compile(run_experts, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, ids, weights, experts), run_experts(x, ids, weights, experts), atol=1e-5, rtol=1e-5
    )


@given(
    st.integers(0, 9).flatmap(
        lambda tokens: st.tuples(
            st.just(tokens), st.integers(1, 4), st.lists(st.integers(0, 6), min_size=4 * tokens, max_size=4 * tokens)
        )
    )
)
def test_plan(case: tuple[int, int, list[int]]) -> None:
    tokens, top_k, values = case
    experts = 6
    ids = torch.tensor(values[: tokens * top_k], dtype=torch.long).view(tokens, top_k)
    plan = plan_dispatch(ids, experts)
    flat = ids.flatten()
    assert sorted(plan.order.tolist()) == list(range(tokens * top_k))
    assert torch.equal(flat[plan.order], plan.expert)
    assert plan.ends.dtype == torch.int32
    starts = [0, *plan.ends.tolist()]
    for e in range(experts):
        run = plan.order[starts[e] : starts[e + 1]]
        assert torch.equal(run, (flat == e).nonzero().flatten()), "slots of an expert keep their order"
    assert starts[-1] == int((flat < experts).sum()), "sentinels are behind the last run"


def test_unknown_backend_names_the_near_one() -> None:
    experts = _experts("gated")
    x, ids, weights = _inputs("one slot")
    with pytest.raises(UnknownNameError, match="did you mean 'grouped'"):
        run_experts(x, ids, weights, experts, backend="gruped")


def test_grouped_refuses_widths_it_cannot_take() -> None:
    experts = Experts(2, 12, 8)
    with pytest.raises(ConfigError, match="hidden_size 12") as error:
        run_experts(
            torch.randn(3, 12), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), experts, backend="grouped"
        )
    assert error.value.where and error.value.accepted and error.value.fix


@pytest.mark.parametrize("form", FORMS)
def test_forward_all_is_each_expert_alone(form: str) -> None:
    experts = _experts(form)
    x = torch.randn(4, D)
    together = experts.forward_all(x)
    assert together.shape == (E, 4, D)
    for e in range(E):
        alone = run_loop(x, torch.full((4, 1), e), torch.ones(4, 1), experts)
        torch.testing.assert_close(together[e], alone, atol=1e-5, rtol=1e-5)


def test_expert_sizes() -> None:
    gated, ungated = Experts(4, 6, 3), Experts(4, 6, 3, gated=False, up_bias=True, down_bias=True)
    assert {n: tuple(p.shape) for n, p in gated.named_parameters()} == {
        "gate_up_proj": (4, 6, 6),
        "down_proj": (4, 6, 3),
    }
    assert gated.parameters_per_expert == 3 * 6 * 3
    assert ungated.parameters_per_expert == 2 * 6 * 3 + 3 + 6
    assert gated.flops_per_pair == 2 * 3 * 6 * 3
    assert ungated.flops_per_pair == 2 * 2 * 6 * 3
    assert gated.bytes_per_expert == 4 * 54
    assert gated.half().bytes_per_expert == 2 * 54


@pytest.mark.parametrize("field", ["num_experts", "hidden_size", "intermediate_size"])
def test_expert_sizes_below_one_are_refused(field: str) -> None:
    sizes = {"num_experts": 2, "hidden_size": 4, "intermediate_size": 4, field: 0}
    with pytest.raises(ConfigError, match=f"{field} is 0"):
        Experts(**sizes)


def test_unknown_activation_names_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gelu_new'"):
        Experts(2, 4, 4, activation="gelu_nw")
