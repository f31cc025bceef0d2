"""Calibration: measure what this machine's layers cost, fit the cost model, hold some cells out, say how good it is.

Forced routing varies tokens, experts per token and opened experts apart from each other; the cells come in random order
with the same anchor cell in between, whose scatter shows drift. Two cells leave the device waiting for a part of the
time, so that static power can be told from work. The fit is refused, with the reason, when the device was shared or
held down by heat, or when the anchors scatter.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from thermoe import __version__
from thermoe.energy.cost_model import PRIOR_SD, UNITS, CostModel
from thermoe.energy.fit import Fit, as_dict, fit_terms, relative_error
from thermoe.energy.work import StepWork
from thermoe.energy.workload import Cell, Workload
from thermoe.errors import MachineError
from thermoe.results import Provenance, weakest_provenance
from thermoe.telemetry.meter import EnergyMeter

#: Design limits: beyond these the fit is refused, poor, or good.
ANCHOR_SCATTER_LIMIT = 0.05
ANCHOR_DRIFT_LIMIT = 0.02
MAPE_ACCEPTED = 0.15
MAPE_GOOD = 0.10
FEWEST_CELLS = 10

NET_UNITS = {
    "static_power_w": "W",
    "net_open_j_per_byte": "J/byte",
    "net_pair_j_per_flop": "J/FLOP",
    "net_token_j": "J per token and MoE layer",
}
#: Static power from idle readings upward; the others from device specifications, wide.
NET_PRIORS = {
    "static_power_w": (110.0, 100.0),
    "net_open_j_per_byte": (40e-12, 40e-12),
    "net_pair_j_per_flop": (0.9e-12, 0.6e-12),
    "net_token_j": (0.0, 1e-3),
}


@dataclass(frozen=True, slots=True)
class CellResult:
    """What one window measured.

    Args:
        cell: the operating point.
        work: counts of one forward.
        energy_j: joules of one forward, or ``None`` with the reason.
        duration_s: seconds of one forward.
        energy_rel_sd: relative standard deviation of the window.
        power_w: mean power.
        temp_c: die temperature at the end.
        flags: what was odd about the window.
        reason: why there is no number.
        provenance: of ``energy_j``.
    """

    cell: Cell
    work: StepWork
    energy_j: float | None
    duration_s: float
    energy_rel_sd: float | None
    power_w: float | None
    temp_c: float | None
    flags: tuple[str, ...]
    reason: str | None
    provenance: Provenance | None

    @property
    def regressors(self) -> dict[str, float]:
        """Counts for the gross fit and, under other names, for the net one."""
        gross = self.work.regressors
        return {
            **gross,
            "static_power_w": self.duration_s,
            "net_open_j_per_byte": gross["open_j_per_byte"],
            "net_pair_j_per_flop": gross["pair_j_per_flop"],
            "net_token_j": gross["token_j"],
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the row that the profile keeps."""
        return {**asdict(self), "flags": list(self.flags)}


@dataclass(frozen=True, slots=True)
class Calibration:
    """The outcome.

    Args:
        model: the fitted cost model, or the prior when nothing could be measured.
        gross, net: the two fits on all cells; ``None`` for a prior.
        held_out_mape_frac: mean absolute relative error on cells that the fit did not see.
        anchor_drift_frac: last anchor against the first.
        anchor_scatter_frac: standard deviation of the anchors over their mean.
        quality: "good", "fair", "poor" or "prior".
        idle_before_w, idle_after_w: idle power of the board, context alive.
        cells: every window.
        reason: why it is a prior.
    """

    model: CostModel
    gross: Fit | None
    net: Fit | None
    held_out_mape_frac: float | None
    anchor_drift_frac: float | None
    anchor_scatter_frac: float | None
    quality: str
    idle_before_w: float | None
    idle_after_w: float | None
    cells: tuple[CellResult, ...]
    reason: str | None = None

    @classmethod
    def of_prior(cls, reason: str, device_name: str | None = None) -> Calibration:
        """Return what stands in for a calibration where energy is not measured."""
        return cls(CostModel.prior(device_name), None, None, None, None, None, "prior", None, None, (), reason)

    def as_profile(self) -> dict[str, Any]:
        """Return the contents of a profile file, without its key."""
        labels = [cell.provenance for cell in self.cells if cell.energy_j is not None]
        return {
            "basis": self.model.basis,
            "source_provenance": weakest_provenance(labels) or "estimated",
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {"thermoe": __version__, "torch": version("torch")},
            "terms": as_dict(self.model.terms),
            "covariance": self.gross.covariance if self.gross else None,
            "net_terms": as_dict(self.net.terms) if self.net else None,
            "validity": {name: list(limits) for name, limits in self.model.validity.items()},
            "fit": {
                "cells": len(labels),
                "mape_frac": self.gross.mape_frac if self.gross else None,
                "held_out_mape_frac": self.held_out_mape_frac,
                "anchor_drift_frac": self.anchor_drift_frac,
                "anchor_scatter_frac": self.anchor_scatter_frac,
                "quality": self.quality,
                "reason": self.reason,
            },
            "idle": {"before_w": self.idle_before_w, "after_w": self.idle_after_w},
            "cells": [cell.as_dict() for cell in self.cells],
        }


