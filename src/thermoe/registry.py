"""One generic registry: names to objects, lazily imported, open to third parties through entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from thermoe.errors import ConfigError, UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named objects of one kind.

    Args:
        kind: what is registered, in the singular, as error messages name it ("router").
        entry_point_group: group whose entry points join on first look-up; a third party adds to it without a patch.
    """

    def __init__(self, kind: str, entry_point_group: str | None = None) -> None:
        self.kind = kind
        self._group = entry_point_group
        self._entries: dict[str, T | str] = {}
        self._plugins_read = entry_point_group is None

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its object under ``name``; a taken name is an error."""

        def add(target: T) -> T:
            self._add(name, target)
            return target

        return add

    def register_lazy(self, name: str, target: str) -> None:
        """Register ``"package.module:attribute"``, imported when first asked for."""
        self._add(name, target)

    def _add(self, name: str, target: T | str) -> None:
        present = self._entries.get(name)
        if present is not None and present is not target:
            raise ConfigError(
                f"{self.kind} {name!r} is registered twice",
                where=f"{present!r} and {target!r}",
                accepted="one object per name",
                fix="register the second one under another name",
            )
        self._entries[name] = target

    def _read_plugins(self) -> None:
        if self._plugins_read:
            return
        self._plugins_read = True
        for point in entry_points(group=self._group or ""):
            self._add(point.name, point.value)

    def get(self, name: str, *, where: str | None = None) -> T:
        """Return the object called ``name``; an unknown name is an error with the near match."""
        self._read_plugins()
        if not isinstance(name, str) or name not in self._entries:
            raise UnknownNameError.of(self.kind, str(name), self._entries, where=where)
        target = self._entries[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            resolved: T = getattr(import_module(module), attribute)
            self._entries[name] = resolved
            return resolved
        return target

    def name_of(self, target: T) -> str:
        """Return the name ``target`` is registered under."""
        for name in self:
            if self.get(name) is target:
                return name
        raise UnknownNameError.of(
            self.kind, getattr(target, "__name__", repr(target)), self._entries, where=f"the registered {self.kind}s"
        )

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._read_plugins()
        return name in self._entries

    def __len__(self) -> int:
        self._read_plugins()
        return len(self._entries)
