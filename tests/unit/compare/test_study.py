"""Studies: starts are what they claim, predictions are judged by the interval, a study goes on where it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from thermoe.compare import study
from thermoe.compare.small_model import lr_at
from thermoe.compare.study import check_prediction, run_study
from thermoe.compare.study_spec import (
    METRICS,
    STARTS,
    Prediction,
    StudyArm,
    StudySpec,
    load_study,
    preset_kinds,
    study_names,
)
from thermoe.compare.study_trial import Trial, evaluate, run_trial, set_start
from thermoe.errors import ConfigError, RunFolderError, UnknownNameError
from thermoe.models.frame import build_frame
from thermoe.results import RunFolder
from thermoe.routers.base import ROUTERS

TINY = [
    *("steps=4", "eval_every=2", "seeds=2", "batch_size=4", "sequence_length=16", "eval_rows=8", "hidden_size=16"),
    *("layers=1", "heads=2", "num_experts=4", "expert_width=8", "text_bytes=20000", "vocab_size=300"),
]


def _rows(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 300, (count, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", study_names())
def test_every_study_loads_and_its_arms_can_be_built(name: str) -> None:
    spec = load_study(name)
    assert f"{name:10} study" in preset_kinds() and f"{'demo':10} stream" in preset_kinds()
    for arm in spec.definitions.values():
        assert arm.predictions and arm.title and arm.description
        for prediction in arm.predictions:
            assert prediction.metric in METRICS and prediction.start in STARTS
            assert (prediction.value is None) != (prediction.reference is None)
    assert all(arm.router in ROUTERS for arm in spec.definitions.values())
    assert ("sigmoid_bias" in spec.arms) == ("sigmoid_bias" in ROUTERS)


def test_what_a_study_refuses() -> None:
    with pytest.raises(UnknownNameError, match="colapse"):
        load_study("colapse")
    with pytest.raises(ConfigError, match="stepz"):
        load_study("collapse", ["stepz=3"])
    with pytest.raises(ConfigError, match="steps is 0"):
        load_study("collapse", ["steps=0"])
    with pytest.raises(UnknownNameError, match="did you mean 'switch'"):
        load_study("collapse", ["arms=[none, swich]"])
    with pytest.raises(ConfigError, match="top_k 8 of 8"):
        load_study("collapse", ["top_k=8"])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_starts_are_what_they_say(seed: int) -> None:
    spec = load_study("collapse")
    found = {}
    for start in STARTS:
        model = build_frame(
            "moe", vocab_size=300, sequence_length=16, hidden_size=64, layers=2, heads=4, num_experts=8, top_k=2,
            expert_width=16, seed=seed,
        )  # fmt: skip
        set_start(model, start, spec.offset_nats, seed)
        found[start] = evaluate(model, _rows(32, seed), 8)
    assert found["balanced"]["effective_experts"] > 6
    assert found["collapsed"]["effective_experts"] < 2.2
    assert all(sum(load[:2]) > 0.97 for load in found["collapsed"]["load"]), "the first two experts take the tokens"


def test_a_trial_repeats_itself_and_the_cure_is_applied() -> None:
    spec = load_study("collapse", TINY)
    trials = [Trial(spec, spec.definitions[arm], "balanced", 3) for arm in ("none", "none", "switch")]
    first, again, cured = (run_trial(trial, _rows(40, 0), _rows(8, 1)) for trial in trials)
    assert [row["step"] for row in first] == [0, 2, 4] and first[-1]["tokens"] == 4 * 64
    for mine, same in zip(first, again, strict=True):
        assert {**mine, "tokens_per_s": 0} == {**same, "tokens_per_s": 0}
    assert first[0]["nll"] == cured[0]["nll"] and first[-1]["nll"] != cured[-1]["nll"]
    assert first[-1]["nll"] < first[0]["nll"]


def test_a_router_is_told_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    from thermoe.routers.topk import TopKRouter

    calls: list[str] = []
    monkeypatch.setattr(TopKRouter, "observe", lambda self, decision: calls.append("observe"))
    monkeypatch.setattr(TopKRouter, "after_step", lambda self: calls.append("after_step"))
    spec = load_study("collapse", [*TINY, "layers=2"])
    run_trial(Trial(spec, spec.definitions["none"], "collapsed", 0), _rows(40, 0), _rows(8, 1))
    assert calls == ["observe", "after_step"] * 2 * spec.steps


def test_the_learning_rate_warms_up_and_decays() -> None:
    spec = StudySpec(steps=100, lr=1.0)
    assert lr_at(0, spec) == pytest.approx(0.1) and lr_at(10, spec) == pytest.approx(1.0)
    assert lr_at(99, spec) == pytest.approx(0.1, abs=0.01)


def _checked(values: list[float], others: list[float] | None = None, **given: Any) -> dict[str, Any]:
    arms = {name: StudyArm(name=name, title=name.title(), description="") for name in ("cure", "none")}
    spec = StudySpec(arms=list(arms), definitions=arms)
    prediction = Prediction(text="why", start="balanced", metric="nll", **given)
    results = {("cure", "balanced", seed): {"nll": value} for seed, value in enumerate(values)}
    results |= {("none", "balanced", seed): {"nll": value} for seed, value in enumerate(others or [])}
    return check_prediction(spec, "cure", prediction, results)


@pytest.mark.parametrize(
    ("values", "relation", "holds"),
    [
        ([6.9, 7.0, 7.1], "above", True),
        ([6.9, 7.0, 7.1], "below", False),
        ([2.0, 7.0, 12.0], "above", None),
        ([4.9, 5.0, 5.1], "near", True),
        ([6.9, 7.0, 7.1], "near", False),
        ([4.0, 5.5, 7.0], "near", None),
        ([float("nan")] * 3, "above", False),
        ([7.0], "above", True),
    ],
)
def test_a_prediction_holds_or_fails_only_with_its_whole_interval(
    values: list[float], relation: str, holds: bool | None
) -> None:
    margin = 0.5 if relation == "near" else 0.0
    found = _checked(values, relation=relation, value=5.0, margin=margin)
    assert found["holds"] is holds
    said = {True: "As predicted", False: "Not as predicted", None: "Left open"}[holds]
    assert found["text"].startswith(f"{said}: Cure, balanced start, why. Condition: validation loss")
    assert ("no interval" in found["text"]) == (len(values) == 1 or values[0] != values[0])


def test_a_prediction_against_another_arm_is_paired_by_seed() -> None:
    noisy = [1.0, 5.0, 9.0]  # seeds differ far more than arms do
    found = _checked([v + 0.1 for v in noisy], noisy, relation="above", reference=("none", "balanced"))
    assert found["holds"] is True and found["value"] == pytest.approx(0.1)
    within = _checked([v + 0.1 for v in noisy], noisy, relation="below", reference=("none", "balanced"), margin=0.2)
    assert within["holds"] is True and "below None plus 0.2" in within["text"]


def test_a_prediction_about_what_is_not_known_is_left_open() -> None:
    found = _checked([1.0, None, 2.0], relation="above", value=0.5)  # type: ignore[list-item]
    assert found["holds"] is None and found["value"] is None and "not known for every seed" in found["text"]


def test_a_study_cut_short_goes_on_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_study("collapse", [*TINY, "arms=[none, switch]"])
    trained: list[tuple[str, str, int]] = []

    def here(trials: Any, train: Any, heldout: Any, workers: int, stop_after: int | None = None) -> Any:
        for trial in trials:
            if stop_after is not None and len(trained) == stop_after:
                raise KeyboardInterrupt
            trained.append((trial.arm.name, trial.start, trial.seed))
            yield trial, run_trial(trial, train, heldout)

    monkeypatch.setattr(study, "_train", lambda *given: here(*given, stop_after=3))
    with pytest.raises(KeyboardInterrupt):
        run_study(spec, tmp_path / "run", name="collapse")
    monkeypatch.setattr(study, "_train", here)
    run = run_study(load_study("collapse", [*TINY, "arms=[none, switch]"]), tmp_path / "run", name="x", resume=True)
    assert len(trained) == len(set(trained)) == 2 * 2 * 2
    assert len(list(run.rows("trial"))) == 8 and len(list(run.rows("point"))) == 8 * 3
    assert run.manifest["finished"] is True
    summaries = list(run.rows("summary"))
    assert [(row["arm"], row["start"]) for row in summaries] == [(a, s) for a in ("none", "switch") for s in STARTS]
    assert all(row["nll"]["lo"] <= row["nll"]["value"] <= row["nll"]["hi"] for row in summaries)
    assert len(list(run.rows("verdict"))) == 5
    with pytest.raises(RunFolderError, match="another configuration"):
        run_study(load_study("collapse", TINY), tmp_path / "run", name="x", resume=True)


def test_a_prediction_of_a_step_looks_at_the_validation_before_it(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    for step in (0, 20, 10, 30):
        run.append("point", arm="none", start="balanced", seed=0, step=step, nll=float(step))
    assert study._results_at(run, 25)["none", "balanced", 0]["nll"] == 20.0
