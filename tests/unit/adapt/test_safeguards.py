"""Each safeguard of test-time training does what it says, one by one (S1 to S10; S6 is the controller's)."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading_model import batches, trained_model
from torch import Tensor, nn

from thermoe.adapt.judging import Judged, held_nll
from thermoe.adapt.objectives import Proposal
from thermoe.adapt.reading import HeldText, hold_back, record_inputs
from thermoe.adapt.safeguards import (
    COOL_DOWN,
    Paired,
    Safeguards,
    cusum,
    diversity_ratio,
    judge,
    router_kl,
    top_k_load,
    trust_region_scale,
)
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import ConfigError
from thermoe.moe.layer import moe_layers
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe

OFF = Safeguards.none()
NONSENSE = torch.randint(0, 97, (16, 64), generator=torch.Generator().manual_seed(51))


def _adapter(model: nn.Module, guards: Safeguards, **settings: Any) -> RouterAdapter:
    return RouterAdapter(model, **{"bucket": None, "lr": 1e-2, "safeguards": guards, **settings})


def _copy(adapter: RouterAdapter) -> list[Tensor]:
    return [p.detach().clone() for p in adapter.parameters()]


def _same(state: Any, other: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(state, Tensor):
        return torch.equal(state, other)
    if isinstance(state, dict):
        return state.keys() == other.keys() and all(_same(value, other[key]) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return len(state) == len(other) and all(_same(a, b) for a, b in zip(state, other, strict=True))
    return bool(state == other)


# -- S1 trust region -------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.001, 2.0), st.floats(0.01, 30.0))
def test_s1_the_scale_is_the_largest_inside_the_region(seed: int, cap: float, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    slow = 2 * torch.randn(3, 50, 8, generator=generator)
    move = size * torch.randn(3, 50, 8, generator=generator)
    move[2] = 0
    scale, kl = trust_region_scale(slow, move, cap)
    assert (kl <= cap).all() and scale[2] == 1 and kl[2] == 0
    torch.testing.assert_close(kl, router_kl(slow, move, scale))
    p = torch.softmax(slow.double(), -1)
    q = torch.softmax((slow + scale.view(-1, 1, 1) * move).double(), -1)
    torch.testing.assert_close(kl.double(), (p * (p / q).log()).sum(-1).mean(-1), rtol=1e-3, atol=1e-6)
    inside = router_kl(slow, move, torch.ones(3)) <= cap * 0.999
    assert (scale[inside] == 1).all()
    beyond = router_kl(slow, move, (scale + 1e-3).clamp(max=1))
    assert ((scale == 1) | (beyond > 0.99 * cap)).all(), "a larger scale would have been inside"


def test_s1_layers_of_different_sizes_are_measured_together() -> None:
    slow, move = torch.randn(2, 40, 6), torch.randn(2, 40, 6)
    padded = slow.clone(), move.clone()
    padded[0][1, :, 4:], padded[1][1, :, 4:] = -torch.inf, 0
    _, kl = trust_region_scale(*padded, 10.0)
    torch.testing.assert_close(kl[1], router_kl(slow[1:, :, :4], move[1:, :, :4], torch.ones(1))[0])


@pytest.mark.parametrize("router", ["topk", "null", "priced"])
@pytest.mark.parametrize("cap", [0.002, 0.05])
def test_t15_the_cap_holds_after_every_update(router: str, cap: float) -> None:
    model = trained_model()
    set_router(model, router)
    held = []
    with _adapter(model, Safeguards(kl_cap=cap), lr=0.05) as adapter:
        for batch in batches("code", 5):
            step = adapter.score_and_learn(batch)
            assert step.kl is not None and max(step.kl.values()) <= cap
            rows = adapter._learner.state.held.rows[-1]
            with adapter.frozen(), record_inputs(adapter._learner.live.fast) as seen, torch.no_grad():
                model(rows.input_ids)
            for name, layer in moe_layers(model):
                assert layer.last_routing is not None
                adapted = layer.last_routing.logits.view(len(rows.input_ids), -1, layer.router.num_outputs)[:, :-1]
                trained = layer.router.slow_scores(seen[name].x).view_as(
                    adapted.new_empty(len(rows.input_ids), rows.input_ids.shape[1], layer.router.num_outputs)
                )[:, :-1]
                p, q = torch.log_softmax(trained, -1), torch.log_softmax(adapted, -1)
                held.append(float((p.exp() * (p - q)).sum(-1).mean()))
        # The inputs of deeper layers move with the layers before them; those of the first do not.
        first = held[::2]
        assert max(first) <= cap * 1.001
        assert max(first) > 0.9 * cap, "the cap was reached, else nothing is tested"


# -- S2 anchor -------------------------------------------------------------------------------------------------------


def test_s2_the_anchor_multiplies_what_was_learned() -> None:
    model, ends = tiny_moe(gate="renormalized"), {}
    for anchor in (1.0, 0.75):
        with _adapter(model, Safeguards(kl_cap=None, anchor=anchor, diversity=None)) as adapter:
            adapter.score_and_learn(random_tokens(2, 12))
            ends[anchor] = _copy(adapter)
    assert all(torch.equal(a, 0.75 * b) for a, b in zip(ends[0.75], ends[1.0], strict=True))


# -- S3 judge --------------------------------------------------------------------------------------------------------


def _paired(mean: float, se: float | None = 0.001, tokens: int = 1024) -> Paired:
    return Paired(mean, se, tokens)


@pytest.mark.parametrize(
    ("pooled", "earlier", "verdict"),
    [
        (_paired(-0.01), None, "accepted"),
        (_paired(0.0), None, "accepted"),
        # Not surely worse: 1.64 standard errors, 1.89 of them with eight blocks.
        (_paired(0.0018), None, "accepted"),
        (_paired(0.0020), None, "rejected"),
        (_paired(0.0100, 0.01), None, "accepted"),
        (_paired(0.0101, 0.01), None, "deferred"),
        (_paired(0.0101, 0.01, 8192), None, "rejected"),
        (_paired(-0.005, 0.02, 8192), None, "accepted"),
        (_paired(0.05, 0.01), None, "rejected"),
        (_paired(-0.05, 0.02), None, "accepted"),
        # Too few to tell, unless it is surely worse, which takes four blocks.
        (_paired(-0.05, None), None, "deferred"),
        (_paired(-0.05, 0.001, 999), None, "deferred"),
        (_paired(0.05, 0.001, 300), None, "deferred"),
        (_paired(0.05, 0.001, 512), None, "rejected"),
        (_paired(0.0023, 0.001, 512), None, "deferred"),
        # Text of before by itself: surely worse, and by more than 0.01.
        (_paired(-0.05), _paired(0.012), "rejected"),
        (_paired(-0.05), _paired(0.005), "accepted"),
        (_paired(-0.05), _paired(0.012, 0.01), "accepted"),
        (None, _paired(0.012), "rejected"),
        (None, None, "deferred"),
    ],
    ids=str,
)
def test_s3_the_rule(pooled: Paired | None, earlier: Paired | None, verdict: str) -> None:
    found, reason = judge(pooled, earlier, enough=1000, most=8192)
    assert found == verdict and reason


def test_s3_standard_errors_are_over_blocks() -> None:
    assert Paired.of(torch.empty(0)) is None
    assert Paired.of(torch.ones(150)) == Paired(1.0, None, 150)
    blocks = torch.tensor([1.0, 2.0, 4.0, 1.0])
    found = Paired.of(blocks.repeat_interleave(128))
    assert found is not None and found.tokens == 512 and found.mean == 2.0
    assert found.se == pytest.approx(float(blocks.std()) / 2)


JUDGED = Safeguards(judge_tokens=252, shadow=False)


@functools.cache
def _long(count: int, start: int = 1) -> list[Tensor]:
    """Return so many batches of prose of which an eighth are tokens enough for a verdict."""
    return list(torch.cat(batches("prose", 8 * count, start=start)).split(128))


def _poison(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(51)
    if kind == "random tokens":
        return torch.randint(0, 97, (128, 64), generator=generator)
    prose = _long(1, 60)[0]
    return prose.flatten()[torch.randperm(prose.numel(), generator=generator)].view_as(prose)


@pytest.mark.tuned
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("shuffled prose", {}), ("random tokens", {"by_text": False})],
    ids=["shuffled prose, by default", "random tokens, taken for the same text"],
)
def test_t14_a_poisoned_chunk_is_undone_bit_for_bit_and_the_step_halved(kind: str, settings: dict[str, Any]) -> None:
    """Where steps are so long that a chunk does harm; with what was shuffled every token is as frequent as before."""
    model = trained_model()
    with RouterAdapter(model, bucket=None, lr=0.1, **settings) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in _long(5)]
        assert any(step.verdict == "accepted" for step in steps)
        before, lr = adapter.state_dict(), adapter.lr
        assert lr > 0
        step = adapter.score_and_learn(_poison(kind))
        after = adapter.state_dict()
        assert step.text == 0, "it was taken for the same text"
        assert step.verdict == "rejected" and not step.learned and step.change_norm == 0
        assert step.judged is not None and "harms text read before" in (step.reason or "")
        assert _same(after["fast"], before["fast"])
        (moments,), (moments_before,) = after["optimizer"], before["optimizer"]
        assert _same(moments["layers"], moments_before["layers"]) and len(moments["layers"]) == 2
        assert moments["lr"] == moments_before["lr"] / 2 and adapter.lr == lr / 2


def test_t14_what_is_plainly_another_text_does_not_reach_what_was_learned() -> None:
    model, home = trained_model(), _long(4)
    ends = []
    for poisoned in (False, True):
        with RouterAdapter(model, bucket=None, lr=0.01) as adapter:
            steps = [adapter.score_and_learn(batch) for batch in home[:3]]
            assert steps[-1].learned and {step.text for step in steps} == {0}
            if poisoned:
                assert adapter.score_and_learn(_poison("random tokens")).text == 1
            step = adapter.score_and_learn(home[3])
            assert step.text == 0
            state = adapter.state_dict()
            ends.append((step.sequence_nll, step.verdict, step.kl, state["fast"], state["optimizer"]))
    assert _same(list(ends[0]), list(ends[1]))


@pytest.mark.parametrize(("sign", "factor"), [(1, 1.15), (-1, 0.7)])
def test_steps_are_shorter_after_one_that_went_too_far(sign: int, factor: float) -> None:
    """The gradient of a batch that the last one helped points against its move; turned round it was too far."""
    model, batch = trained_model(), batches("code", 1)[0]
    with RouterAdapter(model, bucket=None, lr=0.02, steps=4, safeguards=OFF) as adapter:
        adapter._learner.live.optimizer.lr = lr = 0.01
        adapter.score_and_learn(batch)
        state = adapter._learner.state
        assert adapter.lr == lr and state.last_move is not None
        state.last_move = [sign * move for move in state.last_move]
        adapter.score_and_learn(batch)
        assert adapter.lr == pytest.approx(factor * lr)


def test_a_pull_that_outweighs_the_steps_does_not_shorten_them() -> None:
    model, batch = trained_model(), batches("code", 1)[0]
    guards = Safeguards(anchor=0.5, judge=False)
    with RouterAdapter(model, bucket=None, lr=1e-3, steps=4, safeguards=guards) as adapter:
        for _ in range(12):
            assert adapter.score_and_learn(batch).learned
        assert adapter.lr == 1e-3


def test_s3_nonsense_would_have_passed_by_its_own_rows() -> None:
    """Why text that is read no better than by guessing is no evidence: one can learn to expect noise."""
    model = trained_model()
    with _adapter(model, OFF, held_frac=0.25, lr=0.03) as adapter:
        for _ in range(3):
            adapter.score_and_learn(NONSENSE)
        rows = adapter._learner.state.held.rows[-1]
        assert not rows.evidence
        (adapted,), _ = held_nll(adapter._learner.live, [rows], "judge")
        with adapter.slow():
            (trained,), _ = held_nll(adapter._learner.live, [rows], "judge")
    assert adapted.mean() < trained.mean()
    assert trained.mean() > math.log(97)


def test_s3_three_rejections_in_a_row_rest_and_keep_what_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model()
    with _adapter(model, JUDGED, held_frac=0.25, lr=3e-3) as adapter:
        kept = batches("code", 6)
        assert "accepted" in [adapter.score_and_learn(batch).verdict for batch in kept]
        learner = adapter._learner
        learner.state.base = None  # an update that waits for its verdict would be undone with the others
        before = [p.detach().clone() for p in adapter.parameters()]
        monkeypatch.setattr(
            learner, "_verdict", lambda known, judges: Judged("rejected", "for the test", None, None, None)
        )
        steps = [adapter.score_and_learn(batch) for batch in batches("code", 9)[6:]]
        monkeypatch.undo()
        assert [step.verdict for step in steps] == ["rejected"] * 3
        assert adapter.resets == 0 and f"no update for {COOL_DOWN} batches" in (steps[-1].reason or "")
        assert any(bool((p != 0).any()) for p in before)
        assert all(torch.equal(p, b) for p, b in zip(adapter.parameters(), before, strict=True))
        waiting = [adapter.score_and_learn(batch) for batch in batches("prose", COOL_DOWN)]
        assert all(step.verdict == "skipped" and "cooling" in (step.reason or "") for step in waiting)
        assert adapter.score_and_learn(kept[1]).learned


def _rows_of(adapter: RouterAdapter, rows: Tensor) -> Any:
    from thermoe.adapt.reading import Batch, HeldRows

    batch = Batch.of(rows, None, None)
    return HeldRows.of(adapter._learner.state.batches, batch, batch.real, evidence=True)


def test_s3_what_is_held_back_is_not_learned_from() -> None:
    """Changing the rows that are held back changes nothing that is learned."""
    model, ends = trained_model(), []
    batch = batches("prose", 1)[0]
    from thermoe.adapt.reading import Batch

    held = hold_back(Batch.of(batch, None, None), 0.125, "0/default/0/1/held").any(-1)
    assert int(held.sum()) == 2
    other = torch.where(held.unsqueeze(-1), NONSENSE, batch)
    for rows in (batch, other):
        with _adapter(model, Safeguards(kl_cap=None, judge=False, diversity=None)) as adapter:
            adapter.score_and_learn(rows)
            ends.append(_copy(adapter))
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_s3_the_end_of_a_single_row_is_held_back() -> None:
    from thermoe.adapt.reading import Batch

    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, :4] = 0
    weights = torch.ones(1, 20)
    weights[0, 16:] = 0
    held = hold_back(Batch.of(random_tokens(1, 20), mask, weights), 0.25, "")
    used = Batch.of(random_tokens(1, 20), mask, weights).weights > 0
    assert int((held & used).sum()) == 3 and bool(held[0, -1]) and not bool(held[0, :12].any())


def test_s3_held_text_keeps_the_latest_and_enough() -> None:
    model = tiny_moe()
    with _adapter(model, OFF) as adapter:
        text = HeldText(100)
        for number in range(9):
            adapter._learner.state.batches = number
            text.add(_rows_of(adapter, random_tokens(2, 21, seed=number)))
    assert [rows.batch for rows in text.rows] == [6, 7, 8] and text.tokens == 120
    assert [rows.batch for rows in text.since(7)] == [8]
    assert [rows.batch for rows in text.before(7, 41)] == [6, 7]


def test_s3_held_text_follows_a_model_that_is_moved() -> None:
    with _adapter(tiny_moe(), OFF) as adapter:
        text = HeldText(100)
        text.add(_rows_of(adapter, random_tokens(2, 21)))
    text.move_to(torch.device("meta"))
    (rows,) = text.rows
    assert rows.input_ids.is_meta and rows.counted.is_meta and rows.mask is None and rows.tokens == text.tokens == 40


def test_s3_an_update_that_costs_more_is_not_accepted() -> None:
    """States are compared at the same cost: experts that the price left out must not be bought back by learning."""
    model = trained_model()
    set_router(model, "priced", price=0.3, k_min=1)
    with _adapter(model, Safeguards(judge_tokens=252, kl_cap=None, shadow=False), held_frac=0.25) as adapter:
        ratios = [step.cost_ratio for b in batches("code", 8) if (step := adapter.score_and_learn(b)).judged]
        accepted = [r for r in ratios if r is not None]
        assert accepted, "both states ran, and were priced"
        assert all(0.5 < ratio < 2 for ratio in accepted)


# -- S4 shadow -------------------------------------------------------------------------------------------------------


def test_s4_the_cusum() -> None:
    level, alarm = cusum(0.0, Paired(0.02, 0.01, 512))
    assert level == pytest.approx(1.5) and not alarm
    assert cusum(level, Paired(0.05, 0.01, 512)) == (pytest.approx(6.0), True)
    assert cusum(3.0, Paired(-1.0, 0.01, 512)) == (0.0, False)
    assert cusum(3.0, None) == (3.0, False) and cusum(3.0, Paired(1.0, None, 100)) == (3.0, False)


def test_s4_the_shadow_resets_what_has_become_worse() -> None:
    model = trained_model()
    with _adapter(model, Safeguards(judge=False, kl_cap=None, shadow_every=4), held_frac=0.25) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in batches("prose", 4)]
        assert steps[3].shadow is not None and all(step.shadow is None for step in steps[:3])
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter.normal_(generator=torch.Generator().manual_seed(0))
        steps = [adapter.score_and_learn(batch) for batch in batches("prose", 4, start=4)]
        assert steps[-1].verdict == "reset" and "trained routers are better" in (steps[-1].reason or "")
        assert adapter.resets == 1 and all((p == 0).all() for p in adapter.parameters())
        assert adapter.ledger.counts["shadow"] == 2, "the scoring forward is the adapted side"


def test_s4_routers_that_have_not_moved_have_no_shadow() -> None:
    model = trained_model()
    with _adapter(model, Safeguards(shadow_every=1), lr=0.0) as adapter:
        for batch in batches("prose", 3):
            assert adapter.score_and_learn(batch).shadow is None
        assert adapter.ledger.counts["shadow"] == 0


# -- S5 diversity ----------------------------------------------------------------------------------------------------


def test_s5_the_ratio_is_that_of_effective_experts() -> None:
    even = torch.eye(8).repeat(4, 1)
    crowded = torch.zeros(32, 8)
    crowded[:, 0] = 1
    loads = (top_k_load(even, 1), top_k_load(crowded, 1))
    assert diversity_ratio([loads]).item() == pytest.approx(1 / 8)


def test_s5_crowded_routers_are_pushed_back_then_reset() -> None:
    model = trained_model()
    guards = Safeguards(judge=False, kl_cap=None, shadow=False, anchor=1.0)
    with _adapter(model, guards, lr=1e-4, steps=4, family="bias") as adapter:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter[:2] = 50.0  # two experts take every token
        before = _copy(adapter)
        steps = [adapter.score_and_learn(batch) for batch in batches("prose", 6)]
        assert [step.verdict for step in steps] == ["accepted"] * 5 + ["reset"]
        assert "fewer than" in (steps[-1].reason or "")
        assert all((p == 0).all() for p in adapter.parameters())
    with _adapter(model, guards, lr=1e-4, steps=4, family="bias") as adapter:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter[:2] = 50.0
        for batch in batches("prose", 3):
            adapter.score_and_learn(batch)
        # The first layer's trained router uses many experts; the second's so few that two are more than half of them.
        moved = adapter.parameters()[0].detach() - before[0]
        assert (moved[:2] < -0.009).all() and (moved[2:] > -1e-3).all() and (moved[2:] > 0.009).any()


# -- S7 numerics: also test_router_adapter.py -------------------------------------------------------------------------


def test_s7_a_gradient_that_is_not_finite_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model, OFF) as adapter:
        adapter.score_and_learn(random_tokens(2, 12))
        learn = adapter._learner.live.objective.learn

        def broken(batch: Any) -> Any:
            found = learn(batch)
            found.gradients[0][0] = float("nan")
            return found

        monkeypatch.setattr(adapter._learner.live.objective, "learn", broken)
        step = adapter.score_and_learn(random_tokens(2, 12))
        assert step.verdict == "reset" and "gradient is not finite" in (step.reason or "")
        assert all((p == 0).all() for p in adapter.parameters()) and adapter.resets == 1


def test_s7_a_later_part_that_is_not_finite_resets_what_the_earlier_taught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model, OFF) as adapter:
        assert adapter.score_and_learn(random_tokens(8, 12)).learned
        learn, asked = adapter._learner.live.objective.learn, []

        def broken(batch: Any) -> Any:
            found = learn(batch)
            asked.append(None)
            if len(asked) == 3:
                found.gradients[0][0] = float("nan")
            return found

        monkeypatch.setattr(adapter._learner.live.objective, "learn", broken)
        step = adapter.score_and_learn(random_tokens(8, 12))
        assert len(asked) == 3 and step.verdict == "reset" and "gradient is not finite" in (step.reason or "")
        assert all((p == 0).all() for p in adapter.parameters()) and adapter.resets == 1


def test_s7_an_objective_that_finds_something_not_finite_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model, OFF) as adapter:
        assert adapter.score_and_learn(random_tokens(8, 12)).learned
        found = Proposal(None, 1.0, "the outputs of the experts are not finite")
        monkeypatch.setattr(adapter._learner.live.objective, "learn", lambda batch: found)
        step = adapter.score_and_learn(random_tokens(8, 12))
        assert step.verdict == "reset" and all((p == 0).all() for p in adapter.parameters())


# -- S9 isolation ------------------------------------------------------------------------------------------------------


def test_s9_streams_share_nothing_that_is_learned() -> None:
    model = trained_model()
    alone, code = {}, batches("code", 4)
    for name, rows in (("prose", batches("prose", 4)), ("code", code)):
        with _adapter(model, JUDGED, held_frac=0.25) as adapter:
            adapter.stream(name)
            alone[name] = [adapter.score_and_learn(batch) for batch in rows]
    with _adapter(model, JUDGED, held_frac=0.25) as adapter:
        for i, batch in enumerate(batches("prose", 4)):
            adapter.stream("prose")
            assert torch.equal(adapter.score_and_learn(batch).sequence_nll, alone["prose"][i].sequence_nll)
            with adapter.stream("code") as inside:
                step = inside.score_and_learn(code[i])
            assert torch.equal(step.sequence_nll, alone["code"][i].sequence_nll) and step.stream == "code"
            assert step.verdict == alone["code"][i].verdict and step.kl == alone["code"][i].kl
            assert adapter.metrics["batches"] == i + 1, "back in the stream of before"
        assert set(adapter.streams) == {"default", "prose", "code"}
        adapter.stream("default")
        assert all((p == 0).all() for p in adapter.parameters()) and adapter.updates == 0
        adapter.forget_stream("code")
        for name in ("code", "default"):
            with pytest.raises(ConfigError, match="cannot be dropped"):
                adapter.forget_stream(name)
        for bad in ("", None, 3):
            with pytest.raises(ConfigError, match="called"):
                adapter.stream(bad)  # type: ignore[arg-type]


def test_s9_models_share_nothing() -> None:
    one, two = trained_model(), trained_model()
    with _adapter(one, OFF) as first, _adapter(two, OFF) as second:
        first.score_and_learn(batches("code", 1)[0])
        assert all((p == 0).all() for p in second.parameters())


# -- S10 determinism ---------------------------------------------------------------------------------------------------


def test_s10_the_same_seed_and_stream_give_the_same_bits() -> None:
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))
        with _adapter(trained_model(), JUDGED, held_frac=0.25, seed=seed) as adapter:
            steps = [adapter.score_and_learn(batch) for batch in batches("code", 5)]
            runs.append(([s.sequence_nll for s in steps], [s.verdict for s in steps], _copy(adapter)))
    assert _same(list(runs[0]), list(runs[1]))
    assert not _same(runs[0][2], runs[2][2]), "another seed holds other rows back"


def test_s10_frozen_scores_in_the_present_state_and_changes_nothing() -> None:
    model = trained_model()
    with _adapter(model, JUDGED, held_frac=0.25) as adapter:
        for batch in batches("code", 3):
            adapter.score_and_learn(batch)
        before, probe = adapter.state_dict(), batches("code", 2, start=5)
        with torch.no_grad():
            logits = model(probe[0]).logits
        with adapter.frozen():
            steps = [adapter.score_and_learn(batch) for batch in probe]
            assert all(step.verdict == "skipped" and "frozen" in (step.reason or "") for step in steps)
            with torch.no_grad():
                assert torch.equal(model(probe[0]).logits, logits)
        assert _same(adapter.state_dict(), before)
        assert adapter.score_and_learn(probe[0]).learned


def test_s10_slow_is_the_trained_router_bit_for_bit() -> None:
    model, frozen = trained_model(), trained_model()
    probe = batches("code", 1)[0]
    with torch.no_grad():
        expected = frozen(probe).logits
    with _adapter(model, OFF) as adapter:
        adapter.score_and_learn(probe)
        with torch.no_grad():
            moved = model(probe).logits
            with adapter.slow():
                assert torch.equal(model(probe).logits, expected)
                step = adapter.score_and_learn(probe)
                assert torch.equal(step.sequence_nll, _nll(expected, probe)) and not step.learned
                replaced = set_router(model, "priced")
                assert torch.equal(model(probe).logits, expected)
            assert torch.equal(model(probe).logits, moved), "what was learned is back, on the router put in meanwhile"
            set_router(model, replaced)
            adapter.score_and_learn(probe)
            assert all(layer.router.fast is not None for _, layer in moe_layers(model))


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(ids), -1).sum(-1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kl_cap": 0},
        {"kl_cap": -1.0},
        {"kl_cap": float("nan")},
        {"kl_cap": "x"},
        {"anchor": 0},
        {"anchor": 1.1},
        {"retreat": 0},
        {"retreat": 1.1},
        {"retreat": float("nan")},
        {"judge": 1},
        {"judge_tokens": 0},
        {"judge_tokens": 2.5},
        {"judge_tokens": "x"},
        {"judge_tokens": None},
        {"kl_cap": 10**400},
        {"judge_tokens_most": 10},
        {"shadow": None},
        {"shadow_every": 0},
        {"diversity": 2},
        {"diversity": True},
    ],
    ids=str,
)
def test_settings_outside_their_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        Safeguards(**wrong)
    assert error.value.where == f"adapt.{next(iter(wrong))}" and error.value.accepted and error.value.fix


def test_s4_a_change_of_text_calls_the_shadow_at_once_and_ends_a_rest() -> None:
    model = trained_model()
    guards = Safeguards(judge=False, shadow_every=100)
    with _adapter(model, guards, bucket=0.3) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in batches("prose", 12)]
        state = adapter._learner.state
        state.cool_until, state.rejects_in_row = 100, 2
        seen = [adapter.score_and_learn(batch) for batch in batches("code", 1)]
        assert seen[0].shadow is not None, "an update leaves the joules for it"
        assert state.cool_until == 0 and state.rejects_in_row == 0 and state.held.first == 13
        assert not state.held.before(12, 1000), "held-back prose judges no code"
        assert sum(step.shadow is not None for step in steps) < 4
        first_j = adapter.bucket.capacity_j
        assert adapter.ledger.energy_j <= 0.3 * adapter.bucket.served_j + first_j


@pytest.mark.parametrize("grouped", [False, True])
def test_s4_the_shadow_measures_what_the_served_text_lost(grouped: bool) -> None:
    """Adapted minus trained on the batch just scored, before anything was learned from it."""
    model, frozen = trained_model(), trained_model()
    for one in (model, frozen):
        if grouped:
            set_router(one, "priced", price=0.1, open_cost=[0.5] * 8, group_by_position=True)
    rows = batches("code", 5)
    with _adapter(model, Safeguards(judge=False, shadow_every=4), held_frac=0.25) as adapter:
        for batch in rows[:3]:
            adapter.score_and_learn(batch)
        with adapter.frozen():
            adapted = _nll(_raw(model, rows[3]), rows[3])
        step = adapter.score_and_learn(rows[3])
    trained = _nll(_raw(frozen, rows[3]), rows[3])
    assert step.shadow is not None and step.shadow.tokens == 16 * 63
    assert step.shadow.mean == pytest.approx(float((adapted - trained).sum()) / (16 * 63), abs=1e-5)


@torch.no_grad()
def _raw(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits
