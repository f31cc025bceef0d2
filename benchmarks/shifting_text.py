"""A stream of text whose domain changes, and three ways of reading it: frozen, routers learning, all weights learning.

Every reader scores a batch before it learns from it, so that no loss is that of text already seen. The same batches
come in two orders: segment after segment (novels, Python, Shakespeare, other novels), and interleaved one by one, which
is the worst case for whoever learns. A frozen model scores a batch alike in both, so it is run once.

Shape letters: B sequences, S positions, L layers, T tokens.
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

from thermoe.adapt import test_time
from thermoe.adapt.test_time import RouterAdapter
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import collect_routing, routed_modules

#: What each segment of the stream is read from; both segments of novels are of other pages.
SEGMENTS = (("novels-1", "novels"), ("python", "python"), ("shakespeare", "shakespeare"), ("novels-2", "novels"))
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
        folder: holds valid_novels.npy, valid_python.npy and shakespeare.npy (or valid_shakespeare.npy).
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
        learned = {text: used[text] + (0 if text == "shakespeare" else calibration) for text in tables}
        for text, needed in learned.items():
            if needed > len(tables[text]):
                raise SystemExit(f"{text} has {len(tables[text])} rows of {length} tokens; {needed} are needed")
        self.calibration = torch.cat([tables[text][used[text] : learned[text]] for text in ("novels", "python")])
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
    facts: dict[str, float] | None = None


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
    """The routers learn, with the safeguards of `RouterAdapter`."""

    def __init__(self, model: nn.Module, adapter: RouterAdapter) -> None:
        self.model, self.adapter = model, adapter

    def read(self, rows: Tensor, *, learn: bool) -> Reading:
        """Score int64 (B, S), then learn from it if ``learn``."""
        if not learn:
            return Reading(scored(self.model, rows), False, "not its turn")
        step = self.adapter.score_and_learn(rows)
        verdict = getattr(step, "verdict", None) or ("learned" if step.learned else "skipped")
        known = {field.name: getattr(step, field.name) for field in fields(step)}
        facts = {name: float(v) for name, v in known.items() if isinstance(v, (int, float)) and name != "learned"}
        return Reading(step.sequence_nll, step.learned, str(verdict), step.reason, facts)


def adapter_of(model: nn.Module, options: dict[str, Any]) -> RouterAdapter:
    """Open an adapter; an option that is a safeguard's goes there, and one that is known nowhere is an error."""
    own = set(inspect.signature(RouterAdapter).parameters) - {"model"}
    safeguards = getattr(test_time, "Safeguards", None)
    guarded = {field.name for field in fields(safeguards)} - own if safeguards is not None else set()
    if unknown := sorted(set(options) - own - guarded):
        raise SystemExit(f"no option {', '.join(unknown)}; there are {', '.join(sorted(own | guarded))}")
    given = {name: value for name, value in options.items() if name in own}
    if kept := {name: value for name, value in options.items() if name in guarded}:
        given["safeguards"] = safeguards(**kept)
    return RouterAdapter(model, **given)


class AllWeights:
    """Dynamic evaluation: AdamW on every weight after each batch, with float32 masters of weights in half precision.

    Args:
        model: left as it was by `close`.
        lr: step size.
        anchor: factor on the distance from the trained weights after each step.
    """

    def __init__(self, model: nn.Module, *, lr: float, anchor: float = 1.0) -> None:
        self.model, self.anchor = model, anchor
        self.weights = list(model.parameters())
        self._asked = [weight.requires_grad for weight in self.weights]
        self.trained = [weight.detach().clone() for weight in self.weights]
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        for weight in self.weights:
            weight.requires_grad_(True)
        self.adamw = torch.optim.AdamW(self.masters, lr=lr, weight_decay=0.0, fused=self.weights[0].is_cuda)

    def read(self, rows: Tensor, *, learn: bool) -> Reading:
        """Score int64 (B, S), then learn from it if ``learn``."""
        if not learn:
            return Reading(scored(self.model, rows), False, "not its turn")
        with torch.enable_grad():
            nll = sequence_nll(self.model(rows, use_cache=False).logits, rows)
            gradients = torch.autograd.grad(nll.mean() / (rows.shape[1] - 1), self.weights, materialize_grads=True)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            for weight, master, trained in zip(self.weights, self.masters, self.trained, strict=True):
                if self.anchor < 1:
                    master.lerp_(trained.float(), 1 - self.anchor)
                weight.copy_(master)
        return Reading(nll.detach(), True, "learned")

    @torch.no_grad()
    def close(self) -> None:
        """Put the trained weights back."""
        for weight, trained, asked in zip(self.weights, self.trained, self._asked, strict=True):
            weight.copy_(trained)
            weight.requires_grad_(asked)


