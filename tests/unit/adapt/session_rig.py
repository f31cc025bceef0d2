"""A simulated board whose load is the modelled joules of the forwards that run, on a clock that only they move."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.adapt.session import AdaptiveSession
from thermoe.adapt.test_time import RouterAdapter
from thermoe.energy.cost_model import CostModel
from thermoe.energy.work import ModelWork
from thermoe.models.convert import convert_to_moe
from thermoe.moe.layer import routed_modules
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.plant import Board, Fault, StepLoad
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.testing import random_tokens, tiny_gpt2

FORWARD_S = 0.2


def scaled_cost(factor: float) -> CostModel:
    """Return the prior times a factor, so that a tiny model draws the watts of a large one."""
    prior = CostModel.prior()
    return replace(prior, terms={name: replace(term, value=term.value * factor) for name, term in prior.terms.items()})


def joules_of(model: nn.Module, cost: CostModel, tokens: int) -> float:
    """Return what the cost model says of the forward that the routers of ``model`` just saw."""
    decisions = [module.last_routing for _, module in routed_modules(model)]
    pairs = [d.counts.tolist() for d in decisions if d is not None]
    opened = [d.opened.float().tolist() for d in decisions if d is not None]
    return cost.forward_j(ModelWork.of(model), tokens, pairs, opened)


def one_layer() -> Any:
    """Return a tiny MoE of one layer, whose router is decided enough to choose differently per token."""
    model = convert_to_moe(tiny_gpt2(n_layer=1), num_experts=8, top_k=4)
    with torch.no_grad():
        for _, module in routed_modules(model):
            module.router.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
    return model.eval()


class Rig:
    """A model, and a board on which its forwards take 0.2 s each and draw the joules the cost model gives them.

    Args:
        faults: of the board's sensors.
        gain: true joules over modelled ones.
        watts: work power of a forward at price 0, about.
        batch: sequences.
    """

    def __init__(
        self,
        *,
        faults: Iterable[Fault] = (),
        gain: float = 1.0,
        watts: float = 300.0,
        batch: int = 8,
        model: Any = None,
        noise: float = 0.01,
    ) -> None:
        self.model = one_layer() if model is None else model
        self.batch, self.gain = batch, gain
        self._seed = 0
        self.model(self.ids())
        plain_j = joules_of(self.model, CostModel.prior(), batch)
        self.cost = scaled_cost(watts * FORWARD_S / plain_j)
        self.clock, self.load = VirtualClock(), StepLoad()
        board = Board(gain_rel_limit=0.0, noise_rel_sd=noise)
        self.source = SimulatedSource(seed=1, clock=self.clock, load=self.load, board=board, faults=faults)
        self.meter = EnergyMeter(self.source, clock=self.clock)
        self.spent_j: list[float] = []
        self.model.register_forward_hook(self._spend)

    def ids(self, length: int = 1) -> Tensor:
        """Return new token ids (batch, length)."""
        self._seed += 1
        return random_tokens(self.batch, length, seed=self._seed)

    def _spend(self, module: nn.Module, args: Any, output: Any) -> None:
        tokens = output.logits.shape[0] * output.logits.shape[1]
        self._draw(joules_of(self.model, self.cost, tokens))

    def _draw(self, energy_j: float) -> None:
        self.spent_j.append(energy_j)
        self.load.set(self.clock.now_s(), self.gain * energy_j / FORWARD_S)
        for _ in range(4):
            self.clock.sleep_s(FORWARD_S / 4)
            if self.meter.sampler is not None:
                self.meter.sampler.poll()

    def charge_updates(self, adapter: RouterAdapter) -> None:
        """Let each update of ``adapter`` take a forward's time and draw the joules that its account gives it."""
        account = adapter._learner.live.account
        spend = account.spend

        def charged(kind: Any, tokens: int, energy_j: float, since_s: float) -> None:
            if kind == "update":
                self._draw(energy_j)
            spend(kind, tokens, energy_j, since_s)

        account.spend = charged  # type: ignore[method-assign]

    def session(self, budget: Any = None, **options: Any) -> AdaptiveSession:
        """Return a session on this board."""
        return AdaptiveSession(self.model, budget, **{"meter": self.meter, "cost_model": self.cost, **options})

    @torch.no_grad()
    def run(self, session: AdaptiveSession, seconds: float, length: int = 1) -> list[dict[str, Any]]:
        """Run forwards for so long, with a step after every fifth; return the metrics."""
        found = []
        until_s = self.clock.now_s() + seconds
        while self.clock.now_s() < until_s:
            for _ in range(5):
                self.model(self.ids(length))
            found.append(session.step())
        return found
