"""The baseline: top-k routing, with or without a capacity per expert.

GShard (arXiv 2006.16668) and Switch Transformer (arXiv 2101.03961): each token takes its k most probable experts; an
expert takes at most ceil(c * T * k / E) tokens and the rest is dropped, so that the residual stream alone carries it.
Here the capacity acts in training; in evaluation and generation routing is dropless unless `eval_capacity_factor` is
set, because a capacity makes a token's output depend on what else is in the batch.

`noisy_topk` (arXiv 1701.06538, equations 3 to 5) is the same with Gaussian noise of a learned size on the scores in
training, which lets experts that just miss the choice be tried.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.moe.dispatch import DROP_ORDERS, DropOrder, apply_capacity, expert_capacity
from thermoe.routers.base import ROUTERS, Gate, Router
from thermoe.routers.fused_choice import best, can_choose


@ROUTERS.register("topk")
class TopKRouter(Router):
    """Top-k experts per token.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token.
        gate: see `Router`.
        capacity_factor: c in training; ``None`` is dropless.
        eval_capacity_factor: c in evaluation and generation; ``None`` is dropless.
        drop_order: which tokens a full expert keeps: "position" (the earliest) or "probability" (the surest).
        temperature: when set, experts are sampled in training without replacement from softmax(z / temperature)
            (Gumbel top-k, arXiv 1903.06059), which frees a router that always picks the same ones. Evaluation is
            unchanged: dividing by a temperature does not alter a ranking.
        group_size: G, above 1 for experts that are shards of a copy (experts r*G to r*G + G-1 make up copy r): copies
            are ranked by the mean logit of their shards and taken whole, k / G of them.

    Raises:
        ConfigError: a capacity factor or the temperature is not above 0, or G does not divide E and k.
    """

    fixed_k: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = "renormalized",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        drop_order: DropOrder = "position",
        temperature: float | None = None,
        group_size: int = 1,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        for name, value in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
            ("temperature", temperature),
        ):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(
                    f"{name} is {value}",
                    where=name,
                    accepted="a finite number above 0, or None to switch it off",
                    fix=f"leave {name} out",
                )
        if drop_order not in DROP_ORDERS:
            raise UnknownNameError.of("drop order", str(drop_order), DROP_ORDERS, where="drop_order")
        if group_size < 1 or num_experts % group_size or top_k % group_size:
            raise ConfigError(
                f"group_size is {group_size} with {num_experts} experts and top_k {top_k}",
                where="group_size",
                accepted="a divisor of both",
                fix="leave it out for 1",
            )
        self.group_size = group_size
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.drop_order: DropOrder = drop_order
        self.temperature = temperature

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {
            **super().options(),
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "drop_order": self.drop_order,
            "temperature": self.temperature,
            "group_size": self.group_size,
        }

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the top-k experts, those beyond an expert's capacity replaced by E."""
        return self._limit(self._rank(logits), probabilities, context)

    def _answer(
        self, logits: Tensor, probabilities: Tensor, context: RoutingContext, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        slots = self.active_top_k or self.top_k
        plain = type(self).select is TopKRouter.select and self._weighs_plainly and self._ranks_by_logits
        if plain and self._capacity_factor is None and can_choose(probabilities, slots):
            return self._in_one_launch(probabilities, logits, None, context, slots, dtype)
        return super()._answer(logits, probabilities, context, dtype)

    @property
    def _ranks_by_logits(self) -> bool:
        """Whether the ranking is that of the logits alone: no shards, and no sampling."""
        return self.group_size == 1 and not (self.training and self.temperature is not None)

    @property
    def _capacity_factor(self) -> float | None:
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def _rank(self, logits: Tensor) -> Tensor:
        """Return the top-k experts before any capacity."""
        size, top_k = self.group_size, self.active_top_k or self.top_k
        ranked = logits if size == 1 else logits.unflatten(-1, (-1, size)).mean(-1)
        if self.training and self.temperature is not None:
            uniform = torch.rand_like(ranked).clamp(min=torch.finfo(logits.dtype).tiny)
            ranked = ranked / self.temperature - torch.log(-torch.log(uniform))
        count = -(-top_k // size)
        chosen = best(ranked, count) if can_choose(ranked, count) else torch.topk(ranked, count, dim=-1).indices
        if size == 1:
            return chosen
        shards = torch.arange(size, device=logits.device)
        return (chosen.unsqueeze(-1) * size + shards).flatten(-2)

    def _limit(self, index: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Apply the capacity, if there is one."""
        factor = self._capacity_factor
        if factor is None:
            return index
        if context.padding_mask is not None:  # padding must not take up an expert's places
            index = torch.where(context.padding_mask.unsqueeze(-1), index, self.num_experts)
        tokens, top_k = index.shape
        capacity = expert_capacity(tokens, top_k, self.num_experts, factor)
        return apply_capacity(index, probabilities, capacity, drop_order=self.drop_order)


@ROUTERS.register("noisy_topk")
class NoisyTopKRouter(TopKRouter):
    """Top-k of z + eps * softplus(W_n x) with eps normal, in training; top-k of z in evaluation.

    As in the paper the noise is part of the scores: logits, probabilities and combine weights carry it, which is how
    W_n learns. Its balance losses are no part of the router.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token.
        options: those of `TopKRouter`.

    Attributes:
        noise_weight: (E, D), W_n; 0 at the start, where the noise has the size softplus(0) = 0.69.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    @classmethod
    def why_not_attached(cls, kind: str) -> str | None:
        """Refuse: an attached router takes its scores from the model."""
        return "its noise is part of the scores, which an attached router takes from the model's own router"

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return float32 logits (T, E), in training with noise."""
        logits = super().scores(x_TD)
        if not self.training:
            return logits
        with torch.autocast(x_TD.device.type, enabled=False):
            size = F.softplus(F.linear(x_TD.float(), self.noise_weight.float()))
            return logits + torch.randn_like(logits) * size
