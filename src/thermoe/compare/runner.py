"""Runs a comparison from a specification to a run folder: stages, arms, rows, summary."""

from __future__ import annotations

import datetime
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.compare.analysis import summarise
from thermoe.compare.arms import ARMS, Arm, Prepared, Scorer
from thermoe.compare.progress import Reporter
from thermoe.compare.spec import CompareSpec
from thermoe.compare.stages import Corpus, choose_price, prepare_corpus, prepare_dense, prepare_moe
from thermoe.compare.study_spec import StudySpec
from thermoe.data import Segment
from thermoe.energy.cost_model import CostModel
from thermoe.energy.profile import ProfileKey, load_cost_model
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError, RunFolderError, TelemetryError, ThermoeError, UnknownNameError
from thermoe.evaluation import Chooser, routing_accuracy
from thermoe.moe.layer import moe_layers
from thermoe.moe.stats import StatsAccumulator
from thermoe.results import RunFolder
from thermoe.runtime import choose_device, environment_fingerprint
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.source import SOURCES, open_source


def run_comparison(
    spec: CompareSpec,
    out: str | Path,
    *,
    command: str = "compare",
    resume: bool = False,
    reporter: Reporter | None = None,
) -> RunFolder:
    """Run every stage and arm of ``spec`` and leave the results in the folder ``out``.

    Args:
        spec: what to compare.
        out: the run folder.
        command: name of the command, for the manifest.
        resume: take up an interrupted run of the same specification.
        reporter: where progress is shown.

    Raises:
        RunFolderError: the folder is not empty, or holds a run of another specification.
    """
    report = reporter or Reporter()
    for name in spec.arms:
        ARMS.get(name, where="arms")
    device = choose_device(spec.device)
    _check_telemetry(spec.telemetry)
    new_folder = not Path(out).exists()
    run = RunFolder.create(out, resume=resume)
    before = check_same_run(run, spec)
    if device.name == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), 16)))
    arms = {name: ARMS.get(name) for name in spec.arms}
    run.write_manifest(
        command=command,
        created_at=run.manifest.get("created_at", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")),
        finished=False,
        config=spec.as_dict(),
        environment=environment_fingerprint(),
        device={"name": device.name, "reason": device.reason},
        arms=[
            {"name": n, "title": a.title, "description": a.description, "against": a.against} for n, a in arms.items()
        ],
    )
    report.say(f"device: {device.name} ({device.reason})")
    with EnergyMeter(source=spec.telemetry) as meter:
        description = meter.describe()
        run.write_manifest(telemetry=description)
        energy = description.get("energy_j", {})
        report.say(f"energy: {energy.get('provenance') or 'not measured: ' + str(energy.get('reason'))}")
        try:
            corpus = prepare_corpus(spec, run, report)
        except ThermoeError:
            if not before:
                _clear(run, new_folder)  # nothing has been computed; the folder stays free for mended settings
            raise
        dense = prepare_dense(spec, corpus, device.name, run, report)
        moe = prepare_moe(spec, dense, corpus, run, report)
        price = choose_price(spec, moe, corpus)
        work = ModelWork.of(moe)
        cost = _cost_model(moe, meter, device.name, run, report)
        run.write_manifest(
            price={
                "value": price,
                "unit": "router probability per token-expert pair",
                "value_nats_per_j": price / cost.pair_cost_j(work.layers[0]),
                "pairs_frac": spec.price.pairs_frac if spec.price.value is None else None,
            }
        )
        prepared = Prepared(spec, dense, moe, price)
        finished = {row["arm"] for row in run.rows("arm_done")}
        for name, arm in arms.items():
            if name in finished:
                report.say(f"{arm.title} is taken up from the run folder")
                continue
            run.drop_rows(lambda row, name=name: row.get("arm") == name and row["kind"] != "arm_done")
            _run_arm(name, arm, prepared, corpus, run, report, meter, cost)
            run.append("arm_done", arm=name)
        _judge_references(prepared, corpus, run, report)
    run.drop_rows(lambda row: row["kind"] in ("summary", "comparison", "verdict"))
    summarise(run)
    run.write_manifest(finished=True, durations_s=report.durations_s)
    return run


def _check_telemetry(name: str) -> None:
    """Raise when there is no such source, or it cannot be opened by its name alone."""
    if name in ("auto", "off"):
        return
    if name not in SOURCES:
        raise UnknownNameError.of("telemetry source", name, ("auto", "off", *SOURCES), where="telemetry")
    try:
        open_source(name).close()
    except TelemetryError as error:
        raise ConfigError(
            f"the telemetry source {name!r} needs more than its name: {error.what}",
            where="telemetry",
            accepted="auto, off, or a source that opens by its name",
            fix="use --telemetry auto",
        ) from error


def _cost_model(moe: nn.Module, meter: EnergyMeter, device: str, run: RunFolder, report: Reporter) -> CostModel:
    """Return the cost model fitted on this machine for these layers, or the prior, and say which."""
    experts = next(layer.experts for _, layer in moe_layers(moe))
    key = ProfileKey.of(
        meter,
        dtype=str(experts.down_proj.dtype).removeprefix("torch."),
        expert_shape=(
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
            int(experts.gated),
        ),
        device=device,
    )
    cost, why = load_cost_model(key)
    report.say(f"cost model: {why}")
    run.write_manifest(cost_model={**cost.describe(), "why": why})
    return cost


def check_same_run(run: RunFolder, spec: CompareSpec | StudySpec) -> bool:
    """Return whether the folder holds an earlier run, after checking that it is one of ``spec``."""
    manifest = run.manifest
    if not manifest:
        strangers = sorted(path.name for path in run.path.iterdir() if path.name != "manifest.json.partial")
        if strangers:
            raise RunFolderError(
                f"{run.path} holds {strangers[0]!r} and no run to take up",
                where="--out",
                accepted="the folder of an interrupted run, or a new or empty folder",
                fix="check the path, or name another folder with --out",
            )
        return False
    before = manifest.get("config") if isinstance(manifest, dict) else None
    now = spec.as_dict()
    if before == now:
        return True
    changed = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
    raise RunFolderError(
        f"{run.path} holds a run of another configuration (it differs in {', '.join(changed)})",
        where=str(run.path / "manifest.json"),
        accepted="the configuration the run was started with",
        fix="use the same options to resume, or name another folder with --out",
    )


def _clear(run: RunFolder, new_folder: bool) -> None:
    """Remove what a run has written that failed before anything was computed."""
    for name in ("manifest.json", "rows.jsonl"):
        (run.path / name).unlink(missing_ok=True)
    shutil.rmtree(run.path / "tokenizer", ignore_errors=True)
    if new_folder:
        run.path.rmdir()


def _run_arm(
    name: str,
    arm: Arm,
    prepared: Prepared,
    corpus: Corpus,
    run: RunFolder,
    report: Reporter,
    meter: EnergyMeter,
    cost: CostModel,
) -> None:
    device = next(prepared.dense.parameters()).device
    total = sum(segment.batches.shape[0] for segment in corpus.segments)
    with report.stage(f"score the stream: {arm.title}", total) as done, arm.open(prepared) as scorer:
        work = ModelWork.of(scorer.model)
        scorer.model(corpus.segments[0].batches[0].to(device))  # warm up outside every measurement
        scored = 0
        for segment, judged in zip(corpus.segments, corpus.judged, strict=True):
            batches = segment.batches.to(device)
            stats = {layer: StatsAccumulator() for layer, _ in moe_layers(scorer.model)}
            tokens = batches.shape[0] * batches.shape[1] * (batches.shape[2] - 1)
            rows: list[dict[str, Any]] = []
            with meter.window(f"{name}/{segment.name}", tokens=tokens) as window:
                for batch in batches:
                    rows.append(_score_batch(scorer, batch, work, cost, stats))
                    scored += 1
                    done(scored)
            for index, row in enumerate(rows):
                run.append("score", arm=name, seed=prepared.spec.seed, segment=segment.name, batch=index, **row)
            _log_segment(name, segment, stats, window.result, run)
            if stats:
                _log_accuracy(name, segment.name, scorer, judged.to(device), prepared.spec.accuracy.tau, "router", run)


def _score_batch(
    scorer: Scorer, batch: Tensor, work: ModelWork, cost: CostModel, stats: dict[str, StatsAccumulator]
) -> dict[str, Any]:
    started = time.perf_counter()
    nll = scorer.score(batch).cpu()  # the copy waits for the device, so that the time is that of the work
    duration_s = time.perf_counter() - started
    decisions = {name: layer.last_routing for name, layer in moe_layers(scorer.model)}
    pairs, opened = [], []
    for name, decision in decisions.items():
        assert decision is not None
        stats[name].add(decision)
        pairs.append(float(decision.active.sum()))
        opened.append(float(decision.opened.sum()))
    tokens = batch.shape[0] * (batch.shape[1] - 1)
    forward_j = cost.forward_j(work, batch.numel(), pairs, opened)
    learning_j = forward_j * scorer.learning_passes
    layers = len(pairs)
    return {
        "tokens": tokens,
        "nll_sum": float(nll.sum()),
        "sequence_nll": [float(value) for value in nll],
        "experts_per_token": sum(pairs) / layers / batch.numel() if layers else None,
        "distinct_experts": sum(opened) / layers if layers else None,
        # The whole, learning included; the part that learning took stands beside it.
        "energy_modelled_j": forward_j + learning_j,
        "energy_learning_modelled_j": learning_j,
        "energy_provenance": cost.provenance,
        "duration_s": duration_s,
    }


def _log_segment(name: str, segment: Segment, stats: dict[str, StatsAccumulator], window: Any, run: RunFolder) -> None:
    run.append(
        "energy",
        arm=name,
        segment=segment.name,
        energy_measured_j=window.energy_j,
        j_per_token=window.j_per_token,
        tokens=window.tokens,
        power_w=window.power_w,
        temp_c=window.temp_end_c,
        duration_s=window.duration_s,
        provenance=window.provenance,
        reason=window.reason,
        flags=list(window.flags),
        bytes_per_token=segment.bytes_per_token,
    )
    for index, accumulator in enumerate(stats.values()):
        result = accumulator.result()
        if result is not None:
            run.append("load", arm=name, segment=segment.name, layer=index, **result.as_dict())


def _log_accuracy(
    arm: str, segment: str, scorer: Scorer, judged: Tensor, tau: float, chooser: Chooser, run: RunFolder
) -> None:
    for index, result in enumerate(routing_accuracy(scorer.model, judged, tau=tau, chooser=chooser).values()):
        run.append("accuracy", arm=arm, segment=segment, layer=index, **result.as_dict())


def _judge_references(prepared: Prepared, corpus: Corpus, run: RunFolder, report: Reporter) -> None:
    """Judge random and best-possible decisions on the baseline's hidden states: the 0 and the 1 of the scale."""
    choosers: tuple[Chooser, ...] = ("random", "oracle")
    run.drop_rows(lambda row: row.get("arm") in choosers)
    device = next(prepared.dense.parameters()).device
    with (
        report.stage("judge random and best routing", len(choosers)) as done,
        ARMS.get("baseline").open(prepared) as base,
    ):
        for number, chooser in enumerate(choosers, 1):
            for segment, judged in zip(corpus.segments, corpus.judged, strict=True):
                _log_accuracy(chooser, segment.name, base, judged.to(device), prepared.spec.accuracy.tau, chooser, run)
            done(number)
