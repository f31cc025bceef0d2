"""How numbers are stated: digits follow the interval, energy carries its provenance, a gap is "not measured"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from thermoe.report.run_data import Arm, RunData, entry, number
from thermoe.results import PROVENANCE_ORDER

NOT_MEASURED = "not measured"
NOT_APPLICABLE = "does not apply"
NO_BREAK = "\u00a0"
MINUS = "\u2212"


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: the value in words, a second line, and the badge of its provenance (energy only)."""

    text: str
    note: str = ""
    badge: str = ""

    @property
    def missing(self) -> bool:
        """Whether the cell holds no value, and should be set in a quieter tone."""
        return self.text in (NOT_MEASURED, NOT_APPLICABLE)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0.0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def plain(value: Any, digits: int = 3) -> str:
    """State a number to ``digits`` significant digits, without an exponent where a person would not write one."""
    found = number(value)
    if found is None:
        return NOT_MEASURED
    if found == 0:
        return "0"
    exponent = math.floor(math.log10(abs(found)))
    if exponent < -4 or exponent > 8:
        mantissa, _, power = f"{found:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}".replace("-", MINUS)
    return _fixed(found, max(0, digits - 1 - exponent))


def count(value: Any) -> str:
    """State a count in full, with separators."""
    found = number(value)
    return NOT_MEASURED if found is None else _fixed(found, 0)


def scaled_count(value: Any) -> str:
    """State a large count as "4.21 million"; small ones in full."""
    found = number(value)
    if found is None:
        return NOT_MEASURED
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if abs(found) >= size:
            return f"{found / size:.3g} {word}"
    return count(found)


def percent(value: Any) -> str:
    """State a share of 1 as a percentage."""
    found = number(value)
    return NOT_MEASURED if found is None else f"{plain(100 * found, 2)} %"


def duration(value: Any) -> str:
    """State seconds as a person would."""
    found = number(value)
    if found is None:
        return NOT_MEASURED
    if found < 60:
        return f"{plain(found, 2)} s"
    minutes, seconds = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def decimals_for(low: float | None, high: float | None, value: float) -> int:
    """Decimals that show two significant digits of the standard deviation behind a 95% interval."""
    if low is not None and high is not None and high > low:
        deviation = (high - low) / 3.92
        return min(9, max(0, 1 - math.floor(math.log10(deviation))))
    return min(9, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 0


def bounds_of(estimate: Any) -> tuple[float | None, float | None, float | None]:
    """Return value, low and high of ``{value, lo, hi}``; a bare number is a value without an interval."""
    source = estimate if isinstance(estimate, Mapping) else {"value": estimate}
    value, low, high = (number(source.get(key)) for key in ("value", "lo", "hi"))
    return value, low, high


def shared_decimals(estimates: Iterable[Any]) -> int | None:
    """Decimals for a column of estimates: of the least certain one, so that its numbers line up."""
    bounds = [bounds_of(estimate) for estimate in estimates]
    return min((decimals_for(low, high, value) for value, low, high in bounds if value is not None), default=None)


def with_interval(estimate: Any, decimals: int | None = None) -> Cell:
    """State ``{value, lo, hi}`` as the value, with its interval as the note."""
    value, low, high = bounds_of(estimate)
    if value is None:
        return Cell(NOT_MEASURED)
    decimals = decimals_for(low, high, value) if decimals is None else decimals
    note = (
        f"[{_fixed(low, decimals)},{NO_BREAK}{_fixed(high, decimals)}]" if low is not None and high is not None else ""
    )
    return Cell(_fixed(value, decimals), note)


def difference(row: Mapping[str, Any]) -> Cell:
    """State a comparison row as a signed difference with its interval."""
    value, low, high = (number(row.get(key)) for key in ("diff", "lo", "hi"))
    if value is None:
        return Cell(NOT_MEASURED)
    cell = with_interval({"value": value, "lo": low, "hi": high})
    return Cell(f"+{cell.text}" if value > 0 else cell.text, cell.note)


def reading_of(row: Mapping[str, Any]) -> str:
    """Say in words what a comparison row shows; lower is better for every metric compared (a loss)."""
    value, low, high = (number(row.get(key)) for key in ("diff", "lo", "hi"))
    if value is None:
        return NOT_MEASURED
    if low is None or high is None:
        return "no interval, so no reading"
    if low > 0:
        return "worse"
    if high < 0:
        return "better"
    return "no difference shown"


def provenance_badge(label: Any) -> str:
    """Return a provenance as a badge; what is not one of the known labels counts as not measured."""
    return label if label in PROVENANCE_ORDER else NOT_MEASURED


def energy_cell(data: RunData, arm: Arm, column: str) -> Cell:
    """State joules per token of ``arm``; a value without provenance is not shown, for no one can tell what it is."""
    source = entry(data.summaries.get(arm.name), column)
    value, label = number(entry(source, "value")), entry(source, "provenance")
    if column == "j_per_token_modelled":
        label = data.modelled_label(arm.name)  # a row that names none has that of the cost model
    if value is None:
        reason = entry(source, "reason")
        return Cell(NOT_MEASURED, str(reason) if reason else "", NOT_MEASURED)
    if label not in PROVENANCE_ORDER:
        return Cell(NOT_MEASURED, "a value without provenance was recorded", NOT_MEASURED)
    factor, unit = data.energy_unit
    notes = []
    low, high = number(entry(source, "lo")), number(entry(source, "hi"))
    if low is not None and high is not None:
        notes.append(f"[{plain(low * factor)},{NO_BREAK}{plain(high * factor)}]")
    learning = data.learning_j_per_token(arm.name) if column == "j_per_token_modelled" else None
    if learning:
        notes.append(f"of it learning: {plain(learning * factor, 2)}{NO_BREAK}{unit}")
    return Cell(f"{plain(value * factor)} {unit}", "; ".join(notes), str(label))


def router_cell(arm: Arm, value: Any, digits: int = 3) -> Cell:
    """State a number about experts; a dense arm has none, and that is no gap in the measurement."""
    if number(value) is None and arm.is_dense:
        return Cell(NOT_APPLICABLE)
    return Cell(plain(value, digits))
