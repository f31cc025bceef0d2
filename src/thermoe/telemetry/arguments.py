"""The numbers a user may give to a meter, checked once, with the range and an example in the refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thermoe.errors import ConfigError

#: Values of ``THERMOE_TELEMETRY`` that switch every meter off.
OFF_WORDS = ("off", "0", "false", "no")


def is_off(environment: Mapping[str, str]) -> bool:
    """Return whether the environment switches telemetry off."""
    return environment.get("THERMOE_TELEMETRY", "").strip().lower() in OFF_WORDS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def checked_period(period_s: Any, allow_fast: bool) -> float:
    """Return ``period_s`` when it is a usable sampling period.

    Raises:
        ConfigError: it is no number, not above 0, above an hour, or below 1 s without ``allow_fast``.
    """
    if not _is_number(period_s) or not 0 < period_s <= 3600:
        raise ConfigError(
            f"period_s={period_s!r} is not a sampling period",
            where="EnergyMeter(period_s=...)",
            accepted="a number of seconds from 1.0 to 3600 (from 0.01 with allow_fast=True)",
            fix="leave it at 1.0",
        )
    if (period_s < 1.0 and not allow_fast) or period_s < 0.01:
        raise ConfigError(
            f"period_s={period_s!r} reads the sensor more than once a second",
            where="EnergyMeter(period_s=...)",
            accepted="1.0 or more; with allow_fast=True from 0.01",
            fix="use 1.0; reading every 100 ms raised the energy of the measured work by 2.6% on an H200",
        )
    return float(period_s)


def checked_power(power_w: Any) -> float | None:
    """Return ``power_w`` in watts when it is a usable power of a host, or ``None`` when none was given.

    Raises:
        ConfigError: it is no number, or not in (0, 100000].
    """
    if power_w is None:
        return None
    if not _is_number(power_w) or not 0 < power_w <= 1e5:
        raise ConfigError(
            f"host_power_w={power_w!r} is not a power",
            where="EnergyMeter(host_power_w=...)",
            accepted="a number of watts above 0, such as 65.0",
            fix="give the number without its unit, or leave it out",
        )
    return float(power_w)


def checked_length(min_s: Any) -> float:
    """Return ``min_s`` when it is a usable least length of a window, in seconds.

    Raises:
        ConfigError: it is no number, not above 0, or above a day.
    """
    if not _is_number(min_s) or not 0 < min_s <= 86400:
        raise ConfigError(
            f"min_s={min_s!r} is not a length of time",
            where="EnergyMeter.aligned_window(min_s=...)",
            accepted="a number of seconds above 0; 6.0 for a comparison",
            fix="use min_s=6.0",
        )
    return float(min_s)


def checked_duration(duration_s: Any) -> float:
    """Return ``duration_s`` when it is a usable length of an idle reference, in seconds.

    Raises:
        ConfigError: it is no number, not above 0, or above a day.
    """
    if not _is_number(duration_s) or not 0 < duration_s <= 86400:
        raise ConfigError(
            f"duration_s={duration_s!r} is not a length of time",
            where="EnergyMeter.measure_idle(duration_s=...)",
            accepted="a number of seconds above 0",
            fix="leave it at 10.0",
        )
    return float(duration_s)


def checked_min_ticks(min_ticks: Any) -> int:
    """Return ``min_ticks`` when a window can be asked to have so many counter updates.

    Raises:
        ConfigError: it is no integer of at least 1.
    """
    if not isinstance(min_ticks, int) or isinstance(min_ticks, bool) or min_ticks < 1:
        raise ConfigError(
            f"min_ticks={min_ticks!r} is not a number of counter updates",
            where="EnergyMeter(min_ticks=...)",
            accepted="an integer of at least 1",
            fix="leave it at 10",
        )
    return min_ticks


def checked_scatter(rel_sd: Any) -> float:
    """Return ``rel_sd`` when it is a relative standard deviation.

    Raises:
        ConfigError: it is no number from 0 to 1.
    """
    if not _is_number(rel_sd) or not 0 <= rel_sd <= 1:
        raise ConfigError(
            f"repeatability_rel_sd={rel_sd!r} is not a relative standard deviation",
            where="EnergyMeter(repeatability_rel_sd=...)",
            accepted="a number from 0 to 1, such as 0.01",
            fix="leave it out",
        )
    return float(rel_sd)


def checked_switch(telemetry: Any) -> bool:
    """Return whether ``telemetry`` is "on".

    Raises:
        ConfigError: it is neither "on" nor "off"; a meter that was meant to be off must not go on reading.
    """
    if telemetry not in ("on", "off"):
        raise ConfigError(
            f"telemetry={telemetry!r} is neither on nor off",
            where="EnergyMeter(telemetry=...)",
            accepted="'on', 'off'",
            fix="use telemetry='off' to read nothing; to choose what is read, use source=...",
        )
    return bool(telemetry == "on")


def checked_tokens(tokens: Any) -> Any:
    """Return ``tokens`` unchanged when joules can be divided by it or it says that they cannot (0, negative, NaN).

    A tensor of one number is taken as it is, so that counting it does not wait for the device.

    Raises:
        ConfigError: it is no number.
    """
    try:
        if _is_number(tokens):
            float(tokens)
        usable = hasattr(type(tokens), "__float__")
    except OverflowError:
        usable = False
    if not usable:
        raise ConfigError(
            f"tokens={str(tokens)[:40]!r} is not a number of tokens",
            where="the tokens of a window",
            accepted="a number",
            fix="give how many tokens the step processed",
        )
    return tokens
