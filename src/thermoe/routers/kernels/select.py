"""The whole selection by distortion of one group of tokens in one program, in Triton.

See `thermoe.routers.selection` for what is computed: close what brings less than it costs, take the best open experts,
give up pairs; at price 0 copy the baseline, or take the top-k. A group's scores stay in registers throughout.

Nothing is sorted. For each token and expert one word per 32 experts says which of them that token prefers, found once
by comparing all pairs. How many open experts come before one is then a count of bits, and with it the place of every
expert in every token's choice, after any closing, without a look at another thread's numbers.

Sums run in another order than PyTorch's, so that near ties may fall the other way.

Shape letters: T tokens, E experts, K slots, G groups, N tokens of a group (token n of group g is row n * G + g).
"""
# No postponed annotations here: Triton reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor

#: What a score that is no number counts as: it comes last.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _score(logit_ptr, at, mask):
    """Return float32 scores without NaN, which become the lowest."""
    score = tl.load(logit_ptr + at, mask=mask, other=_LOWEST)
    return tl.where(score > _LOWEST, score, _LOWEST)


@triton.jit
def _probability(p_ptr, at, mask):
    """Return float32 probabilities, 0 for what is none."""
    p = tl.load(p_ptr + at, mask=mask, other=0.0)
    return tl.where(p > 0, p, 0.0)


@triton.jit
def _preferred(logit_ptr, at, inside, score, E: tl.constexpr, WORD: tl.constexpr):
    """Return uint32 like ``score``: bit f is set where a token scores expert 32 * WORD + f higher."""
    word = tl.zeros_like(score).to(tl.uint32)
    for back in tl.range(32, loop_unroll_factor=8):
        f = 32 * WORD + 31 - back
        other = _score(logit_ptr, at + f, inside & (f < E))
        # The sign of the difference, shifted in from the right: two instructions a pair.
        word = (word << 1) | ((score - other[:, None]).to(tl.uint32, bitcast=True) >> 31)
    return word


@triton.jit
def _level(logit_ptr, at, inside, score, e, E: tl.constexpr, WORD: tl.constexpr):
    """Return uint32 like ``score``: bit f is set where expert 32 * WORD + f scores the same and comes first."""
    word = tl.zeros_like(score).to(tl.uint32)
    for back in tl.range(32):
        f = 32 * WORD + 31 - back
        other = _score(logit_ptr, at + f, inside & (f < E))
        word = (word << 1) | ((score == other[:, None]) & (f < e[None, :])).to(tl.uint32)
    return word


