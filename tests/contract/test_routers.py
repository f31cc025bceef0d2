"""Every registered router, in every setting that takes another path, keeps every rule of the contract."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from thermoe.moe.decision import RoutingContext, RoutingDecision
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
SETTINGS |= {
    "noisy_topk, capacity in training": ("noisy_topk", {"capacity_factor": 1.0}),
    "sigmoid_bias, probability gate": ("sigmoid_bias", {"gate": "probability"}),
    "sigmoid_bias, adapted": ("sigmoid_bias", {"gamma": 0.05}),
    "threshold, adapted": ("threshold", {"ema": 0.9, "max_experts": 5}),
    "threshold, k_min 0": ("threshold", {"k_min": 0}),
    "top_p, ramped gate": ("top_p", {"theta": 0.8, "gate": "ramped"}),
    "top_p, adapted": ("top_p", {"theta": 0.8, "k_min": 2, "target_k": 2.5}),
    "oea, decode grouping": ("oea", {"k0": 1, "group_by_position": True, "gate": "probability"}),
    "oea, batch invariant": ("oea", {"batch_invariant": True}),
    "mass_keep, decode grouping": ("mass_keep", {"keep": 2, "group_by_position": True}),
    "sinkhorn, ramped gate": ("sinkhorn", {"gate": "ramped", "iterations": 3}),
    "expert_choice, probability gate": ("expert_choice", {"gate": "probability"}),
    "hash, another seed": ("hash", {"seed": 7}),
    "round_robin, offset": ("round_robin", {"offset": 5}),
    "fixed, two experts": ("fixed", {"experts": [6, 2]}),
    "null, both kinds": ("null", {"num_zero": 1, "num_identity": 1}),
    "null, both kinds, probability gate": ("null", {"num_zero": 1, "num_identity": 1, "gate": "probability"}),
    "null, identity alone, ramped gate": ("null", {"num_zero": 0, "num_identity": 2, "gate": "ramped"}),
    "null, as many as slots": ("null", {"num_zero": 3}),
}
_MAY_HAVE_NONE = "the rule on padding asks that real tokens keep an expert, and here one may choose to have none"
NOT_DUE = {(name, "padding"): _MAY_HAVE_NONE for name in ("priced, k_min 0", "null, as many as slots")}


def _build(setting: str) -> Router:
    """Build a router, after two steps of training where the setting says adapted."""
    name, options = SETTINGS[setting]
    router = build_router(name, D, E, K, options)
    if setting.endswith("adapted"):
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            logits = torch.randn(64, E, generator=generator)
            index = logits.topk(K).indices
            router.observe(RoutingDecision(logits, router.probabilities(logits), index, torch.ones(64, K)))
            router.after_step()
        assert any((getattr(router, name) != 0).any() for name in router.adaptive)
    return router


@pytest.mark.parametrize("rule", ROUTER_RULES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_contract(setting: str, rule: str) -> None:
    if (setting, rule) in NOT_DUE:
        pytest.skip(NOT_DUE[setting, rule])
    check_router(lambda: _build(setting), rules=[rule])


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


class _SaysNotCausal(_Plain):
    causal = False


class _DecodesAllTheSame(_BreaksCausal):
    causal = False


@pytest.mark.parametrize(
    ("broken", "message"),
    [(_SaysNotCausal, "says that it is not causal"), (_DecodesAllTheSame, "routes a step of generation")],
)
def test_an_exemption_from_causality_has_to_be_honest(broken: type[Router], message: str) -> None:
    with pytest.raises(AssertionError, match=f"^causal: .*{message}"):
        check_router(lambda: broken(D, E, K), rules=["causal"])


class _OwnProbabilities(_Plain):
    def forward(self, x_TD: Tensor, context: RoutingContext | None = None) -> Any:
        decision = super().forward(x_TD, context)
        return replace(decision, probabilities=torch.sigmoid(decision.logits))


def test_probabilities_that_a_router_does_not_declare_are_noticed() -> None:
    with pytest.raises(AssertionError, match="record: probabilities do not follow"):
        check_router(lambda: _OwnProbabilities(D, E, K), rules=["record"])


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
