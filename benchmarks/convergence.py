"""Train MoE arms, transformers' own MoE block and a dense model to convergence: same frame, data, order and schedule.

python benchmarks/convergence.py --arms dense,mixtral,switch --data DATA --out runs/convergence --device cuda:0
(DATA comes from prepare_tokens.py.) Each arm gets a run folder of its own; a finished one is passed over.
--from MODEL goes on with a model that --save kept, with a new optimizer: recovery, for example under the price of
--price-frac 0.5 (`thermoe.training.under_price`), and its control without one.

Precision, the same for every MoE arm: autocast to bfloat16; expert weights in bfloat16 with float32 masters in the
optimizer, because `grouped_mm` takes no part in autocast and float32 experts would wait for the host in every layer;
the input of the block is cast to bfloat16. Everything else is float32. No step waits for the device: losses add up
there and are read at log steps. Throughput and joules are those of the training steps behind the warm-up, without
evaluation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from thermoe.convergence import judge_convergence
from thermoe.models.frame import block_of, build_frame, copy_frame_weights, native_aux_loss, native_routers
from thermoe.moe.layer import collect_routing, routed_modules
from thermoe.moe.losses import default_balance, routing_loss
from thermoe.results import RunFolder
from thermoe.runtime import environment_fingerprint
from thermoe.telemetry import EnergyMeter
from thermoe.training.language_loss import causal_lm_loss
from thermoe.training.under_price import PriceSettings, UnderPrice

#: name: (block, router, its options, balance), each loss with its usual coefficient and the z-loss beside it.
ARMS: dict[str, tuple[str, str, dict, dict[str, float]]] = {
    "dense": ("dense", "topk", {}, {}),
    "mixtral": ("mixtral", "topk", {}, {}),
    "none": ("moe", "topk", {}, {}),
    "switch": ("moe", "topk", {}, default_balance("switch")),
    "load_std": ("moe", "topk", {}, default_balance("load_std")),
    "load_std_root": ("moe", "topk", {}, default_balance("load_std_root")),
    "entropy": ("moe", "topk", {}, default_balance("entropy")),
    "kl_uniform": ("moe", "topk", {}, default_balance("kl_uniform")),
    "temperature": ("moe", "topk", {"temperature": 1.0}, {}),
    "sigmoid_bias": ("moe", "sigmoid_bias", {}, {}),
}


def arm_named(name: str) -> tuple[str, str, dict, dict[str, float]]:
    """Return the arm of this name; `switch=0.03` is `switch` with this coefficient of its loss."""
    name, _, coefficient = name.partition("=")
    block, router, options, balance = ARMS[name]
    return block, router, options, {**balance, name: float(coefficient)} if coefficient else balance


FULL = {"hidden_size": 768, "layers": 6, "heads": 12, "num_experts": 32, "top_k": 4, "expert_width": 768}
TINY = {"hidden_size": 32, "layers": 2, "heads": 2, "num_experts": 4, "top_k": 2, "expert_width": 16}
PAD_TO = 64  # rows of the embedding: an odd vocabulary denies its matrix products the fast kernels
WARM = 20  # steps before anything is timed; compilation happens there


def padded(vocab_size: int) -> int:
    """Return the vocabulary size rounded up."""
    return -(-vocab_size // PAD_TO) * PAD_TO


class MasterAdamW:
    """AdamW whose bfloat16 weights have float32 masters; all other weights are trained as they are."""

    def __init__(self, model: nn.Module, lr: float, fused: bool) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.low = [p for p in trained if p.dtype == torch.bfloat16]
        self.masters = [p.detach().float() for p in self.low]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.weights = [p for p in trained if p.dtype != torch.bfloat16] + self.masters
        matrices = [p for p in self.weights if p.ndim > 1]
        rest = [p for p in self.weights if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
        self.model = model

    def step(self, lr: float) -> Tensor:
        """Clip, step, copy the masters back, forget the gradients; returns the gradient's norm on the device."""
        if self.low:
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.low])
        norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        if self.low:
            with torch.no_grad():
                torch._foreach_copy_(self.low, self.masters)
        self.model.zero_grad(set_to_none=True)
        return norm


