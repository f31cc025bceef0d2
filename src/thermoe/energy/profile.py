"""Cost profiles on disk: what a calibration found, keyed by everything that would change it.

A profile is used when its key matches; for another board of the same kind it is used, flagged and widened; where
driver, power limit, dtype, expert shape or dispatch backend differ, or where it was made on a simulated source, the
prior is used instead and the reason is given.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thermoe.energy.cost_model import UNITS, CostModel
from thermoe.energy.fit import Term
from thermoe.errors import ConfigError
from thermoe.moe.dispatch import default_backend
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer, routed_modules
from thermoe.results import write_json
from thermoe.telemetry.meter import EnergyMeter

SCHEMA = "thermoe.cost_profile"
SCHEMA_VERSION = 1
QUALITIES = ("good", "fair", "poor", "prior")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a calibration holds for.

    Args:
        device_uuid: the board; ``None`` on a machine without one.
        device_name: its type.
        driver: version of the driver.
        power_limit_w: enforced power limit, in watts.
        dtype: of the weights.
        expert_shape: (experts, hidden size, expert width, 1 if gated).
        dispatch_backend: how experts were computed.
    """

    device_uuid: str | None
    device_name: str
    driver: str | None
    power_limit_w: float | None
    dtype: str
    expert_shape: tuple[int, int, int, int]
    dispatch_backend: str

    @classmethod
    def of(cls, meter: EnergyMeter, *, dtype: str, expert_shape: tuple[int, int, int, int], device: str) -> ProfileKey:
        """Return the key of layers of this shape on ``device`` ("cpu", "cuda") as ``meter`` sees the machine."""
        gpus = [d for d in meter.devices if d.kind == "gpu"]
        return cls(
            device_uuid=gpus[0].uuid if gpus else None,
            device_name=gpus[0].name if gpus else "no energy sensor",
            driver=gpus[0].driver if gpus else None,
            power_limit_w=meter.snapshot().get("power_limit_w"),
            dtype=dtype,
            expert_shape=expert_shape,
            dispatch_backend=default_backend(torch.device(device), getattr(torch, dtype)),
        )

    @property
    def file_name(self) -> str:
        """Name of the profile's file, a digest of the key."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16] + ".json"


def profile_folder() -> Path:
    """Return the user's cache folder for profiles; it need not exist."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "thermoe" / "profiles"


def check_folder(folder: Path | None = None) -> None:
    """Look whether profiles could be written to ``folder``, and make nothing.

    Raises:
        ConfigError: there is a file in the way, or the folder may not be written to.
    """
    place = folder or profile_folder()
    there = next((path for path in (place, *place.parents) if path.exists()), place)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise _not_writable(place, f"{there} is {'no folder' if not there.is_dir() else 'not writable'}")


def _not_writable(place: Path, why: str) -> ConfigError:
    return ConfigError(
        f"the profile cannot be written: {why}",
        where=str(place),
        accepted="a folder that may be written to",
        fix="name another folder with --out",
    )


