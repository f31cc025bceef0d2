"""A stream of several texts: each is learned by itself, found again, saved and forgotten by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from reading_model import batches, trained_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from thermoe.adapt import learner, streams
from thermoe.adapt.judging import Judged
from thermoe.adapt.safeguards import Safeguards, Verdict
from thermoe.adapt.stream_state import most_texts
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import CheckpointError
from thermoe.evaluation import sequence_nll
from thermoe.routers.fast_weights import FastWeights
from thermoe.testing import random_tokens, tiny_moe

ROWS, LENGTH, WORDS = 8, 24, 16
COUNTED = ("batches", "updates", "accepted", "rejected", "deferred", "skipped", "resets", "shadows")


def _text(name: str, draw: int = 0) -> Tensor:
    """Return a batch (B, S) of text "A", "B", ...: each has words that no other has."""
    place = ord(name) - ord("A")
    return random_tokens(ROWS, LENGTH, vocab_size=WORDS, seed=100 * place + draw) + WORDS * place


def _model() -> nn.Module:
    return tiny_moe(top_k=3, gate="renormalized")


def _adapter(model: nn.Module, **settings: Any) -> RouterAdapter:
    return RouterAdapter(model, **{"bucket": None, "lr": 1e-2, **settings})


def _read(adapter: RouterAdapter, names: str, first: int = 0) -> None:
    for number, name in enumerate(names, first):
        adapter.score_and_learn(_text(name, number))


def _turned_to(adapter: RouterAdapter, name: str, draw: int = 50) -> Tensor:
    """Return the scores (B,) of a batch of a text that nothing is learned from."""
    step = adapter.score_and_learn(_text(name, draw), weights=torch.zeros(ROWS, LENGTH))
    assert not step.learned
    return step.sequence_nll


def _fast(adapter: RouterAdapter) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in adapter.parameters()])


@torch.no_grad()
def _frozen(model: nn.Module, ids: Tensor) -> Tensor:
    return sequence_nll(model(ids).logits, ids)


def _same(one: Any, two: Any) -> bool:
    """Whether two saved states are the same, bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


@pytest.fixture(autouse=True)
def room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is so small that the memory of a session would hold two texts."""
    monkeypatch.setattr(streams, "most_texts", lambda *_: 8)


# -- each text by itself -----------------------------------------------------------------------------------------------


def test_each_text_has_fast_weights_of_its_own() -> None:
    model = _model()
    frozen = {name: _frozen(model, _text(name, number)) for number, name in enumerate("AB")}
    with _adapter(model) as adapter:
        first = adapter.score_and_learn(_text("A", 0))
        assert torch.equal(first.sequence_nll, frozen["A"]) and first.text == 0 and adapter.metrics["texts"] == 1
        of_a = _fast(adapter)
        second = adapter.score_and_learn(_text("B", 1))
        assert torch.equal(second.sequence_nll, frozen["B"]), "a new text begins with the trained routers"
        assert second.text == 1 and second.learned
        assert (adapter.metrics["texts"], adapter.metrics["text"]) == (2, 1)
        of_b = _fast(adapter)
        assert of_a.any() and of_b.any() and not torch.equal(of_a, of_b)
        for name, expected in (("A", of_a), ("B", of_b), ("B", of_b), ("A", of_a)):
            _turned_to(adapter, name)
            assert torch.equal(_fast(adapter), expected), "what comes back is as it was left"
            assert adapter.metrics["text"] == "AB".index(name)
        assert "texts: 2 told apart, number 0 is read" in adapter.report()


def test_prose_and_verse_are_learned_apart() -> None:
    model = trained_model()
    prose, verse = batches("prose", 2), batches("verse", 2)
    frozen = _frozen(model, verse[0])
    with _adapter(model) as adapter:
        steps = [adapter.score_and_learn(batch) for batch in (prose[0], verse[0], prose[1], verse[1])]
    assert [step.text for step in steps] == [0, 1, 0, 1]
    assert torch.equal(steps[1].sequence_nll, frozen)


@pytest.mark.parametrize("optimizer", ["natural", "adamw", "muon"])
@pytest.mark.parametrize("family", ["full", "mix"])
def test_a_text_is_learned_as_if_it_were_read_alone(optimizer: str, family: str) -> None:
    """Moments, statistics, last move and step size too: all of it is the text's own."""
    model = _model()
    # Without rows that are held back, or shuffled, nothing depends on the number that a text got.
    settings = {"optimizer": optimizer, "family": family, "steps": 1, "held_frac": 0.0}
    alone, rates = {}, {}
    for name in "AB":
        with _adapter(model, **settings) as adapter:
            for draw in range(4):
                adapter.score_and_learn(_text(name, draw))
            alone[name], rates[name] = _fast(adapter), adapter.lr
    with _adapter(model, **settings) as adapter:
        for draw in range(4):
            for name in "AB":
                adapter.score_and_learn(_text(name, draw))
        for name in "AB":
            _turned_to(adapter, name)
            assert torch.equal(_fast(adapter), alone[name])
            assert adapter.lr == rates[name]
        assert adapter.updates == adapter.metrics["updates"] == 8


