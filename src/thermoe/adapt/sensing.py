"""The meter of a session: what it measures joules with, or why it cannot."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from thermoe.telemetry.meter import EnergyMeter


def sensed_range(given: EnergyMeter | None, model: nn.Module) -> dict[str, str]:
    """Return in words, by field of a budget, what watts and degrees can be held; empty where no sensor tells.

    Args:
        given: a meter, open or not; ``None`` for one of its own, closed at the end.
        model: what runs.
    """
    with ExitStack() as stack:
        meter = given or stack.enter_context(_meter_for(model))
        now, told = meter.snapshot(), meter.describe()
    said = {}
    power_w, limit_w, temp_c = now["power_w"], now["power_limit_w"], now["temp_c"]
    if limit_w is not None:
        drawn = "" if power_w is None else f", with {power_w:.0f} W drawn now"
        label = told["power_limit_w"]["provenance"]
        said["power_w"] = f"less than the {limit_w:.0f} W of the board's limit{drawn} ({label})"
    if temp_c is not None:
        said["temp_c"] = f"more than at rest, with {temp_c:.0f} C now ({told['temp_c']['provenance']})"
    return said


def _meter_for(model: nn.Module) -> EnergyMeter:
    devices = {p.device for p in model.parameters()}
    boards = [torch.cuda.get_device_properties(device) for device in devices if device.type == "cuda"]
    return EnergyMeter(devices=boards or "cpu")


@dataclass(frozen=True, slots=True)
class Sensing:
    """An open meter and what it can do.

    Attributes:
        meter: open.
        no_sensor: why there are no joules; ``None`` where there are.
        provenance: label of its readings; ``None`` without a sensor.
    """

    meter: EnergyMeter
    no_sensor: str | None
    provenance: str | None

    @classmethod
    def of(cls, given: EnergyMeter | None, model: nn.Module, stack: ExitStack) -> Sensing:
        """Open the meter ``given``, or one on the devices of ``model``, which ``stack`` closes."""
        if given is not None:
            meter = given.open()
        else:
            meter = stack.enter_context(_meter_for(model))
        described = meter.describe()
        energy = described["energy_j"]
        no_sensor = None if energy["provenance"] and meter.devices else str(energy["reason"])
        return cls(meter, no_sensor, described["power_w"]["provenance"])
