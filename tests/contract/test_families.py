"""Every model family, tiny and random: conversion, exactness, gradients, generation, saving and loading."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from thermoe import collect_routing, convert_to_moe, set_router
from thermoe.errors import ConversionError
from thermoe.models import classes
from thermoe.models.families import FAMILIES, Family, add_family

VOCAB = 90
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {**SIZES, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**COMMON, "num_key_value_heads": 2}
TINY: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4,
                                 "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON),
    "opt": ("OPTForCausalLM", {**SIZES, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 3,
                               "num_attention_heads": 4, "ffn_dim": 64}),
    "bert": ("BertForMaskedLM", COMMON),
    "roberta": ("RobertaForMaskedLM", COMMON),
    "distilbert": ("DistilBertForMaskedLM", {"vocab_size": VOCAB, "max_position_embeddings": 64, "dim": 32,
                                             "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "pad_token_id": 0}),
    "llama": ("LlamaForCausalLM", {**GROUPED, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi": ("PhiForCausalLM", GROUPED),
}  # fmt: skip
CAUSAL = [name for name, (dense, _) in TINY.items() if "MaskedLM" not in dense]
ENCODERS = [name for name in TINY if name not in CAUSAL]


def dense_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    class_name, sizes = TINY[name]
    torch.manual_seed(seed)
    dense_class = getattr(transformers, class_name)
    model = dense_class(dense_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, or an error with them would not show
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def test_every_family_is_tested() -> None:
    assert set(TINY) == set(FAMILIES)


EXACT = {
    "partition": {"top_k": 8},
    "partition, clustered": {"top_k": 8, "neurons": "clustered"},
    "partition, shared part": {"top_k": 8, "shared_size": 16},
    "partition, unequal": {"top_k": 8, "widths": True},
    "partition, unequal, clustered": {"top_k": 8, "widths": True, "neurons": "clustered"},
    "partition, unequal, shared part": {"top_k": 8, "widths": True, "shared_size": 16},
    "copy, one": {"method": "copy", "top_k": 1},
    "copy, three": {"method": "copy", "top_k": 3},
    "virtual, one copy": {"method": "virtual", "groups": 4, "top_k": 4},
    "virtual, every copy": {"method": "virtual", "groups": 4, "top_k": 8},
}


def unequal_widths(dense: transformers.PreTrainedModel, shared_size: int = 0) -> list[int]:
    """Return eight widths, the first the widest, that add up to the network of ``dense`` less the shared part."""
    rest = FAMILIES[dense.config.model_type].shape(dense.config).intermediate_size - shared_size
    return [rest - 34, 8, 4, 8, 6, 4, 2, 2]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", EXACT)
def test_conversion_is_exact_at_the_start(name: str, form: str) -> None:
    dense, ids = dense_model(name), tokens()
    before = copy.deepcopy(dense.state_dict())
    options = dict(EXACT[form])
    if "widths" in options:
        options["widths"] = unequal_widths(dense, int(options.get("shared_size", 0)))
    moe = convert_to_moe(dense, num_experts=8, **options)
    if "widths" in options:
        assert [layer.experts.widths for layer in classes.placed_layers(moe).values()] == [tuple(options["widths"])] * 3
    with torch.no_grad():
        a, b = dense(ids).logits.double(), moe(ids).logits.double()
    assert float((a - b).abs().max()) < 1e-5
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    assert float((log_a.exp() * (log_a - log_b)).sum(-1).mean()) < 1e-8
    assert type(dense).__name__ == TINY[name][0]
    for key, value in dense.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", TINY)
def test_the_experts_really_run_and_learn(name: str) -> None:
    moe, ids = convert_to_moe(dense_model(name), num_experts=8, top_k=3), tokens()
    logits = moe(ids).logits
    routing = collect_routing(moe)
    assert len(routing) == 3
    assert len({id(layer.router) for layer in classes.placed_layers(moe).values()}) == 3
    logits.square().mean().backward()
    for layer in classes.placed_layers(moe).values():
        assert float(layer.experts.up_weight.grad.abs().sum()) > 0
        assert float(layer.router.weight.grad.abs().sum()) > 0
    with torch.no_grad():
        for layer in classes.placed_layers(moe).values():
            layer.experts.down_proj.zero_()
        assert float((moe(ids).logits - logits).abs().max()) > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_a_subset_of_layers(name: str) -> None:
    dense, ids = dense_model(name), tokens()
    moe = convert_to_moe(dense, num_experts=4, top_k=4, layers=[1])
    assert list(classes.placed_layers(moe)) == [1]
    with torch.no_grad():
        assert float((dense(ids).logits - moe(ids).logits).abs().max()) < 1e-5


@pytest.mark.parametrize("name", TINY)
def test_saving_and_loading(name: str, tmp_path: Path) -> None:
    moe, ids = convert_to_moe(dense_model(name), num_experts=8, top_k=3), tokens()
    set_router(moe, "priced", price=0.1, layers=[0, 2])
    moe.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == f"thermoe_{name}"
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(moe)
    assert [type(layer.router).__name__ for layer in classes.placed_layers(loaded).values()] == [
        "PricedRouter", "TopKRouter", "PricedRouter",
    ]  # fmt: skip
    state = moe.state_dict()
    assert set(state) == set(loaded.state_dict())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    with torch.no_grad():
        # Weights mapped from a file lie elsewhere in memory, which can change the last bit of a product.
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, moe(ids).logits)


@pytest.mark.parametrize("name", CAUSAL)
def test_generation_with_and_without_cache(name: str) -> None:
    moe, ids = convert_to_moe(dense_model(name), num_experts=8, top_k=3), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ids[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = moe.generate(ids, use_cache=True, **settings)
    plain = moe.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", TINY)
def test_padding_is_routed_nowhere(name: str) -> None:
    moe, ids = convert_to_moe(dense_model(name), num_experts=8, top_k=3), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.no_grad():
        moe(ids, attention_mask=mask)
    for decision in collect_routing(moe).values():
        used = decision.active.view(2, 6, -1).any(-1)
        assert torch.equal(used, mask.bool())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert"])
def test_copies_and_pickles(name: str) -> None:
    moe, ids = convert_to_moe(dense_model(name), num_experts=4, top_k=2), tokens()
    with torch.no_grad():
        expected = moe(ids).logits
        for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
            assert type(other) is type(moe)
            assert torch.equal(other(ids).logits, expected)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_a_trunk_without_a_head(name: str, tmp_path: Path) -> None:
    dense, ids = dense_model(name).base_model, tokens()
    moe = convert_to_moe(dense, num_experts=4, top_k=4)
    with torch.no_grad():
        assert float((dense(ids)[0] - moe(ids)[0]).abs().max()) < 1e-5
        moe.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is type(moe)
        assert torch.equal(copy.deepcopy(loaded)(ids)[0], moe(ids)[0])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    moe = convert_to_moe(dense_model(name).to(dtype), num_experts=4, top_k=2)
    assert moe.dtype == dtype
    with torch.no_grad():
        assert torch.isfinite(moe(tokens()).logits).all()


@pytest.mark.parametrize("name", TINY)
def test_unequal_experts_train_save_and_load(name: str, tmp_path: Path) -> None:
    dense, ids = dense_model(name), tokens()
    moe = convert_to_moe(dense, num_experts=8, top_k=3, widths=unequal_widths(dense))
    moe(ids).logits.square().mean().backward()
    for layer in classes.placed_layers(moe).values():
        assert float(layer.experts.up_weight.grad.abs().sum()) > 0
        assert float(layer.router.weight.grad.abs().sum()) > 0
    moe.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    loaded, state = auto.from_pretrained(tmp_path), moe.state_dict()
    assert set(state) == set(loaded.state_dict())
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded)(ids).logits, moe(ids).logits)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert"])
def test_the_forward_compiles_as_one_graph(name: str) -> None:
    # In float32: in half precision another order of sums can flip a routing decision that is all but a tie.
    moe, ids = convert_to_moe(dense_model(name), num_experts=4, top_k=2), tokens()
    with torch.no_grad():
        eager = moe(ids).logits
        compiled = torch.compile(moe, backend="eager", fullgraph=True)(ids).logits
    assert float((eager - compiled).abs().max()) < 1e-5


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        moe = convert_to_moe(dense_model("llama"), num_experts=4, top_k=2).train()
        if checkpointing:
            moe.gradient_checkpointing_enable()
        mask = torch.ones(3, 12)
        mask[0, 9:] = 0
        moe(tokens(), attention_mask=mask, labels=tokens()).loss.backward()
        gradients.append([p.grad.clone() for p in moe.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_from_scratch_with_gated_experts_in_gpt2() -> None:
    config = classes.MoEGPT2Config(
        **TINY["gpt2"][1], num_experts=4, num_experts_per_tok=2, gated_experts=True, expert_intermediate_size=16
    )
    model = classes.MoEGPT2LMHeadModel(config)
    assert model.transformer.h[0].mlp.experts.gated
    assert torch.isfinite(model(tokens(), labels=tokens()).loss)


def test_a_family_of_ones_own_can_be_added() -> None:
    known = FAMILIES["llama"]
    row = Family(
        model_type="cohere", blocks=known.blocks, place=known.place, shape=known.shape, read=known.read
    )  # the same network under another name
    add_family(row)
    try:
        config = transformers.CohereConfig(**GROUPED)
        dense = transformers.CohereForCausalLM(config).eval()
        moe = convert_to_moe(dense, num_experts=4, top_k=4)
        with torch.no_grad():
            assert float((dense(tokens()).logits - moe(tokens()).logits).abs().max()) < 1e-5
        with pytest.raises(ConversionError, match="known already"):
            add_family(row)
    finally:
        del FAMILIES["cohere"]


def test_a_newer_checkpoint_says_so(tmp_path: Path) -> None:
    convert_to_moe(dense_model("gpt2"), num_experts=4, top_k=2).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"thermoe_version": "0.1.0"' in text
    (tmp_path / "config.json").write_text(text.replace('"0.1.0"', '"99.0.0"'))
    with pytest.raises(Exception, match="written by thermoe 99"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_cannot_be_split_is_refused() -> None:
    dense = dense_model("llama")
    dense.is_quantized = True
    with pytest.raises(ConversionError, match="quantised") as caught:
        convert_to_moe(dense)
    assert "quantise the result" in str(caught.value)
    with pytest.raises(ConversionError, match="already"):
        convert_to_moe(convert_to_moe(dense_model("llama"), num_experts=4))
