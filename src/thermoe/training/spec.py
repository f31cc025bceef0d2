"""The configuration of `thermoe train`: nested dataclasses, YAML presets and files, dotted overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thermoe.config import apply_overrides, apply_tree, packaged_names, read_packaged, read_yaml_file, within
from thermoe.errors import ConfigError, UnknownNameError
from thermoe.models.convert import METHODS
from thermoe.routers import swap  # noqa: F401  (fills the registry)
from thermoe.routers.base import ROUTERS
from thermoe.training.settings import MAX_SEED, TrainSettings

DEVICES = ("auto", "cpu", "cuda", "mps")
BLOCKS = ("moe", "dense", "mixtral")
FRAMES = ("gpt2",)
REPORTERS = ("tensorboard", "wandb", "trackio")
#: What `distill.teacher` calls the model before its conversion.
DENSE = "dense"


@dataclass(kw_only=True, slots=True)
class DataSettings:
    """Texts: local files, .txt or .txt.xz, or the embedded prose.

    Args:
        train: files; ``None`` is the embedded novels.
        validation: files; ``None`` is the embedded held-out novel, or with files in ``train`` their tail.
        heldout_frac: share of the training tokens that is held out at their end when it is.
        heldout_sequences: most sequences read in a validation; 0 is all.
    """

    train: list[str] | None = None
    validation: list[str] | None = None
    heldout_frac: float = 0.02
    heldout_sequences: int = 256


@dataclass(kw_only=True, slots=True)
class TokenizerSettings:
    """The tokenizer.

    Args:
        path: a local folder with tokenizer.json, or vocab.json and merges.txt; ``None`` takes that of
            `model.from_pretrained`, or trains one on the training text.
        vocab_size: of the one that is trained (byte-level BPE).
    """

    path: str | None = None
    vocab_size: int = 2048


@dataclass(kw_only=True, slots=True)
class ConvertSettings:
    """Conversion of a loaded dense model; see `thermoe.convert_to_moe`.

    Args:
        method: partition, copy or virtual; ``None`` converts nothing.
        num_experts: experts per layer.
        top_k: experts per token; ``None`` is the method's own default.
        neurons: contiguous or clustered.
        shared_size: neurons of an always-on part (partition).
        groups: shards (virtual).
    """

    method: str | None = None
    num_experts: int = 8
    top_k: int | None = None
    neurons: str = "contiguous"
    shared_size: int = 0
    groups: int | None = None


@dataclass(kw_only=True, slots=True)
class ModelSettings:
    """A new model, or a loaded one.

    Args:
        frame: what surrounds the feed-forward blocks: gpt2.
        block: moe (ours), dense (as wide as the experts of one token), or mixtral (that of transformers).
        hidden_size: D.
        layers: blocks.
        heads: attention heads.
        sequence_length: tokens per sequence; of a loaded model too.
        num_experts: E.
        top_k: experts per token.
        expert_width: neurons of one expert.
        gated: SwiGLU experts, or ungated ones.
        pad_vocab_to: the embedding of a new model has a multiple of this many rows; 64 suits the matrix products of a
            GPU (GPT-2's 50257 tokens become 50304, and a step takes a third less time).
        from_pretrained: folder of a saved model to train instead of a new one; the sizes above then do not count.
        convert: see its class.
    """

    frame: str = "gpt2"
    block: str = "moe"
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    sequence_length: int = 128
    num_experts: int = 8
    top_k: int = 2
    expert_width: int = 192
    gated: bool = True
    pad_vocab_to: int = 1
    from_pretrained: str | None = None
    convert: ConvertSettings = field(default_factory=ConvertSettings)


@dataclass(kw_only=True, slots=True)
class RouterSettings:
    """The routers.

    Args:
        name: a registered router; ``None`` is the baseline for a new model, and leaves those of a loaded one.
        options: of the router, such as {capacity_factor: 1.25}.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class DistillSettings:
    """Distillation from a dense model.

    Args:
        teacher: folder of a saved dense model, "dense" for the one that is converted, or ``None`` for no teacher.
        kl: weight of KL(teacher || student) per token.
        layer_mse: weight of the relative squared error of the layers' outputs.
        lm: weight of the language-modelling loss beside them.
    """

    teacher: str | None = None
    kl: float = 1.0
    layer_mse: float = 0.1
    lm: float = 0.0


@dataclass(kw_only=True, slots=True)
class TrainSpec:
    """A training from texts to a saved model.

    Args:
        seed: of everything random; `training.seed` is added to it.
        device: auto, cpu, cuda or mps.
        telemetry: auto, off, or the name of a source.
        report_to: none, tensorboard, wandb, trackio, or all of these that are installed.
        data, tokenizer, model, router, training, distill: see their classes.
    """

    seed: int = 0
    device: str = "auto"
    telemetry: str = "auto"
    report_to: str = "none"
    data: DataSettings = field(default_factory=DataSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)

    def check(self) -> None:
        """Raise a ConfigError for values that do not go together; no file is looked at."""
        for key, value, options in (
            ("device", self.device, DEVICES),
            ("report_to", self.report_to, ("none", "all", *REPORTERS)),
            ("model.frame", self.model.frame, FRAMES),
            ("model.block", self.model.block, BLOCKS),
        ):
            if value not in options:
                raise UnknownNameError.of(key.rpartition(".")[2], value, options, where=key)
        self.training.check("training")
        within("seed", self.seed, 0, MAX_SEED - 1 - self.training.seed)
        self._check_sizes()
        self._check_sources()
        if self.router.name is not None:
            ROUTERS.get(self.router.name, where="router.name")
        for name in ("kl", "layer_mse", "lm"):
            within(f"distill.{name}", getattr(self.distill, name), 0.0)

    def _check_sizes(self) -> None:
        model = self.model
        within("tokenizer.vocab_size", self.tokenizer.vocab_size, 257)  # 256 bytes and the end of a text
        for name in ("hidden_size", "layers", "heads", "num_experts", "expert_width", "pad_vocab_to"):
            within(f"model.{name}", getattr(model, name), 1)
        within("model.sequence_length", model.sequence_length, 2)  # the second token is the first predicted
        within("model.top_k", model.top_k, 1, model.num_experts)
        within("data.heldout_sequences", self.data.heldout_sequences, 0)
        if not 0 < self.data.heldout_frac < 1:
            raise ConfigError(
                f"heldout_frac is {self.data.heldout_frac}",
                where="data.heldout_frac",
                accepted="a number above 0 and below 1",
                fix="use 0.02, or name files in data.validation",
            )
        if model.hidden_size % model.heads:
            raise ConfigError(
                f"hidden_size {model.hidden_size} cannot be divided among {model.heads} heads",
                where="model.heads",
                accepted="a divisor of model.hidden_size",
                fix="change model.heads or model.hidden_size",
            )

    def _check_sources(self) -> None:
        model = self.model
        for name, given in (("train", self.data.train), ("validation", self.data.validation)):
            if given is not None and not given:
                raise ConfigError(
                    f"data.{name} is an empty list",
                    where=f"data.{name}",
                    accepted="at least one file, or null",
                    fix=f"name a file: --set data.{name}=[FILE.txt]",
                )
        others = [name for name, value in self.training.balance.items() if value > 0 and name != "switch"]
        if model.block == "mixtral" and model.from_pretrained is None and others:
            raise ConfigError(
                f"the loss {others[0]!r} has no form for the block of transformers",
                where="training.balance",
                accepted="switch alone; it is computed by Mixtral's own loss",
                fix="use --set 'training.balance={switch: 0.01}'",
            )
        if model.convert.method is not None and model.convert.method not in METHODS:
            raise UnknownNameError.of("conversion method", model.convert.method, METHODS, where="model.convert.method")
        if model.convert.method is not None and model.from_pretrained is None:
            raise ConfigError(
                "there is no model to convert",
                where="model.from_pretrained",
                accepted="the folder of a saved dense model",
                fix="add --set model.from_pretrained=FOLDER, for example the folder `model` of an earlier run",
            )
        if self.distill.teacher == DENSE and model.convert.method is None:
            raise ConfigError(
                "the teacher is the model before its conversion, and nothing is converted",
                where="distill.teacher",
                accepted="the folder of a saved dense model, or null",
                fix="set model.convert.method, or name a folder",
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the resolved configuration for the manifest."""
        return dataclasses.asdict(self)


def preset_names() -> list[str]:
    """Return the names of the presets of `thermoe train`."""
    return packaged_names("training", "presets")


def load_spec(preset: str | None = None, config: Path | None = None, overrides: Sequence[str] = ()) -> TrainSpec:
    """Return the preset, or the file, with ``key.path=value`` overrides applied; `cpu-small` when neither is given.

    Raises:
        UnknownNameError: no such preset.
        ConfigError: both are given, a file cannot be read, or a key or value is not accepted.
    """
    if preset is not None and config is not None:
        raise ConfigError(
            f"both the preset {preset!r} and the file {config} are given",
            where="--preset, --config",
            accepted="one of them",
            fix="leave one out; single settings change with --set",
        )
    spec = TrainSpec()
    named = preset or "cpu-small"
    apply_tree(spec, read_yaml_file(config) if config is not None else read_packaged(named, "training", "presets"))
    apply_overrides(spec, overrides, example="training.lr=1e-3")
    spec.check()
    return spec
