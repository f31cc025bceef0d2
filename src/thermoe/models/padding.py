"""Tells modules inside a model, before it runs, which tokens come, which are real, and in how many sequences."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Told(Protocol):
    """What is told.

    Attributes:
        padding_mask: bool (B, S), true where the token is real, or ``None`` when all are.
        call_shape: (B, S), or ``None`` when it is not known.

    One that has `token_ids` and `positions` too is told these where its router reads them.
    """

    padding_mask: Tensor | None
    call_shape: tuple[int, int] | None


class _NotePadding:
    in_graphs = True  # what it notes is the same in every forward that a CUDA graph repeats

    def __init__(self, entry: nn.Module, told: Iterable[Told]) -> None:
        self._names = list(inspect.signature(type(entry).forward).parameters)[1:]
        self._told: list[Any] = list(told)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        mask: Tensor | None = given.get("attention_mask")
        if tokens is None or not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        else:
            mask = mask[:, -tokens.shape[1] :].bool()  # with a cache it covers the past too
        told: list[Any] = self._told
        read = {field for one in told for field in getattr(getattr(one, "router", None), "reads", ())}
        positions = _positions(given, tokens) if "positions" in read and tokens is not None else None
        for one in told:
            one.padding_mask = mask
            one.call_shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])
            if hasattr(one, "token_ids"):
                one.token_ids = given.get("input_ids") if "token_ids" in read else None
                one.positions = positions


def _positions(given: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return (B, S) or (1, S): the positions the model was given, else those that follow what is in its cache."""
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return positions
    past = given.get("past_key_values")
    seen = past.get_seq_length() if past is not None else 0
    return (torch.arange(tokens.shape[1], device=tokens.device) + seen).unsqueeze(0)


def note_padding(entry: nn.Module, told: Iterable[Told]) -> RemovableHandle:
    """Note the attention mask whenever ``entry`` is called; a mask that is absent or not (B, S) makes all tokens real.

    Args:
        entry: a module that takes token ids or embeddings, and the mask.
        told: where to note it.

    Returns:
        The hook, to be removed.
    """
    return entry.register_forward_pre_hook(_NotePadding(entry, told), with_kwargs=True)


def takes_mask(module: nn.Module) -> bool:
    """Whether ``module`` is called with token ids or embeddings and an attention mask."""
    names = inspect.signature(type(module).forward).parameters
    return "attention_mask" in names and bool({"input_ids", "inputs_embeds"} & set(names))
