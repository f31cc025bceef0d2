"""Reference routers: bounds and controls for every comparison, not for use."""

from __future__ import annotations

import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext
from thermoe.routers.base import ROUTERS, Router


@ROUTERS.register("random")
class RandomRouter(Router):
    """Uniformly random experts, k per token: the zero of routing accuracy.

    The choice is a fixed pseudo-random function of the bits of the token's own scores, so that it repeats and needs no
    generator state. A score that differs in its last bit, as another batch shape can make it, gives another choice.
    """

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return k experts in the order of a hash of the scores."""
        bits = logits.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        salt = torch.arange(1, self.num_experts + 1, device=logits.device) * 0x9E3779B1
        # Two rounds of a multiplicative hash; every column sees the whole row through its sum.
        mixed = ((bits.sum(-1, keepdim=True) ^ salt) * 0x85EBCA6B) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return torch.topk(mixed ^ (mixed >> 16), self.active_top_k or self.top_k, dim=-1).indices
