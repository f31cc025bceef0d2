"""Shift studies: scored before learned, joules as decoded, budgets that hold, intervals on known numbers, resuming."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.adapt.streams import Streams
from thermoe.compare import shift
from thermoe.compare.decode_cost import DecodeCost, choices_of
from thermoe.compare.dynamic_evaluation import DynamicEvaluation
from thermoe.compare.shift import run_shift
from thermoe.compare.shift_analysis import (
    check_shift,
    difference,
    joules_per_token,
    paired_interval,
    per_sequence,
    worst_window,
)
from thermoe.compare.shift_spec import (
    METRICS,
    ORDERS,
    SEGMENTS,
    ShiftPrediction,
    ShiftSpec,
    load_shift,
    shift_names,
)
from thermoe.compare.shift_trial import ShiftTexts, calibrate, read_stream, reader_of, set_policy, stream_of
from thermoe.compare.study_spec import preset_kinds
from thermoe.energy.cost_model import CostModel
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError, DataError, RunFolderError, UnknownNameError
from thermoe.evaluation import sequence_nll
from thermoe.models.frame import build_frame
from thermoe.moe.layer import collect_routing, routed_modules
from thermoe.results import RunFolder

TINY = [
    *("steps=3", "seeds=1", "workers=1", "batch_size=4", "sequence_length=16", "decoded=4", "segment_batches=2"),
    *("hidden_size=16", "layers=2", "heads=2", "num_experts=8", "top_k=2", "expert_width=8", "vocab_size=300"),
    *("prose_bytes=20000", "python_bytes=60000", "calibration_batches=1", "window=2", "adapt_lr=0.05"),
]
LEARNING = ("adapted", "adapted_budget", "all_weights")


def _spec(*more: str) -> ShiftSpec:
    return load_shift("shift", [*TINY, *more])


def _texts(spec: ShiftSpec) -> ShiftTexts:
    generator = torch.Generator().manual_seed(5)

    def rows(count: int) -> torch.Tensor:
        return torch.randint(0, 300, (count, spec.sequence_length), generator=generator)

    stream = {segment: rows(spec.segment_batches * spec.decoded) for segment, _ in SEGMENTS}
    return ShiftTexts({"prose": rows(16), "python": rows(16)}, stream, rows(16))


def _model(spec: ShiftSpec, *, sharpness: float = 20.0) -> Any:
    model = build_frame(
        "moe", vocab_size=300, sequence_length=16, hidden_size=16, layers=2, heads=2, num_experts=8, top_k=2,
        expert_width=8, seed=3,
    )  # fmt: skip
    with torch.no_grad():
        for _, module in routed_modules(model):
            module.router.weight.mul_(sharpness)  # so that benefits differ
    return model.eval()


@functools.cache
def _calibrated() -> dict[str, Any]:
    spec = _spec()
    return calibrate(spec, _model(spec), _texts(spec).calibration)


# -- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shift_names())
def test_every_shift_study_loads_and_says_what_it_expects(name: str) -> None:
    spec = load_shift(name)
    assert f"{name:10} shift study" in preset_kinds()
    assert spec.definitions[spec.arms[0]].learns == "nothing" and not spec.definitions[spec.arms[0]].budget
    for arm in spec.definitions.values():
        assert arm.title and arm.description and (arm.predictions or arm.name == spec.arms[0])
        for prediction in arm.predictions:
            assert prediction.metric in METRICS
            assert (prediction.value is None) != (prediction.reference is None)
            assert prediction.segment == "all" or prediction.metric == "nll", "only a loss has segments"


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("segment_batchez=3", ConfigError, "segment_batchez"),
        ("seeds=0", ConfigError, "seeds is 0"),
        ("budget_frac=1.5", ConfigError, "budget_frac is 1.5"),
        ("adapt_lr=nan", ConfigError, "adapt_lr is nan"),
        ("arms=[frozen, adaptd]", UnknownNameError, "did you mean 'adapted'"),
        ("arms=[adapted]", ConfigError, "frozen first"),
        ("arms=[frozen, frozen]", ConfigError, "each arm once"),
        ("adapt_family=fulll", UnknownNameError, "did you mean 'full'"),
        ("top_k=16", ConfigError, "top_k 16 of 16"),
    ],
)
def test_what_a_shift_study_refuses(override: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        load_shift("shift", [override])
    assert words in str(caught.value)
    with pytest.raises(UnknownNameError, match="shif"):
        load_shift("shif")


def test_what_learns_nothing_reads_one_order() -> None:
    spec = _spec()
    assert ("frozen", ORDERS[1]) not in spec.passes() and ("adapted", ORDERS[1]) in spec.passes()


# -- the order of reading --------------------------------------------------------------------------------------------


def test_both_orders_hold_the_same_batches() -> None:
    spec = _spec()
    texts = _texts(spec)
    one, other = ({(s, n): rows for s, n, rows in stream_of(spec, texts, order)} for order in ORDERS)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert [s for s, _, _ in stream_of(spec, texts, ORDERS[1])][:4] == [s for s, _ in SEGMENTS]
    assert [s for s, _, _ in stream_of(spec, texts, ORDERS[0])][:2] == ["prose-1"] * 2


@pytest.mark.parametrize("name", LEARNING)
def test_a_batch_is_scored_before_anything_is_learned_from_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch scores is what the model, as the batches before left it, says of it; and later text changes none.

    Where each text has fast weights of its own, as the batches before left it with those of the text that was found.
    """
    spec, model = _spec("adapt_lr=1.0", "adapt_kl_cap=2.0"), _model(_spec())
    texts = _texts(spec)
    found = _calibrated()
    rows = read_stream(spec, spec.definitions[name], ORDERS[0], model, found, texts)
    assert any(row["learned"] for row in rows[:-1])

    cost, arm, seen = DecodeCost(model, CostModel.prior()), spec.definitions[name], []
    set_policy(model, cost, found["sensitivity"], found["prices"].get(name))
    before: list[Tensor] = []
    turn_to = Streams.turn_to

    def turned(streams: Streams, counts: Tensor) -> None:
        turn_to(streams, counts)
        with torch.no_grad():
            before.append(sequence_nll(model(batch).logits, batch))

    monkeypatch.setattr(Streams, "turn_to", turned)
    with reader_of(spec, arm, model, cost) as (read, served):
        for _, _, batch in stream_of(spec, texts, ORDERS[0]):
            with torch.no_grad():
                before.append(sequence_nll(model(batch).logits, batch))
            scored = read(batch).nll
            seen.append((before[-1], scored))
            served(1.0, 0.0)  # joules at leisure, so that what learns here does so at every batch
    monkeypatch.undo()
    assert len(before) == len(seen) * (2 if arm.learns == "routers" else 1)
    for expected, scored in seen:
        torch.testing.assert_close(scored, expected, rtol=0, atol=2e-4)
    changed = (
        torch.stack([scored for _, scored in seen])[1:]
        - torch.tensor(
            [
                row["sequence_nll"]
                for row in read_stream(spec, spec.definitions["frozen"], ORDERS[0], model, found, texts)
            ]
        )[1:]
    )
    assert changed.abs().max() > 1e-3, "learning does change what later batches score"

    other = {**texts.stream, "prose-2": texts.stream["prose-2"].flip(0)}
    again = read_stream(spec, arm, ORDERS[0], model, found, replace(texts, stream=other))
    first = [row["sequence_nll"] for row in rows if row["segment"] != "prose-2"]
    assert [row["sequence_nll"] for row in again if row["segment"] != "prose-2"] == first


