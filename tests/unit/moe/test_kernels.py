"""Triton's kernels, in its interpreter, equal their reference; the GPU tests run them compiled."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from thermoe.moe.kernels import reference

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, see tests/gpu"),
]

E = 5
ACTIVATIONS = sorted(set(reference.ACTIVATIONS.values()))
ROUTES = {
    "sentinels": lambda: torch.randint(0, E + 1, (13, 3)),
    "no sentinel": lambda: torch.randint(0, E, (7, 2)),
    "all sentinels": lambda: torch.full((4, 2), E),
    "one expert takes all": lambda: torch.full((9, 2), 3),
    "one slot": lambda: torch.randint(0, E + 1, (11, 1)),
    "many slots": lambda: torch.randint(0, E + 1, (3, 17)),
}


class _Plan(NamedTuple):
    order: Tensor
    row: Tensor
    expert: Tensor
    ends: Tensor


def _plan(ids: Tensor) -> _Plan:
    expert, order = torch.sort(ids.flatten().to(torch.int16), stable=True)
    ends = torch.searchsorted(expert, torch.arange(1, E + 1, dtype=torch.int16), out_int32=True)
    row = torch.empty(order.numel(), dtype=torch.int32)
    row[order] = torch.arange(order.numel(), dtype=torch.int32)
    return _Plan(order, row.view(ids.shape), expert, ends)


def _kernels(name: str) -> ModuleType:
    from thermoe.moe.kernels import activation, rows

    return {"rows": rows, "activation": activation}[name]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New buffers hold NaN, as freed memory may."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def _dead_rows_poisoned(rows: Tensor, ends: Tensor) -> Tensor:
    rows[int(ends[-1]) :] = float("nan")
    return rows


# One width below a block, one that is no power of two, one of several blocks.
@pytest.mark.parametrize("width", [8, 24, 2056])
@pytest.mark.parametrize("route", ROUTES)
def test_spread_and_combine(route: str, width: int) -> None:
    kernels, ids = _kernels("rows"), ROUTES[route]()
    plan = _plan(ids)
    x = torch.randn(len(ids), width)
    x[(ids == E).all(1)] = float("nan")  # a token without an expert is not looked at
    found = kernels.spread(x, plan.row, plan.ends, torch.float32)
    assert torch.equal(found, reference.spread(x, plan.row, plan.ends, torch.float32))
    live = int(plan.ends[-1])
    assert torch.equal(found[:live], x[plan.order[:live] // ids.shape[1]])
    assert (found[live:] == 0).all()

    rows = _dead_rows_poisoned(torch.randn(ids.numel(), width), plan.ends)
    found = kernels.combine(rows, plan.row, plan.ends, torch.float32)
    torch.testing.assert_close(found, reference.combine(rows, plan.row, plan.ends, torch.float32))
    expected = torch.zeros(len(ids), width, dtype=torch.float64)
    for t in range(len(ids)):
        for k in range(ids.shape[1]):
            if ids[t, k] < E:
                expected[t] += rows[plan.row[t, k]].double()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_its_gradient(activation: str, gated: bool, biased: bool) -> None:
    kernels = _kernels("activation")
    for route, width in (("sentinels", 40), ("no sentinel", 8), ("all sentinels", 256), ("one slot", 768)):
        ids = ROUTES[route]()
        plan = _plan(ids)
        h = _dead_rows_poisoned(3 * torch.randn(ids.numel(), width * (1 + gated)), plan.ends)
        grad = _dead_rows_poisoned(torch.randn(ids.numel(), width), plan.ends)
        bias = torch.randn(E, h.shape[1]) if biased else None
        arguments = (h, bias, torch.rand(ids.numel()), plan.order, plan.expert, plan.ends, activation, gated)
        found = (kernels.activate(*arguments), *kernels.activate_backward(grad, *arguments))
        wanted = (reference.activate(*arguments), *reference.activate_backward(grad, *arguments))
        for name, a, b in zip(("forward", "grad_h", "again", "grad_weight"), found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5, msg=lambda m, n=name, r=route: f"{n}, {r}: {m}")
        assert (found[3][ids.flatten() == E] == 0).all()


def test_a_tile_divides_common_widths() -> None:
    blocks = _kernels("activation")._blocks
    for width in (192, 384, 768, 1024, 1536, 14336):
        rows, columns = blocks(width, 1024)
        assert width % columns == 0 and rows * columns == 1024
    assert blocks(8, 1024)[1] == 8
    assert blocks(24, 1024)[1] == 32