def test_the_first_text_is_learned_bit_for_bit_as_alone_with_all_settings_as_they_come() -> None:
    model, ends = _model(), []
    for names in ("AAAA", "ABABCABA"):
        with _adapter(model) as adapter:
            draw = 0
            for number, name in enumerate(names):
                adapter.score_and_learn(_text(name, draw if name == "A" else 30 + number))
                draw += name == "A"
            ends.append(_fast(adapter))
    assert torch.equal(*ends)


def test_one_state_for_all_texts() -> None:
    model = _model()
    frozen = _frozen(model, _text("B", 1))
    with _adapter(model, by_text=False) as adapter:
        _read(adapter, "A")
        of_a = _fast(adapter)
        scores = _turned_to(adapter, "B", 1)
        assert torch.equal(_fast(adapter), of_a) and not torch.equal(scores, frozen)
        step = adapter.score_and_learn(_text("B", 2))
        assert step.text == 0 and (adapter.metrics["texts"], adapter.metrics["text"]) == (1, 0)
        assert "texts:" not in adapter.report()


def test_an_update_that_is_undone_is_undone_in_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts: list[Verdict] = ["accepted", "deferred", "rejected", "rejected"]
    monkeypatch.setattr(learner, "judge_update", lambda *_: Judged(verdicts.pop(0), "as planned", None, None, None))
    with _adapter(_model(), safeguards=Safeguards(judge_tokens=1, shadow=False)) as adapter:
        _read(adapter, "A")
        kept, rate = _fast(adapter), adapter.lr
        _read(adapter, "A", 1)  # waits for a verdict while B is read
        waiting = _fast(adapter)
        assert kept.any() and not torch.equal(kept, waiting)
        step = adapter.score_and_learn(_text("B", 2))
        assert (step.verdict, step.text) == ("rejected", 1)
        assert not _fast(adapter).any(), "what B goes back to is the trained router"
        assert adapter.lr == 1e-2 / 2
        _turned_to(adapter, "A")
        assert torch.equal(_fast(adapter), waiting)
        step = adapter.score_and_learn(_text("A", 3))
        assert (step.verdict, step.text) == ("rejected", 0)
        assert torch.equal(_fast(adapter), kept) and adapter.lr == rate / 2
        assert adapter.metrics["rejected"] == 2 and not verdicts


# -- going back --------------------------------------------------------------------------------------------------------


def test_a_reset_is_of_all_texts() -> None:
    model = _model()
    frozen = {name: _frozen(model, _text(name, 50)) for name in "ABC"}
    with _adapter(model) as adapter:
        _read(adapter, "AABBC")
        adapter.reset()
        assert not _fast(adapter).any()
        for name in "ABC":
            assert torch.equal(_turned_to(adapter, name), frozen[name])
            assert not _fast(adapter).any() and adapter.lr == 1e-2
        assert adapter.metrics["texts"] == 3, "they are still told apart"
        assert adapter.updates == 5 and adapter.resets == 0


def test_a_safeguard_resets_the_present_text_alone() -> None:
    model = _model()
    with _adapter(model) as adapter:
        _read(adapter, "AB")
        of_b = _fast(adapter)
        _turned_to(adapter, "A")
        assert _fast(adapter).any()
        place = model.transformer.wpe.weight
        row = place[3].detach().clone()
        with torch.no_grad():
            place[3] = float("nan")
        step = adapter.score_and_learn(_text("A", 2))
        with torch.no_grad():
            place[3] = row
        assert step.verdict == "reset" and step.text == 0 and not _fast(adapter).any()
        assert adapter.resets == 1
        _turned_to(adapter, "B")
        assert torch.equal(_fast(adapter), of_b)
        assert adapter.resets == 1, "of the stream, whichever text is read"


