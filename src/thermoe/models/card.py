"""The model card, `README.md`, of a saved MoE model: what it is, what it was made from, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD_FILE = "README.md"
#: Auto class and the hub's name of the task, by the end of the class name; the first that fits counts.
TASKS: dict[str, tuple[str, str]] = {
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "": ("AutoModel", "feature-extraction"),
}
#: What each conversion method does, and what holds right after it.
METHOD_TEXTS = {
    "partition": (
        "`partition`: the neurons of each feed-forward network are divided among the experts",
        "as converted, the model equals the dense one when all experts work; fewer are cheaper and lose some of it, "
        "which recovery training wins back",
    ),
    "copy": (
        "`copy`: each expert starts as a copy of the whole feed-forward network",
        "as converted, and without noise, the model equals the dense one whatever the router chooses",
    ),
    "virtual": (
        "`virtual`: the feed-forward network is divided into shards, each in several copies that take turns",
        "as converted, and without noise, the model equals the dense one whatever the router chooses",
    ),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def task_of(class_name: str) -> tuple[str, str]:
    """Return the Auto class that loads models of ``class_name``, and the hub's name of their task."""
    return next(task for end, task in TASKS.items() if class_name.endswith(end))


def describe_layers(layers: list[int]) -> str:
    """Return block positions in short: ``[0, 1, 2, 5]`` is "0-2, 5"."""
    runs: list[list[int]] = []
    for position in sorted(layers):
        if runs and position == runs[-1][1] + 1:
            runs[-1][1] = position
        else:
            runs.append([position, position])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def method_by_shape(config: Any) -> str | None:
    """Return the conversion method that gives experts of this width, or ``None`` if none does."""
    whole = config.moe_family.shape(config).intermediate_size
    width, experts = config.expert_intermediate_size, config.num_experts
    if config.expert_widths is not None:
        return "partition" if sum(config.expert_widths) + config.shared_intermediate_size == whole else None
    if width == whole:
        return "copy"
    if width * experts + getattr(config, "shared_intermediate_size", 0) == whole:
        return "partition"
    return "virtual" if whole % width == 0 and experts % (whole // width) == 0 else None


def describe_exactness(found: Mapping[str, float], *, experts: str, compared: str) -> str:
    """Return one sentence about how far a conversion is from its dense model.

    Args:
        found: what `thermoe.models.measure.exactness` returned.
        experts: which experts worked, such as "8 of 8 experts".
        compared: the tokens it was measured on.
    """
    values = "logits" if "logit_kl" in found else "hidden states"
    divergence = f" (KL {found['logit_kl']:.1e} nats per token)" if "logit_kl" in found else ""
    return (
        f"with {experts} at work the {values} differ from the dense model's by at most "
        f"{found['max_abs_diff']:.1e}{divergence}, on {compared}"
    )


def _base_of(config: Any) -> tuple[str | None, str]:
    """Return the base model's name on the hub, if it has one, and what to call it; never a path of this machine."""
    name = str(getattr(config, "_name_or_path", "") or "")
    dense = type(config).__mro__[1].__name__.removesuffix("Config")
    if not name:
        return None, f"a {dense} model"
    if Path(name).exists() or not _HUB_NAME.fullmatch(name):
        return None, f"a {dense} model in the folder `{Path(name).name}`"
    return name, f"`{name}`"


def _widths(config: Any) -> str:
    if config.expert_widths is None:
        return f"each {config.expert_intermediate_size}"
    return f"{', '.join(map(str, config.expert_widths[:-1]))} and {config.expert_widths[-1]}"


def _short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, (list, tuple)) and len(value) > 4 else str(value)


def _routers(config: Any) -> list[str]:
    """Return one line per kind of router: its layers, name, top_k and options."""
    alike: dict[str, list[int]] = {}
    for position in config.moe_layers:
        entry = config.routers.get(str(position), {})
        options = ", ".join(
            f"{key}={_short(value)}" for key, value in sorted((entry.get("options") or {}).items()) if value is not None
        )
        top_k = entry.get("top_k", config.num_experts_per_tok)
        text = f"`{entry.get('name', 'topk')}`, {top_k} of {config.num_experts} experts per token"
        alike.setdefault(text + (f", {options}" if options else ""), []).append(position)
    return [f"layers {describe_layers(layers)}: {text}" for text, layers in alike.items()]


def model_card(model: Any, *, method: str | None = None, exactness: str | None = None) -> str:
    """Return the text of the model card.

    Args:
        model: a model of an MoE class; its configuration's `routers` are up to date.
        method: how it was converted; ``None`` is what the configuration says, or else the experts' width.
        exactness: a sentence of `describe_exactness`; ``None`` gives what holds by construction.
    """
    config = model.config
    hub_name, base = _base_of(config)
    auto, task = task_of(type(model).__name__)
    method = method or config.conversion_method or method_by_shape(config)
    how, holds = METHOD_TEXTS.get(method or "", ("experts of a width of their own", "no dense model to compare with"))
    front: dict[str, Any] = {
        "library_name": "thermoe",
        "pipeline_tag": task,
        "tags": ["thermoe", "transformers", "mixture-of-experts", "moe", config.moe_family.model_type],
    }
    if hub_name:
        front["base_model"] = hub_name
    title = f"{hub_name.rpartition('/')[2] if hub_name else type(model).__name__} with MoE layers"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"A Mixture-of-Experts model, `{type(model).__name__}`, made by thermoe {config.thermoe_version}.",
        "",
        f"- Made from: {base}.",
        f"- Method: {how}.",
        f"- Experts: {config.num_experts} per layer, {_widths(config)} neurons wide.",
        f"- Experts per token: at most {config.num_experts_per_tok}.",
        f"- Layers: {describe_layers(config.moe_layers)} of {config.num_hidden_layers} (counted from 0).",
        *(f"- Router, {line}." for line in _routers(config)),
        f"- Exactness: {exactness or holds}.",
        "",
        "## How to load it",
        "",
        "```python",
        "import thermoe  # makes the Auto classes know the model",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "`thermoe.set_router(model, ...)` changes its routers, `thermoe.collect_routing(model)` shows their decisions.",
        "",
        "## Licence",
        "",
        "The licence of the base model holds for these weights too.",
        "",
    ]
    return "\n".join(lines)


def write_card(folder: Path, model: Any, **told: str | None) -> Path:
    """Write the model card into ``folder`` unless there is one already; see `model_card` for ``told``."""
    path = folder / CARD_FILE
    if not path.exists():
        path.write_text(model_card(model, **told), encoding="utf-8")
    return path
