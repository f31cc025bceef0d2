"""Text: the embedded prose, the running Python's standard library as code, local files; tokenizer, packing, streams."""

from __future__ import annotations

import lzma
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thermoe.errors import ConfigError, DataError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROSE_SPLITS = ("train", "heldout")
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text and where it comes from."""

    content: str
    source: str

    @property
    def bytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.content.encode("utf-8"))


def embedded_prose(split: str = "train") -> Text:
    """Return the prose that ships with the package: four novels ("train") or one more ("heldout"), public domain."""
    if split not in PROSE_SPLITS:
        raise UnknownNameError.of("split", split, PROSE_SPLITS, where="embedded_prose")
    name = f"prose-{split}.txt.xz"
    packed = files("thermoe").joinpath("corpus", name).read_bytes()
    return Text(lzma.decompress(packed).decode("utf-8"), f"embedded novels ({name})")


def standard_library_code(max_bytes: int, *, part: int = 0, parts: int = 1) -> Text:
    """Return source code of the running Python's standard library, file by file in alphabetical order.

    Args:
        max_bytes: stop at the file that reaches this many characters.
        part: which of ``parts`` disjoint shares of the files.
        parts: number of shares.

    Raises:
        DataError: the library is not there as readable source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    chunks: list[str] = []
    size = 0
    for number, path in enumerate(sorted(root.glob("*.py"))):
        if number % parts != part or size >= max_bytes:
            continue
        try:
            chunks.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue  # a file that cannot be read is not part of the corpus; an empty corpus is an error below
        size += len(chunks[-1])
    if not chunks:
        raise DataError(
            f"no source file of the standard library can be read below {root}",
            where="data.code",
            accepted="a Python installation with its .py files",
            fix="give a code file of your own with --set data.code=FILE",
        )
    return Text("\n\n".join(chunks)[:max_bytes], f"standard library of the running Python, {len(chunks)} files")


def python_manual() -> Text:
    """Return the language reference that ships with Python, as `help()` shows it: technical English prose.

    Raises:
        DataError: this Python was installed without it.
    """
    fix = "install the full standard library of Python"
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            f"the manual of the running Python cannot be read: {error}",
            where="pydoc_data.topics",
            accepted="a Python installation with its pydoc_data",
            fix=fix,
        ) from error
    content = "\n\n".join(str(topics[name]) for name in sorted(topics))
    return Text(content, f"language reference of the running Python, {len(topics)} topics")


def read_text(path: str | Path, *, where: str = "text file") -> Text:
    """Read a local UTF-8 text file; one whose name ends in .xz is unpacked.

    Raises:
        DataError: the file is missing, not UTF-8, or empty.
    """
    file = Path(path)
    fix = "check the path and that the file is plain UTF-8 text"
    try:
        packed = file.read_bytes()
        content = (lzma.decompress(packed) if file.suffix == ".xz" else packed).decode("utf-8")
        content = content.replace("\r\n", "\n").replace("\r", "\n")
    except lzma.LZMAError as error:
        raise DataError(f"{file} cannot be unpacked: {error}", where=where, accepted="an .xz file", fix=fix) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 ({error.reason})"
        raise DataError(
            f"{file} cannot be read: {reason}", where=where, accepted="a readable UTF-8 text file", fix=fix
        ) from error
    if not content.strip():
        raise DataError(f"{file} is empty", where=where, accepted="a text file with content", fix=fix)
    return Text(content, str(file))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer (GPT-2's kind); every string round-trips.

    Raises:
        ConfigError: the vocabulary cannot hold the 256 bytes and the end-of-text token.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ConfigError(
            f"the vocabulary size is {vocab_size}",
            where="model.vocab_size",
            accepted="an integer of at least 257 (256 bytes and the end-of-text token)",
            fix="leave it at 2048",
        )
    # Lines, so that the trainer can count in parallel; whole books would be one pre-tokenization unit each.
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        lines, vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return the token ids of ``text`` as int64 (N,)."""
    ids = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return torch.tensor(ids, dtype=torch.long)


def pack(tokens: Tensor, sequence_length: int, *, what: str = "text") -> Tensor:
    """Cut a run of tokens into rows (R, S); the remainder is left out.

    Raises:
        DataError: there are fewer tokens than one row.
    """
    rows = tokens.numel() // sequence_length
    if rows == 0:
        raise DataError(
            f"the {what} has {tokens.numel()} tokens, fewer than one sequence of {sequence_length}",
            where="model.sequence_length",
            accepted=f"at least {sequence_length} tokens",
            fix="give more text or lower model.sequence_length",
        )
    return tokens[: rows * sequence_length].view(rows, sequence_length)


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a stream from one domain: batches (N, B, S) in reading order."""

    name: str
    domain: str
    batches: Tensor
    bytes_per_token: float


def make_segment(
    name: str,
    domain: str,
    tokens: Tensor,
    *,
    batches: int,
    batch_size: int,
    sequence_length: int,
    bytes_per_token: float,
    skip_batches: int = 0,
) -> Segment:
    """Cut ``batches`` batches of consecutive sequences out of ``tokens``, after ``skip_batches``.

    Raises:
        DataError: the text is too short.
    """
    rows = pack(tokens, sequence_length, what=f"text of segment {name}")
    first, last = skip_batches * batch_size, (skip_batches + batches) * batch_size
    if rows.shape[0] < last:
        raise DataError(
            f"segment {name} needs {last} sequences of {sequence_length} tokens, its text has {rows.shape[0]}",
            where="stream.batches_per_segment",
            accepted=f"at least {last * sequence_length} tokens",
            fix="give more text, or lower stream.batches_per_segment, stream.batch_size or model.sequence_length",
        )
    return Segment(name, domain, rows[first:last].view(batches, batch_size, sequence_length), bytes_per_token)


def unigram_perplexity(train: Tensor, heldout: Tensor, vocab_size: int) -> float:
    """Return the perplexity on ``heldout`` of token frequencies counted in ``train`` (add-one smoothed)."""
    counts = torch.bincount(train.reshape(-1), minlength=vocab_size).double() + 1
    log_p = (counts / counts.sum()).log()
    return float(torch.exp(-log_p[heldout.reshape(-1)].mean()))


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, tokens: Tensor | Sequence[int]) -> float:
    """Return the mean number of UTF-8 bytes a token stands for, to convert nats per token to bits per byte."""
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode("utf-8")) / max(1, len(ids))
