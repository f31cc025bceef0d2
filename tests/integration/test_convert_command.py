"""`thermoe convert`: a folder in, a whole folder out, or one clear error and nothing."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from command_line import command
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from thermoe.errors import ConfigError
from thermoe.models import command as convert_command
from thermoe.models.classes import placed_layers

WORDS = ["[UNK]", "<pad>", "the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
LLAMA = LlamaConfig(
    vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=1,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=48,
)  # fmt: skip


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    LlamaForCausalLM(LLAMA).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="<pad>").save_pretrained(folder)
    return folder


def refused(*args: object, code: int = 2) -> str:
    """Run `thermoe convert`, which must fail with a message of four parts, and leave nothing."""
    done = command("convert", *map(str, args))
    assert done.code == code, done.err or done.out
    for part in ("error: ", "  where: ", "  accepted: ", "  fix: "):
        assert part in done.err
    return done.err


def nothing_left(out: Path) -> bool:
    return not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_a_folder_becomes_a_model(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "moe"
    done = command(
        "convert",
        str(dense),
        str(out),
        "--experts",
        "4",
        "--layers",
        "0,1-2",
        "--router",
        "priced",
        "--set",
        "price=0.5",
    )
    assert done.code == 0, done.err
    for text in (
        "LlamaForCausalLM -> MoELlamaForCausalLM",
        "4 experts, 2 per token",
        "layers 0-2 of 3",
        "active per token",
        "4 of 4 experts",
        "KL",
        "saved:",
    ):
        assert text in done.out, text
    assert {"config.json", "model.safetensors", "README.md", "generation_config.json", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "4 of 4 experts at work" in card and "in the folder `dense`" in card and str(tmp_path) not in card
    moe = AutoModelForCausalLM.from_pretrained(out)
    assert [layer.router.top_k for layer in placed_layers(moe).values()] == [2, 2, 2]
    ids = AutoTokenizer.from_pretrained(out)("the quick brown fox", return_tensors="pt").input_ids
    assert moe(ids).logits.shape == (1, 4, len(WORDS))


@pytest.mark.parametrize(("method", "top_k"), [("copy", 1), ("virtual", 2), ("partition", 4)])
def test_what_is_exact_as_saved(method: str, top_k: int, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    done = command("convert", str(dense), str(out), "--experts", "4", "--method", method, "--top-k", str(top_k))
    assert done.code == 0, done.err
    assert f"{top_k} of 4 experts at work" in done.out
    ids = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (dense, out))
    assert float((a - b).abs().max()) < 1e-5


def test_experts_of_unequal_widths(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    widths = [32, 16, 8, 8]
    done = command(
        "convert", str(dense), str(out), "--experts", "4", "--set", f"widths={widths}", "--set", "neurons=clustered"
    )
    assert done.code == 0, done.err
    assert f"neurons per expert: {', '.join(map(str, widths))}" in done.out
    assert "narrowest experts" in done.out and "widest experts" in done.out and "4 of 4 experts" in done.out
    assert f"{widths[2]} and {widths[3]} neurons wide" in (out / "README.md").read_text(encoding="utf-8")
    ids = torch.arange(9).unsqueeze(0)
    moe = AutoModelForCausalLM.from_pretrained(out)
    assert moe.config.expert_widths == widths
    for layer in placed_layers(moe).values():
        layer.router.top_k = 4
    with torch.no_grad():
        difference = moe(ids).logits - AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("widths", ["[1,2]", "8", "abc", "{a: 1}"])
def test_widths_that_do_not_fit(widths: str, dense: Path, tmp_path: Path) -> None:
    done = command("convert", str(dense), str(tmp_path / "moe"), "--experts", "4", "--set", f"widths={widths}")
    assert done.code == 2 and "widths" in done.err and "Traceback" not in done.err
    assert nothing_left(tmp_path / "moe")


@pytest.mark.parametrize(("made", "word"), [(BertModel, "hidden states"), (BertForTokenClassification, "logits")])
def test_the_architecture_chooses_the_class(made: type, word: str, tmp_path: Path) -> None:
    made(BERT).save_pretrained(tmp_path / "dense")
    done = command("convert", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4", "--method", "copy")
    assert done.code == 0, done.err
    assert f"MoE{made.__name__}" in done.out and word in done.out and "tokenizer: none" in done.out
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["architectures"] == [f"MoE{made.__name__}"]


def test_no_architecture_gives_the_trunk(tmp_path: Path) -> None:
    BertModel(BERT).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "architectures"}))
    assert command("convert", str(tmp_path / "dense"), str(tmp_path / "moe"), "--experts", "4").code == 0
    assert type(AutoModel.from_pretrained(tmp_path / "moe")).__name__ == "MoEBertModel"


def test_an_architecture_without_an_auto_class(tmp_path: Path) -> None:
    BertForPreTraining(BERT).save_pretrained(tmp_path / "dense")
    text = refused(tmp_path / "dense", tmp_path / "moe")
    assert "no Auto class loads BertForPreTraining" in text and "BertForMaskedLM" in text


def test_the_same_seed_gives_the_same_weights(dense: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert command("convert", str(dense), str(tmp_path / name), "--experts", "4", "--seed", "3").code == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_settings_of_the_conversion(dense: Path, tmp_path: Path) -> None:
    settings = ("--set", "neurons=clustered", "--set", "shared_size=16", "--set", "gate=ramped")
    done = command("convert", str(dense), str(tmp_path / "moe"), "--experts", "4", *settings)
    assert done.code == 0, done.err
    assert "4 of 4 experts" in done.out
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["shared_intermediate_size"] == 16
    assert "`partition`" in (tmp_path / "moe" / "README.md").read_text(encoding="utf-8")


def test_an_output_in_the_way_is_left_alone(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "not empty" in refused(dense, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert "is a file" in refused(dense, out / "mine.txt")
    assert "not empty" in refused(dense, dense)
    (out / "mine.txt").unlink()
    assert command("convert", str(dense), str(out), "--experts", "4").code == 0  # an empty folder will do


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--method", "partitoin"], "did you mean 'partition'?"),
        (["--router", "topc"], "did you mean 'topk'?"),
        (["--experts", "7"], "7 experts do not divide"),
        (["--experts", "0"], "num_experts is 0"),
        (["--experts", "4", "--top-k", "5"], "top_k is 5"),
        (["--layers", "0,x"], "'x' in '0,x'"),
        (["--layers", "3-1"], "'3-1'"),
        (["--layers", "7"], "a model with 3 blocks"),
        (["--set", "price"], "'price' has no name and value"),
        (["--set", "prise=1"], "prise"),
        (["--set", "top_k=2"], "use --top-k"),
    ],
)
def test_options_that_do_not_fit(options: list[str], text: str, dense: Path, tmp_path: Path) -> None:
    done = command("convert", str(dense), str(tmp_path / "moe"), *options)
    assert done.code == 2 and text in done.err, done.err
    assert nothing_left(tmp_path / "moe")


def test_checkpoints_that_are_not_whole(dense: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "moe", dense / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "the checkpoint cannot be read" in refused(dense, out)
    weights.unlink()
    assert "the checkpoint cannot be read" in refused(dense, out)
    weights.write_bytes(whole)
    state = load_file(weights)
    gone = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, weights, metadata={"format": "pt"})
    assert "lacks 1 weights" in refused(dense, out)
    save_file({**state, "model.layers.1.mlp.up_proj.weight": gone[:8].clone()}, weights, metadata={"format": "pt"})
    assert "the checkpoint cannot be read" in refused(dense, out)
    assert nothing_left(out)


def test_configurations_that_do_not_fit(dense: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "moe", dense / "config.json"
    whole = path.read_text()
    path.write_text(whole[:50])
    assert "the configuration cannot be read" in refused(dense, out)
    path.write_text(whole.replace('"llama"', '"lama"'))
    assert "'lama'" in refused(dense, out) and "did you mean 'llama'?" in refused(dense, out)
    path.write_text(whole.replace('"llama"', '"t5"'))
    assert "'t5'" in refused(dense, out)
    path.write_text(whole.replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1))
    assert "quantised" in refused(dense, out)
    path.unlink()
    assert "no config.json" in refused(dense, out)
    assert "is no folder" in refused(tmp_path / "absent", out)
    path.write_text(whole)
    assert command("convert", str(dense), str(out), "--experts", "4").code == 0
    assert "already" in refused(out, tmp_path / "again")


def test_a_tokenizer_that_cannot_be_read(dense: Path, tmp_path: Path) -> None:
    (dense / "tokenizer.json").write_text("{")
    assert "--no-tokenizer" in refused(dense, tmp_path / "moe", "--experts", "4")
    assert command("convert", str(dense), str(tmp_path / "moe"), "--experts", "4", "--no-tokenizer").code == 0


def test_a_name_without_a_network(tmp_path: Path) -> None:
    text = refused("nobody/nothing-at-all", tmp_path / "moe", code=3)
    assert "the hub cannot be reached" in text
    assert nothing_left(tmp_path / "moe")


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), RuntimeError("broken"), KeyboardInterrupt()]
)
def test_nothing_half_written_is_left(failure: BaseException, dense: Path, tmp_path: Path) -> None:
    with patch.object(convert_command, "write_card", side_effect=failure):
        try:
            code = command("convert", str(dense), str(tmp_path / "moe"), "--experts", "4").code
        except RuntimeError:
            code = 1
    assert code == {OSError: 3, RuntimeError: 1, KeyboardInterrupt: 130}[type(failure)]
    assert nothing_left(tmp_path / "moe")


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()])
def test_an_end_in_the_middle_of_saving_leaves_no_folder(failure: BaseException, dense: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def half(state: object, path: str, **_: object) -> None:
        Path(path).write_bytes(b"half")
        seen.append([file.name for file in Path(path).parent.iterdir()])
        raise failure

    out = tmp_path / "new" / "deep" / "moe"
    with patch("transformers.modeling_utils.safe_save_file", half), pytest.raises((RuntimeError, SystemExit)):
        if command("convert", str(dense), str(out), "--experts", "4").code == 130:
            raise SystemExit
    assert seen and "model.safetensors" in seen[0]
    assert not (tmp_path / "new").exists() and dense.exists()


@pytest.mark.parametrize("text", ["", "1,,2", "-1", "a", "2-", "1-999999999"])
def test_positions_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no position"):
        convert_command.parse_layers(text)
