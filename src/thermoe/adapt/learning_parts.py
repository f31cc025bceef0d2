"""Several steps from one batch: its sequences in parts, each read again with what the part before has taught.

A step per batch of thousands of tokens is few steps: on shifted text four of them, each on a quarter of the sequences
and with a gradient of its own, learned faster than one four times as long. Every part is a forward and a backward,
where a single step can use the graph of the forward that scored; memory falls to the activations of a part.

Where the choice for a sequence depends on the others of its batch (tokens decoded together share what is opened), the
parts are given the experts that the whole batch chose; the gradient reaches a router through the weights of what it
chose, not through the choice.

Shape letters: B sequences, S positions, K slots.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from thermoe.moe.layer import routed_modules
from thermoe.routers.base import Router


def parts_of(weights: Tensor, steps: int, seed: str) -> list[list[int]]:
    """Return the sequences with a token to learn from, of weights (B, S - 1), in at most ``steps`` parts."""
    rows = (weights > 0).any(-1).nonzero().flatten().tolist()
    random.Random(seed).shuffle(rows)
    many = max(1, min(steps, len(rows)))
    return [sorted(rows[i::many]) for i in range(many)]


def choices(model: nn.Module, shape: tuple[int, int]) -> list[Tensor | None] | None:
    """Return by layer the ids (B, S, K) of the last forward, ``None`` for a layer without a router of ours.

    ``None`` altogether where a layer saw other tokens than the (B, S) of the model, so that rows cannot be told.
    """
    found: list[Tensor | None] = []
    for _, module in routed_modules(model):
        decision = module.last_routing
        if not isinstance(module.router, Router) or decision is None:
            found.append(None)
            continue
        if decision.expert_index.shape[0] != shape[0] * shape[1]:
            return None
        found.append(decision.expert_index.view(*shape, -1))
    return found


@contextmanager
def unsteered(model: nn.Module) -> Iterator[None]:
    """Let every token have its own top-k inside the context, whatever price or capacity its router has."""
    routers = [module.router for _, module in routed_modules(model) if isinstance(module.router, Router)]
    try:
        for router in routers:
            router.unsteered = True
        yield
    finally:
        for router in routers:
            router.unsteered = False


def of_rows(chosen: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """Return by layer the ids (T, K) of some sequences, int64 (R,), of those that `choices` returned."""
    return [None if ids is None else ids[rows.to(ids.device)].flatten(0, 1) for ids in chosen]


@contextmanager
def replayed(model: nn.Module, chosen: Sequence[Tensor | None] | None) -> Iterator[None]:
    """Give tokens what was chosen for them, int64 (T, K) by layer, inside; with ``None`` routers choose anew."""
    modules = [module for _, module in routed_modules(model)]
    set_on: list[Router] = []
    try:
        for module, ids in zip(modules, [None] * len(modules) if chosen is None else chosen, strict=True):
            if ids is not None and isinstance(module.router, Router):
                module.router.replay = ids
                set_on.append(module.router)
        yield
    finally:
        for router in set_on:
            router.replay = None
