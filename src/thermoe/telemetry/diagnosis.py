"""What the doctor found, as data: metrics, devices, the verdict on energy, and the whole diagnosis ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from thermoe.results import Provenance
from thermoe.telemetry.compiler import KernelReport
from thermoe.telemetry.fixes import Surroundings
from thermoe.telemetry.probe import BoardFacts

SCHEMA, SCHEMA_VERSION = "thermoe.doctor", 1
#: What may be required of a machine, and the metric that answers for it on a GPU and on the host.
REQUIREMENTS: dict[str, tuple[str, str | None]] = {
    "energy": ("energy_j", "cpu_energy_j"),
    "power": ("power_w", None),
    "temperature": ("temp_c", None),
    "memory": ("memory_used_bytes", "host_memory_used_bytes"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricReport:
    """One metric of one device.

    Attributes:
        metric: its name, with the unit.
        provenance: what kind of number it is; ``None`` when it is not measured.
        value: the latest of two readings.
        first_value: the earlier one.
        method: ``counter`` or ``power_integral`` for joules.
        source: which source reads it.
        cost_s: how long reading it alone takes, in seconds.
        reason: why it is missing, or why it is only estimated.
        fix: the one command or step that would bring it back; begins with ``none`` where nothing would.
    """

    metric: str
    provenance: Provenance | None = None
    value: Any = None
    first_value: Any = None
    method: str | None = None
    source: str | None = None
    cost_s: float | None = None
    reason: str | None = None
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReport:
    """One device, or the GPU that is not there.

    Attributes:
        kind: ``gpu`` or ``host``.
        present: there is such a device.
        uuid: the vendor's identifier.
        name: what a person calls it.
        index: place in the source's order.
        pci_bus_id: its address on the bus.
        mapped_by: how it was tied to what this process sees.
        provisional: the tie comes from the environment alone.
        torch_device: what PyTorch calls it; ``None`` when PyTorch was not asked.
        shared: other tenants use the same board.
        mig_uuids: the slices of the board.
        tick_period_s: how often its energy counter was seen to change, in seconds; ``None`` for unknown.
        board: what the NVIDIA library answers about it.
        metrics: every metric of its kind.
        notes: what a user should know before trusting its numbers.
    """

    kind: str
    present: bool
    name: str
    uuid: str | None = None
    index: int | None = None
    pci_bus_id: str | None = None
    mapped_by: str | None = None
    provisional: bool = False
    torch_device: str | None = None
    shared: bool = False
    mig_uuids: tuple[str, ...] = ()
    tick_period_s: float | None = None
    board: BoardFacts | None = None
    metrics: tuple[MetricReport, ...] = ()
    notes: tuple[str, ...] = ()

    def metric(self, name: str) -> MetricReport:
        """Return the report of one metric."""
        return next((m for m in self.metrics if m.metric == name), MetricReport(metric=name, reason="not read"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyVerdict:
    """Whether a window on this machine would carry joules.

    Attributes:
        provenance: their label; ``None`` when energy is not measured.
        scope: which part of the machine they are of: ``gpu board``, ``cpu package`` (and ``dram``), or ``none``.
        method: ``counter`` or ``power_integral``.
        reason: why they are missing or estimated.
        fix: the one step that would help.
    """

    provenance: Provenance | None
    scope: str = "none"
    method: str | None = None
    reason: str | None = None
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything the doctor found.

    Attributes:
        energy: whether joules can be had.
        devices: the devices this process may use, the host last.
        hidden_devices: boards that ``CUDA_VISIBLE_DEVICES`` hides, by UUID.
        versions: of Python, packages, driver and vendor library; ``None`` for what is not there.
        importable: optional packages that Python would find.
        machine: what the machine is.
        cuda_visible_devices: the variable's text, and what was odd in it.
        kernels: whether GPU kernels can be built.
        profiles: cost profiles found in the user's cache folder.
        rejected: readings the range gate turned away, by metric.
        notes: what concerns no single device.
        took_s: how long the diagnosis took, in seconds.
    """

    energy: EnergyVerdict
    devices: tuple[DeviceReport, ...]
    hidden_devices: tuple[str, ...]
    versions: Mapping[str, str | None]
    importable: Mapping[str, bool]
    machine: Surroundings
    cuda_visible_devices: Mapping[str, Any]
    kernels: KernelReport
    profiles: tuple[Mapping[str, Any], ...] = ()
    rejected: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    took_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the diagnosis for JSON; keys and units stay the same within one ``schema_version``."""
        body = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **asdict(self)}
        plain: dict[str, Any] = _plain(body)
        return plain

    def lacks(self, what: str) -> str | None:
        """Return why ``what`` (a key of :data:`REQUIREMENTS`) is not measured here, or ``None`` when it is.

        An estimate or a simulated number does not count as measured.
        """
        if what == "energy":
            if self.energy.provenance == "measured":
                return None
            return f"energy is {self.energy.provenance or 'not measured'} ({self.energy.reason or self.energy.scope})"
        on_gpu, on_host = REQUIREMENTS[what]
        gpus = [d.metric(on_gpu) for d in self.devices if d.kind == "gpu" and d.present]
        if not gpus and on_host is not None:
            gpus = [d.metric(on_host) for d in self.devices if d.kind == "host"]
        short = next((m for m in gpus if m.provenance != "measured"), None)
        if gpus and short is None:
            return None
        cause = short.reason if short is not None else "no GPU"
        return f"{what} is {(short and short.provenance) or 'not measured'} ({cause})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
