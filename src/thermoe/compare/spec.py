"""The configuration of a comparison: nested dataclasses, YAML presets, dotted overrides; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml

from thermoe.errors import ConfigError, UnknownNameError, near_match
from thermoe.training import TrainSettings


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
    bias_only: bool = False


@dataclass(kw_only=True, slots=True)
class AccuracySettings:
    """Routing accuracy: batches judged per segment, and the tolerance."""

    batches: int = 1
    tau: float = 0.01


def _recovery_settings() -> TrainSettings:
    return TrainSettings(steps=150, lr=1e-3, warmup_steps=10, random_k=True, ramp_frac=0.5, save_every=50)


@dataclass(kw_only=True, slots=True)
class CompareSpec:
    """A comparison from texts to verdicts."""

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
        self.training.check("training")
        self.recovery.check("recovery")
        positive = (
            ("data.code_bytes", self.data.code_bytes),
            ("data.heldout_sequences", self.data.heldout_sequences),
            ("model.layers", self.model.layers),
            ("model.sequence_length", self.model.sequence_length),
            ("stream.batches_per_segment", self.stream.batches_per_segment),
            ("stream.batch_size", self.stream.batch_size),
            ("accuracy.batches", self.accuracy.batches),
        )
        for where, value in positive:
            if value < 1:
                raise ConfigError(f"{where} is {value}", where=where, accepted="an integer of at least 1")
        if self.model.heads < 1 or self.model.hidden_size % self.model.heads:
            raise ConfigError(
                f"hidden_size {self.model.hidden_size} cannot be divided among {self.model.heads} heads",
                where="model.heads",
                accepted="a divisor of model.hidden_size",
            )
        if not 1 <= self.moe.top_k <= self.moe.num_experts:
            raise ConfigError(
                f"top_k is {self.moe.top_k} with {self.moe.num_experts} experts",
                where="moe.top_k",
                accepted=f"an integer from 1 to {self.moe.num_experts}",
                fix="lower moe.top_k or raise moe.num_experts",
            )
        if (4 * self.model.hidden_size) % self.moe.num_experts:
            raise ConfigError(
                f"{self.moe.num_experts} experts do not divide the {4 * self.model.hidden_size} neurons of the "
                "feed-forward network",
                where="moe.num_experts",
                accepted="a divisor of 4 * model.hidden_size",
                fix="use moe.num_experts=8",
            )
        if not 0 < self.price.pairs_frac <= 1:
            raise ConfigError(
                f"pairs_frac is {self.price.pairs_frac}", where="price.pairs_frac", accepted="above 0 and at most 1"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration for the manifest."""
        return dataclasses.asdict(self)


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    folder = files("thermoe").joinpath("compare", "presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_spec(preset: str = "demo", overrides: typing.Sequence[str] = ()) -> CompareSpec:
    """Return the preset with ``key.path=value`` overrides applied.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: an unknown key (with the near match), a value of the wrong type, or values that do not fit.
    """
    if preset not in preset_names():
        raise UnknownNameError.of("preset", preset, preset_names(), where="--preset")
    text = files("thermoe").joinpath("compare", "presets", f"{preset}.yaml").read_text(encoding="utf-8")
    spec = CompareSpec()
    for path, value in _flatten(yaml.safe_load(text) or {}):
        _assign(spec, path, value)
    for override in overrides:
        path, separator, raw = override.partition("=")
        if not separator:
            raise ConfigError(
                f"{override!r} sets nothing",
                where="--set",
                accepted="key.path=value, for example moe.num_experts=16",
            )
        _assign(spec, path.strip(), yaml.safe_load(raw))
    spec.check()
    return spec


def _flatten(tree: dict[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and key != "balance":
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _keys(spec: Any, prefix: str = "") -> typing.Iterator[str]:
    for entry in dataclasses.fields(spec):
        value = getattr(spec, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}"


def _assign(spec: CompareSpec, path: str, value: Any) -> None:
    """Set one dotted key, after checking that it exists and that the value has its type."""
    owner: Any = spec
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent, None) if dataclasses.is_dataclass(owner) else None
    known = {entry.name for entry in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    if name not in known or dataclasses.is_dataclass(getattr(owner, name)):
        keys = list(_keys(spec))
        near = near_match(path, keys)
        raise ConfigError(
            f"unknown configuration key {path!r}",
            where=path,
            accepted=", ".join(keys),
            fix=f"did you mean {near!r}?" if near else "choose one of the accepted keys",
        )
    hint = typing.get_type_hints(type(owner))[name]
    setattr(owner, name, _coerce(path, value, hint))


def _coerce(path: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is type(None) and value is None:
            return None
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if kind is float and isinstance(value, str):  # YAML reads 1e-3 as a string
            try:
                return float(value)
            except ValueError:
                continue
        if kind in (int, str, bool, list, dict) and type(value) is kind:
            return value
    names = " or ".join(
        "null" if o is type(None) else getattr(typing.get_origin(o) or o, "__name__", str(o)) for o in options
    )
    raise ConfigError(f"{path} is {value!r}", where=path, accepted=names)
