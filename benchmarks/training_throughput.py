"""How fast does a whole MoE model train, by backend of its experts?

A GPT-2 frame of 6 layers, 768 wide, with 32 SwiGLU experts of width 768, 4 per token: float32 weights, autocast to
bfloat16, fused AdamW, 64 sequences of 512 random tokens. Arms: experts by "grouped" or "fused", eager or compiled by
torch.compile, with the loss of transformers on full logits or the chunked one of thermoe. Prints tokens/s, peak memory
and the kernels that take the most time in one step; rows go to results.jsonl.

Run on an NVIDIA GPU of compute capability 9.0 or more:  python benchmarks/training_throughput.py --out FOLDER
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from thermoe.models.classes import MoEGPT2Config
from thermoe.moe.layer import moe_layers
from thermoe.results import RunFolder
from thermoe.runtime import environment_fingerprint
from thermoe.training_loss import next_token_loss

BACKENDS = ("grouped", "fused")


def build(arguments: argparse.Namespace, backend: str) -> Any:
    """Return the model on the GPU, with its experts computed by ``backend``."""
    torch.manual_seed(0)
    config = MoEGPT2Config(
        vocab_size=50257,
        n_positions=arguments.length,
        n_embd=768,
        n_layer=arguments.layers,
        n_head=12,
        num_experts=32,
        num_experts_per_tok=4,
        expert_intermediate_size=768,
        gated_experts=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config).train()
    for _, layer in moe_layers(model):
        layer.backend = backend
    return model


def step_of(model: Any, loss_kind: str, compiled: bool, tokens: Tensor) -> Callable[[], Tensor]:
    """Return one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    body = torch.compile(model.transformer) if compiled else model.transformer
    whole = torch.compile(model) if compiled else model

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if loss_kind == "full":
                loss = whole(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                hidden = body(input_ids=tokens, use_cache=False).last_hidden_state
                loss = next_token_loss(hidden, model.lm_head.weight, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(arguments: argparse.Namespace, folder: RunFolder, backend: str, loss_kind: str, compiled: bool) -> float:
    """Train for a few steps, print and record how fast; returns tokens per second."""
    model = build(arguments, backend)
    tokens = torch.randint(0, 50257, (arguments.batch, arguments.length), device="cuda")
    step = step_of(model, loss_kind, compiled, tokens)
    started = time.monotonic()
    losses = [step() for _ in range(3)]
    torch.cuda.synchronize()
    warmup_s = time.monotonic() - started
    torch.cuda.reset_peak_memory_stats()
    durations = []
    for _ in range(arguments.steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        losses.append(step())
        end.record()
        durations.append((begin, end))
    torch.cuda.synchronize()
    duration_ms = statistics.median(begin.elapsed_time(end) for begin, end in durations)
    peak_bytes = torch.cuda.max_memory_allocated()
    tokens_per_s = tokens.numel() / duration_ms * 1e3
    values = [float(loss) for loss in losses]
    name = f"{backend}, {'compiled' if compiled else 'eager'}, {loss_kind} loss"
    print(
        f"{name:<32} {duration_ms:8.1f} ms {tokens_per_s:>10,.0f} tokens/s {peak_bytes / 2**30:6.1f} GiB"
        f"   loss {values[0]:.4f} -> {values[-1]:.4f}   warm-up {warmup_s:.0f} s",
        flush=True,
    )
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    table = profiled.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=arguments.rows, max_name_column_width=72
    )
    (folder.path / f"profile-{backend}-{'compiled' if compiled else 'eager'}-{loss_kind}.txt").write_text(
        profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=110)
    )
    kernels = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total_us = sum(event.self_device_time_total for event in kernels)
    if not kernels:
        print(table)
    for event in kernels[: arguments.rows]:
        share = event.self_device_time_total / total_us
        print(f"    {event.self_device_time_total / 1e3:7.2f} ms {share:4.0%} {event.count:>4} x {event.key[:90]}")
    print(f"    {total_us / 1e3:7.2f} ms in kernels of this step", flush=True)
    folder.append(
        "arm",
        backend=backend,
        loss_kind=loss_kind,
        compiled=compiled,
        duration_ms=duration_ms,
        tokens_per_s=tokens_per_s,
        peak_bytes=peak_bytes,
        losses=values,
        warmup_s=warmup_s,
        kernels=[[e.key, e.count, e.self_device_time_total] for e in kernels[:40]],
    )
    return tokens_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=14, help="kernels printed per arm")
    parser.add_argument("--compile", choices=["both", "no", "only"], default="both")
    parser.add_argument("--loss", choices=["full", "chunked"], nargs="+", default=["full", "chunked"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise SystemExit("this benchmark needs a CUDA device of compute capability 9.0 or more")
    torch.set_float32_matmul_precision("high")
    folder = RunFolder.create(arguments.out)
    folder.write_manifest(
        command="benchmarks/training_throughput.py", environment=environment_fingerprint(), finished=False
    )
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    speeds = {}
    compiling = {"both": (False, True), "no": (False,), "only": (True,)}[arguments.compile]
    for compiled, loss_kind, backend in itertools.product(compiling, arguments.loss, BACKENDS):
        speeds[compiled, loss_kind, backend] = measure(arguments, folder, backend, loss_kind, compiled)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    for compiled, loss_kind in itertools.product(compiling, arguments.loss):
        ratio = speeds[compiled, loss_kind, "fused"] / speeds[compiled, loss_kind, "grouped"]
        print(f"fused / grouped, {'compiled' if compiled else 'eager'}, {loss_kind} loss: {ratio:.2f}")
    folder.write_manifest(finished=True)


if __name__ == "__main__":
    main()
