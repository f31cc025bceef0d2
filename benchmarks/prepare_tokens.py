"""Turn text files into what `convergence.py` reads: uint16 .npy files of token ids and a meta.json.

python benchmarks/prepare_tokens.py --tokenizer FOLDER --out DATA \
    --train novels/*.txt.xz code/*.txt.xz --valid novels=heldout.txt.xz --valid python=heldout-code.txt.xz

Files are .txt or .txt.xz, tokenised in parallel, one process a file; an end-of-text token stands between them. Written:
train.npy, valid_NAME.npy, and meta.json with tokens, bytes and bytes per token of each.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

CHUNK = 1 << 20  # characters tokenised at once, cut at a line's end


def read(path: Path) -> str:
    """Return a .txt or .txt.xz file as text."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def chunks(text: str) -> list[str]:
    """Cut a text behind line ends, so that no word is torn."""
    parts, start = [], 0
    while start < len(text):
        end = min(len(text), start + CHUNK)
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        parts.append(text[start:end])
        start = end
    return parts


def tokenise(job: tuple[str, str]) -> tuple[np.ndarray, int]:
    """Return the ids of one file, end of text included, and its bytes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    folder, path = job
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > 2**16 or tokenizer.eos_token_id is None:
        raise SystemExit(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens; uint16 holds 65536, with an eos token"
        )
    text = read(Path(path))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(chunks(text), add_special_tokens=False)
    ids = np.concatenate([np.asarray(part.ids, dtype=np.uint16) for part in encoded])
    return np.append(ids, np.uint16(tokenizer.eos_token_id)), len(text.encode("utf-8"))


def write(out: Path, name: str, folder: str, paths: list[Path], pool: ProcessPoolExecutor) -> dict[str, float]:
    """Write one split and return its entry of meta.json."""
    done = list(pool.map(tokenise, [(folder, str(path)) for path in paths]))
    tokens, size = np.concatenate([ids for ids, _ in done]), sum(size for _, size in done)
    np.save(out / f"{name}.npy", tokens)
    print(f"{name}: {len(paths)} files, {len(tokens):,} tokens, {size / len(tokens):.3f} bytes per token")
    return {"tokens": len(tokens), "bytes": size, "bytes_per_token": size / len(tokens), "files": len(paths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a saved GPT-2 tokenizer")
    parser.add_argument("--train", nargs="+", type=Path, required=True)
    parser.add_argument("--valid", action="append", required=True, metavar="NAME=FILE[,FILE]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    from transformers import AutoTokenizer

    args.out.mkdir(parents=True, exist_ok=True)
    splits = {"train": args.train}
    for text in args.valid:
        name, _, files = text.partition("=")
        splits[f"valid_{name}"] = [Path(file) for file in files.split(",")]
    with ProcessPoolExecutor(args.workers) as pool:
        entries = {name: write(args.out, name, args.tokenizer, paths, pool) for name, paths in splits.items()}
    meta = {"vocab_size": len(AutoTokenizer.from_pretrained(args.tokenizer)), "splits": entries}
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