@pytest.mark.parametrize("name", LEARNING)
def test_reading_leaves_the_model_as_it_was(name: str) -> None:
    spec, model = _spec("adapt_lr=1.0", "adapt_kl_cap=2.0"), _model(_spec())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    texts = _texts(spec)
    found = _calibrated()
    read_stream(spec, spec.definitions[name], ORDERS[1], model, found, texts)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert all(
        module.router.fast is None and not hasattr(module.router, "price") for _, module in routed_modules(model)
    )


def test_with_a_step_size_of_0_what_learns_scores_as_frozen() -> None:
    spec, model = _spec("adapt_lr=0", "all_lr=0"), _model(_spec())
    texts = _texts(spec)
    found = _calibrated()
    read = {
        name: [r["sequence_nll"] for r in read_stream(spec, spec.definitions[name], ORDERS[0], model, found, texts)]
        for name in ("frozen", "adapted", "all_weights")
    }
    assert read["adapted"] == read["frozen"] and read["all_weights"] == read["frozen"]


def test_all_weights_move_and_come_back() -> None:
    model = _model(_spec()).to(torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    with DynamicEvaluation(model, lr=1e-2) as rival:
        rival.score_and_learn(rows)
        moved = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
        assert len(moved) == len(list(model.parameters()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- joules ----------------------------------------------------------------------------------------------------------


def test_decoding_costs_the_sum_of_its_steps() -> None:
    model, cost_model = _model(_spec()), CostModel.prior()
    cost, work = DecodeCost(model, cost_model), ModelWork.of(model)
    rows = torch.randint(0, 300, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), choices_of(model) as take:
        model(rows)
        decisions = list(collect_routing(model).values())
        model(rows[:1])  # a judge's forward, which serves nobody
        chosen = take()
    steps = 0.0
    for position in range(16):
        pairs, opened = [], []
        for decision in decisions:
            index = decision.expert_index.view(4, 16, -1)[:, position].flatten()
            counts = torch.bincount(index, minlength=decision.num_experts + 1)[: decision.num_experts]
            pairs.append(counts.tolist())
            opened.append((counts > 0).float().tolist())
        steps += cost_model.forward_j(work, 4, pairs, opened)
    assert cost.decode_j(chosen) == pytest.approx(steps)
    counts = [decision.counts.tolist() for decision in decisions]
    at_once = cost_model.forward_j(work, 64, counts, [[float(c > 0) for c in layer] for layer in counts])
    assert cost.forward_j(chosen) == pytest.approx(at_once) and at_once < steps
    assert chosen.experts_per_token == pytest.approx(2.0) and 2 <= chosen.distinct_experts <= 8
    assert cost.all_weights_j(chosen) > 3 * at_once


def test_the_price_holds_the_budget_and_leaves_room_for_learning() -> None:
    spec, model = _spec("budget_frac=0.7"), _model(_spec())
    texts = _texts(spec)
    found = calibrate(spec, model, texts.calibration)
    cost = DecodeCost(model, CostModel.prior())
    assert found["budget_j_per_token"] == pytest.approx(found["free_j_per_token"] - 0.3 * found["routing_j_per_token"])
    spent: dict[str, float] = {}
    for name, target in (("frozen_budget", 1.0), ("adapted_budget", 1 / 1.05)):
        set_policy(model, cost, found["sensitivity"], found["prices"][name])
        joules = tokens = 0.0
        with torch.no_grad(), choices_of(model) as take:
            for batch in texts.calibration.split(spec.decoded):
                model(batch)
                joules, tokens = joules + cost.decode_j(take()), tokens + batch.numel()
        spent[name] = joules / tokens
        assert 0.9 * target * found["budget_j_per_token"] < spent[name] <= target * found["budget_j_per_token"]
    assert spent["adapted_budget"] < spent["frozen_budget"]


def test_learning_is_inside_the_joules_and_what_learns_nothing_has_none() -> None:
    spec, model = _spec("adapt_lr=1.0", "adapt_kl_cap=2.0"), _model(_spec())
    texts = _texts(spec)
    found = _calibrated()
    shares = {}
    for name in spec.arms:
        rows = read_stream(spec, spec.definitions[name], ORDERS[0], model, found, texts)
        total, learning = joules_per_token(rows)
        shares[name] = learning / total
        assert total == pytest.approx(
            sum(r["served_j"] + r["learning_j"] for r in rows) / sum(r["tokens"] for r in rows)
        )
        assert all(row["learning_j"] == 0 for row in rows if row["verdict"] == "skipped")
    assert shares["frozen"] == shares["frozen_budget"] == 0
    assert 0 < shares["adapted_bucket"] < shares["adapted"] < shares["all_weights"]


# -- analysis --------------------------------------------------------------------------------------------------------


def test_an_interval_on_known_numbers() -> None:
    assert paired_interval([[0.25] * 5] * 3) == pytest.approx((0.25, 0.25, 0.25))
    # All spread lies between seeds: of two, a resample is both of one, both of the other, or one each.
    assert paired_interval([[1.0] * 8, [-1.0] * 8]) == pytest.approx((0.0, -1.0, 1.0))
    # All spread lies between sequences: the same for every seed, a standard error of 1 / sqrt(100).
    values = [1.0 if i % 2 else -1.0 for i in range(100)]
    mean, low, high = paired_interval([values, values, values])
    assert (
        mean == pytest.approx(0) and low == pytest.approx(-0.196, abs=0.02) and high == pytest.approx(0.196, abs=0.02)
    )
    wider = paired_interval([[v + 1 for v in values], values, [v - 1 for v in values]])
    assert wider[1] < low and wider[2] > high
    for bad in ([], [[]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(ConfigError):
            paired_interval(bad)


def _rows(gaps: Mapping[str, float], order: str = ORDERS[0], batches: int = 2) -> list[dict[str, Any]]:
    """Rows of two sequences a batch, 10 tokens each, at 3 nats per token plus the gap of the segment."""
    places = [(segment, number) for segment, _ in SEGMENTS for number in range(batches)]
    if order == ORDERS[1]:
        places.sort(key=lambda place: place[1])
    return [
        {"segment": segment, "number": number, "at": at, "tokens": 20, "served_j": 8.0, "learning_j": 2.0,
         "sequence_nll": [10 * (3 + i + gaps.get(segment, 0.0)) for i in (0, 1)]}
        for at, (segment, number) in enumerate(places)
    ]  # fmt: skip


def test_arms_are_paired_by_batch_whatever_the_order_they_were_read_in() -> None:
    gaps = {"python": 0.5, "manual": -0.25}
    passes: Any = {("frozen", ORDERS[0]): {0: _rows({})}, ("adapted", ORDERS[1]): {0: _rows(gaps, ORDERS[1])}}
    for segment in (*dict(SEGMENTS), "all"):
        expected = gaps.get(segment, 0.0) if segment != "all" else 0.0625
        mean, low, high = difference(passes, "adapted", "frozen", ORDERS[1], segment)
        assert mean == pytest.approx(expected)
        assert segment == "all" or (low, high) == pytest.approx((expected, expected))
    assert per_sequence(_rows(gaps)) == per_sequence(_rows(gaps, ORDERS[1]))


def test_the_worst_window_is_of_batches_read_after_one_another() -> None:
    gaps, base = {"python": 0.5, "manual": -0.5}, _rows({})
    assert worst_window(_rows(gaps), base, 2) == pytest.approx(0.5)
    assert worst_window(_rows(gaps), base, 4) == pytest.approx(0.25)
    assert worst_window(_rows(gaps, ORDERS[1]), base, 2) == pytest.approx(0.25)
    assert worst_window(_rows(gaps), base, 8) == pytest.approx(0.0)
    assert worst_window(_rows(gaps), base, 9) is None, "the stream is shorter"


NLL = {"metric": "nll", "relation": "below", "reference": "frozen"}


@pytest.mark.parametrize(
    ("prediction", "holds", "words"),
    [
        ({**NLL, "segment": "manual"}, True, "difference -0.2500"),
        ({**NLL, "segment": "python"}, False, "Not as predicted"),
        ({**NLL, "segment": "python", "margin": 0.6}, True, "plus 0.6"),
        (NLL, None, "Left open"),
        ({"metric": "nll", "segment": "prose-1", "relation": "near", "value": 3.5, "margin": 0.6}, True, "3.5000"),
        ({"metric": "j_per_token", "relation": "near", "reference": "frozen", "margin": 0.01}, False, "ratio 1.2500"),
        ({"metric": "learning_frac", "relation": "below", "value": 0.3}, True, "0.2000"),
        ({"metric": "worst_window", "relation": "below", "value": 0.002}, False, "worst of all seeds"),
        ({"metric": "worst_window", "relation": "below", "value": 0.6, "order": ORDERS[1]}, True, "0.2500"),
    ],
)
def test_predictions_are_judged_by_the_rows(prediction: dict[str, Any], holds: bool | None, words: str) -> None:
    spec, gaps = _spec(), {"python": 0.5, "manual": -0.25, "prose-2": 0.0}
    free = [{**row, "learning_j": 0.0} for row in _rows({})]
    passes: Any = {("frozen", ORDERS[0]): {0: free, 1: free}}
    for order in ORDERS:
        passes["adapted", order] = {seed: _rows(gaps, order) for seed in (0, 1)}
    found = check_shift(passes, spec, "adapted", ShiftPrediction(text="x", **prediction))
    assert found["holds"] is holds and words in found["text"], found["text"]


def test_a_stream_shorter_than_a_window_leaves_it_open() -> None:
    spec = _spec("window=99")
    passes: Any = {(arm, ORDERS[0]): {0: _rows({})} for arm in ("frozen", "adapted")}
    prediction = ShiftPrediction(text="x", metric="worst_window", relation="below", value=0.1)
    assert check_shift(passes, spec, "adapted", prediction)["holds"] is None


# -- the run ---------------------------------------------------------------------------------------------------------


def test_a_study_cut_short_goes_on_to_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _spec("arms=[frozen, adapted, all_weights]")
    whole = run_shift(spec, tmp_path / "whole", name="shift")
    real, calls = shift._work, []

    def breaks(task: shift.Task, *given: Any) -> Any:
        calls.append(task)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(task, *given)

    monkeypatch.setattr(shift, "_work", breaks)
    with pytest.raises(KeyboardInterrupt):
        run_shift(spec, tmp_path / "cut", name="shift")
    cut = RunFolder.open(tmp_path / "cut")
    assert not cut.manifest["finished"] and len(list(cut.rows("pass"))) == 2 and not list(cut.rows("summary"))
    cut.append("batch", seed=0, arm="adapted", order=ORDERS[1], segment="python", number=0, at=0)  # of a pass cut short
    with pytest.raises(RunFolderError, match="another configuration"):
        run_shift(_spec("arms=[frozen, adapted]"), tmp_path / "cut", name="shift", resume=True)
    run_shift(spec, tmp_path / "cut", name="shift", resume=True)
    assert len(calls) == 4 + 3, "the training and the two readings that were finished are not done again"

    def told(run: RunFolder, kind: str) -> list[dict[str, Any]]:
        return list(run.rows(kind))

    for kind in ("trained", "batch", "pass", "summary", "verdict"):
        assert told(cut, kind) == told(whole, kind), kind
    # Cut short between the model's folder and its row: it is trained again, to the same rows.
    cut.drop_rows(lambda row: row["kind"] == "trained")
    run_shift(spec, tmp_path / "cut", name="shift", resume=True)
    for kind in ("trained", "batch", "pass", "summary", "verdict"):
        assert told(cut, kind) == told(whole, kind), kind
    assert {row["arm"] for row in whole.rows("summary")} == set(spec.arms)
    assert all(row["j_per_token_modelled"]["provenance"] == "estimated" for row in whole.rows("summary"))


def test_a_text_that_is_too_short_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run_shift(_spec("segment_batches=100000"), tmp_path / "out", name="shift")
    assert not any((tmp_path / "out").iterdir())
