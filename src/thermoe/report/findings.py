"""The sentences of a report that depend on the run: where each kind of number comes from, and what it lets one say.

Each sentence is made from rows or manifest entries; where they are absent the sentence is left out or says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from thermoe.report.run_data import RunData, entry, number, section
from thermoe.report.wording import count, percent, plain, reading_of, scaled_count
from thermoe.results import PROVENANCE_ORDER

#: Below this many parameters the text calls the model small; transfer to larger ones is then the first doubt.
_SMALL_PARAMETERS = 1e9


@dataclass(slots=True)
class Sources:
    """What stands behind the numbers: lines of (what, how or why), grouped by the strength of the evidence."""

    measured: list[tuple[str, str]] = field(default_factory=list)
    estimated: list[tuple[str, str]] = field(default_factory=list)
    simulated: list[tuple[str, str]] = field(default_factory=list)
    replayed: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def add(self, label: object, what: str, how: str) -> None:
        """File a line under a provenance; anything that is no known label goes to what was not measured."""
        kept = getattr(self, str(label)) if label in PROVENANCE_ORDER else self.missing
        kept.append((what, how))

    @property
    def groups(self) -> list[tuple[str, str, list[tuple[str, str]]]]:
        """Badge, heading and lines of each group that has lines."""
        named = (
            ("measured", "Measured", self.measured),
            ("estimated", "Estimated", self.estimated),
            ("simulated", "Simulated", self.simulated),
            ("replayed", "Replayed from a recording", self.replayed),
            ("not measured", "Not measured", self.missing),
        )
        return [(badge, heading, lines) for badge, heading, lines in named if lines]


def _scoring(data: RunData, sources: Sources) -> None:
    rows = data.of("score")
    scored = sum(number(row.get("tokens")) or 0.0 for row in rows)
    if scored:
        sources.add(
            "measured",
            "Loss and perplexity",
            f"computed from the models' outputs on {count(scored)} scored tokens, all arms together",
        )
    else:
        sources.add(None, "Loss and perplexity", "no batch of the stream has been scored")
    if any(number(row.get("tokens_per_s")) is not None for row in data.summaries.values()):
        sources.add("measured", "Tokens per second", "wall clock of this machine, other programs included")
    else:
        sources.add(None, "Tokens per second", "no arm has been summed up")
    accuracy = data.of("accuracy")
    if accuracy:
        tokens = max(number(row.get("tokens")) or 0.0 for row in accuracy)
        sample = f", on up to {count(tokens)} tokens a layer and segment" if tokens else ""
        sources.add("measured", "Routing accuracy", f"chosen experts against the best subset{sample}")
    else:
        sources.add(None, "Routing accuracy", "no rows of it were written")
    if data.of("load"):
        sources.add("measured", "Expert load and diversity", "counted from the routers' decisions")


def _energy(data: RunData, sources: Sources) -> None:
    model = section(data.manifest, "cost_model")
    label = data.modelled_label()
    if label:
        told = [
            f"{name}: {entry(model, key)}"
            for name, key in (("basis", "basis"), ("reference", "reference"))
            if entry(model, key)
        ]
        how = "; ".join(["computed from the experts that ran and a cost model", *told])
        sources.add(label, "Joules per token (cost model)", how)
    else:
        sources.add(None, "Joules per token (cost model)", "no cost model with a provenance was recorded")
    by_label: dict[str | None, list[str]] = {}
    reasons: list[str] = []
    for arm in data.arms:
        found = entry(data.summaries.get(arm.name), "j_per_token_measured")
        stated = entry(found, "provenance") if number(entry(found, "value")) is not None else None
        by_label.setdefault(stated if stated in PROVENANCE_ORDER else None, []).append(arm.title)
        if stated not in PROVENANCE_ORDER and entry(found, "reason"):
            reasons.append(str(entry(found, "reason")))
    for stated, titles in by_label.items():
        if stated is None:
            why = "; ".join(dict.fromkeys(reasons)) or "no reading and no reason were recorded"
            which = "" if len(by_label) == 1 else f" ({', '.join(titles)})"
            sources.add(None, f"Joules per token (telemetry){which}", why)
        else:
            sources.add(stated, "Joules per token (telemetry)", f"from readings of energy, for {', '.join(titles)}")
    for metric, item in section(data.manifest, "telemetry").items():
        stated, reason = entry(item, "provenance"), entry(item, "reason")
        name = f"Telemetry: {str(metric).replace('_', ' ')}"
        default = "read while the run went on" if stated in PROVENANCE_ORDER else "no reason was recorded"
        sources.add(stated, name, str(reason or default))


def sources_of(data: RunData) -> Sources:
    """Group everything the report shows by where it comes from."""
    sources = Sources()
    _scoring(data, sources)
    _energy(data, sources)
    return sources


def _named(data: RunData, name: object) -> str:
    return f"“{data.title_of(name)}”"


def may_conclude(data: RunData) -> list[str]:
    """Return what the run supports: comparisons whose interval leaves out zero, and those where it does not."""
    lines = []
    for row in data.of("comparison"):
        if row.get("segment") not in (None, "all") and any(r.get("segment") == "all" for r in data.of("comparison")):
            continue  # the whole stream is the claim; its parts stand in the table
        verdict = reading_of(row)
        name, against = _named(data, row.get("arm")), _named(data, row.get("against"))
        where = "" if row.get("segment") in (None, "all") else f" on {row['segment']}"
        if verdict in ("better", "worse"):
            word = "lower" if verdict == "better" else "higher"
            lines.append(
                f"On this stream, {name} has a {word} loss than {against}{where}; the interval leaves out zero."
            )
        elif verdict == "no difference shown":
            lines.append(
                f"Between {name} and {against}{where} no difference in loss is shown: the interval includes zero. "
                "That is no proof that they are equal."
            )
    for arm in data.arms:
        learning = data.learning_j_per_token(arm.name)
        modelled = number(entry(data.summaries.get(arm.name), "j_per_token_modelled", "value"))
        if learning and modelled:
            lines.append(
                f"The joules per token of {_named(data, arm.name)} include learning at test time, "
                f"{percent(learning / modelled)} of the total by the cost model."
            )
    if not lines:
        lines.append("Nothing yet: the run holds no paired comparison with an interval.")
    return lines


def may_not_conclude(data: RunData) -> list[str]:
    """Return the limits of the run, each tied to an entry of it."""
    return [*_limits_of_setting(data), *_limits_of_energy(data)]


def _limits_of_setting(data: RunData) -> list[str]:
    lines = []
    parameters = number(entry(data.manifest, "sizes", "dense", "parameters"))
    if parameters is None:
        lines.append("Nothing about other model sizes; the size of this model was not recorded.")
    elif parameters < _SMALL_PARAMETERS:
        lines.append(
            f"Nothing about large models: the dense model here has {scaled_count(parameters)} parameters, and what "
            "routing costs and saves changes with size."
        )
    device = entry(data.manifest, "device", "name")
    machine = f"one machine ({device})" if device else "one machine"
    lines.append(f"Nothing about other machines: the run was made on {machine}, and its speeds hold there.")
    if data.of("score"):
        lines.append(
            "Nothing about generated text: every token was scored given the true text before it (teacher forcing), and "
            "no text was generated."
        )
        runs = data.seeds
        if runs == 1:
            lines.append(
                "Little about another training run: there was one seed. The intervals tell how the result would move "
                "with other text of the same kind; they do not cover training the models anew."
            )
        else:
            lines.append(f"Little about other seeds than the {runs} of this run.")
    recovery = [number(row.get("tokens")) for row in data.of("train", phase="recovery")]
    if recovery and any(arm.is_dense for arm in data.arms):
        lines.append(
            "Nothing about the MoE form by itself: the MoE arms had recovery training after the conversion, so they "
            "have trained on more tokens than the dense model had when it was converted."
        )
    if data.of("accuracy"):
        lines.append(
            "Nothing about token predictions from routing accuracy: it compares routing decisions with the best "
            "possible subset of experts, never token predictions."
        )
    return lines


def _limits_of_energy(data: RunData) -> list[str]:
    lines = []
    modelled = any(number(entry(row, "j_per_token_modelled", "value")) is not None for row in data.summaries.values())
    if modelled:
        reference = entry(data.manifest, "cost_model", "reference")
        device = f" ({reference})" if reference else ""
        lines.append(
            f"Nothing about the power bill of this machine from modelled joules: they stand for the reference device "
            f"of the cost model{device} and are no reading."
        )
    labels = {entry(row, "j_per_token_measured", "provenance") for row in data.summaries.values()}
    if "measured" not in labels:
        lines.append("No saving in measured energy: no arm has a reading of joules per token in this run.")
    for label in data.artificial_sources:
        lines.append(
            f"Nothing about hardware from the {label} readings: they come from "
            f"{'a model of a device' if label == 'simulated' else 'an earlier recording'}, not from this run."
        )
    price = section(data.manifest, "price")
    value = number(price.get("value_nats_per_j"))
    if value is not None:
        lines.append(
            f"Nothing about other prices of energy: routing was priced at {plain(value)} nats per joule, one point of "
            "the trade-off between loss and energy."
        )
    return lines
