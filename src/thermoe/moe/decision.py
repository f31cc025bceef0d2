"""What a router is told (`RoutingContext`) and what it answers (`RoutingDecision`).

Both are plain tensors, so that a decision runs under `torch.compile` and inside a CUDA graph. They live here, below the
routers, because the layer builds the one and consumes the other.

Shape letters: T tokens of a call, E experts, K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """Where the T tokens of a call come from.

    Args:
        batch_size: sequences B in the call; tokens are laid out row by row, T = B * S.
        sequence_length: positions S per sequence in this call.
        padding_mask: bool (T,), true where the token is real; ``None`` when all are.
    """

    batch_size: int
    sequence_length: int
    padding_mask: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        """Whether each sequence contributes one position, as in cached generation."""
        return self.sequence_length == 1


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Which experts each token goes to, and with what weight.

    Args:
        logits: float32 (T, E), the router's scores, fast weights included, price and bias of selection excluded.
        probabilities: float32 (T, E), softmax of the logits.
        expert_index: int64 (T, K); the value E means "no expert" and costs no expert compute.
        weights: (T, K), combine weights; exactly 0 where there is no expert.
        padding_mask: bool (T,) or ``None``; padded tokens have no expert in any slot.
    """

    logits: Tensor
    probabilities: Tensor
    expert_index: Tensor
    weights: Tensor
    padding_mask: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def active(self) -> Tensor:
        """Bool (T, K): the slots that hold an expert."""
        return self.expert_index < self.num_experts

    @property
    def counts(self) -> Tensor:
        """float32 (E,): tokens sent to each expert."""
        flat = self.expert_index.reshape(-1)
        zeros = torch.zeros(self.num_experts + 1, device=flat.device, dtype=torch.float32)
        return zeros.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.float32))[: self.num_experts]

    @property
    def opened(self) -> Tensor:
        """Bool (E,): the experts that at least one token uses."""
        return self.counts > 0

    def detach(self) -> RoutingDecision:
        """Return the same decision without its autograd history."""
        return RoutingDecision(
            self.logits.detach(),
            self.probabilities.detach(),
            self.expert_index,
            self.weights.detach(),
            self.padding_mask,
        )
