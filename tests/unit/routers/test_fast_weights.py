"""Every family of fast weights starts as nothing, adds what it says, and stays float32."""

from __future__ import annotations

import pytest
import torch

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.routers.fast_weights import FAST_FAMILIES, FastFamily, FastWeights
from thermoe.routers.swap import build_router
from thermoe.testing import tiny_moe

D, E, T = 12, 6, 40


def _slow() -> torch.Tensor:
    return torch.randn(E, D, generator=torch.Generator().manual_seed(0))


def _randomised(fast: FastWeights) -> FastWeights:
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return fast


@pytest.mark.parametrize("name", ["topk", "null", "priced"])
@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_at_zero_the_router_is_the_slow_one_bit_for_bit(name: str, family: FastFamily) -> None:
    router, x = build_router(name, D, E, 2), torch.randn(T, D)
    before = router(x)
    router.fast = FastWeights.of(router.weight, family)
    after = router(x)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.expert_index, before.expert_index)
    assert torch.equal(after.weights, before.weights)
    _randomised(router.fast)
    moved = router(x).logits
    assert (moved[:, :E] != before.logits[:, :E]).any() and torch.equal(moved[:, E:], before.logits[:, E:])


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_reset_is_as_made(family: FastFamily) -> None:
    fast = FastWeights.of(_slow(), family)
    made = {name: value.clone() for name, value in fast.state_dict().items()}
    fast.set_statistics(torch.randn(E), torch.rand(E) + 0.1)
    _randomised(fast).reset()
    assert made.keys() == fast.state_dict().keys()
    assert all(torch.equal(value, made[name]) for name, value in fast.state_dict().items())


def test_mix_reads_the_slow_logits_standardised() -> None:
    fast = _randomised(FastWeights(D, E, "mix"))
    x, slow = torch.randn(T, D), 3 + 5 * torch.randn(T, E)
    mean, sd = slow.mean(0), slow.std(0, correction=0)
    sd[2] = 0.0
    fast.set_statistics(mean, sd)
    assert fast.scale[2] == 1 and fast.matrix is not None
    zbar = (slow - mean) / torch.where(sd > 0, sd, 1.0)
    torch.testing.assert_close(fast(x, slow), fast.delta + zbar @ fast.matrix.T)
    names = {name for name, _ in fast.named_parameters()}
    assert names == {"delta", "matrix"}, "statistics are not learned"


def test_low_rank_listens_where_the_slow_router_does() -> None:
    slow = _slow()
    fast = _randomised(FastWeights.of(slow, "low_rank", rank=3))
    torch.testing.assert_close(fast.directions @ fast.directions.T, torch.eye(3), atol=1e-5, rtol=0)
    assert fast.matrix is not None
    effective = fast.matrix @ fast.directions
    inside = torch.linalg.lstsq(slow.T, effective.T).solution
    torch.testing.assert_close(slow.T @ inside, effective.T, atol=1e-4, rtol=1e-4)
    kept = (slow @ fast.directions.T).square().sum()
    torch.testing.assert_close(kept, torch.linalg.svdvals(slow)[:3].square().sum())
    assert FastWeights.of(slow, "low_rank", rank=50).rank == E


def test_random_directions_are_seeded() -> None:
    one, same, other = (FastWeights(D, E, "low_rank", rank=4, seed=seed).directions for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.testing.assert_close(one @ one.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_a_model_cast_to_half_precision_leaves_them_whole(family: FastFamily) -> None:
    model = tiny_moe()
    router = model.transformer.h[0].mlp.router
    router.fast = _randomised(FastWeights.of(router.weight, family))
    before = {name: value.clone() for name, value in router.fast.state_dict().items()}
    model.bfloat16()
    assert all(torch.equal(value, before[name]) for name, value in router.fast.state_dict().items())


def test_what_is_no_setting_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="family"):
        FastWeights(D, E, "fulll")  # type: ignore[arg-type]
    for rank in (0, D + 1, 2.0, True):
        with pytest.raises(ConfigError, match="rank"):
            FastWeights(D, E, "low_rank", rank=rank)  # type: ignore[arg-type]
    fast, good = FastWeights(D, E, "mix"), torch.ones(E)
    for mean, sd in ((good[:-1], good), (good * float("nan"), good), (good, -good), (good, 1.0)):
        with pytest.raises(ConfigError, match="slow logits"):
            fast.set_statistics(mean, sd)  # type: ignore[arg-type]
    assert torch.equal(fast.mean, torch.zeros(E)) and torch.equal(fast.scale, good)
