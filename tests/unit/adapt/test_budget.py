"""A budget is taken in the units people write, and refused when it cannot be meant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe.adapt.budget import Budget
from thermoe.errors import ConfigError

FEASIBLE = "about 8.1 to 29 mJ/token at decode (estimated)"


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        (0.02, {"j_per_token": 0.02}),
        (2, {"j_per_token": 2.0}),
        (np.float32(0.5), {"j_per_token": 0.5}),
        ("20 mJ/token", {"j_per_token": 0.02}),
        ("20mJ / tok", {"j_per_token": 0.02}),
        ("2e-2 J/token", {"j_per_token": 0.02}),
        (".5 J/tokens", {"j_per_token": 0.5}),
        ("350 W", {"power_w": 350.0}),
        ("0.35 kW", {"power_w": 350.0}),
        ("70 C", {"temp_c": 70.0}),
        ("70 °C", {"temp_c": 70.0}),
        ("20 mJ/token, 350 W, 70 C", {"j_per_token": 0.02, "power_w": 350.0, "temp_c": 70.0}),
        ({"j_per_token": "20 mJ/token", "power_w": 350}, {"j_per_token": 0.02, "power_w": 350.0}),
        ({"j_per_token": {"prefill": 1, "decode": "29 mJ/token"}}, {"j_per_token": {"prefill": 1.0, "decode": 29e-3}}),
        ({"temp_c": "70 C", "power_w": None}, {"temp_c": 70.0}),
    ],
)  # fmt: skip
def test_what_people_write_is_understood(written: Any, limits: dict[str, Any]) -> None:
    budget = Budget.parse(written)
    assert budget.as_dict() == pytest.approx(limits) if "decode" not in str(limits) else budget.as_dict() == limits
    assert Budget.parse(budget) is budget
    assert Budget.parse(budget.as_dict()) == budget
    assert Budget(**budget.as_dict()) == budget


@pytest.mark.parametrize("field", ["j_per_token", "power_w", "temp_c"])
@pytest.mark.parametrize(
    "value", [0, 0.0, -1, -0.02, math.nan, math.inf, -math.inf, True, False, [1], (), 1j, 10**400, b"20", object()]
)
def test_a_limit_that_cannot_be_meant_is_refused(field: str, value: Any) -> None:
    for make in (lambda: Budget(**{field: value}), lambda: Budget.parse({field: value})):
        with pytest.raises(ConfigError) as refused:
            make()
        assert all((refused.value.what, refused.value.where, refused.value.accepted, refused.value.fix))
        assert refused.value.where.startswith(f"budget.{field}")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("0 W", "power_w is 0.0"),
        ("-3 mJ/token", "j_per_token is -0.003"),
        ("nan C", "temp_c is nan"),
        ("inf J/token", "j_per_token is inf"),
        ("200 C", "temp_c is 200.0"),
        ("20", "has no unit"),
        ("", "not a number with a unit"),
        ("much", "not a number with a unit"),
        ("20 mJ", "unknown unit 'mJ'"),
        ("5 K", "unknown unit 'K'"),
        ("5 MW", "unknown unit 'MW'"),
        ("20 mJ/token, 30 mJ/token", "gives j_per_token twice"),
        (True, "no number"),
        (None, "no number"),
        ({}, "limits nothing"),
        ({"power": 350}, "unknown limit 'power'"),
        ({"j_per_token": "350 W"}, "in watts, not in joules per token"),
        ({"power_w": "70 C"}, "in degrees Celsius, not in watts"),
        ({"j_per_token": {"encode": 1.0}}, "unknown phase 'encode'"),
        ({"j_per_token": {}}, "names no phase"),
        ({"j_per_token": {"decode": 0}}, "j_per_token is 0"),
    ],
)  # fmt: skip
def test_a_refusal_names_what_is_wrong_and_what_this_machine_can_hold(written: Any, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Budget.parse(written, feasible=FEASIBLE)
    assert says in refused.value.what
    assert refused.value.fix
    about_another = refused.value.where in ("budget.power_w", "budget.temp_c")
    assert (FEASIBLE in str(refused.value.accepted)) != about_another


def test_a_refusal_points_to_the_near_word() -> None:
    with pytest.raises(ConfigError, match="did you mean 'power_w'"):
        Budget.parse({"power": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'mJ/token'"):
        Budget.parse("20 mJ")
    with pytest.raises(ConfigError, match=r"budget\.j_per_token\.decode"):
        Budget.parse({"j_per_token": {"decode": -1}})


def test_one_number_holds_for_each_phase_and_a_phase_left_out_is_free() -> None:
    assert [Budget(j_per_token=0.5).j_per_token_of(phase) for phase in ("prefill", "decode")] == [0.5, 0.5]
    only = Budget(j_per_token={"decode": 0.5})
    assert (only.j_per_token_of("decode"), only.j_per_token_of("prefill")) == (0.5, None)
    assert Budget(power_w=5).j_per_token_of("decode") is None
    assert str(Budget(j_per_token={"decode": 0.5}, power_w=350, temp_c=70)) == "0.5 J/token at decode, 350 W, 70 C"


def test_a_budget_does_not_change_with_the_mapping_it_came_from() -> None:
    given_limits = {"decode": 0.5}
    budget = Budget(j_per_token=given_limits)
    given_limits["decode"] = -1.0
    assert budget.j_per_token_of("decode") == 0.5


@given(st.floats(min_value=1e-9, max_value=1e6), st.sampled_from([("J", 1.0), ("mJ", 1e-3), ("kJ", 1e3), ("uJ", 1e-6)]))
def test_units_scale_and_values_come_back(value: float, unit: tuple[str, float]) -> None:
    if value * unit[1] > 1e6:
        with pytest.raises(ConfigError):
            Budget.parse(f"{value!r} {unit[0]}/token")
        return
    budget = Budget.parse(f"{value!r} {unit[0]}/token")
    assert budget.j_per_token == pytest.approx(value * unit[1])
    assert Budget.parse(budget.as_dict()) == budget


@given(st.text(max_size=12))
def test_no_text_raises_anything_but_a_refusal(text: str) -> None:
    try:
        Budget.parse(text)
    except ConfigError as refused:
        assert refused.accepted and refused.fix
