"""Joules of a forward from what it does.

    E_forward = layer_j * (MoE layers) + open_j_per_byte * (bytes of weights read)
              + pair_j_per_flop * (operations) + token_j * (tokens * MoE layers)

These are gross marginal costs: the static power of the time that the work takes is part of them, which is what a router
must see, because most of what it can save is time. The prior was fitted to energy-counter readings of one NVIDIA H200
running Mixture-of-Experts layers of the OLMoE shape (64 experts of 2048 x 1024, gated, bfloat16, grouped products in
CUDA graphs): 2.89 mJ per opened expert of 12.6 MB and 0.028 mJ per token-expert pair of 12.6 MFLOP. On any other
machine, and for any other shape, the result is an estimate, and it always says so; `thermoe calibrate` fits the terms
on the machine at hand. Even then a modelled joule stays "estimated": only a sensor measures. Experts of the same shape
share one cost; unequal ones cost by their bytes and operations.

What it leaves out: attention scores, normalisation, activations, and, in the prior, kernel launches. Launches dominate
in small models run without CUDA graphs, so for these it says how work compares, not what a meter would read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from thermoe.energy.fit import Term, as_dict
from thermoe.energy.work import Counts, LayerWork, ModelWork
from thermoe.results import Provenance

UNITS: dict[str, str] = {
    "layer_j": "J per MoE layer and forward",
    "open_j_per_byte": "J/byte",
    "pair_j_per_flop": "J/FLOP",
    "token_j": "J per token and MoE layer",
}
#: Joules of the reference device; see the module's text.
PRIOR: dict[str, float] = {
    "layer_j": 0.0,
    "open_j_per_byte": 2.89e-3 / (3 * 2048 * 1024 * 2),
    "pair_j_per_flop": 0.028e-3 / (2 * 3 * 2048 * 1024),
    "token_j": 0.0,
}
#: How far a prior may be off on another machine, as one standard deviation; terms at 0 get an absolute one.
PRIOR_SD: dict[str, float] = {"layer_j": 0.05, "open_j_per_byte": 5e-10, "pair_j_per_flop": 5e-12, "token_j": 1e-3}


#: Board power in W, memory bandwidth in byte/s, dense half-precision FLOP/s: the makers' data sheets.
DATASHEETS: dict[str, tuple[float, float, float]] = {
    "H200": (700, 4.8e12, 989e12),
    "H100 PCIe": (350, 2.0e12, 756e12),
    "H100": (700, 3.35e12, 989e12),
    "A100": (400, 2.0e12, 312e12),
    "L40S": (350, 0.864e12, 362e12),
    "L4": (72, 0.3e12, 121e12),
    "A10": (150, 0.6e12, 125e12),
    "V100": (300, 0.9e12, 125e12),
    "T4": (70, 0.32e12, 65e12),
}


def _datasheet_factors(device_name: str | None) -> tuple[str, float, float] | None:
    """Return (name, watts per byte/s, watts per FLOP/s) relative to the reference device; ``None`` when unknown."""
    words = (device_name or "").replace("-", " ").split()
    for name, (power_w, bandwidth, flops) in DATASHEETS.items():
        if all(word in words for word in name.split()):
            reference_w, reference_bandwidth, reference_flops = DATASHEETS["H200"]
            per_byte = (power_w / bandwidth) / (reference_w / reference_bandwidth)
            return name, per_byte, (power_w / flops) / (reference_w / reference_flops)
    return None


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients, and where they come from.

    Args:
        terms: by the names of `UNITS`.
        basis: "prior", or "calibrated" when fitted on this machine.
        reference: what the coefficients were measured on.
        provenance: of every joule it returns: "estimated", or "simulated" when fitted on a simulated source.
        flags: "transferred" when the profile is that of another board of the same kind.
        validity: by name, the (least, most) that the fit saw; empty for a prior.
    """

    terms: Mapping[str, Term]
    basis: str
    reference: str
    provenance: Provenance = "estimated"
    flags: tuple[str, ...] = ()
    validity: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def prior(cls, device_name: str | None = None) -> CostModel:
        """Return the cost model before any calibration.

        The readings on the reference device are scaled by what the data sheets say of power per bandwidth and power per
        operation; a device that is not in `DATASHEETS` gets those of the reference as they are.
        """
        values = dict(PRIOR)
        source = "one NVIDIA H200, bfloat16, OLMoE-shaped layers, gross"
        found = _datasheet_factors(device_name)
        if found is None:
            reference = f"{source}; not this machine"
        else:
            name, per_byte, per_flop = found
            values["open_j_per_byte"] *= per_byte
            values["pair_j_per_flop"] *= per_flop
            reference = f"{source}, scaled to the data sheet of {name}; not measured on this machine"
        return cls(
            terms={name: Term(values[name], unit) for name, unit in UNITS.items()}, basis="prior", reference=reference
        )

    def term(self, name: str) -> float:
        """Return one coefficient."""
        return self.terms[name].value

    @property
    def open_j_per_byte(self) -> float:
        """Joules per byte of weights read."""
        return self.term("open_j_per_byte")

    @property
    def pair_j_per_flop(self) -> float:
        """Joules per floating-point operation."""
        return self.term("pair_j_per_flop")

    def describe(self) -> dict[str, Any]:
        """Return what a manifest keeps."""
        return {
            "basis": self.basis,
            "provenance": self.provenance,
            "reference": self.reference,
            "flags": list(self.flags),
            "terms": as_dict(self.terms),
        }

    def open_cost_j(self, layer: LayerWork) -> float:
        """Joules to open one expert of ``layer``, where all are alike."""
        return self.open_j_per_byte * layer.bytes_per_expert

    def open_costs_j(self, layer: LayerWork) -> list[float]:
        """Joules to open each expert of ``layer``."""
        return [self.open_j_per_byte * count for count in layer.bytes_by_expert]

    def pair_cost_j(self, layer: LayerWork) -> float:
        """Joules of one token in one expert of ``layer``, where all are alike."""
        return self.pair_j_per_flop * layer.flops_per_pair

    def pair_costs_j(self, layer: LayerWork) -> list[float]:
        """Joules of one token in each expert of ``layer``."""
        return [self.pair_j_per_flop * count for count in layer.flops_by_expert]

    def mean_pair_cost_j(self, layer: LayerWork) -> float:
        """Joules of one token in an expert of ``layer``, averaged over the experts: the unit of relative costs."""
        return self.pair_j_per_flop * (sum(layer.flops_by_expert) / layer.num_experts)

    def forward_j(
        self, work: ModelWork, tokens: int, pairs: Sequence[Counts], opened: Sequence[Counts], *, passes: float = 1.0
    ) -> float:
        """Return the modelled joules of one forward.

        Args:
            work: the model.
            tokens: tokens of the forward.
            pairs: per MoE layer the token-expert pairs: how many, or how many for each expert.
            opened: per MoE layer the distinct experts: how many, or for each expert how often.
            passes: 1 for a forward; a backward to the activations reads and computes as much once more.
        """
        counts = work.step(tokens, pairs, opened).regressors
        return passes * sum(self.term(name) * count for name, count in counts.items())

    def relative_costs(self, layer: LayerWork) -> tuple[list[float], list[float]]:
        """Return (pair costs, opening costs) of the E experts in units of the mean pair cost, for a priced router."""
        mean_flops, unit_j = sum(layer.flops_by_expert) / layer.num_experts, self.mean_pair_cost_j(layer)
        return [f / mean_flops for f in layer.flops_by_expert], [cost / unit_j for cost in self.open_costs_j(layer)]

    def extrapolates(self, **operating_point: float) -> list[str]:
        """Return which of the given quantities lie outside what the fit saw; empty for a prior."""
        return [
            name
            for name, value in operating_point.items()
            if name in self.validity and not self.validity[name][0] <= value <= self.validity[name][1]
        ]

    def transferred(self) -> CostModel:
        """Return the model as it holds on another board of the same kind: flagged, and 5 % wider."""
        wider = {
            name: replace(term, sd=((term.sd or 0.0) ** 2 + (0.05 * term.value) ** 2) ** 0.5)
            for name, term in self.terms.items()
        }
        return replace(self, terms=wider, flags=(*self.flags, "transferred"))
