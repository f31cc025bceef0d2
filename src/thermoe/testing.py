"""For tests and for authors of plug-ins: tiny models, and `check_router`, the contract every router keeps.

Nothing in the package imports this module. A router of your own passes when

    from thermoe.testing import check_router
    check_router(lambda: MyRouter(16, 8, 3))

raises nothing; the AssertionError names the rule that it breaks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from thermoe.errors import RoutingError
from thermoe.models.convert import convert_to_moe
from thermoe.moe.decision import RoutingContext, RoutingDecision
from thermoe.routers.base import Router

BuildRouter = Callable[[], Router]


def tiny_gpt2(seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    """Return a random GPT-2 of a few thousand weights in evaluation mode, without dropout.

    Args:
        seed: of the weights; the global generator is left as it is.
        settings: fields of `GPT2Config` that replace the tiny ones.
    """
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **settings,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**fields))
        with torch.no_grad():  # larger than at the start of training, biases included: every part matters to the logits
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_moe(seed: int = 0, *, num_experts: int = 8, top_k: int = 2, **options: Any) -> PreTrainedModel:
    """Return `tiny_gpt2` converted by `convert_to_moe`; ``options`` are passed on to it.

    The routers start from weights large enough for their choices to differ clearly from token to token.
    """
    dense = tiny_gpt2(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = convert_to_moe(dense, num_experts=num_experts, top_k=top_k, **options)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, Router):
                    module.weight.normal_(std=0.3)
    return model.eval()


def random_tokens(rows: int, length: int, *, vocab_size: int = 97, seed: int = 0) -> Tensor:
    """Return int64 (rows, length) token ids, none of them 0 (the padding id of the tiny models)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (rows, length), generator=generator)


def check_router(build: BuildRouter, *, rules: Iterable[str] | None = None) -> None:
    """Check a router against the contract, on the CPU and in a few seconds.

    Args:
        build: returns a new router of the same settings at every call.
        rules: names out of `ROUTER_RULES`; all when ``None``.

    Raises:
        AssertionError: a rule is broken; the message begins with its name.
    """
    for name in ROUTER_RULES if rules is None else rules:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                ROUTER_RULES[name](build)
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


def _demand(rule: str, holds: bool | Tensor, message: str) -> None:
    if not bool(holds):
        raise AssertionError(f"{rule}: {message}")


def _evaluated(build: BuildRouter) -> Router:
    router = build().eval()
    with torch.no_grad():  # a spread of scores such as a trained router has
        router.weight.normal_(std=0.5)
    return router


def _tokens(router: Router, count: int) -> Tensor:
    return torch.randn(count, router.hidden_size)


def _context(batch: int, length: int, mask: Tensor | None = None) -> RoutingContext:
    """Return a context with all that a router may go by."""
    ids = torch.arange(100, 100 + batch * length)
    positions = torch.arange(length).expand(batch, -1).reshape(-1)
    return RoutingContext(batch, length, mask, ids, positions)


def _contexts(router: Router, mask: Tensor | None = None) -> tuple[RoutingContext, ...]:
    """Return contexts of 12 tokens that reach every path: prefill of several sequences, and one position of each."""
    return (_context(3, 4, mask), _context(12, 1, mask))[: 2 if router.causal else 1]


def _equal(first: RoutingDecision, second: RoutingDecision, rows: Tensor | slice = slice(None)) -> bool:
    """Whether two decisions are the same bit for bit on ``rows``."""
    return all(
        torch.equal(getattr(first, name)[rows], getattr(second, name)[rows])
        for name in ("logits", "probabilities", "expert_index", "weights")
    )


def _check_record(build: BuildRouter) -> None:
    router = _evaluated(build)
    for context in _contexts(router):
        x = _tokens(router, 12)
        decision = router(x, context)
        experts, slots, outputs = router.num_experts, decision.expert_index.shape[-1], router.num_outputs
        _demand("record", decision.num_experts == experts, "the decision has another number of experts")
        _demand("record", decision.logits.shape == (12, outputs), "logits are not (T, O)")
        _demand("record", decision.probabilities.shape == (12, outputs), "probabilities are not (T, O)")
        _demand("record", decision.expert_index.shape == (12, slots), "expert_index is not (T, K)")
        _demand("record", slots <= router.num_slots, "more slots than num_slots")
        _demand("record", decision.weights.shape == (12, slots), "weights are not (T, K)")
        _demand("record", decision.expert_index.dtype == torch.int64, "expert_index is not int64")
        _demand("record", decision.weights.dtype == x.dtype, "weights are not in the dtype of x")
        p = decision.probabilities
        _demand(
            "record", torch.equal(p, router.probabilities(decision.logits)), "probabilities do not follow the logits"
        )
        _demand("record", torch.allclose(p.sum(-1), torch.ones(12)) and (p >= 0).all(), "probabilities do not sum to 1")
        index = decision.expert_index
        _demand("record", ((index >= 0) & (index <= outputs)).all(), "an expert id is outside 0..O")
        times = torch.zeros(12, outputs + 1).scatter_add(1, index, torch.ones_like(decision.weights))[:, :outputs]
        _demand("record", (times <= 1).all(), "a token names an expert twice")
        _demand("record", torch.equal(decision.counts, times.sum(0)[:experts]), "counts differ from expert_index")
        _demand("record", torch.equal(decision.opened, decision.counts > 0), "opened differs from expert_index")


