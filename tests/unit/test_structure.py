"""The shape of the package: imports go one way, nothing heavy at the door, every public thing explained."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import thermoe
from thermoe import errors

ROOT = Path(thermoe.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
IDS = [str(path.relative_to(ROOT)) for path in FILES]

_BASE = {"errors", "registry", "results", "runtime"}
#: What each part may import from; itself always. A part that is not here has to be placed first.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "registry": {"errors"},
    "results": {"errors"},
    "config": {"errors"},
    "progress": set(),
    "runtime": {"errors"},
    "telemetry": _BASE,
    "moe": _BASE,
    "routers": _BASE | {"moe"},
    "energy": _BASE | {"moe", "telemetry"},
    "models": _BASE | {"moe", "routers"},
    "convergence": {"errors"},
    "data": _BASE,
    "evaluation": _BASE | {"moe", "routers", "models", "energy", "data"},
    "sensitivity": _BASE | {"moe", "routers", "evaluation"},
    "training": _BASE
    | {"config", "progress", "moe", "routers", "models", "data", "evaluation", "sensitivity", "convergence"}
    | {"telemetry", "energy", "energy_callback"},
    "distributed": _BASE | {"moe", "routers", "models", "telemetry"},
    "energy_callback": _BASE | {"telemetry"},
    "doctor": _BASE | {"telemetry"},
    "adapt": _BASE | {"moe", "routers", "energy", "telemetry", "models", "evaluation", "progress"},
    "compare": _BASE
    | {"moe", "routers", "energy", "telemetry", "models", "data", "evaluation", "training", "distributed", "adapt"}
    | {"sensitivity", "energy_callback", "config", "progress", "convergence"},
    "report": {"results", "errors", "convergence"},
    "testing": _BASE | {"moe", "routers", "models", "telemetry", "energy", "data"},
    "__main__": {"cli"},
    "__init__": {"models"},  # the finder that teaches transformers our model type; the test of weight below bounds it
}
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"testing", "__main__", "__init__"}


def _part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _on_disk() -> dict[str, set[str]]:
    return {_part(path): set() for path in FILES}


def _imported(source: str) -> set[str]:
    """Return the parts of thermoe that ``source`` imports, inside functions and for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "thermoe" and len(parts) > 1 and parts[1] in MAY_IMPORT | _on_disk():
                found.add(parts[1])
    return found


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_one_way(path: Path) -> None:
    part = _part(path)
    assert part in MAY_IMPORT, f"place {part} in the order of imports"
    excess = _imported(path.read_text(encoding="utf-8")) - MAY_IMPORT[part] - {part}
    assert not excess, f"{part} may not import {sorted(excess)}"


def test_the_order_of_imports_has_no_cycle() -> None:
    left = {part: set(allowed) for part, allowed in MAY_IMPORT.items()}
    while left:
        free = [part for part, allowed in left.items() if not allowed & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for part in free:
            del left[part]


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import thermoe.moe.layer\ndef f():\n    from thermoe import telemetry\n    from thermoe.report import html"
    )
    assert _imported(source) == {"moe", "telemetry", "report"}


def test_nothing_imports_testing() -> None:
    assert all("testing" not in _imported(path.read_text(encoding="utf-8")) for path in FILES)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if _part(path) in ("report", "telemetry", "results", "errors", "registry", "convergence")],
)
def test_no_torch_where_a_sensor_or_a_report_is_read(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not [name for name in names if name.split(".")[0] in ("torch", "transformers")]


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_import_is_quick_and_light() -> None:
    code = (
        "import sys, time; before = time.process_time(); import thermoe; dir(thermoe);"
        "spent = time.process_time() - before;"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'typer', 'yaml'} & set(sys.modules);"
        "print(spent); print(sorted(heavy))"
    )
    runs = [_run(code).splitlines() for _ in range(2)]
    assert runs[0][1] == "[]"
    assert min(float(run[0]) for run in runs) < 0.3


def test_telemetry_and_results_load_no_torch() -> None:
    code = "import sys, thermoe.telemetry.meter, thermoe.results, thermoe.registry; print('torch' in sys.modules)"
    assert _run(code) == "False"


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    assert set(dir(thermoe)) == set(thermoe.__all__)
    for name in thermoe.__all__:
        assert getattr(thermoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MoeLayer'"):
        _ = thermoe.MoeLayer


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_stay_readable(path: Path) -> None:
    assert path.stem not in ("utils", "helpers", "common", "misc", "v2"), "a name that says nothing"
    assert not path.stem.startswith(("new_", "simple_"))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def _undocumented(tree: ast.Module) -> list[str]:
    missing = [] if ast.get_docstring(tree) else ["the module"]

    def visit(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for child in node.body:
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            if child.name.startswith("_"):
                continue
            decorators = {ast.unparse(d).split(".")[-1] for d in getattr(child, "decorator_list", [])}
            if not ast.get_docstring(child) and not decorators & {"overload", "setter"}:
                missing.append(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                visit(child, f"{prefix}{child.name}.")

    visit(tree, "")
    return missing


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_public_things_have_docstrings(path: Path) -> None:
    assert _undocumented(ast.parse(path.read_text(encoding="utf-8"))) == []


def test_the_reader_of_docstrings_sees_what_is_missing() -> None:
    source = '"""M."""\ndef f(): pass\nclass C:\n    """C."""\n    def g(self): pass\n    def _h(self): pass\n'
    assert _undocumented(ast.parse(source)) == ["f", "C.g"]


def test_errors_live_in_one_module_and_carry_an_explanation() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                assert path.name == "errors.py", f"{node.name} belongs in errors.py"
    public = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == "thermoe.errors"]
    assert len(public) >= 10
    assert all(issubclass(c, errors.ThermoeError) and c.__doc__ for c in public)


def test_every_module_can_be_imported() -> None:
    for path in FILES:
        if path.name == "__main__.py":
            continue
        if "import triton\n" in path.read_text(encoding="utf-8") and find_spec("triton") is None:
            assert path.parent.name == "kernels", "only kernels may need Triton, and only once they run"
            continue
        name = ".".join(("thermoe", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        import_module(name)
