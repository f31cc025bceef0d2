"""Fast weights: the part of a router that test-time training moves, zero at the start.

z'_t = z_t + delta + D x_t with x the router's own input: the full family, as general as the slow router itself. At zero
the sum is the slow router bit for bit; a bias alone (`bias_only`) can repair constant shifts and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FastWeights(nn.Module):
    """Additive correction to router logits.

    Args:
        hidden_size: D.
        num_experts: E.
        bias_only: leave out the matrix.

    Attributes:
        delta: float32 (E,).
        matrix: float32 (E, D), or ``None``.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, bias_only: bool = False) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(num_experts))
        self.matrix = None if bias_only else nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map float32 (T, D) to the correction (T, E)."""
        if self.matrix is None:
            return self.delta.expand(x_TD.shape[0], -1)
        return F.linear(x_TD, self.matrix, self.delta)

    @torch.no_grad()
    def reset(self) -> None:
        """Return to exactly zero: the slow router."""
        for parameter in self.parameters():
            parameter.zero_()
