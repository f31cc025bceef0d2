"""The numbers a user may give to a meter, checked once, with the range and an example in the refusal."""

from __future__ import annotations

from typing import Any

from thermoe.errors import ConfigError


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
