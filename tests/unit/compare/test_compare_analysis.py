"""Analysis: intervals, pairs, summaries and verdicts, held to numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thermoe.compare import analysis
from thermoe.compare.analysis import bootstrap_mean, summarise
from thermoe.results import RunFolder

SEGMENTS = ("prose-1", "code", "prose-2")
TOKENS = 8  # of a batch of two sequences

#: Nats per sequence (of 4 predicted tokens) by arm and segment; two batches of two sequences.
NLL: dict[str, dict[str, list[float]]] = {
    "dense": {"prose-1": [8.0, 10.0, 9.0, 9.0], "code": [20.0, 22.0, 24.0, 22.0], "prose-2": [8.0, 8.0, 9.0, 9.0]},
    "baseline": {"prose-1": [8.4, 10.0, 9.6, 9.0], "code": [21.0, 22.0, 25.0, 23.0], "prose-2": [8.0, 9.0, 9.0, 9.0]},
    "priced": {"prose-1": [8.8, 10.4, 9.6, 9.2], "code": [22.0, 23.0, 26.0, 24.0], "prose-2": [8.4, 9.0, 9.4, 9.0]},
    "adapted": {"prose-1": [8.8, 10.4, 9.4, 9.0], "code": [21.0, 22.2, 24.0, 22.8], "prose-2": [8.8, 9.2, 9.9, 9.1]},
}
EXPERTS_PER_TOKEN = {"dense": None, "baseline": 2.0, "priced": 1.5, "adapted": 1.25}
ENERGY_J = {"dense": 8.0, "baseline": 4.0, "priced": 3.0, "adapted": 6.0}
AGAINST = {"dense": None, "baseline": "dense", "priced": "baseline", "adapted": "priced"}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "RESAMPLES", 1000)


def make_run(path: Path, nll: dict[str, dict[str, list[float]]] = NLL, **changes: Any) -> RunFolder:
    """Write the rows of a run whose numbers are round; ``changes`` replaces energy, experts or dead experts."""
    energy = {**ENERGY_J, **changes.get("energy_j", {})}
    measured = changes.get("measured", {})
    run = RunFolder.create(path)
    run.write_manifest(
        segments=[{"name": name, "domain": name.split("-")[0], "tokens": 16} for name in SEGMENTS],
        arms=[{"name": name, "title": f"Title of {name}", "description": "", "against": AGAINST[name]} for name in nll],
        moe={"num_experts": 4, "top_k": 2},
        unigram_ppl=100.0,
    )
    run.append("eval", phase="dense", step=9, ppl=changes.get("dense_ppl", 40.0))
    for arm in nll:
        for number, segment in enumerate(SEGMENTS):
            for batch in range(2):
                values = nll[arm][segment][2 * batch : 2 * batch + 2]
                run.append(
                    "score",
                    arm=arm,
                    segment=segment,
                    batch=batch,
                    tokens=TOKENS,
                    nll_sum=sum(values),
                    sequence_nll=values,
                    experts_per_token=EXPERTS_PER_TOKEN[arm],
                    distinct_experts=None if arm == "dense" else 3.0,
                    energy_modelled_j=energy[arm],
                    energy_learning_modelled_j=3.0 if arm == "adapted" else 0.0,
                    energy_provenance="estimated",
                    duration_s=0.5,
                )
            joules, provenance = measured.get((arm, segment), (None, None))
            run.append(
                "energy",
                arm=arm,
                segment=segment,
                energy_measured_j=joules,
                tokens=16,
                provenance=provenance,
                reason="no sensor" if joules is None else None,
                bytes_per_token=2.0,
            )
            if arm == "dense":
                continue
            for layer in range(2):
                run.append(
                    "load",
                    arm=arm,
                    segment=segment,
                    layer=layer,
                    effective_experts=3.0 + layer,
                    dead_experts=changes.get("dead", 0),
                )
                run.append("accuracy", arm=arm, segment=segment, layer=layer, tolerant_corrected=0.1 * number + layer)
    for reference, value in (("random", 0.0), ("oracle", 1.0)):
        run.append("accuracy", arm=reference, segment="code", layer=0, tolerant_corrected=value)
    return run


def summary(run: RunFolder) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in run.rows("summary")}


def verdict(run: RunFolder, words: str) -> tuple[str, bool | None]:
    found = [row for row in run.rows("verdict") if words in row["text"]]
    assert len(found) == 1, [row["text"] for row in run.rows("verdict")]
    return found[0]["text"], found[0]["holds"]


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    """95 % of intervals should hold the true mean; a percentile bootstrap of 40 values holds it a little less often."""
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(300):
        _, low, high = bootstrap_mean(generator.normal(3.0, 2.0, 40).tolist(), seed=trial)
        covered += low <= 3.0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_bootstrap_is_centred_repeats_and_shrinks_to_a_point() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    mean, low, high = bootstrap_mean(values)
    assert mean == 4.0
    assert 1.0 <= low < mean < high <= 9.0
    assert bootstrap_mean(values) == (mean, low, high)
    assert bootstrap_mean([2.5] * 6) == (2.5, 2.5, 2.5)


def test_paired_differences_equal_a_direct_computation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summarise(run)
    rows = {(row["arm"], row["against"], row["segment"]): row for row in run.rows("comparison")}
    pairs = {("baseline", "dense"), ("priced", "baseline"), ("priced", "dense")}
    pairs |= {("adapted", "priced"), ("adapted", "dense")}
    assert set(rows) == {(arm, against, segment) for arm, against in pairs for segment in SEGMENTS}
    for (arm, against, segment), row in rows.items():
        differences = [(a - b) / 4 for a, b in zip(NLL[arm][segment], NLL[against][segment], strict=True)]
        assert row["diff"] == pytest.approx(sum(differences) / 4, abs=1e-12)
        assert min(differences) - 1e-12 <= row["lo"] <= row["diff"] + 1e-12
        assert row["diff"] - 1e-12 <= row["hi"] <= max(differences) + 1e-12
        assert row["n"] == 4
        assert row["unit"] == "nats per token"


def test_an_arm_is_compared_with_the_one_it_is_meant_for_wherever_it_stands(tmp_path: Path) -> None:
    order = ("adapted", "dense", "priced", "baseline")
    run = make_run(tmp_path / "run", {arm: NLL[arm] for arm in order})
    summarise(run)
    pairs = {(row["arm"], row["against"]) for row in run.rows("comparison")}
    assert {("adapted", "priced"), ("priced", "baseline"), ("baseline", "dense")} <= pairs
    assert all(arm != against for arm, against in pairs)


def test_summary_equals_hand_computation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summarise(run)
    priced, dense = summary(run)["priced"], summary(run)["dense"]
    # code: (22 + 23 + 26 + 24) / 16 = 5.9375 nats per token
    assert priced["ppl"]["code"]["value"] == pytest.approx(math.exp(5.9375))
    assert priced["ppl"]["code"]["lo"] < priced["ppl"]["code"]["value"] < priced["ppl"]["code"]["hi"]
    # everything: (38.0 + 95.0 + 35.8) / 48 tokens
    assert priced["ppl"]["all"]["value"] == pytest.approx(math.exp(168.8 / 48))
    assert priced["bits_per_byte"]["code"] == pytest.approx(5.9375 / math.log(2) / 2.0)
    assert priced["accuracy_corrected"] == pytest.approx({"prose-1": 0.5, "code": 0.6, "prose-2": 0.7, "all": 0.6})
    assert priced["effective_experts"] == pytest.approx(3.5)
    assert priced["dead_experts"] == 0
    assert priced["experts_per_token"] == 1.5
    assert priced["distinct_experts"] == 3.0
    assert priced["j_per_token_modelled"] == {"value": pytest.approx(3.0 / 8), "provenance": "estimated"}
    assert priced["learning_j_per_token_modelled"] == 0
    assert summary(run)["adapted"]["learning_j_per_token_modelled"] == pytest.approx(3.0 / 8)
    assert priced["tokens_per_s"] == pytest.approx(16.0)
    assert dense["experts_per_token"] is None
    assert dense["effective_experts"] is None
    assert dense["dead_experts"] is None
    assert dense["accuracy_corrected"]["all"] is None
    assert summary(run)["random"]["accuracy_corrected"]["all"] == 0
    assert summary(run)["oracle"]["accuracy_corrected"]["all"] == 1


def test_dead_experts_are_unknown_where_too_few_tokens_were_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dead=None)
    summarise(run)
    assert summary(run)["baseline"]["dead_experts"] is None
    text, holds = verdict(run, "effectively in use")
    assert "too few tokens" in text and holds is None


def test_summary_rows_are_in_the_order_of_the_arms(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summarise(run)
    assert [row["arm"] for row in run.rows("summary")] == [*NLL, "random", "oracle"]


def test_measured_energy_is_none_when_any_segment_is_and_never_0(tmp_path: Path) -> None:
    measured = {("priced", segment): (48.0, "measured") for segment in SEGMENTS}
    measured |= {("baseline", segment): (32.0, "measured") for segment in ("prose-1", "code")}
    measured |= {("adapted", "prose-1"): (1.0, "measured"), ("adapted", "code"): (2.0, "simulated")}
    measured |= {("adapted", "prose-2"): (3.0, "measured")}
    run = make_run(tmp_path / "run", measured=measured)
    summarise(run)
    found = {arm: row["j_per_token_measured"] for arm, row in summary(run).items() if arm in NLL}
    assert found["priced"] == {"value": 3.0, "provenance": "measured", "reason": None}
    nothing = {"value": None, "provenance": None, "reason": "no sensor"}
    assert found["baseline"] == nothing
    assert found["dense"] == nothing
    # A sum is only as good as its weakest part.
    assert found["adapted"] == {"value": pytest.approx(6.0 / 48), "provenance": "simulated", "reason": None}


def test_verdicts_agree_with_the_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    summarise(run)
    text, holds = verdict(run, "dense model learned")
    assert holds is True and "40.0" in text and "100.0" in text
    text, holds = verdict(run, "baseline router keeps")
    assert holds is True and "3.5 of 4 experts" in text
    text, holds = verdict(run, "The price lowers")
    assert holds is True and "from 2.00 to 1.50" in text and "25.0 %" in text
    text, holds = verdict(run, "On code")
    # (22.5 - 23.75) / 4 nats per token; from exp(95 / 16) to exp(90 / 16)
    assert holds is True and "-0.312" in text and "from 379 to 277" in text
    assert "Title of adapted against Title of priced" in text
    text, holds = verdict(run, "Back on prose")
    assert holds is False and "+0.075" in text
    text, holds = verdict(run, "Learning after")
    assert holds is None and "50 %" in text


def test_verdicts_flip_when_the_numbers_flip(tmp_path: Path) -> None:
    flipped = copy.deepcopy(NLL)
    flipped["adapted"]["code"] = [value + 1 for value in NLL["priced"]["code"]]
    flipped["adapted"]["prose-2"] = [value - 1 for value in NLL["priced"]["prose-2"]]
    run = make_run(tmp_path / "run", flipped, energy_j={"priced": 5.0}, dead=1, dense_ppl=60.0)
    summarise(run)
    assert verdict(run, "dense model learned")[1] is False
    assert verdict(run, "baseline router keeps")[1] is False
    text, holds = verdict(run, "modelled joules per token by")
    assert holds is False and "-25.0 %" in text
    text, holds = verdict(run, "On code")
    assert holds is False and "+0.250" in text
    text, holds = verdict(run, "Back on prose")
    assert holds is True and "-0.250" in text


def test_a_difference_around_zero_supports_nothing(tmp_path: Path) -> None:
    level = copy.deepcopy(NLL)
    level["adapted"]["code"] = [v + d for v, d in zip(NLL["priced"]["code"], (0.4, -0.4, 0.4, -0.4), strict=True)]
    level["adapted"]["prose-2"] = [v + d for v, d in zip(NLL["priced"]["prose-2"], (0.4, -0.4, 0.4, -0.4), strict=True)]
    run = make_run(tmp_path / "run", level)
    summarise(run)
    assert verdict(run, "On code")[1] is False
    assert verdict(run, "Back on prose")[1] is None


@pytest.mark.parametrize("arms", [["dense"], ["priced"], ["dense", "adapted"], ["baseline", "dense"]])
def test_any_set_of_arms_is_summarised(arms: list[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {arm: NLL[arm] for arm in arms})
    summarise(run)
    assert [row["arm"] for row in run.rows("summary")] == [*arms, "random", "oracle"]
    assert not [row for row in run.rows("verdict") if "The price lowers" in row["text"]]


def test_losses_beyond_any_perplexity_are_no_crash(tmp_path: Path) -> None:
    wild = copy.deepcopy(NLL)
    wild["adapted"]["code"] = [4000.0] * 4
    wild["priced"]["code"] = [math.nan] * 4
    run = make_run(tmp_path / "run", wild)
    summarise(run)
    assert summary(run)["adapted"]["ppl"]["code"]["value"] == "inf"
    assert summary(run)["priced"]["ppl"]["code"]["value"] == "nan"
    assert verdict(run, "On code")[1] is False
