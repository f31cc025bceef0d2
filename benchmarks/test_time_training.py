"""Test-time training of the routers on a stream whose domain shifts: perplexity, and joules with those of learning in.

python benchmarks/test_time_training.py grid|stream|joules --model FOLDER --data DATA --out runs/test-time-training
(FOLDER: a model saved by convergence.py --save; DATA: valid_novels.npy, valid_python.npy, shakespeare.npy and
wikitext.npy of prepare_tokens.py.)

grid: every combination of --grid on a validation part of each text that the other parts never read.
stream: novels -> Python -> Shakespeare -> WikiText -> other novels, and the same batches interleaved; each policy (all
    experts; prices that leave a half and a quarter of the distinct experts, or a quarter of the experts of a layer;
    OEA k0=1) read frozen, with learning routers, and with all weights learning. Scored before learned, 16 sequences
    routed as if decoded together.
joules: decoding of each policy (CUDA graphs), scoring, scoring + learning, each between two ticks of the counter, in
    two passes of opposite order; joules per token = decoding + learning at the cadence of the stream.

With --against NAME=FOLDER a stream is compared with other models too, read frozen with all their experts: the model
before it was trained under a price, or one trained as long without.

Options of the adapter are given as --adapt NAME=VALUE ..., those of the rival as --all-lr and --all-anchor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from energy_router import measured
from shifting_text import (
    ORDERS,
    SEGMENTS,
    Adapted,
    Batch,
    Texts,
    chosen_experts,
    in_order,
    reader_of,
)
from static_decode import StaticDecoder
from stream_policies import SHARES, find_prices, served_j, set_policy
from stream_scores import WINDOW, Scores, nats, paired, perplexity_of, running, signed, targets, verdicts, worst_windows
from torch import nn
from transformers import AutoModelForCausalLM

from thermoe.adapt.agreement import routing_agreement
from thermoe.moe.layer import routed_modules
from thermoe.results import RunFolder, weakest_provenance
from thermoe.runtime import environment_fingerprint
from thermoe.sensitivity import measure_sensitivity
from thermoe.telemetry import EnergyMeter

STREAM_ROWS = ("batch", "segment", "running", "target", "against")
LEARNERS = ("frozen", "adapted", "all_weights")


def read_stream(
    model: nn.Module, args: argparse.Namespace, batches: list[Batch], learner: str, options: dict[str, Any],
    rival: dict[str, float], earned_j: float | None, agree_every: int = 0,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield a row per batch, in order; what learns earns ``earned_j`` at each."""
    with (
        reader_of(model, learner, options, rival, gpu=args.gpu, served_j=earned_j) as reader,
        chosen_experts(model) as take,
    ):
        for at, batch in enumerate(batches):
            compared = None
            if isinstance(reader, Adapted) and agree_every and at and at % agree_every == 0:
                layers = routing_agreement(reader.adapter, [batch.rows])  # before it is learned from
                compared = {name: layer.as_dict() for name, layer in layers.items()}
                take()
            found = reader.read(batch.rows, learn=(at + 1) % args.every == 0)
            yield {
                "segment": batch.segment, "number": batch.number, "at": at,
                "tokens": batch.rows.numel() - len(batch.rows),
                "sequence_nll": found.nll.tolist(), "learned": found.learned, "worked": found.worked,
                "verdict": found.verdict, "reason": found.reason, "facts": found.facts, **take(),
                "agreement": compared,
            }  # fmt: skip


