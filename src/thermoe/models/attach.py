"""Give an existing Hugging Face MoE our routers, in place, and take them off again.

`AttachedRouter` stands where the model's own router stood and keeps it as `base`. The base is called for the logits, so
that whatever transformers hangs on it (recording, the auxiliary loss) goes on working; scores of selection and combine
weights follow the base's own rules; only the choice of experts is a thermoe router's. A token whose choice is the
model's own gets the base's own ids and weights, bit for bit. Expert weights are not touched.

A padded token gets no expert. Where the bits of a product depend on how many tokens an expert has (on the CPU, and in
float32), padded tokens keep the base's experts in the computation as long as every real token keeps them too, so that
the logits of real tokens are the model's own; the decision on record leaves padding out in any case.

While attached, the experts are computed by the implementation "thermoe" (`models/native_experts.py`), because
transformers' own disagree on a slot without an expert. Its bits are those of "grouped_mm", transformers' default.

Shape letters: T tokens, E experts, K slots per token, B sequences, S positions, D model width.
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
from thermoe.models.native_experts import IMPLEMENTATION, rows_are_independent, why_not_native
from thermoe.models.native_scoring import NativeScoring, recognise
from thermoe.models.padding import note_padding, takes_mask
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.layer import Routed
from thermoe.routers.base import ROUTERS, Router
from thermoe.routers.swap import build_router

#: Names under which blocks hold their router.
ROUTER_NAMES = ("gate", "router")
_ON_MODEL = "_thermoe_attachment"


class AttachedRouter(Routed):
    """A thermoe router in the place of a model's own.

    It reads like the router it replaces (`num_experts`, `top_k`, `hidden_dim`, `weight` and what else the base has),
    and like an `MoELayer` to whoever looks for routers (`router`, `last_routing`). Its state dictionary is the base's
    own, so that a model saved while attached is a plain checkpoint; prices and fast weights are not in it.

    Args:
        base: the model's own router.
        router: chooses the experts; its slow weights become the base's.
        scoring: how the base turns logits into scores and weights.
        block: the MoE block, for those that turn logits into a choice outside of the router.

    Attributes:
        last_routing: the RoutingDecision of the last forward; it carries gradients in training.
        call_shape: (B, S) of the current call, or ``None``.
        padding_mask: bool (B, S) of the current call, true where the token is real, or ``None`` when all are.
    """

    router: Router

    def __init__(self, base: nn.Module, router: Router, scoring: NativeScoring, block: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.scoring = scoring
        self.num_experts, self.hidden_dim = scoring.num_experts, scoring.hidden_size
        self.top_k = scoring.top_k
        self.router = router
        self.last_routing: RoutingDecision | None = None
        self.call_shape: tuple[int, int] | None = None
        self.padding_mask: Tensor | None = None
        # Versions of transformers in which the router returns logits alone and the block chooses from them.
        self._choose: Any = block.route_tokens_to_experts if scoring.chosen_by_block else None
        self._chosen: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_pre_hook(_load_as_base)
        self.train(base.training)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "router":  # the base's weight is the slow router: one tensor, listed once, under the base's name
            value._parameters.pop("weight", None)
            object.__setattr__(value, "weight", self.base.weight)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base":  # marks that others leave on a module are its own
                raise
            return getattr(self.base, name)

    def why_not(self, router: nn.Module) -> str | None:
        """Return why ``router`` cannot choose for this model's own, or ``None`` when it can."""
        return router.why_not_attached(self.scoring.kind) if isinstance(router, Router) else None

    def selection_scores(self, logits: Tensor) -> Tensor:
        """Return float32 (T, E), the benefit u of each expert at kappa 1: what a price is weighed against."""
        return self.scoring.selection_scores(logits, self.base)

    def route(self, x_TD: Tensor) -> tuple[RoutingDecision, Tensor, tuple[Tensor, Tensor]]:
        """Return the decision for T tokens, the base's own logits (T, E), and the (weights, ids) to compute with."""
        context = self._context(x_TD)
        own_logits, own_weights, own_index = self.scoring.native(self.base, x_TD, self._choose)
        fast = self.router.fast
        with torch.autocast(x_TD.device.type, enabled=False):
            logits = own_logits.float()
            unmoved = torch.ones_like(own_index[:, :1], dtype=torch.bool)
            if fast is not None:
                correction = fast(x_TD.float())
                logits = logits + correction
                unmoved = (correction == 0).all(-1, keepdim=True)
            scores = self.scoring.selection_scores(logits, self.base)
            rank = _prefer(self.scoring.ranking(logits, scores).detach(), own_index, unmoved)
            index = self.router.select(rank, scores.detach(), context)
            if index.shape == own_index.shape:
                own_choice = unmoved & (index.sort(-1).values == own_index.sort(-1).values).all(-1, keepdim=True)
                index = torch.where(own_choice, own_index, index)
            weights = self.scoring.weights(logits, index, self.base).to(own_weights.dtype)
            if index.shape == own_index.shape:
                # With fast weights the value is the base's, the gradient that of the same function of all logits.
                exact = own_weights if fast is None else own_weights.detach() + (weights - weights.detach())
                weights = torch.where(own_choice, exact, weights)
            probabilities = self.scoring.probabilities(logits)
            computed = weights, index
            if context.padding_mask is not None:
                real = context.padding_mask.unsqueeze(-1)
                index, weights = torch.where(real, index, self.num_experts), torch.where(real, weights, 0)
                if index.shape == own_index.shape and not rows_are_independent(x_TD):
                    along = ~real & (own_choice | ~real).all()
                    computed = torch.where(along, own_weights, weights), torch.where(along, own_index, index)
                else:
                    computed = weights, index
        return RoutingDecision(logits, probabilities, index, weights, context.padding_mask), own_logits, computed

    def forward(self, hidden_states: Tensor) -> Any:
        """Map (..., D) to what the base returns: (logits (T, E), weights (T, K), ids (T, K)), id E meaning no expert.

        Where the block itself chooses from the logits, only these are returned, and `recall` has the rest.
        """
        decision, own_logits, (weights, index) = self.route(hidden_states.reshape(-1, self.hidden_dim))
        self.last_routing = decision if torch.is_grad_enabled() else decision.detach()
        if self.scoring.chosen_by_block:
            self._chosen = index, weights
            return own_logits
        return own_logits, weights, index

    def recall(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (ids, weights) of the forward just made, to a block that asks for them by its logits."""
        assert self._chosen is not None
        chosen, self._chosen = self._chosen, None
        return chosen

    def _context(self, x_TD: Tensor) -> RoutingContext:
        tokens, mask = x_TD.shape[0], self.padding_mask
        batch, length = self.call_shape or (1, tokens)
        if batch * length != tokens:  # the block is called by itself
            return RoutingContext(1, tokens)
        if mask is not None:
            mask = mask.reshape(-1).to(x_TD.device) if mask.shape == (batch, length) else None
        return RoutingContext(batch, length, mask)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state of the base under this module's own name."""
        return self.base.state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last decision behind: autograd history cannot be copied or pickled."""
        return {**super().__getstate__(), "last_routing": None, "padding_mask": None, "_chosen": None}

    def extra_repr(self) -> str:
        """Show the sizes in `print(model)`."""
        return f"num_experts={self.num_experts}, top_k={self.top_k}, {self.scoring}"


def _prefer(rank: Tensor, own_index: Tensor, unmoved: Tensor) -> Tensor:
    """Put every expert outside the base's choice strictly below it, where the logits are the base's own.

    The choice is a top-k already; this settles ties (frequent in bfloat16) the way the base settled them.
    """
    floor = torch.nextafter(rank.gather(-1, own_index).amin(-1, keepdim=True), rank.new_full((), float("-inf")))
    chosen = torch.zeros_like(rank, dtype=torch.bool).scatter(-1, own_index, True)
    return torch.where(unmoved & ~chosen, torch.minimum(rank, floor), rank)


def _load_as_base(module: AttachedRouter, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give a plain checkpoint's keys to the base, and the router what it holds already, since none of it was saved."""
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}base.{key.removeprefix(prefix)}"] = state.pop(key)
    state.update(module.router.state_dict(prefix=f"{prefix}router."))


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
    """

    model: nn.Module
    routers: dict[str, AttachedRouter]
    _configs: list[tuple[Any, Any]] = field(default_factory=list, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)

    @property
    def matched(self) -> tuple[str, ...]:
        """Dotted names of the routers that were replaced."""
        return tuple(self.routers)

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
    model: nn.Module, router: str = "topk", *, layers: Iterable[int | str] | None = None, **options: Any
) -> Attachment:
    """Give the MoE blocks of a Hugging Face model a thermoe router, in place.

    Args:
        model: a model whose routers return (logits, weights, ids).
        router: a registered name.
        layers: positions among the MoE blocks, or dotted names of their routers; all when ``None``.
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
    blocks = _choose_blocks(_find_blocks(model), layers)
    made = {name: _make(name, block, router, options) for name, block in blocks.items()}
    attachment = Attachment(model, made)
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
