"""How fast does a whole MoE model train, by what computes its experts and its loss?

A GPT-2 frame of 6 layers, 768 wide, with 32 SwiGLU experts of width 768, 4 per token: float32 master weights, bfloat16
compute, fused AdamW, 64 sequences of 512 random tokens, load-balancing and z-loss. Arms: transformers' own MoE block
("mixtral", `grouped_mm`), our layer with plain `grouped_mm` ("grouped") and with fused kernels ("fused"), each with the
loss of transformers ("plain") or the fused one of `thermoe train`; the last arm compiles the blocks too. Prints
tokens/s, peak memory and the kernels that take the most time; rows go to rows.jsonl.

Run on an NVIDIA GPU of compute capability 9.0 or more:  python benchmarks/training_throughput.py --out FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from thermoe.models.frame import build_frame, native_aux_loss
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.moe.losses import DEFAULT_BALANCE, routing_loss
from thermoe.results import RunFolder
from thermoe.runtime import environment_fingerprint
from thermoe.training.language_loss import fused_loss

#: (block or backend, loss, whether the blocks are compiled)
ARMS = (
    ("mixtral", "plain", False),
    ("grouped", "plain", False),
    ("fused", "plain", False),
    ("mixtral", "fused", False),
    ("grouped", "fused", False),
    ("fused", "fused", False),
    ("fused", "fused", True),
)


def build(arguments: argparse.Namespace, kind: str) -> Any:
    """Return the model on the GPU; every arm starts from the same seed."""
    block = "mixtral" if kind == "mixtral" else "moe"
    model = build_frame(block, vocab_size=arguments.vocabulary, sequence_length=arguments.length).cuda().train()
    for _, layer in moe_layers(model):
        layer.backend = kind
    if block == "mixtral":  # `grouped_mm` takes no part in autocast: its weights are cast in each forward, as ours are
        for layer in model.transformer.h:
            experts = layer.mlp.experts
            layer.mlp.experts = CastExperts(experts)
    return model


class CastExperts(torch.nn.Module):
    """Transformers' experts with float32 weights, computing in bfloat16."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        cast = {name: p.to(torch.bfloat16) for name, p in self.experts.named_parameters()}
        given = (hidden.to(torch.bfloat16), index, weights)
        return torch.func.functional_call(self.experts, cast, given).to(hidden.dtype)


def step_of(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """Return one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    native = not any(True for _ in moe_layers(model))

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        if native:
            loss = loss + DEFAULT_BALANCE["switch"] / 4 * native_aux_loss(model)
        else:
            loss = loss + routing_loss(collect_routing(model).values(), DEFAULT_BALANCE)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(arguments: argparse.Namespace, folder: RunFolder, kind: str, loss_kind: str, compiled: bool) -> float:
    """Train for a few steps, print and record how fast; returns tokens per second."""
    model = build(arguments, kind)
    if compiled:
        for block in model.transformer.h:
            block.compile()
    tokens = torch.randint(0, 50257, (arguments.batch, arguments.length), device="cuda")
    step = step_of(model, tokens)
    with fused_loss(model) if loss_kind == "fused" else contextlib.nullcontext():
        losses = [step() for _ in range(4)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        events = []
        for _ in range(arguments.steps):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            losses.append(step())
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        duration_ms = statistics.median(begin.elapsed_time(end) for begin, end in events)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
    peak_bytes, tokens_per_s = torch.cuda.max_memory_allocated(), tokens.numel() / duration_ms * 1e3
    values = [float(loss) for loss in losses]
    name = f"{kind}, {loss_kind} loss" + (", compiled" if compiled else "")
    print(
        f"{name:<30} {duration_ms:7.1f} ms {tokens_per_s:>9,.0f} tokens/s {peak_bytes / 2**30:5.1f} GiB"
        f"   loss {values[0]:.4f} -> {values[-1]:.4f}",
        flush=True,
    )
    kernels = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    for event in kernels[: arguments.rows]:
        print(f"    {event.self_device_time_total / 1e3:7.2f} ms {event.count:>4} x {event.key[:90]}")
    folder.append(
        "arm",
        computed_by=kind,
        loss_kind=loss_kind,
        compiled=compiled,
        duration_ms=duration_ms,
        tokens_per_s=tokens_per_s,
        peak_bytes=peak_bytes,
        losses=values,
        kernels=[[e.key[:120], e.count, e.self_device_time_total] for e in kernels[:30]],
    )
    return tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=50304, help="GPT-2's 50257, padded to a multiple of 64")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=0, help="kernels printed per arm")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise SystemExit("this benchmark needs a CUDA device of compute capability 9.0 or more")
    torch.set_float32_matmul_precision("high")
    folder = RunFolder.create(arguments.out)
    folder.write_manifest(
        command="benchmarks/training_throughput.py",
        settings=vars(arguments),
        gpu=torch.cuda.get_device_name(),
        environment=environment_fingerprint(),
        finished=False,
    )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    speeds = {}
    for arm in ARMS:
        speeds[arm] = measure(arguments, folder, *arm)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    base = speeds["grouped", "plain", False]
    for arm, speed in speeds.items():
        print(f"{speed / base:5.2f} x plain grouped_mm: {', '.join(map(str, arm[:2]))}{', compiled' if arm[2] else ''}")
    folder.write_manifest(finished=True)


if __name__ == "__main__":
    main()
