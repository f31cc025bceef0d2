"""The kernel of the priced selection, in Triton's interpreter, against the PyTorch code."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from selection_cases import SHAPES, cases

from thermoe.routers import fused_selection
from thermoe.routers.fused_selection import can_fuse
from thermoe.routers.priced import PricedRouter


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled, see tests/gpu")
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_kernel_chooses_as_the_pytorch_code_does(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    for router, x, context in cases(shape):
        expected = router(x, context).expert_index
        with monkeypatch.context() as patch:
            patch.setattr("thermoe.routers.priced.can_fuse", lambda scores, groups, k_max: True)
            found = router(x, context).expert_index
        assert torch.equal(found, expected)
        compared += 1
    assert compared == 32


@torch.no_grad()
def test_a_baseline_other_than_the_top_k_is_left_to_the_pytorch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("the kernel does not know this baseline")

    monkeypatch.setattr("thermoe.routers.priced.can_fuse", lambda scores, groups, k_max: True)
    monkeypatch.setattr("thermoe.routers.priced.select_by_distortion", refuse)
    x = torch.randn(8, 16)
    sharded = PricedRouter(16, 8, 4, benefit="distortion", group_size=2, price=0.01).eval()
    sampled = PricedRouter(16, 8, 4, benefit="distortion", temperature=1.0, price=0.01).train()
    for router in (sharded, sampled):
        assert router(x).expert_index.shape == (8, 4)
    with pytest.raises(AssertionError, match="does not know"):
        sampled.eval()(x)


def test_the_kernel_takes_what_one_program_can_hold_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_fuse(torch.zeros(16, 32), 1, 4), "the CPU runs the PyTorch code"

    class OnGPU:
        is_cuda, dtype = True, torch.float32

        def __init__(self, *shape: int) -> None:
            self.shape = shape

    monkeypatch.setattr(fused_selection, "HAS_TRITON", True)
    fits = {(16, 32): True, (64, 128): True, (65, 128): False, (128, 64): True, (16, 160): False, (0, 32): False}
    for shape, expected in fits.items():
        assert can_fuse(OnGPU(*shape), 1, 8) == expected, shape  # type: ignore[arg-type]
    assert can_fuse(OnGPU(8192, 64), 512, 8) and not can_fuse(OnGPU(16, 32), 1, 9)  # type: ignore[arg-type]
