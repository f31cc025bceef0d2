"""The routers of a model as they are now, put back later: the same objects, whoever put others in their place.

What happened to the model meanwhile happens to them too: routers that were out of it while it was cast or moved follow
to the dtype and device of those that stood in for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.moe.layer import Routed, routed_modules
from thermoe.routers.base import Router
from thermoe.routers.priced import PricedRouter

_State = tuple[dict[str, Tensor], dict[str, Any]]


def keep_routers(model: nn.Module) -> Callable[[], None]:
    """Note the routers of ``model`` and what their prices are, and return what puts all of it back."""
    kept: list[tuple[Routed, nn.Module, _State | None]] = []
    for _, module in routed_modules(model):
        router = module.router
        kept.append((module, router, _state_of(router) if isinstance(router, PricedRouter) else None))

    def put_back() -> None:
        for module, router, state in kept:
            if module.router is not router:
                _follow(router, module.router)
                module.router = router.train(module.training)
                module.last_routing = None
            if state is not None:
                _restore(router, state)

    return put_back


def _follow(router: nn.Module, present: nn.Module) -> None:
    """Cast and move ``router`` to where ``present``, which stood in for it, has been taken."""
    if not (isinstance(router, Router) and isinstance(present, Router)):
        return
    own, theirs = router.weight, present.weight
    if own.is_meta or theirs.is_meta or (own.dtype, own.device) == (theirs.dtype, theirs.device):
        return
    # Fast weights are one object that both have, and it went with the model.
    fast, router.fast = router.fast, None
    router.to(device=theirs.device, dtype=theirs.dtype)
    router.fast = fast


def _state_of(router: PricedRouter) -> _State:
    """Return copies of a router's own buffers, and its plain attributes."""
    plain = {name: value for name, value in vars(router).items() if isinstance(value, (bool, int, float, str))}
    del plain["training"]  # the mode is the model's: who changed it inside meant all of the model
    return {name: buffer.clone() for name, buffer in router.named_buffers(recurse=False)}, plain


def _restore(router: nn.Module, state: _State) -> None:
    """Write a router's buffers and plain attributes back; the same tensors, for a captured graph reads them."""
    buffers, plain = state
    with torch.no_grad():
        for name, value in buffers.items():
            getattr(router, name).copy_(value)
    for name, value in plain.items():
        setattr(router, name, value)
