"""What belongs to one stream of text: counters, held-back rows, the state to go back to. Streams never share it.

Fast weights, moments and the objective's state of the stream that is being read are live, in the model; those of the
others are parked here as a `Learned`, which is also what an update is undone to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.learning_bucket import Cadence
from thermoe.adapt.objectives import Objective
from thermoe.adapt.reading import HeldRows, HeldText
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
    *("cusum", "shadow_batch", "shadow_nats", "standardised"),
)
HELD = ("batch", "input_ids", "mask", "counted", "tokens", "evidence")


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
    """State of one stream.

    Attributes:
        held: held-back rows.
        cadence: how often it is updated.
        base: the state of before the updates that wait for a verdict; ``None`` when none does.
        base_batch: number of the last batch before these updates.
        waiting_j, waiting_tokens: joules of learning and tokens served since the last verdict.
        parked: what is learned, while another stream is read.
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

    @property
    def mark(self) -> int:
        """Number of the last batch before the updates that wait for a verdict, or would with this batch."""
        return self.batches - 1 if self.base is None else self.base_batch

    def forget(self) -> None:
        """Forget what depends on what was learned; held-back text and counters stay."""
        self.base, self.chunk, self.parked = None, None, None
        self.waiting_j, self.waiting_tokens = 0.0, 0
        self.rejects_in_row = self.crowded = self.judge_at = 0
        self.cusum, self.standardised = 0.0, False

    def state_dict(self) -> dict[str, Any]:
        """Return copies; `from_state` goes on from them bit for bit."""
        return {
            **{name: getattr(self, name) for name in PLAIN},
            "cadence": self.cadence.state_dict(),
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
        held.first = state["first"]
        held.rows.extend(HeldRows(**rows) for rows in state["held"])
        made.base, made.parked = (None if state[k] is None else Learned(**state[k]) for k in ("base", "parked"))
        if state["chunk"] is not None:
            gradients, weight, tokens = state["chunk"]
            made.chunk = ([g.clone() for g in gradients], weight, tokens)
        return made
