"""Fast weights: the part of a router that test-time training moves, zero at the start.

z'_t = z_t + correction(x_t, z_t), with x the router's own input and z the logits of the slow router. At zero the sum is
the slow router bit for bit. Four families, from the smallest state to the most general:

- "bias": delta. Repairs constant shifts and nothing else.
- "mix": delta + M zbar, zbar the slow logits standardised per expert. Moves in the row space of the slow router, which
  is where most of what it knows lies; E + E^2 numbers.
- "low_rank": delta + A (B x). B is fixed: the directions of the input that the slow router listens to most, if it is
  given (`FastWeights.of`), else seeded random ones, which are a reference and help little.
- "full": delta + D x, as general as the slow router itself.

Shape letters: T tokens, E experts, D model width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError, UnknownNameError

FastFamily = Literal["full", "bias", "mix", "low_rank"]
FAST_FAMILIES: tuple[FastFamily, ...] = ("full", "bias", "mix", "low_rank")


class FastWeights(nn.Module):
    """Additive correction to router logits; float32 always, whatever the model is cast to.

    Args:
        hidden_size: D.
        num_experts: E.
        family: see the module's text.
        rank: R, for the family "low_rank"; at most the smaller of D and E where the slow router gives the directions.
        seed: of the random directions of the family "low_rank".

    Attributes:
        delta: (E,).
        matrix: (E, D) for "full", (E, E) for "mix", (E, R) for "low_rank", ``None`` for "bias".
        mean, scale: (E,), for "mix": what the slow logits are standardised by; 0 and 1 until `set_statistics`.
        directions: (R, D), for "low_rank": B, orthonormal rows.

    Raises:
        UnknownNameError: no such family.
        ConfigError: ``rank`` is not in 1..D.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor

    def __init__(
        self, hidden_size: int, num_experts: int, family: str = "full", *, rank: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        if family not in FAST_FAMILIES:
            raise UnknownNameError.of("family of fast weights", str(family), FAST_FAMILIES, where="family")
        if family == "low_rank" and (
            isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= hidden_size
        ):
            raise ConfigError(
                f"the rank of the fast weights is {rank!r}",
                where="rank",
                accepted=f"an integer from 1 to {hidden_size}, the width of the router's input",
                fix="leave it at 8, or at the number of experts if that is less",
            )
        self.hidden_size, self.num_experts, self.family = hidden_size, num_experts, family
        self.rank = rank if family == "low_rank" else None
        self.delta = nn.Parameter(torch.zeros(num_experts))
        columns = {"full": hidden_size, "mix": num_experts, "low_rank": rank, "bias": 0}[family]
        self.matrix = nn.Parameter(torch.zeros(num_experts, columns)) if columns else None
        if family == "mix":
            self.register_buffer("mean", torch.zeros(num_experts))
            self.register_buffer("scale", torch.ones(num_experts))
        if family == "low_rank":
            noise = torch.randn(hidden_size, rank, generator=torch.Generator().manual_seed(seed))
            self.register_buffer("directions", torch.linalg.qr(noise)[0].T.contiguous())

    @classmethod
    def of(cls, slow_ED: Tensor, family: str = "full", *, rank: int = 8) -> FastWeights:
        """Return fast weights for the slow router (E, D), on its device; "low_rank" takes its directions from it.

        They are the right singular vectors with the largest singular values. A rank above that of the slow router is
        lowered to it: the rest would be directions to which the slow router is deaf.
        """
        experts, width = slow_ED.shape
        made = cls(width, experts, family, rank=min(rank, experts, width) if family == "low_rank" else rank)
        if made.rank is not None:
            rows = torch.linalg.svd(slow_ED.detach().float().cpu(), full_matrices=False).Vh
            made.directions.copy_(rows[: made.rank])
        return made.to(slow_ED.device)

    def forward(self, x_TD: Tensor, slow_TE: Tensor) -> Tensor:
        """Return the correction (T, E).

        Args:
            x_TD: float32 (T, D), the router's input.
            slow_TE: float32 (T, E), the logits of the slow router.
        """
        if self.matrix is None:
            return self.delta.expand(x_TD.shape[0], -1)
        return F.linear(self.features(x_TD, slow_TE), self.matrix, self.delta)

    def features(self, x_TD: Tensor, slow_TE: Tensor) -> Tensor:
        """Return what the matrix is applied to, (T, C): the correction is linear in it; C is 0 for "bias"."""
        if self.family == "mix":
            return (slow_TE - self.mean) / self.scale
        if self.family == "low_rank":
            return F.linear(x_TD, self.directions)
        return x_TD if self.family == "full" else x_TD[:, :0]

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, sd: Tensor) -> None:
        """Standardise the slow logits by ``mean`` and ``sd`` (E,) from here on; for other families there is nothing to.

        An expert whose logit never varies (sd 0) keeps the scale 1.

        Raises:
            ConfigError: they are not one finite number per expert, or ``sd`` is negative.
        """
        if self.family != "mix":
            return
        for name, value in (("mean", mean), ("sd", sd)):
            fits = isinstance(value, Tensor) and value.shape == self.mean.shape
            if not fits or not bool(torch.isfinite(value).all()) or (name == "sd" and bool((value < 0).any())):
                raise ConfigError(
                    f"the {name} of the slow logits is {value!r}",
                    where=f"set_statistics({name}=...)",
                    accepted=f"{self.num_experts} finite numbers, one per expert" + (", >= 0" if name == "sd" else ""),
                    fix="take them over the tokens of a batch: slow.mean(0), slow.std(0, correction=0)",
                )
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(sd > 0, sd, 1.0))

    @torch.no_grad()
    def reset(self) -> None:
        """Return to exactly zero, the slow router, and to no statistics: as it was made."""
        for parameter in self.parameters():
            parameter.zero_()
        if self.family == "mix":
            self.mean.zero_()
            self.scale.fill_(1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastWeights:
        """Move with the model, but do not become half precision: steps of 1e-4 of a logit would be lost in it."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        return self

    def extra_repr(self) -> str:
        """Show family and sizes in `print(model)`."""
        rank = "" if self.rank is None else f", rank={self.rank}"
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, family={self.family}{rank}"

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments beyond the sizes that rebuild these fast weights; saved with the model."""
        return {"family": self.family, **({} if self.rank is None else {"rank": self.rank})}
