"""Test-time training with all its safeguards on a GPU: the scores of the CPU, and everything on the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from thermoe.adapt.agreement import routing_agreement
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "adapt"))
from reading_model import batches, trained_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("settings", [{}, {"family": "mix"}, {"optimizer": "muon"}, {"family": "low_rank"}], ids=str)
def test_the_same_scores_as_on_the_cpu(settings: dict[str, Any]) -> None:
    guards = Safeguards(judge_tokens=252, shadow_every=2)
    scores = []
    for device in ("cpu", "cuda"):
        model = trained_model().to(device)
        with RouterAdapter(model, lr=3e-3, bucket=None, held_frac=0.25, safeguards=guards, **settings) as adapter:
            steps = [adapter.score_and_learn(batch.to(device)) for batch in batches("code", 4)]
            assert {p.device.type for p in adapter.parameters()} == {device}
            assert steps[0].sequence_nll.device.type == device and adapter.updates == 4
            assert adapter.ledger.counts["judge"] > 0 and adapter.ledger.counts["shadow"] > 0
            assert routing_agreement(adapter, [batches("code", 1, start=6)[0].to(device)])
            state = adapter.state_dict()
            adapter.reset()
            adapter.load_state_dict(state)
            with adapter.stream("other"):
                assert adapter.score_and_learn(batches("prose", 1)[0].to(device)).verdict != "skipped"
            scores.append(torch.stack([step.sequence_nll.cpu() for step in steps]))
    torch.testing.assert_close(*scores, rtol=1e-2, atol=0.05)
