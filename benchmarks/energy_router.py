"""What the energy-aware router saves, and what it costs in perplexity, on a trained model.

python benchmarks/energy_router.py fronts|sweep|loop|shape --model FOLDER --data DATA --out runs/energy-router
(FOLDER: a model saved by convergence.py --save; DATA: from prepare_tokens.py.)

fronts: perplexity against distinct experts in decode grouping, for top-k, OEA and the priced router with each benefit,
    on the same text, with standard errors of the paired difference to top-k over sequences.
sweep: measured joules per token of the same policies in teacher-forced decoding (CUDA graphs; `static_decode.py`) at
    several batch sizes, and of prefill, in two passes of opposite order; perplexity and experts of the same forwards.
shape: joules of eight MoE layers of OLMoE's shape alone, where weights dominate; random weights, no perplexity.
loop: `AdaptiveSession` holding a budget: reaching it, following a step, with the sensor and with the cost model alone.

Prices are given as a multiple of the mean sensitivity of the model's experts per opened expert (decode) or per pair
(prefill), so that they mean the same in every model.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda_graph import captured
from static_decode import StaticDecoder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from thermoe import CostModel, set_router
from thermoe.energy.work import LayerWork, ModelWork
from thermoe.energy.workload import EventClock
from thermoe.evaluation import sequence_nll
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer, collect_routing, routed_modules
from thermoe.results import RunFolder
from thermoe.routers.topk import TopKRouter
from thermoe.runtime import environment_fingerprint
from thermoe.sensitivity import measure_sensitivity
from thermoe.telemetry import EnergyMeter

DECODE_PRICES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0)
PREFILL_PRICES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def load(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor], float]:
    """Return the model, the validation rows by name, and the mean sensitivity of its experts."""
    model = AutoModelForCausalLM.from_pretrained(args.model).eval().to(args.device)
    if args.dtype == "bfloat16":
        model.to(torch.bfloat16)
    rows = {}
    for path in sorted(args.data.glob("valid_*.npy")):
        ids = np.load(path, mmap_mode="r")
        count = min(len(ids) // (args.seq + 1), args.rows)
        table = torch.from_numpy(ids[: count * (args.seq + 1)].astype(np.int64)).view(count, args.seq + 1)
        rows[path.stem.removeprefix("valid_")] = table.to(args.device)
    calibration = torch.cat([part[-args.calibration_rows :, : args.seq] for part in rows.values()])
    found = measure_sensitivity(model, calibration, batch_size=8)
    args.sensitivity = {name: values.tolist() for name, values in found.items()}
    mean = float(torch.stack(list(found.values())).mean())
    # The text that sensitivities were measured on is not scored.
    return model, {name: part[: -args.calibration_rows] for name, part in rows.items()}, mean


def install(model: nn.Module, args: argparse.Namespace, kind: str, price: float, *, grouped: bool = False) -> None:
    """Give the model a policy; ``price`` is k0 for OEA, and in nats per opened expert (per pair in prefill) else.

    "priced-f2" weighs what a token loses with its favourite twice, "priced-favourites" closes no favourite.
    """
    set_router(model, "topk")
    if kind == "topk":
        return
    if kind == "oea":
        set_router(model, "oea", k0=int(price), group_by_position=grouped)
        return
    variant = kind.partition("-")[2]
    relative = CostModel.prior(args.gpu).relative_costs(ModelWork.of(model).layers[0])
    opening = relative[1][0]
    benefit = "gate" if variant == "gate" else "distortion"
    weight = re.fullmatch(r"f(\d+(?:\.\d+)?)", variant)
    set_router(
        model, "priced", price=price / opening, prefill_price=price, pair_cost=relative[0], open_cost=relative[1],
        benefit=benefit, drop="phase2" if variant == "favourites" else "all",
        favourite_weight=float(weight[1]) if weight else 1.0, group_by_position=grouped,
    )  # fmt: skip
    for layer_name, module in routed_modules(model):
        uniform = variant in ("uniform", "gate")
        values = args.sensitivity[layer_name]
        module.router.set_sensitivity([args.mean] * len(values) if uniform else values)


def policies(args: argparse.Namespace, prices: tuple[float, ...]) -> Iterator[tuple[str, float]]:
    """Yield (kind, price)."""
    yield "topk", 0.0
    for k0 in range(1, args.top_k):
        yield "oea", float(k0)
    kinds = ["priced", "priced-f2", "priced-f4", "priced-f8", "priced-favourites"]
    for kind in kinds + (["priced-uniform", "priced-gate"] if args.all_variants else []):
        for price in prices:
            yield kind, price * (1.0 if kind == "priced-gate" else args.mean)


@torch.no_grad()
def score(model: nn.Module, rows: Tensor, batch: int) -> tuple[Tensor, float, float]:
    """Return nats per sequence, and distinct experts and experts per token as if decoded ``batch`` at a time."""
    nll, opened, pairs, groups, tokens = (
        [],
        torch.zeros((), device=rows.device),
        torch.zeros((), device=rows.device),
        0,
        0,
    )
    for part in rows[: len(rows) // batch * batch, :-1].split(batch):
        nll.append(sequence_nll(model(part, use_cache=False).logits, part))
        for decision in collect_routing(model).values():
            index = decision.expert_index.view(*part.shape, -1).transpose(0, 1).flatten(1)
            seen = torch.zeros(index.shape[0], decision.num_experts + 1, device=rows.device)
            opened += seen.scatter_(1, index, 1.0)[:, :-1].sum()
            pairs += decision.active.sum()
            groups, tokens = groups + index.shape[0], tokens + decision.active.shape[0]
    return torch.cat(nll), float(opened) / groups, float(pairs) / tokens


def run_fronts(args: argparse.Namespace, run: RunFolder, model: nn.Module, rows: dict[str, Tensor]) -> None:
    """Write a row per text, batch size and policy."""
    for text, table in rows.items():
        for batch in args.batches:
            base: Tensor | None = None
            for kind, price in policies(args, DECODE_PRICES):
                if batch == 1 and kind == "oea":  # one token opens what it uses
                    continue
                install(model, args, kind, price, grouped=True)
                nll, distinct, k = score(model, table, batch)
                base = nll if base is None else base
                per_token = (nll - base) / (args.seq - 1)
                row = {
                    "text": text, "batch": batch, "policy": kind, "price_nats": price, "distinct_experts": distinct,
                    "experts_per_token": k, "nll": float(nll.mean()) / (args.seq - 1),
                    "dnll": float(per_token.mean()), "dnll_se": float(per_token.std() / len(per_token) ** 0.5),
                    "tokens": nll.numel() * (args.seq - 1),
                }  # fmt: skip
                run.append("front", **row)
                print(f"{text} B={batch} {kind} {price:.4g}: {distinct:.2f} distinct, k {k:.2f}, "
                      f"dnll {row['dnll']:+.4f} +- {row['dnll_se']:.4f}", flush=True)  # fmt: skip


def measured(meter: EnergyMeter, name: str, step: Callable[[], None], tokens: int, window_s: float) -> dict[str, Any]:
    """Return the joules per token of ``step`` between two ticks of the counter, after as long unmeasured."""
    on_gpu = torch.cuda.is_available() and any(device.kind == "gpu" for device in meter.devices)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    for _ in range(3):
        step()
    wait()
    begun = time.perf_counter()
    for _ in range(5):
        step()
    wait()
    repeats = max(1, round(0.02 / ((time.perf_counter() - begun) / 5)))
    clock, end = EventClock() if on_gpu else None, time.perf_counter() + 0.4
    while time.perf_counter() < end:
        for _ in range(repeats):
            step()
        wait()
    with meter.aligned_window(name, min_s=window_s) as window:
        while not window.done:
            for _ in range(repeats):
                step()
            window.count(repeats * tokens, None if clock is None else clock.mark())
    result = window.result
    return {
        "j_per_token": result.j_per_token, "power_w": result.power_w, "temp_c": result.temp_end_c,
        "tokens_per_s": (result.tokens or 0) / result.duration_s, "energy_rel_sd": result.energy_rel_sd,
        "provenance": result.provenance, "flags": list(result.flags), "reason": result.reason,
    }  # fmt: skip


class Prefill:
    """The forward of a whole batch, captured."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.model, self.rows = model, rows[:, :-1].contiguous()
        self.run: Callable[[], object] = self._forward

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return self.model.transformer(self.rows, use_cache=False).last_hidden_state

    def capture(self) -> None:
        """Record the forward into a CUDA graph."""
        self.run = captured(self._forward)


