"""What keeps test-time training from doing harm: settings, and the rules as functions of numbers.

`RouterAdapter` calls them; each can be switched off. Trust region: no router may move further from the trained one
than a KL divergence. Judge: updates are kept when text that was held back from learning says so, else undone bit for
bit. Shadow: now and then the trained routers are scored beside the adapted ones. Diversity: adapted routers must not
crowd onto a few experts where the trained ones do not.

Shape letters: L layers, T tokens, O router outputs, E experts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thermoe.errors import ConfigError
from thermoe.moe.stats import entropy

Verdict = Literal["accepted", "rejected", "deferred"]
#: Tokens of a block: neighbours share a context, so that their losses are not independent draws.
BLOCK = 128
#: An update may cost this much per token, in nats, on text that was held back; how sure one has to be (one-sided 95 %).
TOLERANCE, SURE = 0.01, 1.64
#: A standard error above this says nothing about a tolerance of 0.01.
NOISY_SE = 0.006
#: Halvings of the search for the scale of the trust region, and how far below the cap it stays for rounding.
BISECTIONS, ROUNDING = 20, 1e-4
REJECTS_TO_REST, COOL_DOWN = 3, 8
#: The shadow's CUSUM: slack and threshold in standard deviations.
CUSUM_SLACK, CUSUM_ALARM = 0.5, 5.0
#: The shadow comes this often where the bucket can well afford it: it may take so much of what is there.
OFTEN, CHEAP_FRAC = 4, 0.1
#: Batches in a row below the diversity floor before something is done, and the step of the balancing bias.
CROWDED_BATCHES, BALANCE_STEP = 3, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Safeguards:
    """Which safeguards are on, and where they draw the line.

    Args:
        kl_cap: trust region: mean KL(trained router, adapted router) per layer on held-back tokens, in nats; ``None``
            is no cap.
        anchor: factor on the fast weights after each update, in (0, 1]; 1 is no pull to the trained router.
        retreat: factor in (0, 1] beside it for a layer on which text that nothing was learned from yet says that less
            would be better: where the gradient of its loss points from the fast weights to the trained
            router. 1 is off.
        judge: keep or undo updates by what they do to held-back tokens. Undone means fast weights, moments and step
            size as they were, bit for bit; then the step size is halved. After three rejections in a row nothing is
            learned for eight batches.
        judge_tokens: held-back tokens for a verdict.
        judge_tokens_most: as many are kept, and looked at where fewer are too noisy.
        shadow: score the trained routers beside the adapted ones now and then, and reset where these are worse.
        shadow_every: batches from one shadow to the next; every 4th where the bucket can well afford it or the last one
            was no good sign, and at once where the text changes.
        diversity: reset where the effective number of experts is below this share of the trained router's; ``None``
            is no floor.

    Raises:
        ConfigError: a number is outside its range.
    """

    kl_cap: float | None = 0.3
    anchor: float = 0.99
    retreat: float = 0.9
    judge: bool = True
    judge_tokens: int = 1000
    judge_tokens_most: int = 8192
    shadow: bool = True
    shadow_every: int = 16
    diversity: float | None = 0.5

    def __post_init__(self) -> None:
        positive = "a finite number above 0, or None for none"
        share = "a number above 0 and at most 1, or None for none"
        for name, fits, accepted, usual in (
            (
                "kl_cap",
                self.kl_cap is None or (_real(self.kl_cap) and 0 < self.kl_cap <= sys.float_info.max),
                positive,
                0.3,
            ),
            ("anchor", _real(self.anchor) and 0 < self.anchor <= 1, "a number above 0 and at most 1", 0.99),
            ("retreat", _real(self.retreat) and 0 < self.retreat <= 1, "a number above 0 and at most 1", 0.9),
            ("judge", isinstance(self.judge, bool), "True or False", True),
            ("judge_tokens", _whole(self.judge_tokens), "an integer of at least 1", 1000),
            (
                "judge_tokens_most",
                _whole(self.judge_tokens_most)
                and _whole(self.judge_tokens)
                and self.judge_tokens_most >= self.judge_tokens,
                "an integer of at least judge_tokens",
                8192,
            ),
            ("shadow", isinstance(self.shadow, bool), "True or False", True),
            ("shadow_every", _whole(self.shadow_every), "an integer of at least 1", 16),
            ("diversity", self.diversity is None or (_real(self.diversity) and 0 < self.diversity <= 1), share, 0.5),
        ):
            if not fits:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}",
                    where=f"adapt.{name}",
                    accepted=accepted,
                    fix=f"leave it at {usual}",
                )

    @classmethod
    def none(cls) -> Safeguards:
        """Return settings with every one of these safeguards off; what is not finite still resets."""
        return cls(kl_cap=None, anchor=1.0, retreat=1.0, judge=False, shadow=False, diversity=None)


def _real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# -- trust region ------------------------------------------------------------------------------------------------------


def router_kl(slow_LTO: Tensor, correction_LTO: Tensor, scale_L: Tensor) -> Tensor:
    """Return the mean KL(softmax(slow), softmax(slow + scale * correction)) per layer (L,), in nats.

    An output that a layer lacks has the slow logit -inf and the correction 0.
    """
    slow = torch.log_softmax(slow_LTO, -1)
    fast = torch.log_softmax(slow_LTO + scale_L.view(-1, 1, 1) * correction_LTO, -1)
    p = slow.exp()
    return torch.where(p > 0, p * (slow - fast), 0).sum(-1).mean(-1)


def trust_region_scale(slow_LTO: Tensor, correction_LTO: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Return the largest scales (L,) in [0, 1] at which the KL of each layer is at most ``cap``, and these KLs (L,).

    A family of fast weights is linear in its parameters, so that scaling them scales the correction; the KL is convex
    in the scale with its minimum of 0 at 0, so that bisection finds the edge. A layer inside the region gets exactly 1;
    whether all are is asked first, which waits for the device once.
    """
    target = cap * (1 - ROUNDING)
    high = torch.ones(slow_LTO.shape[0], device=slow_LTO.device)
    whole = router_kl(slow_LTO, correction_LTO, high)
    if bool((whole <= target).all()):
        return high, whole
    low = torch.zeros_like(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        inside = router_kl(slow_LTO, correction_LTO, middle) <= target
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    scale = torch.where(whole <= target, 1.0, low)
    return scale, router_kl(slow_LTO, correction_LTO, scale)


# -- judge -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paired:
    """Paired differences of the nats per token, after minus before.

    Args:
        mean: over tokens; negative is better.
        se: its standard error, over blocks of 128 tokens; ``None`` with fewer than two of them.
        tokens: how many.
    """

    mean: float
    se: float | None
    tokens: int

    @classmethod
    def of(cls, difference: Tensor) -> Paired | None:
        """Return mean and standard error of (N,) differences in the order of the text; ``None`` when there are none."""
        tokens = difference.numel()
        if not tokens:
            return None
        values = difference.detach().double().cpu()
        blocks = max(1, round(tokens / BLOCK))
        means = torch.stack([part.mean() for part in values.tensor_split(blocks)])
        se = float(means.std(correction=1)) / math.sqrt(blocks) if blocks > 1 else None
        return cls(float(values.mean()), se, tokens)

    @property
    def surely_worse(self) -> bool:
        """Whether the mean is above 0 beyond its noise, which few blocks know badly themselves.

        1.64 standard errors, widened to the 95 % point of Student's t; with fewer than four blocks never.
        """
        freedom = round(self.tokens / BLOCK) - 1
        if self.se is None or freedom < 3:
            return False
        return self.mean > (SURE + 1.52 / freedom + 1.4 / freedom**2) * self.se

    @property
    def harmful(self) -> bool:
        """Whether it is surely worse, and by more than what is tolerated or can be excluded."""
        return self.surely_worse and self.se is not None and self.mean + SURE * self.se > TOLERANCE

    def __str__(self) -> str:
        noise = "" if self.se is None else f" ± {self.se:.2g}"
        return f"{self.mean:+.3g}{noise} nats per token on {self.tokens} held-back tokens"


def judge(pooled: Paired | None, earlier: Paired | None, *, enough: int, most: int) -> tuple[Verdict, str]:
    """Return the verdict on an update, and why.

    Rejected when it is surely worse, one-sided at 95 %; accepted when it is not, and its mean is within the tolerance;
    what lies between is deferred until there is enough to tell. To accept only what is surely no worse undid a sixth of
    the updates on shifted text for nothing but noise, and half of what there was to gain. What an update does to text
    of before it counts by itself too, so that a chunk of nonsense, which one can learn to expect, does not pay for what
    it spoils.

    Args:
        pooled: all held-back tokens that are evidence.
        earlier: those among them from before the text that was learned from.
        enough: tokens for a verdict.
        most: tokens after which there is no waiting for more: what is noisy then must at least look no worse.
    """
    if earlier is not None and earlier.harmful:
        return "rejected", f"it harms text read before: {earlier}"
    if pooled is None:
        return "deferred", "no held-back text that the model reads better than by guessing"
    if pooled.surely_worse:
        return "rejected", str(pooled)
    if pooled.tokens < enough:
        return "deferred", f"{pooled.tokens} of {enough} held-back tokens"
    if pooled.se is None:
        return "deferred", f"{pooled.tokens} held-back tokens are too few blocks to know the noise"
    if pooled.mean <= TOLERANCE:
        return "accepted", str(pooled)
    if pooled.tokens < most:
        return "deferred", f"too noisy to tell: {pooled}"
    return "rejected", str(pooled)


# -- shadow ------------------------------------------------------------------------------------------------------------


def cusum(level: float, difference: Paired | None) -> tuple[float, bool]:
    """Return the next level of the one-sided CUSUM on adapted minus trained loss, and whether it raises the alarm.

    Differences are in units of their own standard error; 0.5 of them are let pass, and 5 are too much.
    """
    if difference is None or difference.se is None:
        return level, False
    away = difference.mean / max(difference.se, 1e-12)
    level = max(0.0, level + away - CUSUM_SLACK)
    return level, level > CUSUM_ALARM


# -- diversity ---------------------------------------------------------------------------------------------------------


def top_k_load(logits: Tensor, top_k: int) -> Tensor:
    """Return the load (E,) of the unpriced choice of the ``top_k`` highest logits (T, E)."""
    index = logits.topk(top_k, -1).indices.reshape(-1)
    counts = torch.zeros(logits.shape[-1], device=logits.device).scatter_add(
        0, index, torch.ones_like(index, dtype=torch.float32)
    )
    return counts / counts.sum().clamp(min=1)


def diversity_ratio(loads: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return exp H(f) of the adapted router over that of the trained one, per layer (L,), from (trained, adapted)."""
    return torch.stack([(entropy(fast) - entropy(slow)).exp() for slow, fast in loads])
