"""What learning spends, and which forwards serve nobody: the contract between who learns and who holds a budget.

Who learns keeps a `LearningLedger` and puts each piece of its work there: the backward and the step of an update, the
forward of a judge, of a shadow, of an audit. Forwards made for these alone run inside `serving_nothing`, so that
whoever watches the model counts no tokens for them. The forward that scores text before anything is learned from it is
served work like any other and no part of the ledger, unless the text is read for learning alone.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from thermoe.errors import CheckpointError, ConfigError, UnknownNameError
from thermoe.results import Provenance, weakest_provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock

LearningKind = Literal["update", "judge", "shadow", "audit", "read"]
KINDS: tuple[LearningKind, ...] = get_args(LearningKind)
#: Pieces that wait to be taken; beyond, those of a kind are added together, so that a stream without end stays small.
MOST_PENDING = 1024
_SERVING: ContextVar[bool] = ContextVar("thermoe_serving", default=True)


@contextmanager
def serving_nothing() -> Iterator[None]:
    """Say that forwards inside, in this thread or task, serve no tokens: a judge, a shadow, an audit."""
    token = _SERVING.set(False)
    try:
        yield
    finally:
        _SERVING.reset(token)


def is_serving() -> bool:
    """Return whether a forward made here and now serves the user."""
    return _SERVING.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningWork:
    """One piece of work that learning did.

    Args:
        kind: "update" (backward and step), or a forward of its own: "judge", "shadow", "audit", or "read", of text
            that is read to learn from it and served another time.
        tokens: tokens it went over; none of them is served by it.
        energy_j: modelled joules.
        duration_s: how long it took, from its start until the device had done it.
        t_end_s: when it had, on the clock of the ledger.
        provenance: of ``energy_j``, the cost model's: "estimated", or "simulated".

    Raises:
        ConfigError: a number is negative or not finite, or the kind is unknown.
    """

    kind: LearningKind
    tokens: int
    energy_j: float
    duration_s: float
    t_end_s: float
    provenance: Provenance = "estimated"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError.of("kind of learning work", str(self.kind), KINDS, where="LearningWork.kind")
        for name in ("tokens", "energy_j", "duration_s", "t_end_s"):
            value = getattr(self, name)
            sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not sound or (value < 0 and name != "t_end_s"):
                raise ConfigError(
                    f"{name} is {value!r}",
                    where=f"LearningWork.{name}",
                    accepted="a finite number" + ("" if name == "t_end_s" else " of at least 0"),
                    fix="give what the cost model and the clock say",
                )


class LearningLedger:
    """Adds up what learning spends; may be written and read by different threads.

    Args:
        clock: what ``t_end_s`` and ``duration_s`` are taken from; a session puts its meter's clock here.

    Attributes:
        clock: the same; read it anew for each piece of work.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._pending: list[LearningWork] = []
        self._counts: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._tokens = 0
        self._energy_j = self._duration_s = 0.0
        self._provenance: Provenance | None = None

    def append(self, work: LearningWork) -> None:
        """Note a piece of work that is done."""
        with self._lock:
            self._pending.append(work)
            if len(self._pending) > MOST_PENDING:
                self._pending = _added_by_kind(self._pending)
            self._counts[work.kind] += 1
            self._tokens += work.tokens
            self._energy_j += work.energy_j
            self._duration_s += work.duration_s
            self._provenance = weakest_provenance([work.provenance, self._provenance or work.provenance])

    def note_verdict(self, verdict: str) -> None:
        """Count what became of an update, such as "accepted" or "rejected"."""
        with self._lock:
            self._verdicts[verdict] += 1

    def take(self) -> list[LearningWork]:
        """Return the work since the last call, in order, and forget it; the totals stay."""
        with self._lock:
            taken, self._pending = self._pending, []
        return taken

    @property
    def energy_j(self) -> float:
        """Modelled joules of everything noted."""
        return self._energy_j

    @property
    def duration_s(self) -> float:
        """Seconds of everything noted."""
        return self._duration_s

    @property
    def tokens(self) -> int:
        """Tokens that learning went over, once for each piece of work."""
        return self._tokens

    @property
    def counts(self) -> dict[LearningKind, int]:
        """How many pieces of each kind."""
        return {kind: self._counts[kind] for kind in KINDS}

    @property
    def verdicts(self) -> dict[str, int]:
        """How many updates came to each verdict."""
        return dict(self._verdicts)

    @property
    def provenance(self) -> Provenance | None:
        """Weakest label of any piece; ``None`` before the first."""
        return self._provenance

    def state_dict(self) -> dict[str, Any]:
        """Return the totals as plain values; work that waits to be taken is of this process alone."""
        return {
            "counts": dict(self._counts),
            "verdicts": dict(self._verdicts),
            "tokens": self._tokens,
            "energy_j": self._energy_j,
            "duration_s": self._duration_s,
            "provenance": self._provenance,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up totals.

        Raises:
            CheckpointError: they are incomplete; nothing is changed then.
        """
        try:
            counts, verdicts = Counter(dict(state["counts"])), Counter(dict(state["verdicts"]))
            tokens, energy_j, duration_s = (
                int(state["tokens"]),
                float(state["energy_j"]),
                float(state["duration_s"]),
            )
            provenance = state["provenance"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the totals of learning cannot be taken up: {type(error).__name__}: {error}",
                where="LearningLedger.load_state_dict",
                accepted="what state_dict returned",
                fix="start afresh, without the state",
            ) from error
        with self._lock:
            self._counts, self._verdicts, self._provenance = counts, verdicts, provenance
            self._tokens, self._energy_j, self._duration_s = tokens, energy_j, duration_s


def _added_by_kind(works: list[LearningWork]) -> list[LearningWork]:
    """Return one piece of work for each kind, with the sums, at the end of the last."""
    merged: dict[LearningKind, LearningWork] = {}
    for work in works:
        before = merged.get(work.kind)
        if before is None:
            merged[work.kind] = work
            continue
        merged[work.kind] = replace(
            work,
            tokens=before.tokens + work.tokens,
            energy_j=before.energy_j + work.energy_j,
            duration_s=before.duration_s + work.duration_s,
            provenance=weakest_provenance([before.provenance, work.provenance]) or work.provenance,
        )
    return sorted(merged.values(), key=lambda work: work.t_end_s)
