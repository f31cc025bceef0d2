"""What a user declares of reading experts that the shapes and dtypes of their weights do not show.

Experts that a cache keeps quantised read fewer bytes than their parameters have; those on another device, or in the
memory of the host, pay more for each. A factor says how many bytes read as usual a byte of them costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thermoe.errors import ConfigError, near_match

#: By dotted name of a layer, a factor for all its experts or one for each.
ReadCost = Mapping[str, float | Sequence[float]]
#: A byte from a disk costs some thousand times one from the memory of a board; costs have to stay finite in float32.
MOST = 1e6


def checked_read_cost(read_cost: Any) -> dict[str, float | tuple[float, ...]]:
    """Return a copy of what is declared, ``{}`` for ``None``; which layers there are is not asked.

    Raises:
        ConfigError: it is no mapping of names to factors, or a factor is outside its range.
    """
    if read_cost is None:
        return {}
    if not isinstance(read_cost, Mapping) or not all(isinstance(name, str) for name in read_cost):
        raise _refused(f"read_cost is {read_cost!r}", "read_cost")
    found: dict[str, float | tuple[float, ...]] = {}
    for name, given in read_cost.items():
        several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        for factor in given if several else (given,):
            number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
            if not number or not 1 / MOST <= factor <= MOST:
                raise _refused(f"a factor is {factor!r}", f"read_cost[{name!r}]")
        found[name] = tuple(given) if several else given
    return found


def read_factors(read_cost: ReadCost | None, experts: Mapping[str, int]) -> list[tuple[float, ...]]:
    """Return the factors of all experts, layer by layer; 1 where nothing is declared.

    Args:
        read_cost: what is declared.
        experts: E of each layer of the model, by dotted name.

    Raises:
        ConfigError: as `checked_read_cost`; or the model has no such layer, or the layer another number of experts.
    """
    declared = checked_read_cost(read_cost)
    for name, given in declared.items():
        if name not in experts:
            near = near_match(name, experts)
            raise ConfigError(
                f"the model has no routed layer {name!r}",
                where="read_cost",
                accepted=", ".join(experts) or "nothing: the model has no routed layer",
                fix=f"did you mean {near!r}?" if near else "name a layer as thermoe.collect_routing(model) does",
            )
        if isinstance(given, tuple) and len(given) != experts[name]:
            raise _refused(f"{len(given)} factors for {experts[name]} experts", f"read_cost[{name!r}]")
    each = ((declared.get(name, 1), count) for name, count in experts.items())
    return [given if isinstance(given, tuple) else (given,) * count for given, count in each]


def _refused(what: str, where: str) -> ConfigError:
    return ConfigError(
        what,
        where=where,
        accepted=f"by name of a layer, a number from {1 / MOST:g} to {MOST:g}, or one for each of its experts",
        fix="write read_cost={'transformer.h.0.mlp': 0.5} where a byte costs half, or leave read_cost out",
    )
