"""Progress lines are printed as they are."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from thermoe.progress import Reporter


def reporter() -> tuple[Reporter, io.StringIO]:
    stream = io.StringIO()
    return Reporter(Console(file=stream, width=100)), stream


@pytest.mark.parametrize("text", ["[/b] is no markup", "runs/[red]a", "reason [Errno 13]"])
def test_brackets_in_a_line_are_kept(text: str) -> None:
    progress, stream = reporter()
    progress.say(text)
    with progress.stage(text, 1) as done:
        done(1)
    first, second = stream.getvalue().splitlines()
    assert first == text
    assert second.startswith(f"done {text} (")
    assert progress.durations_s.keys() == {text}


def test_a_stage_that_fails_is_not_called_done() -> None:
    progress, stream = reporter()
    with pytest.raises(KeyboardInterrupt), progress.stage("learn", 3):
        raise KeyboardInterrupt
    assert stream.getvalue() == ""
    assert progress.durations_s == {}
