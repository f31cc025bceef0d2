"""Seeds, the choice of device with its reason, and the fingerprint of the environment a run happened in."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from thermoe import __version__
from thermoe.errors import MachineError


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A torch device name and why it was chosen."""

    name: str
    reason: str


def choose_device(requested: str = "auto") -> DeviceChoice:
    """Choose ``cuda``, ``mps`` or ``cpu``, and say why.

    Raises:
        MachineError: the requested device is not on this machine.
    """
    import torch

    if requested == "auto":
        if torch.cuda.is_available():
            return DeviceChoice("cuda", f"an NVIDIA GPU is here ({torch.cuda.get_device_name(0)})")
        return DeviceChoice("cpu", f"no CUDA device is visible to PyTorch {torch.__version__}")
    kind = requested.split(":")[0]
    available = kind == "cpu" or (kind == "cuda" and torch.cuda.is_available())
    available = available or (kind == "mps" and torch.backends.mps.is_available())
    if not available:
        raise MachineError(
            f"the device {requested!r} is not available",
            where="--device",
            accepted="auto, cpu" + (", cuda" if torch.cuda.is_available() else ""),
            fix="use --device auto",
        )
    return DeviceChoice(requested, "asked for")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (every device)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout this package runs from; ``None`` for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _command() -> str:
    """Return the command line as a person would type it, without where the program lies."""
    program = Path(sys.argv[0]).name
    return " ".join(["thermoe" if program == "__main__.py" else program, *sys.argv[1:]])


def environment_fingerprint() -> dict[str, Any]:
    """Return versions, processor, GPU and commit: what a reader needs to repeat or to distrust a run."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append({"name": properties.name, "uuid": str(getattr(properties, "uuid", "unknown"))})
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "versions": {
            "thermoe": __version__,
            **{
                name: _version_of(name)
                for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy", "nvidia-ml-py")
            },
        },
        "commit": _git_commit(),
        "command": _command(),
    }
