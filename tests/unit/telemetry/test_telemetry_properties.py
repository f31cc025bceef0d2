"""What must hold for any readings: no negative joules, the weakest label, units, nesting in any order, no zeros."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from fake_nvml import FakeNvml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thermoe.results import PROVENANCE_ORDER, weakest_provenance
from thermoe.telemetry.assemble import Closing, assemble
from thermoe.telemetry.clock import VirtualClock
from thermoe.telemetry.evaluate import Edge, Settings, Span, direct_edge, measure
from thermoe.telemetry.meter import EnergyMeter
from thermoe.telemetry.nvml import NvmlSource
from thermoe.telemetry.plant import Board, StepLoad
from thermoe.telemetry.simulated import SimulatedSource
from thermoe.telemetry.source import Device, Sample
from thermoe.telemetry.window import WorkLog, usable_tokens

GPU = Device(uuid="GPU-x", kind="gpu", name="any", index=0)
counters = st.none() | st.floats(0, 1e9)
powers = st.none() | st.floats(0.1, 2000)
labels = st.sampled_from(PROVENANCE_ORDER)


@st.composite
def spans(draw: st.DrawFn, label: st.SearchStrategy = labels) -> Span:
    times = sorted(draw(st.lists(st.floats(0, 100), min_size=2, max_size=9)))
    readings = []
    for t_s in times:
        energy_j, power_w = draw(counters), draw(powers)
        provenance = {m: draw(label) for m, v in (("energy_j", energy_j), ("power_w", power_w)) if v is not None}
        readings.append(
            Sample(
                device_uuid="GPU-x",
                t_s=t_s,
                energy_j=energy_j,
                power_w=power_w,
                provenance=provenance,
                missing={} if energy_j is not None else {"energy_j": "it was silent"},
                lost=draw(st.integers(0, 19)) == 0,
                counter_epoch=draw(st.sampled_from([0, 0, 0, 1])),
                foreign_processes=draw(st.sampled_from([None, 0, 1])),
            )
        )
    return Span(
        device=GPU,
        start=direct_edge(GPU, readings[0]),
        end=direct_edge(GPU, readings[-1]),
        samples=readings[1:-1],
        sampler_period_s=draw(st.sampled_from([None, 1.0])),
    )


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(spans())
def test_joules_are_never_negative_and_missing_ones_have_a_reason(span: Span) -> None:
    found = measure(span, Settings())
    if found.energy_j is None:
        assert found.status == "invalid"
        assert found.reason
        assert found.provenance is None
    else:
        assert found.energy_j > 0
        assert math.isfinite(found.energy_j)
        assert found.status in ("valid", "flagged")
        assert found.provenance in PROVENANCE_ORDER
        assert found.energy_rel_sd >= 0.01
        assert found.method != "power_integral" or found.provenance != "measured"


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(spans(), min_size=1, max_size=4), st.none() | st.floats())
def test_a_total_is_the_sum_with_the_weakest_label_or_nothing(parts: list[Span], tokens: float | None) -> None:
    closing = Closing(name="any", edges="direct", duration_s=5.0, started_at=0.0, tokens=tokens)
    distinct = [
        Span(
            device=Device(uuid=f"GPU-{i}", kind="gpu", name="any", index=i),
            start=part.start,
            end=part.end,
            samples=part.samples,
        )
        for i, part in enumerate(parts)
    ]
    window = assemble(closing, distinct, None, Settings())
    pieces = list(window.devices.values())
    if any(piece.energy_j is None for piece in pieces):
        assert window.energy_j is None
        assert window.j_per_token is None
        assert window.reason
        assert window.status == "invalid"
    else:
        assert window.energy_j == pytest.approx(sum(piece.energy_j for piece in pieces))
        assert window.provenance == weakest_provenance([piece.provenance for piece in pieces])
        if usable_tokens(tokens) is not None:
            assert window.j_per_token == pytest.approx(window.energy_j / tokens)
        else:
            assert window.j_per_token is None
    assert window.as_row()["name"] == "any"


@given(st.lists(labels | st.none(), max_size=6))
def test_the_label_of_a_sum_is_the_weakest(parts: list) -> None:
    found = weakest_provenance(parts)
    if not parts or None in parts:
        assert found is None
    else:
        assert all(PROVENANCE_ORDER.index(found) <= PROVENANCE_ORDER.index(part) for part in parts)


@given(st.floats(allow_nan=True, allow_infinity=True) | st.none())
def test_tokens_are_usable_or_none(tokens: float | None) -> None:
    found = usable_tokens(tokens)
    assert found is None or (math.isfinite(found) and found > 0)


@settings(max_examples=50)
@given(st.integers(0, 2**53))
def test_millijoules_become_joules_and_nothing_is_lost(energy_mj: int) -> None:
    clock = VirtualClock()
    nvml = FakeNvml(clock)
    nvml.override["83"] = energy_mj / 1000
    source = NvmlSource(nvml, clock=clock, environment={})
    sample = source.read(source.devices()[0], ["energy_j"])
    assert sample.energy_j == pytest.approx(energy_mj * 1e-3, rel=1e-12, abs=1e-12)


@given(
    st.lists(st.tuples(st.floats(0.001, 10), st.floats(0, 1000)), min_size=1, max_size=20),
    st.lists(st.floats(-5, 250), min_size=3, max_size=3),
)
def test_work_between_moments_adds_up(steps: list[tuple[float, float]], moments: list[float]) -> None:
    log, t_s = WorkLog(0.0), 0.0
    for duration_s, tokens in steps:
        t_s += duration_s
        log.add(t_s, tokens)
    a, b, c = sorted(moments)
    assert log.between(a, c) == pytest.approx(log.between(a, b) + log.between(b, c), abs=1e-6)
    assert 0 <= log.between(a, c) <= log.total + 1e-9
    assert log.between(-1.0, t_s + 1.0) == pytest.approx(log.total)


@given(st.lists(st.integers(1, 400), min_size=2, max_size=8, unique=True))
def test_windows_between_ticks_add_up_over_any_division(ticks: list[int]) -> None:
    ticks = sorted(10 * tick for tick in ticks)

    def edge(tick: int) -> Edge:
        joules = 7.0 + tick * 31.4159
        return Edge(
            Sample(device_uuid="GPU-x", t_s=tick / 10, energy_j=joules, provenance={"energy_j": "measured"}),
            tick / 10,
            0.001,
            kind="tick",
        )

    def joules(first: int, last: int) -> float:
        span = Span(device=GPU, start=edge(first), end=edge(last), edges="tick")
        return measure(span, Settings()).energy_j

    parts = [joules(a, b) for a, b in pairwise(ticks)]
    assert math.fsum(parts) == pytest.approx(joules(ticks[0], ticks[-1]), rel=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.permutations(["a", "b", "c"]), st.lists(st.floats(1.2, 4.0), min_size=3, max_size=3))
def test_the_order_in_which_windows_close_does_not_matter(order: list[str], lengths: list[float]) -> None:
    def run(closing: list[str]) -> dict[str, tuple]:
        clock = VirtualClock()
        source = SimulatedSource(seed=1, clock=clock, load=StepLoad(300.0), board=Board(noise_rel_sd=0.0))
        # The readings of a neighbour's edge must not disturb, so that the clock stands still while they are taken.
        source._latency = type("Still", (), {"uniform": lambda *_: 0.0})()
        with EnergyMeter(source, sample=False) as meter:
            clock.sleep_s(1.0)
            for name in ("a", "b", "c"):
                meter.begin_window(name)
            clock.sleep_s(sum(lengths))
            found = {name: meter.end_window(name) for name in closing}
        return {name: (window.energy_j, window.duration_s, window.status) for name, window in found.items()}

    assert run(list(order)) == run(["a", "b", "c"])
