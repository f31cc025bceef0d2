"""The configuration of a comparison: presets, overrides, and what is refused before any work is done."""

from __future__ import annotations

import dataclasses
import math
from importlib.resources import files
from typing import Any

import pytest
import yaml

from thermoe.compare.spec import CompareSpec, load_spec, preset_names
from thermoe.config import flatten, keys_of
from thermoe.errors import ConfigError, ThermoeError, UnknownNameError


def refused(*overrides: str, preset: str = "demo") -> ThermoeError:
    with pytest.raises(ConfigError) as caught:
        load_spec(preset, overrides)
    error = caught.value
    assert error.what and error.where and error.accepted and error.fix
    return error


def at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_holds_known_keys_only(name: str) -> None:
    spec = load_spec(name)
    text = files("thermoe").joinpath("compare", "presets", f"{name}.yaml").read_text(encoding="utf-8")
    written = dict(flatten(yaml.safe_load(text), CompareSpec()))
    assert written
    assert set(written) <= set(keys_of(CompareSpec()))
    for path, value in written.items():
        assert at(spec.as_dict(), path) == value, path


def test_demo_and_smoke_are_there() -> None:
    assert {"demo", "smoke"} <= set(preset_names())


def test_unknown_preset_shows_the_near_match() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'smoke'") as caught:
        load_spec("smok")
    assert caught.value.where == "--preset"


@pytest.mark.parametrize("path", ["../presets/smoke", "smoke.yaml", "", "/etc/passwd"])
def test_a_preset_is_a_name_and_no_path(path: str) -> None:
    with pytest.raises(UnknownNameError):
        load_spec(path)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("moe.num_expert", "moe.num_experts"),
        ("trainig.steps", "training.steps"),
        ("sed", "seed"),
        ("moe", "moe.top_k"),
        ("training.balance.switch", "training.balance"),
    ],
)
def test_unknown_key_shows_the_near_match(key: str, near: str) -> None:
    error = refused(f"{key}=1")
    assert error.where == key
    assert error.fix == f"did you mean {near!r}?"


@pytest.mark.parametrize("key", ["seed.__class__", "__class__", "moe.__init__", "check", ""])
def test_only_settings_can_be_set(key: str) -> None:
    assert "unknown configuration key" in refused(f"{key}=1").what


@pytest.mark.parametrize(
    ("override", "accepted"),
    [
        ("training.steps=many", "an integer"),
        ("training.steps=1.5", "an integer"),
        ("training.steps=true", "an integer"),
        ("training.steps=", "an integer"),
        ("training.lr=fast", "a number"),
        ("training.lr=true", "a number"),
        ("training.random_k=1", "true or false"),
        ("training.balance=1", "a mapping"),
        ("moe.capacity_factor=[1]", "a number or null"),
        ("arms=dense", "a list of names, for example [dense, baseline]"),
        ("arms=[1, 2]", "a list of names, for example [dense, baseline]"),
        ("arms=[[dense]]", "a list of names, for example [dense, baseline]"),
    ],
)
def test_wrong_type_says_which_is_right(override: str, accepted: str) -> None:
    error = refused(override)
    assert error.accepted == accepted
    assert error.where == override.partition("=")[0]


@pytest.mark.parametrize("raw", ["[1", "{a: ", "!!python/object/apply:os.getcwd []", "'x", "a: b: c"])
def test_a_value_that_is_no_yaml_is_an_error_and_runs_nothing(raw: str) -> None:
    assert "cannot be read" in refused(f"training.steps={raw}").what


def test_an_override_without_an_equals_sign_is_refused() -> None:
    error = refused("moe.num_experts")
    assert error.where == "--set"
    assert "sets nothing" in error.what


@pytest.mark.parametrize(("raw", "value"), [("1e-3", 1e-3), ("2E-4", 2e-4), ("1.0e-3", 1e-3), ("1", 1.0)])
def test_floats_may_be_written_with_an_exponent(raw: str, value: float) -> None:
    spec = load_spec("demo", [f"training.lr={raw}"])
    assert spec.training.lr == value
    assert type(spec.training.lr) is float


@pytest.mark.parametrize("raw", ["off", "no", "2024", "1e3", "true", "x=y"])
def test_text_is_taken_as_it_is_typed(raw: str) -> None:
    """YAML would read `off` as false and 2024 as a number."""
    spec = load_spec("demo", [f"telemetry={raw}", f"data.prose={raw}"])
    assert (spec.telemetry, spec.data.prose) == (raw, raw)


@pytest.mark.parametrize("raw", ["null", "~", ""])
def test_optional_settings_can_be_emptied(raw: str) -> None:
    spec = load_spec("demo", ["data.prose=x", f"data.prose={raw}", f"moe.capacity_factor={raw}"])
    assert spec.data.prose is None
    assert spec.moe.capacity_factor is None


