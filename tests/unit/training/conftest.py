"""The test router has a name while these tests run, and none for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from training_tools import BiasedRouter

from thermoe.routers.base import ROUTERS


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    ROUTERS.register("test-biased")(BiasedRouter)
    yield
    del ROUTERS._entries["test-biased"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the user's cache of token ids alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
