"""A small language model that has read prose and a little code, trained in seconds, for tests of test-time training."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from thermoe.data import embedded_prose, standard_library_code
from thermoe.models.frame import build_frame

LENGTH, ROWS = 64, 16
VOCAB = 97


def encode(text: str) -> Tensor:
    """Return int64 ids of characters: printable ASCII and newline, the rest as one."""
    known = {chr(code): code - 31 for code in range(32, 127)} | {"\n": 96}
    return torch.tensor([known.get(character, 0) for character in text])


@functools.cache
def tokens(domain: str) -> Tensor:
    """Return the rows (N, S) of a domain: "prose", "code", "verse" or "train"."""
    if domain == "code":
        text = standard_library_code(120_000, part=1, parts=2).content
    elif domain == "verse":  # prose in capitals, cut into short lines: read with difficulty
        words = embedded_prose("heldout").content.upper().split()[20_000:40_000]
        text = "\n".join(" ".join(words[i : i + 5]) + ";" for i in range(0, len(words), 5))
    else:
        text = embedded_prose("train" if domain == "train" else "heldout").content[:300_000]
    ids = encode(text)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(domain: str, count: int, *, start: int = 0) -> list[Tensor]:
    """Return so many batches (B, S) of a domain in order."""
    return list(tokens(domain)[start * ROWS : (start + count) * ROWS].split(ROWS))


@functools.cache
def _trained(steps: int) -> dict[str, Tensor]:
    model = _fresh()
    mixed = torch.cat(
        (tokens("train"), encode(standard_library_code(20_000, part=0, parts=2).content)[: 64 * 200].view(-1, 64))
    )
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        rows = mixed[order[step * ROWS % len(order) :][:ROWS]]
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _fresh(**settings: Any) -> PreTrainedModel:
    options = {"router_options": {"gate": "renormalized"}, **settings}
    return build_frame(
        "moe",
        vocab_size=VOCAB,
        sequence_length=LENGTH,
        hidden_size=32,
        layers=2,
        heads=4,
        num_experts=8,
        top_k=2,
        expert_width=16,
        **options,
    )


def trained_model(steps: int = 150) -> PreTrainedModel:
    """Return a copy of the trained model."""
    model = _fresh()
    model.load_state_dict(_trained(steps))
    return model.eval()
