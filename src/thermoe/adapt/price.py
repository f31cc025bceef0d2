"""The price that brings the modelled cost of a token down to a target: the inner loop, which needs no sensor.

The last rows of benefit u that each layer saw are kept, and the cost is modelled as if a price pi had been applied to
them, C(pi). The answer is pi = inf {pi >= 0 : C(pi) <= C*}, so a router that changes (another text, test-time training)
is compensated as soon as its rows are in. Where opening costs act, C falls only nearly monotonically; its running
minimum over increasing prices is used throughout.

The search is a grid of 32 geometric prices in one batched pass, then grids of 8 between the two neighbours that enclose
the target; it begins near the last price where that still encloses the target.

Shape letters: P prices, G groups, N tokens of a group, M rows kept, F forwards kept, E experts, K slots, L layers.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.choices import Rows, benefit_of, choose_at, couples, k_max_of
from thermoe.adapt.readings import CostRange
from thermoe.adapt.steps import Forward
from thermoe.adapt.tally import millijoule_span
from thermoe.energy.cost_model import CostModel
from thermoe.energy.cost_table import CostTable
from thermoe.energy.read_cost import ReadCost
from thermoe.energy.work import ModelWork
from thermoe.moe.layer import Routed, routed_modules
from thermoe.routers.base import Router
from thermoe.routers.priced import PricedRouter

#: Prices of the first pass of a search from nothing, and of any other pass.
GRID, FINE_GRID = 32, 8
#: A search ends when neighbouring prices differ by no more than this factor.
RESOLUTION = 1.01
#: A search from the last price looks this far to both sides first.
NEAR = 1.5
#: Widest span of prices that is searched; a price below 1e-7 of the highest removes nothing that a model could tell.
SPAN = 1e7
#: Costs of two experts closer than this, relative to the dearest, are not told apart by any price.
LEAST_GAP = 1e-3
#: Costs closer than this are the same, as far as sums in float32 tell.
SAME_REL = 1e-6
#: Most rows kept of a phase in which opening costs act, on a GPU and on the CPU: there each row takes a pass over all
#: experts in turn, at each price.
COUPLED_ROWS, COUPLED_ROWS_CPU = 1024, 256
#: Most forwards kept per phase, so that gathering their rows stays quick when each is one token.
MOST_FORWARDS = 512


@dataclass(frozen=True, slots=True)
class _Ends:
    """The range of prices that change anything, in the routers' unit, and what its ends cost in J/token."""

    low_price: float
    high_price: float
    low_j: float
    zero_j: float


