"""Readings with provenance: sources of energy, power, temperature and memory, a sampler, and a meter of energy windows.

Public names are imported when first used. Importing this package starts no thread and loads
neither a driver library nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "EnergyMeter": "thermoe.telemetry.meter",
    "EnergyWindow": "thermoe.telemetry.window",
    "Sampler": "thermoe.telemetry.sampler",
    "open_source": "thermoe.telemetry.source",
    "SOURCES": "thermoe.telemetry.source",
    "Sample": "thermoe.telemetry.source",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'thermoe.telemetry' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
