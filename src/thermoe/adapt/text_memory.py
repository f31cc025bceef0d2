"""Which text is being read: a profile of its tokens, and whether it is like one that was read before.

What routers learn on one text harms them on another, until they have learned that one; a text that comes back has been
learned before. So each text has fast weights of its own, and which they are is told from the token ids alone, before
anything is scored and at no cost. The rule is a Bayes factor: ids are hashed into bins, counts are
Dirichlet-multinomial, and the known text under which the batch is the most likely is taken, unless the two are less
likely to be one text than two by more than `NEW_TEXT_NATS` per token. The tokens of both count, n N / (n + N) of them,
so that what was read for one batch only is told apart as well as what was read for long. Few tokens say little of what
they come from, so that a short prompt joins what is known unless it is very different.

Shape letters: N known texts, H bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Bins, a power of 2, and the prior count of each.
BINS, PRIOR = 1024, 0.5
#: A batch is a text of its own where it is less likely to be of the best known text by this, in nats per token. Novels
#: and Shakespeare, 8192 tokens each, are 0.22 to 0.34 apart; parts of one text seldom more than 0.2, for words come in
#: bursts.
NEW_TEXT_NATS = 0.25
#: Tokens that a profile remembers.
MEMORY_TOKENS = 65536.0
_GOLDEN = 2654435761


def profile(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return float64 (H,), how many real tokens of ``input_ids`` (B, S) fall into each bin; waits for the device."""
    ids = input_ids if mask is None else input_ids[mask]
    bins = ((ids.flatten().long() * _GOLDEN) & 0xFFFFFFFF) >> (32 - (BINS.bit_length() - 1))
    return torch.bincount(bins, minlength=BINS).double().cpu()


def likelihood(counts: Tensor, known: Tensor) -> Tensor:
    """Return log p(counts | known) (N,), of counts (H,) after those of ``known`` (N, H), up to a constant of counts."""
    prior = known + PRIOR
    total, many = prior.sum(-1), counts.sum()
    of_bins = (torch.lgamma(prior + counts) - torch.lgamma(prior)).sum(-1)
    return torch.lgamma(total) - torch.lgamma(total + many) + of_bins


def nearest(counts: Tensor, known: Sequence[Tensor]) -> int | None:
    """Return which of the known texts a batch continues, or ``None`` where it is none of them."""
    if not known:
        return None
    profiles = torch.stack(list(known))
    more_likely = likelihood(counts, profiles) - likelihood(counts, torch.zeros_like(profiles))
    best = int(more_likely.argmax())
    many, before = counts.sum(), profiles[best].sum()
    tokens = (many * before / (many + before).clamp(min=1)).clamp(min=1)
    return best if float(more_likely[best] / tokens) >= -NEW_TEXT_NATS else None


def remember(known: Tensor, counts: Tensor) -> Tensor:
    """Return the profile (H,) with a batch added; of more than `MEMORY_TOKENS` tokens the older fade."""
    added = known + counts
    return added * min(1.0, MEMORY_TOKENS / float(added.sum().clamp(min=1)))
