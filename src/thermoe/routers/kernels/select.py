"""The whole selection by distortion of one group of tokens in one program, in Triton.

See `thermoe.routers.selection` for what is computed: close what brings less than it costs, take the best open experts,
give up pairs; at price 0 copy the baseline. A group's scores stay in registers from the first to the last step; an
order that PyTorch finds by sorting is found by taking the largest K times. Sums run in another order than PyTorch's, so
that near ties (about 1e-6) may fall the other way.

Shape letters: T tokens, E experts, K slots, G groups, N tokens of a group (token n of group g is row n * G + g).
"""
# No postponed annotations here: Triton reads `tl.constexpr` from them.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _largest(x, e):
    """Return the place of the largest of each row as a one-hot mask, none in a row without any."""
    value, place = tl.max(x, axis=1, return_indices=True)
    return (e[None, :] == place[:, None]) & (value[:, None] > -float("inf"))


@triton.jit
def _top(x, e, K: tl.constexpr):
    """Return the mask of the K largest of each row, and the rest with these taken out."""
    found = x != x
    for _ in range(K):
        hit = _largest(x, e)
        found = found | hit
        x = tl.where(hit, -float("inf"), x)
    return found, x


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
    favourite_weight, T, N, G, E,
    K: tl.constexpr, K_MIN: tl.constexpr, COUPLED: tl.constexpr, PROTECT: tl.constexpr, HAS_REAL: tl.constexpr,
    ROUNDS: tl.constexpr, SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    none = -float("inf")
    g = tl.program_id(0)
    n, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    row = n * G + g
    inside, there = (n < N) & (row < T), e < E
    real = inside
    mask = real[:, None] & there[None, :]
    at = row[:, None] * E + e[None, :]
    p = tl.maximum(tl.load(p_ptr + at, mask=mask, other=0.0), 0.0)
    logit = tl.maximum(tl.load(logit_ptr + at, mask=mask, other=0.0), -3.0e38)  # a score that is no number comes last
    if HAS_REAL:
        real = real & (tl.load(real_ptr + row, mask=real, other=0) != 0)
    price = tl.load(price_ptr)
    if price > 0:
        s = tl.load(s_ptr + e, mask=there, other=0.0) * tl.load(kappa_ptr)
        square_all = s[None, :] * p * p

        opened = there
        if COUPLED:
            own, rest = _top(tl.where(mask, p, none), e, K)
            w = tl.where(own, p, 0.0) / tl.maximum(_total(own, p), 1e-20)[:, None]
            product_all = s[None, :] * p * w
            opened = tl.max((own & real[:, None]).to(tl.int32), axis=0) > 0
            kept = there & (e < 0)
            first = mask & (e[None, :] < 0)
            if K_MIN > 0:
                first, rest = _top(tl.where(mask, p, none), e, K_MIN)
            if PROTECT:
                kept = tl.max((first & real[:, None]).to(tl.int32), axis=0) > 0
            costs = price * tl.load(open_ptr + e, mask=there, other=0.0)
            step, closing = 0, 1
            while (step < ROUNDS) & (closing > 0):
                taken, rest = _top(tl.where(mask & opened[None, :], p, none), e, K)
                spare = _largest(rest, e)
                mass, squares, products = _total(taken, p), _total(taken, square_all), _total(taken, product_all)
                now = _distortion(squares, products, mass)
                after = _distortion(
                    (squares + _total(spare, square_all))[:, None] - square_all,
                    (products + _total(spare, product_all))[:, None] - product_all,
                    (mass + _total(spare, p))[:, None] - p,
                )
                lost = tl.where(taken & (p > 0) & real[:, None], after - now[:, None], 0.0)
                loss = tl.sum(tl.where(first & (lost > 0), favourite_weight * lost, lost), axis=0)
                saving = tl.maximum(tl.where(opened & (kept == 0), costs - loss, 0.0), 0.0)
                wanted = tl.sum((saving > 0).to(tl.int32), axis=0)
                most = tl.sum(opened.to(tl.int32), axis=0) - (K_MIN if K_MIN > 1 else 1)
                number = tl.minimum(tl.ceil(wanted.to(tl.float32) * SHARE).to(tl.int32), most)
                # The rank among savings, ties by number, from comparing all pairs: column e against row f.
                other = tl.sum(tl.where(e[:, None] == e[None, :], saving[None, :], 0.0), axis=1)
                ahead = (other[:, None] > saving[None, :]) | (
                    (other[:, None] == saving[None, :]) & (e[:, None] < e[None, :])
                )
                rank = tl.sum((ahead & there[:, None]).to(tl.int32), axis=0)
                close = (rank < number) & (saving > 0)
                opened = opened & (close == 0)
                closing = tl.sum(close.to(tl.int32), axis=0)
                step += 1

        ranked = tl.where(mask & opened[None, :], logit, none)
        taken, rest = _top(ranked, e, K)
        left = taken
        if K > K_MIN:
            own, rest = _top(tl.where(mask, logit, none), e, K)
            w = tl.where(own, p, 0.0) / tl.maximum(_total(own, p), 1e-20)[:, None]
            product_all = s[None, :] * p * w
            pair = price * tl.load(pair_ptr + e, mask=there, other=0.0)
            for _ in range(K - K_MIN):
                total, total_squares, total_products = (
                    _total(left, p),
                    _total(left, square_all),
                    _total(left, product_all),
                )
                lost = (
                    _distortion(
                        total_squares[:, None] - square_all, total_products[:, None] - product_all, total[:, None] - p
                    )
                    - _distortion(total_squares, total_products, total)[:, None]
                )
                saved = tl.where(left, pair[None, :] - lost, none)
                gives_up = (tl.max(saved, axis=1) > 0) & (tl.sum(left.to(tl.int32), axis=1) > K_MIN)
                left = left & ((_largest(saved, e) & gives_up[:, None]) == 0)

        for k in range(K):
            hit = _largest(ranked, e)
            chosen = tl.sum(tl.where(hit & left, e[None, :] + 1, 0), axis=1)  # 0 is none
            tl.store(out_ptr + row * K + k, tl.where(chosen > 0, chosen - 1, E).to(tl.int64), mask=inside)
            ranked = tl.where(hit, none, ranked)
    else:
        for k in range(K):
            tl.store(out_ptr + row * K + k, tl.load(baseline_ptr + row * K + k, mask=inside, other=0), mask=inside)


def select(
    p: Tensor,
    logits: Tensor,
    real: Tensor | None,
    baseline: Tensor,
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
    block_n, block_e = max(2, triton.next_power_of_2(size)), max(16, triton.next_power_of_2(experts))
    _select_kernel[(groups,)](
        p, logits, real, baseline, out, price, kappa, pair_cost, open_cost, sensitivity, favourite_weight, tokens,
        size, groups, experts,
        K=k_max, K_MIN=k_min, COUPLED=coupled, PROTECT=protect and k_min > 0, HAS_REAL=real is not None,
        ROUNDS=rounds, SHARE=share, BLOCK_N=block_n, BLOCK_E=block_e,
        num_warps=16 if block_n * block_e > 4096 else min(8, max(1, block_n * block_e // 128)),
    )  # fmt: skip
    return out
