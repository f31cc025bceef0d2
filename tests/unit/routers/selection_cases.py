"""Cases of priced selection on which the kernel is held against the PyTorch code, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext
from thermoe.routers.priced import PricedRouter

#: sequences, positions, experts, slots
SHAPES = [(4, 3, 8, 2), (16, 1, 32, 4), (1, 1, 32, 4), (7, 2, 24, 3), (16, 1, 64, 8), (5, 1, 8, 8)]
PRICES = (0.001, 0.02, 0.1, 1.0)


def cases(shape: tuple[int, int, int, int], device: str = "cpu") -> Iterator[tuple[PricedRouter, Tensor, Any]]:
    """Yield (router, tokens, context) over drop passes, weights of favourites, prices, padding and both phases."""
    batch, length, experts, top_k = shape
    for drop, favourite_weight in (("all", 1.0), ("all", 4.0), ("phase2", 1.0), ("none", 1.0)):
        for price in PRICES:
            for decode in (True, False):
                router = PricedRouter(
                    16,
                    experts,
                    top_k,
                    benefit="distortion",
                    open_cost=(2 * torch.rand(experts)).tolist(),
                    pair_cost=(0.1 * torch.rand(experts)).tolist(),
                    sensitivity=(torch.rand(experts) + 0.2).tolist(),
                    price=price,
                    kappa=1.3,
                    drop=drop,  # type: ignore[arg-type]
                    favourite_weight=favourite_weight,
                    group_by_position=decode,
                    batch_invariant=not decode,
                ).eval()
                with torch.no_grad():
                    router.weight.normal_(std=0.5)
                mask = torch.rand(batch * length) < 0.8 if length > 1 else None
                context = RoutingContext(batch, length, None if mask is None else mask.to(device))
                yield router.to(device), torch.randn(batch * length, 16).to(device), context
