"""The work that a calibration repeats: MoE layers with forced routing, run by the device without a pause.

Routing is drawn once per cell: every token takes k of a random subset of U experts, so that tokens, pairs and opened
experts are known exactly and vary apart from each other. Each layer has weights of its own, together far beyond the
cache; inputs and weights are random normal numbers, because zeros would draw less power.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thermoe.energy.work import LayerWork, StepWork
from thermoe.moe.dispatch import default_backend, run_experts
from thermoe.moe.experts import Experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One operating point.

    Args:
        tokens: tokens per forward.
        active_experts: size of the subset that tokens choose from, U.
        top_k: experts per token.
        duty: share of the time that the device works; below 1 it waits in between.
        role: "fit", "anchor" (the same point again and again, for drift) or "duty" (for the static power).
    """

    tokens: int
    active_experts: int
    top_k: int
    duty: float = 1.0
    role: str = "fit"


class EventClock:
    """Completion times of CUDA work on the monotonic clock, tied to one event synchronised at the start."""

    def __init__(self) -> None:
        self._reference = torch.cuda.Event(enable_timing=True)
        self._reference.record()
        self._reference.synchronize()
        self._reference_s = time.monotonic()

    def mark(self) -> EventMark:
        """Record an event behind the work queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return EventMark(self, event)

    def when_s(self, event: torch.cuda.Event) -> float:
        """Return when ``event`` happened, in seconds of the monotonic clock; waits for it."""
        event.synchronize()
        return self._reference_s + self._reference.elapsed_time(event) / 1e3


@dataclass(frozen=True, slots=True)
class EventMark:
    """The completion of one step."""

    clock: EventClock
    event: torch.cuda.Event

    def time_s(self) -> float:
        """Return the completion time; waits for it."""
        return self.clock.when_s(self.event)


class Workload(Protocol):
    """What `calibrate` can measure."""

    layer: LayerWork
    layers: int

    def prepare(self, cell: Cell) -> tuple[Callable[[], object], int, StepWork]:
        """Return (run one step, forwards per step, work of one forward) for ``cell``.

        The step queues its work and returns a mark with `time_s()`, or ``None`` when the work is done on return.
        """


class MoEStack:
    """L layers of experts, run one after the other.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: F.
        layers: L.
        gated: SwiGLU or ungated GELU experts.
        dtype: of weights and inputs.
        device: where; CUDA graphs are used where experts are computed by grouped products.
        seed: of weights, inputs and routing.
        step_s: a step is repeated inside one graph replay loop until it takes about this long, so that counting it
            costs nothing.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        layers: int,
        gated: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
        seed: int = 0,
        step_s: float = 0.010,
    ) -> None:
        self.device, self.dtype, self.layers, self.step_s = device, dtype, layers, step_s
        self.num_experts, self.hidden_size = num_experts, hidden_size
        # Only grouped products can be captured: the loop over experts waits for its counts.
        self.backend = default_backend(torch.device(device), dtype)
        self._generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        activation = "silu" if gated else "gelu_new"
        with torch.device(device):
            self.experts = [
                Experts(num_experts, hidden_size, intermediate_size, gated=gated, activation=activation).to(dtype)
                for _ in range(layers)
            ]
        self.layer = LayerWork.of(self.experts[0])

    def _routing(self, cell: Cell) -> tuple[list[Tensor], float]:
        """Return ids (T, K) per layer, and the distinct experts they open on average."""
        ids, opened = [], 0
        for _ in range(self.layers):
            subset = torch.randperm(self.num_experts, generator=self._generator)[: cell.active_experts]
            order = torch.rand(cell.tokens, cell.active_experts, generator=self._generator).argsort(-1)
            chosen = subset[order[:, : cell.top_k]]
            opened += int(chosen.unique().numel())
            ids.append(chosen.to(self.device))
        return ids, opened / self.layers

    @torch.no_grad()
    def prepare(self, cell: Cell) -> tuple[Callable[[], object], int, StepWork]:
        """Build (and on CUDA capture) the step of ``cell``; see `Workload`."""
        ids, opened = self._routing(cell)
        x = torch.randn(cell.tokens, self.hidden_size, device=self.device, dtype=self.dtype)
        weights = torch.full((cell.tokens, cell.top_k), 1.0 / cell.top_k, device=self.device, dtype=self.dtype)

        def forward() -> Tensor:
            out = x
            for experts, index in zip(self.experts, ids, strict=True):
                out = run_experts(x, index, weights, experts)
            return out

        run = self._captured(forward) if self.backend != "loop" else forward
        started = time.monotonic()
        for _ in range(3):
            run()
        self._wait()
        once_s = (time.monotonic() - started) / 3
        repeats = max(1, round(self.step_s / once_s))
        clock = EventClock() if self.device.startswith("cuda") else None
        pause_s = repeats * once_s * (1 / cell.duty - 1)

        @torch.no_grad()
        def step() -> object:
            for _ in range(repeats):
                run()
            mark = clock.mark() if clock is not None else None
            if pause_s > 0:
                self._wait()
                time.sleep(pause_s)
            return mark

        pairs = cell.tokens * cell.top_k * self.layers
        work = StepWork(
            layers=self.layers,
            read_bytes=opened * self.layers * self.layer.bytes_per_expert,
            flops=pairs * self.layer.flops_per_pair,
            layer_tokens=cell.tokens * self.layers,
        )
        return step, repeats, work

    def _captured(self, forward: Callable[[], Tensor]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()
        self._kept = (forward, out)  # the graph reads and writes these tensors
        return graph.replay

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
