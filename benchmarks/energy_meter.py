"""Is the meter right with itself, and what does it cost?

A/A: the same work, twice, interleaved A1 A2 A2 A1; the ratio of joules per forward should be 1.
Overhead: steps of about 10 ms with a sampling meter and a window every second around them, against the same steps bare;
an outer meter that does not sample reads the counter at the ends of both.

Run on a machine with an NVIDIA GPU:  python benchmarks/energy_meter.py --out FOLDER
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable

import torch

from thermoe.energy.workload import Cell, MoEStack
from thermoe.results import RunFolder
from thermoe.runtime import environment_fingerprint
from thermoe.telemetry import EnergyMeter


def timed(meter: EnergyMeter, name: str, step: Callable[[], object], repeats: int, min_s: float) -> dict[str, object]:
    """Run steps between two ticks; joules and seconds of one forward."""
    end_s = meter.clock.now_s() + 0.5
    while meter.clock.now_s() < end_s:
        step().time_s()
    with meter.aligned_window(name, min_s=min_s) as window:
        while not window.done:
            window.count(repeats, step())
    r = window.result
    return {
        "name": name,
        "energy_j": r.energy_j / r.tokens,
        "duration_s": r.duration_s / r.tokens,
        "power_w": r.power_w,
        "temp_c": r.temp_end_c,
        "provenance": r.provenance,
        "flags": list(r.flags),
        "energy_rel_sd": r.energy_rel_sd,
    }


def ratio(rows: list[dict[str, object]], first: str, second: str, field: str) -> tuple[float, float]:
    """Return second / first and the half-width of its 95 % interval, from the quads' log ratios."""
    quads = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    logs = []
    for quad in quads:
        mean = {
            arm: statistics.fmean(math.log(row[field]) for row in quad if row["name"] == arm) for arm in (first, second)
        }
        logs.append(mean[second] - mean[first])
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}[len(logs)]
    half = t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(statistics.fmean(logs)), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--quads", type=int, default=4, choices=[2, 3, 4, 5, 6, 8, 10])
    parser.add_argument("--window-s", type=float, default=4.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    run = RunFolder.create(arguments.out)
    run.write_manifest(command="benchmarks/energy_meter.py", environment=environment_fingerprint(), finished=False)
    stack = MoEStack(64, 2048, 1024, layers=8)
    step, repeats, _ = stack.prepare(Cell(tokens=64, active_experts=32, top_k=8))

    with EnergyMeter(sample=False) as outer:
        run.write_manifest(telemetry=outer.describe())
        timed(outer, "warm-up", step, repeats, 6.0)
        null: list[dict[str, object]] = []
        for quad in range(arguments.quads):
            order = ("A1", "A2", "A2", "A1") if quad % 2 == 0 else ("A2", "A1", "A1", "A2")
            for name in order:
                null.append(timed(outer, name, step, repeats, arguments.window_s))
                run.append("null", **null[-1])

        cost: list[dict[str, object]] = []
        for quad in range(arguments.quads):
            order = ("bare", "metered", "metered", "bare") if quad % 2 == 0 else ("metered", "bare", "bare", "metered")
            for name in order:
                if name == "bare":
                    row = timed(outer, name, step, repeats, arguments.window_s)
                else:
                    row = metered(outer, step, repeats, arguments.window_s)
                cost.append(row)
                run.append("overhead", **row)

    value, half = ratio(null, "A1", "A2", "energy_j")
    print(f"A/A joules ratio        {value:.4f} +- {half:.4f}")
    joules, joules_half = ratio(cost, "bare", "metered", "energy_j")
    seconds, seconds_half = ratio(cost, "bare", "metered", "duration_s")
    step_ms = 1e3 * repeats * float(cost[0]["duration_s"])
    print(f"metered / bare, joules  {joules:.4f} +- {joules_half:.4f}")
    print(f"metered / bare, seconds {seconds:.4f} +- {seconds_half:.4f}   (steps of {step_ms:.1f} ms)")
    run.write_manifest(
        finished=True,
        aa_ratio={"value": value, "half_width_95": half},
        overhead={
            "joules": {"value": joules, "half_width_95": joules_half},
            "seconds": {"value": seconds, "half_width_95": seconds_half},
            "step_ms": step_ms,
        },
    )


def metered(outer: EnergyMeter, step: Callable[[], object], repeats: int, min_s: float) -> dict[str, object]:
    """The same work with a sampling meter and a sampled window around every hundred steps."""
    with EnergyMeter(period_s=1.0) as inner:
        state = {"steps": 0, "window": None}

        def wrapped() -> object:
            if state["steps"] % 100 == 0:
                close()
                state["window"] = inner.window("steps", edges="sampled")
                state["window"].__enter__()
            state["steps"] += 1
            mark = step()
            state["window"].count(repeats, mark)
            return mark

        def close() -> None:
            if state["window"] is not None:
                state["window"].__exit__(None, None, None)
                state["window"] = None

        try:
            return timed(outer, "metered", wrapped, repeats, min_s)
        finally:
            close()


if __name__ == "__main__":
    main()
