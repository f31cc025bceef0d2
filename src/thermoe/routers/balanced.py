"""Routers that balance the experts' load by the choice itself, without a loss that pulls on the language model.

- `sigmoid_bias` (arXiv 2408.15664, DeepSeek-V3 2412.19437): the k largest s + b with s = sigmoid(z); after each step
  b_e += gamma * sign(mean n - n_e). Weights come from s alone.
- `threshold` (expert threshold, arXiv 2603.11535): e takes t when p_te > c_e, with c_e a moving average of the score
  that a share k / E of the tokens exceeds: k experts per token on average, and no look at other tokens.
- `sinkhorn` (in the place of the auction of BASE, arXiv 2103.16716): in training the k largest of the plan that
  Sinkhorn's iteration makes of exp(z), which gives each expert the same mass; plain top-k in evaluation.
- `expert_choice` (arXiv 2202.09368): each expert takes its best T * k / E tokens. A token's route depends on later
  ones, so that this router scores and trains but does not generate.

Our choice: the threshold's scores are softmax probabilities, each token keeps its best `k_min` experts whatever their
threshold, and ties of s + b go by z.

Shape letters: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from thermoe.errors import RoutingError
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.routers.base import ROUTERS, Gate, Router, check_option, choose, sum_over_ranks


@ROUTERS.register("sigmoid_bias")
class SigmoidBiasRouter(Router):
    """Top-k of sigmoid(z) + b, where b follows the load and never enters a weight.

    Probabilities are s / sum_E s, so that the gate "renormalized" weighs an expert by s / sum of the chosen s.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token.
        gate: see `Router`.
        gamma: what b moves by at each step.

    Attributes:
        balance_bias: float32 (E,), b.

    Raises:
        ConfigError: ``gamma`` is not in 0..1.
    """

    adaptive = ("balance_bias",)
    float32_buffers = ("balance_bias", "step_counts")

    balance_bias: Tensor
    step_counts: Tensor | None

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, gate: Gate = "renormalized", gamma: float = 1e-3
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("gamma", gamma, 0, 1, usual=1e-3)
        self.gamma = gamma
        self.register_buffer("balance_bias", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("step_counts", None, persistent=False)

    @classmethod
    def why_not_attached(cls, kind: str) -> str | None:
        """Refuse a model whose own router has such a bias."""
        return "the model's own router chooses by sigmoid scores and a bias already" if kind == "sigmoid" else None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router; the bias is state."""
        return {**super().options(), "gamma": self.gamma}

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return sigmoid scores over their sum."""
        scores = torch.sigmoid(logits)
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the experts of the k largest sigmoid(z) + b."""
        # In the order of the logits first: a sigmoid near 1 or 0 is the same float32 for many of them.
        order = logits.argsort(dim=-1, descending=True, stable=True)
        biased = (torch.sigmoid(logits) + self.balance_bias).gather(-1, order)
        best = biased.argsort(dim=-1, descending=True, stable=True)[..., : self.active_top_k or self.top_k]
        return order.gather(-1, best)

    @torch.no_grad()
    def observe(self, decision: RoutingDecision) -> None:
        """Add up the tokens of each expert."""
        counts = decision.counts
        self.step_counts = counts if self.step_counts is None else self.step_counts + counts

    @torch.no_grad()
    def after_step(self) -> None:
        """Move b towards the experts that had fewer tokens than the mean."""
        counts = torch.zeros_like(self.balance_bias) if self.step_counts is None else self.step_counts
        counts = sum_over_ranks(counts)
        self.balance_bias.add_(torch.sign(counts.mean() - counts), alpha=self.gamma)
        self.step_counts = None


