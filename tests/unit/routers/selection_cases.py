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


def near_ties(device: str = "cpu") -> tuple[PricedRouter, Tensor, RoutingContext]:
    """Return (router, logits, context) of groups in which two experts each are worth the same but for rounding.

    Half of the tokens are the other half with the experts of each pair exchanged, so that what is to be closed is a tie
    that the order of a sum decides, and either way is as good.
    """
    sequences, positions, experts = 16, 12, 16
    half = 1.5 * torch.randn(sequences // 2, positions, experts)
    logits = torch.cat([half, half[..., [e ^ 1 for e in range(experts)]]]).flatten(0, 1)
    router = PricedRouter(
        16, experts, 4, benefit="distortion", open_cost=[1.0] * experts, price=1.0, group_by_position=True
    )
    return router.eval().to(device), logits.to(device), RoutingContext(sequences, positions)


def objective(router: PricedRouter, logits: Tensor, index: Tensor, context: RoutingContext) -> Tensor:
    """Return float64 (S,): what the choice of each group costs: distortion, pairs and opened experts, as defined."""
    p = torch.softmax(logits.double(), -1)
    own = torch.zeros_like(p).scatter(-1, logits.topk(router.top_k, -1).indices, 1)
    used = torch.nn.functional.one_hot(index, p.shape[-1] + 1)[..., :-1].sum(1).double()
    w, then = ((p * chosen / (p * chosen).sum(-1, keepdim=True).clamp(min=1e-300)) for chosen in (own, used))
    cost = (router.kappa * router.sensitivity * (w - then).square() + router.price * router.pair_cost * used).sum(-1)
    opened = context.by_position(used).amax(1)
    return context.by_position(cost).sum(1) + (router.price * router.open_cost * opened).sum(-1)


def compare_near_ties(chosen: Tensor, expected: Tensor, case: tuple[PricedRouter, Tensor, RoutingContext]) -> int:
    """Return how many tokens differ, after a check that what the groups cost does not."""
    router, logits, context = case
    mine, theirs = (objective(router, logits, index, context) for index in (chosen, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)
    return int((chosen.sort(-1).values != expected.sort(-1).values).any(-1).sum())