def _check_weights(build: BuildRouter) -> None:
    router = _evaluated(build)
    for context in _contexts(router):
        decision = router(_tokens(router, 12), context)
        live = decision.active | decision.identity
        _demand("weights", (decision.weights[~live] == 0).all(), "an empty slot has a weight that is not 0")
        _demand("weights", (decision.weights[live] > 0).all(), "a slot is dispatched with weight 0")
        own = router.combine_weights(decision.probabilities, decision.expert_index)
        _demand("weights", torch.equal(own, decision.weights), "weights are not those of the gate on the selection")
        p = torch.nn.functional.pad(decision.probabilities, (0, 1)).gather(-1, decision.expert_index)
        p = torch.where(live, p, 0)
        if router.gate == "renormalized":
            expected = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
        elif router.gate == "probability":
            expected = p
        else:
            expected = torch.where(live, (1 - router.ramp) + router.ramp * router.num_experts * p, 0)
        close = torch.allclose(decision.weights, expected, atol=1e-6)
        _demand("weights", close, f"weights do not follow from the gate {router.gate!r} on the probabilities alone")
    p = torch.softmax(torch.randn(5, router.num_outputs), -1).requires_grad_()
    nothing = router.combine_weights(p, torch.full((5, router.top_k), router.num_outputs))
    _demand("weights", (nothing == 0).all(), "a token without experts has weights that are not 0")
    (gradient,) = torch.autograd.grad(nothing.sum(), p, allow_unused=True)
    _demand("weights", gradient is None or (gradient == 0).all(), "a token without experts gives a gradient")


