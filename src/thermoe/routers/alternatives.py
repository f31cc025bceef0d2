"""Reference routers: bounds and controls for every comparison, not for use. None of them learns whom to choose.

- `random`: uniformly random experts, the zero of routing accuracy.
- `hash` (arXiv 2106.04426): experts by the token's id, so that each word has its own. The paper's balanced hash needs
  the counts of a corpus; this one is a plain pseudo-random function, even over ids and not over text.
- `round_robin`: experts in turn, by the token's position.
- `fixed`: the same experts for all tokens.

Their choice is a pseudo-random or constant function, so that it repeats and needs no generator state; the combine
weights follow the gate as in every router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingContext
from thermoe.routers.base import ROUTERS, Gate, Router, check_option


def _scramble(keys: Tensor, num_experts: int) -> Tensor:
    """Return int64 (T, E) pseudo-random numbers of 32 bits, one per key (T, 1) and expert."""
    salt = torch.arange(1, num_experts + 1, device=keys.device) * 0x9E3779B1
    mixed = ((keys ^ salt) * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return mixed ^ (mixed >> 16)


@ROUTERS.register("random")
class RandomRouter(Router):
    """Uniformly random experts, k per token: the zero of routing accuracy.

    The choice is a fixed pseudo-random function of the bits of the token's own scores, so that it repeats and needs no
    generator state. A score that differs in its last bit, as another batch shape can make it, gives another choice.
    """

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return k experts in the order of a hash of the scores."""
        bits = logits.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        # Every column sees the whole row through its sum.
        mixed = _scramble(bits.sum(-1, keepdim=True), self.num_experts)
        return torch.topk(mixed, self.active_top_k or self.top_k, dim=-1).indices


@ROUTERS.register("hash")
class HashRouter(Router):
    """k experts by a hash of the token's id.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token.
        gate: see `Router`.
        seed: another seed gives another hash; layers with one seed agree.

    Raises:
        ConfigError: ``seed`` is negative or too large.
        RoutingError: the token ids are not known where it is called.
    """

    reads = ("token_ids",)

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, gate: Gate = "renormalized", seed: int = 0
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("seed", seed, 0, 2**31 - 1, usual=0, whole=True)
        self.seed = seed

    @classmethod
    def why_not_attached(cls, kind: str) -> str | None:
        """Refuse: a model hands its MoE blocks hidden states alone."""
        return "it goes by token ids, and the model hands its MoE blocks hidden states alone"

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "seed": self.seed}

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return k experts in the order of a hash of the token id."""
        if context.token_ids is None:
            raise RoutingError(
                "the router 'hash' goes by token ids, and none are known for these hidden states",
                where="RoutingContext.token_ids",
                accepted="int64 (T,); a converted model notes them when it is called with input_ids",
                fix="call the model with input_ids instead of inputs_embeds, or use another control: "
                'set_router(model, "random")',
            )
        keys = ((context.token_ids.long() + 1) * 0x2545F491 + self.seed * 0x1B873593) & 0xFFFFFFFF
        mixed = _scramble(keys.unsqueeze(-1), self.num_experts)
        return torch.topk(mixed, self.active_top_k or self.top_k, dim=-1).indices


@ROUTERS.register("round_robin")
class RoundRobinRouter(Router):
    """Experts in turn: the token at position i takes (i + offset) mod E and the k - 1 that follow.

    The position is the one in the sequence where the model notes it, as converted models do with and without a cache;
    elsewhere it is the position within the call, so that every step of a cached generation is position 0 there.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token.
        gate: see `Router`.
        offset: where to begin; another one per layer keeps layers from being in step.

    Raises:
        ConfigError: ``offset`` is not in 0..E - 1.
    """

    reads = ("positions",)

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, gate: Gate = "renormalized", offset: int = 0
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("offset", offset, 0, num_experts - 1, usual=0, whole=True)
        self.offset = offset

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "offset": self.offset}

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the experts whose turn it is."""
        positions = context.positions
        if positions is None:
            positions = torch.arange(logits.shape[0], device=logits.device) % max(1, context.sequence_length)
        turn = positions.long().unsqueeze(-1) + self.offset
        return (turn + torch.arange(self.active_top_k or self.top_k, device=logits.device)) % self.num_experts


@ROUTERS.register("fixed")
class FixedRouter(Router):
    """The same experts for every token.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token.
        gate: see `Router`.
        experts: their ids, the order of which matters to ``active_top_k`` alone; ``None`` is 0..top_k - 1.

    Raises:
        ConfigError: ``experts`` is empty, has more than top_k ids, one twice, or one outside 0..E - 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = "renormalized",
        experts: Sequence[int] | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        if experts is not None:
            ids = list(experts) if isinstance(experts, (list, tuple)) else []
            whole = all(isinstance(e, int) and not isinstance(e, bool) and 0 <= e < num_experts for e in ids)
            if not whole or not 1 <= len(ids) <= top_k or len(set(ids)) < len(ids):
                raise ConfigError(
                    f"experts is {experts!r} with {num_experts} experts and top_k {top_k}",
                    where="experts",
                    accepted=f"1 to {top_k} different integers from 0 to {num_experts - 1}",
                    fix="name fewer experts or raise top_k",
                )
            experts = ids
        self.experts = experts

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "experts": self.experts}

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the fixed ids for each token."""
        ids = (self.experts or range(self.num_experts))[: self.active_top_k or self.top_k]
        # Filled column by column: a tensor made from a list would be copied from the host, which no graph captures.
        columns = [torch.full_like(logits[:, 0], e, dtype=torch.int64) for e in ids]
        return torch.stack(columns, dim=-1)
