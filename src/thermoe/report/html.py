"""One HTML file a run: self-contained, without scripts, made from the run folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thermoe.report.figures import RenderedFigure, render_figures
from thermoe.report.findings import may_conclude, may_not_conclude, sources_of
from thermoe.report.page import render_page
from thermoe.report.run_data import RunData, entry, number, section
from thermoe.report.shift import render_shift, render_shift_html
from thermoe.report.study import render_study, render_study_html
from thermoe.report.training import render_training_html
from thermoe.report.wording import (
    NOT_MEASURED,
    Cell,
    count,
    difference,
    energy_cell,
    plain,
    provenance_badge,
    reading_of,
    router_cell,
    scaled_count,
    shared_decimals,
    with_interval,
)


def build_report(run_path: str | Path) -> Path:
    """Write ``plots/*.png`` and ``report.html`` into the run folder and return the path of the report.

    Raises:
        RunFolderError: the folder holds no run, or its files are not as thermoe wrote them.
    """
    data = RunData.read(run_path)
    kind = data.manifest.get("type")
    figures = {"study": render_study, "shift": render_shift}.get(str(kind), render_figures)(data)
    plots = data.path / "plots"
    plots.mkdir(exist_ok=True)
    for figure in figures:
        (plots / f"{figure.name}.png").write_bytes(figure.light)
    path = data.path / "report.html"
    partial = path.with_name(path.name + ".partial")
    renders = {"study": render_study_html, "shift": render_shift_html, "training": render_training_html}
    partial.write_text(renders.get(str(kind), render_html)(data, figures), encoding="utf-8")
    partial.replace(path)
    return path


def render_html(data: RunData, figures: list[RenderedFigure]) -> str:
    """Return the report as HTML; every value goes through the template's escaping."""
    return render_page(
        "report.html.j2",
        data,
        figures,
        artificial=" and ".join(data.artificial_sources),
        facts=_facts(data),
        arms=_arms_table(data),
        arm_texts=data.arms,
        has_summaries=bool(data.summaries),
        modelled_badge=provenance_badge(data.modelled_label()),
        segments=[segment.name for segment in data.segments],
        perplexities=_perplexity_table(data),
        comparisons=_comparisons(data),
        accuracies=_accuracy_table(data),
        diversity=_diversity_table(data),
        seeds=data.seeds,
        unigram=_known(plain, data.manifest.get("unigram_ppl")),
        source_groups=sources_of(data).groups,
        cost_terms=_cost_terms(data),
        conclusions=may_conclude(data),
        limits=may_not_conclude(data),
    )


def _known(state: Any, value: Any) -> str:
    """State a value with ``state``, or return an empty text, so that the template can leave the sentence out."""
    return str(state(value)) if number(value) is not None else ""


def _facts(data: RunData) -> list[tuple[str, str]]:
    manifest = data.manifest
    facts: list[tuple[str, str]] = []
    for key, title in (("dense", "Dense model"), ("moe", "MoE model")):
        total, active = (number(entry(manifest, "sizes", key, part)) for part in ("parameters", "active_parameters"))
        if total is not None:
            used = f", {scaled_count(active)} active per token" if active is not None and active != total else ""
            facts.append((title, f"{scaled_count(total)} parameters{used}"))
    moe = section(manifest, "moe")
    experts, top_k = number(moe.get("num_experts")), number(moe.get("top_k"))
    if experts is not None:
        layers = moe.get("layers")
        layer_count = len(layers) if isinstance(layers, (list, tuple)) else number(layers)
        parts = [
            f"{count(layer_count)} MoE layers" if layer_count is not None else "",
            f"{count(experts)} experts a layer",
        ]
        parts.append(f"{count(top_k)} chosen per token" if top_k is not None else "")
        parts.append(f"made by {moe['method']}" if moe.get("method") else "")
        facts.append(("Experts", ", ".join(part for part in parts if part)))
    difference_found = number(entry(manifest, "exactness", "max_abs_diff"))
    if difference_found is not None:
        divergence = number(entry(manifest, "exactness", "logit_kl"))
        more = f", divergence {plain(divergence, 2)} nats" if divergence is not None else ""
        facts.append(
            ("Conversion check", f"logits differ from the dense model's by at most {plain(difference_found, 2)}{more}")
        )
    for domain, item in section(manifest, "data").items():
        tokens, size = number(entry(item, "tokens")), number(entry(item, "bytes"))
        parts = [str(entry(item, "source") or ""), f"{count(tokens)} tokens" if tokens is not None else ""]
        parts.append(f"{count(size)} bytes" if size is not None else "")
        facts.append((f"Text: {domain}", ", ".join(part for part in parts if part) or NOT_MEASURED))
    vocabulary = number(entry(manifest, "tokenizer", "vocab_size"))
    if vocabulary is not None:
        facts.append(
            ("Tokenizer", f"{entry(manifest, 'tokenizer', 'kind') or 'kind not recorded'}, {count(vocabulary)} tokens")
        )
    price = number(entry(manifest, "price", "value_nats_per_j"))
    if price is not None:
        target = entry(manifest, "price", "target")
        aim = f", target: {plain(target) if number(target) is not None else target}" if target is not None else ""
        facts.append(("Price of energy", f"{plain(price)} nats per joule{aim}"))
    device, reason = entry(manifest, "device", "name"), entry(manifest, "device", "reason")
    if device:
        facts.append(("Device", f"{device} ({reason})" if reason else str(device)))
    if manifest.get("created_at"):
        facts.append(("Started", str(manifest["created_at"])))
    return facts


def _arms_table(data: RunData) -> list[dict[str, Any]]:
    table = []
    decimals = shared_decimals(entry(row, "ppl", "all") for row in data.summaries.values())
    for arm in data.arms:
        row = data.summaries.get(arm.name)
        table.append(
            {
                "arm": arm,
                "perplexity": with_interval(entry(row, "ppl", "all"), decimals),
                "modelled": energy_cell(data, arm, "j_per_token_modelled"),
                "telemetry": energy_cell(data, arm, "j_per_token_measured"),
                "experts": router_cell(arm, entry(row, "experts_per_token")),
                "distinct": router_cell(arm, entry(row, "distinct_experts")),
                "effective": router_cell(arm, entry(row, "effective_experts")),
                "accuracy": router_cell(arm, entry(row, "accuracy_corrected", "all"), 2),
                "speed": Cell(plain(entry(row, "tokens_per_s"))),
            }
        )
    return table


def _perplexity_table(data: RunData) -> list[dict[str, Any]]:
    table = []
    decimals = {
        segment.name: shared_decimals(entry(row, "ppl", segment.name) for row in data.summaries.values())
        for segment in data.segments
    }
    for arm in data.arms:
        row = data.summaries.get(arm.name)
        if row is not None:
            cells = []
            for segment in data.segments:
                cell = with_interval(entry(row, "ppl", segment.name), decimals[segment.name])
                bits = number(entry(row, "bits_per_byte", segment.name))
                extra = f"{plain(bits)} bits per byte" if bits is not None else "bits per byte not measured"
                cells.append({"cell": cell, "bits": extra})
            table.append({"title": arm.title, "cells": cells})
    return table


def _comparisons(data: RunData) -> dict[str, Any]:
    """Paired differences with an arm a line and a segment a column; empty when there are none."""
    rows = [row for row in data.of("comparison") if row.get("arm") and row.get("against")]
    rows = [row for row in rows if row.get("metric") in (None, "nll")]
    found = {(row["arm"], row["against"], str(row.get("segment") or "all")): row for row in rows}
    known = [*(segment.name for segment in data.segments), "all"]
    names = [name for name in known if any(key[2] == name for key in found)]
    lines = []
    for arm, against in dict.fromkeys(key[:2] for key in found):
        cells = [_compared(found.get((arm, against, name))) for name in names]
        lines.append({"arm": data.title_of(arm), "against": data.title_of(against), "cells": cells})
    return {"columns": ["whole stream" if name == "all" else name for name in names], "lines": lines} if names else {}


def _compared(row: Mapping[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {"cell": Cell(NOT_MEASURED), "reading": "", "sample": ""}
    sample = f"{count(row.get('n'))} sequences" if number(row.get("n")) is not None else ""
    cell = difference(row)
    return {"cell": cell, "reading": "" if cell.missing else reading_of(row), "sample": sample}


def _accuracy_table(data: RunData) -> list[dict[str, str]]:
    columns = ("tolerant_corrected", "tolerant", "tolerant_chance", "overlap_corrected", "overlap", "regret")
    return [
        {"title": data.title_of(arm), **{column: plain(data.accuracy(arm, column), 2) for column in columns}}
        for arm in data.accuracy_arms
    ]


def _diversity_table(data: RunData) -> list[dict[str, str]]:
    """Per arm, the layer and segment where each figure is worst: a mean hides one collapsed layer."""
    worst = (
        ("effective_experts", min),
        ("max_vio", max),
        ("gini", max),
        ("dead_experts", max),
        ("token_entropy", min),
        ("mutual_information", min),
    )
    table = []
    for arm in data.arms:
        rows = data.of("load", arm=arm.name)
        if rows:
            line = {"title": arm.title}
            for column, pick in worst:
                values = [value for row in rows if (value := number(row.get(column))) is not None]
                line[column] = plain(pick(values)) if values else NOT_MEASURED
            table.append(line)
    return table


def _cost_terms(data: RunData) -> list[tuple[str, str]]:
    return [
        (str(name).replace("_", " "), f"{plain(entry(term, 'value'))} {entry(term, 'unit') or ''}".strip())
        for name, term in section(data.manifest, "cost_model", "terms").items()
    ]
