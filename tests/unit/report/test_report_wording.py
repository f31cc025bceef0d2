from __future__ import annotations

import math

import pytest

from thermoe.report.run_data import number, weighted_mean
from thermoe.report.wording import difference, duration, plain, reading_of, scaled_count, shared_decimals, with_interval


@pytest.mark.parametrize("value", [None, "nan", "inf", math.nan, math.inf, True, "3", {}, []])
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number(value) is None
    assert plain(value) == "not measured"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (0.01234, "0.0123"), (-2.5, "−2.50"), (3.1e-6, "3.10e−6"), (2.2e12, "2.20e12")],
)
def test_numbers_are_stated_to_three_digits(value: float, text: str) -> None:
    assert plain(value) == text


def test_digits_follow_the_interval() -> None:
    cell = with_interval({"value": 12.34567, "lo": 12.3, "hi": 12.4})
    assert cell.text == "12.346"
    assert cell.note == "[12.300,\u00a012.400]"
    assert with_interval({"value": 512.3456, "lo": 480.0, "hi": 540.0}).text == "512"
    assert with_interval({"value": 12.34567}).text == "12.3"
    assert with_interval(None).text == "not measured"


def test_a_column_takes_the_digits_of_its_least_certain_number() -> None:
    assert (
        shared_decimals([{"value": 60.0, "lo": 58.6, "hi": 61.9}, {"value": 67.0, "lo": 65.0, "hi": 69.1}, None]) == 1
    )
    assert shared_decimals([]) is None


@pytest.mark.parametrize(
    ("low", "high", "reading"),
    [
        (-0.2, -0.1, "better"),
        (0.1, 0.2, "worse"),
        (-0.1, 0.2, "no difference shown"),
        (None, 0.2, "no interval, so no reading"),
    ],
)
def test_a_difference_is_read_by_its_interval(low: float | None, high: float, reading: str) -> None:
    assert reading_of({"diff": 0.0, "lo": low, "hi": high}) == reading


def test_differences_carry_their_sign() -> None:
    assert difference({"diff": 0.05, "lo": 0.01, "hi": 0.09}).text == "+0.050"
    assert difference({"diff": -0.05, "lo": -0.09, "hi": -0.01}).text == "−0.050"
    assert difference({"diff": None}).text == "not measured"


def test_durations_and_counts_read_as_a_person_says_them() -> None:
    assert (duration(4.23), duration(312.4), duration(7260)) == ("4.2 s", "5 min 12 s", "2 h 1 min")
    assert (scaled_count(4_210_000), scaled_count(2048)) == ("4.21 million", "2,048")


def test_weighted_mean_leaves_out_gaps() -> None:
    assert weighted_mean([(1.0, 1.0), (3.0, 3.0), (None, 9.0)]) == 2.5
    assert weighted_mean([(None, 1.0)]) is None
