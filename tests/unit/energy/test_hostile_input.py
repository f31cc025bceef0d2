"""Profiles that anyone may have written, and sizes that nobody can calibrate."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from thermoe import cli
from thermoe.energy import command, profile
from thermoe.energy.calibrate import plan_cells
from thermoe.energy.cost_model import UNITS
from thermoe.energy.profile import ProfileKey, check_folder, load_cost_model, save_profile
from thermoe.errors import ConfigError, MachineError, ThermoeError

KEY = ProfileKey(
    device_uuid="GPU-1",
    device_name="a board",
    driver="1",
    power_limit_w=700.0,
    dtype="bfloat16",
    expert_shape=(64, 2048, 1024, 1),
    dispatch_backend="grouped",
)
GOOD: dict[str, Any] = {
    "basis": "calibrated",
    "source_provenance": "measured",
    "created_at": "2026-01-01T00:00:00+00:00",
    "terms": {name: {"value": 1e-3, "unit": unit, "sd": 1e-4} for name, unit in UNITS.items()},
    "validity": {"tokens": [1.0, 64.0]},
    "fit": {"quality": "good"},
}
ABSENT = "absent"


def _changed(path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    place = changed
    for name in parents:
        place = place[name]
    if value == ABSENT:
        del place[last]
    else:
        place[last] = value
    return changed


def test_a_sound_profile_is_used(tmp_path: Path) -> None:
    save_profile(GOOD, KEY, tmp_path)
    model, why = load_cost_model(KEY, tmp_path)
    assert (model.basis, why) == ("calibrated", "calibrated on this device")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema_version", "x"),
        ("terms", []),
        ("terms", {}),
        ("terms", None),
        ("terms.layer_j", [1]),
        ("terms.token_j", ABSENT),
        ("terms.layer_j.value", float("nan")),
        ("terms.layer_j.value", float("inf")),
        ("terms.layer_j.value", "x"),
        ("terms.layer_j.value", None),
        ("terms.layer_j.value", 10**400),
        ("terms.open_j_per_byte.value", -1),
        ("terms.pair_j_per_flop.value", 0),
        ("terms.layer_j.sd", "x"),
        ("terms.layer_j.sd", -1),
        ("terms.layer_j.unit", "mJ"),
        ("key", []),
        ("fit", ABSENT),
        ("fit", []),
        ("fit.quality", None),
        ("created_at", 5),
        ("source_provenance", ["measured"]),
        ("basis", None),
        ("validity", []),
        ("validity", None),
        ("validity.tokens", [1, 2, 3]),
        ("validity.tokens", ["a", "b"]),
    ],
    ids=str,
)
def test_a_profile_that_says_nonsense_is_passed_over(path: str, value: Any, tmp_path: Path) -> None:
    """Beside a sound one, and alone: then the prior is used and the reason names the file."""
    saved = save_profile(_changed(path, value), KEY, tmp_path)
    model, why = load_cost_model(KEY, tmp_path)
    assert model.basis == "prior"
    assert saved.name in why
    (tmp_path / "sound.json").write_text(save_profile(GOOD, KEY, tmp_path / "x").read_text(encoding="utf-8"))
    assert load_cost_model(KEY, tmp_path)[1] == "calibrated on this device"


@pytest.mark.parametrize(
    "text", ["", "null", "[" * 100_000, '{"schema":"thermoe.cost_profile","schema_version":1e999}']
)
def test_a_file_that_is_no_profile_is_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    model, why = load_cost_model(KEY, tmp_path)
    assert model.basis == "prior"
    assert "x.json" in why


def test_folders_pipes_and_dead_links_of_that_name_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.json")
    assert load_cost_model(KEY, tmp_path)[0].basis == "prior"


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 8, 64])
def test_every_cell_can_be_routed(experts: int) -> None:
    for cell in plan_cells(experts):
        assert 1 <= cell.top_k <= cell.active_experts <= experts


@pytest.mark.parametrize(
    "options",
    [
        ("--experts", "0"),
        ("--experts", "-3"),
        ("--experts", str(2**70)),
        ("--hidden", "12"),
        ("--hidden", str(2**40)),
        ("--width", "0"),
        ("--layers", "0"),
        ("--layers", str(2**40)),
        ("--window-s", "0"),
        ("--window-s", "nan"),
        ("--seed", "-1"),
        ("--seed", str(2**70)),
        ("--dtype", "float64"),
        ("--telemetry", "bogus"),
        ("--telemetry", "replay"),
    ],
    ids=" ".join,
)
def test_calibrate_refuses_what_it_cannot_do(options: tuple[str, str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["calibrate", "--out", str(tmp_path / "out"), *options])
    assert isinstance(done.exception, ThermoeError), done.output
    assert all((done.exception.what, done.exception.where, done.exception.accepted, done.exception.fix))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    monkeypatch.setattr(command, "EnergyMeter", None)  # reaching for the meter would be too late
    for out in (file, file / "below"):
        done = CliRunner().invoke(cli.app, ["calibrate", "--out", str(out)])
        assert isinstance(done.exception, ConfigError), done.output
        assert "notes.txt" in str(done.exception)
        assert done.exception.fix
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_folder_without_permission_is_refused_and_a_new_one_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(tmp_path / "new" / "deep")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(profile.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="not writable"):
        check_folder(tmp_path / "new")


def test_layers_wider_than_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, per_layer = (64, 2048, 1024, 1), 64 * 2048 * 1024 * 3 * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * per_layer, 8 * per_layer))
    assert command._fitting_layers(shape, 8, torch.bfloat16) == 3
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (per_layer, 8 * per_layer))
    with pytest.raises(MachineError, match=r"0\.8 GB free") as caught:
        command._fitting_layers(shape, 8, torch.bfloat16)
    assert caught.value.fix