def run_sweep(args: argparse.Namespace, run: RunFolder, model: nn.Module, rows: dict[str, Tensor]) -> None:
    """Write a row per batch size, policy and pass."""
    table = next(iter(rows.values()))
    plan = [(batch, kind, price) for batch in args.batches for kind, price in policies(args, DECODE_PRICES)
            if kind in ("topk", "priced") or (kind == "oea" and batch > 1)]  # fmt: skip
    plan += [(0, kind, price) for kind, price in policies(args, PREFILL_PRICES) if kind in ("topk", "priced")]
    base: Tensor | None = None
    with EnergyMeter(devices=args.device) as meter:
        for number, order in enumerate((plan, plan[::-1])):
            for batch, kind, price in order:
                install(model, args, kind, price)
                if batch:
                    decoder = StaticDecoder(model, table[:batch])
                    decoder.capture()
                    found = measured(meter, f"{kind} {price:.3g} B{batch}", decoder.step, batch, args.window_s)
                    found |= decoder.means()
                else:
                    prefill = Prefill(model, table[: args.prefill_rows])
                    prefill.capture()
                    found = measured(
                        meter, f"{kind} {price:.3g} prefill", prefill.run, prefill.rows.numel(), args.window_s
                    )
                    if number == 0:
                        nll, _, k = score(model, table[: 8 * args.prefill_rows], args.prefill_rows)
                        base = nll if base is None else base  # top-k comes first
                        per_token = (nll - base) / (args.seq - 1)
                        found |= {
                            "nll": float(nll.mean()) / (args.seq - 1), "experts_per_token": k,
                            "dnll": float(per_token.mean()), "dnll_se": float(per_token.std() / len(per_token) ** 0.5),
                        }  # fmt: skip
                run.append("sweep", batch=batch, policy=kind, price_nats=price, order=number, **found)
                j = found["j_per_token"]
                print(f"B={batch or 'prefill'} {kind} {price:.4g}: {'-' if j is None else f'{1e3 * j:.3f} mJ'}, "
                      f"{found['tokens_per_s']:.0f} tok/s, T {found.get('distinct_experts', math.nan):.2f}, "
                      f"k {found.get('experts_per_token', math.nan):.2f}", flush=True)  # fmt: skip


