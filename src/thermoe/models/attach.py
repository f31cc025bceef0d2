"""Give an existing Hugging Face MoE our routers, in place, and take them off again.

`AttachedRouter` (`models/attached_router.py`) stands where the model's own router stood and keeps it as `base`. Expert
weights are not touched. While attached, the experts are computed by the implementation "thermoe"
(`models/native_experts.py`), because transformers' own disagree on a slot without an expert. Its bits are those of
"grouped_mm", transformers' default.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from thermoe.errors import ConfigError, RoutingError
from thermoe.models.attached_router import AttachedRouter
from thermoe.models.native_experts import IMPLEMENTATION, why_not_native
from thermoe.models.native_scoring import recognise
from thermoe.models.padding import note_padding, takes_mask
from thermoe.routers.base import ROUTERS
from thermoe.routers.swap import build_router

#: Names under which blocks hold their router.
ROUTER_NAMES = ("gate", "router")
_ON_MODEL = "_thermoe_attachment"


def _before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a block's router how its tokens are laid out, and see that the experts know an empty slot."""
    name = next(name for name in ROUTER_NAMES if isinstance(getattr(block, name, None), AttachedRouter))
    hidden = args[0] if args else kwargs.get("hidden_states")
    shape = hidden.shape if isinstance(hidden, Tensor) else ()
    if len(shape) == 3:  # else what the model was called with counts
        getattr(block, name).call_shape = shape[0], shape[1]
    implementation = block.experts.config._experts_implementation  # type: ignore[union-attr]
    if implementation != IMPLEMENTATION:
        raise RoutingError(
            f"the experts implementation was changed to {implementation!r} while a router is attached",
            where=type(block).__name__,
            accepted=f"{IMPLEMENTATION!r}: others do not know a slot without an expert",
            fix="call detach_router(model) before changing it",
        )


@dataclass(eq=False)
class Attachment:
    """What `attach_router` did; undo it with `detach`, or use it as a context manager.

    Attributes:
        model: the model.
        routers: the attached routers by dotted name, in the order of the model.
        found: how many MoE blocks the model has; those not chosen keep their own router.
    """

    model: nn.Module
    routers: dict[str, AttachedRouter]
    found: int
    _configs: list[tuple[Any, Any]] = field(default_factory=list, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)

    @property
    def matched(self) -> tuple[str, ...]:
        """Dotted names of the routers that were replaced."""
        return tuple(self.routers)

    def __str__(self) -> str:
        kinds = sorted({type(attached.router).__name__ for attached in self.routers.values()})
        return (
            f"{', '.join(kinds)} attached to {len(self.routers)} of {self.found} MoE blocks: {', '.join(self.matched)}"
        )

    def detach(self) -> None:
        """Put the model's own routers and experts implementation back, the same objects. May be called twice."""
        if self.model.__dict__.get(_ON_MODEL) is not self:
            return
        for hook in self._hooks:
            hook.remove()
        for name, attached in self.routers.items():
            block = self.model.get_submodule(name.rpartition(".")[0])
            block.__dict__.pop("route_tokens_to_experts", None)
            setattr(block, name.rpartition(".")[2], attached.base)
        for config, implementation in self._configs:
            config._experts_implementation_internal = implementation
        del self.model.__dict__[_ON_MODEL]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the MoE blocks by the dotted name of their router."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):
            for attribute in ROUTER_NAMES:
                if isinstance(getattr(module, attribute, None), nn.Module):
                    found[f"{name}.{attribute}".lstrip(".")] = module
                    break
    if not found:
        raise RoutingError(
            "no MoE block was found: no module has experts beside a gate or a router",
            where=type(model).__name__,
            accepted="a Hugging Face MoE, such as Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, GPT-OSS or DeepSeek-V3",
            fix="a dense model is converted first: thermoe.convert_to_moe(model)",
        )
    return found


def _choose_blocks(found: dict[str, nn.Module], layers: Iterable[int | str] | None) -> dict[str, nn.Module]:
    names = list(found)
    if layers is None:
        return found
    chosen: dict[str, nn.Module] = {}
    for entry in layers:
        name = names[entry] if isinstance(entry, int) and 0 <= entry < len(names) else entry
        if name not in found:
            raise ConfigError(
                f"there is no MoE block {entry!r}",
                where="layers",
                accepted=f"0..{len(names) - 1} in the order of the model, or a name: {', '.join(names)}",
                fix="name blocks the model has, or leave layers out for all",
            )
        chosen[str(name)] = found[str(name)]
    return chosen


