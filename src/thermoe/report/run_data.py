"""What a report needs from a run folder, read once and made safe: absent, `None` and non-finite numbers are `None`.

Rows are kept as the dictionaries they are; this module only groups, orders and averages them.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from thermoe.results import PROVENANCE_ORDER, RunFolder

Row = Mapping[str, Any]
#: Routers that only mark the ends of the accuracy scale; they are no arm of the comparison.
REFERENCE_ARMS = ("random", "oracle")


def number(value: Any) -> float | None:
    """Return ``value`` as a finite float, or ``None``; the text ``"nan"`` that a run folder holds is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def entry(source: Any, *keys: str) -> Any:
    """Walk nested mappings by ``keys``; ``None`` as soon as one is absent or no mapping."""
    for key in keys:
        if not isinstance(source, Mapping):
            return None
        source = source.get(key)
    return source


def section(source: Any, *keys: str) -> Mapping[str, Any]:
    """Like :func:`entry`, for a part that must be a mapping; empty when it is not."""
    found = entry(source, *keys)
    return found if isinstance(found, Mapping) else {}


def listing(source: Any, *keys: str) -> list[Row]:
    """Like :func:`entry`, for a list of mappings; anything else in it is passed over."""
    found = entry(source, *keys)
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, (list, tuple)) else []


