"""The meter of a session: what it measures joules with, or why it cannot."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from thermoe.telemetry.meter import EnergyMeter


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
            devices = {p.device for p in model.parameters()}
            boards = [torch.cuda.get_device_properties(device) for device in devices if device.type == "cuda"]
            meter = stack.enter_context(EnergyMeter(devices=boards or "cpu"))
        described = meter.describe()
        energy = described["energy_j"]
        no_sensor = None if energy["provenance"] and meter.devices else str(energy["reason"])
        return cls(meter, no_sensor, described["power_w"]["provenance"])
