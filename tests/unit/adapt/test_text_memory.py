"""Which text is being read: profiles, the Bayes factor that tells texts apart, and what is remembered of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reading_model import batches
from torch import Tensor

from thermoe.adapt.text_memory import BINS, MEMORY_TOKENS, NEW_TEXT_NATS, PRIOR, likelihood, nearest, profile, remember

VOCAB = 5000


def _distribution(seed: int, *, mildness: float = 0.0) -> Tensor:
    """Return probabilities (V,) as uneven as those of words; of two seeds they differ, the less the milder."""
    even = 1 / torch.arange(1, VOCAB + 1).double()
    mixed = even[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))]
    return mildness * even / even.sum() + (1 - mildness) * mixed / even.sum()


def _ids(tokens: int, seed: int, draw: int, *, mildness: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(draw)
    drawn = torch.multinomial(_distribution(seed, mildness=mildness), tokens, replacement=True, generator=generator)
    return drawn.view(1, -1)


def _counts(values: dict[int, int]) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.float64)
    for place, count in values.items():
        counts[place] = count
    return counts


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_a_profile_counts_every_token_once_in_a_bin_of_its_id() -> None:
    ids = _ids(600, 0, 1).view(4, 150)
    found = profile(ids, None)
    assert found.shape == (BINS,) and found.dtype == torch.float64 and float(found.sum()) == 600
    alone = torch.stack([profile(row.view(1, 1), None) for row in ids.flatten()])
    assert torch.equal(alone.sum(0), found)
    assert torch.equal(alone.sum(1), torch.ones(600, dtype=torch.float64))


def test_ids_spread_over_the_bins() -> None:
    """Neighbours in the vocabulary are as good as any: none of the bins is crowded."""
    found = profile(torch.arange(128 * BINS).view(1, -1), None)
    assert float(found.min()) > 100 and float(found.max()) < 160
    assert int((profile(torch.arange(BINS // 4).view(1, -1), None) > 0).sum()) == BINS // 4
    largest = torch.tensor([[2**31 - 1, 2**18, 0]])
    assert float(profile(largest, None).sum()) == 3


def test_padding_is_not_counted() -> None:
    ids = _ids(60, 0, 1).view(3, 20)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, 5:], mask[2, :7] = False, False
    found = profile(ids, mask)
    assert float(found.sum()) == 38
    other = torch.where(mask, ids, 4)
    assert torch.equal(profile(other, mask), found)
    together = profile(ids[:1, :5], None) + profile(ids[1:2], None) + profile(ids[2:, 7:], None)
    assert torch.equal(found, together)


@given(seed=st.integers(0, 1000))
def test_order_does_not_matter_and_counts_add_up(seed: int) -> None:
    ids, generator = _ids(80, 0, seed), torch.Generator().manual_seed(seed)
    mixed = ids[:, torch.randperm(80, generator=generator)]
    cut = seed % 79 + 1
    assert torch.equal(profile(mixed, None), profile(ids, None))
    assert torch.equal(profile(ids[:, :cut], None) + profile(ids[:, cut:], None), profile(ids, None))


# -- the Bayes factor --------------------------------------------------------------------------------------------------


def _predicted(new: list[int], known: Tensor) -> float:
    """Return the log probability of bins one after the other, each predicted from all before it: a Polya urn."""
    counts, total, found = known.tolist(), float(known.sum()), 0.0
    for place in new:
        found += math.log((counts[place] + PRIOR) / (total + BINS * PRIOR))
        counts[place], total = counts[place] + 1, total + 1
    return found


@given(
    new=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    known=st.dictionaries(st.integers(0, 40), st.integers(0, 3000), max_size=20),
)
def test_the_likelihood_is_that_of_predicting_token_by_token(new: list[int], known: dict[int, int]) -> None:
    counts = _counts({place: new.count(place) for place in set(new)})
    texts = torch.stack([_counts(known), _counts({}), _counts({7: 500})])
    found = likelihood(counts, texts)
    assert found.shape == (3,) and found.dtype == torch.float64
    for row, text in enumerate(texts):
        expected = _predicted(new, text)
        assert float(found[row]) == pytest.approx(expected, rel=1e-9, abs=1e-7)
        assert _predicted(new[::-1], text) == pytest.approx(expected, rel=1e-12), "an urn forgets the order"


@given(
    first=st.lists(st.integers(0, 30), max_size=30),
    second=st.lists(st.integers(0, 30), max_size=30),
    known=st.dictionaries(st.integers(0, 40), st.integers(0, 300), max_size=20),
)
def test_a_batch_in_two_pieces_is_as_likely_as_in_one(
    first: list[int], second: list[int], known: dict[int, int]
) -> None:
    one, two = (_counts({place: part.count(place) for place in set(part)}) for part in (first, second))
    text = _counts(known)
    whole = float(likelihood(one + two, text.unsqueeze(0)))
    pieces = float(likelihood(one, text.unsqueeze(0)) + likelihood(two, (text + one).unsqueeze(0)))
    assert whole == pytest.approx(pieces, rel=1e-9, abs=1e-7)


# -- which text --------------------------------------------------------------------------------------------------------


def test_no_text_is_known_at_first() -> None:
    assert nearest(profile(_ids(100, 0, 1), None), []) is None


@pytest.mark.parametrize("tokens", [64, 512, 4096])
@pytest.mark.parametrize("draw", range(5))
def test_texts_are_told_apart(tokens: int, draw: int) -> None:
    known = [profile(_ids(4096, seed, 10 + seed), None) for seed in range(3)]
    for seed in range(3):
        assert nearest(profile(_ids(tokens, seed, 100 + draw), None), known) == seed
    strange = profile(_ids(max(tokens, 512), 7, 100 + draw), None)
    assert nearest(strange, known) is None
    assert nearest(strange, [*known, profile(_ids(4096, 7, 17), None)]) == 3


@pytest.mark.parametrize("draw", range(10))
def test_a_short_prompt_of_a_mildly_different_text_joins(draw: int) -> None:
    known = [profile(_ids(4096, 0, 10, mildness=0.8), None)]
    assert nearest(profile(_ids(20, 1, 100 + draw, mildness=0.8), None), known) == 0
    # And with more of it, it is a text of its own where it differs clearly.
    assert nearest(profile(_ids(4096, 1, 100 + draw), None), known) is None


def test_prose_and_verse_are_told_apart() -> None:
    prose, verse = (batches(domain, 3) for domain in ("prose", "verse"))
    known = [profile(prose[0], None)]
    assert [nearest(profile(batch, None), known) for batch in prose[1:]] == [0, 0]
    assert [nearest(profile(batch, None), known) for batch in verse] == [None] * 3
    known.append(profile(verse[0], None))
    assert [nearest(profile(batch, None), known) for batch in [*verse[1:], *prose[1:]]] == [1, 1, 0, 0]


def test_the_line_is_drawn_in_nats_per_token() -> None:
    """A batch of one bin, and known texts that make it less likely than itself by so much."""
    counts = _counts({3: 400})
    fresh = _predicted([3] * 400, _counts({}))
    sides = []
    for others in range(0, 4000, 20):
        known = _counts({3: 40, 9: others})
        before = float(known.sum())
        worse = (fresh - _predicted([3] * 400, known)) / (400 * before / (400 + before))
        found = nearest(counts, [known])
        assert found == (0 if worse <= NEW_TEXT_NATS else None), (others, worse)
        sides.append(found)
    assert set(sides) == {0, None}


@given(seed=st.integers(0, 500), tokens=st.integers(1, 300))
def test_the_answer_depends_on_counts_alone(seed: int, tokens: int) -> None:
    ids, generator = _ids(tokens, seed % 5, seed), torch.Generator().manual_seed(seed)
    known = [profile(_ids(1000, text, 10 + text), None) for text in range(3)]
    mixed = ids[:, torch.randperm(tokens, generator=generator)]
    found = nearest(profile(ids, None), known)
    assert nearest(profile(mixed, None), known) == found
    # Another order of the texts gives another number, and the same text, or one under which it is as likely.
    turned = nearest(profile(ids, None), known[::-1])
    assert (turned is None) == (found is None)
    if found is not None and turned is not None:
        values = likelihood(profile(ids, None), torch.stack(known))
        assert turned == 2 - found or values[2 - turned] == pytest.approx(float(values[found]), rel=1e-12)


# -- what is remembered ------------------------------------------------------------------------------------------------


def test_counts_add_up() -> None:
    parts = [profile(_ids(700, 0, draw), None) for draw in range(6)]
    known = torch.zeros(BINS, dtype=torch.float64)
    for part in parts:
        before = known.clone()
        known = remember(known, part)
        assert torch.equal(known, before + part)
    assert float(known.sum()) == 4200


def test_the_older_fades() -> None:
    old, new = _counts({1: int(MEMORY_TOKENS)}), _counts({2: 8192})
    known, shares = old, []
    assert torch.equal(remember(torch.zeros_like(old), old), old), "so much is kept whole"
    for _ in range(40):
        known = remember(known, new)
        assert float(known.sum()) == pytest.approx(MEMORY_TOKENS, rel=1e-12)
        shares.append(float(known[1]) / float(known.sum()))
    assert shares == sorted(shares, reverse=True)
    # What is there loses the same share with each batch of the same size.
    for before, after in pairwise(shares):
        assert after / before == pytest.approx(MEMORY_TOKENS / (MEMORY_TOKENS + 8192), rel=1e-9)
    assert shares[-1] < 0.01


def test_a_batch_larger_than_the_memory_leaves_its_own_profile() -> None:
    known = remember(_counts({1: 100}), _counts({2: int(3 * MEMORY_TOKENS), 3: int(MEMORY_TOKENS)}))
    assert float(known.sum()) == pytest.approx(MEMORY_TOKENS)
    assert float(known[2] / known[3]) == pytest.approx(3)
