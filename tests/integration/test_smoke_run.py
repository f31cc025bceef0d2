"""The whole way on the smoke preset: what a finished run holds, and what must be true of its numbers."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command
from run_rows import assert_same_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from thermoe.compare.runner import run_comparison
from thermoe.compare.spec import load_spec
from thermoe.moe.layer import moe_layers
from thermoe.results import RunFolder

ARMS = ["dense", "baseline", "priced", "adapted"]
SEGMENTS = ["prose-1", "code", "prose-2"]
LAYERS, BATCHES, SEQUENCES = 2, 3, 4


def nll(run: RunFolder, arm: str) -> dict[tuple[str, int], list[float]]:
    return {(row["segment"], row["batch"]): row["sequence_nll"] for row in run.rows("score") if row["arm"] == arm}


def test_manifest_is_complete_and_finished(smoke: RunFolder) -> None:
    manifest = smoke.manifest
    assert manifest["finished"] is True
    assert manifest["command"] == "demo"
    assert manifest["config"] == load_spec("smoke", ["device=cpu", "telemetry=off"]).as_dict()
    assert manifest["device"] == {"name": "cpu", "reason": "asked for"}
    assert [arm["name"] for arm in manifest["arms"]] == ARMS
    assert [segment["name"] for segment in manifest["segments"]] == SEGMENTS
    assert all(segment["tokens"] == BATCHES * SEQUENCES * 31 for segment in manifest["segments"])
    assert manifest["moe"] == {"layers": LAYERS, "num_experts": 4, "top_k": 2, "method": "partition"}
    assert manifest["exactness"]["max_abs_diff"] < 1e-5
    assert abs(manifest["exactness"]["logit_kl"]) < 1e-9
    assert manifest["sizes"]["dense"]["parameters"] == manifest["sizes"]["dense"]["active_parameters"]
    assert manifest["sizes"]["moe"]["active_parameters"] < manifest["sizes"]["moe"]["parameters"]
    assert manifest["price"]["value"] > 0
    assert manifest["unigram_ppl"] > 1
    assert manifest["tokenizer"]["vocab_size"] == 512
    assert manifest["environment"]["versions"]["torch"] == torch.__version__
    assert manifest["telemetry"]["energy_j"]["reason"] == "telemetry is off"
    assert manifest["cost_model"]["provenance"] == "estimated"
    assert manifest["durations_s"]
    assert manifest["created_at"]


def test_rows_of_every_kind_are_there(smoke: RunFolder) -> None:
    counts = Counter(row["kind"] for row in smoke.rows())
    moe_arms = len(ARMS) - 1
    assert counts == {
        "train": 4 + 2,
        "eval": 3,
        "score": len(ARMS) * len(SEGMENTS) * BATCHES,
        "energy": len(ARMS) * len(SEGMENTS),
        "load": moe_arms * len(SEGMENTS) * LAYERS,
        "accuracy": (moe_arms + 2) * len(SEGMENTS) * LAYERS,
        "arm_done": len(ARMS),
        "summary": len(ARMS) + 2,
        "comparison": (1 + 2 + 2) * len(SEGMENTS),
        "verdict": 6,
    }
    evals = [(row["phase"], row["step"]) for row in smoke.rows("eval")]
    assert evals == [("dense", 20), ("recovery", 0), ("recovery", 10)]


def test_only_results_are_left_in_the_folder(smoke: RunFolder) -> None:
    names = {path.name for path in smoke.path.iterdir()} - {"printed.txt"}
    assert names == {"manifest.json", "rows.jsonl", "tokenizer", "dense", "moe", "plots", "report.html"}


def test_nothing_unmeasured_is_a_number(smoke: RunFolder) -> None:
    for row in smoke.rows("energy"):
        assert row["energy_measured_j"] is None
        assert row["j_per_token"] is None
        assert row["provenance"] is None
        assert row["reason"] == "telemetry is off"
    for row in smoke.rows("summary"):
        if row["arm"] in ARMS:
            assert row["j_per_token_measured"]["value"] is None
            assert row["j_per_token_modelled"]["provenance"] == "estimated"
            assert row["j_per_token_modelled"]["value"] > 0


def test_arms_read_the_same_text_with_different_models(smoke: RunFolder) -> None:
    dense, baseline, priced, adapted = (nll(smoke, arm) for arm in ARMS)
    assert dense.keys() == baseline.keys() == priced.keys() == adapted.keys()
    assert all(dense[key] != baseline[key] for key in dense)
    first = ("prose-1", 0)
    assert adapted[first] == priced[first]  # scored before anything was learned, to the last bit
    later = [key for key in adapted if key != first]
    assert all(adapted[key] != priced[key] for key in later)


def test_the_rows_of_an_arm_come_from_its_saved_model(smoke: RunFolder) -> None:
    """Score the first batch again with the models in the folder, without the runner."""
    from thermoe import data
    from thermoe.evaluation import sequence_nll

    tokenizer = AutoTokenizer.from_pretrained(smoke.path / "tokenizer")
    tokens = data.encode(tokenizer, data.embedded_prose("heldout").content)[16 * 32 :]
    batch = tokens[: SEQUENCES * 32].view(SEQUENCES, 32)
    for arm, folder in (("dense", "dense"), ("baseline", "moe")):
        model = AutoModelForCausalLM.from_pretrained(smoke.path / folder).eval()
        with torch.no_grad():
            again = sequence_nll(model(batch).logits, batch)
        torch.testing.assert_close(again, torch.tensor(nll(smoke, arm)["prose-1", 0]), rtol=1e-5, atol=1e-4)


def test_the_price_takes_pairs_away(smoke: RunFolder) -> None:
    pairs = {
        arm: [row["experts_per_token"] for row in smoke.rows("score") if row["arm"] == arm]
        for arm in ("baseline", "priced")
    }
    assert set(pairs["baseline"]) == {2.0}
    assert all(1.0 <= value < 2.0 for value in pairs["priced"])
    on_prose = sum(pairs["priced"][:BATCHES]) / BATCHES
    assert on_prose == pytest.approx(0.6 * 2.0, abs=0.1)  # price.pairs_frac, chosen on other prose
    joules = {row["arm"]: row["j_per_token_modelled"]["value"] for row in smoke.rows("summary") if row["arm"] in ARMS}
    assert joules["priced"] < joules["baseline"]
    assert joules["adapted"] > joules["priced"]  # learning is counted


def test_the_oracle_is_1_and_random_near_0(smoke: RunFolder) -> None:
    found: dict[str, list[dict[str, Any]]] = {"oracle": [], "random": []}
    for row in smoke.rows("accuracy"):
        if row["arm"] in found:
            found[row["arm"]].append(row)
    for row in found["oracle"]:
        assert row["tolerant"] == 1
        assert row["tolerant_corrected"] == 1
        assert row["overlap_corrected"] == 1
        assert row["regret"] == 0
    # A share of 128 tokens, so that one figure has a standard error of about 0.05; six are averaged.
    corrected = [row["tolerant_corrected"] for row in found["random"]]
    assert abs(sum(corrected) / len(corrected)) < 0.1
    summary = {row["arm"]: row["accuracy_corrected"]["all"] for row in smoke.rows("summary")}
    assert summary["oracle"] == 1
    assert summary["random"] == pytest.approx(sum(corrected) / len(corrected))


def test_models_load_as_any_hugging_face_model(smoke: RunFolder) -> None:
    dense = AutoModelForCausalLM.from_pretrained(smoke.path / "dense")
    moe = AutoModelForCausalLM.from_pretrained(smoke.path / "moe")
    assert type(dense).__name__ == "GPT2LMHeadModel"
    layers = [layer for _, layer in moe_layers(moe)]
    assert len(layers) == LAYERS
    assert all(float(layer.router.ramp) == 1 and layer.router.active_top_k is None for layer in layers)
    assert all(bool(torch.isfinite(p).all()) for p in moe.parameters())
    tokenizer = AutoTokenizer.from_pretrained(smoke.path / "tokenizer")
    prompt = tokenizer("It was", return_tensors="pt").input_ids
    assert moe.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] == prompt.shape[1] + 3


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value or "") for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_report_is_one_file_that_needs_nothing_else(smoke: RunFolder) -> None:
    text = (smoke.path / "report.html").read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert [link for tag, link in links.found if tag == "img"]
    assert [link for _, link in links.found if not link.startswith(("data:", "#"))] == []
    assert "<script src" not in text
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:|#)", text)


def test_the_terminal_shows_arms_verdicts_and_paths(smoke: RunFolder) -> None:
    printed = (smoke.path / "printed.txt").read_text(encoding="utf-8")
    assert str(smoke.path / "report.html") in printed
    assert str(smoke.path / "rows.jsonl") in printed
    flat = " ".join(printed.split())
    for row in smoke.rows("verdict"):
        assert " ".join(row["text"].split()[:8]) in flat
    assert "Traceback" not in printed


def test_the_same_seed_gives_the_same_rows(smoke: RunFolder, tmp_path: Path) -> None:
    """Also: a run leaves its specification as it was, so that the same object takes the run up again."""
    spec = load_spec("smoke", ["device=cpu", "telemetry=off"])
    before = spec.as_dict()
    again = run_comparison(spec, tmp_path / "again")
    assert spec.as_dict() == before
    assert {arm: nll(again, arm) for arm in ARMS} == {arm: nll(smoke, arm) for arm in ARMS}
    assert_same_results(again, smoke)
    resumed = run_comparison(spec, tmp_path / "again", resume=True)
    assert_same_results(resumed, smoke)
    assert resumed.manifest["finished"] is True


def test_report_is_made_again_from_the_folder_alone(smoke: RunFolder) -> None:
    report = smoke.path / "report.html"
    rows = (smoke.path / "rows.jsonl").read_bytes()
    report.unlink()
    done = command("report", str(smoke.path))
    assert done.code == 0
    assert report.is_file()
    assert str(report) in done.out
    assert (smoke.path / "rows.jsonl").read_bytes() == rows


def test_a_folder_that_is_in_use_is_refused_without_resume(smoke: RunFolder) -> None:
    before = {path: path.read_bytes() for path in smoke.path.rglob("*") if path.is_file()}
    done = command("demo", "--preset", "smoke", "--device", "cpu", "--telemetry", "off", "--out", str(smoke.path))
    assert done.code == 2
    assert "is not empty" in done.err
    assert "--resume" in done.err
    other = command("demo", "--preset", "smoke", "--set", "seed=1", "--out", str(smoke.path), "--resume")
    assert other.code == 2
    assert "another configuration" in other.err
    assert "seed" in other.err
    assert before == {path: path.read_bytes() for path in smoke.path.rglob("*") if path.is_file()}
