"""Windows whose ends lie on steps of the energy counter, for comparisons and calibration.

The counter is read until it steps while the caller keeps the device busy, so each end is known to one call instead of
one counter period. Reading happens on a thread of its own: it releases the interpreter while the driver answers, and
the caller goes on queueing steps. Work is counted by the time each step finished and interpolated at the two ticks, so
that joules and tokens belong to the same span.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

from thermoe.telemetry.arguments import checked_length, checked_tokens
from thermoe.telemetry.evaluate import Edge, direct_edge
from thermoe.telemetry.open_window import SUSPENDED, OpenWindow
from thermoe.telemetry.source import Device
from thermoe.telemetry.ticks import find_tick
from thermoe.telemetry.window import Mark, WorkLog

if TYPE_CHECKING:
    from thermoe.telemetry.meter import EnergyMeter

#: Steps a caller may have queued beyond the one the device works on.
STEPS_AHEAD = 2
#: The search for the closing tick begins this long before it is expected.
LEAD_S = 0.010
JOIN_S = 2.0
#: On a virtual clock the search is due when a step of up to this length would run past its beginning.
LOOK_AHEAD_S = 0.05


class AlignedWindow(OpenWindow):
    """A span from one counter step to another; made by :meth:`EnergyMeter.aligned_window`.

    Repeat steps until :attr:`done`, and :meth:`count` each of them. Without a sensor ``done`` comes after ``min_s``
    all the same, so that a program runs alike on every machine.

    Args:
        meter: who measures.
        name: what is measured.
        min_s: least length of the span between the two ticks, in seconds.
    """

    def __init__(self, meter: EnergyMeter, name: str, *, min_s: float) -> None:
        super().__init__(meter, name)
        self._min_s = checked_length(min_s)
        self._done = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._end: dict[str, Edge] = {}
        self._gpus: list[Device] = []
        self._counted_before = 0

    @property
    def done(self) -> bool:
        """Whether the closing tick has been seen (or will not come); the caller's loop ends then."""
        if self._thread is None and self._meter.clock.virtual and not self._done.is_set():
            self._advance()
        return self._done.is_set()

    def count(self, tokens: float, mark: Mark | None = None) -> None:
        """Add the ``tokens`` of one step.

        Args:
            tokens: tokens of the step.
            mark: tells when the step finishes on the device. The call waits for the step two before this one, so that
                no more than two steps are ever queued. Without a mark the device is awaited, and the step counts as
                finished now.
        """
        self.tokens = (self.tokens or 0.0) + checked_tokens(tokens)
        if mark is None:
            self._flags |= self._meter.wait_for_device()
            self._resolve_marks()
            if self._log is not None:
                self._log.add(self._meter.clock.now_s(), tokens)
            return
        self._marks.append((mark, tokens))
        if len(self._marks) > STEPS_AHEAD:
            ready, self._marks = self._marks[:-STEPS_AHEAD], self._marks[-STEPS_AHEAD:]
            later, self._marks = self._marks, ready
            self._resolve_marks()
            self._marks = later

    def _begin(self) -> None:
        self._meter.open()
        clock = self._meter.clock
        self._gpus = [device for device in self._meter.devices if device.kind == "gpu"]
        self._began_s = clock.now_s()
        self._asleep_s = self._lag_of_boottime()
        self._started_at = clock.wall_s()
        self._log = WorkLog(self._began_s)
        if not clock.virtual and self._gpus:
            self._thread = threading.Thread(target=self._watch, name="thermoe-ticks", daemon=True)
            self._thread.start()
        elif not self._gpus:
            self._start = self._meter.direct_edges()
            if not clock.virtual:
                self._thread = threading.Thread(target=self._watch_clock, name="thermoe-ticks", daemon=True)
                self._thread.start()

    def _watch(self) -> None:
        """Find the opening tick, let ``min_s`` pass, find the closing tick."""
        self._start = self._find_edges()
        self._stop.wait(max(0.0, self._closing_search_s() - self._meter.clock.now_s()))
        if not self._stop.is_set():
            self._end = self._find_edges()
        self._done.set()

    def _watch_clock(self) -> None:
        self._stop.wait(self._min_s)
        self._done.set()

    def _advance(self) -> None:
        """Do on the caller's thread, bit by bit, what a watching thread does; a virtual clock has none."""
        now_s = self._meter.clock.now_s()
        counted = len(self._marks) + (self._log.steps if self._log is not None else 0)
        if self._end:
            # Steps go on until the count reaches beyond the closing tick, or none comes any more.
            if counted == self._counted_before or self._reach_s() >= max(edge.t_s for edge in self._end.values()):
                self._done.set()
        elif not self._gpus:
            if now_s - self._began_s >= self._min_s:
                self._done.set()
        elif not self._start:
            self._start = self._find_edges()
        elif now_s >= self._closing_search_s() - LOOK_AHEAD_S:
            self._meter.clock.sleep_s(self._closing_search_s() - now_s)
            self._end = self._find_edges()
        self._counted_before = counted

    def _reach_s(self) -> float:
        """Return when the last step counted so far finishes."""
        if self._marks:
            return self._marks[-1][0].time_s()
        return self._began_s if self._log is None else self._log.last_s

    def _closing_search_s(self) -> float:
        """Return when to begin to look for the closing tick: just before the first one that is ``min_s`` away."""
        opened = [edge for uuid, edge in self._start.items() if edge.reason is None and uuid != "host"]
        if not opened:
            return self._began_s + self._min_s
        period_s = self._gpus[0].counter_period_s
        # The opening tick is known to one call only, so a span of a whole number of periods must not need one more.
        periods = max(1, math.ceil(self._min_s / period_s - 0.05))
        return max(edge.t_s for edge in opened) + periods * period_s - LEAD_S

    def _find_edges(self) -> dict[str, Edge]:
        edges: dict[str, Edge] = {}
        for device in self._gpus:
            edge = find_tick(self._meter.reader, device, self._meter.clock, stop=self._stop).edge()
            # Temperature, clocks and the rest are not in the search's readings; the counter's value stays the tick's.
            facts = self._meter.read_edge(device)
            edges[device.uuid] = replace(
                edge,
                sample=replace(
                    facts,
                    t_s=edge.sample.t_s,
                    energy_j=edge.sample.energy_j,
                    lost=facts.lost or edge.sample.lost,
                    missing={**facts.missing, **edge.sample.missing},
                    counter_epoch=edge.sample.counter_epoch,
                    counter_age_s=edge.sample.counter_age_s,
                    read_latency_s=edge.sample.read_latency_s,
                ),
            )
        for device in self._meter.devices:
            if device.kind == "host":
                edges[device.uuid] = direct_edge(device, self._meter.read_edge(device))
        return edges

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)
        super().__exit__(kind, error, trace)

    def _close(self) -> None:
        clock = self._meter.clock
        reason = None
        self._resolve_marks()
        if not self._gpus:
            self._end = self._meter.direct_edges()
        elif not self._start or not self._end:
            ran_s = clock.now_s() - self._began_s
            reason = f"left before the closing tick (ran {ran_s:.2f} s, min_s is {self._min_s:.2f} s)"
            self._start = self._end = {}
        if self._suspended():
            reason = SUSPENDED
        self._note_drain()
        counted = self._log.between if self._log is not None and self._log.steps else None
        self._result = self._meter.close_window(
            self.name,
            edges="tick" if self._gpus else "direct",
            started=self._start,
            ended=self._end,
            duration_s=clock.now_s() - self._began_s,
            started_at=self._started_at,
            tokens=counted,
            flags=frozenset(self._flags),
            reason=reason,
        )

    def _note_drain(self) -> None:
        """Flag a device that ran dry: the last step finished well before the closing tick."""
        closing = [edge.t_s for uuid, edge in self._end.items() if uuid != "host" and edge.reason is None]
        if self._log is None or not self._log.steps or not closing:
            return
        mean_step_s = (self._log.last_s - self._began_s) / self._log.steps
        if max(closing) - self._log.last_s > max(mean_step_s, LEAD_S):
            self._flags.add("drained")
