"""Tokens per expert over the whole batch of an optimiser step: all its micro-batches, on all ranks.

A balance loss on one micro-batch alone asks for an even load within a few sequences, which keeps experts from
specialising on a domain. With the hard share f taken over the global batch and the soft share P over the micro-batch at
hand it asks for an even load over the batch (arXiv 2501.11873). It costs one small sum over ranks per micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingDecision


class GlobalLoad:
    """Counts of the optimiser step so far, per layer; never waits for the device.

    Call `start_step` before the first micro-batch of a step, and `add` after the forward of each; `routing_loss` then
    reads the shares. With `torch.distributed` in use every rank has to do so equally often, since each `add` is a sum
    over ranks.

    Args:
        group: the ranks whose tokens make up the batch; all when ``None``. Ranks that share their tokens (tensor
            parallel) do no harm: f is a share.
        memory: how much of the counts the next step keeps, from 0 (the batch of this step alone) to below 1, for
            training on few tokens a step; 0.99 is an average over about a hundred steps.

    Raises:
        ConfigError: the memory is not in 0..1, 1 excluded.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None, *, memory: float = 0.0) -> None:
        if not 0 <= memory < 1:
            raise ConfigError(
                f"memory is {memory}",
                where="memory",
                accepted="a number from 0 to below 1",
                fix="leave it out to count the tokens of one step alone",
            )
        self.group = group
        self.memory = memory
        self._counts: Tensor | None = None
        self._sizes: list[int] = []

    def start_step(self) -> None:
        """Forget the counts of the step before, or all but `memory` of them."""
        self._counts = self._counts * self.memory if self._counts is not None and self.memory else None

    def add(self, decisions: Iterable[RoutingDecision]) -> None:
        """Count a micro-batch.

        Args:
            decisions: one per layer, the layers in the same order at every call of a step.

        Raises:
            RoutingError: the layers differ from those counted before.
        """
        parts = [_counts(decision) for decision in decisions]
        if not parts:
            return
        sizes = [part.numel() for part in parts]
        new = torch.cat(parts)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(new, group=self.group)
        if self._counts is None:
            self._counts, self._sizes = new, sizes
        elif sizes == self._sizes:
            self._counts = self._counts.to(new.device) + new
        else:
            raise RoutingError(
                f"this micro-batch has layers of {sizes} experts, those before it had {self._sizes}",
                where="GlobalLoad.add",
                accepted="the same layers, in the same order, all through a step",
                fix="keep one GlobalLoad per model, and call start_step() after changing the model",
            )

    def shares(self) -> list[Tensor]:
        """Return each layer's f, float (E,), over the step so far and all ranks; none before the first `add`."""
        if self._counts is None:
            return []
        tiny = torch.finfo(self._counts.dtype).tiny
        return [counts / counts.sum().clamp(min=tiny) for counts in self._counts.split(self._sizes)]

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint; they matter between steps only where there is a `memory`."""
        return {"counts": None if self._counts is None else self._counts.cpu(), "sizes": list(self._sizes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts of `state_dict`."""
        self._counts, self._sizes = state["counts"], list(state["sizes"])


def _counts(decision: RoutingDecision) -> Tensor:
    """Return float32 (O,) tokens per output of the router; what is not an expert but can be chosen is one of them."""
    outputs, flat = decision.logits.shape[-1], decision.expert_index.reshape(-1)
    zeros = torch.zeros(outputs + 1, device=flat.device)
    return zeros.scatter_add(0, flat, torch.ones_like(flat, dtype=torch.float32))[:outputs]
