"""Tier 1, the local teacher: routers of a partitioned network learn from what their own experts would have given.

On audited sequences every expert runs beside the chosen ones, whose output alone flows on (`audit.py`). Once 512 audit
tokens are there, the fast weights become the least-squares map from what the trained router sees to what it should have
said. No gradient, no backward pass, no sampling; the fit is convex, and exact.

**What a router should have said.** The shares nu of an audit rank the experts, and are no logits: nothing fixes their
scale, and the gate reads the logits' spread. So the target of a token is its own slow logits in another order, the
largest at the expert with the largest share and so on down (`ranked_like`). The spread stays as it was trained, a
token that ranks its experts well already asks for no change, and experts that add nothing keep their order. On planted
permutations of 8 experts this recovers 0.93 of the best 2 after 16 chunks of 32 tokens, where shares brought to the
logits' mean and deviation recover 0.90, and 0.84 where inputs have a mean of their own (the best possible is 0.94).

**The fit.** Features are 1 and, in the family "mix", the slow logits standardised by their mean and deviation in the
first chunk; the targets are (target - slow logits). Recursive least squares with one Huber weight per token, prior
precision 1 for all coefficients, and a factor `forgetting` on older evidence at each update. "bias" has the feature 1
alone and repairs constant shifts only.

What it cannot do: the shares see one layer and not the loss. A judge has to hold the result against the loss of text
(`RouterAdapter` does), and experts trained together with their router may be best left to it.

Shape letters: B sequences, S positions, N audited tokens, E experts, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.adapt.audit import Audited, ranked_like, recording
from thermoe.adapt.audit_schedule import AuditSchedule, ShiftAlarm, audit_rate
from thermoe.adapt.learning_work import serving_nothing
from thermoe.adapt.least_squares import RecursiveLeastSquares, checked_factor
from thermoe.errors import CheckpointError, ConfigError, RoutingError
from thermoe.evaluation import check_token_ids
from thermoe.moe.layer import MoELayer, routed_modules
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights

#: Residuals beyond this many times their root mean square count less (Huber).
HUBER = 1.345
FAMILIES = ("mix", "bias")


@dataclass(frozen=True, slots=True)
class AuditReport:
    """One audit, and the update it led to, if it did.

    Args:
        tokens: real tokens audited now.
        pending: audit tokens that wait for an update, these included; 0 after one.
        updated: layers whose fast weights were set.
        error_before: by layer, root mean square of (logits in force - target) over the tokens of the update, in nats.
        error_after: the same with the new fast weights, on the tokens that they were fitted to.
        caught: by layer, what the chosen experts held of the output, over what as many best ones would have; 1 is the
            best. Of the tokens audited now. ``None`` for a layer in which none had an expert.
        pairs_run: token-expert pairs computed for the audit, all layers together.
        alarm: whether the shift alarm went off.
        reason: why no fast weight was set, or ``None``.
    """

    tokens: int
    pending: int
    updated: tuple[str, ...]
    error_before: Mapping[str, float]
    error_after: Mapping[str, float]
    caught: Mapping[str, float | None]
    pairs_run: int
    alarm: bool
    reason: str | None


class _Student:
    """What the teacher knows about one layer."""

    def __init__(self, experts: int, prior_precision: float, forgetting: float) -> None:
        self.fit = RecursiveLeastSquares(experts + 1, experts, prior_precision=prior_precision, forgetting=forgetting)
        self.statistics: tuple[Tensor, Tensor] | None = None
        self.pending: list[tuple[Audited, Tensor]] = []


class LocalTeacher:
    """Teaches the fast weights of a partitioned model from audits.

    Args:
        model: converted with the method "partition"; fast weights of the family "mix" or "bias" are on its routers by
            the time of an audit.
        seed: of the choice of audited sequences.
        forgetting: factor on older evidence at each update, in (0, 1].
        prior_precision: of every coefficient, for 0.
        min_tokens: audit tokens to an update.
        rate: share of sequences to audit; ``None`` is `audit_rate` of the layer where audits cost most.

    Attributes:
        schedule: which sequences of a stream are audited.
        updates: how many were made.

    Raises:
        RoutingError: the experts of the model do not partition one network, or cannot be run one by one.
        ConfigError: a number is outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        forgetting: float = 0.99,
        prior_precision: float = 1.0,
        min_tokens: int = 512,
        rate: float | None = None,
    ) -> None:
        self.model = model
        self.layers = _partitioned(model)
        if isinstance(min_tokens, bool) or not isinstance(min_tokens, int) or min_tokens < 1:
            raise ConfigError(
                f"min_tokens is {min_tokens!r}",
                where="min_tokens",
                accepted="an integer of at least 1",
                fix="leave it at 512",
            )
        self.min_tokens = min_tokens
        self.forgetting = checked_factor("forgetting", forgetting, most=1.0, usual=0.99)
        self.prior_precision = checked_factor("prior_precision", prior_precision, most=math.inf, usual=1.0)
        if rate is None:
            rate = min(
                audit_rate(layer.experts.num_experts, min(layer.router.top_k, layer.experts.num_experts))  # type: ignore[arg-type, type-var]
                for layer in self.layers.values()
            )
        self.schedule = AuditSchedule(rate, seed=seed)
        self.alarm = ShiftAlarm()
        self.updates = 0
        self._students = self._new_students()

    def _new_students(self) -> dict[str, _Student]:
        return {
            name: _Student(layer.experts.num_experts, self.prior_precision, self.forgetting)
            for name, layer in self.layers.items()
        }

    def audit(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        layers: Iterable[str] | None = None,
    ) -> AuditReport:
        """Run the model on whole sequences, every expert beside the chosen ones, and learn from what they gave.

        The model runs as it is served, in evaluation mode; nothing is generated, and nobody is served by it.

        Args:
            input_ids: int64 (B, S).
            attention_mask: (B, S), 0 where a token is padding; ``None`` when all are real.
            weights: float (B, S) of at least 0, what each token counts, 0 for not at all; ``None`` is 1 for every one.
            layers: names of those whose fast weights may be set; all when ``None``.

        Raises:
            ConfigError: these are no token ids (B, S), a mask or weights of another shape, or bad weights.
            RoutingError: a layer has no fast weights of a family that can be fitted.
        """
        check_token_ids(input_ids, where="input_ids")
        counts = _token_weights(input_ids, attention_mask, weights)
        named = list(self.layers) if layers is None else list(layers)
        fast = {name: self.fast_of(name) for name in named}
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(mode=False), torch.no_grad(), serving_nothing():
                chosen = {name: self.layers[name] for name in named}
                with recording(chosen) as seen:
                    mask = {} if attention_mask is None else {"attention_mask": attention_mask.long()}
                    self.model(input_ids=input_ids, **mask, use_cache=False)
                return self._learn(seen, counts, fast)
        finally:
            self.model.train(training)

    def fast_of(self, name: str) -> FastWeights:
        """Return the fast weights of a layer.

        Raises:
            ConfigError: there is no such layer to audit.
            RoutingError: it has none, or of a family that cannot be fitted.
        """
        if name not in self.layers:
            raise ConfigError(
                f"there is no layer {name!r}",
                where="layers",
                accepted=", ".join(self.layers),
                fix="name layers of the model, or leave layers out for all",
            )
        router = self.layers[name].router
        fast = router.fast if isinstance(router, Router) else None
        if fast is None or fast.family not in FAMILIES:
            raise RoutingError(
                "the router has no fast weights"
                if fast is None
                else f"fast weights of the family {fast.family!r} cannot be fitted by the local teacher",
                where=name,
                accepted='fast weights of the family "mix" or "bias"',
                fix='open RouterAdapter(model, objective="local", family="mix")',
            )
        return fast

    def _learn(self, seen: Mapping[str, Audited], counts: Tensor, fast: Mapping[str, FastWeights]) -> AuditReport:
        """Take in a record; host-side from here on."""
        flat = counts.flatten()
        real = flat > 0
        tokens = int(real.sum())
        caught: dict[str, float | None] = {}
        pairs, reason = 0, None
        if not seen:
            reason = "the forward came to no MoE layer"
        elif not tokens:
            reason = "every token is padding or counts nothing"
        for name, record in seen.items() if tokens else ():
            found = record.on_host(real)
            pairs += len(flat) * found.shares.shape[1]
            caught[name] = None if bool(found.caught.isnan().all()) else float(found.caught.nanmean())
            self._students[name].pending.append((found, flat[real]))
        missed = [1 - value for value in caught.values() if value is not None]
        alarm = bool(missed) and self.alarm.observe(sum(missed) / len(missed))
        if alarm:
            self.schedule.burst()
            self._fade()
        gathered = self.pending
        if reason is None and gathered < self.min_tokens:
            reason = f"{gathered} of {self.min_tokens} audit tokens are gathered"
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        if reason is None:
            for name in seen:
                errors = self._update(self._students[name], fast[name])
                if errors is not None:
                    before[name], after[name] = errors
            if before and not self.updates:
                self.alarm.reset()  # what was usual before the first update will not be after it
            self.updates += bool(before)
            if not before:
                reason = "the outputs of the experts are not finite"
        return AuditReport(tokens, self.pending, tuple(before), before, after, caught, pairs, alarm, reason)

    def _fade(self) -> None:
        """Let the evidence so far count no more than one update: it may be of a text that is over."""
        for student in self._students.values():
            evidence = float(student.fit.information[0, 0])  # the feature 1: the sum of all weights
            if evidence > self.min_tokens:
                student.fit.fade(self.min_tokens / evidence)

    @property
    def pending(self) -> int:
        """Audit tokens that wait for an update."""
        return max(sum(len(weight) for _, weight in student.pending) for student in self._students.values())

    def _update(self, student: _Student, fast: FastWeights) -> tuple[float, float] | None:
        """Fit one layer and set its fast weights; return the errors before and after, ``None`` if nothing was set."""
        records, weights = zip(*student.pending, strict=True)
        student.pending = []
        record, weight = Audited.joined(list(records)), torch.cat(weights).double()
        slow, live = record.slow.double(), record.live.double()
        if not bool(torch.isfinite(slow).all() & torch.isfinite(live).all() & torch.isfinite(record.shares).all()):
            return None
        if student.statistics is None:
            deviation = slow.std(0, correction=0)
            student.statistics = slow.mean(0), torch.where(deviation > 0, deviation, 1.0)
        mean, scale = student.statistics
        features = torch.cat([torch.ones(len(slow), 1, dtype=torch.float64), (slow - mean) / scale], dim=1)
        if fast.family == "bias":
            features[:, 1:] = 0
        target = ranked_like(slow, record.shares.double()) - slow
        miss = (target - features @ student.fit.solution()).square().mean(-1).sqrt()
        limit = HUBER * ((weight * miss.square()).sum() / weight.sum()).sqrt()
        huber = torch.where(miss > limit, limit / miss, 1.0)
        if not student.fit.update(features, target, weight * huber):
            return None
        theta = student.fit.solution()
        self._set(fast, student, theta)
        error_before = float((live - slow - target).square().mean().sqrt())
        return error_before, float((features @ theta - target).square().mean().sqrt())

    def _set(self, fast: FastWeights, student: _Student, theta: Tensor) -> None:
        assert student.statistics is not None
        mean, scale = (value.to(fast.delta) for value in student.statistics)
        fast.set_statistics(mean, scale)
        fast.delta.copy_(theta[0])
        if fast.matrix is not None:
            fast.matrix.copy_(theta[1:].T)

    def reset(self) -> None:
        """Forget all evidence, the position in the stream and what was usual; the fast weights are not touched."""
        self._students = self._new_students()
        self.schedule.reset()
        self.alarm.reset()
        self.updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return evidence, what waits for an update, and the position in the stream; it does not change later on."""
        return {
            "layers": {
                name: {
                    "fit": student.fit.state_dict(),
                    "statistics": student.statistics,
                    "pending": list(student.pending),
                }
                for name, student in self._students.items()
            },
            "schedule": self.schedule.state_dict(),
            "alarm": self.alarm.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of a teacher of the same model.

        Raises:
            CheckpointError: it is incomplete or of other layers; nothing is changed then.
        """
        students = self._new_students()
        schedule, alarm = AuditSchedule(self.schedule.rate, seed=self.schedule.seed), ShiftAlarm()
        try:
            saved = state["layers"]
            if set(saved) != set(students):
                raise KeyError(f"the layers {sorted(set(students) ^ set(saved))}")
            for name, student in students.items():
                student.fit.load_state_dict(saved[name]["fit"])
                student.statistics = saved[name]["statistics"]
                student.pending = list(saved[name]["pending"])
            schedule.load_state_dict(state["schedule"])
            alarm.load_state_dict(state["alarm"])
            updates = int(state["updates"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of the local teacher cannot be taken up: {error}",
                where="LocalTeacher.load_state_dict",
                accepted="what state_dict returned, for a model with the same layers",
                fix="start afresh, without the state",
            ) from error
        self._students, self.schedule, self.alarm, self.updates = students, schedule, alarm, updates


def _partitioned(model: nn.Module) -> dict[str, MoELayer]:
    """Return the layers that can be audited.

    Raises:
        RoutingError: there are none, or not all modules of the model are such.
    """
    found = dict(routed_modules(model)) if isinstance(model, nn.Module) else {}
    method = getattr(getattr(model, "config", None), "conversion_method", None)
    layers = {name: m for name, m in found.items() if isinstance(m, MoELayer) and isinstance(m.router, Router)}
    if not found:
        what, fix = "the model has no MoE layer", "convert it first: thermoe.convert_to_moe(model)"
    elif len(layers) < len(found):
        what = "the experts of an attached model cannot be run one by one"
        fix = 'use the objective "next_token", which fits every model'
    elif method != "partition":
        what = f"the experts do not partition one network: the conversion method is {method!r}"
        fix = 'use the objective "next_token", which fits every model'
    else:
        return layers
    raise RoutingError(what, where=type(model).__name__, accepted='a model converted with method="partition"', fix=fix)


def _token_weights(input_ids: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return float64 (B, S) on the CPU: what each token counts.

    Raises:
        ConfigError: the mask or the weights do not fit.
    """
    counts = torch.ones(input_ids.shape, dtype=torch.float64)
    for name, value in (("attention_mask", mask), ("weights", weights)):
        if value is None:
            continue
        sound = isinstance(value, Tensor) and value.shape == input_ids.shape
        given = value.detach().to("cpu", torch.float64) if sound else counts
        if not sound or not bool((torch.isfinite(given) & (given >= 0)).all()):
            raise ConfigError(
                f"{name} is {type(value).__name__}"
                + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
                + (", with numbers below 0 or not finite" if sound else ""),
                where=name,
                accepted=f"a tensor of shape {tuple(input_ids.shape)}, finite and at least 0",
                fix=f"leave {name} out when every token counts",
            )
        counts *= (given > 0) if name == "attention_mask" else given
    return counts
