"""The forwards of learning, recorded in CUDA graphs where shapes come back.

Parts of a batch and held-back rows are small: launching the kernels of a forward and its backward one by one takes
several times as long as running them. A shape that comes back is recorded once, and replayed from then on.

A recording holds on to everything that Python decided when it was made. So all of that is compared before each batch
(`_fingerprint`): modules, plain settings, addresses of weights, modes of the machine. Where anything differs, what was
recorded is dropped. And nothing is recorded of models whose code may wait for the host, of padded batches, or beside
hooks of others; `why_not` says so, and every forward runs kernel by kernel then.

Shape letters: B sequences, S positions, T tokens, K slots.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from thermoe.adapt.learning_costs import LearningCosts
from thermoe.adapt.learning_parts import replayed, unsteered
from thermoe.adapt.objectives import LearnBatch, Objective, Proposal
from thermoe.adapt.reading import RouterInput, record_inputs, token_nll
from thermoe.models.classes import MoEModelMixin
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.dispatch import default_backend
from thermoe.moe.layer import MoELayer, routed_modules
from thermoe.routers.fast_weights import FastWeights

#: A shape is recorded at this use of it; of so many, the one that was not used for longest makes room.
#: It is recorded again after `LATER` more uses.
RECORD_AT_USE, MOST_RECORDED, LATER = 3, 8, 32
#: Backends of experts that never wait for the host where `default_backend` is one of them.
SYNC_FREE = ("auto", "fused", "grouped")
#: What layers note of a forward before it, which decides nothing in the next.
NOTED = ("call_shape",)


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    """A graph with the tensors that it reads and those that it writes."""

    graph: Any
    given: dict[str, Tensor]
    result: Any
    decisions: list[RoutingDecision | None]
    counts: Tensor


class Forwards:
    """Makes the forwards of learning.

    Args:
        model: the model, with its fast weights in place.
        fast: by layer name.
        objective: what gradients are of.
        costs: counts the work of forwards.
        record: whether CUDA graphs may be used.

    Attributes:
        why_not: why nothing is recorded, or ``None``.
        counts: float32 (L, E), tokens by layer and expert of the last forward, where it was a recorded one; else
            ``None``: they follow from the decisions on record.
    """

    def __init__(
        self,
        model: nn.Module,
        fast: Mapping[str, FastWeights],
        objective: Objective,
        costs: LearningCosts,
        *,
        record: bool,
    ) -> None:
        self._model, self._fast, self._objective, self._costs, self._record = model, fast, objective, costs, record
        self.counts: Tensor | None = None
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._uses: Counter[Any] = Counter()
        self._print: list[Any] = []
        self._failed: str | None = None
        self._stream: Any = None
        self.why_not: str | None = "no batch was read"

    @property
    def recorded(self) -> int:
        """How many graphs are held."""
        return len(self._recorded)

    def begin(self) -> None:
        """Look at the model as it is for the batch that comes, and drop what was recorded of another one."""
        self.why_not = self._why_not()
        found = [] if self.why_not is not None else _fingerprint(self._model)
        if found != self._print:
            self._recorded.clear()
            self._uses.clear()
        self._print = found

    def nll(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return float32 (B, S - 1), nats of each predicted token, without a graph.

        It may be written over by the next forward of learning, as may the decisions on record.
        """

        def work(given: Mapping[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return token_nll(self._model, given["input_ids"], mask)[0]

        without = tuple(name for name, module in self._routed() if module.router.fast is None)
        found: Tensor = self._run(("nll", without), work, {"input_ids": input_ids}, mask)
        return found

    def learn(
        self, batch: LearnBatch, chosen: Sequence[Tensor | None] | None, *, free: bool
    ) -> tuple[Proposal, Mapping[str, RouterInput]]:
        """Return what the objective makes of a part of a batch, and what the routers saw; both as `nll` says.

        Args:
            batch: the part; its ``nll``, which may be that of the whole batch, is not read.
            chosen: int64 (T, K) by layer, what its tokens are given; ``None``: routers choose.
            free: each token has its own top-k instead, whatever price or capacity.
        """
        given = {"input_ids": batch.input_ids, "weights": batch.weights}
        if chosen is not None and not free:
            given |= {f"layer {i}": ids for i, ids in enumerate(chosen) if ids is not None}

        def work(given: Mapping[str, Tensor]) -> tuple[Proposal, Mapping[str, RouterInput]]:
            there = None
            if chosen is not None and not free:
                there = [given.get(f"layer {i}") for i in range(len(chosen))]
            with (
                unsteered(self._model) if free else replayed(self._model, there),
                torch.enable_grad(),
                record_inputs(self._fast) as seen,
            ):
                nll, _ = token_nll(self._model, given["input_ids"], batch.attention_mask)
                part = replace(batch, input_ids=given["input_ids"], nll=nll, weights=given["weights"])
                return self._objective.learn(part), seen

        if not getattr(self._objective, "recordable", False):
            self.counts = None
            return work(given)
        found: tuple[Proposal, Mapping[str, RouterInput]] = self._run(
            ("learn", free, tuple(batch.fast)), work, given, batch.attention_mask
        )
        return found

    # -- recording -----------------------------------------------------------------------------------------------------

    def _run(self, use: Any, work: Callable[[Mapping[str, Tensor]], Any], given: dict[str, Tensor], mask: Any) -> Any:
        self.counts = None
        if self.why_not is not None or mask is not None:
            return work(given)
        key = use, tuple((name, value.shape, value.dtype) for name, value in given.items())
        held = self._recorded.get(key)
        if held is None:
            self._uses[key] += 1
            if self._uses[key] < RECORD_AT_USE:
                return work(given)
            try:
                held = self._recorded[key] = self._made(work, given)
            except (RuntimeError, AssertionError) as error:
                self._failed = self.why_not = f"the model cannot be recorded: {[*str(error).splitlines(), ''][0]}"
                self._recorded.clear()
                return work(given)
            if len(self._recorded) > MOST_RECORDED:
                # Recorded anew at once, it would be so at every use where more shapes than these take turns.
                self._uses[self._recorded.popitem(last=False)[0]] = -LATER
        self._recorded.move_to_end(key)
        for name, value in given.items():
            held.given[name].copy_(value)
        held.graph.replay()
        for (_, module), decision in zip(routed_modules(self._model), held.decisions, strict=True):
            module.last_routing = decision
        self.counts = held.counts.clone()
        return held.result

    def _made(self, work: Callable[[Mapping[str, Tensor]], Any], given: Mapping[str, Tensor]) -> _Recorded:
        device = next(iter(given.values())).device
        with torch.cuda.device(device):
            inputs = {name: value.clone() for name, value in given.items()}
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            self._forget_graphs()
            with torch.cuda.stream(self._stream):
                work(inputs)  # what a first run on a stream sets up is no part of the recording
                self._forget_graphs()
            torch.cuda.current_stream().wait_stream(self._stream)
            # What is recorded runs one at a time and is read before the next, so that all may share their memory.
            pool = next((one.graph.pool() for one in self._recorded.values()), None)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                result = work(inputs)
                counts = self._costs.last_counts(0)
            return _Recorded(graph, inputs, result, self._forget_graphs(), counts)

    def _forget_graphs(self) -> list[RoutingDecision | None]:
        """Let go of the autograd history of the decisions on record, which belongs to a stream; return them."""
        for _, module in routed_modules(self._model):
            if module.last_routing is not None:
                module.last_routing = module.last_routing.detach()
        return [module.last_routing for _, module in routed_modules(self._model)]

    def _routed(self) -> list[tuple[str, Any]]:
        return [(name, module) for name, module in routed_modules(self._model) if name in self._fast]

    def _why_not(self) -> str | None:
        model = self._model
        if not self._record:
            return "graphs=False"
        if self._failed is not None:
            return self._failed
        if not isinstance(model, MoEModelMixin):
            return f"{type(model).__name__} is no converted model, and its own code may wait for the host"
        tensors = [*model.parameters(), *model.buffers()]
        devices = {tensor.device for tensor in tensors}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            return f"the model is on {', '.join(sorted(map(str, devices)))}, not on one GPU"
        if model.training:
            return "the model is in training mode"
        of_all = nn.modules.module
        if of_all._global_forward_hooks or of_all._global_forward_pre_hooks or of_all._global_backward_hooks:
            return "all modules have hooks"
        for name, module in model.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            backward = module._backward_hooks or module._backward_pre_hooks
            if not all(getattr(hook, "in_graphs", False) for hook in hooks) or backward:
                return f"{name or type(model).__name__} has hooks"
            if "forward" in vars(module):  # as accelerate does to move weights in and out
                return f"{name or type(model).__name__} has a forward that was put in from outside"
        for name, module in routed_modules(model):
            if not isinstance(module, MoELayer) or module.backend not in SYNC_FREE:
                return f"the experts of {name} may wait for the host"
            if default_backend(next(iter(devices)), module.experts.down_proj.dtype) not in SYNC_FREE:
                return f"the experts of {name} wait for the host in {module.experts.down_proj.dtype} on this GPU"
            if not type(module.router).__module__.startswith("thermoe."):
                return f"the router of {name}, {type(module.router).__name__}, may wait for the host"
        return None


def _is_plain(value: Any) -> bool:
    """Whether a value is a setting: a number, a flag, a text, or a short collection of them."""
    if type(value) in (bool, int, float, str):
        return True
    if type(value) not in (list, tuple, dict) or len(value) > 64:
        return False
    inside = value.values() if isinstance(value, dict) else value
    return all(type(one) in (bool, int, float, str) for one in inside)


def _fingerprint(model: nn.Module) -> list[Any]:
    """Return all that a recording of the model's forward depends on and that Python can change."""
    sdp = torch.backends.cuda
    found: list[Any] = [
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        (sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled(), sdp.math_sdp_enabled(), sdp.cudnn_sdp_enabled()),
        getattr(getattr(model, "config", None), "_attn_implementation", None),
    ]
    for module in model.modules():
        # An instance may have a forward of its own. The class, because an id is free again once its module is gone.
        found.append((id(module), type(module), id(vars(module).get("forward"))))
        found.append([(k, v) for k, v in vars(module).items() if k not in NOTED and _is_plain(v)])
    found.append([(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (*model.parameters(), *model.buffers())])
    return found
