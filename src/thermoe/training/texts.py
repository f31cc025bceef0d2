"""From texts to packed rows of tokens: local files or the embedded prose, the tokenizer, and a cache of token ids."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from thermoe import data
from thermoe.data import END_OF_TEXT, Text
from thermoe.errors import DataError
from thermoe.training.spec import TrainSpec

#: Characters encoded as one unit, and units encoded together: enough to keep the cores busy, little enough for memory.
CHUNK_CHARACTERS, CHUNKS_TOGETHER = 1 << 16, 64
#: Texts of fewer characters are encoded faster than a cache is worth.
CACHED_FROM = 1 << 20


@dataclass(frozen=True, slots=True)
class TrainingText:
    """Everything made from text.

    Args:
        tokenizer: loaded or trained.
        rows: int32 (N, S), to learn from.
        heldout: int32 (M, S).
        bytes_per_token: of the held-out text, in UTF-8.
        described: sources, sizes and digests, for the manifest.
    """

    tokenizer: PreTrainedTokenizerFast
    rows: Tensor
    heldout: Tensor
    bytes_per_token: float
    described: dict[str, Any]


def load_tokenizer(folder: str | Path, *, where: str = "tokenizer.path") -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local folder: tokenizer.json, or vocab.json with merges.txt (byte-level BPE).

    Raises:
        DataError: the folder has neither, or its files cannot be read.
    """
    place = Path(folder).expanduser()
    whole, vocab, merges = (place / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    accepted = "a folder with tokenizer.json, or with vocab.json and merges.txt"
    if not whole.is_file() and not (vocab.is_file() and merges.is_file()):
        raise DataError(
            f"{place} holds no tokenizer" if place.is_dir() else f"{place} is no folder",
            where=where,
            accepted=accepted,
            fix="check the path, or leave it out to train a tokenizer on the text",
        )
    try:
        if whole.is_file() and (place / "tokenizer_config.json").is_file():
            loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(place, local_files_only=True)
            return loaded
        from tokenizers import ByteLevelBPETokenizer, Tokenizer

        backend = (
            Tokenizer.from_file(str(whole))
            if whole.is_file()
            else ByteLevelBPETokenizer.from_file(str(vocab), str(merges))._tokenizer
        )
    except Exception as error:  # the libraries raise plain exceptions for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the tokenizer in {place} cannot be read: {reason}",
            where=where,
            accepted=accepted,
            fix="copy the files again",
        ) from error
    end = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else None
    if end is not None:
        backend.add_special_tokens([end])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)


def chunks_of(text: str, size: int = CHUNK_CHARACTERS) -> Iterator[str]:
    """Cut a text into parts of about ``size`` characters where a byte-level BPE tokenizer begins a new word anyway.

    That is behind a line break between two characters that are no white space, so that the ids of the parts together
    are those of the whole.
    """
    start, length = 0, len(text)
    while length - start > size:
        cut = text.find("\n", start + size)
        while cut != -1 and (cut + 1 >= length or text[cut + 1].isspace() or text[cut - 1].isspace()):
            cut = text.find("\n", cut + 1)
        if cut == -1:
            break
        yield text[start : cut + 1]
        start = cut + 1
    yield text[start:]