def save_profile(profile: dict[str, Any], key: ProfileKey, folder: Path | None = None) -> Path:
    """Write a profile whole or not at all, and return its path.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    target = (folder or profile_folder()) / key.file_name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "key": asdict(key), **profile})
    except OSError as error:
        raise _not_writable(target, str(error.strerror)) from error
    return target


def read_profiles(folder: Path | None = None) -> Iterator[tuple[Path, dict[str, Any] | None, str | None]]:
    """Yield (path, profile or ``None``, why it cannot be used) for every file; files are never touched."""
    for path in _files(folder or profile_folder()):
        try:
            profile = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(profile, dict) or profile.get("schema") != SCHEMA:
                yield path, None, "not a cost profile"
            elif int(profile["schema_version"]) > SCHEMA_VERSION:
                yield path, None, f"written by a newer thermoe (schema {profile['schema_version']}); update thermoe"
            else:
                _model_of(profile)
                yield path, profile, None
        except (OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            yield path, None, f"unreadable: {type(error).__name__}: {error}"


def _files(folder: Path) -> list[Path]:
    """Return the files to read; a pipe or a device of that name would never end."""
    try:
        return sorted(path for path in folder.glob("*.json") if path.is_file())
    except OSError:
        return []


def _model_of(profile: dict[str, Any]) -> CostModel:
    """Return the cost model a profile holds; what it says is checked, for anyone may have written the file."""
    terms = {name: _term_of(name, profile["terms"][name]) for name in UNITS}
    if not terms["pair_j_per_flop"].value > 0:
        raise ValueError("the cost of an operation is 0")
    for name in ("basis", "created_at", "source_provenance"):
        if not isinstance(profile[name], str):
            raise TypeError(f"{name} is no text")
    if profile["fit"]["quality"] not in QUALITIES:
        raise ValueError(f"quality {profile['fit']['quality']!r}")
    return CostModel(
        terms=terms,
        basis=profile["basis"],
        reference=f"{profile['key']['device_name']}, {profile['created_at']}",
        provenance="simulated" if profile["source_provenance"] == "simulated" else "estimated",
        validity={str(name): (_finite(low), _finite(high)) for name, (low, high) in profile["validity"].items()},
    )


def _term_of(name: str, entry: dict[str, Any]) -> Term:
    term = Term(**entry)
    if term.unit != UNITS[name]:
        raise ValueError(f"{name} is in {term.unit!r}, not in {UNITS[name]!r}")
    if _finite(term.value) < 0 or (term.sd is not None and _finite(term.sd) < 0):
        raise ValueError(f"{name} is negative")
    return term


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def load_cost_model(key: ProfileKey, folder: Path | None = None) -> tuple[CostModel, str]:
    """Return the cost model for ``key`` and, in words, why this one.

    The newest exact match wins, then the newest of another board of the same kind; otherwise the prior.
    """
    wanted = json.loads(json.dumps(asdict(key)))
    exact: list[tuple[str, CostModel]] = []
    kin: list[tuple[str, CostModel]] = []
    passed_over: list[str] = []
    for path, profile, reason in read_profiles(folder):
        if profile is None:
            passed_over.append(f"{path.name} {reason}")
            continue
        if profile["basis"] != "calibrated":
            continue
        differing = [name for name in wanted if profile["key"].get(name) != wanted[name]]
        if profile["source_provenance"] != "measured":
            passed_over.append(f"{path.name} was made on a {profile['source_provenance']} source")
        elif profile["fit"]["quality"] == "poor":
            passed_over.append(f"{path.name} has a poor fit")
        elif not differing:
            exact.append((profile["created_at"], _model_of(profile)))
        elif differing == ["device_uuid"]:
            kin.append((profile["created_at"], _model_of(profile).transferred()))
    if exact:
        return max(exact, key=lambda pair: pair[0])[1], "calibrated on this device"
    if kin:
        return max(kin, key=lambda pair: pair[0])[1], "calibrated on another board of the same kind"
    why = "; ".join(passed_over) or "no profile for this device, shape, dtype and backend"
    return CostModel.prior(key.device_name), f"prior ({why}); calibrate with: thermoe calibrate"


def cost_model_of(model: nn.Module, meter: EnergyMeter, folder: Path | None = None) -> tuple[CostModel, str]:
    """Return the cost model for the experts of ``model`` on the machine that ``meter`` sees, and why this one.

    A model whose layers differ is looked up by its first.

    Args:
        model: with MoE layers of ours or routers attached to its own.
        meter: of its devices.
        folder: of the profiles; the user's cache by default.
    """
    name, module = next(routed_modules(model))
    if isinstance(module, MoELayer):
        experts: Any = module.experts
    else:
        experts = model.get_submodule(f"{name.rpartition('.')[0]}.experts".lstrip("."))
    weight = experts.down_proj
    if isinstance(experts, Experts):
        # Unequal experts are computed, and so calibrated, as blocks of one width.
        shape = (experts.num_blocks, experts.hidden_size, experts.intermediate_size, int(experts.gated))
    else:  # (E, F, D) where transposed, else (E, D, F)
        width, hidden = weight.shape[1:] if experts.is_transposed else weight.shape[:0:-1]
        shape = (weight.shape[0], hidden, width, int(experts.has_gate))
    dtype = str(weight.dtype).removeprefix("torch.")
    key = ProfileKey.of(meter, dtype=dtype, expert_shape=shape, device=weight.device.type)
    return load_cost_model(key, folder)