class _NoHostReads(TorchFunctionMode):
    """Refuses every call that would make the host wait for the device, had the tensors been on one."""

    waits = frozenset(("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose")) | {
        "is_nonzero",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__contains__",
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        _demand("no_sync", name not in self.waits, f"the forward calls {name}, which waits for the device")
        return func(*args, **(kwargs or {}))


def _check_no_sync(build: BuildRouter) -> None:
    router = _evaluated(build)
    with torch.no_grad():
        mask = torch.ones(12, dtype=torch.bool)
        mask[:2] = False
        for context in _contexts(router, mask):
            x = _tokens(router, 12)
            expected = router(x, context)
            torch.compiler.reset()
            compiled = torch.compile(router, backend="eager", fullgraph=True)(x, context)
            _demand("no_sync", _equal(expected, compiled), "the compiled router decides otherwise")
            with _NoHostReads():
                router(x, context)


def _check_float32(build: BuildRouter) -> None:
    router = _evaluated(build).bfloat16()
    x = _tokens(router, 12).bfloat16()
    for context in _contexts(router):
        decision = router(x, context)
        _demand("float32", decision.logits.dtype == torch.float32, "scores of a bfloat16 model are not float32")
        _demand("float32", decision.probabilities.dtype == torch.float32, "probabilities are not float32")
        _demand("float32", decision.weights.dtype == torch.bfloat16, "weights are not in the dtype of x")
        exact = x.double() @ router.weight.double().T
        close = torch.allclose(decision.logits[:, : router.num_experts].double(), exact, atol=1e-4)
        _demand("float32", close, "scores of a bfloat16 model are rounded to bfloat16")
        with torch.autocast("cpu", torch.bfloat16):
            again = router(x, context)
        _demand("float32", torch.equal(decision.logits, again.logits), "autocast lowers the precision of the scores")


def _check_padding(build: BuildRouter) -> None:
    router = _evaluated(build)
    mask = torch.ones(12, dtype=torch.bool)
    mask[[0, 4, 5, 8]] = False
    for padded in _contexts(router, mask):
        x = _tokens(router, 12)
        decision = router(x, padded)
        _demand("padding", (~decision.active[~mask]).all(), "a padded token has an expert")
        _demand("padding", (decision.weights[~mask] == 0).all(), "a padded token has a weight")
        _demand("padding", decision.active[mask].any(-1).all(), "a real token lost its experts to padding")
        other = x.clone()
        other[~mask] = 100 * torch.randn_like(x[~mask])
        same = _equal(decision, router(other, padded), mask)
        _demand("padding", same, "what stands in padded tokens changes the routes of real ones")
        everything = replace(padded, padding_mask=torch.zeros(12, dtype=torch.bool))
        _demand("padding", not router(x, everything).opened.any(), "a batch of padding opens an expert")


def _check_sizes(build: BuildRouter) -> None:
    router = _evaluated(build)
    nothing = _tokens(router, 0)
    for context in (*(() if router.reads else (None,)), _context(0, 1), _context(1, 0)):
        decision = router(nothing, context)
        _demand("sizes", decision.expert_index.shape[0] == 0, "no tokens give a decision that is not empty")
    for top_k in (0, router.num_experts + 1):
        try:
            type(router)(router.hidden_size, router.num_experts, top_k)
        except RoutingError:
            continue
        raise AssertionError(f"sizes: top_k = {top_k} of {router.num_experts} experts is not refused")
    router.active_top_k = 1
    used = router(_tokens(router, 12), _context(3, 4)).active.sum(-1).float()
    most = used.mean() if router.top_k_is_mean else used.max()
    _demand("sizes", most <= 1, "active_top_k = 1 is not followed")


def _check_deterministic(build: BuildRouter) -> None:
    router = _evaluated(build)
    for context in _contexts(router):
        x = _tokens(router, 12)
        before = torch.get_rng_state()
        first = router(x, context)
        _demand("deterministic", torch.equal(before, torch.get_rng_state()), "evaluation draws random numbers")
        torch.manual_seed(99)
        _demand("deterministic", _equal(first, router(x, context)), "two evaluations of one input differ")


def _check_causal(build: BuildRouter) -> None:
    router = _evaluated(build)
    same = [after for batch, length in ((1, 12), (3, 4)) for after in _earlier_routes_stay(router, batch, length)]
    if router.causal:
        _demand("causal", all(same), "a later token changes the route of an earlier one")
        return
    _demand("causal", not all(same), "the router says that it is not causal, and is")
    try:
        router(_tokens(router, 12), _context(12, 1))
    except RoutingError:
        return
    raise AssertionError("causal: a router that is not causal routes a step of generation")


def _earlier_routes_stay(router: Router, batch: int, length: int) -> Iterator[bool]:
    """Yield, for every position, whether routes before it stay when all from it on is changed."""
    context = _context(batch, length)
    assert context.token_ids is not None
    x = _tokens(router, 12)
    before = router(x, context)
    for changed in range(1, length):
        other, ids = x.clone().view(batch, length, -1), context.token_ids.clone().view(batch, length)
        other[:, changed:] += torch.randn_like(other[:, changed:])
        ids[:, changed:] += 50
        after = router(other.view(12, -1), replace(context, token_ids=ids.view(12)))
        yield _equal(before, after, torch.arange(12).view(batch, length)[:, :changed].reshape(-1))


def _check_not_finite(build: BuildRouter) -> None:
    router = _evaluated(build)
    for context in _contexts(router):
        x = _tokens(router, 12)
        for value in (float("nan"), float("inf"), float("-inf")):
            broken = x.clone()
            broken[3] = value
            index = router(broken, context).expert_index
            inside = ((index >= 0) & (index <= router.num_outputs)).all()
            _demand("not_finite", inside, "a score that is not finite leads to an expert id outside 0..O")


def _check_state(build: BuildRouter) -> None:
    router, other = _evaluated(build), build().eval()
    mine = {tensor.data_ptr() for tensor in router.state_dict().values()}
    shared = any(tensor.data_ptr() in mine for tensor in other.state_dict().values())
    _demand("state", not shared, "two routers share a tensor")
    x = _tokens(router, 12)
    rebuilt = type(router)(
        router.hidden_size, router.num_experts, router.top_k, **json.loads(json.dumps(router.options()))
    ).eval()
    _demand("state", rebuilt.options() == router.options(), "options() do not rebuild the router they describe")
    for name, twin in (("another router", other), ("a router built from options()", rebuilt)):
        twin.load_state_dict(router.state_dict())
        for key, value in twin.state_dict().items():
            same = torch.equal(value, router.state_dict()[key])
            _demand("state", same, f"{key} is not the same after loading it into {name}")
    for name, twin in (
        ("another router", other),
        ("a router built from options()", rebuilt),
        ("a copy", copy.deepcopy(router)),
    ):
        for context in _contexts(router):
            same = _equal(router(x, context), twin(x, context))
            _demand("state", same, f"{name} with the same state decides otherwise")


ROUTER_RULES: dict[str, Callable[[BuildRouter], None]] = {
    "record": _check_record,
    "weights": _check_weights,
    "no_sync": _check_no_sync,
    "float32": _check_float32,
    "padding": _check_padding,
    "sizes": _check_sizes,
    "deterministic": _check_deterministic,
    "causal": _check_causal,
    "not_finite": _check_not_finite,
    "state": _check_state,
}
