"""Expert networks, stacked in three-dimensional weights in the layout of Hugging Face transformers 5.

Two forms: gated, `down(act(gate(x)) * up(x))` (SwiGLU with `act = silu`; Shazeer, arXiv 2002.05202), and ungated,
`down(act(up(x)))` (the MLP of GPT-2 with `act = gelu_new`).

Experts of unequal widths are stored in blocks. A network is a sum over its hidden neurons, so an expert of width m * b
equals m networks of width b with the same combine weight; G = sum m_e blocks of one width b lie in one tensor, those of
an expert side by side, and every product works on blocks. Experts of one width are one block each.

Shape letters: T tokens, E experts, G blocks, D model width, F width of a block (of an expert, where all are alike).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from thermoe.errors import ConfigError, near_match
from thermoe.moe.offload import check_readable

Number = TypeVar("Number", int, float)
#: The most matrices that `grouped_mm` takes.
MAX_BLOCKS = 1023


def split_widths(widths: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Return (b, blocks of each expert) of experts with ``widths`` neurons: b is their greatest common divisor.

    Raises:
        ConfigError: no widths, one below 1, or more than `MAX_BLOCKS` blocks.
    """
    if not widths or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
        raise ConfigError(
            f"the experts' widths are {list(widths)}",
            where="widths",
            accepted="one integer of at least 1 per expert",
            fix="give the neurons of each expert, such as [128, 64, 64]",
        )
    block = math.gcd(*widths)
    if sum(widths) // block > MAX_BLOCKS:
        near = _coarser(widths)
        raise ConfigError(
            f"the widths have the greatest common divisor {block}, which makes {sum(widths) // block} blocks",
            where="widths",
            accepted=f"widths whose common divisor leaves at most {MAX_BLOCKS} blocks, the most that grouped_mm takes",
            fix=f"use {near}" if near else "make all widths multiples of a larger number, such as 64",
        )
    return block, tuple(width // block for width in widths)


def _coarser(widths: Sequence[int]) -> list[int] | None:
    """Return the nearest widths of the same sum in few enough blocks, or ``None`` if there are none."""
    total, experts = sum(widths), len(widths)
    for count in range(min(total, MAX_BLOCKS), experts - 1, -1):
        if total % count:
            continue
        # Each expert keeps a block; the rest is shared out by what is still missing, the largest remainder first.
        block = total // count
        exact = [width / block for width in widths]
        blocks = [max(1, math.floor(share)) for share in exact]
        while sum(blocks) > count:
            most = max((e for e in range(experts) if blocks[e] > 1), key=lambda e: blocks[e] - exact[e])
            blocks[most] -= 1
        for e in sorted(range(experts), key=lambda e: blocks[e] - exact[e])[: count - sum(blocks)]:
            blocks[e] += 1
        return [m * block for m in blocks]
    return None


class Experts(nn.Module):
    """E feed-forward networks, of one width or, in blocks, of several.

    Parameters are `gate_up_proj` (G, 2F, D) when gated, else `up_proj` (G, F, D), and `down_proj` (G, D, F); with
    biases also `up_bias` (G, 2F or F) and `down_bias` (E, D). Without ``blocks`` G is E. With them there is a buffer
    `block_table`, int64 (E + 1, M): the blocks of each expert, G where it has fewer than M, and G throughout the last
    row, which stands for "no expert". It is saved, so that weights are never read with the blocks of other widths.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F.
        activation: a name of `transformers.activations.ACT2FN`.
        gated: whether there is a gate projection.
        up_bias: whether the up-projection has a bias.
        down_bias: whether each expert adds its own bias after the down-projection (a bias shared by all experts
            belongs to the layer instead, where it is added once per token).
        blocks: how many blocks of width F each expert has; ``None`` is one each. See `split_widths`.

    Raises:
        ConfigError: a size is below 1, the activation is unknown, or ``blocks`` do not fit.
    """

    block_table: Tensor | None

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
        blocks: Sequence[int] | None = None,
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
        self.blocks = None if blocks is None else _checked_blocks(blocks, num_experts, down_bias)
        self.num_experts = num_experts
        self.num_blocks = num_experts if self.blocks is None else sum(self.blocks)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.gated = gated
        self.act_fn = ACT2FN[activation]
        rows = 2 * intermediate_size if gated else intermediate_size
        up = nn.Parameter(torch.empty(self.num_blocks, rows, hidden_size))
        if gated:
            self.gate_up_proj = up
        else:
            self.up_proj = up
        self.down_proj = nn.Parameter(torch.empty(self.num_blocks, hidden_size, intermediate_size))
        self.up_bias = nn.Parameter(torch.zeros(self.num_blocks, rows)) if up_bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, hidden_size)) if down_bias else None
        self.register_buffer("block_table", None if self.blocks is None else torch.tensor(self.table_rows()))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution of standard deviation ``std``; biases become 0."""
        if self.block_table is not None:
            self.block_table.copy_(torch.tensor(self.table_rows()))
        nn.init.normal_(self.up_weight, std=std)
        nn.init.normal_(self.down_proj, std=std)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def up_weight(self) -> nn.Parameter:
        """The (G, 2F or F, D) up-projection, whatever its name."""
        return self.gate_up_proj if self.gated else self.up_proj

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each of the E experts."""
        return tuple(m * self.intermediate_size for m in self.blocks or (1,) * self.num_experts)

    @property
    def parameters_by_expert(self) -> tuple[int, ...]:
        """Number of weights and biases of each of the E experts."""
        block = sum(p.numel() for p in self.parameters()) // self.num_blocks
        return tuple(m * block for m in self.blocks or (1,) * self.num_experts)

    @property
    def flops_per_pair_by_expert(self) -> tuple[int, ...]:
        """Floating-point operations of one token in each of the E experts; see `flops_per_pair`."""
        return tuple(2 * self.hidden_size * width * (3 if self.gated else 2) for width in self.widths)

    @property
    def bytes_by_expert(self) -> tuple[int, ...]:
        """Bytes read to open each of the E experts."""
        return tuple(count * self.down_proj.element_size() for count in self.parameters_by_expert)

    @property
    def parameters_per_expert(self) -> int:
        """Number of weights and biases of one expert, where all are alike."""
        return one_of_all(self.parameters_by_expert, "parameters_per_expert", "parameters_by_expert")

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of one token in one expert (2 per multiply-add, projections only), all alike."""
        return one_of_all(self.flops_per_pair_by_expert, "flops_per_pair", "flops_per_pair_by_expert")

    @property
    def bytes_per_expert(self) -> int:
        """Bytes read to open one expert, where all are alike."""
        return one_of_all(self.bytes_by_expert, "bytes_per_expert", "bytes_by_expert")

    def table_rows(self) -> list[list[int]]:
        """Return what `block_table` holds: (E + 1, M) block numbers, G for "none"."""
        rows, start, most = [], 0, max(self.blocks or (1,))
        for m in self.blocks or (1,) * self.num_experts:
            rows.append([*range(start, start + m), *[self.num_blocks] * (most - m)])
            start += m
        return [*rows, [self.num_blocks] * most]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        extra: Any,
        errors: Any,
    ) -> None:
        """Load, unless the weights lie in blocks of other widths: of the same shapes, but of other experts."""
        table = state_dict.get(prefix + "block_table")
        if self.blocks is not None and table is not None and not table.is_meta and table.tolist() != self.table_rows():
            errors.append(f"{prefix}block_table: the blocks are those of other widths than {self.widths}")
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, extra, errors)

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
            outputs = self.forward_blocks(x_TD)
            return outputs[0] if self.num_blocks == 1 else outputs.sum(0)
        from thermoe.moe.dispatch import run_experts  # it knows this class

        check_readable(self.down_proj, x_TD, where="Experts.forward")
        return run_experts(x_TD, expert_index, weights, self, backend=backend)

    def forward_blocks(self, x_TD: Tensor) -> Tensor:
        """Run every block on every token: (T, D) -> (G, T, D)."""
        check_readable(self.down_proj, x_TD, where="Experts.forward_all")
        up = torch.einsum("td,efd->etf", x_TD, self.up_weight)
        if self.up_bias is not None:
            up = up + self.up_bias.unsqueeze(1)
        out = torch.einsum("etf,edf->etd", self.activate(up), self.down_proj)
        return out if self.down_bias is None else out + self.down_bias.unsqueeze(1)

    def forward_all(self, x_TD: Tensor) -> Tensor:
        """Run every expert on every token: (T, D) -> (E, T, D). For references, oracles and audits."""
        out_GTD = self.forward_blocks(x_TD)
        if self.blocks is None:
            return out_GTD
        return torch.stack([part.sum(0) for part in out_GTD.split(list(self.blocks))])

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        kind = "gated" if self.gated else "ungated"
        width = f"intermediate_size={self.intermediate_size}" if self.blocks is None else f"widths={self.widths}"
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, {width}, {kind} {self.activation}"


def one_of_all(values: Sequence[Number], name: str, by_expert: str) -> Number:
    """Return the number that all experts share.

    Raises:
        ConfigError: they differ.
    """
    if len(set(values)) != 1:
        raise ConfigError(
            f"the experts differ: {name} is {min(values)} to {max(values)}",
            where=name,
            accepted="experts of one width",
            fix=f"read {by_expert}, which has one number for each expert",
        )
    return values[0]


def _checked_blocks(blocks: Sequence[int], num_experts: int, down_bias: bool) -> tuple[int, ...]:
    if len(blocks) != num_experts or any(m < 1 for m in blocks) or sum(blocks) > MAX_BLOCKS:
        raise ConfigError(
            f"blocks are {list(blocks)} for {num_experts} experts",
            where="blocks",
            accepted=f"one integer of at least 1 per expert, {MAX_BLOCKS} in all",
            fix="take them from thermoe.moe.experts.split_widths",
        )
    if down_bias:
        raise ConfigError(
            "experts in blocks would add their own output bias once per block",
            where="down_bias",
            accepted="False with blocks; expert_bias=False with expert_widths in a configuration",
            fix="use one output bias for the layer (MoELayer(output_bias=True)), or experts of one width",
        )
    return tuple(blocks)