def weighted_mean(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Mean of (value, weight) pairs; values that are ``None`` are left out, a weight that is ``None`` counts as 1."""
    total = weight_sum = 0.0
    for value, weight in pairs:
        if value is not None:
            share = 1.0 if weight is None else weight
            total, weight_sum = total + value * share, weight_sum + share
    return total / weight_sum if weight_sum > 0 else None


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm of the comparison: its key in the rows, its title and what it does."""

    name: str
    title: str
    description: str

    @property
    def is_dense(self) -> bool:
        """Whether the arm has no router, so that figures about experts do not apply to it."""
        return self.name.split("-")[0].split("_")[0].lower() == "dense"


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of the stream, of one kind of text."""

    name: str
    domain: str
    tokens: float | None


@dataclass(frozen=True, slots=True)
class StreamPoint:
    """One batch of the stream for one arm, averaged over seeds."""

    segment: str
    batch: float
    tokens: float
    nll: float
    low: float
    high: float


@dataclass
class RunData:
    """A run, grouped for a report."""

    path: Path
    manifest: Mapping[str, Any]
    rows: dict[str, list[Row]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> RunData:
        """Read the folder at ``path``.

        Raises:
            RunFolderError: there is no manifest, or a file is not as thermoe wrote it.
        """
        folder = RunFolder.open(path)
        manifest = folder.manifest
        rows: defaultdict[str, list[Row]] = defaultdict(list)
        for row in folder.rows():
            if isinstance(row, Mapping):
                rows[str(row.get("kind"))].append(row)
        return cls(folder.path, manifest if isinstance(manifest, Mapping) else {}, dict(rows))

    def of(self, kind: str, **wanted: Any) -> list[Row]:
        """Return the rows of one ``kind`` whose fields equal ``wanted``."""
        return [row for row in self.rows.get(kind, []) if all(row.get(k) == v for k, v in wanted.items())]

    @property
    def finished(self) -> bool:
        """Whether the command that wrote the run came to its end."""
        return self.manifest.get("finished") is True

    @cached_property
    def arms(self) -> list[Arm]:
        """The arms in the order of the manifest, then any that only the rows know; reference routers are left out."""
        found: dict[str, Arm] = {}
        for item in listing(self.manifest, "arms"):
            name = str(item.get("name") or "")
            if name:
                title, description = item.get("title") or name, item.get("description") or ""
                found[name] = Arm(name, str(title), str(description))
        for row in [*self.of("summary"), *self.of("score")]:
            name = str(row.get("arm") or "")
            if name and name not in found:
                found[name] = Arm(name, str(row.get("title") or name), "")
        return [arm for arm in found.values() if arm.name not in REFERENCE_ARMS]

    @cached_property
    def segments(self) -> list[Segment]:
        """The segments of the stream in order, from the manifest or else from the rows."""
        found: dict[str, Segment] = {}
        for item in listing(self.manifest, "segments"):
            name = str(item.get("name") or "")
            if name:
                domain = str(item.get("domain") or name.split("-")[0])
                found[name] = Segment(name, domain, number(item.get("tokens")))
        for row in self.of("score"):
            name = str(row.get("segment") or "")
            if name and name not in found:
                found[name] = Segment(name, name.split("-")[0], None)
        return list(found.values())

    @cached_property
    def summaries(self) -> dict[str, Row]:
        """The summary row of each arm; the last one written counts."""
        return {str(row["arm"]): row for row in self.of("summary") if row.get("arm")}

    def title_of(self, name: Any) -> str:
        """Return the title of an arm by its key, or the key itself."""
        reference = {"random": "random choice", "oracle": "oracle (best subset)"}.get(str(name), str(name))
        return next((arm.title for arm in self.arms if arm.name == name), reference)

    @cached_property
    def baseline(self) -> str | None:
        """The arm that the comparisons are made against most often, if there are comparisons."""
        counts = Counter(str(row["against"]) for row in self.of("comparison") if row.get("against"))
        return counts.most_common(1)[0][0] if counts else None

    @cached_property
    def seeds(self) -> int:
        """How many seeds the stream was scored with."""
        return len({row.get("seed") for row in self.of("score")})

    def stream(self, arm: str) -> list[StreamPoint]:
        """Return the NLL per token of each batch of ``arm`` along the stream, averaged over seeds.

        A run taken up again may have written its batches out of order, so they are sorted by segment and batch.
        """
        order = {segment.name: i for i, segment in enumerate(self.segments)}
        cells: defaultdict[tuple[int, str, float], list[tuple[float, float]]] = defaultdict(list)
        for position, row in enumerate(self.of("score", arm=arm)):
            tokens, nll_sum = number(row.get("tokens")), number(row.get("nll_sum"))
            if tokens and nll_sum is not None:
                name = str(row.get("segment") or "")
                batch = number(row.get("batch"))
                key = (order.get(name, len(order)), name, float(position) if batch is None else batch)
                cells[key].append((nll_sum / tokens, tokens))
        points = []
        for (_, name, batch), values in sorted(cells.items()):
            losses = [nll for nll, _ in values]
            tokens = sum(count for _, count in values) / len(values)
            mean = weighted_mean(values)
            if mean is not None:
                points.append(StreamPoint(name, batch, tokens, mean, min(losses), max(losses)))
        return points

    def learning_j_per_token(self, arm: str) -> float | None:
        """Joules per token (cost model) that ``arm`` spent on learning at test time; ``None`` if no row says."""
        joules = tokens = 0.0
        known = False
        for row in self.of("score", arm=arm):
            spent = number(row.get("energy_learning_modelled_j"))
            known = known or spent is not None
            joules, tokens = joules + (spent or 0.0), tokens + (number(row.get("tokens")) or 0.0)
        return joules / tokens if known and tokens > 0 else None

    def accuracy(self, arm: str, column: str, segment: str | None = None) -> float | None:
        """Token-weighted mean over layers (and segments, if none is named) of a ``column`` of the accuracy rows."""
        rows = self.of("accuracy", arm=arm) if segment is None else self.of("accuracy", arm=arm, segment=segment)
        if segment is None and any(row.get("segment") != "all" for row in rows):
            rows = [row for row in rows if row.get("segment") != "all"]  # else those tokens would count twice
        return weighted_mean((number(row.get(column)), number(row.get("tokens"))) for row in rows)

    @cached_property
    def accuracy_arms(self) -> list[str]:
        """Arms with accuracy rows: random first, then the arms of the run in order, the oracle last."""
        present = list(dict.fromkeys(str(row["arm"]) for row in self.of("accuracy") if row.get("arm")))
        ranks = {"random": -1, **{arm.name: i for i, arm in enumerate(self.arms)}, "oracle": 10_000}
        return sorted(present, key=lambda name: ranks.get(name, 9_999))

    @cached_property
    def energy_unit(self) -> tuple[float, str]:
        """Factor and unit in which this run's joules per token are readable; one for all, so that they compare."""
        values = [
            number(entry(row, column, "value"))
            for row in self.summaries.values()
            for column in ("j_per_token_modelled", "j_per_token_measured")
        ]
        largest = max((value for value in values if value), default=1.0)
        for factor, unit in ((1.0, "J"), (1e3, "mJ"), (1e6, "µJ"), (1e9, "nJ")):
            if largest * factor >= 0.1:
                return factor, unit
        return 1e9, "nJ"

    @cached_property
    def artificial_sources(self) -> list[str]:
        """Which of the labels simulated and replayed occur in this run's energy, power or temperature readings."""
        labels = {entry(item, "provenance") for item in section(self.manifest, "telemetry").values()}
        labels |= {row.get("energy_provenance") for row in self.of("score")}
        for row in self.summaries.values():
            labels |= {entry(row, column, "provenance") for column in ("j_per_token_modelled", "j_per_token_measured")}
        labels.add(entry(self.manifest, "cost_model", "provenance"))
        return [label for label in PROVENANCE_ORDER[:2] if label in labels]

    def modelled_label(self, arm: str | None = None) -> str | None:
        """Provenance of the joules of the cost model, of one ``arm`` or the weakest of all."""
        names = [arm] if arm else [item.name for item in self.arms]
        labels = [entry(self.summaries.get(name), "j_per_token_modelled", "provenance") for name in names]
        known = [label for label in labels if label in PROVENANCE_ORDER]
        if known:
            return min(known, key=PROVENANCE_ORDER.index)
        basis = entry(self.manifest, "cost_model", "provenance")
        return str(basis) if basis in PROVENANCE_ORDER else None
