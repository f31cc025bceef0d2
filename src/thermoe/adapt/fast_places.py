"""Where fast weights sit: on the routers of a model, kept there while routers are swapped, and taken off again."""

from __future__ import annotations

from weakref import WeakSet

from torch import nn

from thermoe.errors import RoutingError
from thermoe.moe.layer import routed_modules
from thermoe.moe.offload import readable
from thermoe.routers.base import Router
from thermoe.routers.fast_weights import FastWeights

#: Fast weights that an open adapter trains; others on a router were loaded with the model.
_TRAINED: WeakSet[FastWeights] = WeakSet()


class FastPlaces:
    """Fast weights on all routers of a model.

    A model that was saved with what it learned has fast weights of its own; new ones of the same family start from
    them, and they come back when these are removed.

    Args:
        model: a model with routed modules.
        family, rank: of the fast weights.

    Attributes:
        fast: by dotted layer name; empty once removed.
        hidden: whether they are off for the time being.

    Raises:
        RoutingError: the model has no router of ours, one is being adapted already, or has fast weights of another
            family.
        UnknownNameError, ConfigError: from `FastWeights`.
    """

    def __init__(self, model: nn.Module, family: str, rank: int) -> None:
        self._model = model
        self.hidden = False
        routers = self._present()
        if not routers:
            raise RoutingError(
                "the model has no MoE layer whose router could learn",
                where=type(model).__name__,
                accepted="a model with thermoe routers",
                fix="convert it first: thermoe.convert_to_moe(model)",
            )
        for name, router in routers.items():
            if router.fast in _TRAINED:
                raise RoutingError(
                    "the router has fast weights already",
                    where=name,
                    accepted="one adapter per model at a time",
                    fix="close the first adapter",
                )
            if router.fast is not None and router.fast.family != family:
                raise RoutingError(
                    f"the model was saved with fast weights of the family {router.fast.family!r}, not {family!r}",
                    where=name,
                    accepted=f"family={router.fast.family!r}",
                    fix="go on with this family, or load the model that was saved without what it learned",
                )
        self.kept = {name: router.fast for name, router in routers.items()}
        self.fast: dict[str, FastWeights] = {}
        for name, router in routers.items():
            with readable(router):
                made = FastWeights.of(router.weight, family, rank=rank)
            kept = self.kept[name]
            if kept is not None:
                made = FastWeights(kept.hidden_size, kept.num_experts, family, rank=kept.rank or rank)
                made.load_state_dict(kept.state_dict())
                made.to(kept.delta.device)
            self.fast[name] = made.requires_grad_(True)
        self._seen = list(routers.values())
        _TRAINED.update(self.fast.values())
        self.put()

    def _present(self) -> dict[str, Router]:
        return {name: m.router for name, m in routed_modules(self._model) if isinstance(m.router, Router)}

    @property
    def starts_learned(self) -> bool:
        """Whether the fast weights started from what was saved with the model."""
        return any(kept is not None for kept in self.kept.values())

    def put(self) -> None:
        """See that the routers that are there now have the fast weights of their layer.

        Raises:
            RoutingError: another router with fast weights of its own was put in.
        """
        for name, router in self._present().items():
            mine = self.fast.get(name)
            if mine is None or self.hidden or router.fast is mine:
                continue
            if router.fast is not None and router.fast is not self.kept.get(name):
                raise RoutingError(
                    "the router was exchanged for one with other fast weights",
                    where=name,
                    accepted="routers without fast weights while an adapter is open",
                    fix="close the adapter before such a router is put in",
                )
            router.fast = mine
            self._seen.append(router)

    def remove(self) -> None:
        """Take the fast weights off every router that has them; what was loaded with the model comes back."""
        names = {id(fast): name for name, fast in self.fast.items()}
        for router in [*self._seen, *self._present().values()]:
            if id(router.fast) in names:
                router.fast = self.kept[names[id(router.fast)]]
        for fast in self.fast.values():
            _TRAINED.discard(fast)
        self.fast, self._seen = {}, []
