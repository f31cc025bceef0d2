"""What a session does to a model, and undoes: priced routers that know their costs, and a hook that sees every forward.

The hook keeps references to the decisions of a forward and, on a GPU, records an event behind its work. It reads no
device. Leaving puts the routers back that were there, the same objects, whoever put others in their place, and the
buffers of those that were priced before back to the value they had (`keeping.py`).

Forwards and steps may come from different threads. A forward made while another thread searches for a price is counted
like any other, and its rows are not kept for the search, so that it neither waits nor changes what is searched.

Forwards that serve nobody (`learning_work.serving_nothing`) are no tokens, and their routing is not the one that is
served: they are passed over.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.adapt.budget import PHASES, Phase
from thermoe.adapt.keeping import keep_routers
from thermoe.adapt.learning_work import is_serving
from thermoe.adapt.price import PriceSolver
from thermoe.adapt.steps import Forward, ForwardCount, ForwardLog, HostMark
from thermoe.energy.cost_model import CostModel
from thermoe.energy.read_cost import ReadCost
from thermoe.energy.work import ModelWork
from thermoe.energy.workload import EventClock
from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.layer import routed_modules
from thermoe.routers.priced import PricedRouter
from thermoe.routers.swap import set_router
from thermoe.routers.topk import TopKRouter
from thermoe.telemetry.clock import Clock

#: An event clock is renewed after this long, for its reading loses digits as it grows.
EVENT_CLOCK_S = 600.0
#: With few experts 2 and 4 kept more quality than 1 on code, and than 8 on prose (docs/results/energy-router).
FAVOURITE_WEIGHT = 4.0
#: Arguments of a model that say how many sequences and positions it was called with, in this order.
_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "hidden_states")


class Instrument:
    """Priced routers and a hook on one model, until it is removed.

    Args:
        model: a model with routed modules.
        cost_model: the joules of work, from which experts get their costs.
        clock: what forwards are timed by.
        read_cost: what a byte of expert weights costs more or less than usual; see `ModelWork.of`.
        router: options of the priced routers that are put in.
        needs_price: refuse a model in which no router can have a price.
        after_forward: called at the end of each forward that the hook saw.

    Attributes:
        solver: the inner loop, with the rows of the forwards seen.
        log: the forwards not yet counted.
        searching: held by who reads the solver.

    Raises:
        RoutingError: no router can have a price, and one is needed.
        ConfigError: a router is offloaded, so that a price would not reach it; or ``read_cost`` does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        cost_model: CostModel,
        clock: Clock,
        *,
        read_cost: ReadCost,
        router: Mapping[str, Any],
        needs_price: bool,
        after_forward: Callable[[], None],
    ) -> None:
        self._model, self._clock, self._after_forward = model, clock, after_forward
        self.solver = PriceSolver(model, cost_model, ModelWork.of(model, read_cost=read_cost))
        self.log = self._new_log()
        self._last: list[RoutingDecision | None] = [None] * len(self.solver.modules)
        self._unserved = list(self._last)
        self._priced: list[PricedRouter] = []
        self._aside: ForwardLog | None = None
        self._noting = threading.Lock()
        self.searching = threading.RLock()
        self._events: EventClock | None = None
        self._events_since_s = -math.inf
        self.renew_clock()
        with ExitStack() as stack:
            self._price_routers(stack, router, needs_price)
            hook = model.register_forward_hook(self._see, with_kwargs=True)
            stack.callback(hook.remove)
            self._undo = stack.pop_all()

    def remove(self) -> None:
        """Leave the model as it was; may be called twice."""
        self._undo.close()

    def _price_routers(self, stack: ExitStack, options: Mapping[str, Any], needs_price: bool) -> None:
        routers = {name: module.router for name, module in routed_modules(self._model)}
        for name, router in routers.items():
            if isinstance(router, PricedRouter) and router.price.is_meta:
                raise ConfigError(
                    "the router is offloaded, so that no price would reach it",
                    where=name,
                    accepted="priced routers in memory",
                    fix="keep the routers on the device in the device_map, or load the model in memory",
                )
        stack.callback(keep_routers(self._model))
        plain = [name for name, router in routers.items() if type(router) is TopKRouter]
        if plain:
            # The benefit with a kernel: the other one passes over the experts one by one.
            settings = {"benefit": "distortion", **options}
            if settings["benefit"] == "distortion":
                settings.setdefault("favourite_weight", FAVOURITE_WEIGHT)
            set_router(self._model, "priced", layers=plain, **settings)
        self._give_costs()
        if needs_price and not self._priced:
            kinds = ", ".join(sorted({type(router).__name__ for router in routers.values()}))
            raise RoutingError(
                f"no router of the model can have a price ({kinds})",
                where="AdaptiveSession",
                accepted="layers with the router topk or priced",
                fix='call thermoe.set_router(model, "priced") first, if the choice may become that of top-k',
            )

    def _give_costs(self) -> None:
        """Tell priced routers that are new here what their experts cost."""
        present = [
            (place, module.router)
            for place, module in enumerate(self.solver.modules)
            if isinstance(module.router, PricedRouter)
        ]
        for place, router in present:
            if not any(router is known for known in self._priced):
                router.set_costs(*self.solver.table.relative(place, router.num_experts))
        self._priced = [router for _, router in present]

    def push(self, prices: Mapping[Phase, float]) -> None:
        """Give the routers their prices, in nats per joule, by phase."""
        self._give_costs()
        for router in self._priced:
            for phase in PHASES:
                router.set_price(prices[phase] * self.solver.table.unit_j, phase)

    # -- seeing forwards ----------------------------------------------------------------------------------------------

    def take(self) -> list[ForwardCount]:
        """Return the counts of all forwards since the last call; waits for the device."""
        with self._noting:
            log, self.log = self.log, self._new_log()
        return log.take()

    def _new_log(self) -> ForwardLog:
        return ForwardLog(self.solver.table, len(self.solver.modules))

    @contextmanager
    def aside(self) -> Iterator[ForwardLog]:
        """Note the forwards made inside in a log of their own: they are no served work."""
        with self._noting:
            log = self._aside = self._new_log()
        try:
            yield log
        finally:
            with self._noting:
                self._aside = None

    def renew_clock(self) -> None:
        """Set the clock that tells when a forward has finished, if it is time; waits for the device then.

        On the CPU a forward has finished when the hook is called.
        """
        with self._noting:
            now_s = self._clock.now_s()
            if now_s - self._events_since_s < EVENT_CLOCK_S:
                return
            self._events, self._events_since_s = None, now_s
            self._device = next(self.solver.modules[-1].parameters()).device
            if self._device.type == "cuda" and not self._clock.virtual:
                with torch.cuda.device(self._device):
                    self._events = EventClock()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():  # the session has a method for these
            return
        if self.note(_shape(args, kwargs), copy=False):
            self._after_forward()

    _see.in_graphs = True  # type: ignore[attr-defined]  # it counts what serves, and recorded forwards of learning do not

    def note(self, shape: tuple[int, int] | None, *, copy: bool) -> bool:
        """Note the forward just made, and return whether it served tokens.

        Args:
            shape: (sequences, positions) of the call, where known.
            copy: copy the decisions, on the device, for something will write over them.
        """
        with self._noting:
            present = [module.last_routing for module in self.solver.modules]
            if not is_serving():
                self._unserved = present
                return False
            # A module that did not run still holds the decision of an earlier forward, or of one that served nobody.
            ran = [
                d if copy or not (d is served or d is unserved) else None
                for d, served, unserved in zip(present, self._last, self._unserved, strict=True)
            ]
            self._last = present
            forward = Forward.of(ran, shape)
            if forward is None:
                return False
            if copy:
                forward = forward.tail(forward.rows)
            served = self._aside is None
            log = self.log if self._aside is None else self._aside
            if self._events is None:
                log.add(forward, HostMark(self._clock.now_s()))
            else:
                with torch.cuda.device(self._device):
                    log.add(forward, self._events.mark())
        if served and self.searching.acquire(blocking=False):
            try:
                self.solver.keep(forward)
            finally:
                self.searching.release()
        return served


def _shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (sequences, positions) of a call, ``None`` when no argument tells."""
    given = [kwargs.get(name) for name in _TOKEN_ARGUMENTS] + list(args[:1])
    found = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
    return None if found is None else (found.shape[0], found.shape[1])
