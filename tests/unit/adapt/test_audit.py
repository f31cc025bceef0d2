"""Audits: shares that add up, targets that only reorder, a choice of sequences that keeps its rate, an alarm."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thermoe.adapt.audit import output_shares, ranked_like, recording
from thermoe.adapt.audit_schedule import BURST_TOKENS, AuditSchedule, ShiftAlarm, audit_rate
from thermoe.errors import CheckpointError, ConfigError
from thermoe.moe.layer import moe_layers
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), experts=st.integers(1, 9), width=st.integers(1, 9), scale=st.floats(1e-3, 1e3))
def test_shares_add_up_to_one_or_more(seed: int, experts: int, width: int, scale: float) -> None:
    parts = scale * torch.randn(experts, 20, width, generator=torch.Generator().manual_seed(seed)).double()
    whole = parts.sum(0)
    sound = whole.norm(dim=-1) > 1e-2 * parts.norm(dim=-1).sum(0)  # else float32 has too few digits for the ratio
    shares, opposes = output_shares(parts).double(), (torch.einsum("end,nd->en", parts, whole) < 0).any(0)
    total = shares.sum(-1)
    assert (shares >= 0).all()
    assert (total[sound] >= 1 - 1e-3).all()
    assert (total[sound & opposes] > 1 - 1e-6).all()
    torch.testing.assert_close(total[sound & ~opposes], torch.ones_like(total)[sound & ~opposes], rtol=1e-3, atol=1e-3)


def test_a_sum_of_nothing_has_no_shares() -> None:
    assert (output_shares(torch.zeros(3, 2, 4)) == 0).all()
    opposed = torch.tensor([[[1.0, 0.0]], [[-1.0, 0.0]]])
    assert torch.isfinite(output_shares(opposed)).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), experts=st.integers(1, 9), levels=st.integers(1, 5))
def test_targets_are_the_logits_in_the_order_of_the_shares(seed: int, experts: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(16, experts, generator=generator)
    shares = torch.randint(levels, (16, experts), generator=generator).float()
    target = ranked_like(logits, shares)
    assert torch.equal(target.sort(-1).values, logits.sort(-1).values)
    above = shares.unsqueeze(-1) > shares.unsqueeze(-2)
    assert (target.unsqueeze(-1) >= target.unsqueeze(-2))[above].all()
    tied = shares.unsqueeze(-1) == shares.unsqueeze(-2)
    agree = (target.unsqueeze(-1) > target.unsqueeze(-2)) == (logits.unsqueeze(-1) > logits.unsqueeze(-2))
    assert agree[tied].all(), "ties keep the order of the logits"
    assert torch.equal(ranked_like(logits, logits), logits)
    assert torch.equal(ranked_like(logits, torch.zeros_like(logits)), logits)


@pytest.mark.parametrize("ramp", [0.0, 0.4, 1.0])
def test_the_parts_are_what_each_expert_would_add(ramp: float) -> None:
    """Held against the layer itself, run with every expert, the output bias taken off."""
    model = tiny_moe(top_k=3)
    name, layer = next(iter(moe_layers(model)))
    layer.router.ramp.fill_(ramp)
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with recording({name: layer}) as seen, torch.no_grad():
        model(random_tokens(2, 12))
    handle.remove()
    layer.router.top_k = 8
    with torch.no_grad():
        whole = (layer(inputs[0]) - layer.output_bias).flatten(0, 1)
        outputs = layer.experts.forward_all(inputs[0].flatten(0, 1))
    p = torch.softmax(seen[name].slow, -1)
    parts = outputs * ((1 - ramp) + ramp * 8 * p).T.unsqueeze(-1)
    torch.testing.assert_close(parts.sum(0), whole, rtol=1e-4, atol=1e-5)
    along = (parts * whole).sum(-1).T / whole.square().sum(-1, keepdim=True)
    torch.testing.assert_close(seen[name].shares, along.clamp(min=0), rtol=1e-3, atol=1e-4)


def test_caught_compares_the_chosen_with_as_many_best() -> None:
    model, ids = tiny_moe(top_k=3), random_tokens(2, 12)
    set_router(model, "priced", price=0.1, k_min=0)
    layers = dict(moe_layers(model))
    with recording(layers) as seen, torch.no_grad():
        model(ids)
    sizes = set()
    for name, layer in layers.items():
        index = layer.last_routing.expert_index
        for t in range(24):
            chosen = [e for e in index[t].tolist() if e < 8]
            sizes.add(len(chosen))
            if not chosen:
                assert seen[name].caught[t].isnan()
                continue
            shares = seen[name].shares[t]
            best = shares.sort(descending=True).values[: len(chosen)].sum()
            assert float(seen[name].caught[t]) == pytest.approx(float(shares[chosen].sum() / best), rel=1e-5)
    assert len(sizes) > 1
    assert not any(layer._forward_hooks for layer in layers.values())


def test_the_rate_is_one_in_64_or_two_percent_of_expert_arithmetic() -> None:
    assert audit_rate(8, 4) == 1 / 64
    assert audit_rate(8, 1) == pytest.approx(0.02 / 7)
    assert audit_rate(4, 4) == 1 / 64
    for experts, top_k in ((8, 2), (64, 8), (32, 4)):
        assert audit_rate(experts, top_k) * (experts / top_k - 1) <= 0.02 + 1e-12
    for experts, top_k in ((8, 9), (8, 0), (8.0, 2), (8, True), (8, float("nan"))):
        with pytest.raises(ConfigError):
            audit_rate(experts, top_k)


def test_one_sequence_of_each_block_is_audited_at_a_seeded_place() -> None:
    def chosen(seed: int, chunk: int) -> list[int]:
        schedule, found = AuditSchedule(1 / 20, seed=seed), []
        schedule.burst_tokens = 0
        for start in range(0, 400, chunk):
            found += [start + row for row in schedule.choose([128] * chunk)]
        return found

    first = chosen(0, 1)
    assert [place // 20 for place in first] == list(range(20))
    assert len({place % 20 for place in first}) > 5
    assert first == chosen(0, 1) == chosen(0, 16), "however the stream is cut into batches"
    assert first != chosen(1, 1)


def test_a_stream_begins_with_a_burst_and_an_alarm_sets_off_another() -> None:
    schedule = AuditSchedule(1 / 1000)
    length = 500
    within = BURST_TOKENS // length
    found = [row for row in range(200) if schedule.choose([length])]
    assert [row for row in found if row < within] == list(range(0, within, 8))
    assert not [row for row in found if within <= row < 200 and not schedule._due(row)]
    schedule.burst()
    assert schedule.most(16) >= 2 and schedule.choose([length] * 16)[:2] == [0, 8]
    assert schedule.choose([0] * 64) == [], "an empty sequence cannot be audited"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), rate=st.floats(0.01, 1.0), rows=st.integers(0, 40), warm=st.integers(0, 100))
def test_never_more_are_due_than_was_said(seed: int, rate: float, rows: int, warm: int) -> None:
    schedule = AuditSchedule(rate, seed=seed)
    schedule.choose([400] * warm)
    assert len(AuditSchedule(rate, seed=seed).choose([1] * rows)) <= rows
    assert len(schedule.choose([1] * rows)) <= _most(rate, seed, warm, rows)


def _most(rate: float, seed: int, warm: int, rows: int) -> int:
    schedule = AuditSchedule(rate, seed=seed)
    schedule.choose([400] * warm)
    return schedule.most(rows)


def test_a_saved_position_goes_on_alike_and_bad_ones_are_refused() -> None:
    schedule, twin = AuditSchedule(0.05, seed=3), AuditSchedule(0.05, seed=3)
    schedule.choose([300] * 33)
    twin.load_state_dict(schedule.state_dict())
    assert twin.choose([300] * 200) == schedule.choose([300] * 200)
    for state in ({}, {**twin.state_dict(), "sequences": 1.5}, None):
        with pytest.raises(CheckpointError):
            schedule.load_state_dict(state)
    for rate in (0.0, 1.5, float("nan"), "1", True):
        with pytest.raises(ConfigError):
            AuditSchedule(rate)
    with pytest.raises(ConfigError):
        AuditSchedule(0.1, seed=0.5)


def _alarms(errors: list[float]) -> list[int]:
    alarm = ShiftAlarm()
    return [i for i, error in enumerate(errors) if alarm.observe(error)]


def test_the_alarm_goes_off_soon_after_a_step_and_rarely_without() -> None:
    delays, false = [], 0
    for seed in range(100):
        draw = random.Random(seed)
        steady = [0.2 + 0.02 * draw.gauss(0, 1) for _ in range(60)]
        false += len(_alarms(steady))
        found = _alarms(steady[:30] + [error + 0.06 for error in steady[30:]])
        if not any(20 < i < 30 for i in found):  # one that went off just before is still learning what is usual
            delays.append(next((i - 30 for i in found if i >= 30), 30))
    assert len(delays) > 80 and sorted(delays)[len(delays) // 2] <= 2 and max(delays) <= 6
    assert false <= 80, "one in 75 observations"


def test_easier_text_is_other_text_too_and_what_is_not_finite_is_left_out() -> None:
    draw = random.Random(1)
    assert _alarms([0.2 + 0.02 * draw.gauss(0, 1) for _ in range(20)] + [0.1] * 5) == [20]
    draw = random.Random(0)
    errors = [0.2 + 0.02 * draw.gauss(0, 1) for _ in range(20)] + [0.5] * 5
    broken = [e for error in errors for e in (error, float("nan"))]
    assert [i // 2 for i in _alarms(broken)] == _alarms(errors) != []


def test_a_saved_alarm_goes_on_alike() -> None:
    first, second = ShiftAlarm(), ShiftAlarm()
    errors = [0.2 + 0.01 * (i % 3) for i in range(12)] + [0.3] * 20
    for error in errors[:14]:
        first.observe(error)
    second.load_state_dict(first.state_dict())
    assert [first.observe(e) for e in errors[14:]] == [second.observe(e) for e in errors[14:]]
    for state in ({}, {"count": 1}, {**first.state_dict(), "mean": "x"}, None):
        with pytest.raises(CheckpointError):
            second.load_state_dict(state)