def encode_long(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray[Any, Any]:
    """Return the token ids of a long text (N,), encoded in parallel, in the smallest unsigned type that holds them."""
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts, found = list(chunks_of(text)), [np.zeros(0, kind)]
    for first in range(0, len(parts), CHUNKS_TOGETHER):
        together = parts[first : first + CHUNKS_TOGETHER]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(together, add_special_tokens=False):
            found.append(np.asarray(encoding.ids, dtype=kind))
    return np.concatenate(found)


def cache_folder() -> Path:
    """Return the user's cache folder for token ids; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "thermoe" / "tokens"


def cached_ids(tokenizer: PreTrainedTokenizerFast, text: Text) -> np.ndarray[Any, Any]:
    """Return the token ids of a text, from the cache if this tokenizer has encoded this text before.

    The name of a cached file is a digest of both, and it appears when it is whole. A cache that cannot be read or
    written only costs time.
    """
    if len(text.content) < CACHED_FROM:
        return encode_long(tokenizer, text.content)
    words = tokenizer.backend_tokenizer.to_str()
    digest = hashlib.sha256(f"1\0{sha256(words)}\0{sha256(text.content)}".encode()).hexdigest()
    path = cache_folder() / f"{digest}.npy"
    with suppress(OSError, ValueError, EOFError):
        kept = np.load(path, allow_pickle=False)
        if kept.ndim == 1 and kept.dtype.kind == "u" and (not kept.size or int(kept.max()) < len(tokenizer)):
            return kept
    ids = encode_long(tokenizer, text.content)
    partial = path.with_name(f"{digest}.{os.getpid()}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as stream:
                np.save(stream, ids, allow_pickle=False)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return ids


def sha256(text: str) -> str:
    """Return the hexadecimal digest of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _read(names: Sequence[str], where: str) -> list[Text]:
    return [data.read_text(name, where=where) for name in names]


def _join(tokenizer: PreTrainedTokenizerFast, texts: Sequence[Text]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the ids of all texts int32 (N,), an end-of-text token between two of them, and what they are."""
    parts: list[np.ndarray[Any, Any]] = []
    described = []
    for text in texts:
        ids = cached_ids(tokenizer, text)
        if parts and tokenizer.eos_token_id is not None:
            parts.append(np.asarray([tokenizer.eos_token_id], dtype=ids.dtype))
        parts.append(ids)
        described.append(
            {"source": text.source, "bytes": text.bytes, "sha256": sha256(text.content), "tokens": int(ids.size)}
        )
    return torch.from_numpy(np.concatenate(parts).astype(np.int32)), described


def choose_tokenizer(spec: TrainSpec, texts: Sequence[Text], kept: Path | None) -> tuple[PreTrainedTokenizerFast, str]:
    """Return the tokenizer and where it is from: the run folder, the given folder, the model's, or newly trained."""
    if kept is not None and kept.is_dir():
        return load_tokenizer(kept), "the run folder"
    if spec.tokenizer.path is not None:
        return load_tokenizer(spec.tokenizer.path), spec.tokenizer.path
    if spec.model.from_pretrained is not None:
        return load_tokenizer(spec.model.from_pretrained, where="model.from_pretrained"), spec.model.from_pretrained
    return data.train_tokenizer([text.content for text in texts], spec.tokenizer.vocab_size), "trained on the text"


def prepare_text(spec: TrainSpec, kept_tokenizer: Path | None = None) -> TrainingText:
    """Read the texts and cut them into rows to learn from and held-out rows.

    Args:
        spec: names texts, tokenizer and length of a row.
        kept_tokenizer: that of an interrupted run, if there is one.

    Raises:
        DataError: a file is missing, unreadable or empty, or there is too little text.
    """
    named = spec.data
    train = [data.embedded_prose("train")] if named.train is None else _read(named.train, "data.train")
    held: list[Text] | None = None
    if named.validation is not None:
        held = _read(named.validation, "data.validation")
    elif named.train is None:
        held = [data.embedded_prose("heldout")]
    tokenizer, origin = choose_tokenizer(spec, train, kept_tokenizer)
    length = spec.model.sequence_length
    tokens, described = _join(tokenizer, train)
    if held is None:
        cut = tokens.numel() - int(tokens.numel() * named.heldout_frac)
        tokens, held_tokens = tokens[:cut], tokens[cut:]
        held_described = [{"source": f"the last {named.heldout_frac:.3g} of the training text"}]
    else:
        held_tokens, held_described = _join(tokenizer, held)
    rows = data.pack(tokens, length, what="training text")
    heldout = data.pack(held_tokens, length, what="held-out text")[: named.heldout_sequences or None]
    return TrainingText(
        tokenizer,
        rows,
        heldout,
        data.bytes_per_token(tokenizer, heldout.reshape(-1)),
        {
            "train": described,
            "validation": held_described,
            "train_tokens": rows.numel(),
            "validation_tokens": heldout.numel(),
            "tokenizer": {
                "origin": origin,
                "vocab_size": len(tokenizer),
                "sha256": sha256(tokenizer.backend_tokenizer.to_str()),
            },
        },
    )
