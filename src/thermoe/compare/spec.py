"""The configuration of a comparison: nested dataclasses, YAML presets, dotted overrides; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from thermoe.config import apply_overrides, apply_tree, packaged_names, read_packaged, within
from thermoe.errors import ConfigError, UnknownNameError
from thermoe.evaluation import MAX_SUBSETS
from thermoe.models.convert import METHODS
from thermoe.moe.dispatch import DROP_ORDERS
from thermoe.training.settings import MAX_SEED, TrainSettings

DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(kw_only=True, slots=True)
class DataSettings:
    """Texts: files of one's own, or ``None`` for the embedded prose and the standard library's code."""

    prose: str | None = None
    code: str | None = None
    code_bytes: int = 1_200_000
    heldout_sequences: int = 128


@dataclass(kw_only=True, slots=True)
class ModelSettings:
    """The dense GPT-2 and its tokenizer."""

    vocab_size: int = 2048
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    sequence_length: int = 128


@dataclass(kw_only=True, slots=True)
class MoESettings:
    """The conversion."""

    num_experts: int = 8
    top_k: int = 4
    method: str = "partition"
    capacity_factor: float | None = 1.5
    drop_order: str = "probability"
    temperature: float | None = None


@dataclass(kw_only=True, slots=True)
class StreamSettings:
    """The stream prose -> code -> prose that every arm reads."""

    batches_per_segment: int = 16
    batch_size: int = 16


@dataclass(kw_only=True, slots=True)
class PriceSettings:
    """The fixed price of the energy-aware router: ``value`` if given, else the price that holds ``pairs_frac``.

    Args:
        value: price per unit of relative cost.
        pairs_frac: share of the baseline's token-expert pairs that the price leaves on held-out prose.
        k_min: experts every token keeps.
    """

    value: float | None = None
    pairs_frac: float = 0.6
    k_min: int = 1


@dataclass(kw_only=True, slots=True)
class AdaptSettings:
    """Test-time training of the routers."""

    lr: float = 1e-2
    anchor: float = 0.9
    family: str = "full"


@dataclass(kw_only=True, slots=True)
class AccuracySettings:
    """Routing accuracy: batches judged per segment, and the tolerance."""

    batches: int = 1
    tau: float = 0.01


def _recovery_settings() -> TrainSettings:
    return TrainSettings(steps=150, lr=1e-3, warmup_steps=10, random_k=True, ramp_frac=0.5, save_every=50, seed=1)


@dataclass(kw_only=True, slots=True)
class CompareSpec:
    """A comparison from texts to verdicts.

    Args:
        seed: of everything random; `training.seed` and `recovery.seed` are added to it in their phases.
        device: auto, cpu, cuda or mps.
        telemetry: auto, off, or the name of a source.
        data, model, training, moe, recovery, stream, price, adapt, accuracy: see their classes.
        arms: names of arms, in the order in which they are run and compared.
    """

    seed: int = 0
    device: str = "auto"
    telemetry: str = "auto"
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    moe: MoESettings = field(default_factory=MoESettings)
    recovery: TrainSettings = field(default_factory=_recovery_settings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    price: PriceSettings = field(default_factory=PriceSettings)
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    accuracy: AccuracySettings = field(default_factory=AccuracySettings)
    arms: list[str] = field(default_factory=lambda: ["dense", "baseline", "priced", "adapted"])

    def check(self) -> None:
        """Raise a ConfigError for values that do not go together."""
        if self.device not in DEVICES:
            raise ConfigError(
                f"the device is {self.device!r}",
                where="device",
                accepted=", ".join(DEVICES),
                fix="to choose one of several GPUs, set the environment variable CUDA_VISIBLE_DEVICES",
            )
        self.training.check("training")
        self.recovery.check("recovery")
        self._check_ranges()
        self._check_conversion()
        self._check_price()
        self._check_arms()

    def _check_ranges(self) -> None:
        within("seed", self.seed, 0, MAX_SEED - 1 - max(self.training.seed, self.recovery.seed))
        within("data.code_bytes", self.data.code_bytes, 1000)
        within("data.heldout_sequences", self.data.heldout_sequences, 1)
        within("model.vocab_size", self.model.vocab_size, 257)  # 256 bytes and the end of a text
        within("model.hidden_size", self.model.hidden_size, 1)
        within("model.layers", self.model.layers, 1)
        within("model.heads", self.model.heads, 1)
        within("model.sequence_length", self.model.sequence_length, 2)  # the second token is the first predicted
        within("stream.batches_per_segment", self.stream.batches_per_segment, 1)
        within("stream.batch_size", self.stream.batch_size, 1)
        within("accuracy.batches", self.accuracy.batches, 0)
        within("accuracy.tau", self.accuracy.tau, 0.0)
        within("adapt.lr", self.adapt.lr, 0.0)
        if not 0 < self.adapt.anchor <= 1:
            raise ConfigError(
                f"adapt.anchor is {self.adapt.anchor}",
                where="adapt.anchor",
                accepted="a number above 0 and at most 1",
                fix="1 is no pull back to the trained router",
            )
        if self.model.hidden_size % self.model.heads:
            raise ConfigError(
                f"hidden_size {self.model.hidden_size} cannot be divided among {self.model.heads} heads",
                where="model.heads",
                accepted="a divisor of model.hidden_size",
                fix="change model.heads or model.hidden_size",
            )

    def _check_conversion(self) -> None:
        moe = self.moe
        if moe.method not in METHODS:
            raise UnknownNameError.of("conversion method", moe.method, METHODS, where="moe.method")
        if moe.drop_order not in DROP_ORDERS:
            raise UnknownNameError.of("drop order", moe.drop_order, DROP_ORDERS, where="moe.drop_order")
        for name, value in (("capacity_factor", moe.capacity_factor), ("temperature", moe.temperature)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(
                    f"moe.{name} is {value}",
                    where=f"moe.{name}",
                    accepted="a finite number above 0, or null",
                    fix="null switches it off",
                )
        within("moe.num_experts", moe.num_experts, 1)
        if not 1 <= moe.top_k <= moe.num_experts:
            raise ConfigError(
                f"top_k is {moe.top_k} with {moe.num_experts} experts",
                where="moe.top_k",
                accepted=f"an integer from 1 to {moe.num_experts}",
                fix="lower moe.top_k or raise moe.num_experts",
            )
        neurons = 4 * self.model.hidden_size
        if moe.method == "partition" and neurons % moe.num_experts:
            divisors = [n for n in range(2, min(neurons, 128) + 1) if neurons % n == 0]
            raise ConfigError(
                f"{moe.num_experts} experts do not divide the {neurons} neurons of the feed-forward network",
                where="moe.num_experts",
                accepted="a divisor of 4 * model.hidden_size: " + ", ".join(map(str, divisors)),
                fix=f"use moe.num_experts={min(divisors, key=lambda n: abs(n - moe.num_experts))}",
            )
        subsets = max(math.comb(moe.num_experts, k) for k in range(1, moe.top_k + 1))
        if self.accuracy.batches and subsets > MAX_SUBSETS:
            raise ConfigError(
                f"{moe.num_experts} experts have {subsets} subsets of up to {moe.top_k}, too many to find the best one",
                where="moe.top_k",
                accepted=f"at most {MAX_SUBSETS} subsets of one size",
                fix="lower moe.top_k or moe.num_experts, or set accuracy.batches=0 to leave routing accuracy out",
            )

    def _check_price(self) -> None:
        price, top_k = self.price, self.moe.top_k
        within("price.k_min", price.k_min, 0, top_k)
        if price.value is not None:
            within("price.value", price.value, 0.0)
        elif not price.k_min / top_k <= price.pairs_frac <= 1 or price.pairs_frac == 0:
            raise ConfigError(
                f"pairs_frac is {price.pairs_frac} with k_min {price.k_min} and top_k {top_k}",
                where="price.pairs_frac",
                accepted=f"{price.k_min / top_k:.3g} to 1" if price.k_min else "above 0 and at most 1",
                fix="raise price.pairs_frac, lower price.k_min, or give price.value",
            )

    def _check_arms(self) -> None:
        if not self.arms or len(set(map(str, self.arms))) < len(self.arms):
            raise ConfigError(
                f"the arms are {self.arms}",
                where="arms",
                accepted="at least one arm, each once",
                fix="thermoe list arms prints the names",
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration for the manifest."""
        return dataclasses.asdict(self)


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return packaged_names("compare", "presets")


def load_spec(preset: str = "demo", overrides: typing.Sequence[str] = ()) -> CompareSpec:
    """Return the preset with ``key.path=value`` overrides applied.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: an unknown key (with the near match), a value of the wrong type, or values that do not fit.
    """
    spec = CompareSpec()
    apply_tree(spec, read_packaged(preset, "compare", "presets"))
    apply_overrides(spec, overrides, example="moe.num_experts=16")
    spec.check()
    return spec
