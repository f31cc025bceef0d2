"""Text sources, tokenizer, packing and streams."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from thermoe import data
from thermoe.data import (
    END_OF_TEXT,
    Text,
    bytes_per_token,
    embedded_prose,
    encode,
    make_segment,
    pack,
    read_text,
    standard_library_code,
    train_tokenizer,
    unigram_perplexity,
)
from thermoe.errors import ConfigError, DataError, ThermoeError, UnknownNameError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([embedded_prose("heldout").content[:60_000]], 400)


def test_embedded_prose_is_there_and_its_splits_are_apart() -> None:
    train, heldout = embedded_prose(), embedded_prose("heldout")
    assert len(train.content) > len(heldout.content) > 100_000
    assert "embedded" in train.source and "train" in train.source and "heldout" in heldout.source
    for start in range(10_000, 90_000, 20_000):
        assert heldout.content[start : start + 100] not in train.content
    with pytest.raises(UnknownNameError, match="did you mean 'heldout'"):
        embedded_prose("holdout")


def test_length_in_bytes_is_that_of_utf_8() -> None:
    assert Text("naïve ☃", "test").bytes == len("naïve ☃".encode())


def test_code_is_cut_to_size_and_its_parts_are_disjoint() -> None:
    whole = standard_library_code(5_000)
    assert len(whole.content) == 5_000 and "standard library" in whole.source
    assert whole == standard_library_code(5_000)
    first, second = (standard_library_code(200_000, part=i, parts=2).content for i in range(2))
    lines = set(filter(lambda line: len(line) > 60, first.splitlines()))
    shared = [line for line in second.splitlines() if line in lines]
    assert len(shared) < 0.02 * len(lines)


def test_code_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="no source file") as error:
        standard_library_code(100)
    assert error.value.where and error.value.accepted and "data.code=" in error.value.fix
    (tmp_path / "broken.py").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "good.py").write_text("x = 1\n")
    assert standard_library_code(100).content == "x = 1\n"


def test_local_files(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("naïve ☃\n", encoding="utf-8")
    assert read_text(path) == Text("naïve ☃\n", str(path))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    for name, message in (
        ("missing.txt", "No such file"),
        ("empty.txt", "is empty"),
        ("latin.txt", "not UTF-8"),
        (".", "cannot be read"),
    ):
        with pytest.raises(DataError, match=message) as error:
            read_text(tmp_path / name, where="--text")
        assert error.value.where == "--text" and error.value.accepted and error.value.fix


@given(st.text(max_size=60))
@settings(max_examples=100)
def test_every_string_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(tokenizer, text)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text


def test_tokenizer_size_and_special_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    text = embedded_prose("heldout").content[:2_000]
    assert int(encode(tokenizer, text).max()) < 400
    with pytest.raises(ConfigError, match="vocabulary size is 256"):
        train_tokenizer(["text"], 256)


def test_tokenizer_training_repeats() -> None:
    text = embedded_prose("heldout").content[:20_000]
    assert train_tokenizer([text], 300).get_vocab() == train_tokenizer([text], 300).get_vocab()


def test_bytes_per_token_is_exact(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "A naïve snowman ☃ stood.\n" * 10
    ids = encode(tokenizer, text)
    assert bytes_per_token(tokenizer, ids) == pytest.approx(Text(text, "").bytes / len(ids))
    assert bytes_per_token(tokenizer, ids.tolist()) == bytes_per_token(tokenizer, ids)
    assert bytes_per_token(tokenizer, []) == 0


@given(st.integers(1, 60), st.integers(1, 20))
def test_packing_keeps_the_order_and_leaves_out_the_rest(count: int, length: int) -> None:
    tokens = torch.arange(count)
    if count < length:
        with pytest.raises(DataError, match=f"{count} tokens, fewer than one sequence of {length}"):
            pack(tokens, length)
        return
    rows = pack(tokens, length)
    assert rows.shape == (count // length, length)
    assert torch.equal(rows.flatten(), tokens[: rows.numel()])


def _segment(tokens: int, skip: int = 0) -> data.Segment:
    return make_segment(
        "first",
        "prose",
        torch.arange(tokens),
        batches=3,
        batch_size=2,
        sequence_length=5,
        bytes_per_token=4.0,
        skip_batches=skip,
    )


def test_segments_follow_one_another_without_a_gap() -> None:
    first, second = _segment(100), _segment(100, skip=3)
    assert first.batches.shape == (3, 2, 5)
    assert torch.equal(first.batches.flatten(), torch.arange(30))
    assert torch.equal(second.batches.flatten(), torch.arange(30, 60))
    assert (first.name, first.domain, first.bytes_per_token) == ("first", "prose", 4.0)


def test_a_segment_that_is_too_short_says_how_much_it_needs() -> None:
    assert _segment(30).batches.numel() == 30
    with pytest.raises(DataError, match="needs 6 sequences of 5 tokens, its text has 5") as error:
        _segment(29)
    assert error.value.where == "stream.batches_per_segment" and "30 tokens" in error.value.accepted and error.value.fix
    with pytest.raises(ThermoeError):
        _segment(3)


def test_unigram_perplexity() -> None:
    train, heldout = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2])
    p = [4 / 7, 2 / 7, 1 / 7]  # add-one smoothing over three tokens
    expected = math.exp(-sum(math.log(v) for v in p) / 3)
    assert unigram_perplexity(train, heldout, 3) == pytest.approx(expected)
    even = torch.arange(10).repeat(50)
    assert unigram_perplexity(even, even, 10) == pytest.approx(10)


def test_the_manual_is_long_prose_and_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    text = data.python_manual()
    assert text.bytes > 100_000 and "attribute" in text.content and "topics" in text.source
    assert text == data.python_manual()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError) as error:
        data.python_manual()
    assert error.value.where == "pydoc_data.topics"
