"""What test-time training learned, in a checkpoint or out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.layer import routed_modules
from thermoe.routers.base import Router


@contextmanager
def learned_in(model: nn.Module, keep: bool, settings: dict[str, Any]) -> Iterator[None]:
    """Take the fast weights off the routers while the context is open, unless they are to be kept.

    Args:
        model: about to be saved.
        keep: leave them where they are.
        settings: of the saving; fast weights are taken out of a ``state_dict`` in it.

    Raises:
        ConfigError: ``keep`` is no bool.
        RoutingError: there is nothing to keep.
    """
    if not isinstance(keep, bool):
        raise ConfigError(
            f"keep_learned is {keep!r}",
            where="save_pretrained(keep_learned=...)",
            accepted="True or False",
            fix="use True",
        )
    routers = [module.router for _, module in routed_modules(model) if isinstance(module.router, Router)]
    learned = [router.fast for router in routers]
    if keep:
        if not any(fast is not None for fast in learned):
            raise RoutingError(
                "no router of the model has learned anything",
                where="save_pretrained(keep_learned=True)",
                accepted="a model inside the with block of its RouterAdapter",
                fix="save before the adapter is closed, or leave keep_learned out",
            )
        yield
        return
    if settings.get("state_dict") is not None:
        state = settings["state_dict"]
        settings["state_dict"] = {key: value for key, value in state.items() if ".router.fast." not in key}
    for router in routers:
        router.fast = None
    try:
        yield
    finally:
        for router, fast in zip(routers, learned, strict=True):
            router.fast = fast
