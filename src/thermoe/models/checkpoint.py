"""Refuses checkpoints that do not fill the MoE layers.

Transformers initialises weights that a checkpoint lacks at random and only logs it: right for a new head, wrong for
experts and routers, with which a model would run and talk nonsense. Here that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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


def check_in_memory(layers: Iterable[nn.Module]) -> None:
    """Raise if weights of MoE ``layers`` are offloaded: hooks of accelerate fetch them for a module's own forward only.

    Raises:
        ConfigError: some are on the meta device.
    """
    if any(parameter.is_meta for layer in layers for parameter in layer.parameters()):
        raise ConfigError(
            "MoE layers are offloaded, to the disk or from an accelerator to the CPU; their experts could not be read",
            where="device_map",
            accepted="devices that hold the weights while the model runs; other layers may be offloaded",
            fix="load in half precision, spread the model over more devices, or run it on the CPU alone",
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
