"""Test-time training of the routers: each batch is scored, then the fast weights take one step on what was read.

The order is prequential, score before learning, so that the reported loss is never that of text already learned from.
Only fast weights (`routers/fast_weights.py`) move: no other parameter gets a gradient or an optimiser state. What is
learned from is an objective (`objectives.py`); what keeps it from doing harm are the safeguards (`safeguards.py`),
all on by default; what it may cost is a share of the joules served (`learning_bucket.py`).

    with RouterAdapter(model) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in batches]
    print(adapter.report())

Shape letters: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.adapt import adapter_settings as checked
from thermoe.adapt import local_objective  # noqa: F401  (registers the objective "local")
from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.fast_places import FastPlaces
from thermoe.adapt.forwards import Forwards
from thermoe.adapt.judging import without_fast
from thermoe.adapt.learner import Learner, ReadSettings
from thermoe.adapt.learning_bucket import LearningBucket
from thermoe.adapt.learning_costs import LearningAccount, LearningCosts
from thermoe.adapt.learning_report import AdaptStep, step_metrics, text_report
from thermoe.adapt.learning_work import LearningLedger
from thermoe.adapt.objectives import OBJECTIVES
from thermoe.adapt.reading import Batch
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.update import Live
from thermoe.energy.cost_model import CostModel
from thermoe.energy.read_cost import ReadCost
from thermoe.errors import CheckpointError, ConfigError, RoutingError
from thermoe.evaluation import check_vocabulary
from thermoe.models.classes import MoEModelMixin

__all__ = ["AdaptStep", "RouterAdapter"]
STATE_VERSION = 3


class RouterAdapter:
    """Adapts the routers of a model to the text it reads; a context manager that leaves the model as it was.

    Args:
        model: a causal language model with MoE layers.
        lr: longest step size; steps are shorter where the next batch says that one went too far, down to a sixteenth.
        anchor: the field of the safeguards of that name, for short.
        max_grad_norm: gradients are scaled down to this norm.
        family: of the fast weights: "full", "bias", "mix" or "low_rank"; see `routers/fast_weights.py`.
        rank: of the family "low_rank".
        objective: a registered name: "next_token" (`objectives.py`), for every model; "local" (`local_teacher.py`), for
            models whose experts partition one network, with the family "mix" or "bias".
        optimizer: "natural" (`natural_step.py`), "adamw", or "muon" for the matrices.
        steps: of the optimiser per batch, each on a part of its sequences (`learning_parts.py`); 1 where gradients are
            collected, and for objectives that take none.
        learn_on: the choice of experts that steps learn on: "served", what the whole batch was given; "unsteered", each
            token's own top-k, whatever price or capacity; or "both" in turn.
        by_text: keep fast weights of its own for each text, told apart by its tokens before it is scored
            (`text_memory.py`); a text that comes back finds what was learned of it.
        layers: "all"; "top_half", the layers whose routers are the most confident on the first batch; or positions or
            names of layers.
        percentiles: learn from tokens whose loss lies between these percentiles of their batch.
        min_tokens: collect batches until so many tokens are behind an update; 0 is an update at every batch.
        held_frac: share of the rows of a batch that nothing is learned from, at least one row; of a single row, its
            end. They are what the safeguards judge by; 0 leaves these without eyes.
        safeguards: which are on; all by default.
        bucket: share of the joules served that learning may cost, ``None`` for no cap. The first update may come at
            once. Joules are the cost model's; those of work that the adapter does not see, such as generation, are
            told to `bucket.earn`.
        min_gain_per_j: nats that a joule of learning has to gain, else updates become rarer; see `Cadence`.
        cost_model: joules of work; the prior by default.
        read_cost: what a byte of expert weights costs more or less than usual; see `ModelWork.of`.
        graphs: record forwards of learning in CUDA graphs where that is possible (`forwards.py`); ``metrics`` says how
            many there are, and why not.
        seed: of what is held back; the same seed and stream give the same bits.

    Attributes:
        updates, resets: of the present stream.
        ledger: joules of learning; always counted, whatever the bucket.
        bucket: what learning may cost.
        metrics: plain numbers and words, of the present stream and the last batch.

    Raises:
        RoutingError: the model has no MoE layer, is being adapted already, or does not fit the objective.
        ConfigError: a setting is outside its range, or the model's work cannot be counted.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        anchor: float | None = None,
        max_grad_norm: float = 1.0,
        family: str = "full",
        rank: int = 8,
        objective: str = "next_token",
        optimizer: str = "natural",
        steps: int = 16,
        learn_on: str = "both",
        by_text: bool = True,
        layers: str | Sequence[int | str] = "all",
        percentiles: tuple[float, float] | None = None,
        min_tokens: int = 0,
        held_frac: float = 0.125,
        safeguards: Safeguards | None = None,
        bucket: float | None = 0.05,
        min_gain_per_j: float | None = None,
        cost_model: CostModel | None = None,
        read_cost: ReadCost | None = None,
        graphs: bool = True,
        seed: int = 0,
    ) -> None:
        checked.check_settings(
            lr=lr, anchor=anchor, max_grad_norm=max_grad_norm, min_tokens=min_tokens, held_frac=held_frac
        )
        checked.check_settings(steps=steps, min_gain_per_j=min_gain_per_j, seed=seed)
        checked.check_reading(by_text, learn_on, percentiles)
        checked.check_flag("graphs", graphs)
        self.model, self.safeguards = model, checked.guards_of(safeguards, anchor)
        cost = checked.cost_model_of(cost_model)
        self.bucket, self.ledger = LearningBucket(bucket), LearningLedger()
        self.family, self.objective = family, objective
        make = OBJECTIVES.get(objective, where="adapt.objective")
        settings = ReadSettings(
            lr=lr, layers=layers, percentiles=percentiles, held_frac=held_frac, min_gain_per_j=min_gain_per_j,
            steps=steps, learn_on=learn_on, by_text=by_text, seed=seed,
        )  # fmt: skip
        self._mode: str | None = None
        self._last: AdaptStep | None = None
        with torch.inference_mode(False):
            self._places = FastPlaces(model, family, rank)
            try:
                checked.chosen_layers(layers, self._places.fast)
                costs = LearningCosts(model, cost, read_cost=read_cost)
                learns_from = make(model, seed=seed)
                live = Live(
                    model,
                    self._places.fast,
                    FastOptimizer(self._places.fast, optimizer, lr),
                    learns_from,
                    LearningAccount(costs, self.ledger, self.bucket),
                    Forwards(model, self._places.fast, learns_from, costs, record=graphs),
                    self.safeguards,
                    lr,
                    max_grad_norm,
                    min_tokens,
                )
                self._learner = Learner(live, settings)
                # What was loaded with the model has the statistics that it was learned with.
                self._learner.state.standardised = self._places.starts_learned
            except BaseException:
                self._places.remove()
                raise
            # Offloaded weights are other objects after every forward; none is learned from, frozen or not.
            mine = set(self.parameters())
            self._frozen = {p for p in model.parameters() if p.requires_grad and not p.is_meta} - mine
            for parameter in self._frozen:
                parameter.requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        """Return every fast weight, layer by layer; none once the adapter is closed."""
        return [p for fast in self._places.fast.values() for p in fast.parameters()]

    @property
    def updates(self) -> int:
        """Updates made in the present stream, those that were undone later included."""
        return self._learner.streams.present.count("updates")

    @property
    def resets(self) -> int:
        """How often a safeguard reset the present stream."""
        return self._learner.streams.present.count("resets")

    @property
    def lr(self) -> float:
        """The present step size, of the present text."""
        return self._learner.live.optimizer.lr

    # -- reading -------------------------------------------------------------------------------------------------------

    def score_and_learn(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, weights: Tensor | None = None
    ) -> AdaptStep:
        """Score token ids with the present fast weights, then learn from them.

        Args:
            input_ids: int64 (B, S).
            attention_mask: (B, S), 0 where a token is padding.
            weights: (B, S) of at least 0: how much each token counts as a prediction to learn from; 0 for text that a
                model generated. What is scored does not depend on them.

        Raises:
            ConfigError: these are no token ids of the model with S of at least 2, so that there is none to predict, or
                mask or weights do not fit them; nothing is scored then.
            RoutingError: the adapter is closed.
        """
        with torch.inference_mode(False):
            batch = Batch.of(input_ids, attention_mask, weights)
            self._require_open("score_and_learn")
            check_vocabulary(self.model, batch.input_ids, where="input_ids")
            self._places.put()
            if self._mode is not None:
                return self._learner.score(batch, self._mode)
            self._last = self._learner.read(batch)
        return self._last

    #: For prompts that are continued then: `generate` decodes with the fast weights, for they know no position.
    read_prompt = score_and_learn

    def reset(self) -> None:
        """Return the present stream to the trained routers exactly, and forget moments and updates that wait."""
        self._learner.streams.reset()

    # -- modes and streams ---------------------------------------------------------------------------------------------

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Learn nothing while the context is open: everything is scored in the present state, which stays as it is."""
        with self._in_mode("frozen: nothing is learned"):
            yield

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Take the fast weights off while the context is open: the trained routers alone, bit for bit.

        A CUDA graph that was captured with the fast weights in place goes on using them.
        """
        hidden = self._places.hidden
        with self._in_mode("the fast weights are off: nothing is learned"):
            self._places.hidden = True
            try:
                with without_fast(self.model, self._places.fast):
                    yield
            finally:
                self._places.hidden = hidden

    @contextmanager
    def _in_mode(self, why: str) -> Iterator[None]:
        self._require_open("frozen or slow")
        before, self._mode = self._mode, why
        try:
            yield
        finally:
            self._mode = before

    @contextmanager
    def _back_to(self, name: str) -> Iterator[RouterAdapter]:
        try:
            yield self
        finally:
            if self._places.fast:
                self._learner.streams.go_to(name)

    def stream(self, name: str) -> Any:
        """Go on with the state of the stream ``name``, new if it is; nothing that is learned is shared between streams.

        Energy is: they have one bucket and one ledger. Without this call everything is of the stream "default".

        Returns:
            A context manager, to be used or not, that goes back to the present stream.

        Raises:
            ConfigError: the name is no text, or empty.
            RoutingError: the adapter is closed.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"the stream is called {name!r}",
                where="RouterAdapter.stream",
                accepted="a text that is not empty",
                fix="name it after its user or its text",
            )
        self._require_open("stream")
        before = self._learner.streams.name
        with torch.inference_mode(False):
            self._learner.streams.go_to(name)
        return self._back_to(before)

    @property
    def streams(self) -> list[str]:
        """Names of the streams that were read."""
        return list(self._learner.streams.by_name)

    def forget_stream(self, name: str) -> None:
        """Drop a stream that is not the present one.

        Raises:
            ConfigError: it is the present one, or there is none of that name.
        """
        streams = self._learner.streams
        if name == streams.name or name not in streams.by_name:
            raise ConfigError(
                f"the stream {name!r} cannot be dropped",
                where="RouterAdapter.forget_stream",
                accepted=f"one of {', '.join(n for n in self.streams if n != streams.name) or 'none'}",
                fix="go to another stream first, or call reset() for the present one",
            )
        del streams.by_name[name]

    def _require_open(self, name: str) -> None:
        if not self._places.fast:
            raise RoutingError(
                "the adapter is closed",
                where=f"RouterAdapter.{name}",
                accepted="an adapter inside its with block",
                fix="make a new RouterAdapter",
            )

    # -- what is left --------------------------------------------------------------------------------------------------

    @property
    def metrics(self) -> dict[str, Any]:
        """Plain numbers and words of the present stream and the last batch; unknown is ``None``.

        ``graphs`` is how many forwards of learning are recorded in CUDA graphs, ``graphs_reason`` why none can be.
        """
        found = step_metrics(self._last, self._learner.streams.present, self.lr, self.ledger, self.bucket)
        forwards = self._learner.live.forwards
        return found | {"graphs": forwards.recorded, "graphs_reason": forwards.why_not}

    def report(self) -> str:
        """Return what happened so far, for people."""
        return text_report(self.metrics, self.ledger.counts, stream=self._learner.streams.name, family=self.family)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that `load_state_dict` needs to go on bit for bit, streams included."""
        return self._learner.streams.state_dict() | {
            "version": STATE_VERSION,
            "family": self.family,
            "objective_name": self.objective,
            "bucket": self.bucket.state_dict(),
            "ledger": self.ledger.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state returned by `state_dict`, of an adapter with the same settings.

        Raises:
            CheckpointError: it is of another version, family, objective or model; nothing is changed then.
        """
        self._require_open("load_state_dict")
        wanted = {"version": STATE_VERSION, "family": self.family, "objective_name": self.objective}
        found = {name: state.get(name) for name in wanted} if isinstance(state, Mapping) else {}
        if found != wanted:
            raise CheckpointError(
                f"the state is of {found or type(state).__name__}",
                where="RouterAdapter.load_state_dict",
                accepted=", ".join(f"{name} {value!r}" for name, value in wanted.items()),
                fix="open the adapter with the settings of the one that was saved, or start afresh",
            )
        before = self.state_dict()
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self._take(before)
            raise CheckpointError(
                f"the state cannot be taken up: {type(error).__name__}: {error}",
                where="RouterAdapter.load_state_dict",
                accepted="what state_dict returned, for the same model",
                fix="start afresh, without the state",
            ) from error

    def _take(self, state: Mapping[str, Any]) -> None:
        with torch.inference_mode(False):
            self._learner.streams.load_state_dict(state, self._learner.settings.min_gain_per_j)
        self.bucket.load_state_dict(state["bucket"])
        self.ledger.load_state_dict(state["ledger"])

    def save_pretrained(self, folder: str | Path, **settings: Any) -> None:
        """Save the model with what the present stream learned; loaded, it scores as it does now, bit for bit.

        Args:
            folder: of the checkpoint.
            settings: of the model's own `save_pretrained`.

        Raises:
            RoutingError: the adapter is closed, or the routers are attached to a model whose checkpoints have no place
                for fast weights.
        """
        self._require_open("save_pretrained")
        model: Any = self.model
        if not isinstance(model, MoEModelMixin):
            raise RoutingError(
                f"a checkpoint of {type(model).__name__} has no place for what was learned",
                where="RouterAdapter.save_pretrained",
                accepted="a converted model, whose configuration names its routers",
                fix="save adapter.state_dict() beside the model with torch.save, and load it into a new RouterAdapter",
            )
        self._places.put()
        model.save_pretrained(folder, keep_learned=True, **settings)

    def close(self) -> None:
        """Take the fast weights off; the model is as it was before. May be called twice."""
        self._places.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = set()

    def __enter__(self) -> RouterAdapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
