"""Readings in the background: one thread per process, once a second, kept in a ring of the latest samples.

Each device is read on its own schedule. Where its energy counter steps regularly the reading follows the step by a few
milliseconds, so that the age of the value is known. A device that fails is asked less and less often; one that is lost
is not asked again. The thread holds no strong reference to its sampler and ends when the sampler is closed or dropped.
"""

from __future__ import annotations

import bisect
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from thermoe.telemetry.arguments import checked_period
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.gate import SLOW_READ_S, GatedReader
from thermoe.telemetry.source import Device, Sample
from thermoe.telemetry.ticks import PhaseLock

CAPACITY = 4096
JOIN_S = 2.0
MAX_BACKOFF_S = 30.0
#: The list of processes changes slowly and is dearer to ask for than a number.
PROCESSES_EVERY = 10


@dataclass(slots=True)
class _Track:
    """What the sampler knows of one device."""

    device: Device
    metrics: tuple[str, ...]
    ring: deque[Sample]
    lock: PhaseLock | None
    due_s: float = 0.0
    failures: int = 0
    polls: int = 0
    lost: bool = False
    last_strangers: int | None = None


class Sampler:
    """Polls devices through a gated reader.

    Args:
        reader: the reader all threads of this process share.
        devices: what to poll.
        period_s: time between two polls of one device, in seconds; below 1.0 only with ``allow_fast``.
        capacity: samples kept per device.
        allow_fast: permit periods below 1 s, which disturb what they measure.
        phase_lock: follow the steps of the energy counter.
        clock: the clock to poll by; on a virtual clock no thread is started and :meth:`poll` is called by hand.

    Raises:
        ConfigError: ``period_s`` is not a number in range.
    """

    def __init__(
        self,
        reader: GatedReader,
        devices: Sequence[Device],
        *,
        period_s: float = 1.0,
        capacity: int = CAPACITY,
        allow_fast: bool = False,
        phase_lock: bool = True,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.period_s = checked_period(period_s, allow_fast)
        self._reader = reader
        self._clock = clock
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._ring_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._tracks: dict[str, _Track] = {}
        for device in devices:
            offered = tuple(sorted(reader.source.metrics(device)))
            lockable = phase_lock and device.kind == "gpu" and "energy_j" in offered
            lock = PhaseLock(device, clock) if lockable else None
            self._tracks[device.uuid] = _Track(device, offered, deque(maxlen=capacity), lock)

    @property
    def running(self) -> bool:
        """Whether samples are being taken in this process; false in a forked child, where the thread is not."""
        return self._pid == os.getpid() and self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread, unless there is nothing to poll, it runs already, or the clock is virtual."""
        if self.running or self._stop.is_set() or not self._tracks or self._clock.virtual:
            return
        self._pid = os.getpid()
        thread = threading.Thread(
            target=_run, args=(weakref.ref(self), self._stop), name="thermoe-sampler", daemon=True
        )
        self._thread = thread
        self._finalizer = weakref.finalize(self, _end, self._stop, thread, self._pid)
        thread.start()

    def close(self) -> None:
        """Stop the thread and wait for it, at most 2 s; calling it twice is harmless."""
        self._stop.set()
        if self._finalizer is not None:
            self._finalizer()

    def poll(self) -> float:
        """Read every device that is due, and return how long to wait for the next one, in seconds."""
        for track in self._tracks.values():
            if not track.lost and self._clock.now_s() >= track.due_s:
                self._poll_device(track)
        waiting = [track.due_s for track in self._tracks.values() if not track.lost]
        return max(0.0, min(waiting) - self._clock.now_s()) if waiting else self.period_s

    def _poll_device(self, track: _Track) -> None:
        if track.lock is not None and track.polls == 0:
            track.lock.acquire(self._reader, self._stop)
        elif track.lock is not None:
            track.lock.check(self._reader)
        skip_list = track.polls % PROCESSES_EVERY != 0
        wanted = [m for m in track.metrics if not (skip_list and m == "foreign_processes")]
        sample = self._reader.read(track.device, wanted)
        track.polls += 1
        if sample.foreign_processes is not None:
            track.last_strangers = sample.foreign_processes
        tick_s = None if track.lock is None else track.lock.last_tick_before(sample.t_s)
        with self._ring_lock:
            track.ring.append(replace(sample, tick_s=tick_s, foreign_processes=track.last_strangers))
        track.lost = sample.lost
        if sample.lost:
            reason = next(iter(sample.missing.values()), "lost")
            self._reader.warn_once(
                f"lost:{track.device.uuid}", f"{track.device.name}: {reason}; it is no longer sampled"
            )
        failed = sample.read_latency_s > SLOW_READ_S or not sample.provenance
        track.failures = track.failures + 1 if failed else 0
        wait_s = self.period_s * min(2.0**track.failures, 64.0) if track.failures else self.period_s
        due_s = self._clock.now_s() + min(wait_s, max(MAX_BACKOFF_S, self.period_s))
        # The next reading is timed from the schedule, not from the end of this one, so that the period does not creep.
        if not track.failures and track.due_s and self._clock.now_s() - track.due_s < self.period_s:
            due_s = track.due_s + self.period_s
        track.due_s = due_s if track.lock is None else max(self._clock.now_s(), track.lock.reading_time(due_s))

    def latest(self, uuid: str) -> Sample | None:
        """Return the newest sample of a device; ``None`` before the first one and in a forked child."""
        track = self._tracks.get(uuid)
        if track is None or self._pid != os.getpid():
            return None
        with self._ring_lock:
            return track.ring[-1] if track.ring else None

    def between(self, uuid: str, start_s: float, end_s: float) -> list[Sample]:
        """Return the samples of a device read strictly between two moments, in order."""
        track = self._tracks.get(uuid)
        if track is None or self._pid != os.getpid():
            return []
        with self._ring_lock:
            kept = list(track.ring)
        first = bisect.bisect_right(kept, start_s, key=lambda sample: sample.t_s)
        last = bisect.bisect_left(kept, end_s, key=lambda sample: sample.t_s)
        return kept[first:last]

    def locked(self, uuid: str) -> bool:
        """Return whether readings of a device follow the steps of its counter."""
        track = self._tracks.get(uuid)
        return track is not None and track.lock is not None and track.lock.locked

    def notes(self) -> list[str]:
        """Return what was given up on the way, in words."""
        return [t.lock.note for t in self._tracks.values() if t.lock is not None and t.lock.note is not None]


def _run(sampler_ref: weakref.ref[Sampler], stop: threading.Event) -> None:
    while not stop.is_set():
        sampler = sampler_ref()
        if sampler is None:
            return
        wait_s = sampler.poll()
        # Without this the thread would keep the sampler alive through every wait.
        del sampler
        stop.wait(wait_s)


def _end(stop: threading.Event, thread: threading.Thread, pid: int) -> None:
    stop.set()
    if pid == os.getpid() and thread is not threading.current_thread():
        thread.join(JOIN_S)
