"""What a recorded forward depends on: whatever Python changes of it is seen before the next batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from thermoe import set_router
from thermoe.adapt.forwards import _fingerprint
from thermoe.moe.layer import moe_layers
from thermoe.testing import tiny_moe


def _own_forward(model: Any) -> None:
    block = model.transformer.h[0].attn
    block.forward = lambda *given, call=block.forward, **named: call(*given, **named)


def _other_class(model: Any) -> None:
    model.transformer.h[0].ln_1.__class__ = type("Norm", (nn.LayerNorm,), {})


def _other_strides(model: Any) -> None:
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data = weight.data.t()


def _top_k(model: Any) -> None:
    next(layer for _, layer in moe_layers(model)).router.active_top_k = 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "a forward of its own": _own_forward,
    "another class": _other_class,
    "other strides": _other_strides,
    "fewer experts": _top_k,
    "other routers": lambda model: set_router(model, "oea"),
    "another attention": lambda model: model.set_attn_implementation("eager"),
    "another type": lambda model: model.bfloat16(),
    "training": lambda model: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_python_changes_is_seen(change: str) -> None:
    model = tiny_moe().eval()
    before = _fingerprint(model)
    assert _fingerprint(model) == before
    model(torch.zeros(1, 4, dtype=torch.long))
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)  # a recording reads weights where they are
    assert _fingerprint(model) == before
    CHANGES[change](model)
    assert _fingerprint(model) != before


def test_what_the_machine_is_set_to_is_seen() -> None:
    model = tiny_moe().eval()
    before = _fingerprint(model)
    was = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(not was)
        assert _fingerprint(model) != before
    finally:
        torch.backends.cuda.enable_flash_sdp(was)
    assert _fingerprint(model) == before
