"""Routing decisions before and after test-time training: how many changed, and whether the changes were good.

Both runs see the same rows at the same price; before is the trained routers alone. Deeper layers differ in their
inputs too, because the layers before them differ: the measures compare the two models as they run.

Shape letters: T tokens, E experts, O router outputs, K slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.adapt.learning_work import serving_nothing
from thermoe.adapt.reading import token_nll
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import ConfigError
from thermoe.evaluation import check_token_ids
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import collect_routing


@dataclass(frozen=True, slots=True)
class LayerAgreement:
    """One layer, averaged over real tokens that predict one.

    Args:
        jaccard: of the sets of experts before and after; two empty sets agree.
        kl: KL(p_before, p_after) of the router's probabilities, in nats.
        flip_rate: share of tokens whose most probable expert changed.
        delta_nll_flipped: after minus before, nats of the next token, over tokens whose favourite flipped here: below
            0 the flips were good; ``None`` without any. The loss is of the whole model: other layers changed too.
        delta_nll_kept: the same over the other tokens; ``None`` without any.
        tokens: how many.
    """

    jaccard: float
    kl: float
    flip_rate: float
    delta_nll_flipped: float | None
    delta_nll_kept: float | None
    tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as a dictionary for a result row."""
        return asdict(self)


@torch.no_grad()
def routing_agreement(
    adapter: RouterAdapter, batches: Iterable[Tensor], *, attention_mask: Tensor | None = None
) -> dict[str, LayerAgreement]:
    """Compare the adapted routers of ``adapter`` with the trained ones; nothing is learned.

    Args:
        adapter: open; its present stream is compared.
        batches: int64 (B, S) token ids.
        attention_mask: (B, S), 0 for padding, of all batches alike.

    Returns:
        By dotted layer name.

    Raises:
        ConfigError: a batch holds no token ids, or there is none.
        RoutingError: the adapter is closed.
    """
    sums: dict[str, dict[str, float]] = {}
    mask = None if attention_mask is None else attention_mask.bool()
    for ids in batches:
        check_token_ids(ids, where="batches")
        with serving_nothing(), adapter.frozen():
            after_nll, _ = token_nll(adapter.model, ids, mask)
            after = collect_routing(adapter.model)
            with adapter.slow():
                before_nll, _ = token_nll(adapter.model, ids, mask)
                before = collect_routing(adapter.model)
        real = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] & mask[:, :-1]
        used, delta = real.to(after_nll.device), after_nll - before_nll
        for name, old in before.items():
            if old.logits.shape[0] == ids.numel():
                _add(sums.setdefault(name, dict.fromkeys(_SUMS, 0.0)), old, after[name], ids.shape, used, delta)
    if not sums:
        raise ConfigError(
            "there is no batch to compare on",
            where="routing_agreement(batches=...)",
            accepted="at least one batch of token ids",
            fix="give rows of the text that was adapted to",
        )
    return {name: _mean(one) for name, one in sums.items()}


_SUMS = ("jaccard", "kl", "flipped", "nll_flipped", "nll_kept", "tokens")


def _add(
    sums: dict[str, float],
    old: RoutingDecision,
    new: RoutingDecision,
    shape: tuple[int, ...],
    used: Tensor,
    delta: Tensor,
) -> None:
    def predicting(values: Tensor) -> Tensor:  # (B * S, ...) to the positions (N, ...) that predict a real token
        return values.view(*shape, *values.shape[1:])[:, :-1][used.to(values.device)]

    a, b = (predicting(_chosen(decision)) for decision in (old, new))
    both, either = (a & b).sum(-1), (a | b).sum(-1)
    p, q = predicting(old.probabilities).double(), predicting(new.probabilities).double()
    kl = torch.where(p > 0, p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log()), 0).sum(-1)
    flipped = p.argmax(-1) != q.argmax(-1)
    change = delta[used].double().to(flipped.device)
    for name, value in (
        ("jaccard", torch.where(either > 0, both / either.clamp(min=1), 1.0).sum()),
        ("kl", kl.sum()),
        ("flipped", flipped.sum()),
        ("nll_flipped", change[flipped].sum()),
        ("nll_kept", change[~flipped].sum()),
        ("tokens", used.sum()),
    ):
        sums[name] += float(value)


def _chosen(decision: RoutingDecision) -> Tensor:
    """Return bool (T, O): the outputs each token goes to."""
    outputs = decision.logits.shape[-1]
    return F.one_hot(decision.expert_index, outputs + 1)[..., :outputs].any(1)


def _mean(sums: dict[str, float]) -> LayerAgreement:
    tokens, flipped = sums["tokens"], sums["flipped"]
    return LayerAgreement(
        jaccard=sums["jaccard"] / tokens,
        kl=sums["kl"] / tokens,
        flip_rate=flipped / tokens,
        delta_nll_flipped=sums["nll_flipped"] / flipped if flipped else None,
        delta_nll_kept=sums["nll_kept"] / (tokens - flipped) if tokens > flipped else None,
        tokens=int(tokens),
    )


def agreement_rows(layers: dict[str, LayerAgreement]) -> list[dict[str, Any]]:
    """Return one row per layer for a result file."""
    return [{"layer": name, **layer.as_dict()} for name, layer in layers.items()]
