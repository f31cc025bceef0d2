"""`thermoe train`: from a configuration to a run folder with the trained model, its rows and its manifest.

The folder holds `manifest.json`, `rows.jsonl`, `tokenizer`, `checkpoints` while the training is under way, and `model`
at the end. What came before the first step is made again on a resume, and compared with the manifest.
"""

from __future__ import annotations

import datetime
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from thermoe.convergence import judge_convergence
from thermoe.energy_callback import EnergyCallback
from thermoe.errors import MissingDependencyError, RunFolderError
from thermoe.models.measure import model_size
from thermoe.progress import Reporter
from thermoe.results import RunFolder, save_whole
from thermoe.runtime import choose_device, environment_fingerprint, seed_everything
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.source import Source, check_by_name
from thermoe.training.distill import Distiller
from thermoe.training.loop import (
    Outcome,
    check_batch,
    check_precision,
    checkpoint_step,
    last_checkpoint,
    train_language_model,
)
from thermoe.training.model import Prepared, own_losses, prepare_model
from thermoe.training.spec import REPORTERS, TrainSpec
from thermoe.training.texts import TrainingText, prepare_text
from thermoe.training.trainer import Validation

Resume = Literal["auto", "never"]
#: Settings a resume may change: they say where numbers are shown, not what they are.
_FREE = ("report_to",)


