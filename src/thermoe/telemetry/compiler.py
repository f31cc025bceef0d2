"""Whether the GPU kernels can be built here: Triton compiles the part that launches them with the C compiler."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path

#: Where Triton looks when ``CC`` is not set, in this order. It does not look for ``cc``.
_SOUGHT = ("gcc", "clang")
_INSTALL = "install gcc or clang (apt install gcc), or set CC to a C compiler"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """Whether kernels can be built.

    Attributes:
        usable: they can; ``None`` where no GPU would run them.
        compiler: the C compiler that Triton would take.
        reason: why they are not used or cannot be built.
        fix: the one step that would help.
    """

    usable: bool | None
    compiler: str | None = None
    reason: str | None = None
    fix: str | None = None


def look_at_kernels(has_gpu: bool, environment: Mapping[str, str]) -> KernelReport:
    """Return whether Triton would find what it builds with. It imports and compiles nothing.

    Args:
        has_gpu: this process has an NVIDIA GPU.
        environment: the environment variables.
    """
    if not has_gpu:
        return KernelReport(usable=None, reason="no NVIDIA GPU is seen, and PyTorch code runs")
    if not _has_triton():
        return KernelReport(
            usable=False, reason="Triton is not installed: slower PyTorch code runs instead", fix="pip install triton"
        )
    chosen, path = environment.get("CC"), environment.get("PATH")
    if chosen is not None:
        found = shutil.which(chosen, path=path)
        missing = f"CC={chosen!r} is no program that can be run"
        fix = "unset CC, or set it to the path of a C compiler"
    else:
        found = next(filter(None, (shutil.which(name, path=path) for name in _SOUGHT)), None)
        missing, fix = "there is no C compiler", _INSTALL
        other = shutil.which("cc", path=path)
        if found is None and other is not None:
            missing, fix = f"Triton does not look for {other}", f"export CC={other}"
    if found is None:
        why = f"{missing}: the first forward on the GPU will fail, even with plain top-k"
        return KernelReport(usable=False, reason=why, fix=fix)
    if not _has_headers():
        why = "Python.h is missing: the first forward on the GPU will fail, even with plain top-k"
        return KernelReport(
            usable=False, compiler=found, reason=why, fix="install Python's headers (apt install python3-dev)"
        )
    return KernelReport(usable=True, compiler=found)


def _has_triton() -> bool:
    try:
        return util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def _has_headers() -> bool:
    # Debian's own scheme ends in "local", where no headers are.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return (Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h").is_file()
