"""Auxiliary losses that keep every expert in use, each in the form that has the intended gradient.

Computed per layer on the real (unpadded) tokens and then summed over layers, so that a coefficient says how hard each
layer is pulled, however deep the model is, and two layers that collapsed onto different experts do not look balanced
(averaged over six layers, the same coefficients left loads of up to 3.4 times the mean: docs/results/convergence).
With P_e = mean_t p_te, f_e = n_e / sum n and sg = stop-gradient:

- `switch`: E * sum_e sg(f_e) P_e (Switch Transformer, arXiv 2101.03961); 1 at balance for every k.
- `switch_hf`: the form of Transformers, for comparison: summed over the k slots (k at balance) and over the tokens of
  all layers at once, so that it does not see layers that collapsed onto different experts.
- `load_std`: spread of tokens per expert, E * sum_e (P_e + sg(f_e - P_e))^2 - 1. Its value is the squared coefficient
  of variation of the true counts; the counts themselves are piecewise constant and would give no gradient, so the
  gradient goes through P and equals twice that of `switch`. `load_std_root`: the square root of it + 1e-6.
- `importance`: squared coefficient of variation of the summed combine weights (noisy top-k, arXiv 1701.06538). Its
  gradient reaches chosen experts only, and none where the weights are constant (top-1, renormalised).
- `entropy`: -(H(P) - mean_t H(p_t)), the negative mutual information: balanced over the batch and decisive per token.
  `entropy_marginal`: -H(P) alone. `entropy_token`: -mean_t H(p_t), which flattens every token's scores and so makes
  the choice of experts arbitrary; an emergency measure.
- `kl_uniform`: KL(P || uniform) = log E - H(P), on the marginal. `kl_uniform_reverse`: KL(uniform || P), which pulls
  hard on experts that get nothing.
- `z_loss`: mean_t logsumexp(z_t)^2 (ST-MoE, arXiv 2202.08906).

The fourth classic cure, the softmax temperature, is no loss: dividing logits leaves their ranking as it is. Ours
samples experts in training (`temperature=` of the top-k router, Gumbel top-k).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.global_load import GlobalLoad
from thermoe.moe.stats import entropy
from thermoe.registry import Registry

#: Takes the decision of one layer and, when f is that of a larger batch (`GlobalLoad`), this f, float (E,); or is a
#: `ModelLoss`.
RoutingLoss = Callable[..., Tensor]
EntropyScope = Literal["mutual", "marginal", "token"]


@dataclass(frozen=True, slots=True)
class ModelLoss:
    """A loss that needs the decisions of all layers at once; one decision alone is a model of one layer."""

    of_layers: Callable[[Sequence[RoutingDecision]], Tensor]

    def __call__(self, layers: RoutingDecision | Sequence[RoutingDecision]) -> Tensor:
        """Return the loss of a model's layers."""
        return self.of_layers([layers] if isinstance(layers, RoutingDecision) else layers)


LOSSES: Registry[RoutingLoss] = Registry("loss", "thermoe.losses")

#: What each loss is commonly used with: `switch` and `z_loss` from the Switch Transformer and ST-MoE, `switch_hf` from
#: the configuration of Mixtral, `importance` from noisy top-k; with the others, `z_loss` beside them, a collapsed
#: router came back in our own tests (tests/unit/moe/test_collapse.py), as it does not with `importance`.
DEFAULT_COEFFICIENTS: dict[str, float] = {
    "switch": 1e-2,
    "switch_hf": 1e-3,
    "load_std": 1e-2,
    "load_std_root": 3e-2,
    "importance": 1e-1,
    "entropy": 1e-2,
    "entropy_marginal": 1e-1,
    "entropy_token": 1e-2,
    "kl_uniform": 1e-1,
    "kl_uniform_reverse": 1e-1,
    "z_loss": 1e-3,
}
#: What training uses unless told otherwise: of all options it ended with the most even load, at the perplexity of the
#: best (docs/results/convergence).
DEFAULT_BALANCE: dict[str, float] = {name: DEFAULT_COEFFICIENTS[name] for name in ("load_std_root", "z_loss")}
#: Any two of these ask for the same thing, an even load; near balance they are multiples of one another.
_EVENNESS = (
    "switch",
    "switch_hf",
    "load_std",
    "load_std_root",
    "importance",
    "kl_uniform",
    "kl_uniform_reverse",
    "entropy_marginal",
)


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (T, ...) over the real tokens; 0 when there is none."""
    if mask is None:
        return values.sum(0) / max(1, values.shape[0])
    weight = mask.to(values.dtype).reshape(-1, *([1] * (values.ndim - 1)))
    return (values * weight).sum(0) / weight.sum().clamp(min=1)


def _shares(decision: RoutingDecision, load: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the hard share f (no gradient), of a larger batch if one is given, and the soft share P, both (E,)."""
    if load is None:
        counts = decision.counts
        load = counts / counts.sum().clamp(min=1)
    return load.detach(), _mean_over_tokens(decision.probabilities, decision.padding_mask)