class PriceSolver:
    """Finds prices for the priced routers of a model, from the rows they saw last.

    Layers whose router is not priced count with what they did. Reads of the device happen in `cost_range`, `cost_at`
    and `price_for`, one for each pass of a search; `observe` reads nothing.

    Args:
        model: a model with routed modules.
        cost_model: the joules of work.
        work: the work of ``model``; its layers are the routed modules in order.
        rows: rows kept per phase; fewer where opening costs act (`COUPLED_ROWS`).
    """

    def __init__(self, model: nn.Module, cost_model: CostModel, work: ModelWork, *, rows: int = 4096) -> None:
        self.table = CostTable.of(cost_model, work)
        self.modules: list[Routed] = [module for _, module in routed_modules(model)]
        self._limit = rows
        self._kept: dict[Phase, deque[Forward]] = {phase: deque() for phase in PHASES}
        self._count: dict[Phase, int] = dict.fromkeys(PHASES, 0)
        self._found: dict[Phase, float] = {}
        self._ends: dict[Phase, _Ends] = {}
        self._gathered: dict[tuple[Phase, int], list[Rows]] = {}

    # -- what is kept -------------------------------------------------------------------------------------------------

    def observe(self, phase: Phase, batch_size: int | None = None) -> None:
        """Keep the rows of the forward just made.

        Args:
            phase: of this forward.
            batch_size: sequences in it; by default one in prefill, and one per row in decode.
        """
        decisions = [module.last_routing for module in self.modules]
        rows = max((d.expert_index.shape[0] for d in decisions if d is not None), default=1)
        batch = batch_size or (rows if phase == "decode" else 1)
        forward = Forward.of(decisions, (batch, rows // batch))
        if forward is not None:
            self.keep(replace(forward, phase=phase))

    def keep(self, forward: Forward) -> None:
        """Keep the rows of ``forward``, and let go of the oldest beyond ``rows``; reads nothing."""
        phase, kept = forward.phase, self._kept[forward.phase]
        limit = self._limit
        if self._coupled_anywhere(phase):
            limit = min(limit, COUPLED_ROWS if forward.device.type == "cuda" else COUPLED_ROWS_CPU)
        if forward.rows > limit:
            forward = forward.tail(limit)
        # Other layers ran, or the model is on another device now: the old rows say nothing of these.
        if kept and (_layout(kept[-1]), kept[-1].device) != (_layout(forward), forward.device):
            kept.clear()
            self._count[phase] = 0
        kept.append(forward)
        self._count[phase] += forward.rows
        while self._count[phase] - kept[0].rows >= limit or len(kept) > MOST_FORWARDS:
            self._count[phase] -= kept.popleft().rows
        self._ends.pop(phase, None)
        self._gathered.clear()

    def rows(self, phase: Phase) -> int:
        """Return how many rows of a phase are kept."""
        return self._count[phase]

    # -- what is asked ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def cost_range(self, phase: Phase) -> CostRange | None:
        """Return the cost at the highest price and at price 0, in J/token; ``None`` before anything was observed."""
        ends = self._ends_of(phase)
        return None if ends is None else CostRange(low_j=min(ends.low_j, ends.zero_j), high_j=ends.zero_j)

    @torch.no_grad()
    def cost_at(self, phase: Phase, price: float) -> float | None:
        """Return C(price) in J/token, ``price`` in nats/J; ``None`` before anything was observed."""
        if not self._kept[phase]:
            return None
        prices = [price * self.table.unit_j] if price > 0 else None
        return float(self._costs(phase, prices)[0])

    @torch.no_grad()
    def price_for(self, phase: Phase, cost_target_j: float) -> float:
        """Return the lowest price, in nats/J, at which the modelled cost is at most ``cost_target_j`` J/token.

        0 at or above the cost at price 0 and before anything was observed; at or below the lowest cost the finite price
        at which every token keeps k_min experts and nothing optional is open, tokens to come included.
        """
        ends = self._ends_of(phase)
        if ends is None or cost_target_j >= ends.zero_j:
            return 0.0
        price = ends.high_price
        if cost_target_j > (1 + SAME_REL) * ends.low_j:
            price = self._found[phase] = self._search(phase, ends, cost_target_j)
        return price / self.table.unit_j

    def _search(self, phase: Phase, ends: _Ends, target_j: float) -> float:
        """Return the lowest price that meets a target which the highest one meets and price 0 does not."""
        last, place = self._found.get(phase), None
        if last is not None and ends.low_price < last / NEAR:
            prices = _geometric(last / NEAR, max(last, min(NEAR * last, ends.high_price)), FINE_GRID)
            place = self._first_that_meets(phase, prices, target_j)
        if not place:  # the last price is not near
            prices = _geometric(ends.low_price, ends.high_price, GRID)
            place = self._first_that_meets(phase, prices, target_j)
        if place == 0:  # what a token minds least may be nothing to speak of
            prices = _geometric(ends.low_price / SPAN, ends.low_price, GRID)
            place = self._first_that_meets(phase, prices, target_j)
        while place and prices[place] > RESOLUTION * prices[place - 1]:
            prices = _geometric(prices[place - 1], prices[place], FINE_GRID)
            place = self._first_that_meets(phase, prices, target_j)
        return prices[-1 if place is None else place]

    def _first_that_meets(self, phase: Phase, prices: Sequence[float], target_j: float) -> int | None:
        costs = self._costs(phase, prices).tolist()
        return next((place for place, cost in enumerate(costs) if cost <= target_j), None)

    # -- the model of the cost ----------------------------------------------------------------------------------------

    def _ends_of(self, phase: Phase) -> _Ends | None:
        if not self._kept[phase]:
            return None
        if phase not in self._ends:
            low, high = self._bounds(phase)
            zero, most = self._costs(phase, None), self._costs(phase, [high])
            zero_j, low_j = torch.cat([zero, most.to(zero.device)]).tolist()
            self._ends[phase] = _Ends(low, high, low_j, zero_j)
        return self._ends[phase]

    def _coupled_anywhere(self, phase: Phase) -> bool:
        routers = (module.router for module in self.modules)
        return any(isinstance(router, PricedRouter) and couples(router, phase) for router in routers)

    def _bounds(self, phase: Phase) -> tuple[float, float]:
        """Return prices between which selection changes: the least benefit that counts, and more than all of them."""
        found: list[Tensor] = []
        for place, module in enumerate(self.modules):
            router = module.router
            if not isinstance(router, PricedRouter):
                continue
            coupled = couples(router, phase)
            pair, opening = router.pair_cost, router.open_cost * coupled
            gaps = pair.sort().values.diff()
            finest = torch.where(gaps > LEAST_GAP * pair.max(), gaps, math.inf).amin() if len(gaps) else math.inf
            for rows in self._rows(phase, place, coupled):
                top = rows.u.topk(k_max_of(router), -1).values
                if router.benefit == "distortion":  # a token's output cannot move further than this
                    top = torch.full_like(top, 4.0) * router.kappa * router.sensitivity.max()
                counts = rows.real.unsqueeze(-1) & (top > torch.finfo(top.dtype).tiny)
                # A probability is at most 1, so that no token to come is worth more than this either.
                least = torch.where(counts, top, math.inf).amin()
                best = torch.maximum(torch.where(counts, top, 0).amax(), router.kappa)
                highs = (1 / _least(pair), 1 / finest, rows.u.shape[1] / _least(opening))
                high = best * torch.stack([torch.as_tensor(h, device=best.device) for h in highs]).amax()
                if router.benefit == "distortion":  # and how little matters to it is not known beforehand
                    least = least / SPAN
                found.append(torch.stack([least / (pair.max() + opening.max()), high]))
        if not found:
            return 1 / GRID, 1.0
        ends = torch.stack([pair.to(found[0].device) for pair in found]).cpu()
        least_price, most_price = float(ends[:, 0].min()), 1.01 * float(ends[:, 1].max()) or 1.0
        return max(min(0.99 * least_price, most_price / 10), most_price / SPAN), most_price

    def _costs(self, phase: Phase, prices: Sequence[float] | None) -> Tensor:
        """Return (P,), J/token at ``prices``, in the routers' unit and above 0; ``None`` is price 0 alone."""
        kept = self._kept[phase]
        total = torch.zeros(1 if prices is None else len(prices))
        for place in range(len(self.modules)):
            for index, used, rows in self._choices(phase, place, prices):
                total = total.to(used.device) + self._layer_j(place, len(kept), index, used, rows)
        tokens = torch.stack([_tokens(forward).to(total.device) for forward in kept]).sum()
        return (self.table.forward_j * len(kept) + total) / tokens.clamp(min=1) + self.table.token_j

    def _layer_j(self, place: int, forwards: int, index: Tensor, used: Tensor, rows: Rows) -> Tensor:
        """Return (P,), the joules of one layer's pairs and openings for a choice ``index`` (P, G, N, K)."""
        experts = rows.u.shape[-1]
        index = index.clamp(max=experts - 1)
        pair_j, open_j = (
            t[place, :experts].to(used.device, torch.float32) for t in (self.table.pair_j, self.table.open_j)
        )
        spent = torch.where(used, pair_j[index] * rows.weight.unsqueeze(-1), 0).sum((1, 2, 3))
        slot = torch.where(used, rows.forward.unsqueeze(-1) * experts + index, forwards * experts)
        opened = torch.zeros(used.shape[0], forwards * experts + 1, device=used.device).scatter_(
            1, slot.flatten(1), 1.0
        )
        return spent + (opened[:, :-1].unflatten(1, (forwards, experts)).sum(1) * open_j).sum(-1)

    def _choices(
        self, phase: Phase, place: int, prices: Sequence[float] | None
    ) -> Iterator[tuple[Tensor, Tensor, Rows]]:
        """Yield the experts a layer would choose, (P or 1, G, N, K), which of these slots it uses, and the rows."""
        router = self.modules[place].router
        if isinstance(router, PricedRouter):
            coupled = couples(router, phase)
            for rows in self._rows(phase, place, coupled):
                yield *choose_at(router, rows, prices, coupled), rows
            return
        decisions = [forward.decisions[place] for forward in self._kept[phase]]
        index = torch.cat([d.expert_index for d in decisions if d is not None]) if decisions[0] is not None else None
        for rows in self._rows(phase, place, False):
            assert index is not None
            yield index[None, None], (index < rows.u.shape[-1])[None, None] & rows.real[..., None], rows

    def _rows(self, phase: Phase, place: int, coupled: bool) -> list[Rows]:
        """Return the rows of a layer: in one group where each is routed by itself, else by position and batch size."""
        if (phase, place) in self._gathered:
            return self._gathered[phase, place]
        module, kept = self.modules[place], list(enumerate(self._kept[phase]))
        groups: list[list[tuple[int, Forward]]] = [kept]
        if coupled:
            by_batch = defaultdict(list)
            for number, forward in kept:
                by_batch[forward.batch_size].append((number, forward))
            groups = list(by_batch.values())
        found = []
        for members in groups:
            decisions = [d for _, forward in members if (d := forward.decisions[place]) is not None]
            if not decisions:
                continue
            u = benefit_of(module, decisions)
            sizes = torch.tensor([forward.rows for _, forward in members])
            numbers = torch.tensor([number for number, _ in members]).repeat_interleave(sizes)
            weights = torch.tensor([1 / forward.kept_frac for _, forward in members]).repeat_interleave(sizes)
            masks = [
                torch.ones_like(d.expert_index[:, 0], dtype=torch.bool) if d.padding_mask is None else d.padding_mask
                for d in decisions
            ]
            facts = [u, torch.cat(masks), numbers.to(u.device), weights.to(u.device)]
            if coupled:  # forwards of one batch size, each (B, S) row by row, to one group a position
                batch = members[0][1].batch_size
                facts = [_by_position(t, batch, sizes.tolist()) for t in facts]
            else:
                facts = [t.unsqueeze(0) for t in facts]
            found.append(Rows(*facts))
        self._gathered[phase, place] = found
        return found


def feasible_range(
    model: nn.Module, cost_model: CostModel, solver: PriceSolver | None, read_cost: ReadCost | None = None
) -> str | None:
    """Return in words what the routing of ``model`` can cost, in J/token; ``None`` for a model without routers.

    Before a forward was seen that is one sequence at decode, with the cheapest expert of each layer or top-k of the
    dearest.
    """
    if solver is not None:
        known = {phase: solver.cost_range(phase) for phase in PHASES}
        told = [f"{millijoule_span(c.low_j, c.high_j)} at {phase}" for phase, c in known.items() if c is not None]
        if told:
            return f"about {', '.join(told)} ({cost_model.provenance})"
    routers = [module.router for _, module in routed_modules(model)]
    if not routers:
        return None
    table = CostTable.of(cost_model, ModelWork.of(model, read_cost=read_cost))
    low_j = high_j = table.forward_j + table.token_j
    for each_j, router in zip(table.pair_j + table.open_j, routers, strict=True):
        assert isinstance(router, Router)
        low_j += float(each_j[: router.num_experts].min())
        high_j += router.top_k * float(each_j.max())
    where = f"at decode of one sequence ({cost_model.provenance}), less of several together"
    return f"about {millijoule_span(low_j, high_j)} {where}"


def _layout(forward: Forward) -> tuple[bool, ...]:
    """Return which modules ran on all rows of a forward."""
    return tuple(d is not None and d.expert_index.shape[0] == forward.rows for d in forward.decisions)


def _by_position(values: Tensor, batch: int, sizes: Sequence[int]) -> Tensor:
    """Return (M, ...), forwards of ``sizes`` rows, as (positions, B, ...)."""
    parts = (part.unflatten(0, (batch, -1)).transpose(0, 1) for part in values.split(list(sizes)))
    return torch.cat(list(parts))


def _tokens(forward: Forward) -> Tensor:
    """Return the real tokens of a forward, a scalar."""
    masks = [d.padding_mask for d in forward.decisions if d is not None]
    held = torch.tensor(forward.rows) if masks[0] is None else masks[0].sum()
    return held / forward.kept_frac


def _least(costs: Tensor) -> Tensor:
    """Return the lowest cost above 0, infinite where there is none."""
    return torch.where(costs > 0, costs, math.inf).amin()


def _geometric(low: float, high: float, count: int) -> list[float]:
    """Return ``count`` prices from ``low`` to ``high``, both included."""
    ratio = (high / low) ** (1 / (count - 1))
    return [low * ratio**step for step in range(count - 1)] + [high]
