"""One registry for every kind of named object."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from thermoe import registry as registry_module
from thermoe.errors import ConfigError, UnknownNameError
from thermoe.registry import Registry

SQUARE = ("four", "corners")


def _filled() -> Registry[Any]:
    registry: Registry[Any] = Registry("shape")
    registry.register("square")(SQUARE)
    registry.register_lazy("pi", "math:pi")
    return registry


def test_look_up_iteration_and_length() -> None:
    registry = _filled()
    assert registry.get("square") is SQUARE
    assert list(registry) == ["pi", "square"] and len(registry) == 2
    assert "pi" in registry and "circle" not in registry


def test_the_decorator_returns_its_object() -> None:
    registry: Registry[Any] = Registry("shape")

    @registry.register("circle")
    class Circle:
        pass

    assert isinstance(Circle, type) and registry.get("circle") is Circle
    assert registry.name_of(Circle) == "circle"


def test_lazy_entries_are_imported_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    original = registry_module.import_module
    monkeypatch.setattr(registry_module, "import_module", lambda name: (imported.append(name), original(name))[1])
    registry = _filled()
    assert list(registry) == ["pi", "square"] and "pi" in registry and imported == []
    assert registry.get("pi") == pytest.approx(3.14159, abs=1e-5)
    assert registry.get("pi") == registry.get("pi") and imported == ["math"]


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="unknown shape 'sqare'") as error:
        _filled().get("sqare", where="plot.shape")
    assert error.value.where == "plot.shape"
    assert error.value.accepted == "pi, square" and error.value.fix == "did you mean 'square'?"
    with pytest.raises(UnknownNameError):
        _filled().name_of("no such object")


def test_a_taken_name_is_an_error_and_the_first_stays() -> None:
    registry = _filled()
    with pytest.raises(ConfigError, match="'square' is registered twice"):
        registry.register("square")(("five", "corners"))
    with pytest.raises(ConfigError, match="registered twice"):
        registry.register_lazy("pi", "cmath:pi")
    assert registry.get("square") is SQUARE


def test_the_same_object_may_come_twice() -> None:
    registry: Registry[Any] = Registry("shape")
    thing = object()
    registry.register("a")(thing)
    registry.register("a")(thing)
    assert len(registry) == 1


def test_plugins_join_on_first_look_up_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def entry_points(*, group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("tau", "math:tau", group)]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    registry: Registry[Any] = Registry("number", "thermoe.numbers")
    registry.register("one")(1)
    assert asked == []
    assert list(registry) == ["one", "tau"]
    assert registry.get("tau") == pytest.approx(6.28319, abs=1e-5)
    assert "tau" in registry and len(registry) == 2
    assert asked == ["thermoe.numbers"]


def test_a_plugin_cannot_take_a_name_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda *, group: [EntryPoint("one", "math:tau", group)])
    registry: Registry[Any] = Registry("number", "thermoe.numbers")
    registry.register("one")(1)
    with pytest.raises(ConfigError, match="'one' is registered twice"):
        registry.get("one")


def test_without_a_group_no_entry_points_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda **_: pytest.fail("read"))
    assert len(_filled()) == 2
