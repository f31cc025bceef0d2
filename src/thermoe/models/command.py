"""`thermoe convert`: loads a dense checkpoint, converts and probes it, and saves the result whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto

from thermoe.errors import CheckpointError, ConfigError, ConversionError, MachineError, ThermoeError, UnknownNameError
from thermoe.models.card import describe_exactness, describe_layers, write_card
from thermoe.models.classes import AUTO_CLASSES, PREFIX
from thermoe.models.convert import METHODS, convert_to_moe
from thermoe.models.families import FAMILIES, family_of
from thermoe.models.measure import exactness, model_size
from thermoe.results import save_whole
from thermoe.routers.base import ROUTERS

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
#: Parameters of `convert_to_moe` that `--set` may not name.
OWN_OPTIONS = {
    "model": "MODEL",
    "num_experts": "--experts",
    "top_k": "--top-k",
    "method": "--method",
    "layers": "--layers",
    "router": "--router",
    "seed": "--seed",
}
PROBE_ROWS, PROBE_TOKENS = 2, 32


def parse_layers(text: str) -> list[int]:
    """Return the positions that ``text``, such as "0,2,5-7", names.

    Raises:
        ConfigError: it is no list of positions and ranges.
    """
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last) < 100_000)):
            raise ConfigError(
                f"{part.strip()!r} in {text!r} is no position and no range of positions",
                where="--layers",
                accepted="positions of blocks counted from 0 and ranges, such as 0,2,5-7",
                fix="leave --layers out to convert every block",
            )
        chosen += range(int(first), int(last or first) + 1)
    return chosen


def check_output(out: Path) -> Path:
    """Return the absolute path of ``out``, which must be absent or an empty folder.

    Raises:
        ConfigError: something is in the way.
    """
    whole = out.expanduser().resolve()
    full = whole.exists() and not (whole.is_dir() and not any(whole.iterdir()))
    if full:
        raise ConfigError(
            f"{out} is not empty" if whole.is_dir() else f"{out} is a file",
            where="OUT",
            accepted="a new or empty folder; nothing is ever overwritten",
            fix="name another folder, or remove this one",
        )
    return whole


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or model.endswith("/")


def find_model(model: str) -> str:
    """Return the folder or the name on the hub that ``model`` means."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                "the folder has no config.json",
                where=str(folder),
                accepted="a folder written by save_pretrained: config.json, weights and perhaps a tokenizer",
                fix="name the folder that holds config.json",
            )
        return str(folder)
    if folder.is_file() or _looks_like_path(model):
        raise ConfigError(
            f"{model} is {'a file' if folder.is_file() else 'no folder'}",
            where="MODEL",
            accepted="a folder written by save_pretrained, or the name of a model on the hub such as gpt2",
            fix="check the path",
        )
    return model


def unreadable(error: Exception, what: str, model: str) -> ThermoeError:
    """Return the error for a checkpoint that transformers could not read."""
    if isinstance(error, ThermoeError):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return MachineError(
            f"there is not enough memory to load {model}",
            where="MODEL",
            accepted="a model that fits into memory about three times",
            fix="use a machine with more memory, or a smaller model",
        )
    if not Path(model).is_dir() and isinstance(error, OSError) and "connect" in str(error):
        return MachineError(
            f"{model!r} is no folder here, is not in the cache, and the hub cannot be reached",
            where="MODEL",
            accepted="a local folder, a model in the cache, or a name on the hub with a network",
            fix="check the path or the network; a model copied to this machine can be given as a folder",
        )
    return CheckpointError(
        f"the {what} cannot be read: {reason}",
        where=model,
        accepted="a whole folder written by save_pretrained, or the name of a model on the hub",
        fix="copy or download the checkpoint again; --debug before the command shows where reading stopped",
    )


