"""What a router costs: from hidden states to the decision with its counts, against plain top-k and the expert layer.

python benchmarks/routers.py [--out FOLDER]    (`make bench`)

Every router runs at T = 1, 16, 64, 256 tokens as one decode step (one token per sequence) and at T = 8192 as a prefill,
for E = 32, 64, 128 experts, top-8 (top-4 at E = 32), width 2048. Times are medians over repeats with the spread of the
middle half. On CUDA each is also timed as a replayed graph, which is how decoding runs, and the expert layer of OLMoE's
shape (width 1024, bfloat16) is timed beside it: a router should take at most 5 % of it. "priced" is what sessions
put in. What runs without our kernels takes long and says little at other sizes: it is timed at 16 tokens only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from cuda_graph import captured
from torch import Tensor

from thermoe.adapt.instrument import FAVOURITE_WEIGHT
from thermoe.moe import decision
from thermoe.moe.decision import RoutingContext
from thermoe.moe.dispatch import run_experts
from thermoe.moe.experts import Experts
from thermoe.results import RunFolder
from thermoe.routers import base, priced, topk
from thermoe.routers.base import Router
from thermoe.routers.swap import build_router
from thermoe.runtime import environment_fingerprint

TOKENS = (1, 16, 64, 256, 8192)
EXPERTS = {32: 4, 64: 8, 128: 8}
WIDTH, EXPERT_WIDTH = 2048, 1024


def priced_by_gate(experts: int) -> dict:
    """Return options of the priced router by the gate, at a price that closes experts."""
    return {"price": 2e-3, "open_cost": [68.0] * experts}


def priced_in_sessions(experts: int) -> dict:
    """Return the same for what `AdaptiveSession` puts in."""
    return priced_by_gate(experts) | {"benefit": "distortion", "favourite_weight": FAVOURITE_WEIGHT}


#: name: (registered router, options by number of experts, whether its kernels may run)
ARMS: dict[str, tuple[str, Callable[[int], dict], bool]] = {
    "topk": ("topk", lambda e: {}, True),
    "topk, no kernel": ("topk", lambda e: {}, False),
    "oea": ("oea", lambda e: {"k0": 2}, True),
    "priced": ("priced", priced_in_sessions, True),
    "priced, no kernel": ("priced", priced_in_sessions, False),
    "priced gate": ("priced", priced_by_gate, True),
}
#: What is timed at 16 tokens only.
SLOW = ("topk, no kernel", "priced, no kernel", "priced gate")
#: Who asks whether a kernel runs.
SWITCHES = (
    (priced, "can_fuse"),
    (priced, "can_choose"),
    (topk, "can_choose"),
    (base, "can_choose"),
    (decision, "can_count"),
)


def kernels(*, on: bool) -> AbstractContextManager[object]:
    """Return what keeps the kernels of routers and counts from running unless ``on``."""
    stack = ExitStack()
    for module, name in () if on else SWITCHES:
        stack.enter_context(patch.object(module, name, lambda *_: False))
    return stack


def context_of(tokens: int) -> RoutingContext:
    """Return a decode step, or beyond 256 tokens a prefill of sequences of 512."""
    return RoutingContext(tokens, 1) if tokens <= 256 else RoutingContext(tokens // 512, 512)


def routed(router: Router, x: Tensor, context: RoutingContext) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """Return what is timed."""

    @torch.no_grad()
    def run() -> tuple[Tensor, Tensor, Tensor]:
        answer = router(x, context)
        return answer.weights, answer.counts, answer.opened

    return run


def median_us(run: Callable[[], object], device: str, budget_s: float) -> tuple[float, float, float]:
    """Return median, lower and upper quartile in microseconds; on CUDA over batches of repeats between two events."""
    run()
    if device == "cpu":
        times, begun = [], time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - begun < budget_s and len(times) < 200):
            start = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - start))
    else:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        repeats = max(1, min(20, int(0.01 / (time.perf_counter() - begun))))
        times = []
        for _ in range(11):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                run()
            end.record()
            end.synchronize()
            times.append(1e3 * start.elapsed_time(end) / repeats)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, low, high


def time_layer(layer: Experts, x: Tensor, context: RoutingContext, top_k: int) -> float:
    """Return the microseconds of the experts alone under plain top-k, as a replayed graph."""
    router = build_router("topk", WIDTH, layer.num_experts, top_k).to(x.device).eval()

    @torch.no_grad()
    def run() -> Tensor:
        return run_experts(x, answer.expert_index, answer.weights, layer)

    with torch.no_grad():
        answer = router(x, context)
    return median_us(captured(run), "cuda", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="run folder; nothing is kept without one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget-s", type=float, default=0.15, help="on a CPU: seconds per case")
    args = parser.parse_args()
    on_cuda = args.device.startswith("cuda")
    run = RunFolder.create(args.out) if args.out else None
    if run:
        run.write_manifest(command="routers", environment=environment_fingerprint())
    dtype = torch.bfloat16 if on_cuda else torch.float32
    print(
        f"{'E':>4} {'T':>5}  {'router':30} {'eager us':>10} {'x topk':>7}"
        + ("  graph us  x topk  of layer" if on_cuda else "")
    )
    for experts, top_k in EXPERTS.items():
        layer = (
            Experts(experts, WIDTH, EXPERT_WIDTH, gated=True, activation="silu").to(args.device, dtype)
            if on_cuda
            else None
        )
        for tokens in TOKENS:
            x, context = torch.randn(tokens, WIDTH, device=args.device, dtype=dtype), context_of(tokens)
            plain: dict[str, float] = {}
            layer_us = None if layer is None else time_layer(layer, x, context, top_k)
            for name, (kind, options, fused) in ARMS.items():
                if not (fused or on_cuda) or (name in SLOW and tokens != 16):  # on a CPU no kernel runs anyway
                    continue
                torch.manual_seed(0)
                router = build_router(kind, WIDTH, experts, top_k, options(experts)).to(args.device).eval()
                step = routed(router, x, context)
                row = {"experts": experts, "top_k": top_k, "tokens": tokens, "router": name, "device": args.device}
                with kernels(on=fused):
                    times = median_us(step, args.device, args.budget_s)
                    row["eager_us"], row["eager_low_us"], row["eager_high_us"] = times
                    if on_cuda:
                        times = median_us(captured(step), args.device, 1)
                        row["graph_us"], row["graph_low_us"], row["graph_high_us"] = times
                        row["layer_us"] = layer_us
                if name == "topk":
                    plain = {key: row[key] for key in ("eager_us", "graph_us") if key in row}
                eager = row["eager_us"]
                text = f"{experts:>4} {tokens:>5}  {name:30} {eager:10.1f} {eager / plain['eager_us']:7.2f}"
                if on_cuda:
                    graph = row["graph_us"]
                    text += f" {graph:9.1f} {graph / plain['graph_us']:7.2f} {graph / layer_us:8.1%}"
                print(text, flush=True)
                if run:
                    run.append("router", **row)
    if run:
        run.write_manifest(finished=True)


if __name__ == "__main__":
    main()
