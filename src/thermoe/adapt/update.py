"""One update of the fast weights, with the safeguards that act on the weights themselves.

In this order: the objective's gradients (or its own move) and a step of the optimiser, part by part; the pull to the
trained router; the diversity floor; the trust region. What is not finite is reported and never stays.

Shape letters: B sequences, S positions, T tokens, L layers, E experts, O router outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.forwards import Forwards
from thermoe.adapt.learning_costs import LearningAccount
from thermoe.adapt.objectives import Objective, Proposal
from thermoe.adapt.reading import RouterInput
from thermoe.adapt.safeguards import (
    BALANCE_STEP,
    CROWDED_BATCHES,
    Safeguards,
    diversity_ratio,
    top_k_load,
    trust_region_scale,
)
from thermoe.adapt.stream_state import StreamState
from thermoe.moe.layer import Routed, routed_modules
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights

#: Steps become shorter where the last update went too far, longer where it did not; least share of the step size.
SHORTER, LONGER, LEAST_LR_FRAC = 0.7, 1.15, 1 / 16
NOT_FINITE = "the loss or its gradient is not finite"
#: Most tokens on which the trust region is measured.
REGION_TOKENS = 2048


@dataclass(slots=True, eq=False)
class Live:
    """The parts of an adapter that an update works with.

    Args:
        model: the model.
        fast: fast weights by dotted layer name.
        optimizer: of all of them.
        objective: what is learned from.
        account: pays.
        forwards: makes the forwards of learning.
        safeguards: settings.
        lr: step size that was set, the longest.
        max_grad_norm: gradients are scaled down to this norm.
        min_tokens: gradients are collected until so many tokens are behind them.
    """

    model: nn.Module
    fast: dict[str, FastWeights]
    optimizer: FastOptimizer
    objective: Objective
    account: LearningAccount
    forwards: Forwards
    safeguards: Safeguards
    lr: float
    max_grad_norm: float
    min_tokens: int

    def modules(self) -> dict[str, Routed]:
        """Return the routed modules that learn, by name, as they are now: routers may have been swapped."""
        return {name: module for name, module in routed_modules(self.model) if name in self.fast}

    def routers(self) -> list[nn.Module]:
        """Return the routers of the model."""
        return [module.router for _, module in routed_modules(self.model)]


@dataclass(slots=True)
class Outcome:
    """What an update did.

    Attributes:
        moved: whether the fast weights changed.
        reason: why not.
        broken: whether something was not finite or too crowded, so that only a reset helps.
        change_norm: Euclidean norm of the change.
        kl: by layer, mean KL(trained, adapted) after it, in nats; ``None`` where it was not measured.
        collected: whether gradients were put aside for a larger chunk.
    """

    moved: bool = False
    reason: str | None = None
    broken: bool = False
    change_norm: float = 0.0
    kl: dict[str, float] | None = None
    collected: bool = False
    diversity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A part of a batch, read.

    Args:
        proposal: what the objective makes of it.
        weights: float32 (B, S - 1), what each of its predicted tokens counts.
        seen: by layer name, what the routers saw.
    """

    proposal: Proposal
    weights: Tensor
    seen: Mapping[str, RouterInput]


#: A part is made when it is its turn, with what the fast weights are then, and may be written over by the next.
Parts = Iterable[Part]


