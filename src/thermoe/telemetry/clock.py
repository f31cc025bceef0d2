"""Clocks: intervals come from a monotonic clock, labels from the wall clock, suspends from the boot-time clock."""

from __future__ import annotations

import threading
import time
from typing import Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """What telemetry asks of time; every value is in seconds."""

    #: True when time passes only by being told to; nothing may then wait in another thread.
    virtual: bool

    def now_s(self) -> float:
        """Return monotonic time; only differences mean anything."""

    def wall_s(self) -> float:
        """Return seconds since 1970; a label, never used for an interval."""

    def boottime_s(self) -> float | None:
        """Return a clock that runs on while the machine is suspended; ``None`` where there is none."""

    def sleep_s(self, duration_s: float) -> None:
        """Let ``duration_s`` pass."""


class SystemClock:
    """The machine's own clocks."""

    virtual = False

    def now_s(self) -> float:
        """Return monotonic time in seconds."""
        return time.monotonic_ns() * 1e-9

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        return time.time()

    def boottime_s(self) -> float | None:
        """Return the boot-time clock in seconds, where the system has one that differs from the monotonic clock."""
        source = getattr(time, "CLOCK_BOOTTIME", None)
        return None if source is None else time.clock_gettime(source)

    def sleep_s(self, duration_s: float) -> None:
        """Sleep for ``duration_s``."""
        if duration_s > 0:
            time.sleep(duration_s)


class VirtualClock:
    """A clock that moves only when told to, so that a test of an hour takes a moment.

    Args:
        start_s: the first monotonic reading.
        wall_start_s: the first wall reading.
    """

    virtual = True

    def __init__(self, start_s: float = 1000.0, wall_start_s: float = 1.7e9) -> None:
        self._now_s = start_s
        self._wall_offset_s = wall_start_s - start_s
        self._suspended_s = 0.0
        self._lock = threading.Lock()

    def now_s(self) -> float:
        """Return virtual monotonic time in seconds."""
        return self._now_s

    def wall_s(self) -> float:
        """Return virtual wall time in seconds since 1970."""
        return self._now_s + self._wall_offset_s + self._suspended_s

    def boottime_s(self) -> float | None:
        """Return virtual time in seconds, suspends included."""
        return self._now_s + self._suspended_s

    def sleep_s(self, duration_s: float) -> None:
        """Move time on by ``duration_s``; a negative duration changes nothing."""
        with self._lock:
            self._now_s += max(0.0, duration_s)

    def advance_to(self, t_s: float) -> None:
        """Move time on to ``t_s``, unless it is past already."""
        with self._lock:
            self._now_s = max(self._now_s, t_s)

    def step_wall(self, offset_s: float) -> None:
        """Set the wall clock forward or back, as a time server does."""
        self._wall_offset_s += offset_s

    def suspend(self, duration_s: float) -> None:
        """Let the machine sleep: the boot-time clock runs on, the monotonic clock stands."""
        self._suspended_s += max(0.0, duration_s)


SYSTEM_CLOCK = SystemClock()
