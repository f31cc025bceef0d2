from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a complete run; keyword arguments replace manifest entries."""

    def make(**changes: Any) -> Path:
        return write_run(tmp_path / "demo-run", **changes)

    return make
