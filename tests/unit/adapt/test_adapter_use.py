"""Test-time training where it is used: text that shifts, padding, generation, every family, larger chunks, saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_model import batches, trained_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from thermoe import attach_router, convert_to_moe, set_router
from thermoe.adapt.agreement import routing_agreement
from thermoe.adapt.fast_optimizer import FastOptimizer
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import CheckpointError, ConfigError, RoutingError
from thermoe.evaluation import sequence_nll
from thermoe.models.frame import build_frame
from thermoe.moe.layer import collect_routing, moe_layers, routed_modules
from thermoe.routers.fast_weights import FAST_FAMILIES, FastWeights
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe

OFF = Safeguards.none()
SHIFT = [*batches("prose", 5), *batches("code", 16)]


def _adapter(model: nn.Module, **settings: Any) -> RouterAdapter:
    return RouterAdapter(model, **{"bucket": None, "lr": 1e-2, "steps": 4, **settings})


@torch.no_grad()
def _frozen(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    return [sequence_nll(model(batch).logits, batch) for batch in rows]


def _mean(scores: list[Tensor]) -> float:
    return float(torch.cat(scores).mean()) / 63


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# -- does it help ----------------------------------------------------------------------------------------------------


@pytest.mark.tuned
@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_text_that_shifts_is_read_better(family: str) -> None:
    model = trained_model()
    frozen = _frozen(model, SHIFT)
    with _adapter(model, family=family, rank=8) as adapter:
        scores = [adapter.score_and_learn(batch).sequence_nll for batch in SHIFT]
        assert adapter.family in adapter.report()
    assert _mean(scores[5:]) < _mean(frozen[5:]) - (0.005 if family == "bias" else 0.03)
    assert _mean(scores[:5]) < _mean(frozen[:5]) + 0.01, "and at home it does no harm"


@pytest.mark.parametrize("settings", [{}, {"safeguards": OFF, "held_frac": 0.0}], ids=["guarded", "bare"])
def test_a_step_size_of_zero_reproduces_the_frozen_model(settings: dict[str, Any]) -> None:
    model = trained_model()
    frozen = _frozen(model, SHIFT[:8])
    with _adapter(model, lr=0.0, **settings) as adapter:
        scores = [adapter.score_and_learn(batch) for batch in SHIFT[:8]]
    assert all(torch.equal(step.sequence_nll, expected) for step, expected in zip(scores, frozen, strict=True))
    assert not any(step.learned for step in scores)


def test_t16_a_stream_that_comes_home_has_forgotten_nothing() -> None:
    model = trained_model()
    home, verse, end = batches("prose", 6), batches("verse", 6), batches("prose", 6, start=6)
    before, frozen = _frozen(model, verse), _frozen(model, end)
    with RouterAdapter(model, bucket=None, held_frac=0.25, safeguards=Safeguards(judge_tokens=252)) as adapter:
        for batch in [*home, *batches("code", 6)]:
            adapter.score_and_learn(batch)
        shifted = [adapter.score_and_learn(batch).sequence_nll for batch in verse]
        assert _mean(shifted[3:]) < _mean(before[3:]) - 0.03, "there was something to forget it for"
        scores = [adapter.score_and_learn(batch).sequence_nll for batch in end]
        assert _mean(scores[1:]) <= _mean(frozen[1:]) + 0.01
        adapter.reset()
        with adapter.frozen():
            assert torch.equal(adapter.score_and_learn(end[0]).sequence_nll, frozen[0])


def test_with_a_price_and_decode_grouping_it_works_too() -> None:
    model = trained_model()
    options = {"price": 0.1, "open_cost": [0.5] * 8, "group_by_position": True}
    set_router(model, "priced", **options)
    frozen = _frozen(model, SHIFT)
    with _adapter(model, held_frac=0.25, safeguards=Safeguards(judge_tokens=252)) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in SHIFT]
    assert _mean([s.sequence_nll for s in steps][5:]) < _mean(frozen[5:]) - 0.02
    # Rows held back route otherwise by themselves, so both states ran on them.
    assert all(step.cost_ratio is not None for step in steps if step.judged)


# -- gradients and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_t12_gradients_are_where_they_should_be(family: str) -> None:
    model, given = trained_model(), []
    with _adapter(model, family=family, safeguards=OFF) as adapter:
        learn = adapter._learner.live.objective.learn
        adapter._learner.live.objective.learn = lambda b: given.append(learn(b)) or given[-1]
        adapter.score_and_learn(batches("prose", 1)[0])
        assert all(float(g.norm()) > 1e-6 for g in given[0].gradients)
        fast = {id(p) for p in adapter.parameters()}
        assert all(p.grad is None and p.requires_grad == (id(p) in fast) for p in model.parameters())


def test_t12_one_expert_with_a_renormalised_weight_teaches_nothing() -> None:
    model, given = tiny_moe(top_k=1, gate="renormalized"), []
    with _adapter(model, safeguards=OFF) as adapter:
        learn = adapter._learner.live.objective.learn
        adapter._learner.live.objective.learn = lambda b: given.append(learn(b)) or given[-1]
        adapter.score_and_learn(random_tokens(2, 20))
    assert all(float(g.norm()) < 1e-6 for g in given[0].gradients)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside nested dictionaries and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


@pytest.mark.parametrize("optimizer", ["natural", "adamw", "muon"])
def test_the_memory_of_learning_is_a_small_part_of_the_model(optimizer: str) -> None:
    """Counted from the tensors themselves: fast weights, moments, the last move, and what an update may be undone to.

    Of one text; others that are known are parked with as much.
    """
    model = build_frame(
        "moe",
        vocab_size=500,
        sequence_length=32,
        hidden_size=128,
        layers=2,
        heads=4,
        num_experts=16,
        top_k=4,
        expert_width=256,
        router_options={"gate": "renormalized"},
    ).eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with _adapter(model, optimizer=optimizer) as adapter:
        state = adapter._learner.state
        for seed in range(2):
            state.base = None  # nothing waits for its verdict, so that the next may be undone to moments too
            adapter.score_and_learn(random_tokens(4, 32, vocab_size=500, seed=seed))
        assert state.base is not None and state.last_move is not None
        assert sum(1 for _ in _tensors(state.base.optimizer)) >= 4, "moments are undone as well"
        live = adapter._learner.live.optimizer.state_tensors()
        mine = [*adapter.parameters(), *live, *state.last_move, *_tensors(state.base.as_dict())]
        used = sum({t.data_ptr(): t.numel() * t.element_size() for t in mine}.values())
    assert 0 < used <= 0.05 * size


# -- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    ids, model = random_tokens(2, 20), tiny_moe(top_k=3, gate="renormalized")
    pad = (7, 0) if side == "left" else (0, 7)
    padded, mask = F.pad(ids, pad, value=0), F.pad(torch.ones_like(ids), pad, value=0)
    ends = []
    for given in ((ids,), (padded, mask)):
        with _adapter(model, safeguards=OFF, held_frac=0.0) as adapter:
            step = adapter.score_and_learn(*given)
            ends.append([step.sequence_nll, *(p.detach().clone() for p in adapter.parameters())])
            assert step.tokens.tolist() == [19, 19] and step.learned
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_natural_steps_see_what_is_learned_from_and_nothing_else(family: str) -> None:
    """Neither padding, nor held-back tokens, nor generated ones have a part in the directions of the steps."""
    model, ids = tiny_moe(top_k=3, gate="renormalized"), random_tokens(1, 24)
    mask, weights = torch.ones_like(ids), torch.ones(1, 24)
    mask[:, :5], weights[:, 20:] = 0, 0
    seen: list[Tensor] = []
    with _adapter(model, safeguards=OFF, held_frac=0.25, family=family) as adapter:
        step = adapter._learner.live.optimizer.step
        adapter._learner.live.optimizer.step = lambda names, gradients, features: (
            seen.extend(features.values()),
            step(names, gradients, features),
        )
        adapter.score_and_learn(ids, mask, weights)
    # Of 18 real predictions 4 have no weight, and of the 14 that have the last quarter is held back.
    assert [one.shape[0] for one in seen] == [10, 10]


def test_experts_that_no_token_chose_do_not_move() -> None:
    """Their gradients are rounding, which a step of the same size for every expert would make a move of."""
    model, ids = tiny_moe(num_experts=8, top_k=2, gate="renormalized"), random_tokens(1, 4)
    with _adapter(model, safeguards=OFF, held_frac=0.0, steps=1) as adapter:
        _logits(model, ids[:, :-1])
        counts = [d.counts for d in collect_routing(model).values()]
        assert adapter.score_and_learn(ids).learned
        moves = [m.router.fast.delta.detach().abs() for _, m in routed_modules(model)]
    for count, move in zip(counts, moves, strict=True):
        assert bool((count == 0).any()) and bool((move[count > 0] > 1e-4).any())
        assert float(move[count == 0].max()) < 1e-5


def test_a_full_mask_is_no_mask() -> None:
    model, ids = tiny_moe(gate="renormalized"), random_tokens(2, 20)
    with _adapter(model, lr=0.0) as adapter:
        plain = adapter.score_and_learn(ids).sequence_nll
        assert torch.equal(plain, adapter.score_and_learn(ids, torch.ones_like(ids)).sequence_nll)


def test_generated_text_has_no_weight() -> None:
    model, ids = tiny_moe(gate="renormalized"), random_tokens(2, 20)
    plain = _frozen(model, [ids])[0]
    with _adapter(model) as adapter:
        step = adapter.score_and_learn(ids, weights=torch.zeros(2, 20))
        assert not step.learned and step.verdict == "skipped" and "every weight is 0" in (step.reason or "")
        assert torch.equal(step.sequence_nll, plain), "what is scored does not depend on weights"
    given = torch.ones(2, 20)
    given[:, 12:] = 0
    other = torch.where(given > 0, ids, random_tokens(2, 20, seed=9))
    ends = []
    for rows in (ids, other):
        with _adapter(model, safeguards=OFF, held_frac=0.0) as adapter:
            assert adapter.score_and_learn(rows, weights=given).learned
            ends.append([p.detach().clone() for p in adapter.parameters()])
    for one, two in zip(*ends, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.ones(2, 19)),
        ("attention_mask", torch.full((2, 20), 0.5)),
        ("attention_mask", torch.zeros(2, 20)),
        ("attention_mask", [[1] * 20] * 2),
        ("weights", torch.ones(2, 19)),
        ("weights", -torch.ones(2, 20)),
        ("weights", torch.full((2, 20), float("nan"))),
        ("weights", torch.full((2, 20), float("inf"))),
        ("weights", 1.0),
        ("weights", torch.ones(2, 20, dtype=torch.bool)),
        ("weights", torch.ones(2, 20, dtype=torch.complex64)),
        ("weights", torch.full((2, 20), 1e38)),
        ("weights", torch.full((2, 20), 1e300, dtype=torch.float64)),
    ],
)
def test_masks_and_weights_that_do_not_fit(name: str, value: Any) -> None:
    with _adapter(tiny_moe()) as adapter:
        with pytest.raises(ConfigError) as error:
            adapter.score_and_learn(random_tokens(2, 20), **{name: value})
        assert error.value.where == name and error.value.accepted and error.value.fix
        assert adapter.metrics["batches"] == 0


@pytest.mark.parametrize("wrong", [-1, 97, 10**12])
def test_ids_outside_the_vocabulary_are_refused_before_a_kernel_meets_them(wrong: int) -> None:
    model, rows = trained_model(), [batch.clone() for batch in batches("prose", 2)]
    rows[1][3, 4] = wrong
    with _adapter(model) as adapter:
        adapter.score_and_learn(rows[0])
        before = adapter.state_dict()
        with pytest.raises(ConfigError, match="vocabulary") as error:
            adapter.score_and_learn(rows[1])
        assert error.value.where == "input_ids" and error.value.fix
        after = adapter.state_dict()
    one, two = (state["streams"]["default"] for state in (before, after))
    assert one["reads"] == two["reads"] and len(one["texts"]) == len(two["texts"])
    assert one["texts"][0]["batches"] == two["texts"][0]["batches"] == 1


def test_ids_of_32_bits_are_ids() -> None:
    rows, scores = batches("prose", 2), []
    for dtype in (torch.int64, torch.int32):
        with _adapter(trained_model()) as adapter:
            scores.append([adapter.score_and_learn(batch.to(dtype)).sequence_nll for batch in rows])
    assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True))


def test_percentiles_leave_out_what_is_easy_and_what_is_hard() -> None:
    model, ids, given = tiny_moe(gate="renormalized"), random_tokens(4, 30), []
    with _adapter(model, safeguards=OFF, percentiles=(20, 95), held_frac=0.0, steps=1) as adapter:
        learn = adapter._learner.live.objective.learn
        adapter._learner.live.objective.learn = lambda b: given.append(b) or learn(b)
        adapter.score_and_learn(ids)
    nll, used = given[0].nll.detach().flatten(), given[0].weights.flatten() > 0
    assert int(used.sum()) == pytest.approx(0.75 * nll.numel(), abs=2)
    assert nll[used].max() <= torch.quantile(nll, 0.96) and nll[used].min() >= torch.quantile(nll, 0.19)


def test_a_part_of_which_percentiles_leave_nothing_is_no_broken_loss() -> None:
    model, ids = tiny_moe(gate="renormalized"), random_tokens(8, 3)
    with _adapter(model, safeguards=OFF, percentiles=(0, 10), held_frac=0.0, steps=8) as adapter:
        step = adapter.score_and_learn(ids)
        assert step.learned and adapter.resets == 0
        counts = {one["count"] for one in adapter.state_dict()["optimizer"][0]["layers"].values()}
        assert counts <= {1, 2, 3}, "most of the sequences have nothing left to learn from"


def test_large_chunks_are_one_step_on_the_mean() -> None:
    model, rows = tiny_moe(gate="renormalized"), [random_tokens(2, 20, seed=i) for i in range(4)]
    settings = {"safeguards": OFF, "held_frac": 0.0, "optimizer": "adamw", "steps": 1, "by_text": False}
    with _adapter(model, min_tokens=4 * 38, **settings) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in rows]
        assert [s.verdict for s in steps] == ["collected"] * 3 + ["accepted"] and adapter.updates == 1
        assert "38 of 152" in (steps[0].reason or "")
        chunked = [p.detach().clone() for p in adapter.parameters()]
    with _adapter(model, **settings) as adapter:
        adapter.score_and_learn(torch.cat(rows))
        for one, two in zip(chunked, adapter.parameters(), strict=True):
            torch.testing.assert_close(one, two.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("layers", "moved"), [("all", [0, 1]), ("top_half", None), ([1], [1]), ([-1], "refused")])
def test_chosen_layers_alone_learn(layers: Any, moved: Any) -> None:
    model = trained_model()
    if moved == "refused":
        with pytest.raises(ConfigError):
            _adapter(model, layers=layers)
        assert all(layer.router.fast is None for _, layer in moe_layers(model))
        return
    batch = batches("prose", 1)[0]
    if moved is None:
        _logits(model, batch)
        sure = [float(d.probabilities.amax(-1).mean()) for d in collect_routing(model).values()]
        moved = [sure.index(max(sure))]
    with _adapter(model, layers=layers) as adapter:
        adapter.score_and_learn(batch)
        found = [i for i, (_, m) in enumerate(routed_modules(model)) if m.router.fast.delta.any()]
    assert found == moved


def test_muon_steps_have_the_size_of_adams() -> None:
    sizes = {}
    for kind in ("adamw", "muon"):
        torch.manual_seed(0)
        fast = FastWeights(64, 16)
        parameters = [fast.matrix, fast.delta]
        FastOptimizer({"layer": fast}, kind, 1e-2).step(["layer"], [torch.randn(16), torch.randn(16, 64)], {})
        sizes[kind] = [float(p.detach().square().mean().sqrt()) for p in parameters]
        assert all(p.grad is None for p in parameters)
    assert sizes["adamw"][1] == sizes["muon"][1] == pytest.approx(1e-2, rel=0.01)
    assert 0.1 < sizes["muon"][0] / sizes["adamw"][0] < 1


def test_muon_learns() -> None:
    model = trained_model()
    frozen = _frozen(model, SHIFT[5:])
    with _adapter(model, optimizer="muon") as adapter:
        scores = [adapter.score_and_learn(batch).sequence_nll for batch in SHIFT[5:]]
    assert _mean(scores) < _mean(frozen) - 0.02


# -- where it is called from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(context: Any) -> None:
    ends = []
    for around in (torch.enable_grad, context):
        model = tiny_moe(gate="renormalized")
        with around():
            ids = random_tokens(4, 20).clone()
            with _adapter(model) as adapter:
                steps = [adapter.score_and_learn(ids, torch.ones_like(ids), torch.ones(4, 20)) for _ in range(3)]
                assert all(step.learned for step in steps)
                ends.append(steps[-1].sequence_nll.clone())
    assert torch.equal(*ends)


def test_generation_decodes_with_what_the_prompt_taught() -> None:
    model, prompt = trained_model(), batches("code", 1)[0][:2, :40]
    cached = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **cached)
    with _adapter(model, lr=0.1, safeguards=Safeguards(kl_cap=None)) as adapter:
        assert adapter.read_prompt(prompt).learned
        told = model.generate(prompt, **cached)
        assert not torch.equal(told, before)
        assert torch.equal(told, model.generate(prompt, use_cache=False, **cached)), "cached decoding follows"
        one = _logits(model, prompt)
        assert adapter.metrics["batches"] == 1
    assert torch.equal(model.generate(prompt, **cached), before)
    assert not torch.equal(one, _logits(model, prompt))


def test_swapped_routers_keep_learning() -> None:
    model = trained_model()
    with _adapter(model) as adapter:
        rows = batches("code", 4)
        adapter.score_and_learn(rows[0])
        replaced = set_router(model, "priced", price=0.05)
        assert adapter.score_and_learn(rows[1]).learned
        set_router(model, replaced)
        assert adapter.score_and_learn(rows[2]).learned
        fresh = set_router(model, "oea")
        for router in fresh.values():
            assert router.fast is not None
        for _, layer in moe_layers(model):
            layer.router.fast = None  # as a router that was built by hand would be
        assert adapter.score_and_learn(rows[3]).learned
        assert all(layer.router.fast is not None for _, layer in moe_layers(model))
    assert all(layer.router.fast is None for _, layer in moe_layers(model))
    assert all(router.fast is None for router in (*replaced.values(), *fresh.values()))


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def _mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


def _converted(dense: nn.Module) -> nn.Module:
    return convert_to_moe(dense, num_experts=4, top_k=2, gate="renormalized").eval()


MODELS = {
    "converted GPT-2": lambda: _converted(tiny_gpt2()),
    "converted Llama": lambda: _converted(_llama()),
    "attached Mixtral": lambda: (model := _mixtral(), attach_router(model, verbose=False))[0],
    "attached, priced": lambda: (model := _mixtral(), attach_router(model, "priced", price=0.05, verbose=False))[0],
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_every_kind_of_model(kind: str, family: str) -> None:
    model = MODELS[kind]()
    torch.manual_seed(1)  # its own words, which it reads better than by guessing
    said = model.generate(random_tokens(12, 1), max_new_tokens=23, min_new_tokens=23, do_sample=True, pad_token_id=0)
    rows = list(said.split(4))
    frozen = _frozen(model, rows)
    before = _logits(model, rows[0])
    guards = Safeguards(judge_tokens=20, shadow_every=2)
    with _adapter(model, family=family, rank=4, safeguards=guards) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in rows]
        assert torch.equal(steps[0].sequence_nll, frozen[0]) and steps[0].learned
        assert adapter.ledger.energy_j > 0 and adapter.ledger.provenance == "estimated"
        assert adapter.ledger.counts["judge"] > 0 and adapter.ledger.counts["shadow"] > 0
        rows_seen = {d.expert_index.shape[0] for d in collect_routing(model).values()}
        assert rows_seen == {4 * 24}, "on record is what was served, not what was judged"
        with adapter.slow():
            assert torch.equal(_logits(model, rows[0]), before)
        assert "updates" in adapter.report()
    assert torch.equal(_logits(model, rows[0]), before)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["converted GPT-2", "converted Llama"])
@pytest.mark.parametrize("family", FAST_FAMILIES)
def test_saving_drops_or_keeps_what_was_learned(kind: str, family: str, tmp_path: Path) -> None:
    model, ids = MODELS[kind](), random_tokens(4, 24)
    trained = _logits(model, ids)
    with _adapter(model, family=family, rank=4) as adapter:
        for _ in range(3):
            adapter.score_and_learn(ids)
        learned = _logits(model, ids)
        assert not torch.equal(learned, trained)
        model.save_pretrained(tmp_path / "dropped")
        adapter.save_pretrained(tmp_path / "kept")
        assert torch.equal(_logits(model, ids), learned), "saving changes nothing"
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dropped"), ids), trained)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    assert torch.equal(_logits(again, ids), learned)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.bfloat16)
    assert all(m.router.fast.delta.dtype == torch.float32 for _, m in routed_modules(half))
    with _adapter(again, family=family, rank=4) as more:
        assert torch.equal(_logits(again, ids), learned), "learning goes on from what was kept"
        step = more.score_and_learn(ids)
        assert step.learned and torch.equal(step.sequence_nll, sequence_nll(learned, ids))
        more.reset()
        assert torch.equal(_logits(again, ids), trained)
    assert torch.equal(_logits(again, ids), learned), "and leaves the model as it was"
    again.save_pretrained(tmp_path / "again", keep_learned=True)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), ids), learned)


def test_a_kept_family_is_not_taken_for_another(tmp_path: Path) -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model, family="bias") as adapter:
        adapter.score_and_learn(random_tokens(2, 20))
        adapter.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RoutingError, match="family 'bias'"):
        _adapter(again, family="full")


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = tiny_moe()
    with pytest.raises(RoutingError, match="learned anything"):
        model.save_pretrained(tmp_path, keep_learned=True)
    with pytest.raises(ConfigError, match="keep_learned"):
        model.save_pretrained(tmp_path, keep_learned="yes")
    attached = MODELS["attached Mixtral"]()
    with _adapter(attached) as adapter:
        adapter.score_and_learn(random_tokens(2, 20))
        with pytest.raises(RoutingError, match="no place") as error:
            adapter.save_pretrained(tmp_path)
        assert "state_dict" in (error.value.fix or "")
    with pytest.raises(RoutingError, match="closed"):
        adapter.save_pretrained(tmp_path)


def test_a_saved_state_with_streams_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, twin = trained_model(), trained_model()
    settings = {"held_frac": 0.25, "safeguards": Safeguards(judge_tokens=504), "bucket": 0.5}
    with _adapter(model, **settings) as first, _adapter(twin, **settings) as second:
        for batch in batches("prose", 3):
            first.score_and_learn(batch)
        first.stream("other")
        for batch in batches("code", 3):
            first.score_and_learn(batch)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for name, domain in (("other", "code"), ("default", "prose")):
            for adapter in (first, second):
                adapter.stream(name)
            for batch in batches(domain, 4, start=3):
                one, two = first.score_and_learn(batch), second.score_and_learn(batch)
                assert torch.equal(one.sequence_nll, two.sequence_nll)
                assert (one.verdict, one.reason, one.kl) == (two.verdict, two.reason, two.kl)
        assert second.metrics == first.metrics


def _cut(layers: dict[str, Any]) -> dict[str, Any]:
    """Return moments of layers that are narrower."""
    return {name: {**one, "mean": one["mean"][:, 1:]} for name, one in layers.items()}


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = tiny_moe(gate="renormalized")
    with _adapter(model) as adapter:
        adapter.score_and_learn(random_tokens(2, 20))
        before = adapter.state_dict()
        bad = [{}, None, {**before, "version": 1}, {**before, "family": "bias"}, {**before, "fast": {}}]
        bad += [{**before, "streams": {}}, {**before, "bucket": {}}, {**before, "optimizer": []}]
        (natural,) = before["optimizer"]
        for layers in ({"nowhere": {}}, {name: {} for name in natural["layers"]}, _cut(natural["layers"])):
            bad.append({**before, "optimizer": [{**natural, "layers": layers}]})
        for state in bad:
            with pytest.raises(CheckpointError):
                adapter.load_state_dict(state)  # type: ignore[arg-type]
            assert all(
                torch.equal(value, adapter.state_dict()["fast"][layer][key])
                for layer, fast in before["fast"].items()
                for key, value in fast.items()
            )
        assert adapter.metrics["batches"] == 1 and adapter.score_and_learn(random_tokens(2, 20)).learned


# -- watching --------------------------------------------------------------------------------------------------------


def test_agreement_before_and_after() -> None:
    model, probe = trained_model(), batches("code", 2, start=20)
    with _adapter(model) as adapter:
        same = routing_agreement(adapter, probe)
        assert all((a.jaccard, a.kl, a.flip_rate, a.delta_nll_flipped) == (1, 0, 0, None) for a in same.values())
        assert all(a.delta_nll_kept == 0 and a.tokens == 2 * 16 * 63 for a in same.values())
        for batch in batches("code", 16):
            adapter.score_and_learn(batch)
        state = adapter.state_dict()["fast"]
        moved = routing_agreement(adapter, probe)
        assert all(torch.equal(v, adapter.state_dict()["fast"][n][k]) for n, f in state.items() for k, v in f.items())
        frozen = _frozen_in(adapter, model, probe)
        now = _frozen(model, probe)
        total = float(torch.cat(now).sum() - torch.cat(frozen).sum()) / (2 * 16 * 63)
        for layer in moved.values():
            assert 0 < layer.jaccard < 1 and layer.kl > 0 and 0 < layer.flip_rate < 1
            assert layer.delta_nll_flipped is not None and layer.delta_nll_kept is not None
            split = layer.flip_rate * layer.delta_nll_flipped + (1 - layer.flip_rate) * layer.delta_nll_kept
            assert split == pytest.approx(total, abs=1e-5)
        assert total < 0
        with pytest.raises(ConfigError):
            routing_agreement(adapter, [])


def _frozen_in(adapter: RouterAdapter, model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    with adapter.slow():
        return _frozen(model, rows)


def test_metrics_and_report_tell_what_happened() -> None:
    model = trained_model()
    with _adapter(model, held_frac=0.25, safeguards=Safeguards(judge_tokens=252)) as adapter:
        assert adapter.metrics["verdict"] is None and adapter.metrics["learning_frac"] is None
        steps = [adapter.score_and_learn(batch) for batch in batches("code", 8)]
        metrics = adapter.metrics
        counted = [sum(step.verdict == name for step in steps) for name in ("accepted", "rejected", "deferred")]
        assert [metrics[name] for name in ("accepted", "rejected", "deferred")] == counted
        assert metrics["updates"] == metrics["batches"] == 8
        assert metrics["learning_j_modelled"] == adapter.ledger.energy_j > 0
        assert sum(adapter.ledger.verdicts.values()) == 8
        report = adapter.report()
        assert "8 batches" in report and "estimated" in report and "no cap" in report
        assert "CUDA graphs: none, for the model is on cpu" in report, "what is slower than it might be says so"