def update(
    live: Live, state: StreamState, parts: Parts, seen: Mapping[str, RouterInput], held: Tensor, real: Tensor
) -> Outcome:
    """Let the fast weights learn from a batch.

    Args:
        live: the adapter's parts.
        state: of the stream; its layers are chosen.
        parts: of the batch, one step each; at least one.
        seen: what the routers got in the scoring forward.
        held: bool (B, S - 1): predictions that are held back; the trust region is measured where they are made.
        real: bool (B, S - 1): real predictions.
    """
    fast = {name: live.fast[name] for name in state.layers or ()}
    parameters = [p for one in fast.values() for p in one.parameters()]
    before = [p.detach().clone() for p in parameters]
    back: Tensor | None = None
    nothing, stepped = None, False
    for part in parts:
        proposal = part.proposal
        if proposal.reason is not None:
            if "not finite" in proposal.reason:
                return Outcome(reason=proposal.reason, broken=True)
            nothing = proposal.reason  # unless another part moves
            continue
        if proposal.gradients is None:
            continue
        gradients, waiting = _collected(live, state, part)
        if waiting is not None:
            return Outcome(reason=waiting, collected=True)
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = torch.isfinite(norm if proposal.loss is None else norm + proposal.loss.to(norm.device))
        first, stepped = not stepped, True
        if first:  # of text that nothing was learned from yet
            if not bool(finite):
                return Outcome(reason=NOT_FINITE, broken=True)
            back = _heed(live, state, list(fast.values()), gradients)
        scale = (live.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        live.optimizer.step(list(fast), _scaled(gradients, scale), _features(live, fast, part))
        # Asked when the step is on its way, so that the device has work while the host waits; a reset undoes it all.
        if not first and not bool(finite):
            return Outcome(reason=NOT_FINITE, broken=True)
    if nothing is not None and not stepped:
        return Outcome(reason=nothing)
    outcome = Outcome()
    with torch.no_grad():
        # The steps alone: a pull that outweighs them points back, and would have them shortened for being too short.
        state.last_move = [p - b for p, b in zip(parameters, before, strict=True)]
        for layer, one in enumerate(fast.values()):
            for parameter in one.parameters():
                parameter.mul_(live.safeguards.anchor)
                if back is not None:
                    parameter.mul_(back[layer].to(parameter.device))
        present = {name: seen[name] for name in fast if name in seen}
        everywhere = _Places.of(real)
        crowded = _keep_diverse(live, state, present, everywhere, outcome)
        if not crowded and live.safeguards.kl_cap is not None:
            chosen = _Places.of(held)
            _keep_near(live, present, chosen if chosen.count else everywhere, live.safeguards.kl_cap, outcome)
        changes = [p - b for p, b in zip(parameters, before, strict=True)]
        outcome.change_norm = float(torch.nn.utils.get_total_norm(changes))
    if crowded:
        return Outcome(reason="the experts in use stay far fewer than the trained router's", broken=True)
    if not math.isfinite(outcome.change_norm):
        return Outcome(reason="the fast weights are not finite", broken=True)
    outcome.moved = outcome.change_norm > 0
    outcome.reason = None if outcome.moved else "the step was zero"
    return outcome


def _heed(live: Live, state: StreamState, fast: Sequence[FastWeights], gradients: Sequence[Tensor]) -> Tensor | None:
    """Do what the gradient on text that is new says of what was learned before, which costs nothing to ask.

    Along the fast weights of a layer it says whether the loss falls with less of them: then that layer steps back to
    the trained router. Along the last update it says whether that went too far: then steps become shorter, and else
    longer, up to the step size that was set (hypergradient descent, arXiv 1703.04782, at the pace of batches).

    Returns:
        What the fast weights of each layer are to be multiplied by (L,); ``None`` where they are not.
    """
    device, at, along = gradients[0].device, 0, []
    for one in fast:
        own = list(one.parameters())
        pairs = zip(own, gradients[at : at + len(own)], strict=True)
        along.append(torch.stack([(p.detach() * g).sum().to(device) for p, g in pairs]).sum())
        at += len(own)
    again = torch.zeros((), device=device)
    if state.last_move is not None and len(state.last_move) == len(gradients):
        moves = zip(state.last_move, gradients, strict=True)
        again = torch.stack([(m.to(g.device) * g).sum().to(device) for m, g in moves]).sum()
    outward, further = torch.stack(along), float(again)
    if further:
        changed = live.optimizer.lr * (SHORTER if further > 0 else LONGER)
        live.optimizer.lr = min(max(changed, live.lr * LEAST_LR_FRAC), max(live.lr, live.optimizer.lr))
    retreat = live.safeguards.retreat
    return None if retreat == 1 else torch.where(outward > 0, retreat, 1.0)


def _scaled(gradients: list[Tensor], scale: Tensor) -> Sequence[Tensor]:
    if len({gradient.device for gradient in gradients}) == 1:
        return torch._foreach_mul(gradients, scale)
    return [gradient * scale.to(gradient.device) for gradient in gradients]


def _features(live: Live, fast: Mapping[str, FastWeights], part: Part) -> dict[str, Tensor]:
    """Return by layer the features (T, C) that the optimiser asks for: of what is learned from, and of nothing else.

    Not of padding, nor of what is held back or was generated.
    """
    wanted = [name for name in part.seen if name in fast and live.optimizer.wants(name)]
    if not wanted:
        return {}
    learned = _Places.of(part.weights > 0)
    found = {}
    for name in wanted:
        x, slow = learned.rows(part.seen[name].x), learned.rows(part.seen[name].slow)
        found[name] = fast[name].features(x, slow)
    return found


def _collected(live: Live, state: StreamState, part: Part) -> tuple[list[Tensor], str | None]:
    """Return the gradients of a part, with those that were put aside; and why they wait, or ``None``."""
    gradients, weight = part.proposal.gradients, part.proposal.weight
    assert gradients is not None
    if not live.min_tokens and state.chunk is None:
        return gradients, None
    weight, tokens = float(weight), int((part.weights > 0).sum())
    if state.chunk is not None:
        sums, total, count = state.chunk
        together, tokens = total + weight, count + tokens
        sums = [a.to(b.device) for a, b in zip(sums, gradients, strict=True)]
        gradients = [a * (total / together) + b * (weight / together) for a, b in zip(sums, gradients, strict=True)]
        weight = together
    if tokens >= live.min_tokens:
        state.chunk = None
        return gradients, None
    state.chunk = gradients, weight, tokens
    return gradients, f"collected {tokens} of {live.min_tokens} tokens"


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """The positions that make some predictions, as rows of what the layers saw.

    Args:
        index: int64 (N,), ascending.
        total: how many positions there are, B * S.
    """

    index: Tensor
    total: int

    @classmethod
    def of(cls, predictions: Tensor) -> _Places:
        """Return the positions that make these predictions, bool (B, S - 1); waits for the device."""
        flat = F.pad(predictions, (0, 1)).reshape(-1)
        return cls(flat.nonzero().flatten(), flat.numel())

    @property
    def count(self) -> int:
        """N."""
        return self.index.numel()

    def rows(self, value: Tensor, most: int | None = None) -> Tensor:
        """Return the rows of (T, ...) at these places, at most so many; all where a layer saw others than the model."""
        if value.shape[0] != self.total:
            return value if most is None or value.shape[0] <= most else value[:: -(-value.shape[0] // most)][:most]
        step = 1 if most is None else max(1, -(-self.count // most))
        return value[self.index[::step].to(value.device)]


def _keep_diverse(
    live: Live, state: StreamState, seen: Mapping[str, RouterInput], real: _Places, outcome: Outcome
) -> bool:
    """Push crowded routers to the loads of the trained ones; return whether that went on in vain for too long.

    The choice is that without a price: under a price fewer experts are in use by design.
    """
    floor = live.safeguards.diversity
    if floor is None or not seen:
        return False
    modules, loads, names = live.modules(), [], []
    for name, given in seen.items():
        router = modules[name].router if name in modules else None
        if not isinstance(router, Router):
            continue
        x, slow = real.rows(given.x), real.rows(given.slow)
        top_k = min(router.active_top_k or router.top_k, slow.shape[-1])
        loads.append((top_k_load(slow, top_k), top_k_load(slow + live.fast[name](x, slow), top_k)))
        names.append(name)
    device = loads[0][0].device
    ratios = diversity_ratio([(slow.to(device), fast.to(device)) for slow, fast in loads]).tolist()
    outcome.diversity = dict(zip(names, ratios, strict=True))
    if min(ratios) >= floor:
        state.crowded = 0
        return False
    state.crowded += 1
    if state.crowded >= 2 * CROWDED_BATCHES:
        return True
    if state.crowded >= CROWDED_BATCHES:
        for name, ratio, (slow_load, fast_load) in zip(names, ratios, loads, strict=True):
            if ratio < floor:
                live.fast[name].delta.add_(BALANCE_STEP * torch.sign(slow_load - fast_load))
    return False


def _keep_near(live: Live, seen: Mapping[str, RouterInput], chosen: _Places, cap: float, outcome: Outcome) -> None:
    """Scale the fast weights of each layer into the trust region."""
    if not seen:
        return
    modules, names, slows, moves = live.modules(), list(seen), [], []
    for name in names:
        given = seen[name]
        x, slow = chosen.rows(given.x, REGION_TOKENS), chosen.rows(given.slow, REGION_TOKENS)
        move = live.fast[name](x, slow)
        decision = modules[name].last_routing if name in modules else None
        if decision is not None and decision.logits.shape[-1] > slow.shape[-1]:  # zero-compute experts
            others = chosen.rows(decision.logits.detach()[:, slow.shape[-1] :], REGION_TOKENS)
            slow, move = torch.cat((slow, others), -1), F.pad(move, (0, others.shape[-1]))
        slows.append(slow)
        moves.append(move)
    device, outputs = slows[0].device, max(slow.shape[-1] for slow in slows)
    tokens = min(slow.shape[0] for slow in slows)
    padded_slow = [F.pad(s[:tokens].to(device), (0, outputs - s.shape[-1]), value=-torch.inf) for s in slows]
    padded_move = [F.pad(m[:tokens].to(device), (0, outputs - m.shape[-1])) for m in moves]
    scale, kl = trust_region_scale(torch.stack(padded_slow), torch.stack(padded_move), cap)
    for row, name in enumerate(names):
        for parameter in live.fast[name].parameters():
            parameter.mul_(scale[row].to(parameter.device))
    outcome.kl = dict(zip(names, kl.tolist(), strict=True))
