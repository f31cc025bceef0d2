"""thermoe: Mixture-of-Experts language models that route by the joule.

Public names are imported when first used, so that `import thermoe` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from thermoe.models.autoload import install as _install

__version__ = "0.1.0"

_PUBLIC = {
    "MoELayer": "thermoe.moe.layer",
    "MoEBlock": "thermoe.moe.layer",
    "MoEGPT2Config": "thermoe.models.classes",
    "MoEGPT2LMHeadModel": "thermoe.models.classes",
    "convert_to_moe": "thermoe.models.convert",
    "attach_router": "thermoe.models.attach",
    "detach_router": "thermoe.models.attach",
    "set_router": "thermoe.routers.swap",
    "collect_routing": "thermoe.moe.layer",
    "RouterAdapter": "thermoe.adapt.test_time",
    "AdaptiveSession": "thermoe.adapt.session",
    "Budget": "thermoe.adapt.budget",
    "EnergyMeter": "thermoe.telemetry.meter",
    "EnergyCallback": "thermoe.energy_callback",
    "CostModel": "thermoe.energy.cost_model",
    "routing_accuracy": "thermoe.evaluation",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'thermoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_install()
