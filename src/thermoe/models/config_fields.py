"""The fields that MoE configurations add to their dense ones, and what each may hold.

A configuration is read from a file that anyone may have written, so that types are checked before values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from thermoe import __version__
from thermoe.errors import ConfigError
from thermoe.routers.fast_weights import FAST_FAMILIES


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _router(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("name", ""), str):
        return False
    options = entry.get("options")
    return (
        _whole(entry.get("top_k", 1), 1)
        and (options is None or isinstance(options, dict))
        and (entry.get("fast") is None or _fast(entry["fast"]))
        and not set(entry) - {"name", "top_k", "options", "fast"}
    )


def _fast(options: Any) -> bool:
    return (
        isinstance(options, dict)
        and options.get("family") in FAST_FAMILIES
        and _whole(options.get("rank", 1), 1)
        and not set(options) - {"family", "rank"}
    )


def _optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


#: By name: annotation, default, what is accepted in words, and the test of it.
FIELDS: dict[str, tuple[Any, Any, str, Callable[[Any], bool]]] = {
    "num_experts": (int, 8, "an integer of at least 1", lambda v: _whole(v, 1)),
    "num_experts_per_tok": (int, 2, "an integer of at least 1", lambda v: _whole(v, 1)),
    "expert_intermediate_size": (
        int | None, None, "an integer of at least 1, or null for the dense width divided by the experts",
        _optional(lambda v: _whole(v, 1)),
    ),
    "expert_widths": (
        list[int] | None, None, "a list of integers of at least 1, the neurons of each expert, or null",
        _optional(lambda v: isinstance(v, (list, tuple)) and bool(v) and all(_whole(w, 1) for w in v)),
    ),
    "shared_intermediate_size": (int, 0, "an integer of at least 0", lambda v: _whole(v, 0)),
    "moe_layers": (
        list[int] | None, None, "a list of positions of blocks, or null for all",
        _optional(lambda v: isinstance(v, (list, tuple, set)) and all(_whole(i, -1_000_000) for i in v)),
    ),
    "expert_bias": (bool, False, "true or false", _flag),
    "layer_bias": (bool | None, None, "true, false or null", _optional(_flag)),
    "gated_experts": (bool | None, None, "true, false or null", _optional(_flag)),
    "conversion_method": (str | None, None, "the name of a conversion method, or null", _optional(_text)),
    "routers": (
        dict[str, Any] | None, None,
        'by block position, {"name": ..., "top_k": ..., "options": {...}}, or with "fast": {"family": ...} too',
        _optional(lambda v: isinstance(v, dict) and all(map(_router, v.values()))),
    ),
    "thermoe_version": (str | None, None, "a version such as 1.2.3", _optional(_text)),
}  # fmt: skip


def check_fields(config: Any) -> None:
    """Raise if a field holds what it cannot, or a newer version wrote the configuration.

    Raises:
        ConfigError: naming the field.
    """
    # First, since a newer version may have meant something else by any other field.
    written = config.thermoe_version
    if isinstance(written, str) and _release(written) > _release(__version__):
        raise ConfigError(
            f"the model was written by thermoe {written}, this is {__version__}",
            where="config.thermoe_version",
            accepted=f"a version up to {__version__}",
            fix="update thermoe: pip install --upgrade thermoe",
        )
    for name, (_, default, accepted, fits) in FIELDS.items():
        value = getattr(config, name)
        if not fits(value):
            raise ConfigError(
                f"{name} is {value!r}",
                where=f"config.{name}",
                accepted=accepted,
                fix="correct config.json" + (f"; the default is {default}" if default is not None else ""),
            )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:3])
