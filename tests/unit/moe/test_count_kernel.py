"""The kernel that counts tokens per expert, in Triton's interpreter, against the PyTorch code."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from thermoe.moe import decision as decision_module
from thermoe.moe import fused_count
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.fused_count import can_count


@pytest.mark.skipif(
    find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs the package triton, and with a GPU the kernel is compiled, see tests/gpu",
)
@pytest.mark.parametrize(("tokens", "slots", "experts", "spare"), [(1, 1, 1, 0), (16, 8, 64, 0), (37, 3, 130, 5)])
def test_counts_are_those_of_the_pytorch_code(
    tokens: int, slots: int, experts: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of zero-compute experts and of none count for nothing."""
    outputs = experts + spare
    index = torch.randint(0, outputs + 1, (tokens, slots))
    logits = torch.randn(tokens, outputs)
    decision = RoutingDecision(logits, logits, index, torch.ones(tokens, slots), num_zero=spare)
    expected = decision.counts, decision.opened
    assert int(expected[0].sum()) == int((index < experts).sum())
    monkeypatch.setattr(decision_module, "can_count", lambda index: True)
    assert torch.equal(decision.counts, expected[0]) and torch.equal(decision.opened, expected[1])
    assert decision.counts.dtype == torch.float32 and decision.opened.dtype == torch.bool


def test_the_kernel_counts_a_few_tokens_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_count, "HAS_TRITON", True)
    assert not can_count(torch.zeros(4, 2, dtype=torch.int64)), "the CPU runs the PyTorch code"

    class OnGPU:
        is_cuda = True

        def __init__(self, pairs: int) -> None:
            self.pairs = pairs

        def numel(self) -> int:
            return self.pairs

    for pairs, expected in {0: False, 1: True, 8192: True, 8193: False}.items():
        assert can_count(OnGPU(pairs)) == expected, pairs  # type: ignore[arg-type]
    monkeypatch.setattr(fused_count, "HAS_TRITON", False)
    assert not can_count(OnGPU(1)), "without Triton there is no kernel"  # type: ignore[arg-type]
