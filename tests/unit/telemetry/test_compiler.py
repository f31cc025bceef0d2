"""Whether the doctor sees that kernels cannot be built, before the first forward fails."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeNvml
from rich.console import Console

from thermoe.telemetry import compiler
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.compiler import look_at_kernels
from thermoe.telemetry.doctor import diagnose
from thermoe.telemetry.doctor_text import print_diagnosis


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty folder of programs, on a machine with Triton and Python's headers."""
    monkeypatch.setattr(compiler, "_has_triton", lambda: True)
    monkeypatch.setattr(compiler, "_has_headers", lambda: True)
    return tmp_path


def install(programs: Path, name: str) -> str:
    path = programs / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_gpu_nothing_is_asked(programs: Path) -> None:
    found = look_at_kernels(False, {"PATH": str(programs)})
    assert found.usable is None and found.compiler is None and found.fix is None


def test_no_compiler_is_told_with_what_would_help(programs: Path) -> None:
    found = look_at_kernels(True, {"PATH": str(programs)})
    assert found.usable is False and "no C compiler" in (found.reason or "") and "install gcc" in (found.fix or "")


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_compiler_that_triton_looks_for_is_enough(programs: Path, name: str) -> None:
    path = install(programs, name)
    found = look_at_kernels(True, {"PATH": str(programs)})
    assert (found.usable, found.compiler, found.reason) == (True, path, None)


def test_gcc_comes_before_clang(programs: Path) -> None:
    install(programs, "clang")
    assert look_at_kernels(True, {"PATH": str(programs)}).compiler != install(programs, "gcc")
    assert look_at_kernels(True, {"PATH": str(programs)}).compiler == str(programs / "gcc")


def test_cc_alone_must_be_named(programs: Path) -> None:
    path = install(programs, "cc")
    found = look_at_kernels(True, {"PATH": str(programs)})
    assert found.usable is False and found.fix == f"export CC={path}"
    assert look_at_kernels(True, {"PATH": str(programs), "CC": "cc"}).compiler == path


def test_a_named_compiler_that_is_not_there_is_not_made_up_for(programs: Path) -> None:
    install(programs, "gcc")  # Triton takes CC as it is
    found = look_at_kernels(True, {"PATH": str(programs), "CC": "icc"})
    assert found.usable is False and "CC='icc'" in (found.reason or "")


def test_headers_are_needed_too(programs: Path, monkeypatch: Any) -> None:
    install(programs, "gcc")
    monkeypatch.setattr(compiler, "_has_headers", lambda: False)
    found = look_at_kernels(True, {"PATH": str(programs)})
    assert found.usable is False and "Python.h" in (found.reason or "")


def test_without_triton_other_code_runs(programs: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiler, "_has_triton", lambda: False)
    found = look_at_kernels(True, {"PATH": str(programs)})
    assert found.usable is False and "fail" not in (found.reason or "") and found.fix == "pip install triton"


def test_the_looks_at_triton_and_headers_are_real(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: object() if name == "triton" else None)
    assert compiler._has_triton()
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    assert not compiler._has_triton()
    monkeypatch.setattr(compiler.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert not compiler._has_headers()
    (tmp_path / "Python.h").write_text("")
    assert compiler._has_headers()


@pytest.mark.parametrize(
    ("with_gpu", "with_gcc", "line"),
    [
        (False, False, "kernels   not used here"),
        (True, False, "kernels   cannot be built: there is no C compiler"),
        (True, True, "kernels   Triton builds them with"),
    ],
)
def test_the_doctor_has_a_line(
    programs: Path, clock: VirtualClock, nvml: FakeNvml, with_gpu: bool, with_gcc: bool, line: str
) -> None:
    if with_gcc:
        install(programs, "gcc")
    environment = {"PATH": str(programs), "HOME": str(programs)} | ({} if with_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    found = diagnose(nvml=nvml, clock=clock, environment=environment, versions={}, root=programs, rapl_root=programs)
    stream = io.StringIO()
    print_diagnosis(Console(file=stream, width=200), found)
    assert line in stream.getvalue()
    kernels = json.loads(json.dumps(found.as_dict(), allow_nan=False))["kernels"]
    assert set(kernels) == {"usable", "compiler", "reason", "fix"} and kernels["usable"] is (
        with_gcc if with_gpu else None
    )
