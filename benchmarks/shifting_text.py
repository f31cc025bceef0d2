"""A stream of text whose domain changes, and three ways of reading it: frozen, routers learning, all weights learning.

Every reader scores a batch before it learns from it, so that no loss is that of text already seen. The same batches
come in two orders: segment after segment (novels, Python, Shakespeare, other novels), and interleaved one by one, which
is the worst case for whoever learns. A frozen model scores a batch alike in both, so it is run once.

Shape letters: B sequences, S positions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.compare.decode_cost import choices_of
from thermoe.compare.dynamic_evaluation import DynamicEvaluation
from thermoe.energy.cost_model import CostModel
from thermoe.evaluation import sequence_nll

#: What each segment of the stream is read from; both segments of novels are of other pages.
SEGMENTS = (
    ("novels-1", "novels"),
    ("python", "python"),
    ("shakespeare", "shakespeare"),
    ("wikitext", "wikitext"),
    ("novels-2", "novels"),
)
#: Texts that the model was trained on; the others are shifted.
TRAINED_ON = ("novels", "python")
ORDERS = ("segments", "interleaved")


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows int64 (B, S) and the segment they belong to; ``number`` counts within the segment."""

    segment: str
    number: int
    rows: Tensor


class Texts:
    """Token files cut into three parts without overlap: what is reported, what settings are chosen on, calibration.

    Args:
        folder: holds NAME.npy or valid_NAME.npy for novels, python, shakespeare and wikitext.
        batch: B.
        length: S.
        reported: batches of each segment that is reported.
        chosen_on: batches of each segment of the validation stream.
        calibration: rows of novels and of Python, the domains trained on, for prices and sensitivities.
    """

    def __init__(
        self, folder: Path, *, batch: int, length: int, reported: int, chosen_on: int, calibration: int, device: str
    ) -> None:
        self.reported: list[Batch] = []
        self.chosen_on: list[Batch] = []
        tables = {text: self._rows(folder, text, length, device) for text in dict(map(reversed, SEGMENTS))}
        used = dict.fromkeys(tables, 0)
        for part, batches in ((self.reported, reported), (self.chosen_on, chosen_on)):
            for segment, text in SEGMENTS:
                for number in range(batches):
                    rows = tables[text][used[text] : used[text] + batch]
                    used[text] += batch
                    part.append(Batch(segment, number, rows))
        learned = {text: used[text] + (calibration if text in TRAINED_ON else 0) for text in tables}
        for text, needed in learned.items():
            if needed > len(tables[text]):
                raise SystemExit(f"{text} has {len(tables[text])} rows of {length} tokens; {needed} are needed")
        self.calibration = torch.cat([tables[text][used[text] : learned[text]] for text in TRAINED_ON])
        self.sizes = {text: len(table) for text, table in tables.items()}

    @staticmethod
    def _rows(folder: Path, text: str, length: int, device: str) -> Tensor:
        found = [path for name in (f"valid_{text}.npy", f"{text}.npy") if (path := folder / name).is_file()]
        if not found:
            raise SystemExit(f"{folder} holds neither valid_{text}.npy nor {text}.npy")
        ids = np.load(found[0], mmap_mode="r")
        count = len(ids) // length
        return torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length).to(device)


def in_order(batches: list[Batch], order: str) -> list[Batch]:
    """Return the batches segment after segment, or one of each segment in turn."""
    return batches if order == "segments" else sorted(batches, key=lambda part: part.number)


@dataclass(frozen=True)
class Reading:
    """What a reader says of a batch: nats per sequence (B,) before learning, and what came of learning."""

    nll: Tensor
    learned: bool
    verdict: str
    reason: str | None = None
    facts: dict[str, float | None] | None = None
    worked: bool = False


class Reader(Protocol):
    """Reads a stream batch by batch."""

    def read(self, rows: Tensor, *, learn: bool) -> Reading:
        """Score int64 (B, S), then learn from it if ``learn``."""
        ...


