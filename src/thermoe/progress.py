"""What a person sees while a command works: a line per stage, and a bar while it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Reporter:
    """Prints stages to a console and keeps how long each took.

    Attributes:
        durations_s: by stage title.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.durations_s: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print one line as it is; square brackets in it are no markup."""
        self.console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Show a bar while the stage runs; yields a function that takes the number of steps done and perhaps a note."""
        started = time.monotonic()
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            task = progress.add_task(escape(title), total=total, note="")

            def show(done: int, note: str = "") -> None:
                progress.update(task, completed=done, note=escape(note))

            yield show
        self.durations_s[title] = time.monotonic() - started
        self.console.print(f"[green]done[/green] {escape(title)} ({self.durations_s[title]:.1f} s)", highlight=False)
