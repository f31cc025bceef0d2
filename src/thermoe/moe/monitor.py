"""Watches a model in use or in training for collapse, layer by layer, and names the remedy.

The alarm: the effective experts of a layer stay below half of what they should be for three windows in a row. What they
should be is E for a model in training, or the effective experts of a reference (the slow router on the same kind of
tokens) given by the caller. Under a price fewer experts are opened by design, which is no collapse: there the selection
without the price is judged.

Of a collapse the remedy depends on the cause, so that is looked at first: scores that hardly differ (a new or zero
router) are ties that top-k resolves to the same few experts, and no loss frees those quickly; a trained router that
prefers a few experts is another matter, and so are tokens dropped by a capacity and single dead experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import Routed, routed_modules
from thermoe.moe.stats import DEAD_TOKENS, RoutingStats, StatsAccumulator, read_sums

AlarmKind = Literal["ties", "collapse", "drops", "dead_experts"]
#: Logits that spread less than this (standard deviation over experts, nats) are ties for all that top-k can tell.
TIE_STD = 1e-2
#: What is summed up over layers: the figure and which end of it is the worse one.
_WORST = {
    "effective_experts": min,
    "max_vio": max,
    "gini": max,
    "cv": max,
    "dead_experts": max,
    "token_entropy": min,
    "mutual_information": min,
    "distinct_experts": min,
    "drop_rate": max,
}

#: What to do, by cause; a layer's name goes in.
_REMEDIES: dict[AlarmKind, str] = {
    "ties": (
        "its scores hardly differ from expert to expert, so that ties decide: start the router anew with random rows "
        "(layer.router.weight.normal_(std=0.02 * (768 / D) ** 0.5)), and sample in training: "
        "set_router(model, 'topk', layers=['{name}'], temperature=2.0)"
    ),
    "collapse": (
        "its scores favour a few experts: balance by a bias, set_router(model, 'sigmoid_bias', layers=['{name}']); or "
        "sample in training, set_router(model, 'topk', layers=['{name}'], temperature=2.0); or train with "
        "balance={{'load_std': 0.01}} or a larger coefficient"
    ),
    "drops": (
        "raise it, set_router(model, 'topk', layers=['{name}'], capacity_factor=2.0), or route without one "
        "(capacity_factor=None); if few experts get the tokens, balance the load first"
    ),
    "dead_experts": (
        "bring them back by a bias, set_router(model, 'sigmoid_bias', layers=['{name}']), or train with "
        "balance={{'load_std': 0.01}}, or {{'kl_uniform_reverse': 0.1}}, which pulls on idle experts most"
    ),
}


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that was wrong in a layer for several windows in a row.

    Args:
        step: of the flush that found it, the latest one while it stands.
        layer: dotted name.
        kind: "ties" or "collapse" (too few effective experts, by cause), "drops", "dead_experts".
        value: effective experts, share of dropped slots, or number of dead experts, over the last window.
        threshold: what the value was compared with.
        windows: windows in a row.
        text: what is wrong and what to do.
    """

    step: int
    layer: str
    kind: AlarmKind
    value: float
    threshold: float
    windows: int
    text: str


@dataclass(slots=True)
class _Layer:
    """What is kept of one layer; `signs` are counted up per condition in windows in a row."""

    form: tuple[int, bool, bool]  # experts, whether priced, fixed k: sums of different forms do not mix
    counted: StatsAccumulator = field(default_factory=StatsAccumulator)
    window: Tensor | None = None
    signs: dict[str, int] = field(default_factory=dict)


