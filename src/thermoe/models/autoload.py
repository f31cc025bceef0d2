"""Make transformers' Auto classes know thermoe's models after `import thermoe`, without importing either early.

Registration needs transformers, and with it torch, which `import thermoe` must not load. So it happens when
transformers' own Auto classes are loaded: at once if they are, else right after, through a finder that steps aside as
soon as it has done its work.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"
REGISTERING = "thermoe.models.gpt2"


class _AfterLoading(Loader):
    """Loads a module as its own loader would, then imports the one that registers our classes."""

    def __init__(self, loader: Loader, name: str, finder: _Finder) -> None:
        self._loader, self._name, self._finder = loader, name, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._finder.done(self._name)
        if self._name == MODELS:
            importlib.import_module(REGISTERING)
        elif MODELS not in sys.modules:
            # Configurations alone were asked for; ours registers with the models, which transformers can load by now.
            importlib.import_module(MODELS)


class _Finder(MetaPathFinder):
    """Stands before the other finders until each awaited module has been loaded, not only looked for."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting
        self._asking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waiting or fullname in self._asking:
            return None
        self._asking.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self._asking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterLoading(spec.loader, fullname, self)
        return spec

    def done(self, name: str) -> None:
        """Await ``name`` no longer."""
        self._waiting.discard(name)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def install() -> None:
    """Register now if the Auto classes are loaded, else as soon as they are; safe to call again."""
    if MODELS in sys.modules or CONFIGURATIONS in sys.modules:
        importlib.import_module(REGISTERING)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder({CONFIGURATIONS, MODELS}))
