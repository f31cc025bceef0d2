"""Change the routers of a live model in one call, and put them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.layer import Routed, routed_modules
from thermoe.moe.offload import readable
from thermoe.routers import alternatives, balanced, dynamic, null, priced, topk  # noqa: F401  (fills the registry)
from thermoe.routers.base import ROUTERS, Router


def _chosen_layers(model: nn.Module, layers: Iterable[int | str] | None) -> dict[str, Routed]:
    found = dict(routed_modules(model)) if isinstance(model, nn.Module) else {}
    if not found:
        raise RoutingError(
            "the model has no MoE layer",
            where=type(model).__name__,
            accepted="a model with MoELayer modules or attached routers",
            fix="convert a dense model first: thermoe.convert_to_moe(model, num_experts=8, top_k=4); "
            "or attach to an MoE: thermoe.attach_router(model)",
        )
    if layers is None:
        return found
    names = list(found)
    chosen: dict[str, Routed] = {}
    if isinstance(layers, (str, int)) or not isinstance(layers, Iterable):
        layers = [layers]
    for entry in layers:
        if isinstance(entry, int) and 0 <= entry < len(names):
            chosen[names[entry]] = found[names[entry]]
        elif isinstance(entry, str) and entry in found:
            chosen[entry] = found[entry]
        else:
            raise ConfigError(
                f"there is no MoE layer {entry!r}",
                where="layers",
                accepted=f"0..{len(names) - 1} in the order of the model, or a name: {', '.join(names)}",
                fix="name layers the model has, or leave layers out for all",
            )
    if not chosen:
        raise ConfigError(
            "no layer is chosen",
            where="layers",
            accepted=f"at least one of {', '.join(names)}",
            fix="name a layer, or leave layers out for all",
        )
    return chosen


def build_router(
    name: str, hidden_size: int, num_experts: int, top_k: int, options: Mapping[str, Any] | None = None
) -> Router:
    """Build a registered router.

    Raises:
        UnknownNameError: no router of that name.
        ConfigError: an option that router does not take.
    """
    if not isinstance(name, str):
        raise UnknownNameError.of("router", repr(name), ROUTERS, where="router")
    router_class = ROUTERS.get(name, where="router")
    try:
        return router_class(hidden_size, num_experts, top_k, **(options or {}))
    except TypeError as error:
        raise ConfigError(
            f"the router {name!r} cannot be built from {dict(options or {})}: {error}",
            where="router options",
            accepted=f"the arguments of {router_class.__name__}",
            fix=f"see help({router_class.__module__}.{router_class.__name__})",
        ) from error


def set_router(
    model: nn.Module,
    router: str | Mapping[str, Router],
    *,
    layers: Iterable[int | str] | None = None,
    **options: Any,
) -> dict[str, Router]:
    """Give MoE layers another router, in place, and return what was replaced.

    A router built by name takes over the slow weights, the gate's ramp, the fast weights, the number of experts per
    token and every option that it shares with the old one, so that only the way of choosing changes; one of the same
    kind takes over what it has adapted to as well (a balancing bias, thresholds), save for what an option sets anew.
    To undo, hand the returned dictionary back.

    Args:
        model: any module with MoE layers.
        router: a registered name, or routers by layer name, as returned by an earlier call.
        layers: positions among the MoE layers, or dotted names; all when ``None``. Not with a dictionary.
        options: passed to the router's constructor, for example ``price=0.2`` or ``top_k=2``.

    Returns:
        The routers that were replaced, by dotted layer name.

    Raises:
        UnknownNameError: no router of that name.
        RoutingError: the model has no MoE layer, or a router does not fit its layer.
    """
    if isinstance(router, Mapping):
        if layers is not None or options:
            raise ConfigError(
                "a dictionary of routers was given together with layers or options",
                where="set_router",
                accepted="either a name with layers and options, or a dictionary alone",
                fix="leave layers and options out",
            )
        chosen = _chosen_layers(model, list(router))
        new = dict(router)
        for name, given in new.items():
            if not isinstance(given, Router):
                raise ConfigError(
                    f"{type(given).__name__} is given as a router",
                    where=name,
                    accepted="a router of thermoe, such as set_router returned earlier",
                    fix="give the name of a registered router instead: " + ", ".join(ROUTERS),
                )
    elif not isinstance(router, str):
        raise ConfigError(
            f"{router!r} is given as a router",
            where="router",
            accepted="a registered name, or routers by layer name",
            fix="choose one of " + ", ".join(ROUTERS),
        )
    else:
        chosen = _chosen_layers(model, layers)
        new = {name: _successor(layer, router, options) for name, layer in chosen.items()}
    for name, layer in chosen.items():
        old = layer.router
        assert isinstance(old, Router)
        if (new[name].num_experts, new[name].hidden_size) != (old.num_experts, old.hidden_size):
            raise RoutingError(
                f"the router has {new[name].num_experts} experts of width {new[name].hidden_size}",
                where=name,
                accepted=f"{old.num_experts} experts of width {old.hidden_size}",
                fix="build the router with the sizes of the layer",
            )
        unfit = layer.why_not(new[name])
        if unfit is not None:
            raise RoutingError(
                f"the router {type(new[name]).__name__} cannot choose here: {unfit}",
                where=name,
                accepted="a router that can choose for the model's own, such as topk, priced, top_p or oea",
                fix="choose another router, or convert a dense model of your own",
            )
    replaced: dict[str, Router] = {}
    for name, layer in chosen.items():
        old = layer.router
        assert isinstance(old, Router)
        replaced[name] = old
        layer.router = new[name].train(layer.training)
        layer.last_routing = None
    return replaced


def _successor(layer: Routed, name: str, options: Mapping[str, Any]) -> Router:
    """Build the router ``name`` for ``layer`` with the learned state of the present one."""
    old = layer.router
    assert isinstance(old, Router)
    settings = dict(options)
    top_k = settings.pop("top_k", old.top_k)
    known = build_router(name, old.hidden_size, old.num_experts, top_k).options()
    with readable(old), torch.no_grad():  # the new router stays in memory where the old one was offloaded
        inherited = {key: value for key, value in old.options().items() if key in known}
        new = build_router(name, old.hidden_size, old.num_experts, top_k, {**inherited, **settings})
        new.to(device=old.weight.device, dtype=old.weight.dtype)
        new.weight.copy_(old.weight)
        new.ramp.copy_(old.ramp)
        learned = _own_state(old) if type(old) is type(new) else {}
        for key, tensor in _own_state(new).items():
            known_as = learned.get(key)
            if known_as is not None and key not in settings and known_as.shape == tensor.shape:
                tensor.copy_(known_as)
    for parameter in new.parameters(recurse=False):
        parameter.requires_grad_(old.weight.requires_grad)
    new.fast = old.fast
    new.active_top_k = old.active_top_k
    return new


def _own_state(router: Router) -> dict[str, torch.Tensor]:
    """Return what a router has learned beside the slow weights and the gate's ramp, by name."""
    parameters = {name: value for name, value in router.named_parameters(recurse=False) if name != "weight"}
    return {**parameters, **{name: getattr(router, name) for name in router.adaptive}}
