"""Perplexity, and routing accuracy: how good a router's decisions are, held against the best possible ones.

Routing accuracy compares routing decisions, never token predictions. Within one layer, and with everything else as it
is, the loss of sending token t to the set S is the relative error of the layer's output,

    l_t(S) = |y_t - y_t(S)|^2 / |y_t|^2,     y_t(S) = sum_{e in S} w_e(S) E_e(x_t),

with y_t the output of all experts. The weights w are those of the trained router without fast weights, for every arm,
so that the yardstick stays the same while a router adapts and nothing but the choice of experts is judged. Through the
Gram matrix G_ef = <E_e, E_f> every subset of the same size can be tried exactly. The headline figure is tolerant (a set
counts as right when its loss is within tau of the best) and chance-corrected: 0 is a random choice of as many experts,
1 the oracle. This oracle is local: it sees one layer, not the loss of the whole model; a router that adapts to the
next-token loss may leave it behind and be right.

Shape letters: T tokens, E experts, K slots, N subsets, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.errors import ConfigError, RoutingError, UnknownNameError
from thermoe.moe.decision import RoutingContext
from thermoe.moe.layer import MoELayer, moe_layers
from thermoe.moe.offload import readable
from thermoe.routers.alternatives import RandomRouter
from thermoe.routers.base import Router

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Beyond this many subsets of one size an exact search is refused.
MAX_SUBSETS = 5000
Chooser = Literal["router", "oracle", "random"]
CHOOSERS: tuple[Chooser, ...] = ("router", "oracle", "random")


def sequence_nll(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Return the negative log-likelihood of each sequence, summed over its S - 1 predicted tokens, in nats.

    Args:
        logits: (B, S, V).
        input_ids: int64 (B, S).
    """
    predicted = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")
    return predicted.view(input_ids.shape[0], -1).sum(-1)


def check_token_ids(input_ids: Tensor, *, where: str) -> None:
    """Raise unless ``input_ids`` are token ids (B, S) with something to predict.

    Raises:
        ConfigError: they are not a tensor of integers of that shape, with B of at least 1 and S of at least 2.
    """
    fits = isinstance(input_ids, Tensor) and input_ids.dtype in (torch.int64, torch.int32) and input_ids.ndim == 2
    if not fits or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        given = (
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise ConfigError(
            f"there is nothing to score in {given}",
            where=where,
            accepted="token ids, int64 (B, S), at least one row of at least two tokens",
            fix="give tokenizer(text, return_tensors='pt').input_ids",
        )


def check_vocabulary(model: nn.Module, input_ids: Tensor, *, where: str) -> None:
    """Raise unless the model knows all of these token ids; waits for the device.

    On a GPU a kernel that meets another one ends all work of the process there.

    Raises:
        ConfigError: there is an id below 0, or beyond the model's embedding.
    """
    get = getattr(model, "get_input_embeddings", None)
    embedding = None if get is None else get()
    known = embedding.weight.shape[0] if isinstance(embedding, nn.Embedding) else None
    low, high = (int(end) for end in input_ids.aminmax())
    if known is not None and not 0 <= low <= high < known:
        raise ConfigError(
            f"there are token ids from {low} to {high}",
            where=where,
            accepted=f"ids of the model's vocabulary, 0 to {known - 1}",
            fix="encode the text with the tokenizer of this model",
        )


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, *, batch_size: int = 16) -> float:
    """Return exp of the mean negative log-likelihood per predicted token of ``rows`` int64 (N, S)."""
    check_token_ids(rows, where="rows")
    if batch_size < 1:
        raise ConfigError(
            f"batch_size is {batch_size}", where="batch_size", accepted="an integer of at least 1", fix="leave it at 16"
        )
    total = sum(float(sequence_nll(model(batch).logits, batch).sum()) for batch in rows.split(batch_size))
    nats = total / (rows.shape[0] * (rows.shape[1] - 1))
    return math.inf if nats > 700 else math.exp(nats)  # beyond, a float overflows