def run_grid(args: argparse.Namespace, run: RunFolder, model: nn.Module, texts: Texts) -> None:
    """Write a row per combination of options, policy and order, on the validation stream; print the best."""
    names = list(args.grid)
    settings = [("adapted", dict(zip(names, values, strict=True))) for values in itertools.product(*args.grid.values())]
    settings += [("all_weights", {"lr": lr}) for lr in args.grid_all_lr]
    table: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for policy in args.grid_policies:
        set_policy(model, args, policy, grouped=True)
        earned_j = served_j(model, args, texts)
        frozen = list(read_stream(model, args, texts.chosen_on, "frozen", {}, {}, None))
        for (learner, options), order in itertools.product(settings, args.orders):
            given = {**args.adapt, **options} if learner == "adapted" else {}
            rival = {"anchor": args.all_anchor, **options} if learner == "all_weights" else {}
            batches = in_order(texts.chosen_on, order)
            rows = list(read_stream(model, args, batches, learner, given, rival, earned_j))
            difference = {segment: paired(rows, frozen, segment)[0] for segment in (*dict(SEGMENTS), "all")}
            row = {
                "policy": policy, "order": order, "learner": learner, "options": options, "adapt": given,
                "dnll": difference, **worst_windows(running(rows, frozen), WINDOW), **verdicts(rows),
            }  # fmt: skip
            run.append("grid", **row)
            table[f"{learner} {options}"].append(row)
            shown = " ".join(f"{name} {value:+.4f}" for name, value in difference.items())
            print(f"{policy} {order} {learner} {options}: {shown}, worst {signed(row['worst_window_nats'])}, "
                  f"{row['verdicts']}", flush=True)  # fmt: skip
    print("\nmean change of loss to frozen over policies and orders, and the worst window of any:")
    for key, rows in sorted(table.items(), key=lambda entry: sum(row["dnll"]["all"] for row in entry[1])):
        worst = max(
            (row["worst_window_nats"] for row in rows if row["worst_window_nats"] is not None), default=math.nan
        )
        print(f"{sum(row['dnll']['all'] for row in rows) / len(rows):+.4f} {worst:+.4f} {key}")


def run_stream(args: argparse.Namespace, run: RunFolder, model: nn.Module, texts: Texts) -> None:
    """Write a row per batch, and per (policy, learner, order) what came of it."""
    scores: Scores = {}
    rival = {"lr": args.all_lr, "anchor": args.all_anchor}
    for policy in args.policies:
        for learner in args.learners[: 1 if policy in args.frozen_only else None]:
            for order in ORDERS[:1] if learner == "frozen" else args.orders:
                set_policy(model, args, policy, grouped=True)
                rows, earned_j = [], served_j(model, args, texts)
                batches = in_order(texts.reported, order)
                for row in read_stream(model, args, batches, learner, args.adapt, rival, earned_j, args.agree_every):
                    rows.append(row)
                    run.append("batch", policy=policy, learner=learner, order=order, **row)
                scores[policy, learner, order] = rows
                frozen = scores[policy, "frozen", ORDERS[0]]
                difference = running(rows, frozen)
                for segment in (*dict(SEGMENTS), "all"):
                    own = own_of(rows, segment)
                    base = scores["all", "frozen", ORDERS[0]]
                    run.append(
                        "segment", policy=policy, learner=learner, order=order, segment=segment, nll=nats(own),
                        ppl=perplexity_of(nats(own)), to_frozen=paired(rows, frozen, segment),
                        to_all_frozen=paired(rows, base, segment), tokens=sum(row["tokens"] for row in own),
                        distinct_experts=sum(row["distinct_experts"] for row in own) / len(own),
                        experts_per_token=sum(row["experts_per_token"] for row in own) / len(own), **verdicts(own),
                    )  # fmt: skip
                run.append("running", policy=policy, learner=learner, order=order, difference=difference,
                           **worst_windows(difference, WINDOW))  # fmt: skip
                shown = ", ".join(
                    f"{segment} {perplexity_of(nats([row for row in rows if row['segment'] == segment])):.2f}"
                    for segment in dict(SEGMENTS)
                )
                print(f"{policy} {learner} {order}: {shown}; worst window "
                      f"{signed(worst_windows(difference, WINDOW)['worst_window_nats'])}; {verdicts(rows)}",
                      flush=True)  # fmt: skip
    for name, folder in args.against:
        run_against(args, run, texts, name, folder, scores)
    for text, holds in targets(scores, args.orders):
        run.append("target", text=text, holds=holds)
        print({True: "[met] ", False: "[not met] ", None: "[open] "}[holds] + text)


