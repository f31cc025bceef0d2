"""The router contract: scores, selection and combine weights as three steps that subclasses override one by one.

Scores are computed in float32. The combine weights come from the gate's probabilities on the selected experts alone;
whatever steers the selection (a price, noise, a balancing bias) never enters them.

Shape letters: T tokens, E experts, K slots per token, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.registry import Registry
from thermoe.routers.fast_weights import FastWeights

Gate = Literal["renormalized", "probability", "ramped"]
GATES: tuple[Gate, ...] = ("renormalized", "probability", "ramped")

ROUTERS: Registry[type[Router]] = Registry("router", "thermoe.routers")


class Router(nn.Module):
    """Base of all routers.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token, K.
        gate: how the combine weight of a selected expert follows from its probability p:
            "renormalized" p / sum over the selection (Mixtral); "probability" p (Switch Transformer); "ramped"
            (1 - m) * 1 + m * E * p, where m is the buffer `ramp`. At m = 0 every weight is exactly 1, which makes a
            partitioned dense network exact, and the router still learns, because the 1 carries the gradient of log p;
            recovery training takes m to 1, where the gate follows the router in full.

    Attributes:
        weight: (E, D), the slow router.
        ramp: scalar buffer m of the gate "ramped".
        fast: what test-time training moves, or ``None``.
        active_top_k: when set, an integer of at most ``top_k`` used instead of it (random k in recovery training).

        fixed_k: class attribute, whether a token always wants all K slots, so that an empty one was dropped by a
            capacity. A subclass that leaves slots empty for another reason sets it to false.

    Raises:
        RoutingError: ``top_k`` is not in 1..E.
        UnknownNameError: no such gate.
    """

    fixed_k: ClassVar[bool] = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, gate: Gate = "renormalized") -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise RoutingError(
                f"top_k is {top_k} with {num_experts} experts",
                where="top_k",
                accepted=f"an integer from 1 to {num_experts}",
                fix="lower top_k or raise the number of experts",
            )
        if gate not in GATES:
            raise UnknownNameError.of("gate", str(gate), GATES, where="gate")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate: Gate = gate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02 * (768 / hidden_size) ** 0.5)
        self.ramp: Tensor
        self.register_buffer("ramp", torch.zeros(()))
        self.fast: FastWeights | None = None
        self.active_top_k: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments beyond the sizes that rebuild this router; saved with the model."""
        return {"gate": self.gate}

    def slow_scores(self, x_TD: Tensor) -> Tensor:
        """Return the float32 logits (T, E) of the trained router, without fast weights."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return float32 logits (T, E): slow router plus fast weights."""
        logits = self.slow_scores(x_TD)
        if self.fast is None:
            return logits
        with torch.autocast(x_TD.device.type, enabled=False):
            return logits + self.fast(x_TD.float())

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return int64 (T, K) expert ids, E for "no expert"."""
        raise NotImplementedError

    def combine_weights(self, probabilities: Tensor, expert_index: Tensor) -> Tensor:
        """Return the combine weights (..., K) of a selection, 0 where there is no expert.

        Args:
            probabilities: (..., E).
            expert_index: int64 (..., K), E for "no expert".
        """
        live = expert_index < self.num_experts
        p = F.pad(probabilities, (0, 1)).gather(-1, expert_index)
        if self.gate == "renormalized":
            p = torch.where(live, p, 0)
            return p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        if self.gate == "probability":
            return torch.where(live, p, 0)
        log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        one = 1 + (log_p - log_p.detach())
        return torch.where(live, (1 - self.ramp) * one + self.ramp * self.num_experts * p, 0)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> RoutingDecision:
        """Route T tokens.

        Args:
            x_TD: (T, D).
            context: where the tokens come from; one sequence without padding when ``None``.
        """
        context = context or RoutingContext(1, x_TD.shape[0])
        logits = self.scores(x_TD)
        probabilities = torch.softmax(logits, dim=-1)
        index = self.select(logits, probabilities, context)
        if context.padding_mask is not None:
            index = torch.where(context.padding_mask.unsqueeze(-1), index, self.num_experts)
        weights = self.combine_weights(probabilities, index).to(x_TD.dtype)
        return RoutingDecision(logits, probabilities, index, weights, context.padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, gate={self.gate}"
