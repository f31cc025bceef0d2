"""Training under the price that a model will be served under: batches open fewer experts, and all weights learn that.

A price that leaves half of the distinct experts costs a trained model some loss, because its experts were made for the
whole choice. `UnderPrice` closes experts in training as serving will (`PricedRouter` in decode grouping), so that
experts, routers and the rest of the model learn to do with those left. The price follows from the share of distinct
experts that is asked for: found by bisection at first, then moved after every step by what the step opened.

For the time of the training the routers are priced ones over the same weights; afterwards the model has its own again.
Nothing waits for the device save at the start and every `REFRESH` steps.

Shape letters: N rows, S positions, T tokens, K slots, G groups of tokens routed together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thermoe.config import within
from thermoe.errors import ConfigError
from thermoe.moe.layer import MoELayer, routed_modules
from thermoe.routers.base import Router, sum_over_ranks
from thermoe.routers.priced import PricedRouter
from thermoe.routers.swap import set_router
from thermoe.routers.topk import TopKRouter
from thermoe.sensitivity import measure_sensitivity

Result = TypeVar("Result")
#: Steps between two measurements of the sensitivities and of what is open without a price.
REFRESH = 200
#: A step that opened 10 % too many raises the price by about so many percent.
GAIN = 0.1
#: A share that no price can leave (each token keeps an expert) must not drive the price beyond all numbers.
MOST_LOG_PRICE = 20.0
#: Batches of the served size that prices and sensitivities are measured on, and bisections of the first price.
BATCHES, BISECTIONS = 4, 12


@dataclass(kw_only=True, slots=True)
class PriceSettings:
    """Training under a price.

    Args:
        distinct_frac: share of the distinct experts that a served batch is to open, of those it opens without a price;
            1 trains without a price.
        served_batch: sequences that will be decoded together; the micro-batch is a multiple of it.
        start_frac: share of the steps before the price begins.
        steps_frac: share of the later steps that are made under the price; the others are made without one.
    """

    distinct_frac: float = 1.0
    served_batch: int = 16
    start_frac: float = 0.67
    steps_frac: float = 1.0

    @property
    def on(self) -> bool:
        """Whether there is a price at all."""
        return self.distinct_frac < 1

    def check(self, where: str, micro_batch_size: int) -> None:
        """Raise a ConfigError for a value outside its range."""
        within(f"{where}.served_batch", self.served_batch, 1)
        up_to_1, below_1 = "a number above 0, up to 1", "a number of at least 0 and below 1"
        for name, good, accepted, fix in (
            ("distinct_frac", 0 < self.distinct_frac <= 1, up_to_1, "use 0.5 for half of the distinct experts"),
            ("start_frac", 0 <= self.start_frac < 1, below_1, "use 0.67 to begin after two thirds"),
            ("steps_frac", 0 < self.steps_frac <= 1, up_to_1, "use 1, or distinct_frac=1 to train without a price"),
        ):
            if not good:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"{where}.{name}", accepted=accepted, fix=fix
                )
        if self.on and micro_batch_size % self.served_batch:
            raise ConfigError(
                f"a micro-batch of {micro_batch_size} sequences is no multiple of served_batch {self.served_batch}",
                where=f"{where}.served_batch",
                accepted=f"a divisor of {micro_batch_size}",
                fix="change served_batch, batch_size or gradient_accumulation_steps",
            )


class UnderPrice:
    """Trains a model under a price while its context is open; without one in the settings it does nothing.

    Args:
        model: with MoE layers of ours.
        settings: what is to stay open, and when.
        rows: integers (N, S), training text; some of it is what prices and sensitivities are measured on.
        steps: of the whole training.
        seed: of the choice of rows and of steps; a resumed training repeats.

    Raises:
        ConfigError: the model has no MoE layer, or a router is neither "topk" nor "priced".
    """

    def __init__(self, model: nn.Module, settings: PriceSettings, rows: Tensor, steps: int, seed: int = 0) -> None:
        self.model, self.settings, self.rows, self.seed = model, settings, rows, seed
        self.start = math.floor(settings.start_frac * steps)
        self.layers = list(routed_modules(model)) if settings.on else []
        self._priced: list[PricedRouter] = []
        self._hooks: list[Any] = []
        self._begun = False
        # Distinct experts per group of each layer in what is going on under a price; ``None`` when nothing is.
        self._opened: list[Tensor] | None = None
        self._replaced: dict[str, Router] = {}
        if settings.on:
            self._check()

    def _check(self) -> None:
        if not self.layers:
            raise ConfigError(
                f"{type(self.model).__name__} has no MoE layer to put a price on",
                where="training.price.distinct_frac",
                accepted="1 for a dense model",
                fix="leave training.price out",
            )
        for name, layer in self.layers:
            router = layer.router
            if not isinstance(layer, MoELayer):
                raise ConfigError(
                    "the experts of an attached model cannot be run one by one, which its sensitivities need",
                    where=name,
                    accepted="a model of ours, from scratch or converted",
                    fix="leave training.price out",
                )
            if type(router) not in (TopKRouter, PricedRouter):
                raise ConfigError(
                    f"the router is a {type(router).__name__}",
                    where=name,
                    accepted="topk or priced, to be trained under a price",
                    fix="use --set router.name=topk, or leave training.price out",
                )

    # -- the routers of the training ----------------------------------------------------------------------------------

    def __enter__(self) -> UnderPrice:
        if not self.layers:
            return self
        self._replaced = set_router(
            self.model, "priced", price=0.0, benefit="distortion", drop="all", favourite_weight=4.0,
            batch_invariant=False, group_by_position=True,
        )  # fmt: skip
        for name, layer in self.layers:
            router = layer.router
            assert isinstance(router, PricedRouter)
            router.weight = self._replaced[name].weight  # the optimiser knows this very parameter
            router.set_costs([0.0] * router.num_experts, [1.0] * router.num_experts)
            router.group_rows = self.settings.served_batch
            self._priced.append(router)
            self._hooks.append(layer.register_forward_hook(self._count))
        # Logarithm of the price in nats per opened expert, the distinct experts to leave, and those that the last step
        # left: no part of a saved model, but of a checkpoint.
        first = self._priced[0]
        first.register_buffer("training_price", torch.full((3,), math.nan, device=first.weight.device), False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        for (name, _), router in zip(self.layers, self._priced, strict=True):
            self._replaced[name].ramp.copy_(router.ramp)  # the gate's ramp has moved
        if self._replaced:
            set_router(self.model, self._replaced)
        self._hooks, self._priced, self._replaced = [], [], {}

    @property
    def _state(self) -> Tensor:
        return self._priced[0].training_price  # type: ignore[return-value]

    # -- step by step -------------------------------------------------------------------------------------------------

    def before_step(self, step: int) -> None:
        """Put the price on, if this step is to be made under one."""
        if not self._priced or step < self.start:
            return
        # What a checkpoint brought along is used as it is, so that a resumed training repeats.
        begun, self._begun = self._begun or bool(self._state[0].isfinite()), True
        if not begun or (step - self.start) % REFRESH == 0:
            self._measure()
        drawn = random.Random(self.seed * 1_000_003 + step).random()  # of the step alone, so that a resumed run repeats
        if drawn < self.settings.steps_frac:
            self._begin(self._state[0].exp())

    def after_step(self) -> None:
        """Take the price off, and move it by what the step opened."""
        if self._opened is None:
            return
        opened = self._end()
        if opened is not None:
            self._state[2] = opened
            moved = self._state[0] + GAIN * (opened.log() - self._state[1].log())
            self._state[0] = moved.clamp(-MOST_LOG_PRICE, MOST_LOG_PRICE)

    def figures(self) -> dict[str, float]:
        """Return the price in nats per opened expert and what the last step under it opened, read from the device.

        Empty before the first such step.
        """
        if not self._priced:
            return {}
        log_price, _, opened = self._state.tolist()
        return {"price_nats": math.exp(log_price), "distinct_under_price": opened} if math.isfinite(opened) else {}

    def held_out(self, score: Callable[[], float]) -> dict[str, float]:
        """Score held-out text as the model will be served; empty where no price was ever searched.

        Args:
            score: forwards held-out text and returns its perplexity.

        Returns:
            `ppl_under_price`, and the distinct experts per layer that a served batch opened: `distinct_under_price`,
            and `distinct_experts` without the price.
        """
        if not self._priced or not bool(self._state[0].isfinite()):
            return {}
        _, every = self._opened_by(score, 0.0)
        ppl, opened = self._opened_by(score, math.exp(float(self._state[0])))
        return {"ppl_under_price": ppl, "distinct_under_price": opened, "distinct_experts": every}

    def _begin(self, price: Tensor) -> None:
        for router in self._priced:
            router.price.copy_(price)
        self._opened = []

    def _end(self) -> Tensor | None:
        """Take the price off; return the distinct experts, a mean over groups, layers, forwards and ranks."""
        for router in self._priced:
            router.price.zero_()
        opened, self._opened = self._opened, None
        if not opened:
            return None
        both = torch.stack([torch.stack(opened).sum(), opened[0].new_tensor(float(len(opened)))])
        sum_over_ranks(both)
        return both[0] / both[1]

    @torch.no_grad()
    def _count(self, layer: MoELayer, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Note the distinct experts per group of the forward just made, on the device."""
        decision, rows, batch = layer.last_routing, self.settings.served_batch, len(args[0])
        if args[0].ndim == 2 and layer.call_shape is not None:
            batch = layer.call_shape[0]
        if self._opened is None or decision is None:
            return
        groups = batch if batch % rows else rows  # as `PricedRouter.group_rows` has it
        groups_GK = decision.expert_index.view(groups, -1, decision.expert_index.shape[-1]).transpose(0, 1).flatten(1)
        seen = torch.zeros(len(groups_GK), decision.num_experts + 1, device=groups_GK.device)
        opened = seen.scatter_(1, groups_GK, 1.0)[:, :-1].sum(1).mean()
        self._opened.append(opened.to(self._state.device))  # layers may be spread over devices

    # -- what is measured now and then --------------------------------------------------------------------------------

    def _measure(self) -> None:
        """Measure sensitivities and what is open without a price; the first time, search the price."""
        size = self.settings.served_batch
        chosen = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.seed))[: BATCHES * size]
        rows = self.rows[chosen.to(self.rows.device)].to(self._state.device, torch.long)
        drawn = [router.active_top_k for router in self._priced]  # random k has drawn for the step to come
        for router in self._priced:
            router.active_top_k = None
        found = measure_sensitivity(self.model, rows, batch_size=size)
        self._state[1] = self.settings.distinct_frac * self._opened_at(rows, 0.0)
        if not bool(self._state[0].isfinite()):
            target, mean = float(self._state[1]), max(float(torch.cat(list(found.values())).mean()), 1e-12)
            low, high = math.log(1e-4 * mean), math.log(1e3 * mean)
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if self._opened_at(rows, math.exp(middle)) > target else (low, middle)
            self._state[0] = (low + high) / 2
        for router, active in zip(self._priced, drawn, strict=True):
            router.active_top_k = active

    @torch.no_grad()
    def _opened_at(self, rows: Tensor, price: float) -> float:
        """Return distinct experts per layer on rows (N, S) at a price; reads the device."""
        training = self.model.training
        self.model.eval()

        def read() -> None:
            for part in rows.split(self.settings.served_batch):
                self.model(part, use_cache=False)

        _, opened = self._opened_by(read, price)
        self.model.train(training)
        return opened

    def _opened_by(self, forwards: Callable[[], Result], price: float) -> tuple[Result, float]:
        """Return what ``forwards`` returns, and the distinct experts that its forwards opened at a price."""
        self._begin(self._state.new_tensor(price))
        result = forwards()
        opened = self._end()
        assert opened is not None
        return result, float(opened)
