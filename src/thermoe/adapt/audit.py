"""Audits: what every expert of a partitioned network would have given, while only the chosen ones' output flows on.

A partition divides one network among E experts, so the layer's full answer y is known for each token, and with it how
much of y each expert holds:

    nu_te = max(0, <s_te, y_t>) / |y_t|^2,   y_t = sum_e s_te,   s_te = w_te E_e(x_t)

The sum of nu over e is at least 1, and 1 where no expert opposes y. The output bias and an always-on shared part are
left out: no choice moves them. w is the weight that the gate of the trained router, without fast weights, would give e
if all experts were used; with the unit weights of a fresh partition it is 1, and s_e is the shard of the dense network
(as in D2DMoE, arXiv 2310.04361, which regresses norms). Once recovery training has taken the gate to its own weights,
the unweighted sum is an output that the model never learned to use, and following it makes the model worse.

The layer's own forward is watched by a hook. It reads, computes beside it and writes nothing back: outputs are the
same bit for bit, and inputs are those of the routing in force.

Shape letters: B sequences, S positions, N audited tokens, E experts, K slots, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.moe.layer import MoELayer
from thermoe.moe.offload import readable
from thermoe.routers.base import Router

#: Tokens whose expert outputs (E, tokens, D) are held at once.
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Audited:
    """What one layer's audit found, token by token.

    Args:
        slow: float32 (N, E), logits of the trained router.
        live: float32 (N, E), logits in force, fast weights included.
        shares: float32 (N, E), nu.
        caught: float32 (N,), the sum of nu over the chosen experts, over that of as many best ones; NaN where a token
            had no expert.
    """

    slow: Tensor
    live: Tensor
    shares: Tensor
    caught: Tensor

    def on_host(self, real_N: Tensor) -> Audited:
        """Return the tokens chosen by bool (N,), in the memory of the CPU; waits for the device."""
        return Audited(*(getattr(self, f.name).to("cpu")[real_N] for f in fields(self)))

    @classmethod
    def joined(cls, parts: list[Audited]) -> Audited:
        """Return one record of several."""
        return cls(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)))


def output_shares(parts_END: Tensor) -> Tensor:
    """Return nu, float32 (N, E): how much of their sum each expert's part holds; 0 for all where the sum is 0.

    Args:
        parts_END: (E, N, D), what each expert adds to the output.
    """
    parts = parts_END.float()
    whole = parts.sum(0)
    along = torch.einsum("end,nd->ne", parts, whole)
    return along.clamp(min=0) / whole.square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def ranked_like(values_NE: Tensor, order_NE: Tensor) -> Tensor:
    """Return each row of ``values_NE`` permuted so that it ranks as ``order_NE`` does; ties keep the order of values.

    The largest value goes to where the order has its largest, and so on. A row that ranks so already comes back as it
    is, bit for bit.
    """
    by_value = values_NE.argsort(dim=-1, descending=True, stable=True)
    by_order = order_NE.gather(-1, by_value).argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(values_NE).scatter(-1, by_value.gather(-1, by_order), values_NE.gather(-1, by_value))


@contextmanager
def recording(layers: Mapping[str, MoELayer]) -> Iterator[dict[str, Audited]]:
    """Audit every token of the forwards made inside; the record of a layer is that of its last forward.

    Args:
        layers: by name; each router is one of ours.
    """
    seen: dict[str, Audited] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = _audit(layers[name], args[0])

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _audit(layer: MoELayer, hidden_states: Tensor) -> Audited:
    router, decision = layer.router, layer.last_routing
    assert isinstance(router, Router) and decision is not None
    x_ND = hidden_states.detach().flatten(0, -2)
    with readable(layer.experts, router):
        slow = router.slow_scores(x_ND)
        experts = torch.arange(router.num_experts, device=x_ND.device).expand(len(x_ND), -1)
        weights = router.combine_weights(router.probabilities(slow), experts).float()
        shares = torch.cat(
            [
                output_shares(layer.experts.forward_all(x).float() * w.T.unsqueeze(-1))
                for x, w in zip(x_ND.split(TOKENS_AT_ONCE), weights.split(TOKENS_AT_ONCE), strict=True)
            ]
        )
    index, _ = decision.pairs()
    chosen = torch.nn.functional.pad(shares, (0, 1)).gather(-1, index).sum(-1)
    taken = (index < router.num_experts).sum(-1, keepdim=True)
    best = shares.sort(-1, descending=True).values.cumsum(-1).gather(-1, (taken - 1).clamp(min=0)).squeeze(-1)
    caught = torch.where(taken.squeeze(-1) > 0, chosen / best.clamp(min=torch.finfo(torch.float32).tiny), torch.nan)
    return Audited(
        slow[:, : router.num_experts], decision.logits.detach()[:, : router.num_experts].float(), shares, caught
    )
