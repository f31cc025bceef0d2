"""What belongs to one stream of text: counters, held-back rows, the state to go back to. Streams never share it.

A stream has a state for each text that was told apart in it (`text_memory.py`). Fast weights, moments and the
objective's state of the text that is being read are live, in the model; those of the others are parked here as a
`Learned`, which is also what an update is undone to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.learning_bucket import Cadence
from thermoe.adapt.natural_step import DIRECTIONS
from thermoe.adapt.objectives import Objective
from thermoe.adapt.reading import HeldRows, HeldText
from thermoe.adapt.text_memory import BINS, nearest, remember
from thermoe.routers.fast_weights import FastWeights

#: Counters of a stream that are plain integers, in the order of reports.
COUNTERS = ("batches", "updates", "accepted", "rejected", "deferred", "skipped", "resets", "shadows")
#: What a saved state keeps as plain values.
PLAIN = (
    *COUNTERS,
    *(
        "base_batch",
        "waiting_j",
        "waiting_tokens",
        "layers",
        "update_batch",
        "cool_until",
        "judge_at",
        "rejects_in_row",
        "crowded",
    ),
    *("cusum", "shadow_batch", "shadow_nats", "standardised", "last_read"),
)
#: Texts of a stream that are told apart, as many as `MEMORY_FRAC` of the model's bytes hold; then the one of which the
#: fewest batches were read makes room, so that a stray batch does not push out what was learned for long.
LEAST_TEXTS, MOST_TEXTS, MEMORY_FRAC = 2, 8, 0.04
HELD = ("batch", "input_ids", "mask", "counted", "tokens", "evidence", "together")


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """Everything that learning changes, as copies.

    Args:
        fast: by layer name, the state dictionary of its fast weights.
        optimizer: moments and step size.
        objective: the objective's own state.
    """

    fast: dict[str, dict[str, Tensor]]
    optimizer: list[dict[str, Any]]
    objective: dict[str, Any]

    @classmethod
    def of(cls, fast: Mapping[str, FastWeights], optimizer: FastOptimizer, objective: Objective) -> Learned:
        """Copy what is live."""
        return cls(copy_of(fast), optimizer.state_dict(), objective.state_dict())

    def restore(self, fast: Mapping[str, FastWeights], optimizer: FastOptimizer, objective: Objective) -> None:
        """Write it back, in place, bit for bit."""
        write(fast, self.fast)
        optimizer.load_state_dict(self.optimizer)
        objective.load_state_dict(self.objective)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields; the copies are never written to, so they are not copied again."""
        return {"fast": self.fast, "optimizer": self.optimizer, "objective": self.objective}


def copy_of(fast: Mapping[str, FastWeights]) -> dict[str, dict[str, Tensor]]:
    """Return copies of fast weights and their buffers."""
    return {
        name: {key: value.detach().clone() for key, value in module.state_dict().items()}
        for name, module in fast.items()
    }


