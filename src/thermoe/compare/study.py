"""Runs a study: trains every arm from every start with every seed, checks the predictions, and leaves a run folder.

Rows: `point` (a validation of one training), `trial` (its last one; the mark that it is finished), `summary` (an arm
from a start, over seeds), `verdict` (a prediction and whether it came true). A study cut short goes on with the
trainings that have no `trial` row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from thermoe import data
from thermoe.compare.predictions import SAID, bound_words, estimate, holds
from thermoe.compare.study_run import Rows, manifest_head, work_through
from thermoe.compare.study_spec import METRICS, STARTS, Prediction, StudySpec
from thermoe.compare.study_trial import Trial, run_trial
from thermoe.convergence import judge_convergence, mean_interval
from thermoe.progress import Reporter
from thermoe.results import RunFolder

Key = tuple[str, str, int]


def run_study(
    spec: StudySpec, out: str | Path, *, name: str, resume: bool = False, reporter: Reporter | None = None
) -> RunFolder:
    """Run ``spec`` and leave the results in the folder ``out``.

    Args:
        spec: what to train.
        out: the run folder.
        name: of the study, for the manifest.
        resume: take up an interrupted study of the same configuration.
        reporter: where progress is shown.

    Raises:
        RunFolderError: the folder is not empty, or holds a run of another configuration.
    """
    report = reporter or Reporter()
    run = RunFolder.create(out, resume=resume)
    run.holds_run_of(spec.as_dict())
    arms = [spec.definitions[arm] for arm in spec.arms]
    run.write_manifest(
        **manifest_head(run, spec, kind="study", name=name),
        starts=list(STARTS),
        arms=spec.arm_texts(),
    )
    train, heldout = _texts(spec, run, report)
    done = {(row["arm"], row["start"], row["seed"]) for row in run.rows("trial")}
    run.drop_rows(lambda row: row["kind"] in ("summary", "verdict"))
    run.drop_rows(lambda row: row["kind"] == "point" and (row["arm"], row["start"], row["seed"]) not in done)
    trials = [Trial(spec, arm, start, seed) for arm in arms for start in STARTS for seed in spec.seed_range]
    left = [trial for trial in trials if (trial.arm.name, trial.start, trial.seed) not in done]
    if done:
        report.say(f"{len(trials) - len(left)} of {len(trials)} trainings are taken up from the run folder")
    with report.stage(f"train {len(arms)} arms from {len(STARTS)} starts, {spec.seeds} seeds", len(trials)) as progress:
        for number, (trial, rows) in enumerate(_train(left, train, heldout, spec.workers), len(trials) - len(left) + 1):
            key = {"arm": trial.arm.name, "start": trial.start, "seed": trial.seed}
            for row in rows:
                run.append("point", **key, **row)
            run.append("trial", **key, **rows[-1])
            progress(number)
    summarise_study(run, spec)
    run.write_manifest(finished=True, durations_s=report.durations_s)
    return run


def _texts(spec: StudySpec, run: RunFolder, report: Reporter) -> tuple[Tensor, Tensor]:
    """Return training and held-out rows of the embedded prose, and write down what they are."""
    with report.stage("read the texts and train the tokenizer", 1):
        prose, held = data.embedded_prose("train"), data.embedded_prose("heldout")
        text = prose.content[: spec.text_bytes]
        tokenizer = data.train_tokenizer([text[:400_000]], spec.vocab_size)
        rows = data.pack(data.encode(tokenizer, text), spec.sequence_length, what="training text")
        needed = spec.eval_rows * spec.sequence_length
        tokens = data.encode(tokenizer, held.content[: 8 * needed])[:needed]
        heldout = data.pack(tokens, spec.sequence_length, what="held-out text")
    size = data.bytes_per_token(tokenizer, tokens)
    run.write_manifest(
        bytes_per_token=size,
        data={
            "training": {"source": prose.source, "tokens": rows.numel(), "bytes": len(text.encode())},
            "held out": {"source": held.source, "tokens": heldout.numel()},
        },
        unigram_ppl=data.unigram_perplexity(rows, heldout, spec.vocab_size),
    )
    return rows, heldout


def _train(trials: list[Trial], train: Tensor, heldout: Tensor, workers: int) -> Iterator[tuple[Trial, Rows]]:
    """Yield each training as it ends."""
    return work_through(trials, run_trial, (train, heldout), workers=workers)


def summarise_study(run: RunFolder, spec: StudySpec) -> None:
    """Append `summary` and `verdict` rows to a study whose trainings are all there."""
    results: dict[Key, dict[str, Any]] = {(row["arm"], row["start"], row["seed"]): row for row in run.rows("trial")}
    curves: dict[Key, list[tuple[float, float]]] = {}
    for row in run.rows("point"):
        curves.setdefault((row["arm"], row["start"], row["seed"]), []).append((row["tokens"], float(row["nll"])))
    for arm in spec.arms:
        for start in STARTS:
            own = [key for key in results if key[:2] == (arm, start)]
            judged = [judge_convergence(curves[key]) for key in own]
            run.append(
                "summary",
                arm=arm,
                start=start,
                seeds=len(own),
                **{metric: estimate([results[key][metric] for key in own]) for metric in METRICS},
                converged=sum(found.converged for found in judged),
                convergence=[found.text for found in judged],
                tokens_per_s=estimate([results[key]["tokens_per_s"] for key in own]),
                energy_j=None,
                energy_reason="several trainings share the processor; joules are measured one training at a time",
            )
    for arm in spec.arms:
        for prediction in spec.definitions[arm].predictions:
            if prediction.reference is not None and prediction.reference[0] not in spec.arms:
                continue  # the arm compared with was left out of this study
            at = results if prediction.step is None else _results_at(run, prediction.step)
            run.append("verdict", arm=arm, **check_prediction(spec, arm, prediction, at))


def _results_at(run: RunFolder, step: int) -> dict[Key, dict[str, Any]]:
    """Return the last validation of each training at or before a step."""
    rows = sorted((row for row in run.rows("point") if row["step"] <= step), key=lambda row: int(row["step"]))
    return {(row["arm"], row["start"], row["seed"]): row for row in rows}


def check_prediction(
    spec: StudySpec, arm: str, prediction: Prediction, results: Mapping[Key, Mapping[str, Any]]
) -> dict[str, Any]:
    """Hold a prediction against the rows: it holds or fails when the whole 95 % t interval over seeds says so.

    Args:
        spec: the study.
        arm: the arm it is about.
        prediction: what was expected.
        results: the row of each training that counts, by (arm, start, seed).

    Returns:
        `holds` (true, false or ``None`` where the interval leaves it open), `text`, and the numbers.
    """

    def known(name: str, start: str, seed: int) -> bool:  # dead experts are not, after too few tokens
        return (name, start, seed) in results and results[name, start, seed][prediction.metric] is not None

    seeds = sorted({key[2] for key in results if key[:2] == (arm, prediction.start)})
    pairs = [(arm, prediction.start), *([] if prediction.reference is None else [prediction.reference])]
    if not seeds or not all(known(*pair, seed) for pair in pairs for seed in seeds):
        return {
            "holds": None,
            "text": f"Left open: {spec.definitions[arm].title}, {prediction.start} start, {prediction.text}. "
            f"{METRICS[prediction.metric]} is not known for every seed.",
            "start": prediction.start,
            "metric": prediction.metric,
            "value": None,
            "lo": None,
            "hi": None,
        }
    values = [float(results[arm, prediction.start, seed][prediction.metric]) for seed in seeds]
    if prediction.reference is None:
        assert prediction.value is not None
        target, compared = prediction.value, f"{prediction.value:g}"
    else:
        others = [float(results[(*prediction.reference, seed)][prediction.metric]) for seed in seeds]
        values = [value - other for value, other in zip(values, others, strict=True)]
        target = 0.0
        title = spec.definitions[prediction.reference[0]].title
        compared = "the same arm" if prediction.reference[0] == arm else title
        compared += f" from the {prediction.reference[1]} start" if prediction.reference[1] != prediction.start else ""
    mean, low, high = mean_interval(values)
    ends = (mean, mean) if low is None or high is None else (low, high)
    found = holds(prediction.relation, prediction.margin, target, *ends)
    shown = f"{mean:+.3f}" if prediction.reference else f"{mean:.2f}"
    spread = f"95 % {ends[0]:.3f} to {ends[1]:.3f}" if low is not None else "no interval"
    words = "difference in " if prediction.reference else ""
    bound = bound_words(prediction.relation, prediction.margin, compared)
    when = "" if prediction.step is None else f"at step {prediction.step}, "
    return {
        "holds": found,
        "text": f"{SAID[found]}: {spec.definitions[arm].title}, {prediction.start} start, {when}{prediction.text}. "
        f"Condition: {METRICS[prediction.metric]} {bound}. Found: {words}{shown} ({spread}).",
        "start": prediction.start,
        "metric": prediction.metric,
        "value": mean,
        "lo": low,
        "hi": high,
    }
