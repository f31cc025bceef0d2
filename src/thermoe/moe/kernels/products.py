"""The experts' matrix products by `grouped_mm`: no padding and, in bfloat16 on SM90 and newer, no host synchronisation.

Rows at and behind `ends[-1]` come back uninitialised, and are not read.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows (R, A) by its matrix of ``weight`` (E, A, B), which may be a transpose: (R, B)."""
    return F.grouped_mm(rows, weight, offs=ends)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return the sum over each expert's rows of left (R, A) times right (R, B): (E, A, B), 0 for one without rows."""
    return F.grouped_mm(left.t(), right, offs=ends)
