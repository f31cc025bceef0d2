"""The kernel that counts tokens per expert, in Triton's interpreter, against the PyTorch code."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from thermoe.moe import decision as decision_module
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


def test_the_cpu_runs_the_pytorch_code() -> None:
    assert not can_count(torch.zeros(4, 2, dtype=torch.int64))