@dataclass(frozen=True, slots=True)
class LayerAccuracy:
    """Routing accuracy of one layer, averaged over tokens.

    Args:
        tolerant: share of tokens whose set is within tau of the best set of its size.
        tolerant_chance: the same for a uniformly random set of that size, computed exactly.
        tolerant_corrected: (tolerant - chance) / (1 - chance); ``None`` when every set is within tau.
        overlap: mean share of the chosen experts that are in the best set.
        overlap_chance: k / E.
        overlap_corrected: as above; ``None`` when k = E.
        regret: mean of l_t(S_t) - l_t(best), in units of the output's squared norm.
        tokens: tokens judged; those without any expert are left out.
    """

    tolerant: float
    tolerant_chance: float
    tolerant_corrected: float | None
    overlap: float
    overlap_chance: float
    overlap_corrected: float | None
    regret: float
    tokens: int

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields as a dictionary for a result row."""
        return asdict(self)


def _corrected(value: float, chance: float) -> float | None:
    return None if chance >= 1 - 1e-9 else (value - chance) / (1 - chance)


def subset_losses(outputs_ETD: Tensor, probabilities: Tensor, router: Router, subsets_NK: Tensor) -> Tensor:
    """Return l_t(S) for every token and every subset: (T, N), exact.

    Args:
        outputs_ETD: each expert's unweighted output.
        probabilities: (T, E), of the gate that weights the experts.
        router: gives the combine weights of a subset.
        subsets_NK: int64 (N, K) expert ids.
    """
    experts, tokens, _ = outputs_ETD.shape
    gram = torch.einsum("etd,ftd->tef", outputs_ETD, outputs_ETD)
    everything = torch.arange(experts, device=gram.device).expand(tokens, -1)
    full = router.combine_weights(probabilities, everything)
    norm = torch.einsum("te,tef,tf->t", full, gram, full)
    index = subsets_NK.expand(tokens, -1, -1)
    weights = router.combine_weights(probabilities.unsqueeze(1).expand(-1, len(subsets_NK), -1), index)
    missing = full.unsqueeze(1) - torch.zeros(tokens, len(subsets_NK), experts, device=gram.device).scatter_add(
        -1, index, weights.float()
    )
    # Matrix products instead of one three-way einsum, whose intermediate would hold T * N * E * E numbers.
    error = ((missing @ gram) * missing).sum(-1)
    return error.clamp(min=0) / norm.clamp(min=1e-20).unsqueeze(-1)


class _Judge:
    """Adds up the accuracy of one layer over batches."""

    def __init__(self, layer: MoELayer, tau: float, chooser: Chooser) -> None:
        self.layer, self.tau, self.chooser = layer, tau, chooser
        experts = layer.experts.num_experts
        self.subsets = {
            k: torch.tensor(list(combinations(range(experts), k)))
            for k in range(1, layer.router.num_slots + 1)  # type: ignore[operator]
        }
        self.sums = dict.fromkeys(("tolerant", "tolerant_chance", "overlap", "overlap_chance", "regret", "tokens"), 0.0)

    def add(self, x_TD: Tensor) -> None:
        """Judge the decision the layer has just taken for ``x_TD``."""
        decision = self.layer.last_routing
        assert decision is not None
        router = self.layer.router
        assert isinstance(router, Router)
        chosen = self._choose(x_TD, decision.pairs()[0])
        outputs = self.layer.experts.forward_all(x_TD).float()
        yardstick = router.probabilities(router.slow_scores(x_TD))
        sizes = (chosen < decision.num_experts).sum(-1)
        for k, subsets in self.subsets.items():
            of_size = sizes == k
            if not bool(of_size.any()):
                continue
            self._add_size(
                outputs[:, of_size],
                yardstick[of_size],
                chosen[of_size],
                subsets.to(x_TD.device),
                router,
            )

    def _choose(self, x_TD: Tensor, routed: Tensor) -> Tensor:
        if self.chooser != "random":
            return routed
        router = self.layer.router
        assert isinstance(router, Router)
        random = RandomRouter(router.hidden_size, router.num_experts, router.num_slots).to(x_TD.device)
        scores = router.scores(x_TD)
        everyone = random.select(scores, scores, RoutingContext(1, x_TD.shape[0]))
        # As many experts per token as the router used, so that only the choice differs.
        live = (routed < router.num_experts).sort(-1, descending=True).values
        return torch.where(live, everyone[:, : routed.shape[1]], router.num_experts)

    def _add_size(
        self, outputs: Tensor, probabilities: Tensor, chosen: Tensor, subsets: Tensor, router: Router
    ) -> None:
        losses = subset_losses(outputs, probabilities, router, subsets)
        best_loss, best = losses.min(-1)
        experts = router.num_experts
        member = torch.zeros(len(subsets), experts, device=chosen.device).scatter(1, subsets, 1.0)
        if self.chooser == "oracle":
            own = best
        else:
            picked = torch.zeros(chosen.shape[0], experts + 1, device=chosen.device).scatter(1, chosen, 1.0)[
                :, :experts
            ]
            own = (picked @ member.T).argmax(-1)  # the subset that holds exactly the chosen experts
        own_loss = losses.gather(1, own.unsqueeze(1)).squeeze(1)
        within = losses <= best_loss.unsqueeze(1) + self.tau
        size = subsets.shape[1]
        self.sums["tolerant"] += float((own_loss <= best_loss + self.tau).sum())
        self.sums["tolerant_chance"] += float(within.float().mean(-1).sum())
        self.sums["overlap"] += float((member[own] * member[best]).sum() / size)
        self.sums["overlap_chance"] += chosen.shape[0] * size / experts
        self.sums["regret"] += float((own_loss - best_loss).sum())
        self.sums["tokens"] += chosen.shape[0]

    def result(self) -> LayerAccuracy | None:
        """Return the averages; ``None`` when no token had an expert."""
        tokens = int(self.sums["tokens"])
        if tokens == 0:
            return None
        mean = {name: value / tokens for name, value in self.sums.items()}
        return LayerAccuracy(
            tolerant=mean["tolerant"],
            tolerant_chance=mean["tolerant_chance"],
            tolerant_corrected=_corrected(mean["tolerant"], mean["tolerant_chance"]),
            overlap=mean["overlap"],
            overlap_chance=mean["overlap_chance"],
            overlap_corrected=_corrected(mean["overlap"], mean["overlap_chance"]),
            regret=mean["regret"],
            tokens=tokens,
        )


@contextmanager
def _hidden_states(layers: dict[str, MoELayer]) -> Iterator[dict[str, Tensor]]:
    """Collect the input (T, D) of each layer while the context is open."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def routing_accuracy(
    model: nn.Module, batches: Iterable[Tensor], *, tau: float = 0.01, chooser: Chooser = "router"
) -> dict[str, LayerAccuracy]:
    """Judge the routing decisions of ``model`` on ``batches`` against the exact local oracle.

    Args:
        model: a language model with MoE layers.
        batches: int64 (B, S) token ids.
        tau: a set is right when its loss is within tau of the best, in units of the output's squared norm.
        chooser: "router" judges the model's own decisions; "random" a random choice of as many experts per token in
            their place; "oracle" the best one (1 by construction: a check of the measure).

    Returns:
        Accuracy by dotted layer name.

    Raises:
        RoutingError: no MoE layer, or too many subsets for an exact search.
        ConfigError: ``tau`` or ``chooser`` is out of range, or a batch holds no token ids (B, S).
    """
    layers = dict(moe_layers(model))
    if not layers:
        raise RoutingError(
            "the model has no MoE layer",
            where=type(model).__name__,
            accepted="a converted model",
            fix="convert it first: thermoe.convert_to_moe(model)",
        )
    if chooser not in CHOOSERS:
        raise UnknownNameError.of("chooser", str(chooser), CHOOSERS, where="routing_accuracy(chooser=...)")
    if not 0 <= tau < math.inf:
        raise ConfigError(
            f"tau is {tau}",
            where="routing_accuracy(tau=...)",
            accepted="a finite number of at least 0",
            fix="leave it at 0.01",
        )
    for name, layer in layers.items():
        experts, top_k = layer.experts.num_experts, int(layer.router.num_slots)  # type: ignore[arg-type]
        largest = max(math.comb(experts, k) for k in range(1, top_k + 1))
        if largest > MAX_SUBSETS:
            raise RoutingError(
                f"{largest} subsets of up to {top_k} of {experts} experts are too many for the exact oracle",
                where=name,
                accepted=f"at most {MAX_SUBSETS} subsets of one size",
                fix="judge a model with fewer experts or a smaller top_k",
            )
    judges = {name: _Judge(layer, tau, chooser) for name, layer in layers.items()}
    with _hidden_states(layers) as seen:
        for batch in batches:
            check_token_ids(batch, where="batches")
            seen.clear()
            model(batch)
            for name, inputs in seen.items():  # a layer the forward did not come to has nothing to judge
                with readable(layers[name].experts, layers[name].router):
                    judges[name].add(inputs)
    results = {name: judge.result() for name, judge in judges.items()}
    return {name: result for name, result in results.items() if result is not None}


def mean_accuracy(layers: Iterable[LayerAccuracy]) -> float | None:
    """Return the tolerant, chance-corrected accuracy averaged over layers; ``None`` when no layer has one."""
    values = [layer.tolerant_corrected for layer in layers if layer.tolerant_corrected is not None]
    return sum(values) / len(values) if values else None
