"""Which neurons of a dense feed-forward network each expert holds.

A conversion is a table (E, F of one expert) of neuron numbers; everything else follows from it. Clusters put neurons
with similar input weights together (balanced k-means; MoEfication, arXiv 2110.01786), so that a token needs few
experts; the always-on part takes the neurons with the largest weights, a stand-in for the most active ones that needs
no data.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.errors import UnknownNameError
from thermoe.models.families import FFNWeights

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


def divide_neurons(ffn: FFNWeights, among: Tensor, parts: int, grouping: Grouping, *, seed: int = 0) -> Tensor:
    """Return int64 (parts, len(among) / parts): a division of the neurons ``among`` into equal parts.

    Raises:
        UnknownNameError: no such grouping.
    """
    if grouping not in GROUPINGS:
        raise UnknownNameError.of("grouping of neurons", str(grouping), GROUPINGS, where="neurons")
    if grouping == "contiguous" or parts == 1:
        return among.view(parts, -1)
    rows = (ffn.up if ffn.gate is None else ffn.gate)[among].float()
    return among[_balanced_clusters(F.normalize(rows, dim=1), parts, seed)]


def _balanced_clusters(points: Tensor, parts: int, seed: int) -> Tensor:
    """Return int64 (parts, n / parts): spherical k-means with equal sizes; each part in order."""
    size = len(points) // parts
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(points), generator=generator)[:parts].to(points.device)
    centres = points[start]
    members = torch.empty(0)
    for _ in range(ROUNDS):
        members = _assign(points @ centres.T, size)
        moved = F.normalize(points[members].mean(1), dim=1)
        if torch.equal(moved, centres):
            break
        centres = moved
    return members.sort(dim=1).values


def _assign(similarity: Tensor, size: int) -> Tensor:
    """Give every point to a part with room, those that lose most by going elsewhere first: (parts, size)."""
    count, parts = similarity.shape
    best = similarity.topk(min(2, parts), dim=1).values
    order = (best[:, 0] - best[:, -1]).argsort(descending=True, stable=True).tolist()
    choice = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    room = [size] * parts
    members: list[list[int]] = [[] for _ in range(parts)]
    for point in order:
        part = next(p for p in choice[point] if room[p])
        room[part] -= 1
        members[part].append(point)
    return torch.tensor(members, device=similarity.device).view(parts, count // parts)
