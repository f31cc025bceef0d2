"""Non-negative, weighted least squares shrunk to a prior, small enough to be exact.

Minimises  sum_i ((x_i . b - y_i) / (s y_i))^2 + sum_j ((b_j - m_j) / d_j)^2  over b >= 0. With at most eight terms
every set of active ones is tried, so the minimum is the true one. A term whose 95 % interval reaches 0, or whose
variance is inflated more than tenfold by the other terms, is not identified: its number must not be used alone, though
predictions of sums may be sound long before single terms are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thermoe.errors import ConfigError

MAX_TERMS = 8
MAX_INFLATION = 10.0
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Term:
    """One coefficient.

    Args:
        value: the estimate, never negative.
        unit: its unit.
        sd: standard deviation; ``None`` for a prior that was never fitted.
        prior: what it was shrunk to.
        identified: whether the data alone determine it.
    """

    value: float
    unit: str
    sd: float | None = None
    prior: float | None = None
    identified: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted set of terms.

    Args:
        terms: by name.
        covariance: of the terms, in the order of ``terms``.
        mape_frac: mean absolute relative error on the rows fitted.
    """

    terms: dict[str, Term]
    covariance: list[list[float]]
    mape_frac: float

    def predict(self, rows: Sequence[Mapping[str, float]]) -> Array:
        """Return the fitted value of each row of regressors."""
        return np.array([sum(term.value * row.get(name, 0.0) for name, term in self.terms.items()) for row in rows])


def relative_error(predicted: Array, observed: Sequence[float]) -> float:
    """Return mean |predicted - observed| / observed."""
    target = np.asarray(observed, dtype=np.float64)
    return float(np.mean(np.abs(predicted - target) / target))


def fit_terms(
    rows: Sequence[Mapping[str, float]],
    observed: Sequence[float],
    *,
    units: Mapping[str, str],
    priors: Mapping[str, tuple[float, float]] | None = None,
    rel_sd: float = 0.01,
) -> Fit:
    """Fit one coefficient per name in ``units``.

    Args:
        rows: regressors by term name; a missing one is 0.
        observed: positive measurements, one per row.
        units: term name to unit.
        priors: term name to (mean, standard deviation); a term without one is not shrunk.
        rel_sd: relative standard deviation of a measurement, at least.

    Raises:
        ConfigError: no rows, more terms than `MAX_TERMS`, a measurement that is not positive, or any other number that
            is not finite or out of range.
    """
    names = list(units)
    design, target = _checked(rows, observed, names, priors or {}, rel_sd)
    # Terms differ by twelve orders of magnitude; each column is brought to order one for the arithmetic.
    scale = np.abs(design).max(axis=0)
    scale[scale == 0] = 1.0
    weighted = design / scale / (rel_sd * target)[:, None]
    goal = np.full(len(target), 1.0 / rel_sd)
    precision, pull = np.zeros(len(names)), np.zeros(len(names))
    for j, name in enumerate(names):
        if priors and name in priors:
            mean, sd = priors[name]
            precision[j] = 1.0 / (sd * scale[j]) ** 2
            pull[j] = mean * scale[j]
    best = _best_active_set(weighted, goal, precision, pull)
    active = best > 0
    residual = weighted @ best - goal
    freedom = max(1, len(target) - int(active.sum()))
    inflation = max(1.0, float(residual @ residual) / freedom)
    covariance = np.zeros((len(names), len(names)))
    gram = weighted.T @ weighted
    if active.any():
        inner = np.ix_(active, active)
        covariance[inner] = inflation * np.linalg.pinv(gram[inner] + np.diag(precision[active]))
    inflated = _variance_inflation(gram, active)
    value, covariance = best / scale, covariance / np.outer(scale, scale)
    terms = {}
    for j, name in enumerate(names):
        sd = float(np.sqrt(covariance[j, j]))
        terms[name] = Term(
            value=float(value[j]),
            unit=units[name],
            sd=sd,
            prior=priors[name][0] if priors and name in priors else None,
            identified=bool(active[j] and value[j] - 1.96 * sd > 0 and inflated[j] <= MAX_INFLATION),
        )
    fitted = Fit(terms, covariance.tolist(), 0.0)
    return Fit(terms, covariance.tolist(), relative_error(fitted.predict(rows), observed))


