"""The local teacher finds out which expert does what, by looking alone: no gradient, and no output that changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from planted import audited, planted_model, recall
from torch import Tensor

from thermoe.adapt.audit import recording
from thermoe.adapt.learning_work import is_serving
from thermoe.adapt.local_teacher import LocalTeacher
from thermoe.errors import CheckpointError, ConfigError, RoutingError
from thermoe.moe.layer import moe_layers
from thermoe.routers.fast_weights import FastWeights
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

HELD = random_tokens(16, 64, seed=999)


def _fast(model: Any) -> list[Tensor]:
    return [t.clone() for _, layer in moe_layers(model) for t in layer.router.fast.state_dict().values()]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", [1, 2])
def test_planted_roles_are_recovered_in_16_chunks(seed: int) -> None:
    model = planted_model(seed)
    assert recall(model, HELD) < 0.3
    teacher = LocalTeacher(model, min_tokens=32)
    for chunk in range(16):
        assert teacher.audit(random_tokens(1, 32, seed=chunk)).reason is None
    assert teacher.updates == 16
    assert recall(model, HELD) > 0.9
    assert recall(model, HELD) > recall(planted_model(seed, permuted=False), HELD) - 0.02, "as good as told right"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_bias_alone_cannot_recover_them(seed: int) -> None:
    model = planted_model(seed, family="bias")
    teacher = LocalTeacher(model, min_tokens=32)
    for chunk in range(16):
        teacher.audit(random_tokens(1, 32, seed=chunk))
    assert teacher.updates == 16 and recall(model, HELD) < 0.4


@pytest.mark.tuned
def test_a_router_that_is_right_stays_right() -> None:
    model = planted_model(1, permuted=False)
    before = recall(model, HELD)
    report = LocalTeacher(model).audit(random_tokens(8, 64))
    assert report.updated and recall(model, HELD) > before - 0.01


def test_outputs_are_the_same_bit_for_bit_while_all_experts_run() -> None:
    model, ids = planted_model(), random_tokens(4, 24)
    with torch.no_grad():
        plain = model(ids).logits
        routes = [layer.last_routing.expert_index for _, layer in moe_layers(model)]
        with recording(dict(moe_layers(model))) as seen:
            watched = model(ids).logits
    assert len(seen) == 2 and torch.equal(plain, watched)
    assert _equal(routes, [layer.last_routing.expert_index for _, layer in moe_layers(model)])


def test_there_is_no_gradient_and_nothing_but_fast_weights_moves() -> None:
    model = planted_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".fast." not in name}
    modes: list[bool] = []
    serving: list[bool] = []
    handle = model.transformer.h[1].mlp.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    other = model.transformer.register_forward_hook(lambda *_: serving.append(is_serving()))
    with torch.enable_grad():
        report = LocalTeacher(model, min_tokens=32).audit(random_tokens(4, 24))
        assert torch.is_grad_enabled()
    handle.remove()
    other.remove()
    assert report.updated and modes == [False] and serving == [False] and is_serving()
    assert model.training
    assert all(p.grad is None and p.grad_fn is None for p in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(layer._forward_hooks for _, layer in moe_layers(model))


def test_an_update_waits_for_tokens_enough() -> None:
    model = planted_model()
    start, teacher = _fast(model), LocalTeacher(model)
    first = teacher.audit(random_tokens(4, 64))
    assert (first.tokens, first.pending, first.updated) == (256, 256, ())
    assert first.reason == "256 of 512 audit tokens are gathered"
    assert first.pairs_run == 2 * 8 * 256 and first.error_before == {}
    assert _equal(start, _fast(model))
    second = teacher.audit(random_tokens(4, 64, seed=1))
    assert second.pending == 0 and second.reason is None and teacher.updates == 1
    assert second.updated == tuple(name for name, _ in moe_layers(model))
    for name in second.updated:
        assert 0 < second.error_after[name] < 0.5 * second.error_before[name]
        assert 0 < second.caught[name] < 1
    assert teacher.audit(random_tokens(8, 64, seed=2)).caught[name] > second.caught[name] + 0.2


def test_the_fit_is_the_same_however_the_audits_come() -> None:
    model, twin = planted_model(), planted_model()
    whole, pieces = LocalTeacher(model), LocalTeacher(twin)
    ids = random_tokens(8, 64)
    whole.audit(ids)
    for row in ids.split(1):
        pieces.audit(row)
    for a, b in zip(_fast(model), _fast(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_same_text_gives_the_same_bits() -> None:
    ends = []
    for _ in range(2):
        model = planted_model()
        teacher = LocalTeacher(model, min_tokens=100, seed=5)
        for chunk in range(4):
            teacher.audit(random_tokens(2, 64, seed=chunk))
        ends.append(_fast(model))
    assert _equal(*ends)


def test_padding_and_tokens_that_count_nothing_teach_nothing() -> None:
    ids = random_tokens(4, 40)
    mask = torch.ones_like(ids)
    mask[1, 25:], mask[3, 10:] = 0, 0
    garbage = torch.where(mask > 0, ids, random_tokens(4, 40, seed=7))
    ends = []
    for tokens in (ids, garbage):
        model = planted_model()
        report = LocalTeacher(model, min_tokens=32).audit(tokens, mask)
        assert report.tokens == 4 * 40 - 15 - 30
        ends.append(_fast(model))
    assert _equal(*ends)
    model = planted_model()
    report = LocalTeacher(model, min_tokens=32).audit(ids, weights=mask.float())
    assert report.tokens == 4 * 40 - 15 - 30
    assert _equal(_fast(model), ends[0]), "padding at the end changes no earlier token"
    start = _fast(planted_model())
    model = planted_model()
    nothing = LocalTeacher(model, min_tokens=1).audit(ids, torch.zeros_like(mask))
    assert nothing.reason == "every token is padding or counts nothing" and nothing.tokens == 0
    assert _equal(start, _fast(model))


def test_weights_count_a_token_as_often_as_they_say() -> None:
    """Twice the weight on one row is that row twice over: in what they predict, since only deltas go by the mean."""
    ids = random_tokens(2, 40)
    predictions = []
    for rows, weights in ((ids, torch.tensor([[2.0], [1.0]]).expand(2, 40)), (ids[[0, 0, 1]], None), (ids, None)):
        model = planted_model()
        LocalTeacher(model, min_tokens=32, prior_precision=1e-9).audit(rows, weights=weights)
        predictions.append(next(iter(audited(model, HELD).values())).live)
    torch.testing.assert_close(*predictions[:2], rtol=1e-3, atol=1e-3)
    assert (predictions[0] - predictions[2]).abs().max() > 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_leave_everything_as_it_is(value: float) -> None:
    model = planted_model()
    teacher = LocalTeacher(model, min_tokens=32)
    teacher.audit(random_tokens(2, 64))
    before, fits = _fast(model), copy.deepcopy(teacher.state_dict()["layers"])
    layer = model.transformer.h[0].mlp
    row = layer.experts.down_proj[2].detach().clone()
    with torch.no_grad():
        layer.experts.down_proj[2] = value
    report = teacher.audit(random_tokens(2, 64, seed=1))
    assert report.updated == () and report.reason == "the outputs of the experts are not finite"
    assert _equal(before, _fast(model))
    for name, saved in fits.items():
        assert torch.equal(teacher.state_dict()["layers"][name]["fit"]["information"], saved["fit"]["information"])
    with torch.no_grad():
        layer.experts.down_proj[2] = row
    assert teacher.audit(random_tokens(2, 64, seed=2)).reason is None


def test_an_alarm_lets_the_past_count_no_more_than_an_update() -> None:
    """Roles that change over: noticed, and learned anew at once instead of after as long as before."""
    model = planted_model(1)
    teacher = LocalTeacher(model, min_tokens=64, forgetting=1.0)
    teacher.schedule.burst_tokens = 0
    for chunk in range(30):
        assert not teacher.audit(random_tokens(1, 64, seed=chunk)).alarm
    with torch.no_grad():
        for _, layer in moe_layers(model):
            for weight in (layer.experts.up_weight, layer.experts.down_proj):
                weight.copy_(weight.roll(2, 0))
    assert recall(model, HELD) < 0.5
    reports = [teacher.audit(random_tokens(1, 64, seed=100 + chunk)) for chunk in range(8)]
    assert any(report.alarm for report in reports[:3])
    assert teacher.schedule.burst_tokens > 0
    assert recall(model, HELD) > 0.85
    slow = planted_model(1)
    deaf = LocalTeacher(slow, min_tokens=64, forgetting=1.0)
    deaf.alarm.observe = lambda error: False
    for chunk in range(30):
        deaf.audit(random_tokens(1, 64, seed=chunk))
    with torch.no_grad():
        for _, layer in moe_layers(slow):
            for weight in (layer.experts.up_weight, layer.experts.down_proj):
                weight.copy_(weight.roll(2, 0))
    for chunk in range(8):
        deaf.audit(random_tokens(1, 64, seed=100 + chunk))
    assert recall(slow, HELD) < recall(model, HELD) - 0.1


def test_a_saved_state_goes_on_bit_equal_and_does_not_change() -> None:
    model = planted_model()
    teacher = LocalTeacher(model)
    for chunk in range(3):
        teacher.audit(random_tokens(4, 64, seed=chunk))
    saved, fast = teacher.state_dict(), [copy.deepcopy(layer.router.fast) for _, layer in moe_layers(model)]
    after = [teacher.audit(random_tokens(8, 64, seed=chunk)) for chunk in (3, 4)]
    twin = planted_model()
    for (_, layer), own in zip(moe_layers(twin), fast, strict=True):
        layer.router.fast = own
    second = LocalTeacher(twin)
    second.load_state_dict(saved)
    assert second.pending == 256 and second.updates == 1
    assert [second.audit(random_tokens(8, 64, seed=chunk)) for chunk in (3, 4)] == after
    assert _equal(_fast(model), _fast(twin))


def test_a_reset_teacher_begins_anew() -> None:
    model, other = planted_model(), planted_model()
    teacher = LocalTeacher(model)
    teacher.audit(random_tokens(8, 64, seed=5))
    teacher.reset()
    for _, layer in moe_layers(model):
        layer.router.fast.reset()
    teacher.audit(random_tokens(8, 64))
    LocalTeacher(other).audit(random_tokens(8, 64))
    assert _equal(_fast(model), _fast(other))


def test_only_named_layers_are_taught() -> None:
    model = planted_model()
    names = [name for name, _ in moe_layers(model)]
    report = LocalTeacher(model, min_tokens=32).audit(random_tokens(2, 64), layers=names[1:])
    assert report.updated == (names[1],) and list(report.caught) == [names[1]]
    assert (model.transformer.h[0].mlp.router.fast.delta == 0).all()
    assert (model.transformer.h[1].mlp.router.fast.delta != 0).any()


def test_works_in_inference_mode_in_half_precision_and_with_unequal_experts() -> None:
    model = planted_model()
    with torch.inference_mode():
        teacher = LocalTeacher(model, min_tokens=32)
        teacher.audit(random_tokens(2, 64))
    assert teacher.audit(random_tokens(2, 64, seed=1)).updated
    half = planted_model().bfloat16()
    assert LocalTeacher(half).audit(random_tokens(8, 64)).updated
    assert recall(half, HELD) > 0.85
    unequal = tiny_moe(widths=[32, 32, 16, 16, 8, 8, 8, 8], top_k=3, shared_size=0)
    for _, layer in moe_layers(unequal):
        layer.router.fast = FastWeights(32, 8, "mix")
    report = LocalTeacher(unequal).audit(random_tokens(8, 64))
    assert all(report.error_after[name] < report.error_before[name] for name in report.updated) and report.updated


def test_models_that_partition_nothing_are_refused_with_what_to_do() -> None:
    for model, words in (
        (tiny_moe(method="copy"), "next_token"),
        (tiny_moe(method="virtual", groups=2), "next_token"),
        (tiny_gpt2(), "convert_to_moe"),
    ):
        with pytest.raises(RoutingError) as error:
            LocalTeacher(model)
        assert words in error.value.fix and error.value.accepted


def test_an_attached_model_is_refused() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from thermoe import attach_router

    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    attach_router(model)
    with pytest.raises(RoutingError, match="attached") as error:
        LocalTeacher(model)
    assert "next_token" in error.value.fix


@pytest.mark.parametrize("family", [None, "full", "low_rank"])
def test_fast_weights_that_cannot_be_fitted_are_refused(family: str | None) -> None:
    model = planted_model(family=family)
    with pytest.raises(RoutingError) as error:
        LocalTeacher(model).audit(random_tokens(2, 64))
    assert 'objective="local"' in error.value.fix
    assert not any(layer._forward_hooks for _, layer in moe_layers(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"forgetting": 0.0},
        {"forgetting": 1.01},
        {"prior_precision": -1.0},
        {"min_tokens": 0},
        {"min_tokens": 1.5},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"seed": "x"},
    ],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        LocalTeacher(planted_model(), **settings)
    assert error.value.accepted and error.value.where in settings


def test_bad_input_is_refused_and_changes_nothing() -> None:
    model = planted_model()
    teacher, ids = LocalTeacher(model, min_tokens=32), random_tokens(2, 40)
    for call in (
        lambda: teacher.audit(ids[:, :1]),
        lambda: teacher.audit(ids.float()),
        lambda: teacher.audit(ids, torch.ones(2, 39)),
        lambda: teacher.audit(ids, weights=-torch.ones(2, 40)),
        lambda: teacher.audit(ids, weights=torch.full((2, 40), torch.nan)),
        lambda: teacher.audit(ids, layers=["nowhere"]),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert error.value.accepted and error.value.fix
    assert teacher.pending == 0 and all((t == 0).all() for t in _fast(model)[::4])
    good = teacher.state_dict()
    for state in ({}, {**good, "layers": {}}, {**good, "alarm": {}}, {**good, "updates": None}):
        with pytest.raises(CheckpointError):
            teacher.load_state_dict(state)
