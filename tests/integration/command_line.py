"""Runs the command line inside this process, as `thermoe ...` would."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from thermoe import cli


@dataclass(frozen=True, slots=True)
class Done:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str


def command(*args: str) -> Done:
    """Run ``thermoe args``; an exception that would reach the user as a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with patch.object(sys, "argv", ["thermoe", *args]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as left:
            code = left.code
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
