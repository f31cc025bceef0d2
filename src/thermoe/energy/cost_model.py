"""Joules of a forward from what it does: weights read and operations done.

    E_forward = open_j_per_byte * (bytes of weights read) + pair_j_per_flop * (floating-point operations)

A dense part is read once per forward; an expert is read when at least one token uses it; each token-expert pair costs
its operations. The prior was fitted to energy-counter readings of one NVIDIA H200 running Mixture-of-Experts layers of
the OLMoE shape (64 experts of 2048 x 1024, gated, bfloat16, grouped products in CUDA graphs): 2.89 mJ per opened expert
of 12.6 MB and 0.028 mJ per token-expert pair of 12.6 MFLOP. These are gross marginal costs: the static power of the
time that the work takes is part of them. On any other machine, and for any other shape, the result is an estimate, and
it always says so. Experts of the same shape share one cost.

What it leaves out: attention scores, normalisation, activations, kernel launches. Launches dominate in small models run
without CUDA graphs, so for these it says how work compares, not what a meter would read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from thermoe.moe.layer import moe_layers
from thermoe.results import Provenance

#: The dtype the prior was measured in; weights are counted at this width whatever this process computes in.
REFERENCE_BYTES_PER_WEIGHT = 2


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one MoE layer costs per unit of routing: bytes of an expert and operations of a token-expert pair."""

    num_experts: int
    bytes_per_expert: int
    flops_per_pair: int


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model does per forward apart from routing, and its MoE layers.

    Args:
        shared_bytes: weights outside the experts that matrix products read, once per forward.
        shared_flops_per_token: operations of these products per token.
        layers: one entry per MoE layer.
    """

    shared_bytes: int
    shared_flops_per_token: int
    layers: tuple[LayerWork, ...]

    @classmethod
    def of(cls, model: nn.Module) -> ModelWork:
        """Count the work of ``model`` from its parameters.

        Matrices outside the experts count once; a tied embedding counts as the output projection it is; embedding
        look-ups that are not tied, norms and biases are left out.
        """
        layers: list[LayerWork] = []
        expert_parameters: set[int] = set()
        for _, layer in moe_layers(model):
            experts = layer.experts
            expert_parameters.update(id(p) for p in experts.parameters())
            layers.append(
                LayerWork(
                    experts.num_experts,
                    experts.flops_per_pair // 2 * REFERENCE_BYTES_PER_WEIGHT,  # one multiply-add per weight
                    experts.flops_per_pair,
                )
            )
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        products = {id(output.weight)} if output is not None else set()
        lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - products
        weights = sum(
            p.numel()
            for p in model.parameters()
            if p.ndim >= 2 and id(p) not in expert_parameters and id(p) not in lookups
        )
        return cls(weights * REFERENCE_BYTES_PER_WEIGHT, 2 * weights, tuple(layers))


@dataclass(frozen=True, slots=True)
class CostModel:
    """Coefficients, and where they come from.

    Args:
        open_j_per_byte: joules per byte of weights read.
        pair_j_per_flop: joules per floating-point operation.
        basis: "prior", or "calibrated" when fitted on this machine.
        provenance: of every joule it returns; a modelled joule is "estimated" even when calibrated.
        reference: what the coefficients were measured on.
    """

    open_j_per_byte: float
    pair_j_per_flop: float
    basis: str
    reference: str
    provenance: Provenance = "estimated"

    @classmethod
    def prior(cls) -> CostModel:
        """Return the cost model of the reference device."""
        expert_bytes = 3 * 2048 * 1024 * REFERENCE_BYTES_PER_WEIGHT
        pair_flops = 2 * 3 * 2048 * 1024
        return cls(
            open_j_per_byte=2.89e-3 / expert_bytes,
            pair_j_per_flop=0.028e-3 / pair_flops,
            basis="prior",
            reference="one NVIDIA H200, bfloat16, OLMoE-shaped layers, gross; not this machine",
        )

    def describe(self) -> dict[str, Any]:
        """Return what a manifest keeps."""
        return {
            "basis": self.basis,
            "provenance": self.provenance,
            "reference": self.reference,
            "terms": {
                "open_j_per_byte": {"value": self.open_j_per_byte, "unit": "J/byte"},
                "pair_j_per_flop": {"value": self.pair_j_per_flop, "unit": "J/FLOP"},
            },
        }

    def open_cost_j(self, layer: LayerWork) -> float:
        """Joules to open one expert of ``layer``."""
        return self.open_j_per_byte * layer.bytes_per_expert

    def pair_cost_j(self, layer: LayerWork) -> float:
        """Joules of one token in one expert of ``layer``."""
        return self.pair_j_per_flop * layer.flops_per_pair

    def forward_j(
        self, work: ModelWork, tokens: int, pairs: Sequence[float], opened: Sequence[float], *, passes: float = 1.0
    ) -> float:
        """Return the modelled joules of one forward.

        Args:
            work: the model.
            tokens: tokens of the forward.
            pairs: token-expert pairs per MoE layer.
            opened: distinct experts per MoE layer.
            passes: 1 for a forward; a backward to the activations reads and computes as much once more.
        """
        total = self.open_j_per_byte * work.shared_bytes + self.pair_j_per_flop * work.shared_flops_per_token * tokens
        for layer, layer_pairs, layer_opened in zip(work.layers, pairs, opened, strict=True):
            total += self.pair_cost_j(layer) * layer_pairs + self.open_cost_j(layer) * layer_opened
        return total * passes

    def relative_costs(self, layer: LayerWork) -> tuple[list[float], list[float]]:
        """Return (pair costs, opening costs) of the E experts in units of the mean pair cost, for a priced router."""
        ratio = self.open_cost_j(layer) / self.pair_cost_j(layer)
        return [1.0] * layer.num_experts, [ratio] * layer.num_experts
