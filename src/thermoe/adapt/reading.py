"""One batch as the adapter reads it: checked, split into what is learned from and what is held back, and scored.

Shape letters: B sequences, S positions, T tokens, E experts, O router outputs, H rows held back.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError
from thermoe.evaluation import check_token_ids
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights

#: Weights of a batch add up to less, so that their products with losses and gradients are numbers.
MOST_WEIGHT = 1e20
#: A target that is none.
NOTHING = -100


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Token ids with what is real and what may be learned from.

    Args:
        input_ids: int64 (B, S).
        mask: bool (B, S), true where a token is real; ``None`` when all are.
        real: bool (B, S - 1): predicted tokens that are real and follow a real one.
        weights: float32 (B, S - 1) of at least 0, 0 where a predicted token is not real.
    """

    input_ids: Tensor
    mask: Tensor | None
    real: Tensor
    weights: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, weights: Tensor | None) -> Batch:
        """Check what a caller gave; ``weights`` (B, S) say how much each token counts as a prediction.

        Raises:
            ConfigError: they are no token ids with something to predict, or mask or weights do not fit them.
        """
        check_token_ids(input_ids, where="input_ids")
        # What was made in inference mode cannot be part of a graph; a copy made outside of it can.
        ids = input_ids.clone() if input_ids.is_inference() else input_ids
        ids = ids.long()  # as what is predicted has to be
        mask = None
        if attention_mask is not None:
            fits = isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape
            if not fits or not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
                raise ConfigError(
                    f"the attention mask is {_shown(attention_mask)} for token ids {tuple(ids.shape)}",
                    where="attention_mask",
                    accepted="0 and 1 in the shape of the token ids, or None when every token is real",
                    fix="give tokenizer(text, return_tensors='pt', padding=True).attention_mask",
                )
            mask = None if bool((attention_mask != 0).all()) else attention_mask.to(ids.device).bool().clone()
        real = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] & mask[:, :-1]
        if not bool(real.any()):
            raise ConfigError(
                "the attention mask leaves no token to predict",
                where="attention_mask",
                accepted="at least two real tokens in a row",
                fix="leave rows of padding out",
            )
        omega = real.float()
        if weights is not None:
            fits = isinstance(weights, Tensor) and weights.shape == ids.shape and weights.dtype != torch.bool
            fits = fits and not weights.is_complex()
            if not fits or not bool((weights >= 0).all() & (weights.float().sum() < MOST_WEIGHT)):  # NaN is neither
                raise ConfigError(
                    f"the weights are {_shown(weights)} for token ids {tuple(ids.shape)}",
                    where="weights",
                    accepted="numbers from 0, of a sum below 1e20, in the shape of the token ids; 0 for generated text",
                    fix="leave weights out where all of the text was given",
                )
            omega = omega * weights[:, 1:].to(ids.device, torch.float32)
        return cls(ids, mask, real, omega)

    @property
    def tokens(self) -> int:
        """Real tokens, those that are not predicted included."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())


def _shown(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


# -- what is held back -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class HeldRows:
    """Sequences of one batch that nothing was learned from.

    Args:
        batch: the number of that batch.
        input_ids: int64 (H, S).
        mask: bool (H, S), or ``None``.
        counted: bool (H, S - 1): predicted tokens that judge.
        tokens: how many these are.
        evidence: whether the model read them better than by guessing. Text that it does not (its loss is at least
            that of a uniform guess, as it is for random tokens whatever the model) judges nothing.
        together: sequences of that batch, which were routed together where rows interact.
    """

    batch: int
    input_ids: Tensor
    mask: Tensor | None
    counted: Tensor
    tokens: int
    evidence: bool
    together: int

    @classmethod
    def of(cls, number: int, batch: Batch, counted: Tensor, *, evidence: bool) -> HeldRows:
        """Return the rows of a batch that have a predicted token in ``counted``, bool (B, S - 1)."""
        rows = counted.any(-1).to(batch.input_ids.device)
        mask = None if batch.mask is None else batch.mask[rows]
        ids = batch.input_ids
        return cls(number, ids[rows], mask, counted[rows], int(counted.sum()), evidence, len(ids))

    def to(self, device: torch.device) -> HeldRows:
        """Return the same rows on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, input_ids=self.input_ids.to(device), mask=mask, counted=self.counted.to(device))

    @property
    def rows(self) -> int:
        """Sequences of a forward over these rows."""
        return self.input_ids.shape[0]

    @property
    def forward_tokens(self) -> int:
        """Real tokens of a forward over these rows."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())


def hold_back(batch: Batch, frac: float, seed: str) -> Tensor:
    """Return bool (B, S - 1): predicted tokens that are held back from learning.

    Whole rows, drawn by ``seed``, at least one; of a single row the end, so that what is held back comes after what is
    learned from, as what will be read next does. With ``frac`` 0, or with nothing to share out, none.
    """
    rows = batch.real.shape[0]
    held = torch.zeros_like(batch.real)
    if frac == 0:
        return held
    if rows > 1:
        chosen = random.Random(seed).sample(range(rows), min(rows - 1, max(1, round(frac * rows))))
        held[sorted(chosen)] = True
        return held
    usable = batch.weights[0].gt(0).nonzero().flatten()
    if usable.numel() > 1:
        first = usable[max(1, usable.numel() - max(1, round(frac * usable.numel())))]
        held[0, first:] = True
    return held


class HeldText:
    """The latest held-back rows, so many tokens of them.

    Attributes:
        first: number of the batch at which the text last changed: rows of before are of another text.
    """

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.first = 0
        self.rows: deque[HeldRows] = deque()

    def add(self, rows: HeldRows) -> None:
        """Keep ``rows``, and let go of the oldest while what is left has enough tokens without them."""
        if rows.tokens:
            self.rows.append(rows)
        while self.rows and self.tokens - self.rows[0].tokens >= self.most_tokens:
            self.rows.popleft()

    @property
    def tokens(self) -> int:
        """How many tokens judge."""
        return sum(rows.tokens for rows in self.rows)

    def move_to(self, device: torch.device) -> None:
        """Take all rows to where batches are now: the model may have been moved."""
        if any(rows.input_ids.device != device for rows in self.rows):
            self.rows = deque(rows.to(device) for rows in self.rows)

    def since(self, batch: int) -> list[HeldRows]:
        """Return the rows of batches after the one numbered ``batch``."""
        return [rows for rows in self.rows if rows.batch > batch]

    def before(self, batch: int, tokens: int) -> list[HeldRows]:
        """Return the latest rows that are evidence up to the batch numbered ``batch``, so many tokens, in order."""
        found: list[HeldRows] = []
        for rows in reversed(self.rows):
            if rows.evidence and self.first <= rows.batch <= batch and sum(one.tokens for one in found) < tokens:
                found.insert(0, rows)
        return found


# -- scoring -----------------------------------------------------------------------------------------------------------


def token_nll(model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return float32 (B, S - 1), the nats of each predicted token, and the size of the vocabulary.

    Rows that are padded on the left get the positions that they have without padding.
    """
    told: dict[str, Tensor] = {}
    if mask is not None:
        told["attention_mask"] = mask.long()
        if not bool(mask[:, 0].all()):
            told["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids, **told).logits
    # The last position predicts nothing: to leave it out of the sum is cheaper than to cut it out of the logits.
    targets = F.pad(input_ids[:, 1:], (0, 1), value=NOTHING).to(logits.device)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=NOTHING)
    return nll.view(input_ids.shape)[:, :-1], logits.shape[-1]


