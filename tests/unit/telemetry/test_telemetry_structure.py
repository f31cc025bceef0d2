"""What importing may cost and do, and what this package must never reach for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import thermoe.telemetry

FOLDER = Path(thermoe.telemetry.__file__).parent
MODULES = sorted(FOLDER.glob("*.py"))
FORBIDDEN = {"torch", "subprocess", "multiprocessing", "concurrent", "numpy", "transformers"}
LATE = {"pynvml", "psutil", "zeus"}


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_imports_torch_processes_or_a_driver(path: Path) -> None:
    assert imported_by(path) & (FORBIDDEN | LATE) == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_telemetry_stands_on_the_foundation_alone(path: Path) -> None:
    allowed = ("thermoe.errors", "thermoe.registry", "thermoe.results", "thermoe.telemetry")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("thermoe"):
            assert node.module.startswith(allowed), node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_vendor_units_stay_with_the_vendors_modules(path: Path) -> None:
    if path.name in ("nvml.py", "nvml_library.py", "host.py", "zeus.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        name = getattr(node, "id", getattr(node, "attr", getattr(node, "arg", ""))) or ""
        assert not name.lower().endswith(("_mj", "_mw", "_uj", "_mhz", "_mib")), name


def test_importing_is_quick_and_starts_nothing() -> None:
    code = """
import sys, threading, time
began = time.perf_counter()
import thermoe.telemetry
from thermoe.telemetry import EnergyMeter, EnergyWindow, Sampler, SOURCES, Sample, open_source
took = time.perf_counter() - began
unwanted = {'torch', 'pynvml', 'psutil', 'zeus', 'subprocess', 'multiprocessing'} & set(sys.modules)
assert not unwanted, unwanted
assert threading.active_count() == 1
meter = EnergyMeter()
assert threading.active_count() == 1 and 'pynvml' not in sys.modules
print(took)
"""
    assert min(float(run_python(code)) for _ in range(2)) < 0.3


def test_a_meter_on_this_machine_leaves_no_thread_and_exits_at_once() -> None:
    code = """
import threading
from thermoe.telemetry import EnergyMeter
meter = EnergyMeter()
with meter:
    with meter.window('w') as w: pass
assert threading.active_count() == 1, threading.enumerate()
kept_open = EnergyMeter().open()   # never closed: the interpreter must still end
print(w.result.status)
"""
    assert run_python(code) in ("invalid", "flagged", "valid")


def test_public_names_are_listed_and_an_unknown_one_is_an_error() -> None:
    assert set(dir(thermoe.telemetry)) == {"EnergyMeter", "EnergyWindow", "SOURCES", "Sample", "Sampler", "open_source"}
    with pytest.raises(AttributeError, match="Nothing"):
        thermoe.telemetry.Nothing  # noqa: B018


def test_files_stay_readable() -> None:
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 400, path.name