def run_training(
    spec: TrainSpec,
    out: str | Path,
    *,
    resume: Resume = "auto",
    reporter: Reporter | None = None,
    source: Source | None = None,
) -> RunFolder:
    """Train as ``spec`` says and leave model, rows and manifest in the folder ``out``.

    Args:
        spec: what to train, on what, how.
        out: the run folder.
        resume: "auto" takes up an interrupted run of the same configuration from its last whole checkpoint, with the
            result that an uninterrupted run would have had; "never" wants a new or empty folder.
        reporter: where progress is shown.
        source: an open telemetry source in the place of the one that ``spec`` names.

    Raises:
        RunFolderError: the folder is not empty, or holds a run of another configuration.
        MissingDependencyError: a reporter is asked for that is not installed.
        MachineError: the device is not there, or cannot do what is asked.
    """
    report = reporter or Reporter()
    spec.check()
    device = choose_device(spec.device)
    check_precision(spec.training, torch.device(device.name))
    if source is None:
        check_by_name(spec.telemetry)
    reporters = check_reporters(spec.report_to)
    run, before = _open(Path(out), spec, resume)
    if run.manifest.get("finished"):
        report.say(f"{run.path} holds the finished run of this configuration; nothing is left to train")
        return run
    with EnergyMeter(source=source or spec.telemetry) as meter:
        telemetry = meter.describe()
    try:
        with report.stage("read the texts", 1):
            text = prepare_text(spec, run.path / "tokenizer" if before else None)
        check_batch(text.rows, spec.training)
        seed_everything(spec.seed)
        prepared = prepare_model(spec, text, torch.device(device.name))
        _check_same_text(run, text)
    except BaseException:
        if not before and not any(run.path.iterdir()):
            run.path.rmdir()  # nothing has been computed; the place stays free for mended settings
        raise
    if not (run.path / "tokenizer").is_dir():
        save_whole(run.path / "tokenizer", text.tokenizer.save_pretrained)
    run.write_manifest(
        command="train",
        type="training",
        created_at=run.manifest.get("created_at", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")),
        finished=False,
        config=spec.as_dict(),
        environment=environment_fingerprint(),
        device={"name": device.name, "reason": device.reason},
        telemetry=telemetry,
        data=text.described,
        sizes=model_size(prepared.model),
    )
    sizes = run.manifest["sizes"]
    report.say(f"device: {device.name} ({device.reason})")
    report.say(f"energy: {telemetry['energy_j'].get('provenance') or 'not measured: ' + _reason(telemetry)}")
    report.say(f"model: {sizes['parameters']:,} parameters, {sizes['active_parameters']:,} active per token")
    measured = telemetry["energy_j"].get("provenance") is not None or any(run.rows("energy"))
    energy = EnergyCallback(source or spec.telemetry) if measured else None
    outcome = _train(spec, text, prepared, run, report, energy, reporters)
    _save_model(run, prepared, text)
    run.drop_rows(lambda row: row["kind"] == "summary")
    run.append("summary", **_summary(run, outcome, energy, telemetry))
    run.write_manifest(finished=True, durations_s=report.durations_s)
    shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    return run


def check_reporters(name: str) -> list[str] | str:
    """Return the reporters that ``report_to`` means, as transformers takes them.

    Raises:
        MissingDependencyError: one is not installed, or "all" is asked for and none is.
    """
    if name == "none":
        return "none"
    wanted = REPORTERS if name == "all" else (name,)
    here = [one for one in wanted if find_spec(one) is not None or (one == "tensorboard" and find_spec("tensorboardX"))]
    if not here:
        raise MissingDependencyError(
            f"{name} is not installed" if name != "all" else f"none of {', '.join(REPORTERS)} is installed",
            where="report_to",
            accepted="none, or a reporter that is installed",
            fix=f"pip install {wanted[0]}, or leave --report-to out; every number is in rows.jsonl in any case",
        )
    return here


def _open(folder: Path, spec: TrainSpec, resume: Resume) -> tuple[RunFolder, bool]:
    """Return the run folder and whether it holds an earlier run to go on with."""
    if resume == "never" and folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(
            f"the run folder {folder} is not empty",
            where="--out",
            accepted="a new or empty folder with --resume never",
            fix="name another folder with --out, or use --resume auto to go on with the run in this one",
        )
    run = RunFolder.create(folder, resume=True)
    return run, run.holds_run_of(spec.as_dict(), ignore=_FREE)


def _check_same_text(run: RunFolder, text: TrainingText) -> None:
    """Refuse to go on with other texts than the run began with."""
    parts = ("train", "validation", "train_tokens", "validation_tokens")
    before = run.manifest.get("data")
    if before is None or all(before.get(part) == text.described[part] for part in parts):
        return
    changed = [part for part in parts if before.get(part) != text.described[part]]
    raise RunFolderError(
        f"the texts are no longer those the run in {run.path} was started with ({changed[0]} differs)",
        where=f"data.{changed[0]}",
        accepted="files with the same content",
        fix="restore the files, or name another folder with --out",
    )


def _reason(telemetry: Mapping[str, Any]) -> str:
    return str(telemetry["energy_j"].get("reason") or "no sensor")


def _train(
    spec: TrainSpec,
    text: TrainingText,
    prepared: Prepared,
    run: RunFolder,
    report: Reporter,
    energy: EnergyCallback | None,
    reporters: list[str] | str,
) -> Outcome:
    settings = replace(spec.training, seed=spec.seed + spec.training.seed).for_rows(text.rows.shape[0])
    checkpoints = run.path / "checkpoints"
    reached = checkpoint_step(last_checkpoint(checkpoints))
    begun = reached > 0
    run.drop_rows(lambda row: row.get("step", 0) > reached or not begun)
    if begun:
        report.say(f"going on from step {reached} of {settings.steps}")
    elif checkpoints.is_dir():
        report.say("no whole checkpoint is left of the interrupted run; it begins again")
    distiller = None
    if prepared.teacher is not None:
        weights = {name: getattr(spec.distill, name) for name in ("kl", "layer_mse", "lm")}
        distiller = Distiller(prepared.teacher, prepared.model, **weights)
    title = f"train for {settings.steps} steps of {settings.batch_size * spec.model.sequence_length:,} tokens"
    started, note = time.monotonic(), ""

    with report.stage(title, settings.steps) as done, _tensorboard_folder(run.path / "tensorboard"):

        def write(kind: str, step: int, fields: dict[str, Any]) -> None:
            nonlocal note
            wall = {"wall_s": time.monotonic() - started} if kind == "train" else {}
            run.append(kind, phase="train", step=step, **fields, **wall)
            if kind == "train":
                note = f"loss {fields['loss']:.3f}"
            elif kind == "eval":
                say = f"perplexity {fields['ppl']:.2f}, {fields['bits_per_byte']:.4f} bits per byte"
                report.say(f"  step {step}: {say} on held-out text")

        try:
            return train_language_model(
                prepared.model,
                text.rows,
                settings,
                checkpoint_dir=checkpoints,
                write=write,
                on_step=lambda step: done(step, note),
                resume=True,
                validation=Validation(text.heldout, text.bytes_per_token, settings.micro_batch_size),
                distiller=distiller,
                own_losses=own_losses(spec),
                energy=energy,
                report_to=reporters,
                keep_checkpoint=True,
            )
        finally:
            if distiller is not None:
                distiller.close()


@contextmanager
def _tensorboard_folder(folder: Path) -> Iterator[None]:
    """Let TensorBoard write into the run folder; the Trainer's own default lies among the checkpoints, which go."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]


def _save_model(run: RunFolder, prepared: Prepared, text: TrainingText) -> None:
    """Write model and tokenizer as a folder that `from_pretrained` reads."""

    def write(folder: Path) -> None:
        prepared.model.save_pretrained(folder)
        text.tokenizer.save_pretrained(folder)

    shutil.rmtree(run.path / "model", ignore_errors=True)  # of a run that was cut short right after it
    save_whole(run.path / "model", write)


def _judged(run: RunFolder) -> dict[str, Any] | None:
    """Return what the validation curve says, or ``None`` where there is none."""
    curve = sorted({int(row["step"]): float(row["nll"]) for row in run.rows("eval")}.items())
    return judge_convergence(curve).as_dict() if curve else None


def _summary(
    run: RunFolder, outcome: Outcome, energy: EnergyCallback | None, telemetry: Mapping[str, Any]
) -> dict[str, Any]:
    rows = list(run.rows("train"))
    totals = energy.totals if energy is not None else None
    measured = totals is not None and totals.provenance is not None
    reason = None if measured else _reason(telemetry)
    if totals is not None and totals.gaps:
        reason = "; ".join(totals.gaps)
    elif not measured and telemetry["energy_j"].get("provenance") is not None:
        reason = "the training was too short to be measured"
    return {
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "tokens_per_s": outcome.session_tokens / outcome.session_s if outcome.session_tokens else None,
        **outcome.validation,
        "convergence": _judged(run),
        "effective_experts": rows[-1].get("effective_experts") if rows else None,
        "energy_j": totals.energy_j if totals is not None and measured else None,
        "energy_provenance": totals.provenance if totals is not None else None,
        "energy_partial": totals.partial if totals is not None and measured else None,
        "energy_reason": reason,
    }
