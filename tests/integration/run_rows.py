"""Compares the rows of two runs."""

from __future__ import annotations

from typing import Any

import pytest

from thermoe.results import RunFolder

#: What a clock says is different in every run.
CLOCK = ("duration_s", "tokens_per_s")
PLACE = ("kind", "arm", "against", "segment", "batch", "layer", "phase", "step")


def by_place(run: RunFolder) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return the rows by what they are about, verdicts by their first words; no two rows are about the same."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in run.rows():
        place = (*(str(row.get(name)) for name in PLACE), " ".join(row.get("text", "").split()[:5]))
        assert place not in found, f"written twice: {place}"
        found[place] = {name: value for name, value in row.items() if name not in CLOCK}
    return found


def _close(value: Any) -> Any:
    """Allow for the last digits: weights that come from a file lie elsewhere in memory, and sums round differently."""
    if isinstance(value, float):
        return pytest.approx(value, rel=1e-4, abs=1e-6)
    if isinstance(value, dict):
        return {name: _close(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_close(entry) for entry in value]
    return value


def assert_same_results(run: RunFolder, reference: RunFolder) -> None:
    """Both runs hold the same rows, floats up to rounding."""
    found, wanted = by_place(run), by_place(reference)
    assert found.keys() == wanted.keys()
    for place, row in wanted.items():
        if row["kind"] == "verdict":
            assert found[place]["holds"] == row["holds"], place
        else:
            assert found[place].keys() == row.keys()
            for name, value in row.items():
                assert found[place][name] == _close(value), (place, name)
