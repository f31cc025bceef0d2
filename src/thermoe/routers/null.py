"""Zero-compute experts: the router may give a slot to "nothing" or to "the token itself", and so use fewer experts.

AdaMoE (arXiv 2406.13233) adds null experts that return 0; MoE++ (arXiv 2410.07348) adds to these copies of the input.
With K slots over the E experts and n zero-compute ones each token chooses how many experts it takes. Zero experts get
no weight: the rest is renormalised without them, and a token that has nothing else gets exactly 0. An identity expert
weighs x like an expert's output.

Where a token takes one expert, or a renormalised weight has no rival, the weight is 1 whatever the scores are: then the
choice against a zero expert learns from the balance loss alone. With the gate "probability" it learns from both.

What differs: MoE++ has constant experts, too, and AdaMoE averages the load of its null experts in the balance loss;
here a balance loss sees each zero-compute expert as an expert among others.

Shape letters: T tokens, E experts, O = E + identity + zero outputs, K slots per token, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.base import ROUTERS, Gate, Router, check_option

MOST = 4096


@ROUTERS.register("null")
class NullRouter(Router):
    """Top-k over experts and zero-compute experts.

    Fast weights move the scores of the E experts, against which those of the zero-compute ones stand still.

    Args:
        hidden_size: D.
        num_experts: E, the experts that compute.
        top_k: slots per token; an expert that computes, the token itself or nothing may be in each.
        gate: see `Router`.
        num_zero: experts that return 0. With ``top_k`` or more a token can do without any expert.
        num_identity: experts that return the token itself.

    Attributes:
        null_weight: (num_identity + num_zero, D), their rows of the router.

    Raises:
        ConfigError: a number is negative, or both are 0.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = "renormalized",
        num_zero: int = 1,
        num_identity: int = 0,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("num_zero", num_zero, 0, MOST, usual=1, whole=True)
        check_option("num_identity", num_identity, 0, MOST, usual=0, whole=True)
        if not num_zero + num_identity:
            raise ConfigError(
                "num_zero and num_identity are both 0",
                where="num_zero",
                accepted="at least one zero-compute expert",
                fix='use the router "topk", which has none',
            )
        self.num_zero, self.num_identity = num_zero, num_identity
        self.null_weight = nn.Parameter(torch.empty(num_identity + num_zero, hidden_size))
        nn.init.normal_(self.null_weight, std=0.02 * (768 / hidden_size) ** 0.5)

    @classmethod
    def why_not_attached(cls, kind: str) -> str | None:
        """Refuse: the model's own router has no scores for them."""
        return "its zero-compute experts have no scores in the model's own router"

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "num_zero": self.num_zero, "num_identity": self.num_identity}

    def slow_scores(self, x_TD: Tensor) -> Tensor:
        """Return the float32 logits (T, O) of the trained router, without fast weights."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return torch.cat((super().slow_scores(x_TD), F.linear(x_TD.float(), self.null_weight.float())), -1)

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return float32 logits (T, O): slow router plus fast weights."""
        logits = self.slow_scores(x_TD)
        if self.fast is None:
            return logits
        with torch.autocast(x_TD.device.type, enabled=False):
            correction = self.fast(x_TD.float(), logits[:, : self.num_experts])
            return logits + F.pad(correction, (0, self.num_outputs - self.num_experts))

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the top-k of all outputs."""
        return logits.topk(self.active_top_k or self.top_k, dim=-1).indices