def plan_cells(num_experts: int, *, seed: int = 0, prefill_tokens: int = 8192) -> list[Cell]:
    """Return the cells of a calibration in the order to run them: fit and duty cells shuffled, anchors in between."""
    e, k = num_experts, min(8, num_experts)
    points = {
        (1, k, k),
        (16, k, k),
        (16, max(k, e // 4), k),
        (16, max(k, e // 2), k),
        (16, e, k),
        (16, e, max(1, k // 2)),
        (16, max(1, k // 2, e // 4), max(1, k // 2)),
        (64, max(k, e // 8), k),
        (64, max(k, e // 4), k),
        (64, max(k, e // 2), k),
        (64, e, k),
        (64, e, max(1, k // 4)),
        (256, max(k, e // 4), k),
        (256, e, k),
        (256, e, max(1, k // 4)),
        (2048, e, k),
        (prefill_tokens, e, k),
        (prefill_tokens, e, max(1, k // 2)),
        (prefill_tokens, e, 1),
        (prefill_tokens, max(k, e // 4), k),
    }
    cells = [Cell(tokens=t, active_experts=u, top_k=n) for t, u, n in sorted(points)]
    cells += [
        Cell(tokens=16, active_experts=e, top_k=k, duty=0.5, role="duty"),
        Cell(tokens=prefill_tokens, active_experts=e, top_k=k, duty=0.5, role="duty"),
    ]
    random.Random(seed).shuffle(cells)
    anchor = Cell(tokens=64, active_experts=max(k, e // 2), top_k=k, role="anchor")
    ordered: list[Cell] = []
    for number, cell in enumerate(cells):
        if number % 6 == 0:
            ordered.append(anchor)
        ordered.append(cell)
    return [*ordered, anchor]


def measure_cell(meter: EnergyMeter, workload: Workload, cell: Cell, *, settle_s: float, window_s: float) -> CellResult:
    """Run ``cell`` for ``settle_s`` unmeasured, then for ``window_s`` between two ticks of the counter."""
    step, repeats, work = workload.prepare(cell)
    end_s = meter.clock.now_s() + settle_s
    while meter.clock.now_s() < end_s:
        mark = step()
        if mark is not None:
            mark.time_s()  # type: ignore[attr-defined]
    with meter.aligned_window(f"t{cell.tokens} u{cell.active_experts} k{cell.top_k}", min_s=window_s) as window:
        while not window.done:
            mark = step()
            window.count(repeats, mark)  # type: ignore[arg-type]
    result = window.result
    forwards = result.tokens or 0.0
    measured = result.energy_j is not None and forwards > 0
    return CellResult(
        cell=cell,
        work=work,
        energy_j=result.energy_j / forwards if measured and result.energy_j is not None else None,
        duration_s=result.duration_s / forwards if forwards else result.duration_s,
        energy_rel_sd=result.energy_rel_sd,
        power_w=result.power_w,
        temp_c=result.temp_end_c,
        flags=result.flags,
        reason=result.reason,
        provenance=result.provenance if measured else None,
    )


def calibrate(
    meter: EnergyMeter,
    workload: Workload,
    cells: Sequence[Cell],
    *,
    settle_s: float = 0.3,
    window_s: float = 2.5,
    warmup_s: float = 8.0,
    idle_s: float = 4.0,
    held_out_frac: float = 0.2,
    seed: int = 0,
    on_cell: Callable[[int, CellResult], None] | None = None,
) -> Calibration:
    """Measure ``cells`` and fit the cost model.

    Args:
        meter: an open meter.
        workload: what to run.
        cells: from `plan_cells`.
        settle_s: unmeasured time at the start of each cell, in seconds.
        window_s: measured time per cell.
        warmup_s: work before anything is measured.
        idle_s: idle reference before and after.
        held_out_frac: share of the fit cells that judge the fit.
        seed: which cells are held out.
        on_cell: called after each window, for a progress bar.

    Returns:
        A calibration; its model is the prior, with the reason, when energy is not measured here.

    Raises:
        MachineError: the device was shared or throttled, the anchors scatter, or too few windows are valid.
    """
    described = meter.describe()["energy_j"]
    if described["provenance"] is None:
        return Calibration.of_prior(str(described["reason"]))
    warm = cells[0]
    measure_cell(meter, workload, warm, settle_s=max(0.0, warmup_s - window_s), window_s=min(window_s, 1.0))
    before = meter.measure_idle(idle_s)
    results: list[CellResult] = []
    for number, cell in enumerate(cells):
        results.append(measure_cell(meter, workload, cell, settle_s=settle_s, window_s=window_s))
        if on_cell is not None:
            on_cell(number + 1, results[-1])
    after = meter.measure_idle(idle_s)
    gpu = next((device.name for device in meter.devices if device.kind == "gpu"), None)
    return _fitted(results, before.power_w, after.power_w, held_out_frac, seed, CostModel.prior(gpu))


def _refuse(what: str, fix: str, accepted: str) -> MachineError:
    return MachineError(what, where="thermoe calibrate", accepted=accepted, fix=fix)


def _check(results: Sequence[CellResult]) -> tuple[float, float]:
    """Return (drift, scatter) of the anchors, or refuse."""
    for flag, what, fix in (
        ("contaminated", "another process used the device", "stop other work on this device and calibrate again"),
        ("shared_device", "the device is a slice of a shared board", "calibrate on a whole board"),
        (
            "throttled",
            "the clocks were held down by heat or the power supply",
            "let the device cool, then calibrate again",
        ),
    ):
        hit = [r for r in results if flag in r.flags]
        if hit:
            raise _refuse(
                f"{what} during {len(hit)} of {len(results)} windows", fix, "a device of one's own, unthrottled"
            )
    valid = [r for r in results if r.energy_j is not None]
    if len(valid) < FEWEST_CELLS:
        reasons = sorted({str(r.reason) for r in results if r.energy_j is None})
        raise _refuse(
            f"only {len(valid)} of {len(results)} windows gave a number ({'; '.join(reasons)})",
            "see what is measured here with: thermoe doctor",
            f"at least {FEWEST_CELLS} valid windows",
        )
    anchors = np.array([r.energy_j for r in valid if r.cell.role == "anchor"], dtype=np.float64)
    if len(anchors) < 2:
        raise _refuse("fewer than two anchor windows are valid", "calibrate again", "two or more anchors")
    drift = float(anchors[-1] / anchors[0] - 1)
    scatter = float(anchors.std(ddof=1) / anchors.mean())
    if scatter > ANCHOR_SCATTER_LIMIT:
        raise _refuse(
            f"the same work scattered by {100 * scatter:.1f} % between windows",
            "check for other load and for temperature, then calibrate again",
            f"at most {100 * ANCHOR_SCATTER_LIMIT:.0f} %",
        )
    return drift, scatter


def _fitted(
    results: Sequence[CellResult],
    idle_before_w: float | None,
    idle_after_w: float | None,
    held_out: float,
    seed: int,
    prior: CostModel,
) -> Calibration:
    drift, scatter = _check(results)
    valid = [r for r in results if r.energy_j is not None]
    gross_cells = [r for r in valid if r.cell.duty == 1.0]
    points = [i for i, r in enumerate(gross_cells) if r.cell.role == "fit"]
    random.Random(seed).shuffle(points)
    judged = set(points[: max(1, round(held_out * len(points)))])
    rest = [r for i, r in enumerate(gross_cells) if i not in judged]
    unseen = [gross_cells[i] for i in sorted(judged)]
    rel_sd = max(0.01, scatter)
    trial = _gross_fit(rest, rel_sd, prior)
    mape = relative_error(trial.predict([r.regressors for r in unseen]), [r.energy_j or 0.0 for r in unseen])
    gross = _gross_fit(gross_cells, rel_sd, prior)
    net = fit_terms(
        [r.regressors for r in valid],
        [r.energy_j or 0.0 for r in valid],
        units=NET_UNITS,
        priors=NET_PRIORS,
        rel_sd=rel_sd,
    )
    quality = "good" if mape <= MAPE_GOOD else "fair" if mape <= MAPE_ACCEPTED else "poor"
    if abs(drift) > ANCHOR_DRIFT_LIMIT:
        quality = "poor"
    label = weakest_provenance([r.provenance for r in valid])
    model = CostModel(
        terms=gross.terms,
        basis="calibrated",
        reference="this device, by calibration",
        provenance="simulated" if label == "simulated" else "estimated",
        validity={
            "tokens": _range(r.cell.tokens for r in gross_cells),
            "active_experts": _range(r.cell.active_experts for r in gross_cells),
            "power_w": _range(r.power_w for r in gross_cells if r.power_w is not None),
            "temp_c": _range(r.temp_c for r in gross_cells if r.temp_c is not None),
        },
    )
    return Calibration(
        model, gross, net, mape, drift, scatter, quality, idle_before_w, idle_after_w, tuple(results), None
    )


def _gross_fit(cells: Sequence[CellResult], rel_sd: float, prior: CostModel) -> Fit:
    return fit_terms(
        [r.regressors for r in cells],
        [r.energy_j or 0.0 for r in cells],
        units=UNITS,
        priors={name: (prior.term(name), PRIOR_SD[name]) for name in UNITS},
        rel_sd=rel_sd,
    )


def _range(values: Any) -> tuple[float, float]:
    listed = [float(value) for value in values]
    return (min(listed), max(listed)) if listed else (0.0, 0.0)
