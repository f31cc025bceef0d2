"""Joules in the logs of any Hugging Face Trainer: ``Trainer(..., callbacks=[EnergyCallback()])``.

The energy counter is read at log events and when a checkpoint is written, at most once per ``min_window_s``, and never
between the steps; a background thread adds one sample a second. Successive windows share their edge, so that no joule
falls between them and the logged windows add up to the total. Nothing here raises into the training.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback

from thermoe.errors import ConfigError
from thermoe.results import weakest_provenance
from thermoe.telemetry.arguments import checked_period
from thermoe.telemetry.evaluate import MIN_TICKS, Edge
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.open_window import SUSPEND_S, SUSPENDED
from thermoe.telemetry.source import SOURCES, Source, checked_source
from thermoe.telemetry.status import snapshot_of
from thermoe.telemetry.totals import EnergyTotals, labelled
from thermoe.telemetry.window import EnergyWindow

_LOG = logging.getLogger("thermoe.energy_callback")
#: Names in the logs, and the reading each comes from.
_STATE_NAMES = {
    "thermal/gpu_temp_c": "temp_c",
    "thermal/memory_temp_c": "memory_temp_c",
    "memory/used_bytes": "memory_used_bytes",
}
COUNTING_OPTION = "TrainingArguments(include_num_input_tokens_seen='non_padding')"
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edge:
    """The moment a window begins: the readings, and what had been counted by then."""

    readings: Mapping[str, Edge]
    t_s: float
    wall_s: float
    asleep_s: float
    tokens: float
    totals: EnergyTotals
    evaluated: bool = False
    flags: frozenset[str] = frozenset()


def _never_raises(event: F) -> F:
    """Turn whatever goes wrong in an event into one warning, and measure no further."""

    @functools.wraps(event)
    def guarded(self: EnergyCallback, *args: Any, **kwargs: Any) -> Any:
        try:
            return event(self, *args, **kwargs)
        except Exception as error:  # the training must go on whatever a sensor, a driver or this file does
            self._stop(f"energy is no longer logged: {type(error).__name__}: {error}")
            return None

    return guarded  # type: ignore[return-value]


class EnergyCallback(TrainerCallback, ExportableState):
    """Adds energy, power, temperature and memory to the logs of a Trainer, for whatever ``report_to`` names.

    Logged per window (the time since the last logged window): ``energy/energy_j``, ``energy/j_per_token``,
    ``energy/power_w``, ``energy/window_s``, ``energy/energy_rel_sd``, ``thermal/gpu_temp_c``,
    ``thermal/memory_temp_c``, ``memory/used_bytes``; for the training so far ``energy/total_j`` and
    ``energy/total_j_per_token``, or ``energy/total_partial_j`` once some part of it could not be measured. What was not
    measured is left out. A name stands for a measured number; any other carries its label in front, as in
    ``simulated/energy/energy_j``.

    Joules are gross and those of the GPU boards of this host. Tokens are the Trainer's own count, so joules per token
    need ``include_num_input_tokens_seen``. A window with an evaluation in it has no joules per token.

    Args:
        source: a telemetry source's name, or an open source.
        devices: what to measure; by default the boards the Trainer uses.
        min_window_s: shortest window in seconds; logs that follow each other faster share one.
        period_s: time between two background samples, in seconds.

    Raises:
        ConfigError: a number is out of range.
        UnknownNameError: no source has that name.
    """

    def __init__(
        self, source: str | Source = "auto", devices: Any = None, *, min_window_s: float = 5.0, period_s: float = 1.0
    ) -> None:
        if (
            isinstance(min_window_s, bool)
            or not isinstance(min_window_s, (int, float))
            or not 1 <= min_window_s <= 3600
        ):
            raise ConfigError(
                f"min_window_s={min_window_s!r} is not a length a window can have",
                where="EnergyCallback(min_window_s=...)",
                accepted="a number of seconds from 1 to 3600",
                fix="leave it at 5.0; a window of 1 s has an uncertainty of 4%, one of 5 s of 1%",
            )
        self.source, self.devices = checked_source(source, where="EnergyCallback(source=...)"), devices
        self.min_window_s = float(min_window_s)
        self.period_s = checked_period(period_s, allow_fast=False)
        self.totals = EnergyTotals()
        self._meter: EnergyMeter | None = None
        self._trainer_state: Any = None
        self._counts_tokens = False
        self._per_token = False
        self._evaluated = False
        self._open: _Edge | None = None
        self._before: _Edge | None = None
        self._said: set[str] = set()

    # -- events of the Trainer ----------------------------------------------------------------------------------------

    @_never_raises
    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step in front of the reporting callbacks, which would otherwise report before the joules are there."""
        self._go_first()

    @_never_raises
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the totals of a resumed training, open the meter, and read the first edge."""
        self._go_first()
        self._stop()
        self._trainer_state = state
        self.totals = self._resumed_totals(state)
        if isinstance(state.stateful_callbacks, dict):
            # The Trainer's next save asks for this entry, and a checkpoint made without this callback has none.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if not state.is_local_process_zero:  # one reader per board: the first process of each host
            return
        meter = self._opened_meter(args)
        gpus = [device for device in meter.devices if device.kind == "gpu"]
        energy = meter.describe()["energy_j"]
        if energy["provenance"] is None:
            self._say(f"energy is not measured ({energy['reason']}); `thermoe doctor` tells what would change that")
            if not gpus:
                meter.close()
                return
        self._meter = meter
        self._settle_tokens(args, len(gpus))
        self._open, self._before, self._evaluated = self._read_edge(), None, False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember that the window holds an evaluation; nothing is read."""
        self._evaluated = True

    @_never_raises
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Close the window if it is long enough, and add its numbers to ``logs``."""
        if self._meter is None or logs is None:
            return
        last = "train_loss" in logs  # only the summary at the end has it
        window = self._advance(last=last)
        values: dict[str, float] = {}
        if window is not None and self._open is not None:
            values |= self._window_values(window) | self._state_values(self._open)
        if window is not None or last:
            values |= self._total_values()
        logs.update(values)
        history = state.log_history
        if values and history and history[-1].get("step") == state.global_step:
            history[-1].update(values)

    @_never_raises
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the meter; the totals stay in :attr:`totals`."""
        self._stop()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the arguments, and the totals up to this moment."""
        totals = self.totals
        try:
            totals = self._totals_now()
        except Exception as error:  # a checkpoint must be written whatever a sensor does
            self._stop(f"energy is no longer logged: {type(error).__name__}: {error}")
        source = self.source if isinstance(self.source, str) else getattr(self.source, "name", "auto")
        plain = isinstance(self.devices, (str, int)) or (
            isinstance(self.devices, (list, tuple)) and all(isinstance(item, (str, int)) for item in self.devices)
        )
        return {
            "args": {
                "source": source if source in ("auto", "off") or source in SOURCES else "auto",
                "devices": self.devices if plain else None,
                "min_window_s": self.min_window_s,
                "period_s": self.period_s,
            },
            "attributes": {"saved_totals": asdict(totals)},
        }

    # -- windows ------------------------------------------------------------------------------------------------------

    def _read_edge(self) -> _Edge:
        assert self._meter is not None
        flags = self._meter.wait_for_device()
        clock = self._meter.clock
        readings = self._meter.direct_edges()
        return _Edge(
            readings=readings,
            t_s=max((edge.t_s for edge in readings.values()), default=clock.now_s()),
            wall_s=clock.wall_s(),
            asleep_s=(clock.boottime_s() or clock.now_s()) - clock.now_s(),
            tokens=float(self._trainer_state.num_input_tokens_seen) if self._counts_tokens else 0.0,
            totals=self.totals.copy(),
            evaluated=self._evaluated,
            flags=frozenset(flags),
        )

    def _least_s(self) -> float:
        """Return the length below which a window has no joule figure, in seconds."""
        assert self._meter is not None
        return MIN_TICKS * max((device.counter_period_s for device in self._meter.devices), default=0.1)

    def _advance(self, *, last: bool) -> EnergyWindow | None:
        """Close the window under way and begin the next; ``None`` when it is too short to close yet."""
        assert self._meter is not None and self._open is not None
        ran_s = self._meter.clock.now_s() - self._open.t_s
        if ran_s >= (self._least_s() if last or self._evaluated else self.min_window_s):
            edge = self._read_edge()
            window = self._measure(self._open, edge, self.totals)
            if window.energy_j is None:  # the fault may lie in this edge; the next window begins with one of its own
                edge = self._read_edge()
            self._before, self._open, self._evaluated = self._open, replace(edge, totals=self.totals.copy()), False
            self._mention(window)
            return window
        if last:
            self.totals = self._totals_now()
            if self.totals.measured_s == 0:
                self._say(f"the training was too short to be measured ({ran_s:.2f} s < {self._least_s():.1f} s)")
        return None

    def _measure(self, start: _Edge, end: _Edge, totals: EnergyTotals) -> EnergyWindow:
        """Return the window between two edges and add it to ``totals``."""
        assert self._meter is not None
        tokens = max(0.0, end.tokens - start.tokens)
        window = self._meter.close_window(
            "training",
            edges="direct",
            started=start.readings,
            ended=end.readings,
            duration_s=end.t_s - start.t_s,
            started_at=start.wall_s,
            tokens=tokens if self._per_token and not end.evaluated else None,
            flags=start.flags | end.flags,
            reason=SUSPENDED if end.asleep_s - start.asleep_s > SUSPEND_S else None,
        )
        totals.add(window, tokens)
        return window

    def _totals_now(self) -> EnergyTotals:
        """Return the totals up to now without closing the window.

        What has run since the last edge may be too short for a figure of its own; it is then measured together with
        the window before it, from that window's start.
        """
        if self._meter is None or self._open is None:
            return self.totals
        now = self._read_edge()
        short = now.t_s - self._open.t_s < self._least_s()
        start = self._before if short and self._before is not None else self._open
        totals = start.totals.copy()
        self._measure(start, now, totals)
        return totals

    # -- what is logged -----------------------------------------------------------------------------------------------

    def _window_values(self, window: EnergyWindow) -> dict[str, float]:
        if window.energy_j is None:
            return {}
        found = {
            "energy/energy_j": window.energy_j,
            "energy/j_per_token": window.j_per_token,
            "energy/power_w": window.power_w,
            "energy/window_s": window.duration_s,
            "energy/energy_rel_sd": window.energy_rel_sd,
            "energy/flagged": 1.0 if window.status == "flagged" else None,
        }
        return labelled(found, window.provenance)

    def _total_values(self) -> dict[str, float]:
        totals = self.totals
        if totals.provenance is None:
            return {}
        if totals.partial:
            return labelled({"energy/total_partial_j": totals.energy_j}, totals.provenance)
        per_token = totals.energy_j / totals.tokens if self._per_token and totals.tokens > 0 else None
        found = {"energy/total_j": totals.energy_j, "energy/total_j_per_token": per_token}
        return labelled(found, totals.provenance)

    def _state_values(self, edge: _Edge) -> dict[str, float]:
        """Return temperatures and memory at an edge: the hottest board, the memory of all."""
        assert self._meter is not None
        devices = [device for device in self._meter.devices if device.kind == "gpu" and device.uuid in edge.readings]
        samples = [edge.readings[device.uuid].sample for device in devices]
        now = snapshot_of(devices, samples, edge.t_s)
        found: dict[str, float] = {}
        for name, metric in _STATE_NAMES.items():
            label = weakest_provenance([sample.provenance.get(metric) for sample in samples])
            found |= labelled({name: now[metric]}, label)
        return found

    # -- beginning and ending -----------------------------------------------------------------------------------------

    def _resumed_totals(self, state: Any) -> EnergyTotals:
        """Return the totals the checkpoint holds; a training that starts at step 0 starts at 0."""
        if not state.global_step:
            return EnergyTotals()
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        kept = kept[-1] if isinstance(kept, list) and kept else kept
        saved = kept.get("attributes", {}).get("saved_totals") if isinstance(kept, Mapping) else None
        totals = EnergyTotals.from_state(saved) if isinstance(saved, Mapping) else EnergyTotals()
        if not totals.measured_s:
            totals.note_gap(f"the {state.global_step} steps before this resume were not measured")
        return totals

    def _opened_meter(self, args: Any) -> EnergyMeter:
        refused: ConfigError | None = None
        for devices in self._candidates(args):
            try:
                return EnergyMeter(self.source, devices=devices, period_s=self.period_s).open()
            except ConfigError as error:  # a slice has another identifier, a launcher may hide the other boards
                refused = error
        raise refused or RuntimeError("no device to measure")

    def _candidates(self, args: Any) -> list[Any]:
        """Return what may be measured, best first: the Trainer's own boards by UUID, by index, else all visible."""
        if self.devices is not None or self.source not in ("auto", "nvml"):
            return [self.devices]
        if args.device.type != "cuda":
            return ["cpu"]
        import torch

        first = (args.device.index or 0) if args.world_size == 1 else 0
        places = [first + i for i in range(self._boards_used(args)) if first + i < torch.cuda.device_count()]
        by_uuid = [torch.cuda.get_device_properties(place) for place in places]
        return [by_uuid, places, None] if all(hasattr(entry, "uuid") for entry in by_uuid) else [places, None]

    @staticmethod
    def _boards_used(args: Any) -> int:
        """Return how many boards of this host the training uses."""
        if args.world_size == 1:
            return max(1, args.n_gpu)
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _settle_tokens(self, args: Any, gpus: int) -> None:
        """Decide whether joules and tokens are of the same work, and say once why not."""
        self._counts_tokens = args.include_num_input_tokens_seen not in ("no", False, None)
        used = self._boards_used(args)
        here = args.world_size == 1 or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == args.world_size
        covered = here and (not gpus or self.devices is not None or gpus >= used)
        self._per_token = self._counts_tokens and covered
        if not covered:
            self._say("only a part of the boards in this training can be read from here; joules per token are left out")
            self.totals.note_gap("boards of other processes were not read")
        elif not self._counts_tokens:
            self._say(f"joules per token are left out: tokens are not counted; set {COUNTING_OPTION}")

    def _go_first(self) -> None:
        """Move to the front of the handler's list; the handler is whoever called this event."""
        frame = sys._getframe(1).f_back
        while frame is not None:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                # A new list: the handler is walking the old one.
                handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
                return
            frame = frame.f_back

    def _mention(self, window: EnergyWindow) -> None:
        if window.reason is not None and window.energy_j is None:
            self._say(f"a window has no joules: {window.reason}")
        elif window.reason is not None:
            self._say(f"joules are logged with a caveat: {window.reason}")

    def _say(self, message: str) -> None:
        """Warn once per message."""
        if message not in self._said:
            self._said.add(message)
            _LOG.warning("%s", message)

    def _stop(self, message: str | None = None) -> None:
        """Close the meter, and say why when it is not the end of the training."""
        if message is not None:
            self._say(message)
        meter, self._meter = self._meter, None
        self._open = self._before = None
        if meter is None:
            return
        try:
            meter.close()
        except Exception as error:  # closing is the last thing done with it
            _LOG.warning("closing the telemetry failed: %s: %s", type(error).__name__, error)
