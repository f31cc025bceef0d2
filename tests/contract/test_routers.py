"""Every registered router, in every setting that takes another path, keeps every rule of the contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext
from thermoe.routers import swap  # noqa: F401  (fills the registry)
from thermoe.routers.base import ROUTERS, Router
from thermoe.routers.swap import build_router
from thermoe.testing import ROUTER_RULES, check_router

D, E, K = 16, 8, 3
COSTS = [0.5, 1.5, 1.0, 1.0, 0.25, 1.75, 1.0, 1.0]
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ROUTERS},
    "topk, probability gate": ("topk", {"gate": "probability"}),
    "topk, ramped gate": ("topk", {"gate": "ramped"}),
    "topk, capacity in training": ("topk", {"capacity_factor": 1.0, "temperature": 1.0}),
    "priced, pair costs": ("priced", {"price": 0.1, "pair_cost": COSTS}),
    "priced, k_min 0": ("priced", {"price": 0.2, "k_min": 0}),
    "priced, opening costs": ("priced", {"price": 0.05, "pair_cost": COSTS, "open_cost": [2.0] * E}),
    "priced, decode grouping": ("priced", {"price": 0.05, "open_cost": [2.0] * E, "group_by_position": True}),
    "priced, batch invariant": ("priced", {"price": 0.05, "open_cost": [2.0] * E, "batch_invariant": True}),
    "priced, phase2": ("priced", {"price": 0.05, "open_cost": [2.0] * E, "drop": "phase2", "gate": "ramped"}),
    "priced, no drop pass": ("priced", {"price": 0.05, "open_cost": [2.0] * E, "drop": "none"}),
}
# A token that may keep no expert has none to lose, and the rule on padding asks that real tokens keep some.
NOT_DUE = {("priced, k_min 0", "padding")}


@pytest.mark.parametrize("rule", ROUTER_RULES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_contract(setting: str, rule: str) -> None:
    if (setting, rule) in NOT_DUE:
        pytest.skip("the rule is about routers that give each token an expert")
    name, options = SETTINGS[setting]
    check_router(lambda: build_router(name, D, E, K, options), rules=[rule])


class _Plain(Router):
    """A router that keeps the contract; each breach below changes one thing."""

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return torch.topk(logits, self.active_top_k or self.top_k, -1).indices


class _BreaksRecord(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return super().select(logits, probabilities, context)[:, :1].expand(-1, self.top_k)


class _BreaksWeights(_Plain):
    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Any:
        decision = super().forward(x_TD, context)
        return replace(decision, weights=decision.weights * 0.9)


class _BreaksNoSync(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return super().select(logits if float(logits.sum()) > 0 else logits + 1, probabilities, context)


class _BreaksFloat32(_Plain):
    def scores(self, x_TD: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_TD, self.weight).float()


class _BreaksPadding(_Plain):
    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Any:
        return super().forward(x_TD, None)


class _BreaksSizes(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return torch.topk(logits, self.top_k, -1).indices


class _BreaksDeterministic(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return super().select(logits + torch.randn_like(logits), probabilities, context)


class _BreaksCausal(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return super().select(logits - logits.mean(0), probabilities, context)


class _BreaksNotFinite(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        index = super().select(logits, probabilities, context)
        return torch.where(logits.isnan().any(-1, keepdim=True), -1, index)


class _BreaksState(_Plain):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_state = torch.randn(self.num_experts)  # no buffer, so that no state_dict has it

    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return super().select(logits + self.hidden_state.to(logits.device), probabilities, context)


BREACHES: dict[str, type[Router]] = {
    "record": _BreaksRecord,
    "weights": _BreaksWeights,
    "no_sync": _BreaksNoSync,
    "float32": _BreaksFloat32,
    "padding": _BreaksPadding,
    "sizes": _BreaksSizes,
    "deterministic": _BreaksDeterministic,
    "causal": _BreaksCausal,
    "not_finite": _BreaksNotFinite,
    "state": _BreaksState,
}


def test_a_plain_router_keeps_the_contract() -> None:
    check_router(lambda: _Plain(D, E, K))


class _ReadsCosts(_Plain):
    def select(self, logits: Tensor, probabilities: Tensor, context: RoutingContext) -> Tensor:
        return super().select(logits.cpu().to(logits.device), probabilities, context)


def test_a_copy_to_the_host_is_noticed() -> None:
    with pytest.raises(AssertionError, match="no_sync: the forward calls cpu"):
        check_router(lambda: _ReadsCosts(D, E, K), rules=["no_sync"])


@pytest.mark.parametrize("rule", ROUTER_RULES)
def test_each_rule_notices_its_breach(rule: str) -> None:
    with pytest.raises(AssertionError, match=f"^{rule}: "):
        check_router(lambda: BREACHES[rule](D, E, K), rules=[rule])