def _make(name: str, block: nn.Module, router: str, options: dict[str, Any]) -> AttachedRouter:
    base = getattr(block, name.rpartition(".")[2])
    unfit = why_not_native(block.experts)  # type: ignore[arg-type]
    scoring = recognise(base, block) if unfit is None else unfit
    if isinstance(scoring, str):
        raise RoutingError(
            f"{type(block).__name__} cannot take another router: {scoring}",
            where=name,
            accepted="a router that returns (logits, weights, ids), of softmax or sigmoid scores, and experts on "
            "transformers' experts interface",
            fix="choose the blocks that can with layers=..., or leave this model as it is",
        )
    unfit = ROUTERS.get(router, where="router").why_not_attached(scoring.kind)
    if unfit is not None:
        raise RoutingError(
            f"the router {router!r} cannot choose for {type(base).__name__}: {unfit}",
            where=name,
            accepted="a router that chooses by the model's own scores, such as topk, priced, top_p or oea",
            fix="attach one of these",
        )
    settings = dict(options)
    if "gate" in settings:
        raise ConfigError(
            "the option gate was given, but an attached router weighs its experts as the model does",
            where="router options",
            accepted=f"the other options of the router {router!r}",
            fix="leave gate out",
        )
    top_k = settings.pop("top_k", scoring.top_k)
    with torch.random.fork_rng(devices=[]):  # the slow weights drawn here give way to the base's
        built = build_router(router, scoring.hidden_size, scoring.num_experts, top_k, settings)
    return AttachedRouter(base, built.to(base.weight.device), scoring, block)


def _entries(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, list[str]]:
    """Return, for each router by name, the innermost model around it that is called with the attention mask."""
    entries: dict[nn.Module, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            around = model.get_submodule(".".join(parts[:end]))
            if isinstance(around, PreTrainedModel) and takes_mask(around):
                entries.setdefault(around, []).append(name)
                break
    return entries


def attach_router(
    model: nn.Module,
    router: str = "topk",
    *,
    layers: Iterable[int | str] | None = None,
    verbose: bool = True,
    **options: Any,
) -> Attachment:
    """Give the MoE blocks of a Hugging Face model a thermoe router, in place, and print which were matched.

    Args:
        model: a model whose routers return (logits, weights, ids).
        router: a registered name.
        layers: positions among the MoE blocks, or dotted names of their routers; all when ``None``.
        verbose: print how many blocks were matched, and their names.
        options: passed to the router's constructor, for example ``price=0.2``; ``top_k`` is the model's own if absent.

    Returns:
        What was attached, by name; it can be detached again.

    Raises:
        RoutingError: the model has no MoE block, has routers attached already, or a block cannot take one.
        UnknownNameError: no router of that name.
        ConfigError: an option that router does not take, or a layer that is not there.
    """
    if any(isinstance(module, AttachedRouter) for module in model.modules()):
        raise RoutingError(
            "the model has routers attached already",
            where=type(model).__name__,
            accepted="one attachment per model at a time",
            fix="call detach_router(model) first",
        )
    present = _find_blocks(model)
    blocks = _choose_blocks(present, layers)
    made = {name: _make(name, block, router, options) for name, block in blocks.items()}
    attachment = Attachment(model, made, len(present))
    # The outermost configuration too: it is the one generate() asks before it switches implementations for decode.
    configs: list[Any] = [getattr(model, "config", None)]
    configs += [block.experts.config for block in blocks.values()]  # type: ignore[union-attr]
    for config in {id(config): config for config in configs if hasattr(config, "_experts_implementation")}.values():
        attachment._configs.append((config, config._experts_implementation))
        config._experts_implementation_internal = IMPLEMENTATION
    for name, block in blocks.items():
        attached = made[name]
        setattr(block, name.rpartition(".")[2], attached)
        attachment._hooks.append(block.register_forward_pre_hook(_before_block, with_kwargs=True))
        if attached.scoring.chosen_by_block:
            block.__dict__["route_tokens_to_experts"] = attached.recall
    for entry, names in _entries(model, made).items():
        attachment._hooks.append(note_padding(entry, [made[name] for name in names]))
    model.__dict__[_ON_MODEL] = attachment
    if verbose:
        print(attachment)
    return attachment


def detach_router(model: nn.Module) -> None:
    """Put back the model's own routers, the same objects, and its experts implementation.

    Raises:
        RoutingError: no router is attached.
    """
    present = [found for module in model.modules() if (found := module.__dict__.get(_ON_MODEL)) is not None]
    if not present:
        raise RoutingError(
            "the model has no attached router",
            where=type(model).__name__,
            accepted="a model that attach_router was called with, or one around it",
            fix="there is nothing to detach",
        )
    for attachment in present:
        attachment.detach()