@ROUTERS.register("threshold")
class ThresholdRouter(Router):
    """Each token goes to every expert whose probability exceeds that expert's threshold.

    Until the first `after_step` the choice is top-k.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token on average.
        gate: see `Router`.
        k_min: best experts each token keeps in any case; above 0 they come on top of the mean.
        max_experts: most experts per token; ``None`` is 2 * top_k, at most E.
        ema: weight of the past in the thresholds, once 1 / (1 - ema) steps have been seen; the plain mean before.

    Attributes:
        cutoff: float32 (E,), c.
        cutoff_steps: float32 scalar, updates so far.

    Raises:
        ConfigError: ``k_min``, ``max_experts`` or ``ema`` is outside its range.
    """

    adaptive = ("cutoff", "cutoff_steps")
    float32_buffers = ("cutoff", "cutoff_steps", "step_sums")
    top_k_is_mean = True

    cutoff: Tensor
    cutoff_steps: Tensor
    step_sums: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = "renormalized",
        k_min: int = 1,
        max_experts: int | None = None,
        ema: float = 0.99,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("k_min", k_min, 0, top_k, usual=1, whole=True)
        if max_experts is not None:
            check_option("max_experts", max_experts, top_k, num_experts, usual=min(2 * top_k, num_experts), whole=True)
        check_option("ema", ema, 0, 1, usual=0.99)
        self.k_min, self.max_experts, self.ema = k_min, max_experts, ema
        self.register_buffer("cutoff", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("cutoff_steps", torch.zeros((), dtype=torch.float32))
        self.register_buffer("step_sums", None, persistent=False)

    @property
    def num_slots(self) -> int:
        """The most experts a token can have."""
        return self.max_experts or min(2 * self.top_k, self.num_experts)

    @classmethod
    def why_not_attached(cls, kind: str) -> str | None:
        """Refuse sigmoid scores: its thresholds are quantiles of probabilities."""
        return "its thresholds are on softmax probabilities, not on sigmoid scores" if kind == "sigmoid" else None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router; the thresholds are state."""
        return {**super().options(), "k_min": self.k_min, "max_experts": self.max_experts, "ema": self.ema}

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the experts over their threshold, the most probable ones first."""
        slots = self.num_slots if self.active_top_k is None else min(self.active_top_k, self.num_slots)
        ranked = logits.topk(min(self.top_k, slots), dim=-1).indices
        none = torch.zeros_like(logits, dtype=torch.bool)
        favourite = none.scatter(-1, ranked[..., : self.k_min], True)
        over = (probabilities > self.cutoff) | favourite
        allowed = torch.where(self.cutoff_steps > 0, over, none.scatter(-1, ranked, True))
        return choose(allowed, logits, slots)

    @torch.no_grad()
    def observe(self, decision: RoutingDecision) -> None:
        """Add up the probability that a share k / E of this call's tokens exceeds, for each expert."""
        p, mask = decision.probabilities.detach(), decision.padding_mask
        if not p.shape[0]:
            return
        if mask is None:
            tokens = torch.full((1,), float(p.shape[0]), device=p.device)
        else:
            p, tokens = torch.where(mask.unsqueeze(-1), p, -1), mask.sum(0, keepdim=True).float()
        ordered = p.sort(0, descending=True).values
        # Between the last token that is in and the first that is out; interpolated where their number is no integer.
        place = tokens * self.top_k / self.num_experts - 0.5
        place = torch.minimum(place.clamp(min=0), (tokens - 1).clamp(min=0))
        low = place.floor()
        rows = torch.stack((low, torch.minimum(low + 1, (tokens - 1).clamp(min=0)))).long().expand(-1, p.shape[1])
        above, below = ordered.gather(0, rows)
        sums = torch.cat(((above + (place - low) * (below - above)) * tokens, tokens))
        self.step_sums = sums if self.step_sums is None else self.step_sums + sums

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the step's quantiles into the moving average."""
        sums = self.cutoff.new_zeros(self.num_experts + 1) if self.step_sums is None else self.step_sums
        sums = sum_over_ranks(sums)
        self.step_sums = None
        seen = sums[-1] > 0
        share = (1 / (self.cutoff_steps + 1)).clamp(min=1 - self.ema)
        quantile = sums[:-1] / sums[-1].clamp(min=1)
        self.cutoff.add_(torch.where(seen, share * (quantile - self.cutoff), 0))
        self.cutoff_steps.add_(seen)


def sinkhorn(logits: Tensor, iterations: int, real: Tensor | None = None) -> Tensor:
    """Return the float32 transport plan (T, E) of exp(logits): each token's mass is 1, each expert's close to T / E.

    Args:
        logits: (T, E).
        iterations: scalings of columns and then rows; rows are exact, columns converge.
        real: bool (T,), tokens that take part; the others get a row like any, and have no say in the columns.
    """
    z = logits.float()
    tokens = torch.full((), float(z.shape[0]), device=z.device) if real is None else real.sum().float()
    barrier = torch.zeros_like(z[:, :1]) if real is None else torch.where(real, 0.0, float("-inf")).unsqueeze(-1)
    target = torch.log(tokens.clamp(min=1) / z.shape[1])
    row = torch.zeros_like(z[:, :1])
    column = torch.zeros_like(z[:1])
    for _ in range(iterations):
        column = target - torch.logsumexp(z + row + barrier, 0, keepdim=True)
        row = -torch.logsumexp(z + column, 1, keepdim=True)
    return (z + row + column).exp()


@ROUTERS.register("sinkhorn")
class SinkhornRouter(Router):
    """Top-k of the balanced plan in training, top-k of the scores in evaluation.

    The plan is even, the k largest entries of its rows only nearly so. It depends on the batch, which evaluation does
    not: a model trained with it meets other routes there.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token.
        gate: see `Router`.
        iterations: of Sinkhorn's scaling; fixed, so that nothing waits for convergence.

    Raises:
        ConfigError: ``iterations`` is not in 1..1000.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, gate: Gate = "renormalized", iterations: int = 10
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("iterations", iterations, 1, 1000, usual=10, whole=True)
        self.iterations = iterations

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "iterations": self.iterations}

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the top-k of the plan in training, of the scores in evaluation."""
        ranking = logits
        if self.training and logits.shape[0]:
            ranking = sinkhorn(logits.detach().nan_to_num(), self.iterations, context.padding_mask)
        return ranking.topk(self.active_top_k or self.top_k, dim=-1).indices


@ROUTERS.register("expert_choice")
class ExpertChoiceRouter(Router):
    """Each expert takes its T * k / E most probable tokens: even by construction, not causal.

    A token may be taken by all experts or by none. With padding, T counts real tokens. T * k / E is rounded down, and
    is at least 1.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: experts per token on average.
        gate: see `Router`.

    Raises:
        RoutingError: it is to route a step of generation, where the tokens it would compare with are not there yet.
    """

    causal = False
    top_k_is_mean = True

    @property
    def num_slots(self) -> int:
        """All experts may take one token."""
        return self.num_experts

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the experts that took each token, the most probable ones first."""
        if context.is_decode and context.batch_size and not self.training:
            raise RoutingError(
                "the router 'expert_choice' cannot generate: experts choose among the tokens of a whole text, and in "
                "generation the later ones are not there yet",
                where=f"{type(self).__name__}, at one position per sequence",
                accepted="training, and scoring of whole sequences",
                fix='choose a causal router for generation: set_router(model, "threshold") keeps the load even, too',
            )
        tokens, experts = probabilities.shape
        top_k = self.active_top_k or self.top_k
        capacity = min(tokens, max(1, tokens * top_k // experts))
        real = context.real(probabilities)
        best = torch.where(real.unsqueeze(-1), probabilities, -1).topk(capacity, dim=0).indices
        places = (real.sum() * top_k // experts).clamp(min=1)
        within = (torch.arange(capacity, device=best.device) < places).unsqueeze(-1).expand_as(best)
        taken = torch.zeros_like(probabilities, dtype=torch.bool).scatter(0, best, within)
        return choose(taken & real.unsqueeze(-1), logits, experts)
