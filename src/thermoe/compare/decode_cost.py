"""What reading a stream costs by the cost model, if it were decoded: B sequences side by side, one position at a time.

Text is scored in one forward, with routers that group the tokens of one position as cached decoding does
(`group_by_position`); so each position is a step of decoding, with its own opened experts. Learning is shaped like
prefill: decoding leaves no graph behind, so that what is learned from is read once more.

Shape letters: B sequences, S positions, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.energy.cost_model import CostModel
from thermoe.energy.cost_table import CostTable
from thermoe.energy.work import REFERENCE_BYTES_PER_WEIGHT, ModelWork
from thermoe.moe.layer import collect_routing

#: Bytes an AdamW step moves per weight: master, both moments and gradient read, the first three written, in float32.
ADAMW_BYTES = 28


@dataclass(frozen=True, slots=True)
class Choices:
    """What the routers chose in one forward over (B, S) tokens.

    Args:
        sequences: B.
        positions: S.
        pairs: float64 (L, E), tokens sent to each expert.
        opened: float64 (L, E), positions at which each expert was open.
    """

    sequences: int
    positions: int
    pairs: Tensor
    opened: Tensor

    @property
    def distinct_experts(self) -> float:
        """Experts open at a position, mean over layers and positions."""
        return float(self.opened.sum()) / (self.opened.shape[0] * self.positions)

    @property
    def experts_per_token(self) -> float:
        """Experts of a token, mean over layers and tokens."""
        return float(self.pairs.sum()) / (self.pairs.shape[0] * self.positions * self.sequences)


@contextmanager
def choices_of(model: nn.Module) -> Iterator[Callable[[], Choices]]:
    """Yield a function that returns what the first forward since its last call chose.

    The first forward of a batch is the one that scores it; a judge's or a shadow's come after it and do not count.
    """
    kept: list[Choices] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not kept:
            rows = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            kept.append(_choices(module, *rows.shape))

    hook.in_graphs = True  # type: ignore[attr-defined]  # a forward that scores is never recorded
    handle = model.register_forward_hook(hook, with_kwargs=True)

    def take() -> Choices:
        found = kept[0]
        kept.clear()
        return found

    try:
        yield take
    finally:
        handle.remove()


def _choices(model: nn.Module, sequences: int, positions: int) -> Choices:
    pairs, opened = [], []
    for decision in collect_routing(model).values():
        index = decision.expert_index.view(sequences, positions, -1).transpose(0, 1).flatten(1)
        seen = torch.zeros(positions, decision.logits.shape[-1] + 1, device=index.device).scatter_(1, index, 1.0)
        opened.append(seen[:, : decision.num_experts].sum(0))
        pairs.append(decision.counts)
    both = torch.stack([torch.stack(pairs), torch.stack(opened)]).double().cpu()
    return Choices(sequences, positions, both[0], both[1])


class DecodeCost:
    """Joules of reading and of learning, from what was chosen.

    Args:
        model: its experts are of one number in all layers.
        cost_model: joules of work.

    Attributes:
        provenance: of every joule.
    """

    def __init__(self, model: nn.Module, cost_model: CostModel) -> None:
        work = ModelWork.of(model)
        self.table = CostTable.of(cost_model, work)
        self.provenance = cost_model.provenance
        weights = sum(p.numel() for p in model.parameters())
        self._step_j = cost_model.open_j_per_byte * ADAMW_BYTES * weights
        self._read_j = cost_model.open_j_per_byte * REFERENCE_BYTES_PER_WEIGHT * weights

    def routing_j(self, chosen: Choices) -> float:
        """Joules of the experts alone, decoded: opened anew at every position."""
        return float((chosen.pairs * self.table.pair_j + chosen.opened * self.table.open_j).sum())

    def decode_j(self, chosen: Choices) -> float:
        """Joules of decoding these tokens."""
        tokens = chosen.sequences * chosen.positions
        return chosen.positions * self.table.forward_j + tokens * self.table.token_j + self.routing_j(chosen)

    def forward_j(self, chosen: Choices) -> float:
        """Joules of one forward over the same tokens at once: an expert is opened once."""
        tokens = torch.tensor([chosen.sequences * chosen.positions])
        return float(self.table.joules(tokens, chosen.pairs.unsqueeze(0), (chosen.pairs > 0).unsqueeze(0)))

    def all_weights_j(self, chosen: Choices) -> float:
        """Joules of one step of all weights: forward, backward to activations and weights (twice a forward), AdamW.

        A gradient exists for every weight and is written and read once.
        """
        return 3 * self.forward_j(chosen) + 2 * self._read_j + self._step_j