def test_looking_on_turns_to_no_text_and_counts_nothing() -> None:
    model = _model()
    with _adapter(model) as adapter:
        _read(adapter, "AB")
        before, metrics, of_b = adapter.state_dict(), adapter.metrics, _fast(adapter)
        with_b = _frozen(model, _text("A", 9))
        with adapter.frozen():
            step = adapter.score_and_learn(_text("A", 9))
            assert torch.equal(step.sequence_nll, with_b), "scored with what is in place"
            adapter.score_and_learn(_text("D", 9))
        with adapter.slow():
            slow = adapter.score_and_learn(_text("A", 9)).sequence_nll
        assert torch.equal(_fast(adapter), of_b) and adapter.metrics == metrics
        assert _same(adapter.state_dict(), before)
    assert torch.equal(slow, _frozen(model, _text("A", 9))) and not torch.equal(slow, with_b)


# -- streams -----------------------------------------------------------------------------------------------------------


def test_streams_share_no_texts() -> None:
    model = _model()
    frozen = _frozen(model, _text("A", 5))
    with _adapter(model) as adapter:
        _read(adapter, "ABA")
        of_a = _fast(adapter)
        with adapter.stream("other"):
            assert adapter.metrics["texts"] == 1 and adapter.metrics["batches"] == 0
            step = adapter.score_and_learn(_text("A", 5))
            assert torch.equal(step.sequence_nll, frozen) and (step.stream, step.text) == ("other", 0)
            _read(adapter, "C", 6)
            assert adapter.updates == 2
        assert torch.equal(_fast(adapter), of_a) and adapter.metrics["texts"] == 2 and adapter.updates == 3
        _turned_to(adapter, "C")
        assert not _fast(adapter).any() and adapter.metrics["texts"] == 3, "C was read in the other stream alone"
        adapter.stream("other")
        adapter.reset()
        adapter.stream("default")
        _turned_to(adapter, "A")
        assert torch.equal(_fast(adapter), of_a), "a reset is of one stream"


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["natural", "adamw"])
def test_a_saved_state_of_two_texts_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    model, twin = _model(), _model()
    settings = {"optimizer": optimizer, "held_frac": 0.25, "safeguards": Safeguards(judge_tokens=100)}
    with _adapter(model, **settings) as one, _adapter(twin, **settings) as two:
        _read(one, "AABAB")
        torch.save(one.state_dict(), tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        two.load_state_dict(saved)
        for number, name in enumerate("BAACABC", 5):
            first, second = (adapter.score_and_learn(_text(name, number)) for adapter in (one, two))
            assert torch.equal(first.sequence_nll, second.sequence_nll)
            assert (first.text, first.verdict, first.reason) == (second.text, second.verdict, second.reason)
        assert one.metrics == two.metrics
        ends = [{**adapter.state_dict(), "ledger": None} for adapter in (one, two)]  # which keeps times, too
        assert _same(*ends)
        assert _same(saved, torch.load(tmp_path / "state.pt", weights_only=True)), "what was loaded is left alone"
        assert one.metrics["texts"] == 3 and one.updates > 0


@pytest.mark.parametrize("place", [-1, 2, "first"])
def test_a_state_that_reads_a_text_that_is_not_there_is_refused(place: object) -> None:
    with _adapter(_model()) as adapter:
        _read(adapter, "AB")
        before = adapter.state_dict()
        bad = copy.deepcopy(before)
        bad["streams"]["default"]["at"] = place
        _read(adapter, "A", 2)
        now = adapter.state_dict()
        with pytest.raises(CheckpointError):
            adapter.load_state_dict(bad)
        assert _same(adapter.state_dict(), now)
        assert adapter.score_and_learn(_text("B", 3)).learned


def test_the_text_that_is_read_is_saved_with_the_model(tmp_path: Path) -> None:
    model = _model()
    with _adapter(model) as adapter:
        _read(adapter, "AAB")
        with torch.no_grad():
            with_b = model(_text("B", 9)).logits
        adapter.save_pretrained(tmp_path / "of_b")
        _turned_to(adapter, "A")
        with torch.no_grad():
            with_a = model(_text("B", 9)).logits
        adapter.save_pretrained(tmp_path / "of_a")
    assert float((with_a - with_b).abs().max()) > 1e-3
    for name, expected in (("of_a", with_a), ("of_b", with_b)):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():  # where tensors lie in memory decides on the last bit of their products
            torch.testing.assert_close(again(_text("B", 9)).logits, expected, rtol=1e-5, atol=1e-6)
    with _adapter(again) as more:
        assert torch.equal(_frozen(again, _text("B", 9)), _turned_to(more, "B", 9)), "and goes on from there"


# -- batches that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_text", [True, False])
@pytest.mark.parametrize("name", ["A", "B", "C"], ids=["the same text", "another that is known", "a new one"])
def test_a_batch_that_cannot_be_scored_was_never_read(
    name: str, by_text: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "most_texts", lambda *_: 2)  # so that a new text pushes out one that is known
    ends, score = [], learner.token_nll

    def breaks(*given: Any) -> Any:
        score(*given)
        raise torch.OutOfMemoryError("no memory")

    for fails in (False, True):
        model = _model()
        with _adapter(model, by_text=by_text) as adapter:
            _read(adapter, "ABAA")
            if fails:
                before = adapter.state_dict()
                with monkeypatch.context() as patch:
                    patch.setattr(learner, "token_nll", breaks)
                    with pytest.raises(torch.OutOfMemoryError):
                        adapter.score_and_learn(_text(name, 70))
                assert _same(adapter.state_dict(), before)
            steps = [adapter.score_and_learn(_text(text, 80 + at)) for at, text in enumerate("ABC")]
            ends.append([*(step.sequence_nll for step in steps), *(step.text for step in steps), _fast(adapter)])
    assert _same(*ends)


# -- more texts than are kept ------------------------------------------------------------------------------------------


def test_the_text_of_which_least_was_read_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "most_texts", lambda *_: 3)
    model = _model()
    frozen = {name: _frozen(model, _text(name, 50)) for name in "ABCD"}
    with _adapter(model) as adapter:
        _read(adapter, "AABCC")
        of_c = _fast(adapter)
        _read(adapter, "A", 4)
        of_a = _fast(adapter)
        assert torch.equal(_turned_to(adapter, "D"), frozen["D"])
        assert adapter.metrics["texts"] == 3
        _turned_to(adapter, "C")
        assert torch.equal(_fast(adapter), of_c)
        _turned_to(adapter, "A")
        assert torch.equal(_fast(adapter), of_a)
        assert torch.equal(_turned_to(adapter, "B"), frozen["B"]), "B had to go, and is read as a new one"
        assert not _fast(adapter).any()


