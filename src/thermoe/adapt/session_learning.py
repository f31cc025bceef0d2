"""Learning inside a session: whose adapter it is, what its ledger says, and what was read to learn from it alone."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from thermoe.adapt.instrument import Instrument
from thermoe.adapt.learning_tally import LearningTally
from thermoe.adapt.learning_work import LearningWork
from thermoe.adapt.test_time import AdaptStep, RouterAdapter
from thermoe.energy.cost_model import CostModel
from thermoe.energy.read_cost import ReadCost
from thermoe.errors import ConfigError, RoutingError
from thermoe.results import Provenance
from thermoe.telemetry.clock import Clock

Learn = bool | Mapping[str, Any] | RouterAdapter | None


def check_learn(learn: Any, model: nn.Module) -> None:
    """Look at what a session is told of learning.

    Raises:
        ConfigError: it is neither a switch, options of `RouterAdapter`, nor an adapter of ``model``.
    """
    accepted = "None, True, a mapping of options of RouterAdapter, or a RouterAdapter of this model"
    if isinstance(learn, RouterAdapter):
        if learn.model is not model:
            raise ConfigError(
                "the adapter is of another model",
                where="AdaptiveSession(learn=...)",
                accepted=accepted,
                fix="open a RouterAdapter on the model of the session, or write learn=True",
            )
    elif isinstance(learn, Mapping):
        known = [name for name in inspect.signature(RouterAdapter).parameters if name != "model"]
        for name in learn:
            if name not in known:
                raise ConfigError(
                    f"unknown option {name!r}",
                    where="AdaptiveSession(learn=...)",
                    accepted=", ".join(known),
                    fix="leave it out",
                )
    elif learn is not None and not isinstance(learn, bool):
        raise ConfigError(f"learn is {learn!r}", where="AdaptiveSession(learn=...)", accepted=accepted, fix="use True")


class SessionLearning:
    """An adapter while it is in a session: its work is timed by the session's clock and paid from what is served.

    Args:
        learn: as a session is told; not ``None`` or false.
        model: with the routers of the session in place.
        cost_model: the joules of work.
        read_cost: what a byte of expert weights costs more or less than usual; an adapter of the user's knows its own.
        clock: of the session.
        saved: the state to go on from, or ``None``.
        stack: closes an adapter that was opened here; gives one of the user's back as it was, open.

    Raises:
        RoutingError: the adapter is closed, or the model is being adapted by another.
        ConfigError: an option of the adapter is outside its range.
        CheckpointError: ``saved`` does not fit the adapter.
    """

    def __init__(
        self,
        learn: Learn,
        model: nn.Module,
        cost_model: CostModel,
        read_cost: ReadCost,
        clock: Clock,
        saved: Mapping[str, Any] | None,
        stack: ExitStack,
    ) -> None:
        if isinstance(learn, RouterAdapter):
            if not learn.parameters():
                raise RoutingError(
                    "the adapter is closed",
                    where="AdaptiveSession(learn=...)",
                    accepted="an adapter inside its with block",
                    fix="open the adapter before the session, or write learn=True",
                )
            self.adapter = learn
        else:
            options = dict(learn) if isinstance(learn, Mapping) else {}
            options = {"cost_model": cost_model, "read_cost": read_cost, **options}
            self.adapter = stack.enter_context(RouterAdapter(model, **options))
        self._provenance: Provenance = cost_model.provenance
        if saved is not None:
            self.adapter.load_state_dict(saved)
        ledger, bucket = self.adapter.ledger, self.adapter.bucket
        stack.callback(setattr, ledger, "clock", ledger.clock)
        stack.callback(setattr, bucket, "earns_scoring", bucket.earns_scoring)
        ledger.clock, bucket.earns_scoring = clock, False
        ledger.take()  # what was learned before the session is not its own
        self._counts, self._verdicts = _count(ledger.counts), _count(ledger.verdicts)

    def take(self, tally: LearningTally) -> list[LearningWork]:
        """Return the work since the last call, and add it to ``tally``."""
        ledger = self.adapter.ledger
        works, counts, verdicts = ledger.take(), _count(ledger.counts), _count(ledger.verdicts)
        tally.add(works, counts - self._counts, verdicts - self._verdicts)
        self._counts, self._verdicts = counts, verdicts
        return works

    def load(self, learned: Mapping[str, Any]) -> None:
        """Go on from a state of the adapter; what its ledger counted before is not the session's own."""
        self.adapter.load_state_dict(learned)
        ledger = self.adapter.ledger
        self._counts, self._verdicts = _count(ledger.counts), _count(ledger.verdicts)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state of the adapter; ``None`` where somebody closed it."""
        return self.adapter.state_dict() if self.adapter.parameters() else None

    def earn(self, served_j: float) -> None:
        """Tell the adapter what was served, a share of which may go into learning."""
        self.adapter.bucket.earn(served_j)

    def read(
        self,
        instrument: Instrument,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        weights: Tensor | None,
        served: bool,
    ) -> AdaptStep:
        """Score a batch and learn from it; see `AdaptiveSession.read`."""
        if served:
            return self.adapter.score_and_learn(input_ids, attention_mask, weights)
        ledger = self.adapter.ledger
        began_s, learned_before_s = ledger.clock.now_s(), ledger.duration_s
        with instrument.aside() as log:
            try:
                return self.adapter.score_and_learn(input_ids, attention_mask, weights)
            finally:
                counts = log.take()
                ended_s = ledger.clock.now_s()
                # What is left of the time when the pieces are taken off that the adapter noted itself.
                took_s = ended_s - began_s - (ledger.duration_s - learned_before_s)
                if counts:
                    self.adapter.bucket.spend(sum(count.energy_j for count in counts))
                    ledger.append(
                        LearningWork(
                            kind="read",
                            tokens=sum(count.tokens for count in counts),
                            energy_j=sum(count.energy_j for count in counts),
                            duration_s=max(0.0, took_s),
                            t_end_s=began_s + max(0.0, took_s),
                            provenance=self._provenance,
                        )
                    )


def _count(known: Mapping[Any, int]) -> Counter[str]:
    return Counter(dict(known))
