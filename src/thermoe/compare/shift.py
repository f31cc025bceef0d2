"""Runs a shift study: a model a seed, then every arm over the stream in each order, predictions checked, a run folder.

Rows: `trained` (a seed: its loss, prices and budget), `batch` (an arm over a batch), `pass` (an arm over the stream in
an order; the mark that it is finished), `summary` (an arm and order, over seeds), `verdict`. A study cut short goes on
with what has no `trained` or `pass` row.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thermoe import data
from thermoe.compare.shift_analysis import summarise_shift
from thermoe.compare.shift_spec import ORDERS, SEGMENTS, ShiftSpec
from thermoe.compare.shift_trial import ShiftTexts, read_saved, train_and_save
from thermoe.compare.study_run import Rows, manifest_head, work_through
from thermoe.energy.cost_model import CostModel
from thermoe.progress import Reporter
from thermoe.results import RunFolder


@dataclass(frozen=True, slots=True)
class Task:
    """A piece of work for a worker: training a seed, or with an arm reading the stream.

    Args:
        seed: of the model.
        arm: who reads; ``None`` to train.
        order: in which order.
        calibrated: what training returned.
    """

    seed: int
    arm: str | None = None
    order: str = ORDERS[0]
    calibrated: Mapping[str, Any] | None = None


def run_shift(
    spec: ShiftSpec, out: str | Path, *, name: str, resume: bool = False, reporter: Reporter | None = None
) -> RunFolder:
    """Run ``spec`` and leave the results in the folder ``out``.

    Args:
        spec: what to read, and how.
        out: the run folder.
        name: of the study, for the manifest.
        resume: take up an interrupted study of the same configuration.
        reporter: where progress is shown.

    Raises:
        RunFolderError: the folder is not empty, or holds a run of another configuration.
        DataError: a text is too short for the stream.
    """
    report = reporter or Reporter()
    run = RunFolder.create(out, resume=resume)
    run.holds_run_of(spec.as_dict(), ignore=("workers",))
    texts, about = _texts(spec, report)  # before anything is written, so that a text too short leaves no run behind
    run.write_manifest(
        **manifest_head(run, spec, kind="shift", name=name),
        orders=list(ORDERS),
        arms=spec.arm_texts(),
        cost_model=CostModel.prior().describe(),
        **about,
    )
    trained = {row["seed"]: row for row in run.rows("trained") if _folder(run.path, row["seed"]).is_dir()}
    done = {(row["seed"], row["arm"], row["order"]) for row in run.rows("pass") if row["seed"] in trained}

    def half_done(row: dict[str, Any]) -> bool:
        if row["kind"] == "trained":
            return row["seed"] not in trained
        return row["kind"] in ("batch", "pass") and (row["seed"], row["arm"], row["order"]) not in done

    run.drop_rows(lambda row: row["kind"] in ("summary", "verdict") or half_done(row))
    total = spec.seeds * (1 + len(spec.passes()))
    finished = len(trained) + len(done)
    if finished:
        report.say(f"{finished} of {total} pieces of work are taken up from the run folder")
    with report.stage(f"train {spec.seeds} models and read the stream with {len(spec.arms)} arms", total) as progress:
        for task, found in _work_through(spec, texts, run.path, trained, done):
            if task.arm is None:
                run.append("trained", seed=task.seed, **found[0])
            else:
                for row in found:
                    run.append("batch", seed=task.seed, arm=task.arm, order=task.order, **row)
                run.append("pass", seed=task.seed, arm=task.arm, order=task.order)
            finished += 1
            progress(finished, f"seed {task.seed}: {task.arm or 'trained'}")
    summarise_shift(run, spec)
    run.write_manifest(finished=True, durations_s=report.durations_s)
    return run


def _folder(run: Path, seed: int) -> Path:
    return run / "models" / f"seed-{seed}"


def _texts(spec: ShiftSpec, report: Reporter) -> tuple[ShiftTexts, dict[str, Any]]:
    """Cut what is trained on, what prices are set on and what is read, without overlap; and what a manifest keeps."""
    with report.stage("read the texts and train the tokenizer", 1):
        prose, held = data.embedded_prose("train"), data.embedded_prose("heldout")
        python, other = (data.standard_library_code(spec.python_bytes, part=part, parts=2) for part in (0, 1))
        manual = data.python_manual()
        length, size = spec.sequence_length, spec.decoded
        content = {"prose": prose.content[: spec.prose_bytes], "python": python.content}
        tokenizer = data.train_tokenizer([text[:400_000] for text in content.values()], spec.vocab_size)
        train = {name: data.pack(data.encode(tokenizer, text), length, what=name) for name, text in content.items()}
        read = {"prose": held, "python": other, "manual": manual}
        tokens = {name: data.encode(tokenizer, text.content) for name, text in read.items()}
        used = dict.fromkeys(read, 0)

        def cut(segment: str, text: str, batches: int) -> torch.Tensor:
            made = data.make_segment(
                segment, text, tokens[text], batches=batches, batch_size=size, sequence_length=length,
                bytes_per_token=1.0, skip_batches=used[text],
            )  # fmt: skip
            used[text] += batches
            return made.batches.flatten(0, 1)

        calibration = torch.cat([cut("calibration", text, spec.calibration_batches) for text in ("prose", "python")])
        stream = {segment: cut(segment, text, spec.segment_batches) for segment, text in SEGMENTS}
    sizes = {name: data.bytes_per_token(tokenizer, rows.flatten()[:20_000]) for name, rows in stream.items()}
    about = {
        "segments": [
            {
                "name": name,
                "domain": text,
                "tokens": spec.segment_batches * size * (length - 1),
                "bytes_per_token": sizes[name],
            }
            for name, text in SEGMENTS
        ],
        "data": {
            "training prose": {"source": prose.source, "tokens": train["prose"].numel()},
            "training Python": {"source": python.source, "tokens": train["python"].numel()},
            **{f"read: {name}": {"source": read[name].source, "tokens": tokens[name].numel()} for name in read},
        },
        "unigram_ppl": data.unigram_perplexity(torch.cat(list(train.values())), calibration, spec.vocab_size),
    }
    return ShiftTexts(train, stream, calibration), about


def _work(task: Task, spec: ShiftSpec, texts: ShiftTexts, path: Path) -> Rows:
    folder = _folder(path, task.seed)
    if task.arm is None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before the training was on record
        return [train_and_save(spec, task.seed, texts, folder)]
    assert task.calibrated is not None
    return read_saved(spec, task.arm, task.order, texts, folder, task.calibrated)


def _work_through(
    spec: ShiftSpec, texts: ShiftTexts, path: Path, trained: Mapping[int, Any], done: set[tuple[int, str, str]]
) -> Iterator[tuple[Task, Rows]]:
    """Yield each piece of work as it ends: trainings, and behind each its readings."""

    def readings(seed: int, calibrated: Mapping[str, Any]) -> list[Task]:
        left = [(arm, order) for arm, order in spec.passes() if (seed, arm, order) not in done]
        return [Task(seed, arm, order, calibrated) for arm, order in left]

    begin = [task for seed, row in trained.items() for task in readings(seed, row)]
    begin += [Task(seed) for seed in spec.seed_range if seed not in trained]

    def follow(task: Task, found: Rows) -> list[Task]:
        return readings(task.seed, found[0]) if task.arm is None else []

    return work_through(begin, _work, (spec, texts, path), workers=spec.workers, follow=follow)
