"""How a Hugging Face router turns logits into scores and combine weights, recognised from its attributes and a probe.

Two kinds cover the routers of transformers 5 that return (logits, weights, ids):

- softmax: p = softmax(z); the k largest; weights p, or p / sum of the chosen p. Choosing by z and taking the softmax
  of the chosen (GPT-OSS) is the second, since softmax keeps the order and the sum over all experts cancels.
- sigmoid (DeepSeek-V3, arXiv 2412.19437): s = sigmoid(z); the k largest of s + b among the experts of the best groups,
  a group's worth being the sum of its two largest s + b; weights s, or s / sum of the chosen s, times a factor. The
  correction bias b steers the choice and never enters a weight.

What is recognised is tried on a few random tokens against the router itself before anything is replaced.

Shape letters: T tokens, E experts, K slots per token, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["softmax", "sigmoid"]

_PROBE_TOKENS = 16
#: Below every score with its bias; finite, so that a price or a sum makes no NaN of it.
_OUTSIDE = -1e9


@dataclass(frozen=True, slots=True)
class NativeScoring:
    """The rules of one router.

    Args:
        kind: "softmax" or "sigmoid".
        num_experts: E.
        hidden_size: D.
        top_k: K.
        normalised: whether the weights of the chosen experts are made to sum to ``scale``.
        scale: factor on the weights.
        groups: number of groups of experts; only ``top_groups`` of them may be chosen from.
        top_groups: see ``groups``.
        chosen_by_block: whether the router returns logits alone and the block's `route_tokens_to_experts` chooses.
    """

    kind: Kind
    num_experts: int
    hidden_size: int
    top_k: int
    normalised: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    chosen_by_block: bool = False

    def native(
        self, base: nn.Module, x_TD: Tensor, choose: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the base's own (logits (T, E), weights (T, K), ids (T, K))."""
        if choose is None:
            logits, weights, index = base(x_TD)
        else:
            logits = base(x_TD)
            index, weights = choose(logits)
        return logits, weights, index

    def selection_scores(self, logits: Tensor, base: nn.Module) -> Tensor:
        """Return float32 (T, E): what the base ranks experts by; far below zero outside the best groups."""
        logits = logits.float()
        if self.kind == "softmax":
            return torch.softmax(logits, dim=-1)
        scores = logits.sigmoid()
        bias = getattr(base, "e_score_correction_bias", None)
        if bias is not None:
            scores = scores + bias.float()
        if self.groups == 1:
            return scores
        by_group = scores.unflatten(-1, (self.groups, -1))
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        allowed = torch.zeros_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return torch.where(allowed.unsqueeze(-1), by_group, _OUTSIDE).flatten(-2)

    def ranking(self, logits: Tensor, scores: Tensor) -> Tensor:
        """Return what a router ranks by: the scores, or logits where these have the same order and differ more."""
        return logits if self.kind == "softmax" else scores

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return float32 (T, E) that sums to 1: softmax, or sigmoid scores (without bias) over their sum."""
        if self.kind == "softmax":
            return torch.softmax(logits.float(), dim=-1)
        scores = logits.float().sigmoid()
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    def weights(self, logits: Tensor, index: Tensor, base: nn.Module) -> Tensor:
        """Return float32 (T, K), the base's combine weights restricted to a choice; 0 where there is no expert.

        Args:
            logits: (T, E).
            index: int64 (T, K), E for "no expert".
            base: the model's own router.
        """
        live = index < self.num_experts
        chosen = F.pad(logits.float(), (0, 1)).gather(-1, index)
        if self.kind == "softmax" and self.normalised:
            # As a softmax over the chosen logits: no probability can underflow on the way.
            lowest = torch.finfo(chosen.dtype).min
            weights = torch.softmax(torch.where(live, chosen, lowest), dim=-1)
        elif self.kind == "softmax":
            weights = F.pad(torch.softmax(logits.float(), dim=-1), (0, 1)).gather(-1, index)
        else:
            weights = torch.where(live, chosen.sigmoid(), 0)
            if self.normalised:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return torch.where(live, weights, 0) * self.scale

    def disagreement(self, base: nn.Module, block: nn.Module) -> str | None:
        """Try the rules on random tokens; return how the base departs from them, or ``None``."""
        weight: Tensor = base.weight  # type: ignore[assignment]
        generator = torch.Generator().manual_seed(0)
        x_TD = torch.randn(_PROBE_TOKENS, self.hidden_size, generator=generator).to(weight.device, weight.dtype)
        choose: Any = block.route_tokens_to_experts if self.chosen_by_block else None
        with torch.no_grad():
            try:
                answer = self.native(base, x_TD, choose)
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                return f"its router does not map (T, D) to (logits, weights, ids): {error}"
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in answer]
            expected = [(_PROBE_TOKENS, self.num_experts), *[(_PROBE_TOKENS, self.top_k)] * 2]
            if shapes != expected:
                return f"its router returns {shapes}, not (logits, weights, ids) of shapes {expected}"
            if answer[2].is_floating_point():
                return f"its router returns ids of {answer[2].dtype}, so not in the order (logits, weights, ids)"
            logits, weights, index = answer
            ours = self.weights(logits, index, base)
            scores = self.selection_scores(logits, base)
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
            kept = torch.where(chosen, scores, float("inf")).amin(-1)
            passed_over = torch.where(chosen, float("-inf"), scores).amax(-1)
            tolerance = 1e-5 if weights.dtype == torch.float32 else 2e-2
            if bool((kept < passed_over - 1e-6).any()):
                return f"its router does not choose by {self.kind} scores"
            if not torch.allclose(ours, weights.float(), rtol=tolerance, atol=tolerance):
                return f"its router does not weigh its experts by {self.kind} scores, as far as is known"
        return None


def _setting(base: nn.Module, block: nn.Module, names: tuple[str, ...], default: Any) -> Any:
    """Return the first attribute of the router, else of the block, by one of ``names``."""
    for owner in (base, block):
        for name in names:
            if (value := getattr(owner, name, None)) is not None:
                return value
    return default


def recognise(base: nn.Module, block: nn.Module) -> NativeScoring | str:
    """Return the rules by which ``base`` routes, or why they are not known.

    Args:
        base: a router with a weight (E, D).
        block: the MoE block it belongs to; some versions of transformers keep settings there.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return f"its router {type(base).__name__} has no weight (E, D)"
    if weight.is_meta:
        return "its weights are not loaded (they are on the meta device)"
    top_k = _setting(base, block, ("top_k", "num_experts_per_tok"), None)
    if not isinstance(top_k, int):
        return f"its router {type(base).__name__} does not say how many experts a token takes (top_k)"
    has_bias = isinstance(getattr(base, "e_score_correction_bias", None), Tensor)
    known = _setting(base, block, ("norm_topk_prob",), None)
    kinds: tuple[Kind, ...] = ("sigmoid",) if has_bias else ("softmax", "sigmoid")
    why = ""
    for kind in kinds:
        for normalised in (True, False) if known is None else (bool(known),):
            rules = NativeScoring(
                kind,
                weight.shape[0],
                weight.shape[1],
                top_k,
                normalised,
                scale=float(_setting(base, block, ("routed_scaling_factor",), 1.0)),
                groups=int(_setting(base, block, ("num_group", "n_group"), 1)) if has_bias else 1,
                top_groups=int(_setting(base, block, ("topk_group",), 1)) if has_bias else 1,
                chosen_by_block=hasattr(block, "route_tokens_to_experts"),
            )
            disagreement = rules.disagreement(base, block)
            if disagreement is None:
                return rules
            why = why or disagreement
    return why
