"""A board that does not exist: power, heat and the sensors that see them, so that the true joules are known.

Power: P = (P_idle + P_work) (1 + 0.003 (T1 - T_ref)), held at the limit by slowing the work. Heat flows from the die
(T1) through the heat sink (T2) to the air (Ta):

    C1 dT1/dt = P - (T1 - T2) / R12        C2 dT2/dt = (T1 - T2) / R12 - (T2 - Ta) / R2a

The defaults reproduce 36 C at 100 W and 62 C at 690 W, the ends seen on an H200. The sensors see a gain of their own, a
short-lived noise, a counter that steps every 100 ms, a momentary power that averages the last 25 of each 100 ms, and a
mean over one second.
"""

from __future__ import annotations

import bisect
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

FaultKind = Literal[
    "reset", "backwards", "frozen", "dropout", "slow", "lost", "permission", "nan", "absurd", "foreign", "gain"
]
SUBSTEPS = 20
LEAKAGE_PER_K = 0.003
NOMINAL_SM_CLOCK_HZ = 1.98e9
NOMINAL_MEMORY_CLOCK_HZ = 3.2e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that goes wrong with a board or its sensors for a while.

    Attributes:
        kind: ``reset`` (counter starts again at 0), ``backwards`` (counter steps back by ``value`` J), ``frozen``,
            ``dropout`` (no answer), ``slow`` (each call takes ``value`` s), ``lost``, ``permission``, ``nan``,
            ``absurd`` (values no board can have), ``foreign`` (``value`` other processes), ``gain`` (work answers
            ``value`` times as strongly; negative turns the sign).
        start_s: when it begins, on the plant's clock.
        duration_s: how long it lasts.
        value: its size, where it has one.
    """

    kind: FaultKind
    start_s: float
    duration_s: float = math.inf
    value: float = 0.0

    def active(self, t_s: float) -> bool:
        """Return whether the fault is present at ``t_s``."""
        return self.start_s <= t_s < self.start_s + self.duration_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The constants of a simulated board: powers in W, temperatures in C, resistances in K/W, times in s.

    Attributes:
        idle_w: power at rest.
        limit_w: power limit.
        reference_c: temperature at which leakage adds nothing.
        die_to_sink: thermal resistance from die to heat sink.
        sink_to_air: thermal resistance from heat sink to air.
        die_tau_s: time constant of the die.
        sink_tau_s: time constant of the heat sink.
        ambient_c: air temperature at the start.
        ambient_creep_c: how much the air warms, with the time constant of half an hour.
        slowdown_c: die temperature at which the work is halved, until 3 K below it.
        counter_period_s: how often the sensors are refreshed.
        gain_rel_limit: the board's gain error is drawn from plus or minus this.
        noise_rel_sd: relative standard deviation of the short-lived noise.
        delay_s: time from a change of the work to a change of power.
        memory_total_bytes: device memory.
        work_reference_w: the work power about which a ``gain`` fault acts.
    """

    idle_w: float = 100.0
    limit_w: float = 700.0
    reference_c: float = 50.0
    die_to_sink: float = 0.020
    sink_to_air: float = 0.024
    die_tau_s: float = 3.0
    sink_tau_s: float = 60.0
    ambient_c: float = 31.6
    ambient_creep_c: float = 2.0
    slowdown_c: float = 87.0
    counter_period_s: float = 0.1
    gain_rel_limit: float = 0.05
    noise_rel_sd: float = 0.01
    delay_s: float = 0.0
    memory_total_bytes: float = 150e9
    work_reference_w: float = 0.0


class StepLoad:
    """Work power that is set at moments and holds in between.

    Args:
        power_w: the power from the beginning, in watts.
    """

    def __init__(self, power_w: float = 0.0) -> None:
        self._times: list[float] = [-math.inf]
        self._powers: list[float] = [power_w]

    def set(self, t_s: float, power_w: float) -> None:
        """Let the work draw ``power_w`` watts from ``t_s`` on; moments must not go back in time."""
        self._times.append(max(t_s, self._times[-1]))
        self._powers.append(power_w)

    def __call__(self, t_s: float) -> float:
        """Return the power at ``t_s``, in watts."""
        return self._powers[bisect.bisect_right(self._times, t_s) - 1]


@dataclass(slots=True)
class SensorState:
    """What the sensors hold after the latest refresh."""

    energy_j: float = 0.0
    power_w: float = 0.0
    power_avg_w: float = 0.0


