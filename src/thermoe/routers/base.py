"""The router contract: scores, selection and combine weights as three steps that subclasses override one by one.

Scores are computed in float32. The combine weights come from the gate's probabilities on the selected experts alone;
whatever steers the selection (a price, a balancing bias) never enters them.

A router may adapt while it trains (a bias, a threshold). A forward changes nothing, because gradient checkpointing
repeats it: the trainer calls `observe` after each micro-batch and `after_step` after each step of its optimiser.

Shape letters: T tokens, E experts, O outputs (E, and the zero-compute experts of a router that has such), K slots per
token, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.registry import Registry
from thermoe.routers.fast_weights import FastWeights
from thermoe.routers.fused_choice import can_choose, choose_and_weigh

Gate = Literal["renormalized", "probability", "ramped"]
GATES: tuple[Gate, ...] = ("renormalized", "probability", "ramped")

ROUTERS: Registry[type[Router]] = Registry("router", "thermoe.routers")


class Router(nn.Module):
    """Base of all routers.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token, K.
        gate: how the combine weight of a selected expert follows from its probability p:
            "renormalized" p / sum over the selection (Mixtral); "probability" p (Switch Transformer); "ramped"
            (1 - m) * 1 + m * E * p, where m is the buffer `ramp`. At m = 0 every weight is exactly 1, which makes a
            partitioned dense network exact, and the router still learns, because the 1 carries the gradient of log p;
            recovery training takes m to 1, where the gate follows the router in full.

    Attributes:
        weight: (E, D), the slow router.
        ramp: scalar buffer m of the gate "ramped".
        fast: what test-time training moves, or ``None``.
        active_top_k: when set, an integer of at most ``top_k`` used instead of it (random k in recovery training).
        replay: when set, int64 (T, K), the ids to answer with instead of choosing: what these tokens were given where
            the choice depended on others that are not in this forward. Weights are those of the present scores.
        unsteered: when true, every token gets its own top-k by score, whatever else steers the choice.
        num_identity, num_zero: zero-compute experts behind the E experts; see `RoutingDecision`.

    Class attributes:
        adaptive: buffers that training moves by `after_step`; `set_router` hands them on.
        float32_buffers: buffers that stay in float32 when the model is cast; the adaptive ones are among them.
        reads: fields of `RoutingContext` that the choice goes by, beside the layout and the padding.
        causal: whether a route depends on earlier tokens of its sequence alone. One that is not refuses to decode.
        top_k_is_mean: whether ``top_k`` is the mean number of experts per token, and `num_slots` the most.
        fixed_k: whether a token always wants all K slots, so that an empty one was dropped by a
            capacity. A subclass that leaves slots empty for another reason sets it to false.

    Raises:
        RoutingError: ``top_k`` is not in 1..E.
        UnknownNameError: no such gate.
    """

    adaptive: ClassVar[tuple[str, ...]] = ()
    float32_buffers: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = True
    top_k_is_mean: ClassVar[bool] = False

    num_identity = 0
    num_zero = 0
    fixed_k: ClassVar[bool] = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, gate: Gate = "renormalized") -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise RoutingError(
                f"top_k is {top_k} with {num_experts} experts",
                where="top_k",
                accepted=f"an integer from 1 to {num_experts}",
                fix="lower top_k or raise the number of experts",
            )
        if gate not in GATES:
            raise UnknownNameError.of("gate", str(gate), GATES, where="gate")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.gate: Gate = gate
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02 * (768 / hidden_size) ** 0.5)
        self.ramp: Tensor
        self.register_buffer("ramp", torch.zeros(()))
        self.fast: FastWeights | None = None
        self.active_top_k: int | None = None
        self.replay: Tensor | None = None
        self.unsteered = False

    @property
    def num_outputs(self) -> int:
        """O, the columns of the logits, and the id that means "no expert"."""
        return self.num_experts + self.num_identity + self.num_zero

    @property
    def num_slots(self) -> int:
        """The most experts a token can have, K."""
        return self.top_k

    @classmethod
    def why_not_attached(cls, kind: str) -> str | None:
        """Return why this router cannot choose for a model's own router, or ``None`` when it can.

        Args:
            kind: the scores of that router, "softmax" or "sigmoid".
        """
        return None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments beyond the sizes that rebuild this router; saved with the model."""
        return {"gate": self.gate}

    def slow_scores(self, x_TD: Tensor) -> Tensor:
        """Return the float32 logits (T, E) of the trained router, without fast weights."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())

    def scores(self, x_TD: Tensor) -> Tensor:
        """Return float32 logits (T, E): slow router plus fast weights."""
        logits = self.slow_scores(x_TD)
        if self.fast is None:
            return logits
        with torch.autocast(x_TD.device.type, enabled=False):
            return logits + self.fast(x_TD.float(), logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return float32 (T, O) that sums to 1 per token: what the gate, losses and statistics work on."""
        return torch.softmax(logits, dim=-1)

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return int64 (T, K) expert ids, O for "no expert"."""
        raise NotImplementedError

    def combine_weights(self, probabilities: Tensor, expert_index: Tensor) -> Tensor:
        """Return the combine weights (..., K) of a selection, 0 where there is nothing to combine.

        Args:
            probabilities: (..., O).
            expert_index: int64 (..., K), O for "no expert".
        """
        live = expert_index < self.num_experts + self.num_identity
        p = F.pad(probabilities, (0, 1)).gather(-1, expert_index)
        if self.gate == "renormalized":
            p = torch.where(live, p, 0)
            return p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        if self.gate == "probability":
            return torch.where(live, p, 0)
        log_p = p.clamp(min=torch.finfo(p.dtype).tiny).log()
        one = 1 + (log_p - log_p.detach())
        return torch.where(live, (1 - self.ramp) * one + self.ramp * self.num_experts * p, 0)

    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> RoutingDecision:
        """Route T tokens.

        Args:
            x_TD: (T, D).
            context: where the tokens come from; one sequence without padding when ``None``.
        """
        context = context or RoutingContext(1, x_TD.shape[0])
        logits = self.scores(x_TD)
        probabilities = self.probabilities(logits)
        given = self.replay
        if given is None and self.unsteered:
            given = logits.topk(self.active_top_k or self.top_k, dim=-1).indices
            if context.padding_mask is not None:
                given = torch.where(context.padding_mask.unsqueeze(-1), given, self.num_outputs)
        if given is None:
            index, weights = self._answer(logits, probabilities, context, x_TD.dtype)
        else:
            index, weights = given, self.combine_weights(probabilities, given).to(x_TD.dtype)
        return RoutingDecision(
            logits, probabilities, index, weights, context.padding_mask, self.num_identity, self.num_zero
        )

    def _answer(
        self, logits: Tensor, probabilities: Tensor, context: RoutingContext, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return ids (T, K) and combine weights (T, K), padding without experts."""
        index = self.select(logits, probabilities, context)
        if self._weighs_plainly and can_choose(probabilities, index.shape[-1]):
            return self._in_one_launch(probabilities, None, index, context, index.shape[-1], dtype)
        if context.padding_mask is not None:
            index = torch.where(context.padding_mask.unsqueeze(-1), index, self.num_outputs)
        return index, self.combine_weights(probabilities, index).to(dtype)

    @property
    def _weighs_plainly(self) -> bool:
        return type(self).combine_weights is Router.combine_weights

    def _in_one_launch(
        self,
        probabilities: Tensor,
        scores: Tensor | None,
        index: Tensor | None,
        context: RoutingContext,
        slots: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        live = self.num_experts + self.num_identity
        kind = self.ramp, slots, self.gate, live, self.num_experts, dtype
        return choose_and_weigh(probabilities, scores, index, context.padding_mask, *kind)

    @torch.no_grad()
    def observe(self, decision: RoutingDecision) -> None:
        """Take note of one training micro-batch, on the device and without waiting for it; nothing by default."""

    @torch.no_grad()
    def after_step(self) -> None:
        """Adapt to what was observed since the last call, on all ranks alike; nothing by default.

        Every rank of a distributed run calls it once per step of the optimiser.
        """

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Move with the model, but leave what must be precise in float32 when the model is cast to half precision."""
        kept = {name: value for name in self.float32_buffers if (value := getattr(self, name)) is not None}
        kept = {name: value.clone() for name, value in kept.items()}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, gate={self.gate}"


def choose(allowed: Tensor, ranking: Tensor, slots: int) -> Tensor:
    """Return int64 (..., slots): the allowed experts that rank highest, then E where there are no more of them.

    Args:
        allowed: bool (..., E).
        ranking: (..., E).
        slots: at most E.
    """
    index = torch.where(allowed, ranking, torch.finfo(ranking.dtype).min).topk(slots, dim=-1).indices
    return torch.where(allowed.gather(-1, index), index, allowed.shape[-1])


def check_option(name: str, value: float, low: float, high: float, *, usual: float | None, whole: bool = False) -> None:
    """Raise a ConfigError when a number is not in low..high, or with ``whole`` no integer."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ConfigError(
            f"{name} is {value!r}",
            where=name,
            accepted=f"{'an integer' if whole else 'a number'} from {low} to {high}",
            fix=f"leave {name} out" + ("" if usual is None else f" for {usual}"),
        )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over the ranks of a distributed run, in place; alone it is left as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
