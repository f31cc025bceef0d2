"""What new text says of what was learned before is heeded: steps become shorter or longer, and layers step back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reading_model import VOCAB, trained_model
from torch import Tensor, nn

from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.stream_state import StreamState
from thermoe.adapt.test_time import RouterAdapter
from thermoe.adapt.update import LEAST_LR_FRAC, LONGER, SHORTER, Live, _heed
from thermoe.testing import random_tokens, tiny_moe

LR = 0.01


@pytest.fixture
def adapter() -> Iterator[RouterAdapter]:
    with RouterAdapter(tiny_moe(gate="renormalized"), lr=LR, bucket=None) as made:
        yield made


def _live(adapter: RouterAdapter) -> tuple[Live, StreamState]:
    return adapter._learner.live, adapter._learner.state


def _drawn(adapter: RouterAdapter, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in adapter.parameters()]


def _heeded(adapter: RouterAdapter, gradients: list[Tensor]) -> list[float] | None:
    live, state = _live(adapter)
    back = _heed(live, state, list(live.fast.values()), gradients)
    return None if back is None else back.tolist()


# -- step size ---------------------------------------------------------------------------------------------------------


def test_steps_become_shorter_where_the_last_went_too_far(adapter: RouterAdapter) -> None:
    _, state = _live(adapter)
    state.last_move = _drawn(adapter, 1)
    uphill = [2 * move for move in state.last_move]  # the loss falls when the move is taken back
    for count in range(1, 40):
        _heeded(adapter, uphill)
        assert adapter.lr == pytest.approx(max(LR * SHORTER**count, LR * LEAST_LR_FRAC))
    assert adapter.lr == LR * LEAST_LR_FRAC


def test_steps_become_longer_again_up_to_what_was_set(adapter: RouterAdapter) -> None:
    live, state = _live(adapter)
    state.last_move = _drawn(adapter, 1)
    downhill = [-0.5 * move for move in state.last_move]
    _heeded(adapter, downhill)
    assert adapter.lr == LR, "never longer than that"
    live.optimizer.lr = LR * LEAST_LR_FRAC
    for count in range(1, 40):
        _heeded(adapter, downhill)
        assert adapter.lr == pytest.approx(min(LR * LEAST_LR_FRAC * LONGER**count, LR))
    assert adapter.lr == LR


def test_a_step_size_that_a_verdict_halved_grows_from_there(adapter: RouterAdapter) -> None:
    live, state = _live(adapter)
    state.last_move = _drawn(adapter, 1)
    live.optimizer.lr = LR / 2
    _heeded(adapter, [-move for move in state.last_move])
    assert adapter.lr == pytest.approx(LR / 2 * LONGER)


def test_all_layers_together_say_how_far_it_went(adapter: RouterAdapter) -> None:
    _, state = _live(adapter)
    state.last_move = _drawn(adapter, 1)
    half = len(state.last_move) // 2
    mixed = [(3.0 if row < half else -1.0) * move for row, move in enumerate(state.last_move)]
    _heeded(adapter, mixed)
    assert adapter.lr == pytest.approx(LR * SHORTER)
    _heeded(adapter, [-part for part in mixed])
    assert adapter.lr == pytest.approx(LR * SHORTER * LONGER)


def test_where_nothing_is_said_the_step_size_stays(adapter: RouterAdapter) -> None:
    live, state = _live(adapter)
    live.optimizer.lr = LR / 3
    gradients = _drawn(adapter, 2)
    _heeded(adapter, gradients)  # nothing was learned before
    state.last_move = [torch.zeros_like(one) for one in gradients]
    _heeded(adapter, gradients)
    state.last_move = gradients[:1]  # of other layers than those that learn now
    _heeded(adapter, gradients)
    assert adapter.lr == LR / 3


# -- stepping back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retreat", [0.9, 0.5])
@pytest.mark.parametrize("outward", [(True, False), (False, True), (True, True), (False, False)])
def test_a_layer_that_should_be_less_steps_back(retreat: float, outward: tuple[bool, bool]) -> None:
    with RouterAdapter(tiny_moe(), lr=LR, bucket=None, safeguards=Safeguards(retreat=retreat)) as adapter:
        moved = _drawn(adapter, 3)
        with torch.no_grad():
            for parameter, value in zip(adapter.parameters(), moved, strict=True):
                parameter.copy_(value)
        ways = [outward[row * 2 // len(moved)] for row in range(len(moved))]
        gradients = [value if out else -value for value, out in zip(moved, ways, strict=True)]
        assert _heeded(adapter, gradients) == pytest.approx([retreat if out else 1.0 for out in outward])
        now = [p.detach() for p in adapter.parameters()]
        assert all(torch.equal(one, two) for one, two in zip(now, moved, strict=True)), "asking changes nothing"


def test_without_retreat_no_layer_steps_back() -> None:
    with RouterAdapter(tiny_moe(), lr=LR, bucket=None, safeguards=Safeguards.none()) as adapter:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.fill_(1.0)
        assert _heeded(adapter, [torch.ones_like(p) for p in adapter.parameters()]) is None


def test_at_the_trained_router_there_is_nothing_to_step_back_from(adapter: RouterAdapter) -> None:
    assert _heeded(adapter, _drawn(adapter, 4)) == [1.0, 1.0]
    assert adapter.lr == LR


# -- in an update ------------------------------------------------------------------------------------------------------


def _told(adapter: RouterAdapter, signs: list[float]) -> None:
    """Let the objective say that the fast weights of each layer should be less (1), more (-1), or nothing (0)."""
    objective: Any = adapter._learner.live.objective
    learn = objective.learn

    def say(batch: Any) -> Any:
        proposal = learn(batch)
        for row, (p, g) in enumerate(zip(adapter.parameters(), proposal.gradients, strict=True)):
            g.copy_(signs[row * len(signs) // len(proposal.gradients)] * p.detach())
        return proposal

    objective.learn = say


def test_an_update_multiplies_the_layers_that_should_be_less() -> None:
    bare = {"kl_cap": None, "anchor": 1.0, "judge": False, "shadow": False, "diversity": None}
    ends = {}
    for retreat in (1.0, 0.5):
        model, guards = tiny_moe(gate="renormalized"), Safeguards(**bare, retreat=retreat)
        with RouterAdapter(model, lr=LR, bucket=None, steps=1, safeguards=guards, by_text=False) as adapter:
            adapter.score_and_learn(random_tokens(4, 20))
            first = [p.detach().clone() for p in adapter.parameters()]
            assert all(p.any() for p in first)
            ends[retreat, "first"] = first
            _told(adapter, [1.0, -1.0])
            adapter.score_and_learn(random_tokens(4, 20, seed=1))
            ends[retreat, "then"] = [p.detach().clone() for p in adapter.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(ends[1.0, "first"], ends[0.5, "first"], strict=True)), "not at first"
    half = len(first) // 2
    for row, (plain, back) in enumerate(zip(ends[1.0, "then"], ends[0.5, "then"], strict=True)):
        torch.testing.assert_close(back, (0.5 if row < half else 1.0) * plain, rtol=1e-6, atol=0)


def test_the_last_move_is_what_the_steps_of_the_last_update_changed() -> None:
    free = Safeguards.none()  # a pull is no part of it: see `update`
    with RouterAdapter(tiny_moe(gate="renormalized"), lr=LR, safeguards=free, bucket=None) as adapter:
        assert adapter._learner.state.last_move is None
        before = [p.detach().clone() for p in adapter.parameters()]
        for seed in range(3):
            assert adapter.score_and_learn(random_tokens(4, 20, seed=seed)).learned
            now = [p.detach().clone() for p in adapter.parameters()]
            found = adapter._learner.state.last_move
            assert found is not None
            for move, old, new in zip(found, before, now, strict=True):
                torch.testing.assert_close(move, new - old, rtol=0, atol=1e-9)
            before = now
        adapter.reset()
        assert adapter._learner.state.last_move is None


# -- does it help ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _said(model: nn.Module, rows: int, seed: int) -> Tensor:
    """Return rows (B, S) that the model said itself: its loss on them is as low as any router's, on average."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, 1), generator=generator)
    for _ in range(31):
        probabilities = torch.softmax(model(ids).logits[:, -1].float(), -1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return ids


def test_where_there_is_nothing_to_learn_stepping_back_keeps_fast_weights_small() -> None:
    """Text of the model's own: what a batch teaches is its noise, of which the next one says that it should be less.

    On average over batches and draws; of a single draw it need not be so.
    """
    model, sizes = trained_model(), {1.0: 0.0, 0.9: 0.0}
    for draw in range(3):
        batches = _said(model, 12 * 8, draw).split(8)
        for retreat in sizes:
            guards = Safeguards(judge=False, shadow=False, kl_cap=None, diversity=None, anchor=1.0, retreat=retreat)
            with RouterAdapter(model, lr=1e-3, bucket=None, safeguards=guards, by_text=False) as adapter:
                for batch in batches:
                    assert adapter.score_and_learn(batch).learned
                    sizes[retreat] += float(torch.cat([p.detach().flatten() for p in adapter.parameters()]).norm())
    assert 0 < sizes[0.9] < 0.9 * sizes[1.0], sizes