@torch.no_grad()
def write(fast: Mapping[str, FastWeights], state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write copies back, in place: a captured graph reads the same tensors."""
    for name, values in state.items():
        live = fast[name].state_dict()
        for key, value in values.items():
            live[key].copy_(value)


@dataclass(slots=True, eq=False)
class StreamState:
    """State of one text of a stream.

    Attributes:
        held: held-back rows.
        cadence: how often it is updated.
        base: the state of before the updates that wait for a verdict; ``None`` when none does.
        base_batch: number of the last batch before these updates.
        waiting_j, waiting_tokens: joules of learning and tokens served since the last verdict.
        parked: what is learned, while another text is read.
        profile: float64 (H,), of its tokens.
        last_read: when it was read last, in batches of the stream.
        last_move: by parameter, how the steps of the last update moved it, before any pull; ``None`` where it was
            undone, or there was none.
        layers: names of the layers that learn; ``None`` before that was chosen.
        chunk: summed gradients of batches that wait for `min_tokens`, their weight, their tokens.
        update_batch: number of the batch of the last update.
        cool_until: no update up to this batch.
        judge_at: held-back tokens at which the next verdict is tried, where the last could not be told.
        rejects_in_row, crowded, cusum: of the safeguards.
        shadow_batch, shadow_nats: batch of the last shadow, and what it found.
        standardised: whether fast weights that standardise the slow logits know their statistics.
    """

    held: HeldText
    cadence: Cadence
    batches: int = 0
    updates: int = 0
    accepted: int = 0
    rejected: int = 0
    deferred: int = 0
    skipped: int = 0
    resets: int = 0
    shadows: int = 0
    base: Learned | None = None
    base_batch: int = 0
    waiting_j: float = 0.0
    waiting_tokens: int = 0
    parked: Learned | None = None
    layers: list[str] | None = None
    chunk: tuple[list[Tensor], float, int] | None = None
    update_batch: int | None = None
    cool_until: int = 0
    judge_at: int = 0
    rejects_in_row: int = 0
    crowded: int = 0
    cusum: float = 0.0
    shadow_batch: int = 0
    shadow_nats: float | None = None
    standardised: bool = False
    profile: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    last_read: int = 0
    last_move: list[Tensor] | None = None

    @property
    def mark(self) -> int:
        """Number of the last batch before the updates that wait for a verdict, or would with this batch."""
        return self.batches - 1 if self.base is None else self.base_batch

    def forget(self) -> None:
        """Forget what depends on what was learned; held-back text and counters stay."""
        self.base = self.chunk = self.parked = self.last_move = None
        self.waiting_j, self.waiting_tokens = 0.0, 0
        self.rejects_in_row = self.crowded = self.judge_at = 0
        self.cusum, self.standardised = 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """Return copies; `from_state` goes on from them bit for bit."""
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "cadence": self.cadence.state_dict(),
            "profile": self.profile.clone(),
            "last_move": None if self.last_move is None else [move.clone() for move in self.last_move],
            "first": self.held.first,
            "held": [{key: getattr(rows, key) for key in HELD} for rows in self.held.rows],
            "base": None if self.base is None else self.base.as_dict(),
            "parked": None if self.parked is None else self.parked.as_dict(),
            "chunk": None if self.chunk is None else [[g.clone() for g in self.chunk[0]], *self.chunk[1:]],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], held: HeldText, min_gain_per_j: float | None) -> StreamState:
        """Build what `state_dict` returned."""
        made = cls(held, Cadence.from_state(state["cadence"], min_gain_per_j))
        for name in PLAIN:
            setattr(made, name, state[name])
        made.profile = state["profile"].clone()
        made.last_move = None if state["last_move"] is None else [move.clone() for move in state["last_move"]]
        held.first = state["first"]
        held.rows.extend(HeldRows(**rows) for rows in state["held"])
        made.base, made.parked = (None if state[k] is None else Learned(**state[k]) for k in ("base", "parked"))
        if state["chunk"] is not None:
            gradients, weight, tokens = state["chunk"]
            made.chunk = ([g.clone() for g in gradients], weight, tokens)
        return made


@dataclass(slots=True, eq=False)
class Stream:
    """The texts of one stream.

    Attributes:
        texts: their states.
        at: which of them is read now.
        reads: batches that were read.
        gone: counters of texts that made room for others.
    """

    texts: list[StreamState]
    at: int = 0
    reads: int = 0
    gone: Counter[str] = field(default_factory=Counter)

    @property
    def state(self) -> StreamState:
        """State of the text that is read now."""
        return self.texts[self.at]

    def count(self, name: str) -> int:
        """Return a counter over all texts."""
        return sum(getattr(text, name) for text in self.texts) + self.gone[name]

    def place_of(self, counts: Tensor) -> int | None:
        """Return which text a batch with this profile continues, or ``None`` where it is a new one."""
        known = [text.profile for text in self.texts]
        if not any(bool(one.any()) for one in known):
            return self.at  # nothing was read yet
        return nearest(counts, known)

    def make_room(self, fresh: StreamState, most: int) -> int:
        """Put the state of a new text in, of at most ``most``, and return its place."""
        if len(self.texts) < most:
            self.texts.append(fresh)
            return len(self.texts) - 1
        others = [(text.batches, text.last_read, place) for place, text in enumerate(self.texts) if place != self.at]
        place = min(others)[-1]
        self.gone.update({name: getattr(self.texts[place], name) for name in COUNTERS})
        self.texts[place] = fresh
        return place

    def note(self, counts: Tensor) -> None:
        """Note that a batch of the present text was read."""
        self.reads += 1
        self.state.profile, self.state.last_read = remember(self.state.profile, counts), self.reads

    def state_dict(self) -> dict[str, Any]:
        """Return copies."""
        texts = [text.state_dict() for text in self.texts]
        return {"at": self.at, "reads": self.reads, "gone": dict(self.gone), "texts": texts}


def most_texts(model: nn.Module, fast: Mapping[str, FastWeights]) -> int:
    """Return how many texts a stream may tell apart: each keeps fast weights, moments, the last move and directions."""
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    own = 0
    for one in fast.values():
        width = 1 if one.matrix is None else one.matrix.shape[1] + 1
        own += 3 * one.num_experts * width + min(DIRECTIONS, width) * width
    return min(MOST_TEXTS, max(LEAST_TEXTS, int(MEMORY_FRAC * whole / (4 * own))))
