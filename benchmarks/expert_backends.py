"""How fast are experts, by backend: ours (`loop`, `grouped`, `fused`) against the "grouped_mm" of transformers?

Every arm computes the same experts on the same uniformly random routing and is checked against float32 (output, and
gradients of tokens, combine weights and experts) before it is timed. "master" has float32 weights and tokens under
autocast to bfloat16; transformers' function knows nothing of autocast, so its arm casts weights and tokens in each
forward. Times are medians; "graph" is the forward replayed from a CUDA graph. Rows go to results.jsonl as measured.

Run on an NVIDIA GPU of compute capability 9.0 or more:  python benchmarks/expert_backends.py --out FOLDER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from cuda_graph import captured
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from thermoe.moe.dispatch import run_experts, run_loop
from thermoe.moe.experts import Experts
from thermoe.results import RunFolder
from thermoe.runtime import environment_fingerprint

#: name: E, D, F, K, gated
SHAPES = {
    "GPT-2 E32 F768 k4 gated": (32, 768, 768, 4, True),
    "GPT-2 E8 F384 k4 ungated": (8, 768, 384, 4, False),
    "OLMoE E64 F1024 k8 gated": (64, 2048, 1024, 8, True),
}
TOKENS = (16, 256, 4096, 32768)
ARMS = ("loop", "grouped", "fused", "hf grouped_mm")
#: The loop waits for its counts in each call; beyond this many tokens it is timed too, below it tells of waiting only.
LOOP_FROM = 4096
TOLERANCE = 2e-2


class HFExperts(nn.Module):
    """What transformers' function expects of an experts module, over our parameters, cast to ``dtype`` when used."""

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        super().__init__()
        self.experts, self.dtype = experts, dtype
        self.num_experts, self.has_gate, self.act_fn = experts.num_experts, experts.gated, experts.act_fn
        self.has_bias = self.is_transposed = self._is_expert_parallel = self.has_post_expert_norm = False
        self.is_concatenated = True
        self.config = SimpleNamespace(_experts_implementation="grouped_mm")

    @property
    def gate_up_proj(self) -> Tensor:
        return self.experts.up_weight.to(self.dtype)

    up_proj = gate_up_proj

    @property
    def down_proj(self) -> Tensor:
        return self.experts.down_proj.to(self.dtype)

    def _apply_gate(self, up: Tensor) -> Tensor:
        gate, value = up.chunk(2, dim=-1)
        return self.act_fn(gate) * value

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        run = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return run(self, x.to(self.dtype), index, weights).to(x.dtype)


def forward_of(arm: str, experts: Experts, autocast: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the arm as a function of (tokens, ids, combine weights)."""
    hf = HFExperts(experts, torch.bfloat16)
    device = experts.down_proj.device.type

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            if arm == "hf grouped_mm":
                return hf(x, index, weights)
            return run_experts(x, index, weights, experts, backend=arm)

    return run


def with_gradients(
    run: Callable[..., Tensor], x: Tensor, index: Tensor, weights: Tensor, experts: Experts, grad: Tensor
) -> list[Tensor]:
    """Return output and gradients of tokens, combine weights and experts."""
    out = run(x, index, weights)
    return [out.detach(), *torch.autograd.grad(out, [x, weights, *experts.parameters()], grad.to(out.dtype))]


def in_float32(experts: Experts, x: Tensor, index: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Return what `with_gradients` should, from the loop over experts in float32."""
    sizes = (experts.num_experts, experts.hidden_size, experts.intermediate_size)
    single = Experts(*sizes, gated=experts.gated, activation=experts.activation).to(x.device)
    single.load_state_dict(experts.state_dict())
    x, weights = (t.detach().float().requires_grad_() for t in (x, weights))
    return with_gradients(lambda *call: run_loop(*call, single), x, index, weights, single, grad)


def check(found: list[Tensor], exact: list[Tensor], what: str) -> float:
    """Return the largest relative error, or stop where it is too large."""
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    if not max(errors) < TOLERANCE:
        raise SystemExit(f"{what} is wrong: relative errors {[f'{e:.1e}' for e in errors]} of out, x, weights, experts")
    return max(errors)


def median_ms(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=20, rep=60, return_mode="median"))


def measure(folder: RunFolder, shape: str, tokens: int, precision: str) -> None:
    """Check and time every arm of one cell, and print its lines."""
    num_experts, hidden, width, top_k, gated = SHAPES[shape]
    torch.manual_seed(0)
    master = precision == "master"
    dtype = torch.float32 if master else torch.bfloat16
    with torch.device("cuda"):
        activation = "silu" if gated else "gelu_new"
        experts = Experts(num_experts, hidden, width, gated=gated, activation=activation).to(dtype)
        index = torch.rand(tokens, num_experts).topk(top_k).indices
        x = torch.randn(tokens, hidden, dtype=dtype).requires_grad_()
        grad = torch.randn(tokens, hidden, dtype=dtype)
        weights = torch.softmax(torch.randn(tokens, top_k), -1).to(dtype).requires_grad_()
    exact = in_float32(experts, x, index, weights, grad)
    flops = 2 * tokens * top_k * hidden * width * (3 if gated else 2)

    lines: dict[str, dict[str, tuple[float, float]]] = {}
    for arm in ARMS:
        if arm == "loop" and tokens < LOOP_FROM:
            continue
        run = forward_of(arm, experts, autocast=master)
        error = check(with_gradients(run, x, index, weights, experts, grad), exact, f"{arm}, {shape}, T={tokens}")

        @torch.no_grad()
        def forward(run: Callable[..., Tensor] = run) -> Tensor:
            return run(x, index, weights)

        modes: dict[str, tuple[Callable[[], object], int]] = {
            "forward": (forward, flops),
            "forward+backward": (lambda run=run: with_gradients(run, x, index, weights, experts, grad), 3 * flops),
        }
        if arm != "loop" and tokens <= 256:
            modes["graph"] = (captured(forward), flops)
        for mode, (call, work) in modes.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            peak = torch.cuda.max_memory_allocated() - before
            ms = median_ms(call)
            lines.setdefault(mode, {})[arm] = (ms * 1e3, work / ms / 1e9)
            folder.append(
                "cell",
                shape=shape,
                tokens=tokens,
                precision=precision,
                arm=arm,
                mode=mode,
                duration_us=ms * 1e3,
                tflops=work / ms / 1e9,
                peak_bytes=peak,
                relative_error=error,
            )
    for mode, arms in lines.items():
        against = arms["hf grouped_mm"][0]
        cells = "".join(
            f"{arms[arm][0]:>9.0f} {arms[arm][1]:>5.0f} {against / arms[arm][0]:>5.2f}" if arm in arms else f"{'':>21}"
            for arm in ARMS
        )
        print(f"{shape:<25} {precision:<7} {tokens:>6} {mode:<17}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise SystemExit("this benchmark needs a CUDA device of compute capability 9.0 or more")
    folder = RunFolder.create(arguments.out)
    folder.write_manifest(
        command="benchmarks/expert_backends.py", environment=environment_fingerprint(), finished=False
    )
    started = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; us, TFLOP/s, times as fast as hf grouped_mm")
    print(f"{'':<58}" + "".join(f"{arm:>21}" for arm in ARMS))
    for shape in arguments.shape:
        for tokens in arguments.tokens:
            for precision in ("bf16", "master"):
                measure(folder, shape, tokens, precision)
                torch.cuda.empty_cache()
    folder.write_manifest(finished=True, duration_s=time.monotonic() - started)


if __name__ == "__main__":
    main()
