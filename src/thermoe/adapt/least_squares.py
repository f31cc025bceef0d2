"""Recursive least squares: a linear map that always fits best what it has been told, the recent more than the old.

After n updates the solution is

    theta = argmin  sum_i lambda^(age of i) * w_i * |r_i - f_i theta|^2  +  prior_precision * |theta|^2.

What is kept is the information form, sum w f'f and sum w f'r, and not the covariance: the answer is the same, the prior
does not fade with the evidence, all outputs share the one matrix, and no rounding builds up in an inverse that is
carried from update to update. Everything is float64 on the CPU: (F, F) and (F, O) numbers, solved once per update.

Shape letters: N observations, F features, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thermoe.errors import CheckpointError, ConfigError


class RecursiveLeastSquares:
    """Weighted least squares with a prior at zero and exponential forgetting.

    Args:
        features: F.
        outputs: O, which share the features and the weights.
        prior_precision: of every coefficient, above 0: as much evidence for 0 as that many observations of a feature 1.
        forgetting: factor on the evidence before each update, in (0, 1]; 1 forgets nothing.

    Attributes:
        information: float64 (F, F), the weighted sum of f'f.
        projection: float64 (F, O), the weighted sum of f'r.

    Raises:
        ConfigError: a number is outside its range.
    """

    def __init__(self, features: int, outputs: int, *, prior_precision: float = 1.0, forgetting: float = 0.99) -> None:
        for name, count in (("features", features), ("outputs", outputs)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(
                    f"{name} is {count!r}",
                    where=name,
                    accepted="an integer of at least 1",
                    fix=f"give {name}=1 or more",
                )
        self.prior_precision = checked_factor("prior_precision", prior_precision, most=math.inf, usual=1.0)
        self.forgetting = checked_factor("forgetting", forgetting, most=1.0, usual=0.99)
        self.information = torch.zeros(features, features, dtype=torch.float64)
        self.projection = torch.zeros(features, outputs, dtype=torch.float64)

    @torch.no_grad()
    def update(self, f_NF: Tensor, r_NO: Tensor, w_N: Tensor) -> bool:
        """Take in N observations at once: features, what they should give, and weights of at least 0.

        Returns:
            Whether they were taken in; numbers that are not finite are not, and change nothing.
        """
        f, r, w = (value.detach().to("cpu", torch.float64) for value in (f_NF, r_NO, w_N))
        weighted = f * w.unsqueeze(-1)
        information, projection = weighted.T @ f, weighted.T @ r
        if not bool(torch.isfinite(information).all() & torch.isfinite(projection).all()):
            return False
        self.information = self.forgetting * self.information + information
        self.projection = self.forgetting * self.projection + projection
        return True

    @torch.no_grad()
    def solution(self) -> Tensor:
        """Return theta, float64 (F, O); exactly 0 before the first update."""
        precision = self.information + self.prior_precision * torch.eye(len(self.information), dtype=torch.float64)
        return torch.cholesky_solve(self.projection, torch.linalg.cholesky(precision))

    def fade(self, factor: float) -> None:
        """Let all evidence so far count ``factor`` of what it did, in (0, 1]: what was true may be so no more."""
        factor = checked_factor("factor", factor, most=1.0, usual=1.0)
        self.information, self.projection = factor * self.information, factor * self.projection

    def reset(self) -> None:
        """Forget everything."""
        self.information = torch.zeros_like(self.information)
        self.projection = torch.zeros_like(self.projection)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the evidence. An update replaces the tensors and never writes into them, so they need no copy."""
        return {"information": self.information, "projection": self.projection}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the evidence.

        Raises:
            CheckpointError: it is incomplete or of another size; nothing is changed then.
        """
        found = {}
        for name in ("information", "projection"):
            value, own = state.get(name), getattr(self, name)
            if not isinstance(value, Tensor) or value.shape != own.shape or not bool(torch.isfinite(value).all()):
                raise CheckpointError(
                    f"the evidence cannot be taken up: {name} is "
                    + (f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)),
                    where="RecursiveLeastSquares.load_state_dict",
                    accepted=f"finite numbers of shape {tuple(own.shape)}, as state_dict returned",
                    fix="start afresh, without the state",
                )
            found[name] = value.detach().to("cpu", torch.float64).clone()
        self.information, self.projection = found["information"], found["projection"]


def checked_factor(name: str, value: float, *, most: float, usual: float) -> float:
    """Return ``value`` as a float.

    Raises:
        ConfigError: it is no finite number above 0 and at most ``most``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most or value == math.inf:
        bound = "" if most == math.inf else f" and at most {most:g}"
        raise ConfigError(
            f"{name} is {value!r}", where=name, accepted=f"a finite number above 0{bound}", fix=f"leave it at {usual:g}"
        )
    return float(value)