def run_against(args: argparse.Namespace, run: RunFolder, texts: Texts, name: str, folder: str, scores: Scores) -> None:
    """Read another model frozen, with all experts, and write how everything else on the stream differs from it."""
    other = load_model(args, folder)
    base = list(read_stream(other, args, texts.reported, "frozen", {}, {}, None))
    for row in base:
        run.append("batch", policy=name, learner="frozen", order=ORDERS[0], **row)
    for (policy, learner, order), rows in scores.items():
        for segment in (*dict(SEGMENTS), "all"):
            found = {"difference": paired(rows, base, segment), "ppl": perplexity_of(nats(own_of(base, segment)))}
            run.append("against", other=name, policy=policy, learner=learner, order=order, segment=segment, **found)
            mean, low, high = found["difference"]
            print(f"{policy} {learner} {order}, {segment}, against {name}, all experts frozen: {mean:+.4f} "
                  f"({low:+.4f} to {high:+.4f})", flush=True)  # fmt: skip


def own_of(rows: list[dict[str, Any]], segment: str) -> list[dict[str, Any]]:
    """Return the rows of a segment, or all."""
    return [row for row in rows if segment in ("all", row["segment"])]


def run_joules(args: argparse.Namespace, run: RunFolder, model: nn.Module, texts: Texts) -> None:
    """Measure decoding, scoring and learning of each policy; then print joules per token, learning inside."""
    rival = {"lr": args.all_lr, "anchor": args.all_anchor}
    batches = in_order(texts.reported, args.joules_order)
    length, per_batch = batches[0].rows.shape[1], batches[0].rows.numel()
    learning = {"learn": "adapted", "decode_adapted": "adapted", "learn_all": "all_weights"}
    parts = ["decode", "score", *(what for what, learner in learning.items() if learner in args.learners)]
    plan = [(policy, what) for policy in args.policies if policy not in args.frozen_only for what in parts]
    with EnergyMeter(devices=args.device if args.device.startswith("cuda") else None) as meter:
        for number, order in enumerate((plan, plan[::-1])):
            for policy, what in order:
                learner = {"learn": "adapted", "decode_adapted": "adapted", "learn_all": "all_weights"}.get(
                    what, "frozen"
                )
                set_policy(model, args, policy, grouped=not what.startswith("decode"))
                # What is decoded with has learned something whatever the bucket; what learns earns as in the stream.
                options = {**args.adapt, "bucket": None} if what == "decode_adapted" else args.adapt
                earned_j = served_j(model, args, texts) if what == "learn" else None
                with reader_of(model, learner, options, rival, gpu=args.gpu, served_j=earned_j) as reader:
                    if what.startswith("decode"):
                        if learner == "adapted":
                            for batch in batches[:4]:
                                reader.read(batch.rows, learn=True)
                        decoder = StaticDecoder(model, batches[0].rows)
                        decoder.capture()
                        found = measured(meter, f"{policy} {what}", decoder.step, args.batch, args.window_s)
                        found |= decoder.means()
                    else:
                        turns = itertools.cycle(batches)
                        done = {"batches": 0, "worked": 0}

                        def step(reader=reader, turns=turns, done=done, learn=learner != "frozen") -> None:
                            done["worked"] += reader.read(next(turns).rows, learn=learn).worked
                            done["batches"] += 1

                        found = measured(meter, f"{policy} {what}", step, per_batch, args.window_s)
                        # Of all batches since the reader opened, those before the window included.
                        found["worked_per_batch"] = done["worked"] / done["batches"]
                if args.device.startswith("cuda"):
                    found["memory_peak_bytes"] = torch.cuda.max_memory_allocated(args.device)
                    torch.cuda.reset_peak_memory_stats(args.device)
                run.append("energy", policy=policy, what=what, order=number, tokens_per_batch=per_batch,
                           sequence_length=length, **found)  # fmt: skip
                j = found["j_per_token"]
                print(f"{policy} {what}: {'no reading' if j is None else f'{1e3 * j:.4f} mJ/token'}, "
                      f"{found['tokens_per_s'] or math.nan:.0f} tok/s, learning at "
                      f"{found.get('worked_per_batch', 0):.2f} of the batches", flush=True)  # fmt: skip
    joules_per_token(args, run)


