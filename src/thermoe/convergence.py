"""Has a training run converged? A rule that is written down before the run, on the validation curve alone.

Over the last third of the tokens a straight line is fitted to the validation loss (least squares). The improvement is
what the line falls over that span, with a 95 % t interval from the residuals; the run has converged when the upper end
of the interval is below `THRESHOLD_NATS`. A curve that ends above its own minimum by more than `RISE_NATS` and more
than noise explains has overfitted, one that is not finite or ends above its start has diverged, one with too few points
cannot be judged; none of these has converged.

The rule speaks of the run as it was made. A learning rate that decays to 0 flattens any curve, and the same model may
learn on from more data or a longer schedule. Neighbouring points are taken as independent.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from thermoe.errors import ConfigError

#: Nats per token over the last third of the tokens: 1 % of perplexity.
THRESHOLD_NATS = 0.01
#: Nats per token above the minimum that count as overfitting: 2 % of perplexity.
RISE_NATS = 0.02
#: Fewest points in the last third for a line with an interval.
LEAST_POINTS = 4
#: Points averaged at the end and at the minimum, so that one lucky point is no minimum.
_SMOOTH = 3

Reason = Literal["flat", "improving", "uncertain", "overfitted", "diverged", "too few points"]
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Convergence:
    """What a validation curve says.

    Args:
        converged: whether the run has converged.
        reason: "flat" (converged), or why not.
        text: the same for people, with the numbers.
        improvement_nats: fall of the loss over the last third, nats per token; ``None`` where no line was fitted.
        low_nats: lower end of its 95 % interval.
        high_nats: upper end.
        points: points of the curve in the last third.
    """

    converged: bool
    reason: Reason
    text: str
    improvement_nats: float | None
    low_nats: float | None
    high_nats: float | None
    points: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a result row."""
        return asdict(self)


def t95(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, half the width of a two-sided 95 % interval in standard errors.

    Exact to three decimals up to 30 degrees of freedom, beyond by the expansion of Cornish and Fisher.
    """
    if degrees < 1:
        raise ConfigError(
            f"{degrees} degrees of freedom",
            where="t95",
            accepted="an integer of at least 1",
            fix="give two values or more",
        )
    if degrees <= len(_T95):
        return _T95[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean and its 95 % t interval; the ends are ``None`` with fewer than two values or one not finite.

    Raises:
        ConfigError: there is no value.
    """
    if not values:
        raise ConfigError("no value to average", where="mean_interval", accepted="one or more", fix="give values")
    mean = math.fsum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None, None
    half = t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return slope, its standard error and the standard deviation of the residuals, by least squares."""
    x_mean = statistics.fmean(x for x, _ in points)
    y_mean = statistics.fmean(y for _, y in points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    residual = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in points)
    noise = math.sqrt(residual / (len(points) - 2))
    return slope, noise / math.sqrt(spread), noise


def judge_convergence(
    curve: Sequence[tuple[float, float]], *, threshold_nats: float = THRESHOLD_NATS, rise_nats: float = RISE_NATS
) -> Convergence:
    """Say whether a run with this validation curve has converged, and why.

    Args:
        curve: (tokens trained on, validation loss in nats per token) in the order of training.
        threshold_nats: most improvement over the last third of the tokens, upper end of its interval.
        rise_nats: rise above the minimum that counts as overfitting.

    Raises:
        ConfigError: the tokens do not grow, or a threshold is not above 0.
    """
    for name, value in (("threshold_nats", threshold_nats), ("rise_nats", rise_nats)):
        if not 0 < value < math.inf:
            raise ConfigError(
                f"{name} is {value}", where=name, accepted="a finite number above 0", fix="leave it at its default"
            )
    if any(not b[0] > a[0] for a, b in itertools.pairwise(curve)) or any(not math.isfinite(x) for x, _ in curve):
        raise ConfigError(
            "the tokens of the curve do not grow from point to point",
            where="curve",
            accepted="one point per validation, in the order of training",
            fix="drop points that were evaluated twice, for example after a resume",
        )
    if any(not math.isfinite(loss) for _, loss in curve):
        at = next(tokens for tokens, loss in curve if not math.isfinite(loss))
        return _verdict("diverged", f"the validation loss is not finite at {at:,.0f} tokens")
    if len(curve) > 1 and curve[-1][1] > curve[0][1]:
        first, last = curve[0][1], curve[-1][1]
        return _verdict("diverged", f"the validation loss ends at {last:.3f} nats, above its start of {first:.3f}")
    end = curve[-1][0] if curve else 0.0
    last_third = [point for point in curve if point[0] >= end * 2 / 3]
    if len(last_third) < LEAST_POINTS:
        found = f"{len(last_third)} validations in the last third of the tokens, {LEAST_POINTS} are needed"
        return _verdict("too few points", found, points=len(last_third))
    slope, error, noise = _line(last_third)
    span = last_third[-1][0] - last_third[0][0]
    half = t95(len(last_third) - 2) * error * span
    fall = -slope * span
    numbers = (fall, fall - half, fall + half)
    rise = _rise([loss for _, loss in curve])
    if rise > max(rise_nats, 3 * noise * math.sqrt(2 / _SMOOTH)):
        text = f"the validation loss ends {rise:.3f} nats above its minimum (more than {rise_nats:.3f})"
        return _verdict("overfitted", text, numbers, len(last_third))
    stated = f"the last third improved by {fall:.3f} nats (95 % {fall - half:.3f} to {fall + half:.3f})"
    if fall + half < threshold_nats:
        return _verdict("flat", f"{stated}, under the threshold of {threshold_nats:.3f}", numbers, len(last_third))
    if fall - half > 0:
        how = "above" if fall - half >= threshold_nats else "and may be above"
        text = f"{stated}, {how} the threshold of {threshold_nats:.3f}"
        return _verdict("improving", text, numbers, len(last_third))
    text = f"{stated}; too noisy to tell it from the threshold of {threshold_nats:.3f}"
    return _verdict("uncertain", text, numbers, len(last_third))


def _rise(losses: Sequence[float]) -> float:
    """How far the mean of the last points lies above the least mean of as many neighbouring points."""
    means = [statistics.fmean(losses[i : i + _SMOOTH]) for i in range(len(losses) - _SMOOTH + 1)]
    return means[-1] - min(means)


def _verdict(
    reason: Reason, text: str, numbers: tuple[float, float, float] | None = None, points: int = 0
) -> Convergence:
    converged = reason == "flat"
    fall, low, high = numbers or (None, None, None)
    words = "converged" if converged else f"not converged ({reason})"
    return Convergence(converged, reason, f"{words}: {text}", fall, low, high, points)
