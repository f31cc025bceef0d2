"""A model whose weights accelerate keeps on the disk or the CPU is the model in memory, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from test_ecosystem import NAMES, _dense, convert_copy, ids, logits, new_tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from thermoe import RouterAdapter, convert_to_moe, set_router
from thermoe.energy.work import ModelWork
from thermoe.errors import ConfigError, ConversionError
from thermoe.evaluation import routing_accuracy
from thermoe.models.classes import placed_layers
from thermoe.models.measure import model_size
from thermoe.moe.experts import Experts
from thermoe.moe.offload import check_readable, readable

PARTS = {
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"],
    "llama": ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"],
}
#: Beside the layers; not the tied embedding of GPT-2, of which transformers 5.12 loses one side.
MORE = {"gpt2": ["transformer.wpe"], "llama": ["model.embed_tokens", "lm_head"]}
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}
EVERY_WAY = pytest.mark.parametrize("way", ["cpu", "disk", "cpu with buffers", "disk with buffers"])
Offload = Callable[[Any], Any]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def offload(way: str, tmp_path: Path) -> Offload:
    def apply(model: Any) -> Any:
        model, settings = copy.deepcopy(model), {"execution_device": "cpu", "offload_buffers": "buffers" in way}
        if way.startswith("cpu"):
            accelerate.cpu_offload(model, **settings)
        else:
            accelerate.disk_offload(model, str(tmp_path / "offloaded"), **settings)
        assert all(p.is_meta for layer in placed_layers(model).values() for p in layer.parameters())
        return model

    return apply


def _reloaded(folder: Path) -> Any:
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder))  # away from where the file was mapped


def _shared(name: str) -> Any:
    model = convert_to_moe(_dense(name), num_experts=4, top_k=2, shared_size=16)
    assert all(layer.shared is not None for layer in placed_layers(model).values())
    return model


@EVERY_WAY
@pytest.mark.parametrize("variant", ["plain", "shared", "priced"])
def test_forward_and_generation(variant: str, name: str, offload: Offload) -> None:
    model = _shared(name) if variant == "shared" else convert_copy(name)
    if variant == "priced":
        set_router(model, "priced", price=0.05, open_cost=[1.0] * 4)
    away = offload(model)
    for _ in range(2):  # what a forward brought in is gone after it, and comes again
        assert torch.equal(logits(away), logits(model))
    mask = torch.ones_like(ids())
    mask[0, :2] = 0
    for settings in ({}, {"attention_mask": mask}):
        texts = [new_tokens(m, ids(), do_sample=False, **settings) for m in (away, model)]
        assert torch.equal(*texts)


@EVERY_WAY
def test_counting_and_judging(name: str, offload: Offload) -> None:
    model = convert_copy(name)
    away = offload(model)
    assert model_size(away) == model_size(model)  # the tied embedding of GPT-2 counts once
    assert ModelWork.of(away) == ModelWork.of(model)
    assert routing_accuracy(away, [ids()]) == routing_accuracy(model, [ids()])


@EVERY_WAY
def test_saving(name: str, offload: Offload, tmp_path: Path) -> None:
    model = convert_copy(name)
    set_router(model, "priced", price=0.25)
    offload(model).save_pretrained(tmp_path / "saved")
    loaded = _reloaded(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert float(next(iter(placed_layers(loaded).values())).router.price) == 0.25
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@EVERY_WAY
def test_another_router_and_adapting(name: str, offload: Offload) -> None:
    model = convert_copy(name)
    away = offload(model)
    before = logits(away)
    for one in (model, away):
        one.replaced = set_router(one, "priced", price=0.2)
    assert torch.equal(logits(away), logits(model)) and not torch.equal(logits(away), before)
    for one in (model, away):
        set_router(one, one.replaced)
    assert torch.equal(logits(away), before)
    for _, layer in [*placed_layers(model).items(), *placed_layers(away).items()]:
        with readable(layer.router):
            layer.router.gate = "probability"
    steps = []
    for one in (model, away):
        with RouterAdapter(one, lr=3e-2, anchor=1.0, bucket=None) as adapter:
            steps.append([adapter.score_and_learn(ids()).sequence_nll for _ in range(4)])
        assert adapter.updates == 4
    assert torch.equal(torch.stack(steps[0]), torch.stack(steps[1]))
    assert float(steps[0][-1].sum()) < float(steps[0][0].sum())


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("on_disk", ["a layer", "the layers", "most"])
def test_a_device_map_with_the_disk(on_disk: str, buffers: bool, name: str, tmp_path: Path) -> None:
    model = convert_copy(name)
    model.save_pretrained(tmp_path / "model")
    blocks = [f"{BLOCKS[name]}.{i}" for i in range(2)]
    left = {"a layer": blocks[1:], "the layers": blocks, "most": [*blocks, *MORE[name]]}[on_disk]
    places = {part: "disk" if part in left else "cpu" for part in [*PARTS[name], *blocks]}
    settings = {"device_map": places, "offload_folder": tmp_path / "off", "offload_buffers": buffers}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    assert any(p.is_meta for p in placed_layers(loaded)[1].parameters())
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(new_tokens(loaded, ids(), do_sample=False), new_tokens(model, ids(), do_sample=False))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(_reloaded(tmp_path / "again")), logits(model))

    sent = copy.deepcopy(model)
    accelerate.dispatch_model(
        sent, places, main_device="cpu", offload_dir=str(tmp_path / "sent"), offload_buffers=buffers
    )
    assert torch.equal(logits(sent), logits(model))


def test_the_whole_model_on_the_disk(tmp_path: Path) -> None:
    """Up to 5.17 or so transformers hangs no hook on a model that has one place; then it must not be handed out."""
    model = convert_copy("llama")
    model.save_pretrained(tmp_path / "model")
    settings = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "off"}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **settings)
    except ConfigError as error:
        assert error.where == "device_map" and error.accepted and error.fix
        assert tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    else:
        assert torch.equal(logits(loaded), logits(model))


def test_shapes_without_values_may_be_asked_for(tmp_path: Path) -> None:
    convert_copy("llama").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="meta")
    assert all(p.is_meta for p in loaded.parameters())
    assert model_size(loaded) == model_size(convert_copy("llama"))


def test_weights_that_cannot_be_read_are_an_error_and_no_number(tmp_path: Path) -> None:
    lost = Experts(2, 8, 8).to("meta")
    x, index, weights = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    for call in (lambda: lost(x), lambda: lost.forward_all(x), lambda: lost(x, index, weights)):
        with pytest.raises(ConfigError, match="not in memory") as caught:
            call()
        assert caught.value.where and caught.value.accepted and caught.value.fix
    assert lost(x.to("meta"), index.to("meta"), weights.to("meta"), backend="dense").shape == (3, 8)
    check_readable(torch.ones(1), x, where="here")

    model = convert_copy("llama").to("meta")
    accelerate.hooks.add_hook_to_module(model.model.norm, accelerate.hooks.ModelHook())
    with pytest.raises(ConfigError, match="have no values"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_dense_model_that_is_offloaded_is_not_converted() -> None:
    dense = copy.deepcopy(_dense("llama"))
    accelerate.cpu_offload(dense, execution_device="cpu")
    with pytest.raises(ConversionError, match="offloaded") as caught:
        convert_to_moe(dense, num_experts=4)
    assert "without device_map" in str(caught.value.fix)
    empty = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4)).to("meta")
    with pytest.raises(ConversionError, match="not loaded"):
        convert_to_moe(empty, num_experts=4)
