"""What ``thermoe doctor`` does beyond a diagnosis: asks PyTorch, puts a short load on the GPU, watches live."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from thermoe.errors import ConfigError, UnknownNameError
from thermoe.results import Provenance
from thermoe.telemetry.clock import SYSTEM_CLOCK, Clock
from thermoe.telemetry.diagnosis import REQUIREMENTS
from thermoe.telemetry.doctor import diagnose
from thermoe.telemetry.doctor_text import plain_value, print_diagnosis
from thermoe.telemetry.gate import GatedReader
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.source import Sample, Source, open_source

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Side of the square matrices of the load, and how long the power is let rise before the window.
MATRIX_SIDE, SETTLE_S = 8192, 2.0
#: A load draws at least this much more than rest, else the sensor does not see the device.
LEAST_RISE_W = 5.0
WATCHED = ("power_w", "temp_c", "memory_temp_c", "memory_used_bytes", "sm_clock_hz", "utilization_frac")
WATCHED_ON_HOST = ("host_memory_used_bytes", "utilization_frac")


def run_doctor(
    console: Console,
    *,
    source: str | Source = "auto",
    as_json: bool = False,
    with_torch: bool = False,
    load_s: float | None = None,
    require: str | None = None,
) -> str | None:
    """Diagnose, print, and return why ``require`` is not met; ``None`` when it is, or nothing was required.

    Raises:
        UnknownNameError: ``require`` or ``source`` is no known name.
    """
    if require is not None and require not in REQUIREMENTS:
        raise UnknownNameError.of("requirement", require, REQUIREMENTS, where="thermoe doctor --require")
    found = diagnose(source, torch_devices=torch_devices() if with_torch else ())
    load = None if load_s is None else run_load(load_s, source)
    if as_json:
        body = {**found.as_dict(), "load": None if load is None else load.as_dict()}
        console.file.write(json.dumps(body, indent=1, allow_nan=False) + "\n")
    else:
        print_diagnosis(console, found)
        if load is not None:
            console.print(str(load), highlight=False, markup=False)
    return None if require is None else found.lacks(require)


def torch_devices() -> list[dict[str, Any]]:
    """Return the CUDA devices as PyTorch numbers them, with ``index``, ``name`` and ``uuid``; may start CUDA."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = getattr(properties, "uuid", None)
        found.append({"index": index, "name": properties.name, "uuid": None if uuid is None else str(uuid)})
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a short load showed.

    Attributes:
        ran: there was a load.
        reason: why there was none, or what was odd.
        device: what was loaded.
        duration_s: length of the measured span, in seconds.
        idle_power_w: power before it, in watts.
        load_power_w: mean power in it, from the energy counter, in watts.
        power_rises: the load draws visibly more than rest; ``None`` when unknown.
        counter_energy_j: joules by the energy counter.
        integral_energy_j: joules by the integral of sampled power over the same span.
        counter_over_integral: their ratio; within a few percent of 1 on a sound board.
        j_per_matmul: joules of one product of two matrices.
        provenance: what kind of number the counter's joules are.
    """

    ran: bool
    reason: str | None = None
    device: str | None = None
    duration_s: float | None = None
    idle_power_w: float | None = None
    load_power_w: float | None = None
    power_rises: bool | None = None
    counter_energy_j: float | None = None
    integral_energy_j: float | None = None
    counter_over_integral: float | None = None
    j_per_matmul: float | None = None
    provenance: Provenance | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.ran:
            return f"load: none ({self.reason})"
        if self.counter_energy_j is None or self.idle_power_w is None or self.load_power_w is None:
            return f"load: ran on {self.device}, energy not measured ({self.reason})"
        rise = "rises" if self.power_rises else "does NOT rise"
        ratio = self.counter_over_integral
        against = "no power samples to hold it against" if ratio is None else f"counter / integral of power {ratio:.3f}"
        return (
            f"load: {self.device}, {self.duration_s:.1f} s: power {rise} from {self.idle_power_w:.0f} W to "
            f"{self.load_power_w:.0f} W; {self.counter_energy_j:.1f} J by the counter; {against}"
        )


def run_load(seconds: float, source: str | Source = "auto") -> LoadReport:
    """Multiply matrices on the first CUDA device for ``seconds`` and compare what its sensors say."""
    if importlib.util.find_spec("torch") is None:
        return LoadReport(ran=False, reason="PyTorch is not installed")
    import torch

    if not torch.cuda.is_available():
        return LoadReport(ran=False, reason="PyTorch sees no CUDA device")
    device = torch.device("cuda", 0)
    left, right = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)

    def step() -> None:
        torch.matmul(left, right, out=product)
        torch.cuda.synchronize(device)

    properties = torch.cuda.get_device_properties(device)
    try:
        meter = EnergyMeter(source, devices=properties).open()
    except ConfigError:  # inside a slice of a board PyTorch gives the slice's identifier
        meter = EnergyMeter(source, devices=0).open()
    with meter:
        return measure_load(meter, step, seconds, name=properties.name)


def measure_load(meter: EnergyMeter, step: Any, seconds: float, *, name: str) -> LoadReport:
    """Repeat ``step`` for ``seconds`` inside a tick-aligned window of an open ``meter`` and hold counter to power.

    Args:
        meter: measures; its sampler gives the powers that are integrated.
        step: does one piece of work and waits for it.
        seconds: least length of the window.
        name: of the device, for the report.
    """
    clock = meter.clock
    clock.sleep_s(1.0)
    idle_w = meter.snapshot()["power_w"]
    settled_s = clock.now_s() + SETTLE_S
    while clock.now_s() < settled_s:
        step()
    steps = 0
    began_s = clock.now_s()
    with meter.aligned_window("load", min_s=seconds) as window:
        while not window.done:
            step()
            window.count(1.0)
            steps += 1
    ended_s = clock.now_s()
    found = window.result
    integral_j = _integral(meter, began_s, ended_s, found.duration_s)
    counter_j = found.energy_j if found.method == "counter" else None
    rises = None if idle_w is None or found.power_w is None else found.power_w - idle_w > LEAST_RISE_W
    return LoadReport(
        ran=True,
        reason=found.reason,
        device=name,
        duration_s=found.duration_s,
        idle_power_w=idle_w,
        load_power_w=found.power_w,
        power_rises=rises,
        counter_energy_j=counter_j,
        integral_energy_j=integral_j,
        counter_over_integral=counter_j / integral_j if counter_j is not None and integral_j else None,
        j_per_matmul=found.j_per_token,
        provenance=found.provenance,
    )


def _integral(meter: EnergyMeter, began_s: float, ended_s: float, duration_s: float) -> float | None:
    """Return the mean sampled power between two moments times ``duration_s``; ``None`` with fewer than 3 samples."""
    sampler, total_j = meter.sampler, 0.0
    gpus = [device for device in meter.devices if device.kind == "gpu"]
    for device in gpus:
        samples = [] if sampler is None else sampler.between(device.uuid, began_s, ended_s)
        points = [(s.t_s, s.power_avg_w if s.power_avg_w is not None else s.power_w) for s in samples]
        known = [(t_s, power_w) for t_s, power_w in points if power_w is not None]
        if len(known) < 3:
            return None
        area = math.fsum(0.5 * (a + b) * (t1 - t0) for (t0, a), (t1, b) in pairwise(known))
        total_j += area / (known[-1][0] - known[0][0]) * duration_s
    return total_j if gpus else None


def watch(source: str | Source, console: Console, *, count: int | None, as_json: bool) -> None:
    """Show the latest readings once a second, ``count`` times or until Ctrl-C."""
    opened = open_source(source)
    clock: Clock = getattr(opened, "clock", None) or SYSTEM_CLOCK
    reader = GatedReader(opened, clock)
    try:
        if as_json:
            for rows in _readings(reader, clock, count):
                console.file.write(json.dumps({"schema": "thermoe.doctor.watch", "schema_version": 1, **rows}) + "\n")
                console.file.flush()
            return
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            for rows in _readings(reader, clock, count):
                live.update(_watch_table(rows), refresh=True)
    except KeyboardInterrupt:
        return
    finally:
        if isinstance(source, str):
            opened.close()


def _readings(reader: GatedReader, clock: Clock, count: int | None) -> Iterator[dict[str, Any]]:
    before: dict[str, Sample] = {}
    taken = 0
    while count is None or taken < count:
        began_s = clock.now_s()
        devices = []
        for device in reader.source.devices():
            sample = reader.read(device, sorted(reader.source.metrics(device)))
            names = WATCHED if device.kind == "gpu" else WATCHED_ON_HOST
            row: dict[str, Any] = {"uuid": device.uuid, "kind": device.kind, "name": device.name}
            row |= {name: sample.value(name) for name in names}
            row |= {"energy_rate_w": _rate_w(before.get(device.uuid), sample), "label": _label(sample)}
            devices.append(row)
            before[device.uuid] = sample
        yield {"time_s": clock.wall_s(), "devices": devices}
        taken += 1
        if count is None or taken < count:
            clock.sleep_s(max(0.0, 1.0 - (clock.now_s() - began_s)))


def _rate_w(before: Sample | None, now: Sample) -> float | None:
    """Return the mean power since the reading before, by the energy counter of the GPU or of the processor."""
    if before is None or before.counter_epoch != now.counter_epoch or now.t_s <= before.t_s:
        return None
    for metric in ("energy_j", "cpu_energy_j"):
        first, last = before.value(metric), now.value(metric)
        if first is not None and last is not None:
            return (last - first) / (now.t_s - before.t_s)
    return None


def _label(sample: Sample) -> str:
    return "/".join(sorted(set(sample.provenance.values()))) or "not measured"


def _watch_table(rows: dict[str, Any]) -> Table:
    from rich.table import Table

    stamp = time.strftime("%H:%M:%S", time.localtime(rows["time_s"]))
    table = Table(title=f"{stamp}  (Ctrl-C ends)", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("device", "power", "by counter", "temp", "memory temp", "memory", "core clock", "busy", "label"):
        table.add_column(heading)
    for row in rows["devices"]:
        memory = "memory_used_bytes" if row["kind"] == "gpu" else "host_memory_used_bytes"
        order: Sequence[str] = ("temp_c", "memory_temp_c", memory, "sm_clock_hz", "utilization_frac")
        values = [plain_value(name, row.get(name)) for name in order]
        by_counter = plain_value("power_w", row["energy_rate_w"])
        table.add_row(row["name"], plain_value("power_w", row.get("power_w")), by_counter, *values, row["label"])
    return table