class Plant:
    """One simulated board, integrated up to its latest sensor refresh whenever it is asked for something.

    Args:
        start_s: the clock's reading at the beginning.
        load: work power in watts as a function of time.
        board: its constants.
        seed: of gain, phase and noise.
        faults: what goes wrong, and when.
    """

    def __init__(
        self,
        start_s: float,
        load: Callable[[float], float],
        *,
        board: Board | None = None,
        seed: int = 0,
        faults: Iterable[Fault] = (),
    ) -> None:
        self.board = board or Board()
        self.load = load
        self.faults = tuple(faults)
        draw = random.Random(seed)
        self._noise = random.Random(seed + 1)
        limit = self.board.gain_rel_limit
        self.gain = 1.0 + draw.uniform(-limit, limit)
        self.tick_s = start_s - draw.uniform(0.0, self.board.counter_period_s)
        self._start_s = self.tick_s
        self._ar = 0.0
        at_rest_w = self.board.idle_w
        self.sink_c = self.board.ambient_c + at_rest_w * self.board.sink_to_air
        self.die_c = self.sink_c + at_rest_w * self.board.die_to_sink
        self._slowed = False
        self.speed = 1.0
        self.throttle: frozenset[str] = frozenset({"gpu_idle"})
        self.true_energy_j = 0.0
        self._history: deque[tuple[float, float]] = deque([(self.tick_s, 0.0)], maxlen=36000)
        self._second: deque[float] = deque(maxlen=max(1, round(1.0 / self.board.counter_period_s)) * SUBSTEPS)
        self._fired: set[Fault] = set()
        self.sensors = SensorState(energy_j=draw.randint(1_000_000, 1_000_000_000) * 1e-3)

    def active(self, kind: FaultKind, t_s: float) -> Fault | None:
        """Return the fault of ``kind`` that is present at ``t_s``."""
        return next((fault for fault in self.faults if fault.kind == kind and fault.active(t_s)), None)

    def advance(self, t_s: float) -> None:
        """Integrate up to the last sensor refresh at or before ``t_s``."""
        while self.tick_s + self.board.counter_period_s <= t_s:
            self._one_period()

    def _work_power(self, t_s: float) -> float:
        work_w = self.load(t_s - self.board.delay_s)
        fault = self.active("gain", t_s)
        if fault is not None:
            work_w = self.board.work_reference_w + fault.value * (work_w - self.board.work_reference_w)
        return max(0.0, work_w) * (0.5 if self._slowed else 1.0)

    def _one_period(self) -> None:
        board = self.board
        step_s = board.counter_period_s / SUBSTEPS
        seen: list[float] = []
        capped = working = False
        speeds: list[float] = []
        for position in range(SUBSTEPS):
            t_s = self.tick_s + (position + 0.5) * step_s
            work_w = self._work_power(t_s)
            leak = 1.0 + LEAKAGE_PER_K * (self.die_c - board.reference_c)
            room_w = max(0.0, board.limit_w / leak - board.idle_w)
            speed = min(1.0, room_w / work_w) if work_w > 0 else 1.0
            capped, working = capped or speed < 1.0, working or work_w > 0
            speeds.append(speed)
            power_w = (board.idle_w + work_w * speed) * leak
            self._heat(power_w, step_s, t_s)
            self.true_energy_j += power_w * step_s
            # An autoregression with a memory of a few substeps: it averages out within a window, as seen on hardware.
            self._ar = 0.8 * self._ar + board.noise_rel_sd * 0.6 * self._noise.gauss(0.0, 1.0)
            seen.append(power_w * self.gain * (1.0 + self._ar))
        self.tick_s += board.counter_period_s
        self.speed = math.fsum(speeds) / SUBSTEPS * (0.5 if self._slowed else 1.0)
        self._slowed = self.die_c > board.slowdown_c - (3.0 if self._slowed else 0.0)
        names = {"sw_power_cap"} if capped else set()
        names |= {"hw_thermal_slowdown"} if self._slowed else set()
        self.throttle = frozenset(names if working else names | {"gpu_idle"})
        self._history.append((self.tick_s, self.true_energy_j))
        self._second.extend(seen)
        self._refresh_sensors(seen, step_s)

    def _heat(self, power_w: float, step_s: float, t_s: float) -> None:
        board = self.board
        air_c = board.ambient_c + board.ambient_creep_c * (1.0 - math.exp(-(t_s - self._start_s) / 1800.0))
        to_sink_w = (self.die_c - self.sink_c) / board.die_to_sink
        to_air_w = (self.sink_c - air_c) / board.sink_to_air
        self.die_c += (power_w - to_sink_w) * step_s * board.die_to_sink / board.die_tau_s
        self.sink_c += (to_sink_w - to_air_w) * step_s * board.sink_to_air / board.sink_tau_s

    def _refresh_sensors(self, seen: list[float], step_s: float) -> None:
        if self.active("frozen", self.tick_s) is not None:
            return
        quarter = seen[-SUBSTEPS // 4 :]
        self.sensors.power_w = math.fsum(quarter) / len(quarter)
        self.sensors.power_avg_w = math.fsum(self._second) / len(self._second)
        energy_j = self.sensors.energy_j + math.fsum(seen) * step_s
        for fault in self.faults:
            if fault.kind in ("reset", "backwards") and fault.active(self.tick_s) and fault not in self._fired:
                self._fired.add(fault)
                energy_j = 0.0 if fault.kind == "reset" else max(0.0, energy_j - fault.value)
        self.sensors.energy_j = math.floor(energy_j * 1e3 + 0.5) * 1e-3

    def true_between(self, start_s: float, end_s: float) -> float:
        """Return the true joules between two moments that have been integrated, in the last hour."""
        return self._true_at(end_s) - self._true_at(start_s)

    def _true_at(self, t_s: float) -> float:
        history = list(self._history)
        position = bisect.bisect_right(history, t_s, key=lambda point: point[0])
        if position == 0 or position == len(history):
            return history[max(0, position - 1)][1]
        (t0, e0), (t1, e1) = history[position - 1], history[position]
        return e0 + (e1 - e0) * (t_s - t0) / (t1 - t0)
