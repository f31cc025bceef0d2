"""Reports made from a run folder alone: one HTML file with its figures inside, and a table for the terminal.

Nothing here imports torch or a model; a report can be made on a machine that could not have made the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thermoe.report.html import build_report as build_report
    from thermoe.report.terminal import summary_table as summary_table

_PUBLIC = {"build_report": "thermoe.report.html", "summary_table": "thermoe.report.terminal"}
__all__ = ["build_report", "summary_table"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:  # late, so that the terminal table does not wait for matplotlib
        from importlib import import_module

        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'thermoe.report' has no attribute {name!r}")