class CollapseMonitor:
    """Collects every layer's decisions without waiting for the device, and reads them at log steps.

    Call `update` after each forward and `flush` when something is logged. Rows come from what was counted since the
    last flush; an alarm looks at windows of at least ``window`` tokens, however often rows are asked for.

    Args:
        model: with MoE layers or attached routers.
        window: tokens per window; ``None`` is 100 per expert, as few as a dead expert can be told from.
        share: of the reference below which the effective experts raise an alarm. Where k is so large that even a
            complete collapse would leave as many, k + (E - k) / 4 is the bound instead.
        reference: effective experts that a layer should have, one number or one by dotted name; ``None`` is E.
        patience: windows in a row.
        max_drop_rate: share of dropped slots above which there is an alarm.
        across_ranks: add up the counts of all ranks of a distributed run, each of which then has to call `flush`
            equally often. Without it each sees its own.

    Attributes:
        alarms: those that stand, as of the last flush.
        raised: those that the last flush raised anew.
        summary: the worst of each figure over layers (``routing_max_vio_max``, ``routing_effective_experts_min``, ...),
            the mean effective experts and the number of standing alarms, as of the last flush; what is unknown is left
            out. Fit for a logger.

    Raises:
        RoutingError: the model has no router.
        ConfigError: a setting is outside its range, or the reference names a layer that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int | None = None,
        share: float = 0.5,
        reference: float | Mapping[str, float] | None = None,
        patience: int = 3,
        max_drop_rate: float = 0.1,
        across_ranks: bool = True,
    ) -> None:
        self._modules: dict[str, Routed] = dict(routed_modules(model))
        if not self._modules:
            raise RoutingError(
                "the model has no MoE layer",
                where=type(model).__name__,
                accepted="a model with MoELayer modules or attached routers",
                fix="convert a dense model first: thermoe.convert_to_moe(model, num_experts=8, top_k=4)",
            )
        for name, value, low, high in (
            ("window", 1 if window is None else window, 1, float("inf")),
            ("share", share, 0, 1),
            ("patience", patience, 1, float("inf")),
            ("max_drop_rate", max_drop_rate, 0, 1),
        ):
            if not low <= value <= high:
                raise ConfigError(
                    f"{name} is {value}",
                    where=name,
                    accepted=f"at least {low}" if high == float("inf") else f"a number from {low} to {high}",
                    fix=f"leave {name} out",
                )
        if isinstance(reference, Mapping):
            self._check_names(reference, "reference")
        self.window, self.share, self.reference = window, share, reference
        self.patience, self.max_drop_rate, self.across_ranks = patience, max_drop_rate, across_ranks
        self.alarms: list[Alarm] = []
        self.raised: list[Alarm] = []
        self.summary: dict[str, float] = {}
        self._layers: dict[str, _Layer] = {}

    def _check_names(self, names: Mapping[str, Any], where: str) -> None:
        for name in names:
            if name not in self._modules:
                raise ConfigError(
                    f"there is no layer {name!r}",
                    where=where,
                    accepted="of the layers " + ", ".join(self._modules),
                    fix="name layers the model has; a state belongs to the model it was taken from",
                )

    @torch.no_grad()
    def update(self, decisions: Mapping[str, RoutingDecision] | None = None) -> None:
        """Count one forward; nothing is read from the device.

        Args:
            decisions: by dotted layer name, as `collect_routing` gives them; those that stand on the model's layers
                when ``None``.
        """
        for name, module in self._modules.items():
            decision = module.last_routing if decisions is None else decisions.get(name)
            if decision is None:
                continue
            priced = isinstance(getattr(module.router, "price", None), Tensor)
            fixed_k = bool(getattr(module.router, "fixed_k", False))
            form = (decision.num_experts, priced, fixed_k)
            if name not in self._layers or self._layers[name].form != form:
                self._layers[name] = _Layer(form)  # another router: what was counted of the old one says nothing of it
            unpriced = _without_price(decision, getattr(module.router, "group_size", 1)) if priced else None
            self._layers[name].counted.add(decision, fixed_k=fixed_k, unpriced_counts=unpriced)

    def flush(self, step: int) -> list[dict[str, Any]]:
        """Read what was counted since the last flush, judge the windows that are full, and begin anew.

        Args:
            step: to name in alarms.

        Returns:
            One row per layer that was used: `layer` (its place in the model), `name`, and the fields of `RoutingStats`.
        """
        self.raised = []
        places = {name: place for place, name in enumerate(self._modules)}
        layers = dict(sorted(self._layers.items(), key=lambda item: places[item[0]]))
        read = read_sums([layer.counted for layer in layers.values()], across_ranks=self.across_ranks)
        rows: list[dict[str, Any]] = []
        for (name, layer), sums in zip(layers.items(), read, strict=True):
            stats = None if sums is None else layer.counted.summarise(sums)
            if sums is not None and stats is not None:
                rows.append({"layer": places[name], "name": name, **stats.as_dict()})
                layer.window = sums if layer.window is None else layer.window + sums
                full = layer.counted.summarise(layer.window)
                if full is not None and full.tokens >= (self.window or DEAD_TOKENS * layer.form[0]):
                    self._judge(step, name, layer, full)
                    layer.window = None
            layer.counted = StatsAccumulator()
        if rows:
            self.summary = self._summarise(rows)
        return rows

    def _judge(self, step: int, name: str, layer: _Layer, stats: RoutingStats) -> None:
        """Look at one full window of a layer: count its signs up, and raise or clear its alarms."""
        found = self._signs(name, stats)
        before = {alarm.kind for alarm in self.alarms if alarm.layer == name}
        layer.signs = {sign: layer.signs.get(sign, 0) + 1 for sign in found}
        standing = []
        for sign, (kind, value, threshold, text) in found.items():
            if layer.signs[sign] >= self.patience:
                told = f"{name}: {text}"
                standing.append(Alarm(step, name, kind, value, threshold, layer.signs[sign], told))
        self.alarms = [alarm for alarm in self.alarms if alarm.layer != name] + standing
        self.raised += [alarm for alarm in standing if alarm.kind not in before]

    def _signs(self, name: str, stats: RoutingStats) -> dict[str, tuple[AlarmKind, float, float, str]]:
        """Return what is wrong in a window: sign to kind, value, threshold and text."""
        found: dict[str, tuple[AlarmKind, float, float, str]] = {}
        experts = len(stats.load)
        priced = stats.unpriced_effective_experts is not None
        effective = stats.unpriced_effective_experts if priced else stats.effective_experts
        dead = stats.unpriced_dead_experts if priced else stats.dead_experts
        least = self._least_effective(name, stats)
        if effective is not None and stats.experts_per_token < experts and effective < least:
            kind: AlarmKind = "ties" if stats.logit_std < TIE_STD else "collapse"
            what = f"{effective:.1f} of {experts} experts in effective use, fewer than {least:.1f}"
            what += " (price left aside)" if priced else ""
            found["collapse"] = (kind, effective, least, f"{what}; {_REMEDIES[kind].format(name=name)}")
        elif dead:
            what = f"{dead} of {experts} experts get less than a tenth of an even load"
            found["dead"] = ("dead_experts", dead, 0, f"{what}; {_REMEDIES['dead_experts'].format(name=name)}")
        if stats.drop_rate is not None and stats.drop_rate > self.max_drop_rate:
            what = f"the capacity drops {stats.drop_rate:.0%} of the slots, more than {self.max_drop_rate:.0%}"
            remedy = _REMEDIES["drops"].format(name=name)
            found["drops"] = ("drops", stats.drop_rate, self.max_drop_rate, f"{what}; {remedy}")
        return found

    def _least_effective(self, name: str, stats: RoutingStats) -> float:
        """Return the effective experts below which a layer counts as collapsed."""
        experts, k = len(stats.load), stats.experts_per_token
        stated = self.reference.get(name) if isinstance(self.reference, Mapping) else self.reference
        return max(self.share * (experts if stated is None else stated), k + (experts - k) / 4)

    def _summarise(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Return the worst of each figure over layers, for a logger that takes numbers only."""
        summary: dict[str, float] = {}
        for name, worst in _WORST.items():
            known = [float(row[name]) for row in rows if row[name] is not None]
            if known:
                summary[f"routing_{name}_{worst.__name__}"] = worst(known)
        effective = [row["effective_experts"] for row in rows]
        summary["routing_effective_experts_mean"] = sum(effective) / len(effective)
        summary["routing_alarms"] = float(len(self.alarms))
        return summary

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that a checkpoint keeps (`torch.load` reads them with weights_only)."""
        return {
            "layers": {
                name: {
                    "form": list(layer.form),
                    "counted": layer.counted.state_dict(),
                    "window": layer.window,
                    "signs": dict(layer.signs),
                }
                for name, layer in self._layers.items()
            },
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`: with the windows that were open and the alarms that stood.

        Raises:
            ConfigError: the state is that of another model.
        """
        self._check_names(state["layers"], "state")
        self._layers = {}
        for name, kept in state["layers"].items():
            layer = _Layer(tuple(kept["form"]), window=kept["window"], signs=dict(kept["signs"]))
            layer.counted.load_state_dict(kept["counted"])
            self._layers[name] = layer
        self.alarms = [Alarm(**kept) for kept in state["alarms"]]
        self.raised = []


def _without_price(decision: RoutingDecision, group_size: int) -> Tensor:
    """Return (E,) tokens per expert, had the k most probable experts been taken (whole copies, if shards make up one).

    Padding has no expert.
    """
    score, slots = decision.probabilities, decision.expert_index.shape[-1]
    if group_size > 1:
        score = decision.logits.unflatten(-1, (-1, group_size)).mean(-1)
    index = score.topk(-(-slots // group_size), -1).indices
    real = torch.ones(score.shape[0], device=score.device)
    if decision.padding_mask is not None:
        real = decision.padding_mask.to(real.dtype)
    counts = torch.zeros(score.shape[-1], device=score.device)
    counts = counts.scatter_add(0, index.reshape(-1), real.unsqueeze(-1).expand_as(index).reshape(-1))
    return counts.repeat_interleave(group_size)
