"""How much the loss minds when an expert is missing: what the priced router weighs against joules.

If layer l answers y + d instead of y, the loss moves by <g, d> + d^T H d / 2 with g = dNLL/dy. In a trained model the
first term averages out, and for a likelihood H is, on average, the outer product of g with itself (Fisher information).
A token that goes without expert e deviates by w_te (E_e(x_t) - y_t), so that to second order it costs w_te^2 s_e with

    s_e = E[<g_t, E_e(x_t) - y_t>^2] / 2     over tokens that use e,

in nats. One forward and one backward to the activations over some thousand tokens measure it; no weight gets a
gradient. Experts that few of these tokens use are drawn to the mean of their layer.

Shape letters: T tokens, E experts, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from thermoe.errors import ConfigError, RoutingError
from thermoe.evaluation import check_token_ids, check_vocabulary, sequence_nll
from thermoe.moe.layer import MoELayer, moe_layers, routed_modules
from thermoe.moe.offload import readable
from thermoe.routers.priced import PricedRouter

#: An expert's own mean counts as much as its layer's when this many tokens used it.
PRIOR_TOKENS = 32


class _Seen:
    """Input and output of one layer's last forward."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.y: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        self.x, self.y = args[0].detach(), output


@torch.inference_mode(mode=False)  # there is a backward, whatever the caller is in
def measure_sensitivity(model: nn.Module, rows: Tensor, *, batch_size: int = 8, push: bool = True) -> dict[str, Tensor]:
    """Measure s_e of every expert on text, with the routing the model has now.

    Args:
        model: a causal language model with MoE layers.
        rows: int64 (N, S) token ids of the kind of text to be read; 8,000 tokens and more.
        batch_size: sequences per forward.
        push: hand the result to the layers' priced routers, where they are such.

    Returns:
        float32 (E,) by dotted layer name, in nats.

    Raises:
        RoutingError: the model has no MoE layer of ours.
        ConfigError: ``rows`` holds no token ids (N, S) of the model's vocabulary, or ``batch_size`` is below 1.
    """
    check_token_ids(rows, where="rows")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(
            f"batch_size is {batch_size!r}",
            where="batch_size",
            accepted="an integer of at least 1",
            fix="leave it at 8",
        )
    layers = dict(moe_layers(model))
    if not layers:
        attached = next(iter(dict(routed_modules(model))), None)
        raise RoutingError(
            "the experts of an attached model cannot be run one by one"
            if attached
            else "the model has no MoE layer, so that there is no expert to measure",
            where=attached or type(model).__name__,
            accepted="a model converted by thermoe.convert_to_moe",
            fix="leave the sensitivities at 1" if attached else "convert it first: thermoe.convert_to_moe(model)",
        )
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    check_vocabulary(model, rows, where="rows")
    sums = {name: torch.zeros(2, layer.experts.num_experts, device=rows.device) for name, layer in layers.items()}
    seen = {name: _Seen() for name in layers}
    handles = [layer.register_forward_hook(seen[name]) for name, layer in layers.items()]
    try:
        with _nothing_learns(model), torch.enable_grad():
            for batch in rows.clone().split(batch_size):  # an inference tensor cannot be saved for a backward
                embedded = embedding(batch).detach().requires_grad_()
                nll = sequence_nll(model(inputs_embeds=embedded, use_cache=False).logits, batch).sum()
                nll.backward()
                for name, layer in layers.items():
                    with readable(layer.experts, layer.router):
                        sums[name] += _squares(layer, seen[name]).to(rows.device)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: _shrunk(*total) for name, total in sums.items()}
    if push:
        for name, layer in layers.items():
            if isinstance(layer.router, PricedRouter):
                layer.router.set_sensitivity(found[name].tolist())
    return found


@torch.no_grad()
def _squares(layer: MoELayer, seen: _Seen) -> Tensor:
    """Return (2, E): summed <g, E_e(x) - y>^2 / 2 over the tokens that use e, and how many these are."""
    x, y, decision = seen.x, seen.y, layer.last_routing
    experts = layer.experts.num_experts
    if x is None or y is None or y.grad is None or decision is None:  # the forward did not come to this layer
        return torch.zeros(2, experts)
    g_TD = y.grad.flatten(0, -2).float()
    outputs_ETD = layer.experts.forward_all(x.flatten(0, -2)).float()
    index, weights = decision.pairs()
    used = _by_expert(index, torch.ones_like(weights), experts)
    own_TD = torch.einsum("te,etd->td", _by_expert(index, weights, experts), outputs_ETD)
    slope_TE = torch.einsum("td,etd->te", g_TD, outputs_ETD) - (g_TD * own_TD).sum(-1, keepdim=True)
    return torch.stack([(0.5 * slope_TE.square() * used).sum(0), used.sum(0)])


def _by_expert(index: Tensor, values: Tensor, experts: int) -> Tensor:
    """Return float32 (T, E): the value of each slot at its expert."""
    zeros = torch.zeros(len(index), experts + 1, device=index.device)
    return zeros.scatter_add(-1, index, values.float())[:, :experts]


def _shrunk(total: Tensor, count: Tensor) -> Tensor:
    layer = total.sum() / count.sum().clamp(min=1)
    return (total + PRIOR_TOKENS * layer) / (count + PRIOR_TOKENS)


@contextmanager
def _nothing_learns(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient, nor the model be in training, while the context is open."""
    learning, training = [p for p in model.parameters() if p.requires_grad], model.training
    for parameter in learning:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        model.train(training)
