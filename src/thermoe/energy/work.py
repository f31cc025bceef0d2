"""What a forward does, counted from shapes and routing: bytes of weights read, operations, tokens, layers.

PyTorch's own counter sees nothing in grouped matrix products, so the counts come from the dispatch plan: a dense part
is read once per forward, an expert when at least one token uses it, and each token-expert pair costs its operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from thermoe.moe.experts import Experts
from thermoe.moe.layer import moe_layers

#: The dtype the prior was measured in; weights are counted at this width whatever this process computes in.
REFERENCE_BYTES_PER_WEIGHT = 2


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one MoE layer costs per unit of routing: bytes of an expert and operations of a token-expert pair."""

    num_experts: int
    bytes_per_expert: int
    flops_per_pair: int

    @classmethod
    def of(cls, experts: Experts) -> LayerWork:
        """Count the matrices of ``experts``: one multiply-add per weight and token; biases are left out everywhere."""
        weights = experts.flops_per_pair // 2
        return cls(experts.num_experts, weights * REFERENCE_BYTES_PER_WEIGHT, experts.flops_per_pair)


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one forward.

    Args:
        layers: MoE layers run.
        read_bytes: weights read.
        flops: floating-point operations of matrix products.
        layer_tokens: tokens times MoE layers, for what each token costs in a layer apart from its experts.
    """

    layers: float
    read_bytes: float
    flops: float
    layer_tokens: float

    @property
    def regressors(self) -> dict[str, float]:
        """The counts by the name of the cost term they multiply."""
        return {
            "layer_j": self.layers,
            "open_j_per_byte": self.read_bytes,
            "pair_j_per_flop": self.flops,
            "token_j": self.layer_tokens,
        }


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
            layers.append(LayerWork.of(experts))
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        products = {id(output.weight)} if output is not None else set()
        lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - products
        weights = sum(
            p.numel()
            for p in model.parameters()
            if p.ndim >= 2 and id(p) not in expert_parameters and id(p) not in lookups
        )
        return cls(weights * REFERENCE_BYTES_PER_WEIGHT, 2 * weights, tuple(layers))

    def step(self, tokens: int, pairs: Sequence[float], opened: Sequence[float]) -> StepWork:
        """Return the work of one forward.

        Args:
            tokens: tokens of the forward.
            pairs: token-expert pairs per MoE layer.
            opened: distinct experts per MoE layer.
        """
        read_bytes, flops = float(self.shared_bytes), float(self.shared_flops_per_token) * tokens
        for layer, layer_pairs, layer_opened in zip(self.layers, pairs, opened, strict=True):
            read_bytes += layer.bytes_per_expert * layer_opened
            flops += layer.flops_per_pair * layer_pairs
        return StepWork(len(self.layers), read_bytes, flops, float(tokens * len(self.layers)))
