"""The kernel of the priced selection, in Triton's interpreter, against the PyTorch code."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from selection_cases import SHAPES, cases, compare_near_ties, near_ties, objective

from thermoe.routers import fused_selection
from thermoe.routers.fused_selection import can_fuse, select_by_distortion
from thermoe.routers.priced import PricedRouter


def triton_here(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test where the interpreter does."""
    on_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel is compiled, see tests/gpu")
    return on_gpu(pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")(test))


@triton_here
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


@triton_here
@torch.no_grad()
def test_differences_are_near_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel sees the tokens of a group in another order, as a GPU adds them up in another one."""
    case = near_ties()
    router, logits, context = case
    shape = context.batch_size, context.sequence_length
    expected = router.select(logits, logits.softmax(-1), context)
    order = torch.randperm(shape[0])
    shuffled = logits.unflatten(0, shape)[order].flatten(0, 1)
    monkeypatch.setattr("thermoe.routers.priced.can_fuse", lambda scores, groups, k_max: True)
    found = router.select(shuffled, shuffled.softmax(-1), context)
    found = found.unflatten(0, shape)[order.argsort()].flatten(0, 1)
    assert compare_near_ties(found, expected, case) > 0  # ties there are
    untouched = logits.topk(router.top_k, -1).indices
    assert (objective(router, logits, expected, context) < 0.9 * objective(router, logits, untouched, context)).all()


@triton_here
@pytest.mark.parametrize("coupled", [True, False])
@torch.no_grad()
def test_equal_scores_and_those_that_are_no_number_go_by_the_number_of_the_expert(coupled: bool) -> None:
    """Ids are in the order of the scores, equal ones in that of the experts, and one that is no number comes last."""
    experts, top_k = 40, 5
    logits = torch.randint(0, 4, (8, experts)).float() - 1.5
    logits[0], logits[1] = 0.0, torch.nan
    logits[2, 3:], logits[3, ::2], logits[4, 1::3] = torch.nan, -torch.inf, -0.0
    p = logits.softmax(-1)
    one, nothing, baseline = torch.ones(()), torch.zeros(experts), torch.zeros(8, top_k, dtype=torch.int64)
    given = p, logits, None, baseline, one, one, nothing, nothing, nothing  # nothing costs and nothing is lost
    found = select_by_distortion(*given, 1, 1, top_k, coupled, False, 1.0)
    ranked = torch.where(logits.isnan(), -torch.inf, logits).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(found, ranked[:, :top_k])


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
    fits = {(16, 32): True, (128, 128): True, (129, 128): False, (256, 64): True, (16, 160): False, (0, 32): False}
    for shape, expected in fits.items():
        assert can_fuse(OnGPU(*shape), 1, 8) == expected, shape  # type: ignore[arg-type]
    assert can_fuse(OnGPU(8192, 64), 512, 8) and not can_fuse(OnGPU(16, 32), 1, 9)  # type: ignore[arg-type]
