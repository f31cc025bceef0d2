"""The router that stands in the place of a model's own, and keeps it.

The base is called for the logits, so that whatever transformers hangs on it (recording, the auxiliary loss) goes on
working; scores of selection and combine weights follow the base's own rules; only the choice of experts is a thermoe
router's. A token whose choice is the model's own gets the base's own ids and weights, bit for bit.

A padded token gets no expert. Where the bits of a product depend on how many tokens an expert has (on the CPU, and in
float32), padded tokens keep the base's experts in the computation as long as every real token keeps them too, so that
the logits of real tokens are the model's own; the decision on record leaves padding out in any case.

Shape letters: T tokens, E experts, K slots per token, B sequences, S positions, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thermoe.models.native_experts import rows_are_independent
from thermoe.models.native_scoring import NativeScoring
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.moe.layer import Routed
from thermoe.routers.base import Router


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
                correction = fast(x_TD.float(), logits)
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