def joules_per_token(args: argparse.Namespace, run: RunFolder) -> None:
    """Append rows `total`: joules per token of serving, learning in, from the energy and the segment rows of the run.

    What learning adds to a batch where it works comes from the measured loop, how often it works from the stream.
    Decoded text is read again to be learned from, so there a turn costs the scoring too.
    """
    energy = list(run.rows("energy"))
    means: dict[tuple[str, str], tuple[float | None, float | None]] = {}
    for key in {(row["policy"], row["what"]) for row in energy}:
        rows = [row for row in energy if (row["policy"], row["what"]) == key]
        joules = [row["j_per_token"] for row in rows]
        worked = [row.get("worked_per_batch") for row in rows]
        means[key] = (None if None in joules else sum(joules) / len(joules),
                      None if None in worked else sum(worked) / len(worked))  # fmt: skip
    provenance = weakest_provenance(row["provenance"] for row in energy)
    run.drop_rows(lambda row: row["kind"] == "total")
    for row in [row for row in run.rows("segment") if row["segment"] == "all"]:
        policy, learner = row["policy"], row["learner"]
        what = {"adapted": "learn", "all_weights": "learn_all"}.get(learner)
        decode = means.get((policy, "decode_adapted" if learner == "adapted" else "decode"), (None, None))[0]
        score, often = means.get((policy, "score"), (None, None))[0], row["worked"] / row["batches"]
        total = {"decode_j_per_token": decode, "score_j_per_token": score, "worked_per_batch": often}
        turn: float | None = 0.0
        if what is not None:
            joules, worked = means.get((policy, what), (None, None))
            turn = (joules - score) / worked if None not in (joules, score) and worked else None
        known = None not in (decode, score, turn)
        total |= {
            "learning_j_per_learned_token": turn,  # beyond scoring
            "decode_total_j_per_token": decode + (turn + score * (what is not None)) * often if known else None,
            "score_total_j_per_token": score + turn * often if known else None,
            "provenance": provenance if known else None,
            "reason": None if known else "decoding, scoring or learning was not measured, or learning never worked",
        }
        run.append("total", policy=policy, learner=learner, order=row["order"], **total)
        print(
            f"{policy} {learner} {row['order']}: decode {_mj(decode)}, with learning "
            f"{_mj(total['decode_total_j_per_token'])}; scoring {_mj(score)}, with learning "
            f"{_mj(total['score_total_j_per_token'])} mJ/token; learning at {often:.2f} of the batches"
        )


def _mj(joules: float | None) -> str:
    return "unknown" if joules is None else f"{1e3 * joules:.3f}"


