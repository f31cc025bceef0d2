"""Which neurons of a dense feed-forward network each expert holds.

A conversion is an order of the neurons, cut into experts of given widths; everything else follows from it. Clusters
put neurons with similar input weights together (k-means with given sizes; MoEfication, arXiv 2110.01786), so that a
token needs few experts; the always-on part takes the neurons with the largest weights, a stand-in for the most active
ones that needs no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.errors import ConfigError, ConversionError, UnknownNameError
from thermoe.models.families import FFNWeights
from thermoe.moe.experts import split_widths

Grouping = Literal["contiguous", "clustered"]
GROUPINGS: tuple[Grouping, ...] = ("contiguous", "clustered")
ROUNDS = 10


def largest_neurons(ffn: FFNWeights, count: int) -> tuple[Tensor, Tensor]:
    """Return (the ``count`` neurons with the largest input times output weights, the rest), each in order."""
    size = ffn.up.float().norm(dim=1) * ffn.down.float().norm(dim=0)
    if ffn.gate is not None:
        size = size * ffn.gate.float().norm(dim=1)
    chosen = torch.zeros(len(size), dtype=torch.bool, device=size.device)
    chosen[size.topk(count).indices] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def check_widths(widths: Any, num_experts: int, ffn_width: int, shared: int) -> list[int] | None:
    """Return the widths of unequal experts as a list, or ``None`` when there are none or all are alike.

    Raises:
        ConversionError: they are not one number per expert, do not add up to the network, or make too many blocks.
    """
    if widths is None:
        return None
    given = list(widths) if isinstance(widths, Sequence) and not isinstance(widths, str) else [widths]
    whole = all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in given)
    if not whole or len(given) != num_experts:
        raise ConversionError(
            f"widths are {widths!r} for {num_experts} experts",
            where="widths",
            accepted="a list with the neurons of each expert, integers of at least 1",
            fix=f"give {num_experts} numbers"
            if not whole
            else f"give {num_experts} numbers, or num_experts={len(given)}",
        )
    rest = ffn_width - shared
    if sum(given) != rest:
        raise ConversionError(
            f"the widths add up to {sum(given)} of {rest} neurons",
            where="widths",
            accepted=f"{num_experts} integers that add up to {rest}: "
            + (f"the {ffn_width} neurons less shared_size={shared}" if shared else "all neurons of the network"),
            fix=f"{'take' if sum(given) > rest else 'give'} {abs(sum(given) - rest)} neurons "
            + ("away" if sum(given) > rest else "more"),
        )
    try:
        split_widths(given)
    except ConfigError as error:
        raise ConversionError(error.what, where=error.where, accepted=error.accepted, fix=error.fix) from error
    return given if len(set(given)) > 1 else None


def order_neurons(ffn: FFNWeights, among: Tensor, sizes: Sequence[int], grouping: Grouping, *, seed: int = 0) -> Tensor:
    """Return the neurons ``among`` (int64) in the order of the parts that hold them, ``sizes`` of each.

    Raises:
        UnknownNameError: no such grouping.
    """
    if grouping not in GROUPINGS:
        raise UnknownNameError.of("grouping of neurons", str(grouping), GROUPINGS, where="neurons")
    if grouping == "contiguous" or len(sizes) == 1:
        return among
    rows = (ffn.up if ffn.gate is None else ffn.gate)[among].float()
    return among[_clusters(F.normalize(rows, dim=1), sizes, seed)]


def divide_neurons(ffn: FFNWeights, among: Tensor, parts: int, grouping: Grouping, *, seed: int = 0) -> Tensor:
    """Return int64 (parts, len(among) / parts): a division of the neurons ``among`` into equal parts.

    Raises:
        UnknownNameError: no such grouping.
    """
    return order_neurons(ffn, among, [len(among) // parts] * parts, grouping, seed=seed).view(parts, -1)


def _clusters(points: Tensor, sizes: Sequence[int], seed: int) -> Tensor:
    """Return int64 (n,): spherical k-means with parts of given sizes; each part in order."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(points), generator=generator)[: len(sizes)].to(points.device)
    centres = points[start]
    members: list[Tensor] = []
    for _ in range(ROUNDS):
        members = _assign(points @ centres.T, sizes)
        moved = F.normalize(torch.stack([points[part].mean(0) for part in members]), dim=1)
        if torch.equal(moved, centres):
            break
        centres = moved
    return torch.cat([part.sort().values for part in members])


def _assign(similarity: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Give every point to a part with room, those that lose most by going elsewhere first."""
    best = similarity.topk(min(2, len(sizes)), dim=1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    choice = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    room = list(sizes)
    members: list[list[int]] = [[] for _ in sizes]
    for point in order:
        part = next(p for p in choice[point] if room[p])
        room[part] -= 1
        members[part].append(point)
    return [torch.tensor(part, device=similarity.device) for part in members]