@LOSSES.register("switch")
def switch_loss(decision: RoutingDecision, load: Tensor | None = None) -> Tensor:
    """Load-balancing loss E * sum_e f_e P_e: 1 when even, up to E when collapsed."""
    hard, soft = _shares(decision, load)
    return decision.num_experts * (hard * soft).sum()


@LOSSES.register("switch_hf")
@ModelLoss
def switch_hf_loss(layers: Sequence[RoutingDecision]) -> Tensor:
    """Load-balancing loss of Transformers (`load_balancing_loss_func` of Mixtral), over the tokens of all layers.

    k when even. The batch at hand alone counts, whatever `GlobalLoad` holds.

    Raises:
        RoutingError: the layers differ in their number of experts.
    """
    sizes = {layer.num_experts for layer in layers}
    if len(sizes) != 1:
        raise RoutingError(
            f"the layers have {sorted(sizes)} experts",
            where="switch_hf",
            accepted="layers of one number of experts, since their tokens are put together",
            fix="use the loss switch, which is computed per layer",
        )
    masks = [layer.padding_mask for layer in layers]
    tokens = sum(len(layer.logits) if m is None else m.sum() for layer, m in zip(layers, masks, strict=True))
    tokens = torch.as_tensor(tokens, device=layers[0].logits.device).clamp(min=1)
    counts = torch.stack([layer.counts for layer in layers]).sum(0)
    probability = torch.stack(
        [
            (p if m is None else p * m.unsqueeze(-1)).sum(0)
            for p, m in zip((layer.probabilities for layer in layers), masks, strict=True)
        ]
    ).sum(0)
    return layers[0].num_experts * (counts / tokens * (probability / tokens)).sum()


@LOSSES.register("load_std")
def load_std_loss(decision: RoutingDecision, load: Tensor | None = None, *, root: bool = False) -> Tensor:
    """Squared coefficient of variation of tokens per expert, with a straight-through gradient.

    Args:
        decision: of one layer.
        load: f of a larger batch.
        root: return the coefficient of variation itself, sqrt(square + 1e-6), whose gradient is finite at balance.
    """
    hard, soft = _shares(decision, load)
    share = soft + (hard - soft).detach()
    square = decision.num_experts * share.square().sum() - 1
    return (square.clamp(min=0) + 1e-6).sqrt() if root else square


LOSSES.register("load_std_root")(partial(load_std_loss, root=True))