def option(text: str) -> tuple[str, Any]:
    """Return (name, value) of NAME=VALUE."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, _value(value)


def named(text: str) -> tuple[str, str]:
    """Return (name, folder) of NAME=FOLDER."""
    name, found, folder = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def _value(text: str) -> Any:
    """Return a list of [A,B], a number, true, false, null, or the text as it is."""
    if text.startswith("["):
        return [_value(part.strip()) for part in text.strip("[]").split(",")]
    try:
        return json.loads({"none": "null", "None": "null"}.get(text, text))
    except ValueError:
        return text


def load_model(args: argparse.Namespace, folder: Path | str) -> nn.Module:
    """Load a model that scores and decodes."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().to(args.device, getattr(torch, args.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("grid", "stream", "joules"), nargs="+")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, choices=("bfloat16", "float32"), help="bfloat16 on a GPU")
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--batches", type=int, default=15, help="of each segment of the reported stream (8192 tokens each)"
    )
    parser.add_argument("--grid-batches", type=int, default=5, help="of each segment of the validation stream")
    parser.add_argument("--calibration-rows", type=int, default=32, help="of each text that the model was trained on")
    parser.add_argument("--bisections", type=int, default=14)
    parser.add_argument("--policies", nargs="+", default=["all", *SHARES, "oea1"])
    parser.add_argument("--frozen-only", nargs="*", default=[], help="policies that are read frozen, as the baseline")
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=LEARNERS)
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS)
    parser.add_argument("--adapt", nargs="+", type=option, default=[], metavar="NAME=VALUE")
    parser.add_argument("--served", choices=("decode", "scoring"), default="decode",
                        help="what the bucket earns a share of: decoding the batches, or scoring them")  # fmt: skip
    parser.add_argument("--against", nargs="+", type=named, default=[], metavar="NAME=FOLDER")
    parser.add_argument("--every", type=int, default=1, help="batches from one turn of learning to the next")
    parser.add_argument("--all-lr", type=float, default=1e-5, help="of the rival that learns all weights")
    parser.add_argument("--all-anchor", type=float, default=1.0)
    parser.add_argument("--grid", nargs="+", type=option, default=[("lr", [3e-4, 1e-3, 3e-3, 1e-2])],
                        metavar="NAME=[VALUE,...]")  # fmt: skip
    parser.add_argument("--grid-all-lr", nargs="*", type=float, default=[3e-6, 1e-5, 3e-5, 1e-4])
    parser.add_argument("--grid-policies", nargs="+", default=["all", "quarter"])
    parser.add_argument(
        "--agree-every", type=int, default=5, help="batches between two comparisons of decisions; 0: none"
    )
    parser.add_argument("--joules-order", choices=ORDERS, default=ORDERS[0])
    parser.add_argument("--window-s", type=float, default=3.0)
    args = parser.parse_args()
    args.adapt, args.grid = dict(args.adapt), dict(args.grid)
    known = ("all", *SHARES, "oea1")
    if unknown := [name for name in (*args.policies, *args.grid_policies) if name not in known]:
        parser.error(f"no policy {unknown[0]!r}; there are {', '.join(known)}")
    if args.learners[0] != "frozen" or args.policies[0] != "all":
        parser.error("differences are to frozen with all experts: name the learner frozen and the policy all first")
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(args.device)
    torch.manual_seed(0)
    args.gpu = torch.cuda.get_device_name(args.device) if on_gpu else None
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    model = load_model(args, args.model)
    texts = Texts(args.data, batch=args.batch, length=args.seq, reported=args.batches, chosen_on=args.grid_batches,
                  calibration=args.calibration_rows, device=args.device)  # fmt: skip
    run = RunFolder.create(args.out, resume=True)
    sensitivity = measure_sensitivity(model, texts.calibration, batch_size=8)
    args.sensitivity = {name: values.tolist() for name, values in sensitivity.items()}
    args.mean = float(torch.stack(list(sensitivity.values())).mean())
    args.top_k = next(iter(routed_modules(model)))[1].router.top_k
    find_prices(model, args, texts.calibration)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ("sensitivity", "prices", "distinct_all", "mean")}
    run.write_manifest(
        command="test_time_training", settings=settings, gpu=args.gpu, environment=environment_fingerprint(),
        text_rows=texts.sizes, mean_sensitivity=args.mean, prices=args.prices, distinct_all=args.distinct_all,
    )  # fmt: skip
    for part in args.part:
        kinds = {
            "grid": ("grid",),
            "stream": STREAM_ROWS,
            "joules": ("energy", "total"),
        }
        run.drop_rows(lambda row, stale=kinds[part]: row["kind"] in stale)
        {"grid": run_grid, "stream": run_stream, "joules": run_joules}[part](args, run, model, texts)
    run.write_manifest(finished=True)


if __name__ == "__main__":
    main()
