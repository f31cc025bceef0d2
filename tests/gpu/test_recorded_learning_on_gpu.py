"""Forwards of learning that are recorded in CUDA graphs: the same as kernel by kernel, whatever changes in between."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thermoe import set_router
from thermoe.adapt.forwards import MOST_RECORDED, RECORD_AT_USE, Forwards
from thermoe.adapt.judging import without_fast
from thermoe.adapt.learning_parts import choices, of_rows
from thermoe.adapt.objectives import LearnBatch
from thermoe.adapt.test_time import RouterAdapter
from thermoe.moe.layer import routed_modules

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "adapt"))
from reading_model import batches, trained_model

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a CUDA device of compute capability 9.0, where no expert waits for the host",
)
PRICED = {"benefit": "distortion", "price": 0.02, "open_cost": [1.0] * 8, "group_by_position": True}


def _model(kind: str = "topk") -> nn.Module:
    model = trained_model().to("cuda", torch.bfloat16)
    if kind == "priced":
        set_router(model, "priced", **PRICED)
    return model


def _batch(adapter: RouterAdapter, ids: Tensor) -> LearnBatch:
    live = adapter._learner.live
    weights = torch.ones(len(ids), ids.shape[1] - 1, device=ids.device)
    weights[0] = 0
    return LearnBatch(live.model, live.fast, ids, None, weights, weights, 0, live.account)


def _stir(adapter: RouterAdapter) -> None:
    with torch.no_grad():
        for number, p in enumerate(adapter.parameters()):
            generator = torch.Generator().manual_seed(number)
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))


def _both(adapter: RouterAdapter) -> tuple[Forwards, Forwards]:
    live = adapter._learner.live
    eager = Forwards(live.model, live.fast, live.objective, live.account.costs, record=False)
    eager.begin()
    live.forwards.begin()
    assert live.forwards.why_not is None, live.forwards.why_not
    return live.forwards, eager


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-9))


@pytest.mark.parametrize("how", ["own", "given", "free"])
@pytest.mark.parametrize("kind", ["topk", "priced"])
def test_recorded_gradients_are_those_of_every_kernel_by_itself(kind: str, how: str) -> None:
    model = _model(kind)
    with RouterAdapter(model, bucket=None) as adapter:
        _stir(adapter)
        forwards, eager, live = *_both(adapter), adapter._learner.live
        for number, ids in enumerate(batch.cuda() for batch in batches("code", RECORD_AT_USE + 2)):
            with torch.no_grad():
                model(ids)
            chosen = choices(model, tuple(ids.shape))
            assert chosen is not None
            their = of_rows(chosen, torch.tensor([0, 3, 5, 9])) if how == "given" else None
            part = _batch(adapter, ids[[0, 3, 5, 9]])
            made = []
            for one in (eager, forwards):
                proposal, seen = one.learn(part, their, free=how == "free")
                assert set(seen) == set(adapter._learner.live.fast)
                inputs = [layer.x.clone() for layer in seen.values()]
                index = [module.last_routing.expert_index.clone() for _, module in routed_modules(model)]
                counts = live.account.costs.last_counts(0)
                assert one.counts is None or torch.equal(one.counts, counts)
                made.append(([g.clone() for g in proposal.gradients], proposal.loss.clone(), inputs, index))
            (gradients, loss, x, index), (recorded, its_loss, its_x, its_index) = made
            torch.testing.assert_close(its_loss, loss, rtol=1e-3, atol=1e-3)
            assert max(_apart(a, b) for a, b in zip(recorded, gradients, strict=True)) < 0.05
            assert max(_apart(a, b) for a, b in zip(its_x, x, strict=True)) < 0.02
            same = [float((a == b).float().mean()) for a, b in zip(its_index, index, strict=True)]
            assert min(same) == 1 if how == "given" else min(same) > 0.95
            assert forwards.recorded == (number + 1 >= RECORD_AT_USE)


def test_a_replay_waits_for_nothing() -> None:
    model, ids = _model("priced"), batches("code", 1)[0].cuda()
    with RouterAdapter(model, bucket=None) as adapter:
        forwards, _ = _both(adapter)
        part = _batch(adapter, ids)
        for _ in range(RECORD_AT_USE):
            forwards.learn(part, None, free=True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            forwards.learn(part, None, free=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert forwards.recorded == 1


def test_what_changes_in_place_is_followed_and_what_python_changes_is_recorded_anew() -> None:
    model, ids = _model("priced"), batches("code", 1)[0].cuda()
    with RouterAdapter(model, bucket=None) as adapter:
        forwards, eager = _both(adapter)

        def agree(recorded: int, count: int = RECORD_AT_USE) -> Tensor:
            forwards.begin()
            for _ in range(count):
                found = forwards.nll(ids, None).clone()
            assert forwards.recorded == recorded, forwards.why_not
            assert _apart(found, eager.nll(ids, None)) < 0.02
            return found

        first = agree(1)
        _stir(adapter)
        second = agree(1, 1)
        assert _apart(second, first) > 1e-4, "the fast weights are read"
        for _, module in routed_modules(model):
            module.router.set_price(5.0, "prefill")
            module.router.set_price(5.0, "decode")
        third = agree(1, 1)
        assert _apart(third, second) > 1e-3, "the price is read"
        for parameter in model.transformer.wte.parameters():
            parameter.data.mul_(1.1)
        assert _apart(agree(1, 1), third) > 1e-3, "weights are read where they are"
        for _, module in routed_modules(model):
            module.router.active_top_k = 1
        agree(0, 1)
        agree(1)
        for _, module in routed_modules(model):
            module.router.active_top_k = None
        set_router(model, "topk")
        adapter._places.put()
        agree(0, 1)
        agree(1)
        with without_fast(model, adapter._learner.live.fast):
            slow = [forwards.nll(ids, None).clone() for _ in range(RECORD_AT_USE)][-1]
            assert _apart(slow, eager.nll(ids, None)) < 0.02
        assert forwards.recorded == 2 and _apart(slow, agree(2, 1)) > 1e-4


def test_shapes_that_come_and_go_make_room() -> None:
    model = _model()
    with RouterAdapter(model, bucket=None) as adapter:
        forwards, eager = _both(adapter)
        for rows in [*range(1, MOST_RECORDED + 3), 1]:
            ids = batches("code", 1)[0][:rows].cuda()
            for _ in range(RECORD_AT_USE):
                found = forwards.nll(ids, None).clone()
            assert _apart(found, eager.nll(ids, None)) < 0.02
        assert forwards.recorded == MOST_RECORDED


@pytest.mark.parametrize(
    "why", ["graphs=False", "hooks", "has hooks", "all modules", "training mode", "wait for the host", "not on one GPU"]
)
def test_what_cannot_be_recorded_runs_kernel_by_kernel_and_says_why(why: str) -> None:
    model: Any = _model()
    model = {"wait for the host": model.float, "not on one GPU": model.cpu}.get(why, lambda: model)()
    if why == "hooks":
        model.transformer.h[1].register_forward_hook(lambda *given: None)
    if why == "has hooks":
        model.transformer.h[1].register_full_backward_pre_hook(lambda *given: None)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *given: None) if why == "all modules" else None
    if why == "training mode":
        model.train()
    device = next(model.parameters()).device
    try:
        with RouterAdapter(model, bucket=None, graphs=why != "graphs=False") as adapter:
            for batch in batches("code", 4):
                assert torch.isfinite(adapter.score_and_learn(batch.to(device)).sequence_nll).all()
            assert adapter.metrics["graphs"] == 0 and why in adapter.metrics["graphs_reason"]
            assert adapter.updates > 0
    finally:
        if everywhere is not None:
            everywhere.remove()


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}, {"min_tokens": 2000}], ids=str)
def test_learning_goes_on_where_the_model_is_moved(settings: dict[str, Any]) -> None:
    model, text = trained_model(), batches("code", 6)
    with RouterAdapter(model, bucket=None, held_frac=0.25, **settings) as adapter:
        for number, device in enumerate(("cpu", "cuda", "cpu")):
            model.to(device)
            for batch in text[2 * number : 2 * number + 2]:
                assert torch.isfinite(adapter.score_and_learn(batch.to(device)).sequence_nll).all()
            assert {p.device.type for p in adapter.parameters()} == {device}
        assert adapter.updates >= 2 and adapter.resets == 0


@pytest.mark.parametrize("kind", ["topk", "priced"])
def test_a_stream_learns_alike_with_and_without(kind: str) -> None:
    scores, text = [], [*batches("code", 12), *batches("prose", 4)]
    for graphs in (False, True):
        with RouterAdapter(_model(kind), lr=3e-3, bucket=None, held_frac=0.25, graphs=graphs) as adapter:
            steps = [adapter.score_and_learn(batch.cuda()) for batch in text]
            assert (adapter.metrics["graphs"] > 0) == graphs and adapter.updates > 8
            scores.append(torch.stack([step.sequence_nll.mean() for step in steps]) / 63)
    torch.testing.assert_close(*scores, rtol=0.02, atol=0.02)
    with RouterAdapter(_model(kind), bucket=None) as adapter, adapter.frozen():
        frozen = torch.stack([adapter.score_and_learn(batch.cuda()).sequence_nll.mean() for batch in text]) / 63
    assert float((scores[1] - frozen)[6:12].mean()) < -0.005, "it learns"
