"""What a router is told (`RoutingContext`) and what it answers (`RoutingDecision`).

Both are plain tensors, so that a decision runs under `torch.compile` and inside a CUDA graph. They live here, below the
routers, because the layer builds the one and consumes the other.

Shape letters: T tokens of a call, E experts, O outputs of the router (E, then its zero-compute experts: first those
that give the token itself, then those that give zero; O = E for a router without such), K slots per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from thermoe.moe.fused_count import can_count, count_experts


@dataclass(frozen=True, slots=True)
class RoutingContext:
    """Where the T tokens of a call come from.

    Args:
        batch_size: sequences B in the call; tokens are laid out row by row, T = B * S.
        sequence_length: positions S per sequence in this call.
        padding_mask: bool (T,), true where the token is real; ``None`` when all are.
        token_ids: int64 (T,), or ``None`` where they are not known.
        positions: int64 (T,), each token's place in its sequence, or ``None`` where only that in the call is known.
    """

    batch_size: int
    sequence_length: int
    padding_mask: Tensor | None = None
    token_ids: Tensor | None = None
    positions: Tensor | None = None

    @property
    def is_decode(self) -> bool:
        """Whether each sequence contributes one position, as in cached generation."""
        return self.sequence_length == 1

    def real(self, like: Tensor) -> Tensor:
        """Return bool (T,) on the device of ``like`` (T, ...): the tokens that are no padding."""
        if self.padding_mask is not None:
            return self.padding_mask
        return torch.ones(like.shape[0], dtype=torch.bool, device=like.device)

    def by_position(self, values: Tensor) -> Tensor:
        """Return (T, ...) as (S, B, ...): in one row the tokens that cached generation would route together."""
        return values.unflatten(0, (self.batch_size, self.sequence_length)).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Which experts each token goes to, and with what weight.

    Args:
        logits: float32 (T, O), the router's scores, fast weights included, price and bias of selection excluded.
        probabilities: float32 (T, O), what the router's `probabilities` makes of the logits; softmax for most.
        expert_index: int64 (T, K); below E an expert, from E to O - 1 a zero-compute one, and the value O means "no
            expert". What is not below E costs no expert compute.
        weights: (T, K), combine weights; exactly 0 where there is neither an expert nor an identity.
        padding_mask: bool (T,) or ``None``; padded tokens have no expert in any slot.
        num_identity: outputs after the E experts that give the token itself.
        num_zero: outputs after these that give zero.
    """

    logits: Tensor
    probabilities: Tensor
    expert_index: Tensor
    weights: Tensor
    padding_mask: Tensor | None = None
    num_identity: int = 0
    num_zero: int = 0

    @property
    def num_experts(self) -> int:
        """E, the experts that compute."""
        return self.logits.shape[-1] - self.num_identity - self.num_zero

    @property
    def active(self) -> Tensor:
        """Bool (T, K): the slots that hold an expert, zero-compute ones not counted."""
        return self.expert_index < self.num_experts

    @property
    def identity(self) -> Tensor:
        """Bool (T, K): the slots that hold an identity expert."""
        return ~self.active & (self.expert_index < self.num_experts + self.num_identity)

    @property
    def counts(self) -> Tensor:
        """float32 (E,): tokens sent to each expert."""
        return self._counted()[0]

    @property
    def opened(self) -> Tensor:
        """Bool (E,): the experts that at least one token uses."""
        return self._counted()[1]

    def _counted(self) -> tuple[Tensor, Tensor]:
        if can_count(self.expert_index):
            return count_experts(self.expert_index, self.num_experts)
        flat = self.expert_index.reshape(-1)
        outputs = self.logits.shape[-1]
        zeros = torch.zeros(outputs + 1, device=flat.device, dtype=torch.float32)
        counts = zeros.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.float32))[: self.num_experts]
        return counts, counts > 0

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return ids (T, K) and weights (T, K) of the experts that compute: E and exactly 0 in every other slot."""
        if not self.num_identity + self.num_zero:
            return self.expert_index, self.weights
        active = self.active
        return torch.where(active, self.expert_index, self.num_experts), torch.where(active, self.weights, 0)

    def identity_weight(self) -> Tensor:
        """Return (T, 1), the share of the token itself in its output: the sum of its identity experts' weights."""
        return torch.where(self.identity, self.weights, 0).sum(-1, keepdim=True)

    def over_outputs(self) -> RoutingDecision:
        """Return the same decision with zero-compute experts as experts like any (E = O): what a balance loss sees."""
        return replace(self, num_identity=0, num_zero=0)

    def detach(self) -> RoutingDecision:
        """Return the same decision without its autograd history."""
        return replace(
            self,
            logits=self.logits.detach(),
            probabilities=self.probabilities.detach(),
            weights=self.weights.detach(),
        )
