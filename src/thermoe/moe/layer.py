"""`MoELayer`, a drop-in for a feed-forward network, and `MoEBlock`, the same with norm, dropout and residual.

The layer is three separate pieces: router (who goes where) -> dispatch (how rows travel) -> experts (what is computed).
The decision of the last forward stays on the layer, so that the signature of the model around it never changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.errors import RoutingError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.dispatch import find_backend
from thermoe.moe.experts import Experts
from thermoe.moe.losses import DEFAULT_BALANCE, check_loss_terms, routing_loss


class Routed(nn.Module):
    """A module that holds a router and the decision of its last forward: an MoE layer, or a router attached elsewhere.

    Attributes:
        router: may be exchanged at any time.
        last_routing: the RoutingDecision of the last forward; it carries gradients in training.
    """

    router: nn.Module
    last_routing: RoutingDecision | None

    def why_not(self, router: nn.Module) -> str | None:
        """Return why ``router`` cannot choose for this module, or ``None`` when it can."""
        return None


class MoELayer(Routed):
    """Router, dispatch and experts in the place of a feed-forward network.

    Args:
        router: maps ((T, D), RoutingContext) to a RoutingDecision.
        experts: the E networks.
        shared: one network that every token passes through beside its experts, or ``None``.
        output_bias: whether a bias (D,) shared by all experts is added once per token.
        dropout: probability of dropping an output value in training.
        backend: how experts are computed; see `run_experts`.

    Attributes:
        last_routing: the RoutingDecision of the last forward; it carries gradients in training.
        padding_mask: bool (B, S) of the next forward, true where the token is real, or ``None``; the model sets it.
        call_shape: (B, S) of the next forward for models that hand their tokens over as (T, D), or ``None``.
        token_ids: int64 (B, S) of the next forward, or ``None``; the model sets it, for routers that go by it.
        positions: int64 (B, S) or (1, S) of the next forward, or ``None``; likewise.
    """

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        *,
        shared: Experts | None = None,
        output_bias: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.output_bias = nn.Parameter(torch.zeros(experts.hidden_size)) if output_bias else None
        self.dropout = nn.Dropout(dropout)
        self.backend = backend
        find_backend(backend)  # an unknown name is an error now, not in the first forward
        self.last_routing: RoutingDecision | None = None
        self.padding_mask: Tensor | None = None
        self.call_shape: tuple[int, int] | None = None
        self.token_ids: Tensor | None = None
        self.positions: Tensor | None = None

    def _context(self, hidden_states: Tensor) -> RoutingContext:
        if hidden_states.ndim != 2:
            batch, length = hidden_states.shape[:2]
        elif self.call_shape is not None and self.call_shape[0] * self.call_shape[1] == hidden_states.shape[0]:
            batch, length = self.call_shape
        else:
            batch, length = 1, hidden_states.shape[0]
        mask = self.padding_mask
        if mask is not None:
            if mask.numel() != batch * length:
                raise RoutingError(
                    f"the padding mask has shape {tuple(mask.shape)}, the hidden states {tuple(hidden_states.shape)}",
                    where="MoELayer.padding_mask",
                    accepted=f"bool of shape {(batch, length)}, or None",
                    fix="set padding_mask for this forward, or to None",
                )
            mask = mask.reshape(-1).to(hidden_states.device, torch.bool)  # layers may be spread over devices
        noted = (_per_token(value, batch, length, hidden_states.device) for value in (self.token_ids, self.positions))
        return RoutingContext(batch, length, mask, *noted)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, S, D) or (T, D) to the same shape."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        decision: RoutingDecision = self.router(x_TD, self._context(hidden_states))
        self.last_routing = decision if torch.is_grad_enabled() else decision.detach()
        index, weights = decision.pairs()
        y_TD = self.experts(x_TD, index, weights, backend=self.backend)
        if decision.num_identity:
            y_TD = y_TD + x_TD * decision.identity_weight()
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if self.output_bias is not None:
            y_TD = y_TD + self.output_bias
        return self.dropout(y_TD).view_as(hidden_states)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last decision behind: autograd history cannot be copied or pickled."""
        noted = ("last_routing", "padding_mask", "call_shape", "token_ids", "positions")
        return {**super().__getstate__(), **dict.fromkeys(noted)}


def _per_token(noted: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
    """Return (B, S) or (1, S) as int64 (T,); ``None`` when what was noted is not of this call."""
    if noted is None or noted.shape[-1] != length or noted.shape[0] not in (1, batch):
        return None
    return noted.expand(batch, length).reshape(-1).to(device)


class MoEBlock(nn.Module):
    """LayerNorm -> MoE -> dropout -> residual.

    Args:
        layer: the MoE layer.
        norm_eps: epsilon of the LayerNorm.
        dropout: probability of dropping a value of the branch in training.
        balance: auxiliary losses and their coefficients.
    """

    def __init__(
        self,
        layer: MoELayer,
        *,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        balance: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(layer.experts.hidden_size, eps=norm_eps)
        self.moe = layer
        self.dropout = nn.Dropout(dropout)
        self.balance = check_loss_terms(DEFAULT_BALANCE if balance is None else balance)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Map (B, S, D) to the same shape.

        Returns:
            The tensor, and metrics on the device: `routing` (the decision), `aux_loss` (scalar or ``None``),
            `load` (E,) tokens per expert and `distinct_experts` (scalar).
        """
        branch = self.dropout(self.moe(self.norm(hidden_states)))
        routing = self.moe.last_routing
        assert routing is not None
        metrics = {
            "routing": routing,
            "aux_loss": routing_loss([routing], self.balance),
            "load": routing.counts,
            "distinct_experts": routing.opened.sum(),
        }
        return hidden_states + branch, metrics


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    """Yield (dotted name, layer) for every MoE layer of ``model``, in the order of its modules."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer):
            yield name, module


def routed_modules(model: nn.Module) -> Iterator[tuple[str, Routed]]:
    """Yield (dotted name, module) for all in ``model`` that holds a router of ours, in the order of its modules."""
    for name, module in model.named_modules():
        if isinstance(module, Routed):
            yield name, module


def collect_routing(model: nn.Module) -> dict[str, RoutingDecision]:
    """Return the decision of the last forward for every MoE layer and attached router, by dotted name."""
    return {name: module.last_routing for name, module in routed_modules(model) if module.last_routing is not None}
