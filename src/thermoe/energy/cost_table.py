"""The cost model of one model as tables, so that the joules of many forwards, or of many choices, are one product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thermoe.energy.cost_model import CostModel
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class CostTable:
    """The cost model and the work of one model as tables, so that the joules of many forwards are one product.

    Args:
        forward_j: joules of a forward whatever its tokens do.
        token_j: joules of a token outside the experts.
        pair_j: float64 (L, E), joules of a token in an expert; 0 beyond the experts of a layer that has fewer.
        open_j: float64 (L, E), joules to open an expert; likewise.
        unit_j: the mean pair cost over all experts of all layers, which routers know as a cost of 1.
    """

    forward_j: float
    token_j: float
    pair_j: Tensor
    open_j: Tensor
    unit_j: float

    @classmethod
    def of(cls, cost: CostModel, work: ModelWork) -> CostTable:
        """Build the tables.

        Raises:
            ConfigError: a token-expert pair costs nothing, so that no price has a unit.
        """
        widest = max((layer.num_experts for layer in work.layers), default=0)
        pair = torch.zeros(len(work.layers), widest, dtype=torch.float64)
        opening = torch.zeros_like(pair)
        for row, layer in enumerate(work.layers):
            pair[row, : layer.num_experts] = torch.tensor(cost.pair_costs_j(layer), dtype=torch.float64)
            opening[row, : layer.num_experts] = torch.tensor(cost.open_costs_j(layer), dtype=torch.float64)
        experts = sum(layer.num_experts for layer in work.layers)
        unit_j = float(pair.sum()) / experts if experts else 0.0
        if not unit_j > 0:
            raise ConfigError(
                "in the cost model a token in an expert costs nothing",
                where="cost_model",
                accepted="a cost model whose pair_j_per_flop is above 0, and a model with experts",
                fix="use CostModel.prior(), or calibrate again: thermoe calibrate",
            )
        nothing: list[list[float]] = [[0.0] * layer.num_experts for layer in work.layers]
        forward_j = cost.forward_j(work, 0, nothing, nothing)
        return cls(forward_j, cost.forward_j(work, 1, nothing, nothing) - forward_j, pair, opening, unit_j)

    def joules(self, tokens: Tensor, pairs: Tensor, opened: Tensor) -> Tensor:
        """Return float64 (F,), the modelled joules of forwards: the same sum as `CostModel.forward_j`.

        Args:
            tokens: (F,).
            pairs: (F, L, E) token-expert pairs.
            opened: (F, L, E), 1 for an opened expert.
        """
        routed = (pairs.double() * self.pair_j + opened.double() * self.open_j).sum((-1, -2))
        return self.forward_j + self.token_j * tokens.double() + routed

    def relative(self, layer: int, experts: int) -> tuple[list[float], list[float]]:
        """Return (pair costs, opening costs) of a layer in units of ``unit_j``, for a priced router."""
        pair, opening = self.pair_j[layer, :experts] / self.unit_j, self.open_j[layer, :experts] / self.unit_j
        return pair.tolist(), opening.tolist()
