"""A temperature limit is held by a slow outer loop that lowers a power cap; it moves the total, never one expert.

The die follows the heat sink, which takes about a minute, so the loop acts at most every 10 s. With the room
e = (limit - margin) - T its cap moves by k_p de + k_i h e, where k_p = 1 / R, k_i = k_p / tau and R is the thermal
resistance against air of 30 C, a slow mean because the sink lags: the closed loop is then about as fast as the sink.
The integral releases three times more slowly than it tightens. The margin takes the overshoot of a step of the air.
"""

from __future__ import annotations

from typing import Any

PERIOD_S = 10.0
SINK_TAU_S = 60.0
AIR_C = 30.0
#: Kelvin below the aim at which the loop engages, and further below which it lets go.
ENGAGE_K, RELEASE_K = 3.0, 5.0
RELEASE_SLOWNESS = 3.0
RESISTANCE_RATE = 0.2
#: The cap stays within these parts of the power drawn, so that it does not wind up where the power does not follow.
CAP_LOW, CAP_HIGH = 0.8, 1.1
#: A cap above this part of the power drawn holds nothing.
IDLE_CAP = 1.05


class HeatLoop:
    """Turns temperature readings into a power cap.

    Args:
        limit_c: the limit.
        margin_c: how far below it the loop aims.
    """

    _FIELDS = (
        *("limit_c", "margin_c", "cap_w", "kelvin_per_watt", "acted_s", "last_room_k", "sum_c", "count"),
        *("seen_s", "seen_c"),
    )

    def __init__(self, limit_c: float, margin_c: float) -> None:
        self.limit_c, self.margin_c = limit_c, margin_c
        self.cap_w: float | None = None
        self.kelvin_per_watt: float | None = None
        self.acted_s: float | None = None
        self.last_room_k = 0.0
        self.sum_c, self.count = 0.0, 0
        self.seen_s: float | None = None
        self.seen_c: float | None = None

    def update(self, t_s: float, temp_c: float, power_w: float) -> None:
        """Take one reading; every 10 s the loop acts on their mean, as sensors tell whole degrees."""
        if self.seen_s is not None and t_s <= self.seen_s:
            return
        self.seen_s, self.seen_c = t_s, temp_c
        self.sum_c, self.count = self.sum_c + temp_c, self.count + 1
        if self.acted_s is not None and t_s - self.acted_s < PERIOD_S - 1e-6:
            return
        passed_s = PERIOD_S if self.acted_s is None else min(t_s - self.acted_s, 3 * PERIOD_S)
        room_k = self.limit_c - self.margin_c - self.sum_c / self.count
        self.acted_s, self.sum_c, self.count = t_s, 0.0, 0
        now = max(temp_c - AIR_C, 5.0) / power_w
        known = now if self.kelvin_per_watt is None else self.kelvin_per_watt
        self.kelvin_per_watt = known + RESISTANCE_RATE * (now - known)
        if self.cap_w is None:
            if room_k < ENGAGE_K:
                self.cap_w = max(CAP_LOW * power_w, power_w + room_k / self.kelvin_per_watt)
        elif room_k > RELEASE_K and self.cap_w > IDLE_CAP * power_w:
            self.cap_w = None
        else:
            pull = room_k / (RELEASE_SLOWNESS if room_k > 0 else 1.0)
            move_k = room_k - self.last_room_k + pull * passed_s / SINK_TAU_S
            cap_w = self.cap_w + move_k / self.kelvin_per_watt
            self.cap_w = min(CAP_HIGH * power_w, max(CAP_LOW * power_w, cap_w))
        self.last_room_k = room_k

    def blind(self, t_s: float) -> bool:
        """Return whether the temperature has been missing for three of the loop's periods."""
        return self.seen_s is not None and t_s - self.seen_s >= 3 * PERIOD_S

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {name: getattr(self, name) for name in self._FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for name in self._FIELDS:
            setattr(self, name, state[name])
