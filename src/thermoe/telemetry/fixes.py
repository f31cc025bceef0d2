"""Why a metric is missing, and the one command or step that would bring it back on this machine."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_NVIDIA, _AMD = "0x10de", "0x1002"
#: PCI class of display and 3-D controllers.
_DISPLAY_CLASS = "0x03"


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a machine is, as far as its files tell.

    Attributes:
        system: the operating system, as Python names it.
        machine: the processor's architecture.
        container: this process runs in a container.
        virtual_machine: the processor says that a hypervisor is present.
        gpu_vendors: makers of the display and compute boards on the PCI bus; ``None`` when the bus cannot be read.
    """

    system: str
    machine: str
    container: bool = False
    virtual_machine: bool = False
    gpu_vendors: frozenset[str] | None = None


def look_around(root: Path, environment: Mapping[str, str]) -> Surroundings:
    """Read what the machine is from the files under ``root``; it never raises."""
    return Surroundings(
        system=platform.system(),
        machine=platform.machine(),
        container=_in_container(root, environment),
        virtual_machine=" hypervisor" in _text(root / "proc" / "cpuinfo"),
        gpu_vendors=_gpu_vendors(root / "sys" / "bus" / "pci" / "devices"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _in_container(root: Path, environment: Mapping[str, str]) -> bool:
    marked = any((root / name).exists() for name in (".dockerenv", "run/.containerenv"))
    return marked or "container" in environment or "KUBERNETES_SERVICE_HOST" in environment


def _gpu_vendors(bus: Path) -> frozenset[str] | None:
    names = {_NVIDIA: "nvidia", _AMD: "amd"}
    try:
        boards = [board for board in bus.iterdir() if _text(board / "class").startswith(_DISPLAY_CLASS)]
    except OSError:
        return None
    return frozenset(names.get(_text(board / "vendor").strip(), "other") for board in boards)


#: A part of a reason, and what would help; the first match counts.
_STEPS: tuple[tuple[str, str], ...] = (
    ("telemetry is off", "unset THERMOE_TELEMETRY"),
    ("cannot be imported (ModuleNotFoundError: No module named 'pynvml", "pip install nvidia-ml-py"),
    ("old fork shadows it", "pip uninstall -y pynvml && pip install --force-reinstall nvidia-ml-py"),
    ("nvidia-ml-py cannot be imported", "pip install --force-reinstall nvidia-ml-py"),
    ("psutil cannot be imported", "pip install --force-reinstall psutil"),
    ("driver is not loaded", "load the NVIDIA driver: sudo modprobe nvidia"),
    ("of different versions", "reboot, so that the loaded driver and its library are of one version"),
    ("leaves none visible", "unset CUDA_VISIBLE_DEVICES, or name a board that is there"),
    ("installed nvidia-ml-py has no", "pip install --upgrade nvidia-ml-py"),
    ("driver is too old", "update the NVIDIA driver"),
    ("does not know this field", "update the NVIDIA driver"),
    ("expects another version", "pip install --upgrade nvidia-ml-py"),
    ("not supported by this board", "none: this board does not have it"),
    ("no permission", "ask whoever runs this machine to let your user (or container) read NVIDIA's management library"),
    ("GPU is lost", "reboot, or have the board reset; its joules cannot be read until then"),
    ("needs a reset", "reboot, or have the board reset; its joules cannot be read until then"),
    ("GPU is gone", "reboot, or have the board reset; its joules cannot be read until then"),
    ("in time", "run the doctor again when the machine is less busy; if it stays, reload the driver"),
    ("reading rejected", "none here: the sensor gives a value that cannot be true; a newer driver may mend it"),
    ("no RAPL memory zone", "none: this machine does not meter its memory"),
    ("RAPL not readable", "sudo chmod -R a+r /sys/class/powercap/intel-rapl*/ (until the next boot; for every user)"),
    ("its range is unknown", "none: the kernel does not tell the counter's range"),
)


def fix_for(reason: str, around: Surroundings) -> str:
    """Return the one command or step for a metric that is missing for ``reason``; it begins with ``none`` if none."""
    for part, step in _STEPS:
        if part in reason:
            return step
    if "driver library not found" in reason or reason == "no GPU":
        return _fix_gpu(around)
    if reason.startswith("no RAPL"):
        return _fix_rapl(around)
    return "none known; the reason is the driver's own"


def _fix_gpu(around: Surroundings) -> str:
    if around.system == "Darwin":
        return "pip install zeus, then thermoe doctor --source zeus (its joules are estimates of the chip)"
    vendors = around.gpu_vendors or frozenset()
    if "nvidia" in vendors:
        if around.container:
            return "start the container with --gpus all and NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return "install the NVIDIA driver"
    if "amd" in vendors:
        return "pip install zeus amdsmi (of your ROCm's version), then thermoe doctor --source zeus"
    if around.gpu_vendors is None and around.container:
        return "if the host has an NVIDIA GPU, start the container with --gpus all"
    if around.gpu_vendors is None:
        return "if there is an NVIDIA GPU, install its driver"
    return "none on this machine: there is no NVIDIA or AMD GPU on its bus"


def _fix_rapl(around: Surroundings) -> str:
    if around.system == "Darwin":
        return "pip install zeus, then thermoe doctor --source zeus"
    if around.system != "Linux":
        return f"none: RAPL is read on Linux only, this is {around.system}"
    if around.machine.lower() not in ("x86_64", "amd64", "i686"):
        return f"none: processors of type {around.machine} have no RAPL"
    if around.virtual_machine:
        return "none inside this virtual machine; measure on its host"
    if around.container:
        return "start the container with -v /sys/class/powercap:/sys/class/powercap:ro"
    return "sudo modprobe intel_rapl_msr"
