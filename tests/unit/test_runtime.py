"""Device choice with its reason, seeds, and the fingerprint of the environment."""

from __future__ import annotations

import json
import random
import re

import numpy
import pytest
import torch

from thermoe import __version__, runtime
from thermoe.errors import MachineError
from thermoe.runtime import choose_device, environment_fingerprint, seed_everything


def test_auto_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = choose_device()
    assert choice.name == "cpu" and "no CUDA device" in choice.reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    choice = choose_device("auto")
    assert choice.name == "cuda" and "Some GPU" in choice.reason
    assert choose_device("cuda:1").name == "cuda:1"


def test_what_is_asked_for_is_taken() -> None:
    assert choose_device("cpu") == runtime.DeviceChoice("cpu", "asked for")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "tpu", ""])
def test_a_device_that_is_not_there_is_a_fault_of_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="is not available") as error:
        choose_device(name)
    assert error.value.exit_code == 3
    assert error.value.where == "--device" and error.value.accepted == "auto, cpu" and error.value.fix


def test_seeds_repeat_every_generator() -> None:
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    assert draw(7) == draw(7)
    assert all(a != b for a, b in zip(draw(7), draw(8), strict=True))
    seed_everything(2**40)  # wider than NumPy takes


def test_the_fingerprint_names_versions_and_commit() -> None:
    fingerprint = environment_fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        fingerprint["versions"]["torch"]
    )
    assert fingerprint["versions"]["thermoe"] == __version__
    assert fingerprint["torch_threads"] == torch.get_num_threads()
    assert fingerprint["commit"] is None or re.fullmatch("[0-9a-f]{40}", fingerprint["commit"])
    assert fingerprint["gpus"] == [] or all("uuid" in gpu for gpu in fingerprint["gpus"])


def test_no_commit_is_none_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("no git")))
    assert environment_fingerprint()["commit"] is None


def test_a_package_that_is_not_there_is_none() -> None:
    assert runtime._version_of("no-such-package-of-this-name") is None