@triton.jit
def _ones(word):
    """Return the number of set bits; the compiler knows this form as one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _count(a0, a1, a2, a3, b0, b1, b2, b3, WORDS: tl.constexpr):
    """Return how many bits are set in both of two sets of experts."""
    count = _ones(a0 & b0)
    if WORDS > 1:
        count += _ones(a1 & b1)
    if WORDS > 2:
        count += _ones(a2 & b2) + _ones(a3 & b3)
    return count


@triton.jit
def _holds(b0, b1, b2, b3, e, WORDS: tl.constexpr):
    """Return bool (E,): which experts a set holds."""
    word = b0
    if WORDS > 1:
        word = tl.where(e < 32, b0, b1)
    if WORDS > 2:
        word = tl.where(e < 64, word, tl.where(e < 96, b2, b3))
    return ((word >> (e & 31)) & 1) != 0


@triton.jit
def _word(chosen, e, WORD: tl.constexpr):
    """Return one word of the set of the chosen experts (E,)."""
    bit = tl.full(e.shape, 1, tl.uint32) << (e & 31)
    return tl.sum(tl.where(chosen & ((e >> 5) == WORD), bit, 0), axis=0).to(tl.uint32)


@triton.jit
def _words(chosen, e, WORDS: tl.constexpr):
    """Return the set of the chosen experts (E,) as four words."""
    b0 = _word(chosen, e, 0)
    b1, b2, b3 = b0, b0, b0
    if WORDS > 1:
        b1 = _word(chosen, e, 1)
    if WORDS > 2:
        b2, b3 = _word(chosen, e, 2), _word(chosen, e, 3)
    return b0, b1, b2, b3


@triton.jit
def _distortion(squares, products, mass):
    inverse = tl.where(mass > 0, 1.0 / tl.maximum(mass, 1e-20), 0.0)
    return inverse * (inverse * squares - 2 * products)


@triton.jit
def _total(mask, values):
    return tl.sum(tl.where(mask, values, 0.0), axis=1)


@triton.jit
def _select_kernel(
    p_ptr, logit_ptr, real_ptr, baseline_ptr, out_ptr, price_ptr, kappa_ptr, pair_ptr, open_ptr, s_ptr,
    favourite_weight, T, N, G,
    E: tl.constexpr, K: tl.constexpr, K_MIN: tl.constexpr, COUPLED: tl.constexpr, PROTECT: tl.constexpr,
    WEIGHED: tl.constexpr, HAS_REAL: tl.constexpr, HAS_BASELINE: tl.constexpr, ROUNDS: tl.constexpr,
    SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = (BLOCK_E + 31) // 32
    FLOOR: tl.constexpr = K_MIN if K_MIN > 1 else 1
    g = tl.program_id(0)
    n, e, k = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    row = n * G + g
    inside, there = (n < N) & (row < T), e < E
    mask = inside[:, None] & there[None, :]
    at = row[:, None] * E + e[None, :]
    slot_at, slots = row[:, None] * K + k[None, :], inside[:, None] & (k[None, :] < K)
    p = _probability(p_ptr, at, mask)
    score = _score(logit_ptr, at, mask)
    price = tl.load(price_ptr)
    if (price > 0) | (not HAS_BASELINE):
        kappa = tl.load(kappa_ptr)
        a0 = _preferred(logit_ptr, row * E, inside, score, E, 0)
        a1, a2, a3 = a0, a0, a0
        if WORDS > 1:
            a1 = _preferred(logit_ptr, row * E, inside, score, E, 1)
        if WORDS > 2:
            a2 = _preferred(logit_ptr, row * E, inside, score, E, 2)
            a3 = _preferred(logit_ptr, row * E, inside, score, E, 3)
        place = _count(a0, a1, a2, a3, a0, a1, a2, a3, WORDS)
        # Every pair has one bit unless its scores are equal, which is rare: then the expert of the lower number leads.
        pairs = tl.sum(tl.where(there[None, :], place, 0), axis=1)
        if tl.max((inside & (pairs != E * (E - 1) // 2)).to(tl.int32), axis=0) > 0:
            a0 = a0 | _level(logit_ptr, row * E, inside, score, e, E, 0)
            if WORDS > 1:
                a1 = a1 | _level(logit_ptr, row * E, inside, score, e, E, 1)
            if WORDS > 2:
                a2 = a2 | _level(logit_ptr, row * E, inside, score, e, E, 2)
                a3 = a3 | _level(logit_ptr, row * E, inside, score, e, E, 3)
            place = _count(a0, a1, a2, a3, a0, a1, a2, a3, WORDS)
        own = mask & (place < K)
        own_mass = tl.maximum(_total(own, p), 1e-20)

        o0, o1, o2, o3 = _words(there, e, WORDS)
        if COUPLED:
            real = mask
            if HAS_REAL:
                real = mask & (tl.load(real_ptr + row, mask=inside, other=0) != 0)[:, None]
            q = tl.where(real, p, 0.0)  # what has no probability has no say
            s = tl.load(s_ptr + e, mask=there, other=0.0) * kappa
            square = s[None, :] * q * q
            product = s[None, :] * q * tl.where(own, q, 0.0) / own_mass[:, None]
            costs = price * tl.load(open_ptr + e, mask=there, other=0.0)
            if PROTECT:
                kept = tl.max((real & (place < K_MIN)).to(tl.int32), axis=0) > 0
            if WEIGHED:
                more = tl.where(place < K_MIN, favourite_weight - 1.0, 0.0)
            opened = tl.max((own & real).to(tl.int32), axis=0) > 0
            opened = tl.where(price > 0, opened, there)  # at price 0 all are
            o0, o1, o2, o3 = _words(opened, e, WORDS)
            left = tl.sum(opened.to(tl.int32), axis=0)
            step, number = 0, (price > 0).to(tl.int32)
            while (step < ROUNDS) & (number > 0):
                opened = _holds(o0, o1, o2, o3, e, WORDS)
                place = _count(a0, a1, a2, a3, o0, o1, o2, o3, WORDS)
                within = opened[None, :] & (place <= K)  # a token's choice, and its best open one outside
                taken = opened[None, :] & (place < K)
                now = _distortion(_total(taken, square), _total(taken, product), _total(taken, q))
                after = _distortion(
                    _total(within, square)[:, None] - square,
                    _total(within, product)[:, None] - product,
                    _total(within, q)[:, None] - q,
                )
                lost = tl.where(taken & (q > 0), after - now[:, None], 0.0)
                if WEIGHED:
                    lost += more * tl.maximum(lost, 0.0)
                saving = tl.where(opened, costs - tl.sum(lost, axis=0), 0.0)
                if PROTECT:
                    saving = tl.where(kept, 0.0, saving)
                pays = saving > 0
                wanted = tl.sum(pays.to(tl.int32), axis=0)
                number = tl.minimum(tl.ceil(wanted.to(tl.float32) * SHARE).to(tl.int32), left - FLOOR)
                # The rank among savings, ties by number, from comparing all pairs: row f against column e.
                mine, other = saving[None, :], saving[:, None]
                ahead = (other > mine) | ((other == mine) & (e[:, None] < e[None, :]))
                close = pays & (tl.sum(ahead.to(tl.int32), axis=0) < number)
                c0, c1, c2, c3 = _words(close, e, WORDS)
                o0, o1, o2, o3 = o0 ^ c0, o1 ^ c1, o2 ^ c2, o3 ^ c3
                left -= number
                step += 1

        opened = _holds(o0, o1, o2, o3, e, WORDS)
        place = _count(a0, a1, a2, a3, o0, o1, o2, o3, WORDS)
        taken = mask & opened[None, :] & (place < K)
        # A token's choice in one word, a byte per place: the expert, and whether it is among the token's own top-k.
        byte = (e[None, :] + tl.where(own, 128, 0)).to(tl.int64) << (8 * place.to(tl.int64))
        packed, found = tl.sum(tl.where(taken, byte, 0), axis=1), tl.sum(taken.to(tl.int32), axis=1)
        marked = ((packed[:, None] >> (8 * k[None, :]).to(tl.int64)) & 255).to(tl.int32)
        chosen, used = marked & 127, slots & (k[None, :] < found[:, None])
        if K > K_MIN:
            p_k = _probability(p_ptr, row[:, None] * E + chosen, used)
            s_k = tl.load(s_ptr + chosen, mask=used, other=0.0) * kappa
            pair = price * tl.load(pair_ptr + chosen, mask=used, other=0.0)
            square_k = s_k * p_k * p_k
            product_k = s_k * p_k * tl.where(marked > 127, p_k, 0.0) / own_mass[:, None]
            step, going = 0, (price > 0).to(tl.int32)
            while (step < K - K_MIN) & (going > 0):
                mass, squares, products = _total(used, p_k), _total(used, square_k), _total(used, product_k)
                lost = (
                    _distortion(squares[:, None] - square_k, products[:, None] - product_k, mass[:, None] - p_k)
                    - _distortion(squares, products, mass)[:, None]
                )
                saved, slot = tl.max(tl.where(used, pair - lost, -float("inf")), axis=1, return_indices=True)
                gives_up = (saved > 0) & (tl.sum(used.to(tl.int32), axis=1) > K_MIN)
                used = used & ((k[None, :] != slot[:, None]) | (gives_up[:, None] == 0))
                going = tl.max(gives_up.to(tl.int32), axis=0)
                step += 1
        tl.store(out_ptr + slot_at, tl.where(used, chosen, E).to(tl.int64), mask=slots)
    else:
        if HAS_BASELINE:  # known when the kernel is compiled, as the condition above is not
            tl.store(out_ptr + slot_at, tl.load(baseline_ptr + slot_at, mask=slots, other=0), mask=slots)


def warps_for(block_n: int, block_e: int) -> int:
    """Return the warps of a program, between what keeps a processor busy and what makes them wait for each other.

    With four scores a thread, loaded at once, the experts of a token lie within one warp, so that only sums over tokens
    have to cross. The weighing of pairs wants more threads than places to fill: with fewer, the compiler lays those out
    across warps.

    Args:
        block_n: tokens of a group, a power of 2.
        block_e: experts, a power of 2.
    """
    if block_n * block_e > 8192:
        return 32
    return min(16, max(4, block_n * block_e // 128, block_n // 2))


def select(
    p: Tensor,
    logits: Tensor,
    real: Tensor | None,
    baseline: Tensor | None,
    price: Tensor,
    kappa: Tensor,
    pair_cost: Tensor,
    open_cost: Tensor,
    sensitivity: Tensor,
    groups: int,
    k_min: int,
    k_max: int,
    coupled: bool,
    protect: bool,
    favourite_weight: float,
    rounds: int,
    share: float,
) -> Tensor:
    """Return ids int64 (T, K), E for none; see `thermoe.routers.fused_selection`."""
    tokens, experts = p.shape
    out = torch.empty(tokens, k_max, dtype=torch.int64, device=p.device)
    size = triton.cdiv(tokens, groups)
    block_e = max(16, triton.next_power_of_2(experts))
    block_n = max(2, triton.next_power_of_2(size), 512 // block_e)  # no fewer scores than 4 warps take
    _select_kernel[(groups,)](
        p, logits, real, baseline, out, price, kappa, pair_cost, open_cost, sensitivity, favourite_weight, tokens,
        size, groups, E=experts, K=k_max, K_MIN=k_min, COUPLED=coupled, PROTECT=protect and k_min > 0,
        WEIGHED=favourite_weight != 1 and k_min > 0, HAS_REAL=real is not None, HAS_BASELINE=baseline is not None,
        ROUNDS=rounds, SHARE=share, BLOCK_N=block_n, BLOCK_E=block_e, BLOCK_K=max(2, triton.next_power_of_2(k_max)),
        num_warps=warps_for(block_n, block_e),
    )  # fmt: skip
    return out
