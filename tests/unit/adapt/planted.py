"""A tiny partitioned model in which it is known which experts a token needs, and a router that can be told wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thermoe.adapt.audit import Audited, recording
from thermoe.moe.layer import moe_layers
from thermoe.routers.fast_weights import FastWeights
from thermoe.testing import tiny_moe

EXPERTS, WIDTH = 8, 32


@torch.no_grad()
def planted_model(
    seed: int = 0, *, family: str | None = "mix", permuted: bool = True, top_k: int = 2
) -> PreTrainedModel:
    """Return a model whose expert e answers to the direction u_e of its input, the larger the more.

    The router's rows are these directions, in the order of the experts or, permuted, with each at another expert.
    """
    model = tiny_moe(seed, num_experts=EXPERTS, top_k=2, method="partition")
    generator = torch.Generator().manual_seed(seed)

    def directions() -> Tensor:
        return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][:EXPERTS]

    # Without biases and positions the inputs have no mean of their own, so that no expert is the better one for all.
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "wpe" in name:
            parameter.zero_()
    for _, layer in moe_layers(model):
        experts, listens, answers = layer.experts, directions(), directions()
        noise = 0.1 * torch.randn(experts.up_weight.shape, generator=generator)
        experts.up_weight.copy_(2 * listens.unsqueeze(1) + noise)
        experts.down_proj.copy_(answers.unsqueeze(-1).expand_as(experts.down_proj) / experts.intermediate_size)
        layer.router.weight.copy_(listens.roll(3, 0) if permuted else listens)
        layer.router.fast = None if family is None else FastWeights(WIDTH, EXPERTS, family)
    return model


@torch.no_grad()
def audited(model: PreTrainedModel, ids: Tensor) -> dict[str, Audited]:
    """Return the audit of one forward."""
    with recording(dict(moe_layers(model))) as seen:
        model(ids)
    return seen


def recall(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the share of the best 2 experts by the audit among the 2 highest logits, over layers and tokens."""
    found = []
    for record in audited(model, ids).values():
        live, best = (values.topk(2, dim=-1).indices for values in (record.live, record.shares))
        found.append((live.unsqueeze(-1) == best.unsqueeze(-2)).any(-1).float().mean())
    return float(torch.stack(found).mean())
