"""A session on a GPU: no wait is added to a forward, forwards are timed by events, and a budget acts."""

from __future__ import annotations

import pytest
import torch

from thermoe import AdaptiveSession, EnergyMeter
from thermoe.testing import random_tokens, tiny_moe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SM90 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="grouped products wait for the host before SM90",
)


@SM90
def test_a_forward_inside_a_session_never_waits_for_the_host() -> None:
    model = tiny_moe(num_experts=8, top_k=4).to("cuda", torch.bfloat16)
    ids, step = random_tokens(4, 16).cuda(), random_tokens(8, 1).cuda()
    meter = EnergyMeter(telemetry="off")
    with AdaptiveSession(model, 1e-9, meter=meter) as session, torch.no_grad():
        model(ids), model(step)
        session.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                model(ids), model(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        metrics = session.step()
    assert metrics["forwards"] == 6 and metrics["tokens"] == 3 * (64 + 8)
    assert metrics["decode/price"] > 0 and metrics["decode/experts_per_token"] < 4


def test_a_budget_acts_and_leaving_restores_every_bit() -> None:
    model = tiny_moe(num_experts=8, top_k=4).to("cuda")
    step = random_tokens(8, 1).cuda()
    with torch.no_grad():
        before = model(step).logits
        with AdaptiveSession(model, 1e-9, solve_every=1) as session:
            for seed in range(5):
                model(random_tokens(8, 1, seed=seed).cuda())
                metrics = session.step()
            assert metrics["decode/price"] > 0
            model(step)
            session.step()
        assert session.tally.phases["decode"].forwards == 6
        assert torch.equal(model(step).logits, before)
