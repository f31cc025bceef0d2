"""Make transformers' Auto classes know thermoe's models after `import thermoe`, without importing either early.

Registration needs transformers, and with it torch, which `import thermoe` must not load. Nor may it happen in the
middle of transformers' own imports, whose modules are then half made. So a finder counts how deep the imports of
transformers are nested; when the outermost one is done and the Auto classes are there, ours are registered and the
finder goes.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

PACKAGE = "transformers"
AUTO = "transformers.models.auto.configuration_auto"
REGISTERING = "thermoe.models.classes"


class _Finder(MetaPathFinder):
    """Watches the modules of transformers being executed; the modules themselves are found by the finders behind."""

    def __init__(self) -> None:
        self._state = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE or getattr(self._state, "asking", None) == fullname:
            return None
        self._state.asking = fullname
        try:
            spec = find_spec(fullname)
        finally:
            self._state.asking = None
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self._state.depth = getattr(self._state, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self._state.depth -= 1
            if self._state.depth == 0 and AUTO in sys.modules:
                self._register()

        # The loader belongs to this module alone; replacing the method keeps its type for whoever inspects it.
        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def _register(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module(REGISTERING)


def install() -> None:
    """Register now if the Auto classes are loaded, else as soon as they are; safe to call again."""
    if AUTO in sys.modules:
        importlib.import_module(REGISTERING)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
