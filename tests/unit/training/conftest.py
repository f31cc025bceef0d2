"""The test router has a name while these tests run, and none for others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from training_tools import BiasedRouter

from thermoe.routers.base import ROUTERS


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    ROUTERS.register("test-biased")(BiasedRouter)
    yield
    del ROUTERS._entries["test-biased"]
