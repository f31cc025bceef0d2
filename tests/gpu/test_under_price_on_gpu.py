"""Training under a price on a GPU: through the kernel, in bfloat16, and without waiting between its measurements."""

from __future__ import annotations

import pytest
import torch

from thermoe.testing import random_tokens, tiny_moe
from thermoe.training.under_price import PriceSettings, UnderPrice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_a_step_under_the_price_opens_fewer_and_waits_for_nothing() -> None:
    model, rows = tiny_moe(num_experts=8, top_k=3).cuda().train(), random_tokens(32, 16).cuda()
    price = PriceSettings(distinct_frac=0.5, served_batch=8, start_frac=0.0)
    with UnderPrice(model, price, rows, steps=10) as under_price, torch.autocast("cuda", torch.bfloat16):
        under_price.before_step(0)  # measures, searches, compiles
        model(rows, labels=rows).loss.backward()
        under_price.after_step()
        first = under_price.figures()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            under_price.before_step(1)
            model(rows).logits.float().square().mean().backward()
            under_price.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scored = under_price.held_out(lambda: float(model(rows, labels=rows).loss.detach().exp()))
    assert first["price_nats"] > 0
    assert scored["distinct_under_price"] < 0.7 * scored["distinct_experts"]
