"""Routers that vary how many experts a token takes, or how many a batch opens.

- `top_p` (arXiv 2403.07652): the fewest experts whose probabilities add up to theta. With `target_k` a PI law on theta
  holds the mean number of experts after each step (after DTop-p, arXiv 2512.13996):
  theta += kp * (e - e_before) + ki * e with e = 1 - mean k / target_k. Theirs rescales the logits of each layer, too.
- `oea` (arXiv 2511.02237): each token's own k0 best experts are opened; it fills up to k from what its batch opened.
- `mass_keep`: only the experts with the most probability over the batch stay open. The plain alternative to `oea`.

The last two couple the tokens of a batch, so that they act where each sequence contributes one position (decode), or
within the groups of equal position when `group_by_position` asks to score a prompt as if it were decoded. Elsewhere
they are top-k.

Shape letters: T tokens, E experts, K slots per token, S positions, B sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.routers.base import ROUTERS, Gate, Router, check_option, choose, sum_over_ranks


@ROUTERS.register("top_p")
class TopPRouter(Router):
    """The smallest set of experts whose probabilities reach theta, of at most top_k.

    Scores that do not sum to 1 (those of an attached sigmoid router) are divided by their sum first.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token.
        gate: see `Router`.
        theta: probability to reach, at the start when ``target_k`` is set.
        k_min: experts every token keeps.
        target_k: mean experts per token that theta is steered to in training; ``None`` leaves theta as it is.
        kp: gain of the PI law on the change of the error.
        ki: gain on the error.

    Attributes:
        theta: float32 scalar, the present threshold.
        k_error: float32 scalar, the error of the last step.

    Raises:
        ConfigError: an option is outside its range.
    """

    adaptive = ("theta", "k_error")
    float32_buffers = ("theta", "k_error", "step_sums")

    theta: Tensor
    k_error: Tensor
    step_sums: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = "renormalized",
        theta: float = 0.4,
        k_min: int = 1,
        target_k: float | None = None,
        kp: float = 0.05,
        ki: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        check_option("theta", theta, 0, 1, usual=0.4)
        check_option("k_min", k_min, 1, top_k, usual=1, whole=True)
        if target_k is not None:
            check_option("target_k", target_k, k_min, top_k, usual=None)
        check_option("kp", kp, 0, 1, usual=0.05)
        check_option("ki", ki, 0, 1, usual=0.02)
        self.start_theta, self.k_min, self.target_k, self.kp, self.ki = theta, k_min, target_k, kp, ki
        self.register_buffer("theta", torch.full((), theta, dtype=torch.float32))
        self.register_buffer("k_error", torch.zeros((), dtype=torch.float32))
        self.register_buffer("step_sums", None, persistent=False)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router; where theta has moved to is state."""
        return {
            **super().options(),
            "theta": self.start_theta,
            "k_min": self.k_min,
            "target_k": self.target_k,
            "kp": self.kp,
            "ki": self.ki,
        }

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return the most probable experts until their probabilities reach theta."""
        index = logits.topk(self.active_top_k or self.top_k, dim=-1).indices
        p = probabilities.clamp(min=0)
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        before = F.pad(p.gather(-1, index).cumsum(-1)[..., :-1], (1, 0))
        first = torch.arange(index.shape[-1], device=index.device) < self.k_min
        return torch.where((before < self.theta) | first, index, self.num_experts)

    @torch.no_grad()
    def observe(self, decision: RoutingDecision) -> None:
        """Add up experts and tokens."""
        if self.target_k is None:
            return
        pairs = decision.active.sum()
        mask = decision.padding_mask
        tokens = torch.full_like(pairs, decision.expert_index.shape[0]) if mask is None else mask.sum()
        sums = torch.stack((pairs, tokens)).float()
        self.step_sums = sums if self.step_sums is None else self.step_sums + sums

    @torch.no_grad()
    def after_step(self) -> None:
        """Steer theta towards the wished mean number of experts."""
        if self.target_k is None:
            return
        sums = sum_over_ranks(self.theta.new_zeros(2) if self.step_sums is None else self.step_sums)
        self.step_sums = None
        seen = sums[1] > 0
        error = 1 - sums[0] / sums[1].clamp(min=1) / self.target_k
        moved = (self.theta + self.kp * (error - self.k_error) + self.ki * error).clamp(0, 1)
        self.theta.copy_(torch.where(seen, moved, self.theta))
        self.k_error.copy_(torch.where(seen, error, self.k_error))


class GroupedRouter(Router):
    """Base of routers in which the tokens at one position of all sequences share a set of open experts.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token.
        gate: see `Router`.
        group_by_position: score a prompt in decode grouping: tokens at one position are routed as one batch.
        batch_invariant: plain top-k everywhere, so that an output never depends on the batch around it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        gate: Gate = "renormalized",
        group_by_position: bool = False,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, gate=gate)
        self.group_by_position = group_by_position
        self.batch_invariant = batch_invariant

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {
            **super().options(),
            "group_by_position": self.group_by_position,
            "batch_invariant": self.batch_invariant,
        }

    def open(self, logits: Tensor, probabilities: Tensor, real: Tensor, top_k: int) -> Tensor:
        """Return bool (S, E): the experts open at each position.

        Args:
            logits: (S, B, E).
            probabilities: (S, B, E).
            real: bool (S, B), false for padding.
            top_k: most experts per token in this call.
        """
        raise NotImplementedError

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        """Return each token's best open experts; all are open where tokens are not grouped."""
        top_k = self.active_top_k or self.top_k
        if self.batch_invariant or not (self.group_by_position or context.is_decode) or not context.batch_size:
            return logits.topk(top_k, dim=-1).indices
        z, p, real = (context.by_position(values) for values in (logits, probabilities, context.real(logits)))
        opened = self.open(z, p, real, top_k).unsqueeze(0).expand(context.batch_size, -1, -1).reshape(logits.shape)
        return choose(opened, logits, top_k)