def test_later_overrides_win_and_leave_the_rest() -> None:
    spec = load_spec("demo", ["moe.top_k=1", "moe.top_k=2", "training.balance={entropy: 0.1}", "arms=[dense, priced]"])
    assert spec.moe.top_k == 2
    assert spec.training.balance == {"entropy": 0.1}
    assert spec.recovery.balance == load_spec("demo").recovery.balance
    assert spec.arms == ["dense", "priced"]
    assert load_spec("demo").moe.top_k == 4


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["moe.top_k=9"], "moe.top_k"),
        (["moe.top_k=0"], "moe.top_k"),
        (["moe.num_experts=0"], "moe.num_experts"),
        (["moe.num_experts=7"], "moe.num_experts"),
        (["moe.num_experts=32", "moe.top_k=8"], "moe.top_k"),
        (["moe.method=partiton"], "moe.method"),
        (["moe.drop_order=first"], "moe.drop_order"),
        (["moe.capacity_factor=0"], "moe.capacity_factor"),
        (["moe.temperature=-1"], "moe.temperature"),
        (["model.heads=5"], "model.heads"),
        (["model.heads=0"], "model.heads"),
        (["model.hidden_size=0"], "model.hidden_size"),
        (["model.hidden_size=-4"], "model.hidden_size"),
        (["model.layers=0"], "model.layers"),
        (["model.sequence_length=1"], "model.sequence_length"),
        (["model.vocab_size=256"], "model.vocab_size"),
        (["data.code_bytes=0"], "data.code_bytes"),
        (["data.heldout_sequences=0"], "data.heldout_sequences"),
        (["stream.batches_per_segment=0"], "stream.batches_per_segment"),
        (["stream.batch_size=-3"], "stream.batch_size"),
        (["accuracy.batches=-1"], "accuracy.batches"),
        (["accuracy.tau=nan"], "accuracy.tau"),
        (["adapt.lr=inf"], "adapt.lr"),
        (["adapt.lr=-1"], "adapt.lr"),
        (["adapt.anchor=0"], "adapt.anchor"),
        (["adapt.anchor=1.1"], "adapt.anchor"),
        (["price.value=-0.1"], "price.value"),
        (["price.value=1e400"], "price.value"),
        (["price.k_min=5"], "price.k_min"),
        (["price.k_min=-1"], "price.k_min"),
        (["price.pairs_frac=0"], "price.pairs_frac"),
        (["price.pairs_frac=1.01"], "price.pairs_frac"),
        (["price.pairs_frac=0.2"], "price.pairs_frac"),
        (["price.k_min=0", "price.pairs_frac=0"], "price.pairs_frac"),
        (["training.lr=0"], "training.lr"),
        (["recovery.ramp_frac=2"], "recovery.ramp_frac"),
        (["training.balance={swich: 1}"], "training.balance.swich"),
        (["seed=-1"], "seed"),
        (["seed=4294967295"], "seed"),
        (["seed=100000000000000000000000000"], "seed"),
        ([f"training.lr={10**400}"], "training.lr"),
        (["arms=[]"], "arms"),
        (["arms=[dense, dense]"], "arms"),
        (["device=cpu:x"], "device"),
        (["device=quantum"], "device"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_values_that_do_not_go_together_are_refused(overrides: list[str], where: str) -> None:
    assert refused(*overrides).where == where


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.num_experts=7", "moe.top_k=2", "moe.method=copy"],
        ["moe.num_experts=32", "moe.top_k=8", "accuracy.batches=0"],
        ["price.pairs_frac=0.25"],
        ["price.pairs_frac=0.1", "price.k_min=0"],
        ["price.pairs_frac=0.1", "price.value=0.3"],
        ["seed=4294967290"],
        ["model.vocab_size=257", "model.sequence_length=2"],
        ["adapt.lr=0", "adapt.anchor=1"],
    ],
    ids=" ".join,
)
def test_values_at_the_edge_are_taken(overrides: list[str]) -> None:
    load_spec("demo", overrides)


def test_the_fix_for_an_expert_count_works() -> None:
    fix = refused("moe.num_experts=7").fix
    assert fix is not None
    load_spec("demo", [fix.removeprefix("use ")])


def test_as_dict_round_trips() -> None:
    spec = load_spec("smoke", ["seed=3", "moe.temperature=0.5", "data.prose=off", "training.balance={z_loss: 0.2}"])
    tree = spec.as_dict()
    flat = dict(flatten(tree, CompareSpec()))
    assert set(flat) == set(keys_of(spec))
    again = yaml.safe_load(yaml.safe_dump(tree))
    assert again == tree

    def built(cls: Any, values: dict[str, Any]) -> Any:
        made = cls()
        for field in dataclasses.fields(made):
            present = getattr(made, field.name)
            value = values[field.name]
            setattr(made, field.name, built(type(present), value) if dataclasses.is_dataclass(present) else value)
        return made

    assert built(CompareSpec, again) == spec
    assert all(math.isfinite(value) for value in flat.values() if isinstance(value, float))


def test_as_dict_is_a_copy() -> None:
    spec = CompareSpec()
    spec.as_dict()["arms"].append("x")
    spec.as_dict()["training"]["balance"]["x"] = 1.0
    assert spec == CompareSpec()