def _checked(
    rows: Sequence[Mapping[str, float]],
    observed: Sequence[float],
    names: Sequence[str],
    priors: Mapping[str, tuple[float, float]],
    rel_sd: float,
) -> tuple[Array, Array]:
    """Return regressors (rows, terms) and measurements as arrays that can be fitted."""
    if not 1 <= len(names) <= MAX_TERMS:
        raise _refuse(f"{len(names)} terms cannot be fitted", f"1 to {MAX_TERMS} terms", "name fewer terms in units")
    target = _numbers(observed, "the measurements")
    if not len(rows) or len(rows) != len(target) or not (target > 0).all():
        raise _refuse(
            f"{len(rows)} rows and measurements {list(observed)[:3]}... cannot be fitted",
            "as many positive, finite measurements as rows, at least one",
            "leave out the rows without a measurement",
        )
    design = _numbers([[row.get(name, 0.0) for name in names] for row in rows], "the regressors")
    if (design < 0).any():
        raise _refuse("a regressor is negative", "counts of work, 0 or more", "mend the row it is in")
    if not 0 < rel_sd < np.inf:
        raise _refuse(f"rel_sd is {rel_sd}", "a finite number above 0", "leave it at 0.01")
    for name, (mean, sd) in priors.items():
        if not (np.isfinite(mean) and 0 < sd < np.inf):
            raise _refuse(
                f"the prior of {name!r} is ({mean}, {sd})",
                "a finite mean and a standard deviation above 0",
                "leave a term out of priors to fit it without one",
            )
    return design, target


def _numbers(values: Sequence[Any], what: str) -> Array:
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise _refuse(f"{what} are not all numbers: {error}", "finite numbers", "leave out what is missing") from error
    if not np.isfinite(found).all():
        raise _refuse(f"{what} hold a value that is not finite", "finite numbers", "leave out what is missing")
    return found


def _refuse(what: str, accepted: str, fix: str) -> ConfigError:
    return ConfigError(what, where="fit_terms", accepted=accepted, fix=fix)


def _best_active_set(weighted: Array, goal: Array, precision: Array, pull: Array) -> Array:
    """Return the non-negative minimiser, by solving for every set of terms allowed to be above 0."""
    count = weighted.shape[1]
    best, lowest = np.zeros(count), np.inf
    for size in range(count + 1):
        for chosen in combinations(range(count), size):
            candidate = np.zeros(count)
            index = list(chosen)
            if index:
                left = weighted[:, index].T @ weighted[:, index] + np.diag(precision[index])
                right = weighted[:, index].T @ goal + precision[index] * pull[index]
                candidate[index] = np.linalg.lstsq(left, right, rcond=None)[0]
                if (candidate < 0).any():
                    continue
            miss, off = weighted @ candidate - goal, candidate - pull
            value = float(miss @ miss + (precision * off) @ off)
            if value < lowest:
                best, lowest = candidate, value
    return best


def _variance_inflation(gram: Array, active: NDArray[np.bool_]) -> Array:
    """Return how much the presence of the other active terms inflates each variance; infinite when collinear."""
    inflated = np.full(len(active), np.inf)
    inner = np.ix_(active, active)
    size = int(active.sum())
    if size and np.linalg.matrix_rank(gram[inner]) == size:
        inflated[active] = np.diag(gram[inner]) * np.diag(np.linalg.inv(gram[inner]))
    return inflated


def as_dict(terms: Mapping[str, Term]) -> dict[str, dict[str, Any]]:
    """Return terms as plain dictionaries for JSON."""
    return {
        name: {"value": t.value, "unit": t.unit, "sd": t.sd, "prior": t.prior, "identified": t.identified}
        for name, t in terms.items()
    }