def some_rows(batch: Batch, tokens: int, seed: str) -> Tensor:
    """Return bool (B,): rows drawn by ``seed`` until they have so many predicted tokens, at least one that has any."""
    chosen = torch.zeros(batch.real.shape[0], dtype=torch.bool)
    counts, found = batch.real.sum(-1).tolist(), 0
    for row in random.Random(seed).sample(range(len(counts)), len(counts)):
        if found < tokens and counts[row]:
            chosen[row] = True
            found += counts[row]
    return chosen


def rows_interact(routers: Iterable[nn.Module]) -> bool:
    """Whether the routing of a sequence depends on which others are in the batch, outside of generation."""
    return any(
        (getattr(router, "group_by_position", False) and not getattr(router, "batch_invariant", False))
        or getattr(router, "eval_capacity_factor", None) is not None
        or (isinstance(router, Router) and not router.causal)
        for router in routers
    )


@dataclass(slots=True, eq=False)
class RouterInput:
    """What the fast weights of one layer saw in a forward: x float32 (T, D), the slow logits (T, E), both detached."""

    x: Tensor
    slow: Tensor


@contextmanager
def record_inputs(fast: Mapping[str, FastWeights], *, standardise: bool = False) -> Iterator[dict[str, RouterInput]]:
    """Keep references to what fast weights are called with while the context is open; the last call counts.

    Args:
        fast: by layer name.
        standardise: give those of the family "mix" the statistics of what they are about to see, before they use it.
    """
    seen: dict[str, RouterInput] = {}

    def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, FastWeights) and module.family == "mix":
            with torch.no_grad():  # reads nothing, for this is in the middle of a forward
                sd, mean = torch.std_mean(args[1].detach(), 0, correction=0)
                finite = torch.isfinite(mean) & torch.isfinite(sd) & (sd > 0)
                module.mean.copy_(torch.where(finite, mean, 0))
                module.scale.copy_(torch.where(finite, sd, 1))

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = RouterInput(args[0].detach(), args[1].detach())

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in fast.items()]
    if standardise:
        handles += [module.register_forward_pre_hook(measure) for module in fast.values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inside_percentiles(nll: Tensor, weights: Tensor, low: float, high: float) -> Tensor:
    """Return the weights (B, S - 1) with 0 where the loss of a token is outside these percentiles of those that count.

    What is very easy teaches nothing, and what is very hard may be noise (arXiv 2505.20633).
    """
    used = nll[weights > 0].float()
    if not used.numel():
        return weights
    ranked = used.sort().values
    ends = [ranked[round(p / 100 * (used.numel() - 1))] for p in (low, high)]
    return torch.where((nll >= ends[0]) & (nll <= ends[1]), weights, 0)