@contextlib.contextmanager
def reader_of(
    model: nn.Module, learner: str, options: dict[str, Any], all_weights: dict[str, float]
) -> Iterator[Reader]:
    """Yield the reader of this name; the model is as it was when the context closes."""
    if learner == "frozen":
        yield Frozen(model)
    elif learner == "adapted":
        with adapter_of(model, options) as adapter:
            yield Adapted(model, adapter)
    else:
        rival = AllWeights(model, **all_weights)
        try:
            yield rival
        finally:
            rival.close()


@contextlib.contextmanager
def chosen_experts(model: nn.Module) -> Iterator[Callable[[], dict[str, float]]]:
    """Count what the first forward since the last call of the yielded function chose, as if decoded B at a time.

    The first forward of a batch is the one that scores it; judges and the like come after it.
    """
    kept: dict[str, Tensor] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if kept:
            return
        batch = args[0].shape[0]
        opened, pairs = [], []
        for decision in collect_routing(module).values():
            index = decision.expert_index.view(batch, -1, decision.expert_index.shape[-1]).transpose(0, 1).flatten(1)
            seen = torch.zeros(index.shape[0], decision.num_experts + 1, device=index.device)
            opened.append(seen.scatter_(1, index, 1.0)[:, :-1].sum(-1).mean())
            pairs.append(decision.active.float().sum(-1).mean())
        kept.update(distinct_experts=torch.stack(opened).mean(), experts_per_token=torch.stack(pairs).mean())

    handle = model.register_forward_hook(hook)

    def take() -> dict[str, float]:
        found = {name: float(value) for name, value in kept.items()}
        kept.clear()
        return found

    try:
        yield take
    finally:
        handle.remove()


@contextlib.contextmanager
def without_fast_weights(model: nn.Module) -> Iterator[None]:
    """Let the trained routers decide alone while the context is open."""
    kept = [(module.router, module.router.fast) for _, module in routed_modules(model)]
    for router, _ in kept:
        router.fast = None
    try:
        yield
    finally:
        for router, fast in kept:
            router.fast = fast


@torch.no_grad()
def agreement(model: nn.Module, rows: Tensor) -> dict[str, Any]:
    """Compare the decisions of trained and adapted routers on the same text, and whether changed ones were good.

    Each model goes its own way from the first layer on, as it does when it serves; so a difference in layer l comes
    from its own router and from what the layers before it did.

    Returns:
        By layer: Jaccard of the chosen sets, KL(slow, fast) in nats, share of tokens whose first choice flipped, and
        the change of loss on the tokens that flipped there and on the others (adapted minus trained, nats; ``None``
        without such tokens).
    """
    with without_fast_weights(model):
        slow_nll, slow = _token_nll(model, rows), list(collect_routing(model).values())
    fast_nll, fast = _token_nll(model, rows), list(collect_routing(model).values())
    change = (fast_nll - slow_nll).flatten()
    predicting = torch.ones_like(rows, dtype=torch.bool)
    predicting[:, -1] = False
    predicting = predicting.flatten()
    found: dict[str, list[float | None]] = {
        name: [] for name in ("jaccard", "kl", "flip_rate", "dnll_flipped", "dnll_same")
    }
    for before, after in zip(slow, fast, strict=True):
        sets = [_members(decision.expert_index, decision.logits.shape[-1]) for decision in (before, after)]
        union = (sets[0] | sets[1]).sum(-1)
        jaccard = torch.where(union > 0, (sets[0] & sets[1]).sum(-1) / union.clamp(min=1), 1.0)
        flipped = before.logits.argmax(-1) != after.logits.argmax(-1)
        p, q = before.logits.log_softmax(-1), after.logits.log_softmax(-1)
        found["jaccard"].append(float(jaccard.mean()))
        found["kl"].append(float((p.exp() * (p - q)).sum(-1).mean()))
        found["flip_rate"].append(float(flipped.float().mean()))
        for name, chosen in (("dnll_flipped", flipped[predicting]), ("dnll_same", ~flipped[predicting])):
            found[name].append(float(change[chosen].mean()) if bool(chosen.any()) else None)
    return {**found, "dnll": float(change.mean())}


def _token_nll(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(rows, use_cache=False).logits[:, :-1].float()
    return logits.logsumexp(-1) - logits.gather(-1, rows[:, 1:].unsqueeze(-1)).squeeze(-1)


def _members(index: Tensor, outputs: int) -> Tensor:
    return torch.zeros(index.shape[0], outputs + 1, dtype=torch.bool, device=index.device).scatter_(1, index, True)[
        :, :-1
    ]
