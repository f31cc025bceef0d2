"""From texts to rows: chunks that encode as the whole does, a cache that is whole or not there, files of both kinds."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermoe import data
from thermoe.data import Text, embedded_prose, train_tokenizer
from thermoe.errors import DataError
from thermoe.training import texts
from thermoe.training.spec import TrainSpec, load_spec
from thermoe.training.texts import cached_ids, chunks_of, encode_long, load_tokenizer, prepare_text

PROSE = embedded_prose("train").content[:60_000]
TOKENIZER = train_tokenizer([PROSE], 400)


@given(
    text=st.text(st.sampled_from("ab \n\t\r\u00a0\u2028'é1.")).map(lambda t: t * 3),
    size=st.integers(1, 12),
)
def test_the_parts_of_a_text_encode_as_the_whole(text: str, size: int) -> None:
    parts = list(chunks_of(text, size))
    assert "".join(parts) == text
    whole = data.encode(TOKENIZER, text).tolist()
    assert [token for part in parts for token in data.encode(TOKENIZER, part).tolist()] == whole


def test_real_prose_is_cut_and_encodes_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(texts, "CHUNKS_TOGETHER", 7)
    assert len(list(chunks_of(PROSE, 500))) > 50
    ids = encode_long(TOKENIZER, PROSE)
    assert ids.dtype == np.uint16
    assert ids.tolist() == data.encode(TOKENIZER, PROSE).tolist()
    assert encode_long(TOKENIZER, "").size == 0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(texts, "CACHED_FROM", 1000)
    return tmp_path / "cache" / "thermoe" / "tokens"


def _count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    encode = encode_long

    def counted(tokenizer: Any, text: str) -> Any:
        calls.append(len(text))
        return encode(tokenizer, text)

    monkeypatch.setattr(texts, "encode_long", counted)
    return calls


def test_a_text_is_encoded_once_for_each_tokenizer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _count(monkeypatch)
    text = Text(PROSE, "prose")
    first = cached_ids(TOKENIZER, text)
    assert np.array_equal(first, cached_ids(TOKENIZER, text)) and len(calls) == 1
    other = train_tokenizer([PROSE], 300)
    assert cached_ids(other, text).size > first.size and len(calls) == 2
    cached_ids(TOKENIZER, Text(PROSE + "x", "prose"))
    assert len(calls) == 3
    assert sorted(path.suffix for path in cache.iterdir()) == [".npy"] * 3
    cached_ids(TOKENIZER, Text("short", "prose"))
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY half", "more tokens than there are", "cut"])
def test_a_damaged_cache_is_made_again(damage: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Text(PROSE, "prose")
    right = cached_ids(TOKENIZER, text)
    (file,) = cache.iterdir()
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif isinstance(damage, str):
        np.save(file, np.full(5, 60_000, np.uint16))
    else:
        file.write_bytes(damage)
    calls = _count(monkeypatch)
    assert np.array_equal(cached_ids(TOKENIZER, text), right) and len(calls) == 1
    assert np.array_equal(cached_ids(TOKENIZER, text), right) and len(calls) == 1


def test_no_half_written_cache_is_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert cached_ids(TOKENIZER, Text(PROSE, "prose")).size
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_only_costs_time(cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("in the way")
    assert cached_ids(TOKENIZER, Text(PROSE, "prose")).size


def spec(*overrides: str) -> TrainSpec:
    return load_spec("smoke", overrides=overrides)


def test_files_are_joined_by_an_end_of_text_and_their_tail_is_held_out(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    first.write_text(PROSE[:9000])
    second.write_bytes(lzma.compress(PROSE[9000:20_000].encode()))
    named = f"data.train=[{first}, {second}]"
    made = prepare_text(spec(named, "data.heldout_frac=0.25", "data.heldout_sequences=0"))
    end = made.tokenizer.eos_token_id
    tokens = [*made.rows.reshape(-1).tolist(), *made.heldout.reshape(-1).tolist()]
    assert tokens.count(end) == 1
    at = tokens.index(end)
    assert made.tokenizer.decode(tokens[:at]) == PROSE[:9000]
    assert PROSE[9000:].startswith(made.tokenizer.decode(made.rows.reshape(-1).tolist()[at + 1 :])[:-3])
    assert made.heldout.numel() == pytest.approx(0.25 * len(tokens), rel=0.05)
    sources = [entry["source"] for entry in made.described["train"]]
    assert sources == [str(first), str(second)]
    assert all(len(entry["sha256"]) == 64 for entry in made.described["train"])
    decoded = made.tokenizer.decode(made.heldout.reshape(-1).tolist()).encode()
    assert made.bytes_per_token == pytest.approx(len(decoded) / made.heldout.numel())


def test_validation_files_are_read_instead_of_the_tail(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(PROSE[:9000])
    second.write_text(PROSE[30_000:40_000])
    made = prepare_text(spec(f"data.train=[{first}]", f"data.validation=[{second}]", "data.heldout_sequences=3"))
    assert made.heldout.shape == (3, 32)
    assert PROSE[30_000:].startswith(made.tokenizer.decode(made.heldout.reshape(-1).tolist())[:-3])
    assert made.described["validation"][0]["source"] == str(second)


def test_embedded_prose_is_the_default_and_its_splits_are_apart() -> None:
    made = prepare_text(spec())
    assert made.rows.shape[1] == 32 and made.heldout.shape == (8, 32)
    assert made.described["train"][0]["sha256"] != made.described["validation"][0]["sha256"]
    assert len(made.tokenizer) == 300


@pytest.mark.parametrize("form", ["whole", "vocabulary", "saved"])
def test_a_tokenizer_is_loaded_in_each_form(form: str, tmp_path: Path) -> None:
    backend = TOKENIZER.backend_tokenizer
    if form == "whole":
        backend.save(str(tmp_path / "tokenizer.json"))
    elif form == "vocabulary":
        backend.model.save(str(tmp_path))
    else:
        TOKENIZER.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert len(loaded) == len(TOKENIZER) and loaded.eos_token_id == TOKENIZER.eos_token_id
    assert encode_long(loaded, PROSE[:5000]).tolist() == encode_long(TOKENIZER, PROSE[:5000]).tolist()


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "holds no tokenizer"), ("not json", "cannot be read"), ("{}", "cannot be read")],
)
def test_a_folder_without_a_tokenizer_is_refused(content: str | None, what: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=what) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == "tokenizer.path" and caught.value.accepted and caught.value.fix
    with pytest.raises(DataError, match="is no folder"):
        load_tokenizer(tmp_path / "none")


def test_texts_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    packed, short = tmp_path / "a.txt.xz", tmp_path / "b.txt"
    packed.write_bytes(b"no xz")
    short.write_text("A few words.")
    for overrides, what, where in (
        ([f"data.train=[{tmp_path / 'none.txt'}]"], "cannot be read", "data.train"),
        ([f"data.train=[{packed}]"], "cannot be unpacked", "data.train"),
        ([f"data.train=[{short}]"], "fewer than one sequence", "model.sequence_length"),
        ([f"data.validation=[{short}]"], "held-out text has", "model.sequence_length"),
    ):
        with pytest.raises(DataError, match=what) as caught:
            prepare_text(spec(*overrides))
        assert caught.value.where == where and caught.value.accepted and caught.value.fix


def test_line_ends_are_read_alike(tmp_path: Path) -> None:
    plain, other = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes(b"one\ntwo\n")
    other.write_bytes(b"one\r\ntwo\r")
    assert data.read_text(plain).content == data.read_text(other).content