@ROUTERS.register("oea")
class OpenedExpertsRouter(GroupedRouter):
    """Opportunistic expert activation: own top-k0, then up to k from the experts the batch has opened anyway.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token, k.
        k0: experts of its own that each token opens; ``None`` is half of k, rounded up.
        options: those of `GroupedRouter`.

    Raises:
        ConfigError: ``k0`` is not in 1..top_k.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, k0: int | None = None, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        if k0 is not None:
            check_option("k0", k0, 1, top_k, usual=-(-top_k // 2), whole=True)
        self.k0 = k0

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "k0": self.k0}

    def open(self, logits: Tensor, probabilities: Tensor, real: Tensor, top_k: int) -> Tensor:
        """Return the union of the k0 best experts of the tokens at each position."""
        own = logits.topk(min(top_k, self.k0 or -(-self.top_k // 2)), dim=-1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, own, True)
        return (chosen & real.unsqueeze(-1)).any(1)


@ROUTERS.register("mass_keep")
class MassKeepRouter(GroupedRouter):
    """Reference: only the experts with the most probability, summed over the tokens at one position, are open.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: most experts per token.
        keep: experts that stay open; ``None`` is half of them, at least top_k.
        options: those of `GroupedRouter`.

    Raises:
        ConfigError: ``keep`` is not in 1..E.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, keep: int | None = None, **options: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **options)
        if keep is not None:
            check_option("keep", keep, 1, num_experts, usual=max(top_k, num_experts // 2), whole=True)
        self.keep = keep

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this router."""
        return {**super().options(), "keep": self.keep}

    def open(self, logits: Tensor, probabilities: Tensor, real: Tensor, top_k: int) -> Tensor:
        """Return the experts of the largest summed probability; of a position of padding alone, some."""
        mass = torch.where(real.unsqueeze(-1), probabilities, 0).sum(1)
        kept = mass.topk(self.keep or max(self.top_k, self.num_experts // 2), dim=-1).indices
        return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, kept, True)
