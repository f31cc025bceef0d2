"""What comes before a comparison: texts and stream, the dense model, its conversion, recovery training and the price.

Each stage leaves a file or folder in the run folder, so that a resumed run takes it up instead of doing it again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from thermoe import data
from thermoe.compare.spec import CompareSpec
from thermoe.evaluation import perplexity
from thermoe.models.convert import convert_to_moe
from thermoe.models.measure import exactness, model_size
from thermoe.moe.layer import collect_routing
from thermoe.progress import Reporter
from thermoe.results import RunFolder, save_whole
from thermoe.routers.priced import price_for_pairs
from thermoe.runtime import seed_everything
from thermoe.training.loop import check_batch, checkpoint_step, last_checkpoint, train_language_model
from thermoe.training.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Corpus:
    """Everything made from text: tokenizer, training rows, held-out rows, and the stream."""

    tokenizer: PreTrainedTokenizerFast
    train_rows: Tensor
    heldout_rows: Tensor
    segments: tuple[data.Segment, ...]
    judged: tuple[Tensor, ...]
    unigram_ppl: float


def prepare_corpus(spec: CompareSpec, run: RunFolder, report: Reporter) -> Corpus:
    """Read the texts, train or load the tokenizer, and cut training rows, held-out rows and the stream.

    The held-out prose gives, in this order and without overlap, the rows for evaluation, the first and the last
    segment. Behind each segment lie a few batches that no arm learns from, on which routing decisions are judged.
    """
    with report.stage("read the texts and train the tokenizer", 3) as done:
        if spec.data.prose is None:
            prose, heldout = data.embedded_prose("train"), data.embedded_prose("heldout")
        else:
            whole = data.read_text(spec.data.prose, where="data.prose")
            cut = int(0.8 * len(whole.content))
            prose = data.Text(whole.content[:cut], f"{Path(whole.source).name}, first 80 %")
            heldout = data.Text(whole.content[cut:], f"{Path(whole.source).name}, last 20 %")
        if spec.data.code is None:
            code = data.standard_library_code(spec.data.code_bytes, part=0, parts=2)
            code_sample = data.standard_library_code(spec.data.code_bytes // 2, part=1, parts=2)
        else:
            whole = data.read_text(spec.data.code, where="data.code")
            cut = int(0.3 * len(whole.content))
            code_sample = data.Text(whole.content[:cut], whole.source)
            code = data.Text(whole.content[cut:], Path(whole.source).name)
        done(1)
        folder = run.path / "tokenizer"
        if folder.is_dir():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            tokenizer = data.train_tokenizer([prose.content, code_sample.content], spec.model.vocab_size)
            save_whole(folder, tokenizer.save_pretrained)
        done(2)
        train, held, code_tokens = (data.encode(tokenizer, text.content) for text in (prose, heldout, code))
        done(3)
    length, size = spec.model.sequence_length, spec.stream.batch_size
    heldout_tokens, rest = held[: spec.data.heldout_sequences * length], held[spec.data.heldout_sequences * length :]
    heldout_rows = data.pack(heldout_tokens, length, what="held-out prose")
    per_segment, judged = spec.stream.batches_per_segment, spec.accuracy.batches
    layout = (
        ("prose-1", "prose", rest, 0),
        ("code", "code", code_tokens, 0),
        ("prose-2", "prose", rest, per_segment + judged),
    )
    segments = [
        data.make_segment(
            name,
            domain,
            tokens,
            batches=per_segment + judged,
            batch_size=size,
            sequence_length=length,
            bytes_per_token=data.bytes_per_token(tokenizer, tokens[:50_000]),
            skip_batches=skip,
        )
        for name, domain, tokens, skip in layout
    ]
    run.write_manifest(
        data={
            "prose": {"source": prose.source, "bytes": prose.bytes, "tokens": train.numel()},
            "heldout": {"source": heldout.source, "bytes": heldout.bytes, "tokens": held.numel()},
            "code": {"source": code.source, "bytes": code.bytes, "tokens": code_tokens.numel()},
        },
        tokenizer={"kind": "byte-level BPE, trained on the prose and a part of the code", "vocab_size": len(tokenizer)},
        segments=[{"name": s.name, "domain": s.domain, "tokens": per_segment * size * (length - 1)} for s in segments],
    )
    unigram = data.unigram_perplexity(train, heldout_rows, len(tokenizer))
    run.write_manifest(unigram_ppl=unigram)
    train_rows = data.pack(train, length, what="prose")
    for phase, settings in (("training", spec.training), ("recovery", spec.recovery)):
        check_batch(train_rows, settings, where=phase)
    return Corpus(
        tokenizer,
        train_rows,
        heldout_rows,
        tuple(data.Segment(s.name, s.domain, s.batches[:per_segment], s.bytes_per_token) for s in segments),
        tuple(s.batches[per_segment:] for s in segments),
        unigram,
    )


def _train(
    model: nn.Module, rows: Tensor, settings: TrainSettings, phase: str, run: RunFolder, report: Reporter, title: str
) -> None:
    checkpoints = run.path / "checkpoints" / phase
    reached = checkpoint_step(last_checkpoint(checkpoints))
    run.drop_rows(lambda row: row["kind"] == "train" and row.get("phase") == phase and row["step"] > reached)

    def write(kind: str, step: int, fields: dict[str, Any]) -> None:
        if kind == "train":
            run.append(kind, phase=phase, step=step, **fields)

    with report.stage(title, settings.for_rows(rows.shape[0]).steps) as done:
        train_language_model(
            model,
            rows,
            settings,
            checkpoint_dir=checkpoints,
            write=write,
            on_step=done,
            resume=True,
        )
    if checkpoints.parent.is_dir() and not any(checkpoints.parent.iterdir()):
        checkpoints.parent.rmdir()


def _log_eval(model: nn.Module, corpus: Corpus, phase: str, step: int, run: RunFolder) -> float:
    run.drop_rows(lambda row: (row["kind"], row.get("phase"), row.get("step")) == ("eval", phase, step))
    value = perplexity(model, corpus.heldout_rows.to(next(model.parameters()).device))
    run.append("eval", phase=phase, step=step, split="held-out prose", nll=float(torch.tensor(value).log()), ppl=value)
    return value


def prepare_dense(spec: CompareSpec, corpus: Corpus, device: str, run: RunFolder, report: Reporter) -> GPT2LMHeadModel:
    """Train the dense GPT-2 on prose, or load it from the run folder."""
    folder = run.path / "dense"
    if folder.is_dir():
        report.say("the dense model is taken up from the run folder")
        return AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    seed_everything(spec.seed)
    end = corpus.tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(corpus.tokenizer),
        n_positions=spec.model.sequence_length,
        n_embd=spec.model.hidden_size,
        n_layer=spec.model.layers,
        n_head=spec.model.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config).to(device)
    settings = replace(spec.training, seed=spec.seed + spec.training.seed)
    _train(model, corpus.train_rows, settings, "dense", run, report, "train a dense GPT-2 on prose")
    ppl = _log_eval(model, corpus, "dense", settings.for_rows(len(corpus.train_rows)).steps, run)
    report.say(f"  perplexity on held-out prose {ppl:.1f}; of token frequencies alone {corpus.unigram_ppl:.1f}")
    save_whole(folder, model.save_pretrained)
    return model


def prepare_moe(
    spec: CompareSpec, dense: GPT2LMHeadModel, corpus: Corpus, run: RunFolder, report: Reporter
) -> PreTrainedModel:
    """Convert the dense model, check that the conversion is exact with all experts, and train it to live with fewer."""
    device = next(dense.parameters()).device
    seed_everything(spec.seed + 1)
    experts = spec.moe.num_experts
    probe = corpus.heldout_rows[:8].to(device)
    whole = convert_to_moe(dense, num_experts=experts, top_k=experts, method=spec.moe.method)  # type: ignore[arg-type]
    exact = exactness(dense, whole, probe)
    del whole
    folder = run.path / "moe"
    if folder.is_dir():
        report.say("the MoE model is taken up from the run folder")
        model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    else:
        model = convert_to_moe(
            dense,
            num_experts=experts,
            top_k=spec.moe.top_k,
            method=spec.moe.method,  # type: ignore[arg-type]
            capacity_factor=spec.moe.capacity_factor,
            drop_order=spec.moe.drop_order,
            temperature=spec.moe.temperature,
        )
        report.say(
            f"  converted: with all {experts} experts the logits differ from the dense model's by at most "
            f"{exact['max_abs_diff']:.1e}"
        )
        settings = replace(spec.recovery, seed=spec.seed + spec.recovery.seed)
        before = _log_eval(model, corpus, "recovery", 0, run)
        _train(model, corpus.train_rows, settings, "recovery", run, report, "recovery training of the MoE")
        after = _log_eval(model, corpus, "recovery", settings.for_rows(len(corpus.train_rows)).steps, run)
        report.say(
            f"  perplexity on held-out prose with {spec.moe.top_k} of {experts} experts {before:.1f} -> {after:.1f}"
        )
        save_whole(folder, model.save_pretrained)
    run.write_manifest(
        exactness={**exact, "top_k": experts},
        moe={
            "layers": len(model.config.moe_layers),
            "num_experts": experts,
            "top_k": spec.moe.top_k,
            "method": spec.moe.method,
        },
        sizes={"dense": model_size(dense), "moe": model_size(model)},
    )
    return model


@torch.no_grad()
def choose_price(spec: CompareSpec, model: nn.Module, corpus: Corpus) -> float:
    """Return the fixed price: as configured, or the one that leaves the configured share of pairs on held-out prose."""
    if spec.price.value is not None:
        return spec.price.value
    device = next(model.parameters()).device
    collected: list[Tensor] = []
    for rows in corpus.heldout_rows.to(device).split(spec.stream.batch_size):
        model(rows)
        collected += [decision.probabilities for decision in collect_routing(model).values()]
    return price_for_pairs(collected, k_min=spec.price.k_min, k_max=spec.moe.top_k, pairs_frac=spec.price.pairs_frac)
