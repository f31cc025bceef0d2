"""The configuration of a training: presets, files, overrides, and what is refused before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from thermoe.config import apply_tree, flatten, keys_of
from thermoe.errors import ConfigError, ThermoeError, UnknownNameError
from thermoe.training.spec import TrainSpec, load_spec, preset_names


def refused(*overrides: str, preset: str = "smoke") -> ThermoeError:
    with pytest.raises(ConfigError) as caught:
        load_spec(preset, overrides=overrides)
    error = caught.value
    assert error.what and error.where and error.accepted and error.fix
    return error


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    folder = ["model.from_pretrained=somewhere"] if name == "recovery" else []
    spec = load_spec(name, overrides=folder)
    assert set(dict(flatten(spec.as_dict(), spec))) == set(keys_of(spec))


def test_the_presets_are_what_the_documentation_says() -> None:
    assert {"cpu-small", "smoke", "recovery", "gpu-convergence"} == set(preset_names())
    spec = load_spec("gpu-convergence", overrides=["data.train=[a.txt, b.txt.xz]"])
    model, training = spec.model, spec.training
    assert (model.layers, model.hidden_size, model.num_experts, model.top_k, model.expert_width) == (6, 768, 32, 4, 768)
    assert model.gated and spec.tokenizer.vocab_size == 50257
    assert (training.batch_size, model.sequence_length, training.lr, training.warmup_steps) == (64, 512, 6e-4, 200)
    assert training.bf16 and training.epochs == 3 and training.schedule == "cosine"
    assert spec.data.train == ["a.txt", "b.txt.xz"]
    recovery = load_spec("recovery", overrides=["model.from_pretrained=x"])
    assert recovery.training.random_k and recovery.distill.teacher == "dense"
    assert (recovery.distill.kl, recovery.distill.layer_mse, recovery.distill.lm) == (1.0, 0.1, 0.0)


def test_a_file_says_the_same_as_what_is_printed(tmp_path: Path) -> None:
    spec = load_spec("smoke", overrides=["seed=3", "router.options={capacity_factor: 1.25}"])
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(spec.as_dict()))
    assert load_spec(config=file) == spec
    assert load_spec(config=file, overrides=["seed=4"]).seed == 4


def test_without_a_preset_it_is_the_small_one() -> None:
    assert load_spec() == load_spec("cpu-small")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("training.step=3", "training.steps"),
        ("model.num_expert=3", "model.num_experts"),
        ("model.convert.methode=copy", "model.convert.method"),
        ("distil.kl=1", "distill.kl"),
        ("model=3", None),
        ("training.balance.switch=1", None),
    ],
)
def test_an_unknown_key_shows_the_near_match(override: str, near: str | None) -> None:
    error = refused(override)
    assert "unknown configuration key" in error.what
    assert near is None or near in str(error.fix)


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("training.steps=many", "training.steps"),
        ("training.epochs=0", "training.epochs"),
        ("training.epochs=nan", "training.epochs"),
        ("training.schedule=step", "training.schedule"),
        ("training.trainable=experts", "training.trainable"),
        ("training.gradient_accumulation_steps=3", "training.gradient_accumulation_steps"),
        ("training.save_every=3", "training.save_every"),
        ("training.bf16=maybe", "training.bf16"),
        ("training.balance={swich: 1}", "training.balance.swich"),
        ("tokenizer.vocab_size=256", "tokenizer.vocab_size"),
        ("model.frame=gpt3", "model.frame"),
        ("model.block=moa", "model.block"),
        ("model.block=mixtral", "training.balance"),
        ("model.heads=3", "model.heads"),
        ("model.top_k=5", "model.top_k"),
        ("model.sequence_length=1", "model.sequence_length"),
        ("model.convert.method=splice", "model.convert.method"),
        ("model.convert.method=partition", "model.from_pretrained"),
        ("distill.teacher=dense", "distill.teacher"),
        ("distill.kl=-1", "distill.kl"),
        ("router.name=topq", "router.name"),
        ("data.train=[]", "data.train"),
        ("data.train=file.txt", "data.train"),
        ("data.heldout_frac=1", "data.heldout_frac"),
        ("report_to=mlflow", "report_to"),
        ("device=tpu", "device"),
        ("seed=4294967295", "seed"),
        ("nothing", "--set"),
    ],
)
def test_a_value_out_of_range_says_what_where_accepted_and_fix(override: str, where: str) -> None:
    assert refused(override).where == where


def test_a_preset_and_a_file_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both the preset"):
        load_spec("smoke", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("- a\n- b", "holds a list"),
        ("a: [", "cannot be read"),
        ("modle: {layers: 2}", "unknown"),
        ("foo: {}", "unknown"),
    ],
)
def test_a_damaged_file_is_refused(text: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=what) as caught:
        load_spec(config=file)
    assert caught.value.where and caught.value.accepted and caught.value.fix


def test_a_missing_file_and_an_unknown_preset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_spec(config=tmp_path / "none.yaml")
    with pytest.raises(UnknownNameError, match="did you mean 'smoke'"):
        load_spec("smok")


def test_a_heading_with_nothing_under_it_changes_nothing() -> None:
    spec = TrainSpec()
    apply_tree(spec, {"model": None, "training": {}, "router": {"options": {"temperature": 0.5}}})
    assert spec.router.options == {"temperature": 0.5}
    assert spec.model == TrainSpec().model
