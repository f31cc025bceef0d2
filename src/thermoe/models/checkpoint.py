"""Refuses checkpoints that do not fill the MoE layers.

Transformers initialises weights that a checkpoint lacks at random and only logs it: right for a new head, wrong for
experts and routers, with which a model would run and talk nonsense. Here that is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from thermoe.errors import CheckpointError, ConfigError
from thermoe.models.families import Family
from thermoe.moe.experts import Experts

SHOWN = 4


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _of_a_layer(family: Family) -> re.Pattern[str]:
    """Return the pattern of the keys of feed-forward networks, dense or MoE."""
    places = "|".join(re.escape(path) for path in (family.place, *family.passed))
    return re.compile(rf"(^|\.){re.escape(family.blocks)}\.\d+\.({places})\.")


def check_loaded(family: Family, info: Mapping[str, Any], source: str, *, ignore_mismatched: bool) -> None:
    """Raise if what was loaded left a part of an MoE layer at random, or dropped a part of one.

    Args:
        family: the architecture.
        info: what transformers returned for `output_loading_info=True`.
        source: the folder or name of the checkpoint.
        ignore_mismatched: allow other shapes outside the MoE layers, as for a new head.

    Raises:
        CheckpointError: naming the keys.
    """
    inside = _of_a_layer(family)
    mismatched = {
        f"{key} is {tuple(saved)}, not {tuple(expected)}": bool(inside.search(key))
        for key, saved, expected in info["mismatched_keys"]
    }
    found = {
        "lacks": [key for key in info["missing_keys"] if inside.search(key)],
        "has other shapes:": [text for text, within in mismatched.items() if within or not ignore_mismatched],
        "has more than the configuration says:": [key for key in info["unexpected_keys"] if inside.search(key)],
    }
    wrong = [f"{verb} {_some(keys)}" for verb, keys in found.items() if keys]
    if wrong:
        raise CheckpointError(
            "the weights do not fit the configuration: the checkpoint " + "; it ".join(wrong),
            where=source,
            accepted="every weight of the feed-forward networks, dense or MoE, in the shape that config.json says",
            fix="save the model again with save_pretrained; to convert a dense checkpoint load it with its dense class "
            "and call thermoe.convert_to_moe",
        )


def check_reachable(model: nn.Module, device_map: Any) -> None:
    """Raise if weights were left on the disk without a hook that brings them in, as some versions of transformers do.

    Args:
        model: what was loaded.
        device_map: where it was asked to be.

    Raises:
        ConfigError: naming one.
    """
    places = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    if all(place is None or str(place) == "meta" for place in places):  # shapes without values were asked for
        return
    for name, module in model.named_modules():
        lost = [key for key, parameter in module.named_parameters(name, recurse=False) if parameter.is_meta]
        if lost and not hasattr(module, "_hf_hook"):
            raise ConfigError(
                f"the whole model was left on the disk and nothing brings its weights in, such as {lost[0]}",
                where="device_map",
                accepted="with this version of transformers, a device_map with at least two places",
                fix="leave a small part, such as the last norm, on the cpu; or load the model in memory and call "
                "accelerate.disk_offload",
            )


def check_blocks(experts: Iterable[Experts], source: str) -> None:
    """Raise if the blocks of unequal experts are not those that the configuration's widths make.

    Other widths of the same sum give weights of the same shapes, which would be read as other experts.

    Raises:
        CheckpointError: naming the widths.
    """
    for each in experts:
        if each.block_table is not None and each.block_table.tolist() != each.table_rows():
            raise CheckpointError(
                f"the checkpoint's blocks are not those of experts of widths {list(each.widths)}",
                where=source,
                accepted="the expert_widths that the model was saved with, in their order",
                fix="restore config.json as save_pretrained wrote it",
            )


def damaged(error: SafetensorError, source: str) -> CheckpointError:
    """Return the error for a safetensors file that cannot be read."""
    return CheckpointError(
        f"a weight file is truncated or damaged: {error}",
        where=source,
        accepted="whole .safetensors files",
        fix="copy or download the file again, or save the model again with save_pretrained",
    )


def why_incomplete(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return what is missing or unreadable in a ``folder`` that could not be loaded, or ``None`` if nothing is seen.

    Args:
        folder: the checkpoint.
        settings: the keyword arguments of the loading; unusual names of files are left to transformers.
    """
    if any(settings.get(name) for name in ("subfolder", "variant", "gguf_file")):
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        return f"config.json cannot be read ({error.strerror})"
    except ValueError as error:
        return f"config.json is damaged ({error})"
    if not isinstance(config, dict):
        return f"config.json holds a {type(config).__name__}"
    if (folder / "model.safetensors").is_file():
        return None
    index = folder / "model.safetensors.index.json"
    parts = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if not index.is_file():
        return f"{index.name} is missing beside {_some(parts)}" if parts else "it holds no model.safetensors"
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{index.name} is damaged ({type(error).__name__}: {error})"
    missing = [name for name in named if not (folder / name).is_file()]
    return f"it lacks {_some(missing)}" if missing else None


def incomplete(why: str, source: str) -> CheckpointError:
    """Return the error for a folder of which a part is missing or unreadable."""
    return CheckpointError(
        f"the checkpoint is not whole: {why}",
        where=source,
        accepted="a folder written by save_pretrained: config.json and model.safetensors, or all its parts and their "
        "index",
        fix="copy or download the folder again, or save the model again with save_pretrained",
    )
