"""One thread, no network, fixed seeds: a test gives the same result on every run."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, which has to be known before Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
settings.register_profile("thermoe", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("thermoe")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