@torch.no_grad()
def scored(model: nn.Module, rows: Tensor) -> Tensor:
    """Return float32 (B,), nats per sequence, without learning."""
    return sequence_nll(model(rows, use_cache=False).logits, rows)


class Frozen:
    """Scores, and learns nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def read(self, rows: Tensor, *, learn: bool) -> Reading:
        """Score int64 (B, S)."""
        return Reading(scored(self.model, rows), False, "frozen")


class Adapted:
    """The routers learn, with the safeguards of `RouterAdapter`.

    Args:
        model: what is adapted.
        adapter: open on it.
        served_j: joules of decoding a batch, for the bucket; ``None``: the batch is scored, and earns what that costs.
    """

    def __init__(self, model: nn.Module, adapter: RouterAdapter, served_j: float | None) -> None:
        self.model, self.adapter, self.served_j = model, adapter, served_j
        adapter.bucket.earns_scoring = served_j is None

    def read(self, rows: Tensor, *, learn: bool) -> Reading:
        """Score int64 (B, S), then learn from it if ``learn``."""
        if learn:
            step = self.adapter.score_and_learn(rows)
        else:
            with self.adapter.frozen():
                step = self.adapter.score_and_learn(rows)
        if self.served_j is not None:
            self.adapter.bucket.earn(self.served_j)
        facts = {
            "learning_j_modelled": step.learning_j,
            "change_norm": step.change_norm,
            "judged_nats": None if step.judged is None else step.judged.mean,
            "judged_se": None if step.judged is None else step.judged.se,
            "kl_max": max(step.kl.values()) if step.kl else None,
            "shadow_nats": None if step.shadow is None else step.shadow.mean,
            "lr": self.adapter.lr,
            "interval": self.adapter.metrics["interval"],
        }
        verdict = step.verdict if learn else "not its turn"
        return Reading(step.sequence_nll, step.learned, verdict, step.reason, facts, step.learning_j > 0)


def adapter_of(model: nn.Module, options: dict[str, Any], gpu: str | None) -> RouterAdapter:
    """Open an adapter; an option that is a safeguard's goes there, and one that is known nowhere is an error."""
    own = set(inspect.signature(RouterAdapter).parameters) - {"model", "safeguards", "cost_model"}
    guarded = {field.name for field in fields(Safeguards)} - own
    if unknown := sorted(set(options) - own - guarded):
        raise SystemExit(f"no option {', '.join(unknown)}; there are {', '.join(sorted(own | guarded))}")
    given = {name: value for name, value in options.items() if name in own}
    guards = Safeguards(**{name: value for name, value in options.items() if name in guarded})
    return RouterAdapter(model, safeguards=guards, cost_model=CostModel.prior(gpu), **given)


class AllWeights:
    """Dynamic evaluation: every weight learns."""

    def __init__(self, model: nn.Module, rival: DynamicEvaluation) -> None:
        self.model, self.rival = model, rival

    def read(self, rows: Tensor, *, learn: bool) -> Reading:
        """Score int64 (B, S), then learn from it if ``learn``."""
        if not learn:
            return Reading(scored(self.model, rows), False, "not its turn")
        return Reading(self.rival.score_and_learn(rows), True, "learned", worked=True)


@contextlib.contextmanager
def reader_of(
    model: nn.Module,
    learner: str,
    options: dict[str, Any],
    all_weights: dict[str, float],
    *,
    gpu: str | None = None,
    served_j: float | None = None,
) -> Iterator[Reader]:
    """Yield the reader of this name; the model is as it was when the context closes."""
    if learner == "frozen":
        yield Frozen(model)
    elif learner == "adapted":
        with adapter_of(model, options, gpu) as adapter:
            yield Adapted(model, adapter, served_j)
    else:
        with DynamicEvaluation(model, **all_weights) as rival:
            yield AllWeights(model, rival)


@contextlib.contextmanager
def chosen_experts(model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that says what the first forward since its last call chose, as if decoded B at a time."""
    with choices_of(model) as take:

        def said() -> dict[str, float]:
            chosen = take()
            return {"distinct_experts": chosen.distinct_experts, "experts_per_token": chosen.experts_per_token}

        yield said
