"""Which cures free a router that sends every token to the same two of eight experts.

The task has eight clusters of tokens, each with a linear map of its own, so that eight experts have something to do.
The router starts with a large score for two experts on a feature that every token has. Measured here with the top-k
router (k = 2, renormalised weights), at 400 steps, over six seeds: without a cure two experts remain; `load_std`
comes back to 7.5-7.9 effective experts, `kl_uniform` to 7.4-7.9, sampling at temperature 2 to 7.0-7.8, the default
terms to 5.7-7.4, all without a dead expert. So do the other forms, with the z-loss beside them (three seeds):
`load_std_root` at 0.03 7.9-8.0 (at 0.01 5.8-7.9), `entropy_marginal` 7.2-7.7, `kl_uniform_reverse` 7.4-7.6.
Alone, `switch_hf` at the coefficient of Mixtral gets to 4.8-5.3 with two dead experts, and `entropy_token` at 0.01
frees 5.4-7.4 (one dead in one seed) at twice the error: the experts come back, the choice among them does not.
`importance` changes nothing, at 0.1 as at 0.01: its gradient reaches chosen experts only.
`entropy` frees most of them (5.3-7.1) and left one dead in two seeds of six: decisive routing is what it asks for.
"""

from __future__ import annotations

import pytest
import torch

from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer
from thermoe.moe.losses import DEFAULT_BALANCE, default_balance, routing_loss
from thermoe.moe.stats import RoutingStats, StatsAccumulator
from thermoe.routers.topk import TopKRouter

D, E, K, TOKENS, STEPS = 16, 8, 2, 256, 400
JUDGED = 100 * E  # as many tokens as a dead expert can be told from
SEEDS = (0, 1, 2)


def _train(seed: int, terms: dict[str, float], temperature: float | None) -> tuple[RoutingStats, RoutingStats, float]:
    """Return the statistics before and after training, and the task's error after it."""
    torch.manual_seed(seed)
    centres, maps = torch.randn(E, D - 1), torch.randn(E, D, D) / 4

    def batch(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
        cluster = torch.randint(0, E, (tokens,))
        x = torch.cat([torch.ones(tokens, 1), centres[cluster] + 0.3 * torch.randn(tokens, D - 1)], 1)
        return x, torch.einsum("td,tdf->tf", x, maps[cluster])

    layer = MoELayer(TopKRouter(D, E, K, temperature=temperature), Experts(E, D, 16))
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.normal_(std=0.3)
        layer.router.weight.normal_(std=0.02)
        layer.router.weight[:K, 0] += 4.0
    fixed = batch(JUDGED)

    def measure() -> tuple[RoutingStats, float]:
        accumulator = StatsAccumulator()
        layer.eval()
        with torch.no_grad():
            error = (layer(fixed[0]) - fixed[1]).square().mean()
        accumulator.add(layer.last_routing)
        layer.train()
        stats = accumulator.result()
        assert stats is not None
        return stats, float(error)

    before, _ = measure()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(STEPS):
        x, y = batch()
        loss = (layer(x) - y).square().mean()
        auxiliary = routing_loss([layer.last_routing], terms)
        optimizer.zero_grad()
        (loss if auxiliary is None else loss + auxiliary).backward()
        optimizer.step()
    return before, *measure()


#: name: (loss terms, temperature, least effective experts, most dead experts)
CURES: dict[str, tuple[dict[str, float], float | None, float, int]] = {
    "default": (DEFAULT_BALANCE, None, 5.0, 0),
    "load_std": ({"load_std": 1e-2}, None, 7.0, 0),
    "kl_uniform": ({"kl_uniform": 1e-1}, None, 7.0, 0),
    "load_std_root": (default_balance("load_std_root"), None, 7.0, 0),
    "kl_uniform_reverse": (default_balance("kl_uniform_reverse"), None, 6.5, 0),
    "entropy": ({"entropy": 1e-1}, None, 4.0, 2),
    "temperature": ({}, 2.0, 6.0, 1),
}


@pytest.fixture(scope="module")
def untreated() -> dict[int, tuple[RoutingStats, RoutingStats, float]]:
    return {seed: _train(seed, {}, None) for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_cure_the_collapse_stays(
    untreated: dict[int, tuple[RoutingStats, RoutingStats, float]], seed: int
) -> None:
    before, after, _ = untreated[seed]
    assert before.effective_experts < 2.01
    assert before.dead_experts == E - K
    assert after.effective_experts < 3
    assert after.dead_experts >= 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cure", CURES)
def test_recovery(untreated: dict[int, tuple[RoutingStats, RoutingStats, float]], cure: str, seed: int) -> None:
    terms, temperature, effective, dead = CURES[cure]
    before, after, error = _train(seed, terms, temperature)
    assert before.effective_experts < 2.01
    assert after.effective_experts > effective
    assert after.dead_experts <= dead
    assert error < untreated[seed][2], "experts that came back serve the task"


@pytest.mark.slow
def test_importance_does_not_bring_back_an_expert_that_nothing_chooses() -> None:
    _, after, _ = _train(0, {"importance": 1e-1}, None)
    assert after.effective_experts < 3 and after.dead_experts == E - K
