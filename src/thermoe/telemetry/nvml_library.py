"""The vendor's library behind one safe call: loaded on first use, started once per process, errors become reasons."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
FUNCTION_NOT_FOUND = 13
VERSION_MISMATCH = 18
UNINITIALIZED = 1

Standing = Literal["passing", "permanent", "lost"]

#: What each error code means for the readings that follow, and what a reader of a report is told.
_ERRORS: dict[int, tuple[Standing, str]] = {
    1: ("passing", "the NVIDIA library is not initialised"),
    2: ("permanent", "the driver does not know this field"),
    3: ("permanent", "not supported by this board"),
    4: ("permanent", "no permission to read it"),
    6: ("permanent", "not found"),
    9: ("permanent", "the NVIDIA driver is not loaded"),
    10: ("passing", "the driver did not answer in time"),
    12: ("permanent", "NVIDIA driver library not found"),
    13: ("permanent", "the driver is too old for this reading"),
    15: ("lost", "the GPU is lost"),
    16: ("lost", "the GPU needs a reset"),
    18: ("permanent", "the driver and its library are of different versions"),
    25: ("permanent", "the driver expects another version of this call"),
    28: ("lost", "the GPU is gone"),
    999: ("passing", "unknown driver error"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A call that failed.

    Attributes:
        standing: ``passing`` (try again later), ``permanent`` (do not ask again) or ``lost`` (the device has gone).
        reason: what a reader is told.
        code: the library's number for it; ``None`` when the failure was not the library's.
    """

    standing: Standing
    reason: str
    code: int | None = None


def fault_of(code: int) -> Fault:
    """Return what the library's error ``code`` means."""
    standing, reason = _ERRORS.get(code, ("passing", f"driver error {code}"))
    return Fault(standing, reason, code)


class NvmlLibrary:
    """The Python binding of the vendor's library.

    It is loaded and started on first use and never shut down, because a start-and-stop cycle would pull the library
    from under other users in the same process. Starting is tied to the process id: after a fork the child starts its
    own.

    Args:
        module: a module shaped like ``pynvml``; the installed one by default.
        process_id: returns the id of the running process.
    """

    def __init__(self, module: ModuleType | Any | None = None, process_id: Callable[[], int] = os.getpid) -> None:
        self._module = module
        self._process_id = process_id
        self._started_in: int | None = None
        self._start_fault: Fault | None = None

    def start(self) -> Fault | None:
        """Load and start the library in this process; return why it cannot be used, or ``None``."""
        here = self._process_id()
        if self._started_in == here:
            return self._start_fault
        self._started_in = here
        self._start_fault = self._load_and_start()
        return self._start_fault

    def _load_and_start(self) -> Fault | None:
        if self._module is None:
            try:
                self._module = import_module("pynvml")
            except Exception as error:  # the binding can fail in many ways on a broken installation
                return Fault(
                    "permanent", f"the package nvidia-ml-py cannot be imported ({type(error).__name__}: {error})"
                )
        if not hasattr(self._module, "nvmlInit") or not hasattr(self._module, "nvmlDeviceGetFieldValues"):
            return Fault(
                "permanent",
                "the module 'pynvml' is not the one of nvidia-ml-py (an old fork shadows it): "
                "pip uninstall pynvml; pip install --force-reinstall nvidia-ml-py",
            )
        outcome = self._guarded(self._module.nvmlInit)
        return outcome if isinstance(outcome, Fault) else None

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # the binding's own error class is only known once it is loaded
            code = getattr(error, "value", None)
            if isinstance(code, int):
                return fault_of(code)
            if type(error).__name__ == "NVMLLibraryMismatchError":
                return fault_of(FUNCTION_NOT_FOUND)
            return Fault("passing", f"{type(error).__name__}: {error}")

    def call(self, name: str, *arguments: Any) -> Any:
        """Call the library's function ``name``; return its result or a :class:`Fault`.

        A passing fault is tried once more, at once; a function the binding does not have is a permanent fault.
        """
        fault = self.start()
        if fault is not None:
            return fault
        function = getattr(self._module, name, None)
        if function is None:
            return Fault("permanent", f"the installed nvidia-ml-py has no {name}", FUNCTION_NOT_FOUND)
        outcome = self._guarded(function, *arguments)
        if isinstance(outcome, Fault) and outcome.standing == "passing":
            if outcome.code == UNINITIALIZED:
                self._guarded(self._module.nvmlInit)  # type: ignore[union-attr]
            outcome = self._guarded(function, *arguments)
        return outcome

    def text(self, name: str, *arguments: Any) -> str | None:
        """Call ``name`` and return its text, decoded where an old binding gives bytes; ``None`` when it fails."""
        outcome = self.call(name, *arguments)
        if isinstance(outcome, Fault):
            return None
        return outcome.decode(errors="replace") if isinstance(outcome, bytes) else str(outcome)


LIBRARY = NvmlLibrary()
