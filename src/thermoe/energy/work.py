"""What a forward does, counted from shapes and routing: bytes of weights read, operations, tokens, layers.

PyTorch's own counter sees nothing in grouped matrix products, so the counts come from the dispatch plan: a dense part
is read once per forward, an expert when at least one token uses it, and each token-expert pair costs its operations.

A model in one dtype counts every weight at the width of the prior. Where layers of experts differ in it, each counts at
its own, in proportion; what neither shape nor dtype shows is declared (`read_cost.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from thermoe.energy.read_cost import ReadCost, read_factors
from thermoe.errors import ConfigError
from thermoe.moe.experts import Experts, one_of_all
from thermoe.moe.layer import MoELayer, routed_modules

#: The dtype the prior was measured in; weights are counted at this width whatever dtype a model has most of.
REFERENCE_BYTES_PER_WEIGHT = 2
#: One number for a whole layer, or one for each of its experts.
Counts = float | Sequence[float]


@dataclass(frozen=True, slots=True, init=False)
class LayerWork:
    """What one MoE layer costs per unit of routing: bytes of an expert and operations of a token-expert pair.

    Args:
        num_experts: E.
        bytes_per_expert: weights read when an expert is opened, in bytes of the usual cost; one number for all, or one
            for each.
        flops_per_pair: operations of one token in an expert; likewise.
    """

    bytes_by_expert: tuple[float, ...]
    flops_by_expert: tuple[int, ...]

    def __init__(
        self, num_experts: int, bytes_per_expert: float | Sequence[float], flops_per_pair: int | Sequence[int]
    ) -> None:
        for name, given in (("bytes_by_expert", bytes_per_expert), ("flops_by_expert", flops_per_pair)):
            values = (given,) * num_experts if not isinstance(given, Sequence) else tuple(given)
            if len(values) != num_experts:
                raise ConfigError(
                    f"{len(values)} numbers for {num_experts} experts",
                    where=f"LayerWork.{name}",
                    accepted="one number for all experts, or one for each",
                    fix="use LayerWork.of(experts)",
                )
            object.__setattr__(self, name, values)

    @classmethod
    def of(cls, experts: Experts) -> LayerWork:
        """Count the matrices of ``experts``: one multiply-add per weight and token; biases are left out everywhere."""
        flops = experts.flops_per_pair_by_expert
        return cls(experts.num_experts, [f // 2 * REFERENCE_BYTES_PER_WEIGHT for f in flops], flops)

    @classmethod
    def of_native(cls, experts: nn.Module) -> LayerWork:
        """Count the experts of a Hugging Face MoE, stored as stacks (E, in, out) or (E, out, in) of matrices."""
        stacks = [p for p in experts.parameters() if p.ndim == 3]
        if not stacks:
            raise ConfigError(
                f"{type(experts).__name__} holds no stack of expert weights",
                where="ModelWork.of",
                accepted="experts with parameters of shape (E, in, out), as transformers 5 stores them",
                fix="count this model by hand with ModelWork(...)",
            )
        weights = sum(p[0].numel() for p in stacks)
        return cls(stacks[0].shape[0], weights * REFERENCE_BYTES_PER_WEIGHT, 2 * weights)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.bytes_by_expert)

    @property
    def bytes_per_expert(self) -> float:
        """Bytes of one expert; a `ConfigError` where they differ."""
        return one_of_all(self.bytes_by_expert, "bytes_per_expert", "bytes_by_expert")

    @property
    def flops_per_pair(self) -> int:
        """Operations of one pair; a `ConfigError` where they differ."""
        return one_of_all(self.flops_by_expert, "flops_per_pair", "flops_by_expert")

    def read_at(self, factors: Sequence[float]) -> LayerWork:
        """Return the work where a byte of each expert costs so many times what it does here."""
        if all(factor == 1 for factor in factors):
            return self
        read = [count * factor for count, factor in zip(self.bytes_by_expert, factors, strict=True)]
        return LayerWork(self.num_experts, read, self.flops_by_expert)

    def read_bytes(self, opened: Counts) -> float:
        """Return the bytes read to open experts: how many of them, or for each expert how often."""
        return _total(self.bytes_by_expert, opened, "opened")

    def pair_flops(self, pairs: Counts) -> float:
        """Return the operations of token-expert pairs: how many of them, or how many for each expert."""
        return _total(self.flops_by_expert, pairs, "pairs")


def _total(each: tuple[float, ...], counts: Counts, name: str) -> float:
    if not isinstance(counts, Sequence):
        if len(set(each)) != 1:
            raise ConfigError(
                f"{name} is one number, {counts}, for a layer whose experts differ",
                where=name,
                accepted=f"{len(each)} numbers, one for each expert",
                fix="take them from RoutingDecision.counts, or RoutingDecision.opened",
            )
        return each[0] * counts
    if len(counts) != len(each):
        raise ConfigError(
            f"{name} has {len(counts)} numbers for {len(each)} experts",
            where=name,
            accepted=f"{len(each)} numbers, one for each expert",
            fix="give the counts of this layer",
        )
    return float(sum(unit * count for unit, count in zip(each, counts, strict=True)))


@dataclass(frozen=True, slots=True)
class StepWork:
    """The work of one forward.

    Args:
        layers: MoE layers run.
        read_bytes: weights read, in bytes of the usual cost.
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
    def of(cls, model: nn.Module, *, read_cost: ReadCost | None = None) -> ModelWork:
        """Count the work of ``model`` from its parameters, one layer for each of `routed_modules`.

        Matrices outside the experts count once; a tied embedding counts as the output projection it is; embedding
        look-ups that are not tied, norms and biases are left out. The experts of an attached router are those of the
        block around it; a block that keeps a router of its own counts as if every token took all its experts.

        Where the experts of some layers are stored wider or narrower than most, their bytes count in proportion; the
        width that most expert weights have, of equally many the first, is the reference. Operations count alike.

        Args:
            model: with routed modules or without.
            read_cost: by name of a layer, how many times the usual cost a byte of its experts is: a number, or one for
                each of them. 0.5 for experts kept in half the bytes, 8 for a memory that costs eight times as much.

        Raises:
            ConfigError: the experts cannot be counted, or ``read_cost`` does not fit the model.
        """
        layers: dict[str, LayerWork] = {}
        experts: list[nn.Module] = []
        for name, module in routed_modules(model):
            if isinstance(module, MoELayer):
                experts.append(module.experts)
                layers[name] = LayerWork.of(module.experts)
            else:
                experts.append(model.get_submodule(f"{name.rpartition('.')[0]}.experts".lstrip(".")))
                layers[name] = LayerWork.of_native(experts[-1])
        expert_parameters = {id(p) for module in experts for p in module.parameters()}
        declared = read_factors(read_cost, {name: layer.num_experts for name, layer in layers.items()})
        counted = tuple(
            layer.read_at([width * factor for factor in factors])
            for layer, width, factors in zip(layers.values(), _relative_widths(experts), declared, strict=True)
        )
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        products = {id(output.weight)} if output is not None else set()
        lookups = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - products
        weights = sum(
            p.numel()
            for p in model.parameters()
            if p.ndim >= 2 and id(p) not in expert_parameters and id(p) not in lookups
        )
        return cls(weights * REFERENCE_BYTES_PER_WEIGHT, 2 * weights, counted)

    def step(self, tokens: int, pairs: Sequence[Counts], opened: Sequence[Counts]) -> StepWork:
        """Return the work of one forward.

        Args:
            tokens: tokens of the forward.
            pairs: per MoE layer the token-expert pairs: how many, or how many for each expert.
            opened: per MoE layer the distinct experts: how many, or for each expert how often.

        Raises:
            ConfigError: one number for a layer whose experts differ, or not one for each expert.
        """
        read_bytes, flops = float(self.shared_bytes), float(self.shared_flops_per_token) * tokens
        for layer, layer_pairs, layer_opened in zip(self.layers, pairs, opened, strict=True):
            read_bytes += layer.read_bytes(layer_opened)
            flops += layer.pair_flops(layer_pairs)
        return StepWork(len(self.layers), read_bytes, flops, float(tokens * len(self.layers)))


def _relative_widths(layers: Sequence[nn.Module]) -> list[float]:
    """Return the bytes of a weight in the matrices of each layer of experts, relative to the width that most have."""
    found = [Counter[int]() for _ in layers]
    for widths, experts in zip(found, layers, strict=True):
        for p in experts.parameters():
            if p.ndim == 3:
                widths[p.element_size()] += p.numel()
    most = sum(found, Counter[int]()).most_common(1)
    # Experts that keep no matrix as a parameter show no width: it is declared, or the usual one.
    return [sum(b * n for b, n in w.items()) / w.total() / most[0][0] if w else 1.0 for w in found]
