"""Auxiliary losses that keep every expert in use, each in the form that has the intended gradient.

Computed per layer on the real (unpadded) tokens and then averaged over layers, so that two layers that collapsed onto
different experts do not look balanced. With P_e = mean_t p_te, f_e = n_e / sum n and sg = stop-gradient:

- `switch`: E * sum_e sg(f_e) P_e (Switch Transformer, arXiv 2101.03961); 1 at balance for every k.
- `load_std`: spread of tokens per expert, E * sum_e (P_e + sg(f_e - P_e))^2 - 1. Its value is the squared coefficient
  of variation of the true counts; the counts themselves are piecewise constant and would give no gradient, so the
  gradient goes through P and equals twice that of `switch`.
- `entropy`: -(H(P) - mean_t H(p_t)), the negative mutual information: balanced over the batch and decisive per token.
  Maximising the entropy of each token instead would make the choice of experts arbitrary.
- `kl_uniform`: KL(P || uniform) = log E - H(P), on the marginal.
- `z_loss`: mean_t logsumexp(z_t)^2 (ST-MoE, arXiv 2202.08906).

The fourth classic cure, the softmax temperature, is no loss: dividing logits leaves their ranking as it is. Ours
samples experts in training (`temperature=` of the top-k router, Gumbel top-k).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from thermoe.errors import ConfigError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.stats import entropy
from thermoe.registry import Registry

RoutingLoss = Callable[[RoutingDecision], Tensor]
LOSSES: Registry[RoutingLoss] = Registry("loss", "thermoe.losses")

#: What training uses unless told otherwise; coefficients from the Switch Transformer and ST-MoE.
DEFAULT_BALANCE: dict[str, float] = {"switch": 1e-2, "z_loss": 1e-3}


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (T, ...) over the real tokens; 0 when there is none."""
    if mask is None:
        return values.sum(0) / max(1, values.shape[0])
    weight = mask.to(values.dtype).reshape(-1, *([1] * (values.ndim - 1)))
    return (values * weight).sum(0) / weight.sum().clamp(min=1)


def _loads(decision: RoutingDecision) -> tuple[Tensor, Tensor]:
    """Return the hard share f (no gradient) and the soft share P, both (E,)."""
    counts = decision.counts
    hard = counts / counts.sum().clamp(min=1)
    return hard.detach(), _mean_over_tokens(decision.probabilities, decision.padding_mask)


@LOSSES.register("switch")
def switch_loss(decision: RoutingDecision) -> Tensor:
    """Load-balancing loss E * sum_e f_e P_e: 1 when even, up to E when collapsed."""
    hard, soft = _loads(decision)
    return decision.num_experts * (hard * soft).sum()


@LOSSES.register("load_std")
def load_std_loss(decision: RoutingDecision) -> Tensor:
    """Squared coefficient of variation of tokens per expert, with a straight-through gradient."""
    hard, soft = _loads(decision)
    share = soft + (hard - soft).detach()
    return decision.num_experts * share.square().sum() - 1


@LOSSES.register("entropy")
def entropy_loss(decision: RoutingDecision) -> Tensor:
    """Negative mutual information between token and expert: -log E at best."""
    _, soft = _loads(decision)
    token_entropy = _mean_over_tokens(entropy(decision.probabilities), decision.padding_mask)
    return token_entropy - entropy(soft)


@LOSSES.register("kl_uniform")
def kl_uniform_loss(decision: RoutingDecision) -> Tensor:
    """KL(P || uniform) of the batch marginal P: 0 when even, log E when collapsed."""
    _, soft = _loads(decision)
    return torch.log(torch.tensor(float(decision.num_experts), device=soft.device)) - entropy(soft)


@LOSSES.register("z_loss")
def z_loss(decision: RoutingDecision) -> Tensor:
    """Mean squared log-partition of the router's logits."""
    return _mean_over_tokens(torch.logsumexp(decision.logits, -1).square(), decision.padding_mask)


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
    if {"kl_uniform", "load_std"} <= {name for name, value in checked.items() if value > 0}:
        warnings.warn(
            "kl_uniform and load_std penalise the same thing (KL(P, uniform) is about half the squared coefficient of "
            "variation near balance); use one of them",
            stacklevel=2,
        )
    return checked


def routing_loss(decisions: Iterable[RoutingDecision], terms: Mapping[str, float]) -> Tensor | None:
    """Return sum_i coefficient_i * mean over layers of loss_i; ``None`` when there is nothing to add.

    Args:
        decisions: one per layer, with autograd history.
        terms: loss name to coefficient; 0 switches a term off.
    """
    layers = [decision.over_outputs() for decision in decisions]
    active = [(LOSSES.get(name), value) for name, value in terms.items() if value > 0]
    if not layers or not active:
        return None
    per_layer = [torch.stack([value * loss(layer) for loss, value in active]).sum() for layer in layers]
    return torch.stack(per_layer).mean()