@LOSSES.register("importance")
def importance_loss(decision: RoutingDecision, load: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the combine weights summed per expert; the batch at hand alone counts."""
    experts = decision.num_experts
    index = decision.expert_index.clamp(max=experts).reshape(-1)
    weights = decision.weights.float().reshape(-1)
    importance = torch.zeros(experts + 1, device=weights.device).scatter_add(0, index, weights)[:experts]
    mean = importance.mean()
    return (importance - mean).square().mean() / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)


@LOSSES.register("entropy")
def entropy_loss(decision: RoutingDecision, load: Tensor | None = None, *, scope: EntropyScope = "mutual") -> Tensor:
    """Negative entropy of the router; at best -log E in every scope.

    Args:
        decision: of one layer.
        load: not used; P is that of the batch at hand.
        scope: "mutual" -(H(P) - mean_t H(p_t)), the mutual information between token and expert; "marginal" -H(P);
            "token" -mean_t H(p_t), at its best where every token's scores are equal.

    Raises:
        UnknownNameError: no such scope.
    """
    of_tokens = _mean_over_tokens(entropy(decision.probabilities), decision.padding_mask)
    if scope == "token":
        return -of_tokens
    of_batch = entropy(_mean_over_tokens(decision.probabilities, decision.padding_mask))
    if scope == "marginal":
        return -of_batch
    if scope != "mutual":
        raise UnknownNameError.of("scope", str(scope), ("mutual", "marginal", "token"), where="scope")
    return of_tokens - of_batch


LOSSES.register("entropy_marginal")(partial(entropy_loss, scope="marginal"))
LOSSES.register("entropy_token")(partial(entropy_loss, scope="token"))


@LOSSES.register("kl_uniform")
def kl_uniform_loss(decision: RoutingDecision, load: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """Divergence of the batch marginal P from uniform: 0 when even.

    Args:
        decision: of one layer.
        load: not used; P is that of the batch at hand.
        reverse: KL(uniform || P) = -log E - mean_e log P_e, unbounded as an expert dies, instead of KL(P || uniform),
            which is log E when collapsed. Computed from the logits, so that its pull does not end where p underflows.
    """
    experts, mask = decision.num_experts, decision.padding_mask
    if not reverse:
        return math.log(experts) - entropy(_mean_over_tokens(decision.probabilities, mask))
    log_p = F.log_softmax(decision.logits.float(), -1)
    if not len(log_p):
        return log_p.sum()
    real = torch.ones_like(log_p[:, :1], dtype=torch.bool) if mask is None else mask.unsqueeze(-1)
    tokens = real.sum()
    # Not -inf in padding: with no token at all the gradient would be NaN.
    log_marginal = torch.logsumexp(torch.where(real, log_p, -1e4), 0) - tokens.clamp(min=1).log()
    return torch.where(tokens > 0, -math.log(experts) - log_marginal.mean(), 0)


LOSSES.register("kl_uniform_reverse")(partial(kl_uniform_loss, reverse=True))


@LOSSES.register("z_loss")
def z_loss(decision: RoutingDecision, load: Tensor | None = None) -> Tensor:
    """Mean squared log-partition of the router's logits."""
    return _mean_over_tokens(torch.logsumexp(decision.logits, -1).square(), decision.padding_mask)


def default_balance(name: str, *, where: str = "balance") -> dict[str, float]:
    """Return the terms for balancing with the loss ``name``: its usual coefficient, and `z_loss` beside it.

    Raises:
        UnknownNameError: no such loss.
        ConfigError: the loss comes from elsewhere, without a usual coefficient.
    """
    LOSSES.get(name, where=where)
    if name not in DEFAULT_COEFFICIENTS:
        raise ConfigError(
            f"no usual coefficient is known for the loss {name!r}",
            where=where,
            accepted="one of " + ", ".join(DEFAULT_COEFFICIENTS) + ", or a loss with its coefficient",
            fix=f"state the coefficient: {where}: {{{name}: 0.01}}",
        )
    return {term: DEFAULT_COEFFICIENTS[term] for term in (name, "z_loss")}


def check_loss_terms(terms: Mapping[str, float], *, where: str = "balance") -> dict[str, float]:
    """Return ``terms`` as floats after checking names and coefficients.

    Raises:
        UnknownNameError: a loss is not registered.
        ConfigError: a coefficient is negative or not finite.
    """
    checked: dict[str, float] = {}
    for name, coefficient in terms.items():
        LOSSES.get(name, where=f"{where}.{name}")
        value = float(coefficient)
        if not 0 <= value < float("inf"):
            raise ConfigError(
                f"the coefficient of {name} is {coefficient}",
                where=f"{where}.{name}",
                accepted="a finite number of at least 0",
                fix="use 0 to switch this loss off",
            )
        checked[name] = value
    alike = [name for name in _EVENNESS if checked.get(name, 0) > 0]
    if len(alike) > 1:
        warnings.warn(
            f"{' and '.join(alike)} penalise the same thing, an uneven load (KL(P, uniform) is about half the squared "
            "coefficient of variation near balance); use one of them",
            stacklevel=2,
        )
    return checked


def routing_loss(
    decisions: Iterable[RoutingDecision], terms: Mapping[str, float], *, loads: GlobalLoad | None = None
) -> Tensor | None:
    """Return sum_i coefficient_i * sum over layers of loss_i; ``None`` when there is nothing to add.

    Args:
        decisions: one per layer, with autograd history.
        terms: loss name to coefficient; 0 switches a term off.
        loads: counts of the optimiser step so far, those of ``decisions`` added to them already (`GlobalLoad.add`): f
            is then taken from all of them. Without it f is that of ``decisions`` alone.

    Raises:
        RoutingError: ``loads`` has not counted these layers.
    """
    layers = [decision.over_outputs() for decision in decisions]
    active = [(LOSSES.get(name), value) for name, value in terms.items() if value > 0]
    if not layers or not active:
        return None
    shares: list[tuple[Tensor, ...]] = [()] * len(layers)
    if loads is not None:
        shares = [(share,) for share in loads.shares()]
        if [share.numel() for (share,) in shares] != [layer.logits.shape[-1] for layer in layers]:
            raise RoutingError(
                f"there are {len(layers)} layers, and loads of {len(shares)}",
                where="routing_loss",
                accepted="loads that have counted the decisions at hand",
                fix="call loads.add(decisions) after the forward, before the loss",
            )
    parts = []
    for loss, value in active:
        if isinstance(loss, ModelLoss):
            parts.append(value * loss(layers))
        else:
            parts.append(value * torch.stack([loss(x, *f) for x, f in zip(layers, shares, strict=True)]).sum())
    return torch.stack(parts).sum()
