from __future__ import annotations

from pathlib import Path

import pytest

from thermoe.report.curves import smooth
from thermoe.report.run_data import RunData
from thermoe.results import RunFolder


def score(run: RunFolder, **fields: object) -> None:
    run.append("score", **{"arm": "a", "seed": 0, "segment": "one", "tokens": 10, **fields})


def test_smoothing_looks_back_only_and_weighs_by_tokens() -> None:
    assert smooth([1.0, 3.0, 100.0], [1.0, 3.0, 1.0], 2)[:2] == [1.0, 2.5]
    assert smooth([1.0, 2.0], [1.0, 1.0], 1) == [1.0, 2.0]


def test_the_stream_is_ordered_by_segment_and_batch_and_averaged_over_seeds(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_manifest(segments=[{"name": "one"}, {"name": "two"}])
    score(run, segment="two", batch=0, nll_sum=30.0)
    score(run, batch=1, nll_sum=20.0)
    score(run, batch=0, nll_sum=10.0)
    score(run, batch=0, nll_sum=30.0, seed=1)
    score(run, batch=2, nll_sum=None)
    data = RunData.read(run.path)
    points = data.stream("a")
    assert [(p.segment, p.batch, p.nll) for p in points] == [("one", 0, 2.0), ("one", 1, 2.0), ("two", 0, 3.0)]
    assert (points[0].low, points[0].high) == (1.0, 3.0)
    assert data.seeds == 2


def test_learning_energy_is_unknown_without_rows_and_zero_with_zeros(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_manifest()
    score(run, nll_sum=1.0)
    assert RunData.read(run.path).learning_j_per_token("a") is None
    score(run, nll_sum=1.0, energy_learning_modelled_j=4.0)
    assert RunData.read(run.path).learning_j_per_token("a") == pytest.approx(0.2)


def test_accuracy_is_weighted_by_tokens_and_counts_no_token_twice(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_manifest()
    for segment, tokens, value in (("one", 10, 0.2), ("two", 30, 0.6), ("all", 40, 0.9)):
        run.append("accuracy", arm="a", segment=segment, layer=0, tokens=tokens, tolerant_corrected=value)
    assert RunData.read(run.path).accuracy("a", "tolerant_corrected") == pytest.approx(0.5)


def test_random_comes_first_and_the_oracle_last(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    run.write_manifest(arms=[{"name": "a"}, {"name": "b"}])
    for arm in ("oracle", "b", "random", "a"):
        run.append("accuracy", arm=arm, segment="one", layer=0, tokens=1, tolerant_corrected=0.5)
    data = RunData.read(run.path)
    assert data.accuracy_arms == ["random", "a", "b", "oracle"]
    assert [arm.name for arm in data.arms] == ["a", "b"]
