"""A session on a GPU: no wait is added to a forward, forwards are timed by events, and a budget acts."""

from __future__ import annotations

import warnings

import pytest
import torch

from thermoe import AdaptiveSession, CostModel, EnergyMeter, set_router
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
def test_a_forward_inside_a_session_waits_for_the_host_no_more_than_one_outside() -> None:
    """Transformers reads the device itself in some versions, so the session's part is what comes on top."""
    model = tiny_moe(num_experts=8, top_k=4).to("cuda", torch.bfloat16)
    set_router(model, "priced")
    ids, step = random_tokens(4, 16).cuda(), random_tokens(8, 1).cuda()

    def waits() -> int:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(3):
                    model(ids), model(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    with torch.no_grad():
        model(ids), model(step)
        outside = waits()
        with AdaptiveSession(model, 1e-9, meter=EnergyMeter(telemetry="off")) as session:
            model(ids), model(step)
            session.step()
            inside = waits()
            metrics = session.step()
    assert inside <= outside
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


@pytest.mark.parametrize("benefit", ["gate", "distortion"])
@pytest.mark.parametrize(("batch", "length"), [(8, 1), (1, 1), (2, 9)])
def test_the_cost_of_a_price_is_that_of_the_routing_it_leads_to(benefit: str, batch: int, length: int) -> None:
    model = tiny_moe(num_experts=8, top_k=4, layers=[1]).to("cuda")  # one layer, so that no price changes what it sees
    set_router(model, "priced", benefit=benefit)
    cost = CostModel.prior()
    with AdaptiveSession(model, meter=EnergyMeter(telemetry="off"), cost_model=cost) as session, torch.no_grad():
        rows = [random_tokens(batch, length, seed=seed).cuda() for seed in range(6)]
        for ids in rows:
            model(ids)
        session.step()
        solver, phase = session._instrument.solver, "decode" if length == 1 else "prefill"  # type: ignore[union-attr]
        unit = solver.table.unit_j
        expected = {price: solver.cost_at(phase, price / unit) for price in (0.0, 1e-3, 0.01, 0.1, 1.0)}  # type: ignore[arg-type]
        for price, modelled in expected.items():
            session.set_price(price / unit)
            for ids in rows:
                model(ids)
            assert session.step()["j_per_token_modelled"] == pytest.approx(modelled, rel=1e-4)
        assert len(set(expected.values())) >= 3
