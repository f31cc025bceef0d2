"""Strict configuration: nested dataclasses filled from YAML and from ``key.path=value``; unknown keys are errors.

The dataclass is the schema: its fields are the accepted keys, its annotations the accepted types, its defaults the
values of what nobody sets. A field annotated ``dict`` is one value, taken whole.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from thermoe.errors import ConfigError, UnknownNameError, near_match


class _Raw(str):
    """A value as it was typed: read as YAML unless the key holds text, where `off` and `2024` are words."""

    __slots__ = ()


def read_yaml(text: str, *, where: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds; nothing in it is an empty one.

    Raises:
        ConfigError: it is no YAML, or something else than a mapping.
    """
    accepted, fix = "YAML with one key a line, such as `seed: 0`", "thermoe's --show-config prints a whole file"
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the file cannot be read: {reason}", where=where, accepted=accepted, fix=fix) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"the file holds a {type(tree).__name__}", where=where, accepted=accepted, fix=fix)
    return tree


def read_yaml_file(path: Path, *, where: str = "--config") -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing or unreadable.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"{path} cannot be read: {reason}", where=where, accepted="a YAML file", fix="check the path"
        ) from error
    return read_yaml(text, where=str(path))


def packaged_names(*folder: str) -> list[str]:
    """Return the names of the YAML files in a folder of the package."""
    entries = files("thermoe").joinpath(*folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def read_packaged(name: str, *folder: str, what: str = "preset") -> dict[str, Any]:
    """Return the mapping in a YAML file of the package.

    Args:
        name: of the file, as the user gave it.
        folder: within the package.
        what: the file is, for an error message.

    Raises:
        UnknownNameError: no such file.
        ConfigError: it is not YAML.
    """
    names = packaged_names(*folder)
    if name not in names:
        raise UnknownNameError.of("preset", name, names, where="--preset")
    text = files("thermoe").joinpath(*folder, f"{name}.yaml").read_text(encoding="utf-8")
    return read_yaml(text, where=f"{what} {name}")


def flatten(tree: Mapping[Any, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a nested mapping, as deep as the dataclass ``schema`` has parts."""
    for key, value in tree.items():
        part = getattr(schema, key, None) if isinstance(key, str) and dataclasses.is_dataclass(schema) else None
        unknown = isinstance(value, Mapping) and bool(value) and not _is_field(schema, key)
        if isinstance(value, Mapping) and (dataclasses.is_dataclass(part) or unknown):
            yield from flatten(value, part, f"{prefix}{key}.")
        elif value is None and dataclasses.is_dataclass(part):
            continue  # a heading with nothing under it
        else:
            yield f"{prefix}{key}", value


def _is_field(schema: Any, key: Any) -> bool:
    return dataclasses.is_dataclass(schema) and key in {entry.name for entry in dataclasses.fields(schema)}


def keys_of(spec: Any, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a configuration."""
    for entry in dataclasses.fields(spec):
        value = getattr(spec, entry.name)
        if dataclasses.is_dataclass(value):
            yield from keys_of(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}"


def apply_tree(spec: Any, tree: Mapping[str, Any]) -> None:
    """Set what a nested mapping names in ``spec``, a dataclass of dataclasses.

    Raises:
        ConfigError: an unknown key, with the near match, or a value of the wrong type.
    """
    for path, value in flatten(tree, spec):
        _assign(spec, path, value)


def apply_overrides(spec: Any, overrides: Sequence[str], *, example: str) -> None:
    """Set ``key.path=value`` strings in ``spec``.

    Args:
        spec: a dataclass of dataclasses.
        overrides: as typed.
        example: one that an error message may show.

    Raises:
        ConfigError: no equals sign, an unknown key, or a value of the wrong type.
    """
    for override in overrides:
        path, separator, raw = override.partition("=")
        if not separator:
            raise ConfigError(
                f"{override!r} sets nothing",
                where="--set",
                accepted=f"key.path=value, for example {example}",
                fix="write the key, an equals sign and the value",
            )
        _assign(spec, path.strip(), _Raw(raw))


def _assign(spec: Any, path: str, value: Any) -> None:
    """Set one dotted key, after checking that it exists and that the value has its type."""
    owner: Any = spec
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None) if dataclasses.is_dataclass(owner) else None
    known = {entry.name for entry in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    if name not in known or dataclasses.is_dataclass(getattr(owner, name)):
        keys = list(keys_of(spec))
        near = near_match(path, keys)
        raise ConfigError(
            f"unknown configuration key {path!r}",
            where=path or "--set",
            accepted=", ".join(keys),
            fix=f"did you mean {near!r}?" if near else "choose one of the accepted keys",
        )
    hint = typing.get_type_hints(type(owner))[name]
    setattr(owner, name, _coerce(path, _read(path, value, hint) if isinstance(value, _Raw) else value, hint))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _read(path: str, raw: _Raw, hint: Any) -> Any:
    """Return what ``raw`` says for a key of type ``hint``."""
    kinds = _options(hint)
    if str in kinds:
        return None if types.NoneType in kinds and raw in ("null", "~", "") else str(raw)
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value {str(raw)!r} cannot be read",
            where=path,
            accepted=f"a value in YAML: {_kind_names(hint)}",
            fix="check brackets, braces and quotation marks",
        ) from error


def _kind_names(hint: Any) -> str:
    words = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "dict": "a mapping"}
    names = []
    for option in _options(hint):
        name = getattr(typing.get_origin(option) or option, "__name__", str(option))
        if name == "list":
            names.append("a list of names, for example [dense, baseline]")
        else:
            names.append("null" if option is types.NoneType else words.get(name, name))
    return " or ".join(names)


def _coerce(path: str, value: Any, hint: Any) -> Any:
    for option in _options(hint):
        kind = typing.get_origin(option) or option
        if kind is types.NoneType and value is None:
            return None
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return _as_float(path, value, hint)
        if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a string
            try:
                return float(value)
            except ValueError:
                continue
        if kind is list and type(value) is list and not all(isinstance(entry, str) for entry in value):
            continue
        if kind in (int, str, bool, list, dict) and type(value) is kind:
            return value
    raise ConfigError(f"{path} is {value!r}", where=path, accepted=_kind_names(hint), fix=f"set {path} to one of these")


def _as_float(path: str, value: float, hint: Any) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ConfigError(
            f"{path} is beyond the range of a number", where=path, accepted=_kind_names(hint), fix="lower it"
        ) from error


def within(where: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a ConfigError unless ``value`` is finite and in ``low``..``high``."""
    if low <= value <= high and value < math.inf:
        return
    kind = "an integer" if isinstance(low, int) else "a finite number"
    raise ConfigError(
        f"{where} is {value}",
        where=where,
        accepted=f"{kind} of at least {low:g}" if high == math.inf else f"{kind} from {low:g} to {high:.10g}",
        fix=f"{'raise' if value < low else 'lower'} {where}",
    )
