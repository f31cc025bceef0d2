"""A window that is still open: counts work, and closes into an :class:`EnergyWindow` whatever happens inside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, ParamSpec, Self, TypeVar

from thermoe.errors import TelemetryError
from thermoe.telemetry.arguments import checked_tokens
from thermoe.telemetry.evaluate import Edge
from thermoe.telemetry.window import EnergyWindow, Mark, WorkLog

if TYPE_CHECKING:
    from thermoe.telemetry.meter import EnergyMeter

P = ParamSpec("P")
R = TypeVar("R")
#: A gap between the boot-time and the monotonic clock that grew by more than this means the machine slept.
SUSPEND_S = 0.5
SUSPENDED = "the machine was suspended inside the window"


class OpenWindow:
    """A span of work being measured; made by :meth:`EnergyMeter.window`, used with ``with`` or as a decorator.

    Args:
        meter: who measures.
        name: what is measured.
        tokens: tokens the span will process, when known beforehand; :meth:`count` adds to it.
        sampled: take the ends from the sampler's readings and read nothing on this thread.
    """

    def __init__(self, meter: EnergyMeter, name: str, *, tokens: float | None = None, sampled: bool = False) -> None:
        self.name = name
        self.tokens = None if tokens is None else checked_tokens(tokens)
        self._meter = meter
        self._sampled = sampled
        self._flags: set[str] = set()
        self._result: EnergyWindow | None = None
        self._entered = False
        self._start: dict[str, Edge] = {}
        self._log: WorkLog | None = None
        self._marks: list[tuple[Mark, float]] = []

    @property
    def result(self) -> EnergyWindow:
        """The measured window.

        Raises:
            TelemetryError: the window has not been closed yet.
        """
        if self._result is None:
            raise TelemetryError(
                f"the window {self.name!r} has no result yet",
                where="window.result",
                accepted="a window that was entered and left",
                fix="read .result after the with block",
            )
        return self._result

    @property
    def closed(self) -> bool:
        """Whether there is a result."""
        return self._result is not None

    def count(self, tokens: float, mark: Mark | None = None) -> None:
        """Add ``tokens`` to the work of this window.

        Args:
            tokens: tokens of one step.
            mark: tells when the step finishes on the device; without it the step counts as finished now.
        """
        self.tokens = (self.tokens or 0.0) + checked_tokens(tokens)
        if self._log is not None:
            if mark is None:
                self._log.add(self._meter.clock.now_s(), tokens)
            else:
                self._marks.append((mark, tokens))

    def __enter__(self) -> Self:
        if self._entered:
            raise TelemetryError(
                f"the window {self.name!r} was entered twice",
                where="EnergyMeter.window",
                accepted="one with block per window",
                fix="call meter.window() again for each block",
            )
        self._entered = True
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._check_entered()
        if kind is not None:
            self._flags.add("exception")
        if self._result is None:
            self._close()

    def _check_entered(self) -> None:
        if not self._entered:
            raise TelemetryError(
                f"the window {self.name!r} was never entered",
                where="EnergyMeter.window",
                accepted="with meter.window(...) as window: ...",
                fix="put the work into a with block, or use begin_window and end_window",
            )

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Decorate ``function``: each call is a window of its own, kept in the meter's ``results``."""

        @functools.wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            with OpenWindow(self._meter, self.name, tokens=self.tokens, sampled=self._sampled):
                return function(*args, **kwargs)

        return measured

    def _begin(self) -> None:
        self._meter.open()
        self._flags |= self._meter.wait_for_device()
        clock = self._meter.clock
        self._began_s = clock.now_s()
        self._asleep_s = self._lag_of_boottime()
        self._started_at = clock.wall_s()
        if self._sampled:
            self._log = WorkLog(self._began_s)
        else:
            self._start = self._meter.direct_edges()

    def _lag_of_boottime(self) -> float:
        boottime_s = self._meter.clock.boottime_s()
        return 0.0 if boottime_s is None else boottime_s - self._meter.clock.now_s()

    def _suspended(self) -> bool:
        return self._lag_of_boottime() - self._asleep_s > SUSPEND_S

    def cancel(self) -> EnergyWindow:
        """Close the window without a measurement and return it as invalid, with the reason ``cancelled``."""
        self._check_entered()
        return self._finish({}, {}, "cancelled")

    def _close(self) -> None:
        reason = None
        if self._sampled:
            self._resolve_marks()
            started, ended = self._meter.sampled_edges(self._began_s, self._meter.clock.now_s())
        else:
            self._flags |= self._meter.wait_for_device()
            started, ended = self._start, self._meter.direct_edges()
        if self._suspended():
            reason = SUSPENDED
        self._finish(started, ended, reason)

    def _resolve_marks(self) -> None:
        marks, self._marks = self._marks, []
        for mark, tokens in marks:
            try:
                finished_s = mark.time_s()
            except Exception:  # the mark belongs to the device's runtime, whose faults must not end the user's loop
                self._flags.add("mark_failed")
                finished_s = self._meter.clock.now_s()
            if self._log is not None:
                self._log.add(finished_s, tokens)

    def _finish(self, started: dict[str, Edge], ended: dict[str, Edge], reason: str | None) -> EnergyWindow:
        counted = self._log.between if self._log is not None and self._log.steps else None
        untimed = self._log is not None and counted is None
        self._result = self._meter.close_window(
            self.name,
            edges="sampled" if self._sampled else "direct",
            started=started,
            ended=ended,
            duration_s=self._meter.clock.now_s() - self._began_s,
            started_at=self._started_at,
            tokens=counted or (None if untimed else self.tokens),
            flags=frozenset(self._flags),
            reason=reason,
        )
        return self._result
