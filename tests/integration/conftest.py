"""One finished run of the smoke preset, made through the command line and shared by every test that only reads it."""

from __future__ import annotations

import pytest
from command_line import command

from thermoe.results import RunFolder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("smoke") / "run"
    done = command("demo", "--preset", "smoke", "--device", "cpu", "--telemetry", "off", "--out", str(folder))
    assert done.code == 0, done.err
    (folder / "printed.txt").write_text(done.out, encoding="utf-8")
    return RunFolder.open(folder)