def load_config(model: str) -> Any:
    """Read the configuration and refuse what is no dense model of a known family, before any weights are read."""
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        known = "" if not Path(model).is_dir() else _model_type(Path(model))
        if known and known not in FAMILIES:
            raise UnknownNameError.of("architecture", known, FAMILIES, where="config.model_type") from error
        raise unreadable(error, "configuration", model) from error
    if str(config.model_type).startswith(PREFIX) or config.model_type not in FAMILIES:
        family_of(_Stub(config))  # type: ignore[arg-type]  # raises
    if getattr(config, "quantization_config", None):
        raise ConversionError(
            "the weights are quantised and cannot be divided among experts",
            where="config.quantization_config",
            accepted="float32, bfloat16 or float16 weights",
            fix="convert the model it was quantised from, and quantise the result",
        )
    return config


class _Stub:
    """Stands for a model of which only the configuration has been read."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def auto_class(config: Any) -> Any:
    """Return the Auto class that loads the architecture the configuration names; `AutoModel` if it names none.

    Raises:
        ConversionError: no Auto class that knows MoE models loads it.
    """
    names = list(getattr(config, "architectures", None) or [])
    if not names:
        return modeling_auto.AutoModel
    known: list[str] = []
    for name in AUTO_CLASSES:
        auto = getattr(modeling_auto, name)
        if type(config) not in auto._model_mapping:
            continue
        made = auto._model_mapping[type(config)]
        classes = [one.__name__ for one in (made if isinstance(made, tuple) else (made,))]
        if classes[0] == names[0]:
            return auto
        known.append(classes[0])
    raise ConversionError(
        f"no Auto class loads {names[0]}",
        where="config.architectures",
        accepted=", ".join(known),
        fix="load it in Python with its own class and call thermoe.convert_to_moe, or put one of the accepted names "
        "into config.json",
    )


def load_dense(model: str, config: Any) -> PreTrainedModel:
    """Load the dense model; a checkpoint that lacks weights is an error, not a model with random ones."""
    auto = auto_class(config)
    try:
        dense, info = auto.from_pretrained(model, output_loading_info=True)
    except Exception as error:
        raise unreadable(error, "checkpoint", model) from error
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} weights of {type(dense).__name__}, such as {names[0]}",
            where=model,
            accepted="a checkpoint with every weight; what is missing would be random",
            fix="copy or download it whole, or correct `architectures` in its config.json",
        )
    return dense.eval()


def load_tokenizer(model: str, *, otherwise: str = "") -> Any:
    """Return the tokenizer beside the model, or ``None`` if there is none.

    Args:
        model: a folder, or a name on the hub.
        otherwise: what else than mending it the command offers, for the error.

    Raises:
        CheckpointError: there is one, and it cannot be read.
    """
    if Path(model).is_dir() and not any((Path(model) / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:
        if not Path(model).is_dir() and isinstance(error, OSError):  # a model on the hub without one
            return None
        raise CheckpointError(
            f"the tokenizer cannot be read: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=model,
            accepted="tokenizer files that transformers.AutoTokenizer can load",
            fix="mend them or install what they need" + (f", or {otherwise}" if otherwise else ""),
        ) from error


def _probe(config: Any, seed: int) -> torch.Tensor:
    """Return random token ids of the model's vocabulary, (B, S)."""
    # Sequence classifiers without a padding token take one sequence at a time.
    rows = PROBE_ROWS if getattr(config, "pad_token_id", None) is not None else 1
    length = min(PROBE_TOKENS, max(1, int(getattr(config, "max_position_embeddings", PROBE_TOKENS)) - 2))
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return the settings that ``KEY=VALUE`` texts name; values are read as YAML.

    Raises:
        ConfigError: a text has no name, or no value that can be read.
    """
    options = {}
    for text in texts:
        key, sign, value = text.partition("=")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            sign = ""
        if not (key.strip() and sign):
            raise ConfigError(
                f"{text!r} has no name and value that can be read",
                where="--set",
                accepted="KEY=VALUE",
                fix="write for example --set price=0.1",
            )
    return options


def run_convert(
    console: Console,
    model: str,
    out: Path,
    *,
    method: str = "partition",
    num_experts: int = 8,
    top_k: int | None = None,
    layers: str | None = None,
    router: str = "topk",
    options: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    seed: int = 0,
) -> Path:
    """Convert and return the folder that was written; see `thermoe convert --help`.

    Raises:
        ConfigError: an option does not fit, or OUT is not empty.
        ConversionError: the model cannot be converted like this.
        CheckpointError: MODEL cannot be read, or not wholly.
        MachineError: the hub cannot be reached, or a file cannot be written.
    """
    folder = check_output(out)
    for name in options or {}:
        if name in OWN_OPTIONS:
            raise ConfigError(
                f"{name} has an option of its own",
                where="--set",
                accepted="other settings of thermoe.convert_to_moe, such as neurons, and options of the router",
                fix=f"use {OWN_OPTIONS[name]}",
            )
    if method not in METHODS:
        raise UnknownNameError.of("conversion method", method, METHODS, where="--method")
    if router not in ROUTERS:
        raise UnknownNameError.of("router", router, ROUTERS, where="--router")
    chosen = None if layers is None else parse_layers(layers)
    source = find_model(model)
    config = load_config(source)
    dense = load_dense(source, config)
    words = load_tokenizer(source, otherwise="leave the tokenizer out with --no-tokenizer") if tokenizer else None
    settings = {**(options or {}), "num_experts": num_experts, "method": method, "layers": chosen, "router": router}

    def convert(top_k: int | None) -> Any:
        torch.manual_seed(seed)
        return convert_to_moe(dense, top_k=top_k, seed=seed, **settings)

    rows = _probe(config, seed)
    # Divided neurons give the dense output when all are at work; copies whatever the router chooses.
    probed = convert(num_experts if method == "partition" else top_k)
    found = exactness(dense, probed, rows)
    working = probed.config.num_experts_per_tok
    del probed
    converted = convert(top_k)
    dtype = str(dense.dtype).removeprefix("torch.")
    sentence = describe_exactness(
        found,
        experts=f"{working} of {num_experts} experts",
        compared=f"{rows.numel()} random tokens in {dtype}",
    )
    _print(console, dense, converted, method=method, dtype=dtype, sentence=sentence)

    def write(partial: Path) -> None:
        partial.mkdir(parents=True)
        if words is not None:
            words.save_pretrained(partial)
        write_card(partial, converted, method=method, exactness=sentence)
        converted.save_pretrained(partial)

    try:
        save_whole(folder, write)
    except SafetensorError as error:
        raise MachineError(
            f"the weights cannot be written: {error}",
            where=str(out),
            accepted="a folder that may be written to, and room on the disk",
            fix="make room or name another folder; nothing half-written was left",
        ) from error
    console.print(
        f"tokenizer: {'saved with the model' if words is not None else 'none'}", markup=False, highlight=False
    )
    return folder


def _print(console: Console, dense: Any, converted: Any, *, method: str, dtype: str, sentence: str) -> None:
    """Print what was converted into what."""
    config = converted.config
    console.print(
        f"{type(dense).__name__} -> {type(converted).__name__} ({dtype}), {method}: {config.num_experts} experts, "
        f"{config.num_experts_per_tok} per token, layers {describe_layers(config.moe_layers)} of "
        f"{config.num_hidden_layers}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    before, after = model_size(dense), model_size(converted)
    table = Table(title="parameters", title_justify="left")
    for column, side in (("", "left"), ("dense", "right"), ("MoE", "right"), ("MoE / dense", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    rows = [("all", "parameters"), ("active per token", "active_parameters")]
    if config.expert_widths is not None:  # what works depends on which experts the router takes
        narrow, wide = "active per token, narrowest experts", "active per token, widest experts"
        rows = [rows[0], (narrow, "active_parameters_min"), (wide, "active_parameters")]
    for title, key in rows:
        table.add_row(title, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.3f}")
    console.print(table)
    if config.expert_widths is not None:
        widths = ", ".join(map(str, config.expert_widths))
        console.print(f"neurons per expert: {widths}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"exactness: {sentence}", markup=False, highlight=False, soft_wrap=True)
