"""Expert networks, stacked in three-dimensional weights in the layout of Hugging Face transformers 5.

Two forms: gated, `down(act(gate(x)) * up(x))` (SwiGLU with `act = silu`; Shazeer, arXiv 2002.05202), and ungated,
`down(act(up(x)))` (the MLP of GPT-2 with `act = gelu_new`).

Shape letters: T tokens, E experts, D model width, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from thermoe.errors import ConfigError, near_match
from thermoe.moe.offload import check_readable


class Experts(nn.Module):
    """E feed-forward networks of the same shape.

    Parameters are `gate_up_proj` (E, 2F, D) when gated, else `up_proj` (E, F, D), and `down_proj` (E, D, F); with
    ``bias`` also `up_bias` (E, 2F or F) and `down_bias` (E, D).

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F.
        activation: a name of `transformers.activations.ACT2FN`.
        gated: whether there is a gate projection.
        up_bias: whether the up-projection has a bias.
        down_bias: whether each expert adds its own bias after the down-projection (a bias shared by all experts
            belongs to the layer instead, where it is added once per token).

    Raises:
        ConfigError: a size is below 1, or the activation is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        up_bias: bool = False,
        down_bias: bool = False,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_experts", num_experts),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            if size < 1:
                raise ConfigError(
                    f"{name} is {size}", where=name, accepted="an integer of at least 1", fix=f"raise {name}"
                )
        if activation not in ACT2FN:
            near = near_match(activation, ACT2FN)
            raise ConfigError(
                f"unknown activation {activation!r}",
                where="activation",
                accepted="a name of transformers.activations.ACT2FN",
                fix=f"did you mean {near!r}?" if near else "use 'silu' or 'gelu_new'",
            )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.gated = gated
        self.act_fn = ACT2FN[activation]
        rows = 2 * intermediate_size if gated else intermediate_size
        up = nn.Parameter(torch.empty(num_experts, rows, hidden_size))
        if gated:
            self.gate_up_proj = up
        else:
            self.up_proj = up
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.up_bias = nn.Parameter(torch.zeros(num_experts, rows)) if up_bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, hidden_size)) if down_bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution of standard deviation ``std``; biases become 0."""
        nn.init.normal_(self.up_weight, std=std)
        nn.init.normal_(self.down_proj, std=std)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def up_weight(self) -> nn.Parameter:
        """The (E, 2F or F, D) up-projection, whatever its name."""
        return self.gate_up_proj if self.gated else self.up_proj

    @property
    def parameters_per_expert(self) -> int:
        """Number of weights and biases of one expert."""
        return sum(p.numel() for p in self.parameters()) // self.num_experts

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of one token in one expert (2 per multiply-add, projections only)."""
        return 2 * self.hidden_size * self.intermediate_size * (3 if self.gated else 2)

    @property
    def bytes_per_expert(self) -> int:
        """Bytes read to open one expert."""
        return self.parameters_per_expert * self.down_proj.element_size()

    def activate(self, up: Tensor) -> Tensor:
        """Apply the activation, and the gate when there is one: (..., 2F or F) -> (..., F)."""
        if not self.gated:
            return self.act_fn(up)
        gate, value = up.chunk(2, dim=-1)
        return self.act_fn(gate) * value

    def forward(
        self, x_TD: Tensor, expert_index: Tensor | None = None, weights: Tensor | None = None, *, backend: str = "auto"
    ) -> Tensor:
        """Return sum_k w_tk * expert_{i_tk}(x_t), or the sum of all experts where no choice is given.

        Calling the module rather than `run_experts` lets accelerate bring offloaded weights in.

        Args:
            x_TD: (T, D).
            expert_index: int64 (T, K), E meaning "no expert"; ``None`` for every expert with weight 1.
            weights: (T, K), 0 where there is no expert; ``None`` with ``expert_index``.
            backend: see `run_experts`.

        Returns:
            (T, D) in the dtype of ``x_TD``.
        """
        if expert_index is None or weights is None:
            outputs = self.forward_all(x_TD)
            return outputs[0] if self.num_experts == 1 else outputs.sum(0)
        from thermoe.moe.dispatch import run_experts  # it knows this class

        check_readable(self.down_proj, x_TD, where="Experts.forward")
        return run_experts(x_TD, expert_index, weights, self, backend=backend)

    def forward_all(self, x_TD: Tensor) -> Tensor:
        """Run every expert on every token: (T, D) -> (E, T, D). For references, oracles and audits."""
        check_readable(self.down_proj, x_TD, where="Experts.forward_all")
        up = torch.einsum("td,efd->etf", x_TD, self.up_weight)
        if self.up_bias is not None:
            up = up + self.up_bias.unsqueeze(1)
        out = torch.einsum("etf,edf->etd", self.activate(up), self.down_proj)
        return out if self.down_bias is None else out + self.down_bias.unsqueeze(1)

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        kind = "gated" if self.gated else "ungated"
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, {kind} {self.activation}"
        )