class Layers(nn.Module):
    """MoE layers of OLMoE's shape and nothing else, where reading weights dominates; random weights."""

    def __init__(self, args: argparse.Namespace, count: int = 8) -> None:
        super().__init__()
        shape = {"hidden_size": 2048, "intermediate_size": 1024, "gated": True, "activation": "silu"}
        with torch.device(args.device):
            self.layers = nn.ModuleList(MoELayer(TopKRouter(2048, 64, 8), Experts(64, **shape)) for _ in range(count))
        self.to(torch.bfloat16).eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Run each layer on the same tokens (B, 1, D): routers differ, so that experts do."""
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def run_shape(args: argparse.Namespace, run: RunFolder, *_: Any) -> None:
    """Write a row per policy and pass: joules of OLMoE-shaped layers at decode, where nothing else runs."""
    torch.manual_seed(0)
    model = Layers(args)
    plan = [("topk", 0.0), *(("oea", float(k0)) for k0 in (1, 2, 4, 6))]
    plan += [("priced", price) for price in (1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)]
    relative = CostModel.prior(args.gpu).relative_costs(LayerWork.of(model.layers[0].experts))
    with EnergyMeter(devices=args.device) as meter:
        for batch in (16, 64):
            x = torch.randn(batch, 1, 2048, device=args.device, dtype=torch.bfloat16)
            for number, order in enumerate((plan, plan[::-1])):
                for kind, price in order:
                    set_router(model, "topk")
                    if kind == "oea":
                        set_router(model, "oea", k0=int(price))
                    elif kind == "priced":
                        costs = {"pair_cost": relative[0], "open_cost": relative[1]}
                        set_router(model, "priced", price=price / relative[1][0], benefit="distortion", **costs)
                    step = captured(lambda tokens=x: model(tokens))
                    found = measured(meter, f"{kind} {price:g} B{batch}", step, batch, args.window_s)
                    chosen = collect_routing(model).values()
                    distinct = float(torch.stack([d.opened.sum() for d in chosen]).float().mean())
                    k = float(torch.stack([d.active.sum() for d in chosen]).float().mean()) / batch
                    run.append("shape", batch=batch, policy=kind, price=price, order=number,
                               distinct_experts=distinct, experts_per_token=k, **found)  # fmt: skip
                    print(f"OLMoE shape B={batch} {kind} {price:g}: {1e3 * (found['j_per_token'] or math.nan):.2f} mJ, "
                          f"T {distinct:.1f}, k {k:.2f}, {found['tokens_per_s']:.0f} tok/s", flush=True)  # fmt: skip


def budget_of(entry: str, free: dict[str, Any]) -> tuple[str | None, str]:
    """Return a budget and the name in the history that answers to it.

    Args:
        entry: "free" is no budget, "0.85" a share of the free joules per token, "0.9W" of the free watts, "3C" means
            degrees below the free temperature.
        free: what was measured without a budget.
    """
    if entry == "free":
        return None, "j_per_token_measured"
    if entry.endswith("W"):
        return f"{float(entry[:-1]) * free['power_w']:.1f} W", "power_w"
    if entry.endswith("C"):
        return f"{free['temp_c'] - float(entry[:-1]):.1f} C", "temp_c"
    return f"{1e3 * float(entry) * free['j_per_token']:.4f} mJ/token", "j_per_token_measured"


def lag_row(lag: Any) -> dict[str, Any] | None:
    """Return a lag in its three units."""
    return None if lag is None else {"ms": lag.ms, "tokens": lag.tokens, "windows": lag.windows}


def run_loop(args: argparse.Namespace, run: RunFolder, model: nn.Module, rows: dict[str, Tensor]) -> None:
    """Hold a budget in decoding for a while, then a step to another one; measured and modelled feedback."""
    from thermoe import AdaptiveSession

    batch = args.loop_batch
    table = next(iter(rows.values()))
    with EnergyMeter(devices=args.device) as meter:
        for feedback in args.loop_feedback:
            set_router(model, "topk")
            set_router(model, "priced", benefit="distortion")
            for name, module in routed_modules(model):
                module.router.set_sensitivity(args.sensitivity[name])
            with AdaptiveSession(
                model, meter=meter, feedback=feedback, cost_model=CostModel.prior(args.gpu)
            ) as session:
                decoder = StaticDecoder(model, table[:batch])
                decoder.capture()
                free = measured(meter, "free", decoder.step, batch, args.loop_free_s)
                begun = time.perf_counter()
                for phase, (entry, seconds) in enumerate(args.loop_plan):
                    budget, watched = budget_of(entry, free)
                    session.set_budget(budget)
                    end = time.perf_counter() + seconds
                    while time.perf_counter() < end:
                        for _ in range(args.loop_steps):
                            decoder.step()
                            session.observe(batch, 1)
                        metrics = session.step()
                        keep = ("j_per_token_measured", "j_per_token_modelled", "price", "state", "distinct_experts",
                                "experts_per_token", "power_w", "temp_c", "cost_target_j", "reason")  # fmt: skip
                        run.append("loop", feedback=feedback, part=phase, t_s=time.perf_counter() - begun,
                                   budget=budget, free_j=free["j_per_token"],
                                   **{k: metrics.get(k) for k in keep})  # fmt: skip
                    late = [r[watched] for r in list(session.tally.history)[-3:]]
                    for name in (watched, "j_per_token_modelled"):
                        lags = session.tally.reaction("decode", name)
                        answer: dict[str, Any] = {
                            k: lag_row(getattr(lags, k)) for k in ("detection", "rise_63", "settling")
                        }
                        answer |= {"final": lags.final, "overshoot": lags.overshoot, "reason": lags.reason}
                        run.append("lag", feedback=feedback, part=phase, budget=budget, watched=name, **answer)
                    print(f"{feedback} {budget}: last windows {late} of {watched}, {metrics['state']}", flush=True)
                    print(session.report(), flush=True)
                for row in session.tally.history:
                    run.append("window", feedback=feedback, free_j=free["j_per_token"], **row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("fronts", "sweep", "loop", "shape"), nargs="+")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seq", type=int, default=511)
    parser.add_argument("--rows", type=int, default=192, help="most rows of each text")
    parser.add_argument("--calibration-rows", type=int, default=32, help="rows of each text that measure sensitivity")
    parser.add_argument("--batches", type=lambda t: [int(v) for v in t.split(",")], default=[1, 16, 64])
    parser.add_argument("--all-variants", action="store_true", help="fronts: also equal sensitivities, and the gate")
    parser.add_argument("--prefill-rows", type=int, default=16)
    parser.add_argument("--window-s", type=float, default=1.5)
    parser.add_argument("--loop-batch", type=int, default=16)
    parser.add_argument("--loop-steps", type=int, default=64, help="decode steps between two steps of the session")
    parser.add_argument(
        "--loop-plan",
        default="free:10,0.9:60,0.8:60",
        help="budget:seconds, ...; 0.9 of the free joules per token, 0.9W of the free watts, 3C below the free degrees",
    )
    parser.add_argument("--loop-feedback", type=lambda t: t.split(","), default=["measured", "modelled"])
    parser.add_argument("--loop-free-s", type=float, default=4.0, help="seconds without a budget before, at least")
    args = parser.parse_args()
    if not args.window_s >= 1:
        parser.error("--window-s is below 1: so short a window has no figure of joules")
    args.loop_plan = [(entry, float(s)) for entry, s in (part.split(":") for part in args.loop_plan.split(","))]
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    args.gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    model, rows, args.mean = load(args)
    args.top_k = next(iter(routed_modules(model)))[1].router.top_k
    run = RunFolder.create(args.out, resume=True)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    run.write_manifest(command="energy_router", settings=settings, gpu=args.gpu, environment=environment_fingerprint())
    print(
        json.dumps({"mean_sensitivity": args.mean, "layers": {k: sum(v) / len(v) for k, v in args.sensitivity.items()}})
    )
    for part in args.part:
        {"fronts": run_fronts, "sweep": run_sweep, "loop": run_loop, "shape": run_shape}[part](args, run, model, rows)
    run.write_manifest(finished=True)


if __name__ == "__main__":
    main()
