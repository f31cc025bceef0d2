"""Weights that accelerate keeps on the disk or in the memory of the CPU, and brings in while their module runs.

Accelerate's hooks act around a module's own `forward`. Outside of it the parameters are on the meta device: they have
a shape and no values, and PyTorch multiplies by them without complaint, with whatever its memory held. What reads a
weight elsewhere brings it in first, with `readable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from thermoe.errors import ConfigError


@contextmanager
def readable(*modules: nn.Module) -> Iterator[None]:
    """Bring the weights and buffers that are ``modules``' own in while the context is open, if they are offloaded."""
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps some weight or buffer of ``model`` elsewhere."""
    return any(hasattr(module, "_hf_hook") for module in model.modules()) and any(
        tensor.is_meta for tensor in (*model.parameters(), *model.buffers())
    )


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dictionary of an offloaded model with every weight in memory.

    Raises:
        ConfigError: a weight is on the meta device and no hook of accelerate knows where its values are.
    """
    state: dict[str, Any] = model.state_dict()
    for key in [key for key, value in state.items() if value.is_meta]:
        owner, _, own = key.rpartition(".")
        module = model.get_submodule(owner)
        with readable(module):
            if not getattr(module, own).is_meta:
                state[key] = getattr(module, own).detach().cpu()
    lost = [key for key, value in state.items() if value.is_meta]
    if lost:
        raise ConfigError(
            f"{len(lost)} weights of the model have no values in memory or on the disk, such as {lost[0]}",
            where="save_pretrained",
            accepted="weights in memory, or offloaded by accelerate",
            fix="load the model in memory, with no device_map, and save it then",
        )
    return state


def check_readable(weight: Tensor, x: Tensor, *, where: str) -> None:
    """Raise if ``weight`` has no values to multiply ``x`` by.

    Raises:
        ConfigError: it is on the meta device and ``x`` is not.
    """
    if weight.is_meta and not x.is_meta:
        raise ConfigError(
            f"{where} reads weights that are not in memory (they are on the meta device)",
            where=where,
            accepted="weights in memory, or offloaded by accelerate and read by calling the module itself",
            fix="load the model in memory, or read its weights inside thermoe.moe.offload.readable(module)",
        )