class Data:
    """Rows of tokens on the device; the order of an epoch follows from the seed alone, so every arm reads the same."""

    def __init__(self, folder: Path, length: int, batch: int, device: torch.device, seed: int, max_rows: int) -> None:
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        rows = {path.stem: self._rows(path, length, device) for path in sorted(folder.glob("*.npy"))}
        self.train = rows.pop("train")
        self.valid = {name.removeprefix("valid_"): r[: max_rows // batch * batch or batch] for name, r in rows.items()}
        self.batch, self.seed, self.per_epoch = batch, seed, self.train.shape[0] // batch
        if not self.per_epoch or not self.valid:
            raise SystemExit(f"{folder} holds less than one batch of training text, or no valid_NAME.npy")
        self.epoch, self.order = -1, torch.empty(0)

    @staticmethod
    def _rows(path: Path, length: int, device: torch.device) -> Tensor:
        ids = np.load(path, mmap_mode="r")
        count = len(ids) // length
        return torch.from_numpy(ids[: count * length].astype(np.int32)).view(count, length).to(device)

    def at(self, step: int) -> Tensor:
        """Return int64 (B, S), the batch of this step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            order = torch.randperm(
                self.train.shape[0], generator=torch.Generator().manual_seed(self.seed * 1000 + epoch)
            )
            self.epoch, self.order = epoch, order.to(self.train.device)
        return self.train[self.order[place * self.batch : (place + 1) * self.batch]].long()


def mean_nll(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the loss per predicted token, in float32."""
    return model(batch, labels=batch, use_cache=False).loss


def loads_of(model: nn.Module) -> Tensor | None:
    """Return tokens per expert (L, E) of the last forward, on the device; ``None`` for a dense model."""
    counts = [decision.counts for decision in collect_routing(model).values()]
    for router in native_routers(model):
        zeros = torch.zeros(router.num_experts, device=router.last_index.device)
        index = router.last_index.reshape(-1)
        counts.append(zeros.scatter_add(0, index, torch.ones_like(index, dtype=zeros.dtype)))
    return torch.stack(counts) if counts else None


def load_stats(counts: Tensor | None, with_load: bool) -> list[dict]:
    """Read the loads once and describe each layer."""
    described = []
    for row in [] if counts is None else counts.double().cpu():
        share = row / row.sum()
        described.append(
            {
                "max_vio": float(share.max() * len(share) - 1),
                "effective_experts": float(torch.special.entr(share).sum().exp()),
                "dead_experts": int((share < 0.1 / len(share)).sum()),
                **({"load": [round(float(v), 5) for v in share]} if with_load else {}),
            }
        )
    return described


class Arm:
    """One model with its optimizer, as all arms are trained."""

    def __init__(self, name: str, args: argparse.Namespace, data: Data) -> None:
        self.args, self.data, self.device = args, data, torch.device(args.device)
        block, router, options, balance = arm_named(name)
        sizes = {
            **(TINY if args.tiny else FULL),
            "vocab_size": padded(data.meta["vocab_size"]),
            "sequence_length": args.seq,
        }
        self.model = build_frame(block, **sizes, router=router, router_options=options, seed=args.seed)
        if args.model is not None:
            self.model.load_state_dict(AutoModelForCausalLM.from_pretrained(args.model).state_dict())
        elif block != "moe":  # every arm starts from the weights of the same `moe` frame, as far as it has them
            copy_frame_weights(build_frame("moe", **sizes, seed=args.seed), self.model)
        self.top_k = sizes["top_k"]
        self.balance = balance
        self.model.to(self.device)
        if self.device.type == "cuda":  # the fused loss of `thermoe train`, for every arm
            self.model.loss_function = causal_lm_loss
        self.bf16 = args.dtype == "bfloat16"
        if self.bf16 and block != "dense":
            for layer in self.model.transformer.h:
                layer.mlp.experts.to(torch.bfloat16)
                layer.mlp.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(torch.bfloat16), *inputs[1:]))
        self.optimizer = MasterAdamW(self.model, args.lr, fused=self.device.type == "cuda")
        self.native = block_of(self.model) == "mixtral"
        if args.compile:
            self.model.compile()

    @property
    def routers(self) -> list[nn.Module]:
        """The routers of the model as they are now."""
        return [module.router for _, module in routed_modules(self.model)]

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the precision of a forward."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def lr_at(self, step: int, steps: int) -> float:
        """Warm up over 2 % of the run, then follow a cosine down to `final_lr`."""
        warm = max(1, steps // 50)
        if step < warm:
            return self.args.lr * (step + 1) / warm
        cosine = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        return self.args.lr * (self.args.final_lr + (1 - self.args.final_lr) * cosine)

    def train_step(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """Train on one batch; returns loss and gradient norm on the device."""
        with self.autocast():
            loss = mean_nll(self.model, self.data.at(step))
        total = loss
        if self.native and self.args.alpha:
            total = total + self.args.alpha / self.top_k * native_aux_loss(self.model)
        auxiliary = routing_loss(collect_routing(self.model).values(), self.balance)
        if auxiliary is not None:
            total = total + auxiliary
        total.backward()
        decisions = list(collect_routing(self.model).values())
        for router, decision in zip(self.routers, decisions, strict=True):
            router.observe(decision.detach())
        norm = self.optimizer.step(self.lr_at(step, steps))
        for router in self.routers:
            router.after_step()
        return loss.detach(), norm.detach()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return nats per token by split; one read from the device."""
        self.model.eval()
        sums = {}
        for name, rows in self.data.valid.items():
            with self.autocast():
                losses = [mean_nll(self.model, part.long()) for part in rows.split(self.data.batch)]
            sums[name] = torch.stack(losses).mean()
        self.model.train()
        return {name: float(value) for name, value in sums.items()}


def synchronize(device: torch.device) -> float:
    """Wait for the device and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def segments(steps: int, evals: int, throughput_only: int) -> list[tuple[int, int]]:
    """Cut a run into stretches of training: the warm-up, then one up to each validation."""
    if throughput_only:
        return [(0, WARM), (WARM, WARM + throughput_only)]
    ends = sorted({min(WARM, steps), *(round(steps * (i + 1) / evals) for i in range(evals))} - {0})
    return list(zip([0, *ends[:-1]], ends, strict=True))


def run_arm(name: str, args: argparse.Namespace, data: Data) -> None:
    folder = args.out / name
    if (folder / "manifest.json").is_file() and RunFolder.open(folder).manifest.get("finished"):
        print(f"{name}: finished before")
        return
    run = RunFolder.create(folder, resume=True)
    run.drop_rows(lambda row: True)
    arm = Arm(name, args, data)
    device, per_step = arm.device, args.batch * args.seq
    steps = args.steps or int(args.epochs * data.per_epoch)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    parameters = sum(p.numel() for p in arm.model.parameters())
    run.write_manifest(
        command="convergence", arm=name, finished=False, settings=settings, balance=arm.balance, meta=data.meta,
        steps=steps, parameters=parameters, gpu=gpu, environment=environment_fingerprint(),
    )  # fmt: skip
    arm.model.train()
    trained_s, trained_tokens, energies, provenance, reason = 0.0, 0, [], None, None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    price = PriceSettings(
        distinct_frac=args.price_frac, served_batch=args.served_batch, start_frac=args.price_start
    )  # fmt: skip
    price.check("--price", args.batch)
    with (
        EnergyMeter(devices=args.device if device.type == "cuda" else None) as meter,
        UnderPrice(arm.model, price, data.train, steps, args.seed) as under_price,
    ):
        if not args.throughput_only:
            log_eval(run, arm, data, 0, per_step)
        for start, end in segments(steps, args.evals, args.throughput_only):
            begun, tokens = synchronize(device), (end - start) * per_step
            with meter.window(f"{name}/{start}", tokens=tokens) as window:
                sums, since = torch.zeros((), device=device), start
                for step in range(start, end):
                    with arm.autocast():
                        under_price.before_step(step)
                    loss, norm = arm.train_step(step, steps)
                    under_price.after_step()
                    sums += loss
                    if (step + 1) % args.log_every == 0 or step + 1 == end:
                        log_step(run, arm, step + 1, steps, float(sums) / (step + 1 - since), float(norm), per_step,
                                 under_price.figures())  # fmt: skip
                        sums.zero_()
                        since = step + 1
                spent = synchronize(device) - begun
            if start >= WARM:
                trained_s, trained_tokens = trained_s + spent, trained_tokens + tokens
                energies.append(window.result.energy_j)
                provenance, reason = window.result.provenance, window.result.reason
            if not args.throughput_only and end > WARM:
                log_eval(run, arm, data, end, per_step)
    known = bool(energies) and all(value is not None for value in energies)
    summary = {
        "tokens_per_s": trained_tokens / trained_s if trained_s else None,
        "timed_tokens": trained_tokens,
        "energy_j": sum(energies) if known else None,
        "j_per_token": sum(energies) / trained_tokens if known else None,
        "energy_provenance": provenance if known else None,
        "energy_reason": None if known else reason or "a stretch of training without a reading",
        "memory_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    for split in data.valid if not args.throughput_only else ():
        curve = [(row["tokens"], row["nll"]) for row in run.rows("eval") if row["split"] == split and row["tokens"]]
        run.append("convergence", arm=name, split=split, **judge_convergence(curve).as_dict())
    run.append("done", arm=name, **summary)
    if args.save:
        arm.model.to(torch.bfloat16 if arm.bf16 else torch.float32).save_pretrained(folder / "model")
    run.write_manifest(finished=True)
    print(f"{name}: {json.dumps(summary)}")


def log_step(
    run: RunFolder, arm: Arm, step: int, steps: int, loss: float, norm: float, per_step: int, price: dict
) -> None:
    """Write a row; stop at a loss that is not finite."""
    layers = load_stats(loads_of(arm.model), with_load=step % (4 * arm.args.log_every) == 0)
    lr = arm.lr_at(step - 1, steps)
    run.append("train", step=step, tokens=step * per_step, loss=loss, grad_norm=norm, lr=lr, layers=layers,
               **price)  # fmt: skip
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss} at step {step}; the rows so far are in {run.path}")


def log_eval(run: RunFolder, arm: Arm, data: Data, step: int, per_step: int) -> None:
    """Validate on every split and write a row each."""
    found = arm.validate()
    for split, nll in found.items():
        entry = data.meta["splits"][f"valid_{split}"]
        run.append(
            "eval", split=split, step=step, tokens=step * per_step, nll=nll, ppl=math.exp(nll),
            bits_per_byte=nll / math.log(2) / entry["bytes_per_token"],
        )  # fmt: skip
    print(f"{run.path.name} step {step}: " + ", ".join(f"{s} {math.exp(v):.2f}" for s, v in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arms", default="dense,mixtral,none,switch", help=", ".join(ARMS) + "; switch=0.03 sets its coefficient"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--alpha", type=float, default=1e-2, help="coefficient of Mixtral's own balance loss, times k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evals", type=int, default=20)
    parser.add_argument("--eval-rows", type=int, default=1024, help="most rows of each validation split")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--from", dest="model", type=Path, help="a saved model of the arm to go on with")
    parser.add_argument("--final-lr", type=float, default=0.1, help="share of the learning rate at the end")
    parser.add_argument("--price-frac", type=float, default=1.0, help="share of the distinct experts; 1: no price")
    parser.add_argument("--price-start", type=float, default=0.0, help="share of the steps before the price")
    parser.add_argument("--served-batch", type=int, default=16, help="sequences decoded together")
    parser.add_argument("--save", action="store_true", help="keep the trained model in OUT/ARM/model")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to try the script")
    parser.add_argument("--throughput-only", type=int, default=0, metavar="N", help="time N steps and stop")
    args = parser.parse_args()
    names = args.arms.split(",")
    if unknown := [name for name in names if name.partition("=")[0] not in ARMS]:
        parser.error(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    data = Data(args.data, args.seq, args.batch, torch.device(args.device), args.seed, args.eval_rows)
    for name in names:
        torch.manual_seed(args.seed)
        run_arm(name, args, data)


if __name__ == "__main__":
    main()