def test_counters_are_of_all_texts_even_of_those_that_made_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "most_texts", lambda *_: 2)
    model = _model()
    with _adapter(model) as adapter:
        verdicts = []
        for number, name in enumerate("ABCABDDA"):
            weights = torch.full((ROWS, LENGTH), float(number % 3 != 2))
            verdicts.append(adapter.score_and_learn(_text(name, number), weights=weights).verdict)
            metrics = adapter.metrics
            assert metrics["batches"] == number + 1 and metrics["texts"] == min(2, number + 1)
            assert metrics["updates"] == adapter.updates == len(verdicts) - verdicts.count("skipped")
            for counted in ("accepted", "rejected", "deferred", "skipped"):
                assert metrics[counted] == verdicts.count(counted)
        saved, before = adapter.state_dict(), adapter.metrics
        assert 0 < adapter.updates < 8
    with _adapter(model) as again:
        again.load_state_dict(saved)
        assert {name: again.metrics[name] for name in COUNTED} == {name: before[name] for name in COUNTED}


def test_what_made_room_takes_its_memory_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "most_texts", lambda *_: 2)
    with _adapter(_model()) as adapter:
        _read(adapter, "AB")
        two = len(adapter.state_dict()["streams"]["default"]["texts"])
        _read(adapter, "CDABCD", 2)
        assert len(adapter.state_dict()["streams"]["default"]["texts"]) == two == 2


def test_how_many_texts_there_is_room_for_follows_from_the_size_of_the_model() -> None:
    with torch.device("meta"):
        large = GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=768, n_inner=3072))
    fast = {f"layer {i}": FastWeights(768, 8) for i in range(12)}
    few = most_texts(large, fast)
    kept = sum(3 * 8 * 769 + 64 * 769 for _ in fast) * 4
    whole = sum(p.numel() * 4 for p in large.parameters())
    assert 2 < few < 8 and few * kept <= 0.04 * whole < (few + 1) * kept
    assert most_texts(_model(), fast) == 2, "as few as can be told apart at all"
    assert most_texts(large, {"layer": FastWeights(768, 8)}) == 8
