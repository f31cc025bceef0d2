"""Tells modules inside a model, before it runs, which tokens are padding and how many sequences there are."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Told(Protocol):
    """What is told.

    Attributes:
        padding_mask: bool (B, S), true where the token is real, or ``None`` when all are.
        call_shape: (B, S), or ``None`` when it is not known.
    """

    padding_mask: Tensor | None
    call_shape: tuple[int, int] | None


class _NotePadding:
    def __init__(self, entry: nn.Module, told: Iterable[Told]) -> None:
        self._names = list(inspect.signature(type(entry).forward).parameters)[1:]
        self._told = list(told)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        mask: Tensor | None = given.get("attention_mask")
        if tokens is None or not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None
        else:
            mask = mask[:, -tokens.shape[1] :].bool()  # with a cache it covers the past too
        for one in self._told:
            one.padding_mask = mask
            one.call_shape = None if tokens is None else (tokens.shape[0], tokens.shape[1])


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
