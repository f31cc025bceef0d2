"""A wrong argument is refused in four parts: what, where, what is accepted, what to do; and nothing is left behind."""

from __future__ import annotations

import ast
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from thermoe import EnergyCallback, EnergyMeter, RouterAdapter, cli, convert_to_moe, routing_accuracy, set_router
from thermoe import errors as thermoe_errors
from thermoe.energy.fit import fit_terms
from thermoe.errors import ThermoeError
from thermoe.evaluation import perplexity
from thermoe.moe.layer import moe_layers, routed_modules
from thermoe.telemetry.source import open_source
from thermoe.testing import tiny_gpt2, tiny_moe

ROOT = Path(__file__).parents[2]
NAN, INF = float("nan"), float("inf")


def assert_refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ThermoeError) as caught:
        call()
    error = caught.value
    for part in (error.what, error.where, error.accepted, error.fix):
        assert part, str(error)
    for word in words:
        assert word in str(error)


# -- every error of the package --------------------------------------------------------------------------------------


def _raised_here() -> list[str]:
    names = {name for name, kind in vars(thermoe_errors).items() if inspect.isclass(kind)}
    short = []
    for path in sorted((ROOT / "src" / "thermoe").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                given = {keyword.arg for keyword in node.keywords}
                if None not in given and not {"where", "accepted", "fix"} <= given:
                    short.append(f"{path.name}:{node.lineno}")
    return short


def test_every_error_is_written_in_four_parts() -> None:
    assert _raised_here() == []


def test_the_makefile_names_folders_that_a_clone_has() -> None:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("not a git checkout")
    tracked = {line.split("/")[0] for line in listed.splitlines()}
    for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines():
        if "bin/ruff" in line.lower() or "/ruff " in line:
            folders = [word for word in line.split() if word.isidentifier() and word not in ("check", "format")]
            assert set(folders) <= tracked, line


@pytest.mark.parametrize("text", ["noise", "=1", "noise=["])
def test_a_setting_of_convert_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["convert", "nowhere", str(tmp_path / "out"), "--set", text])
    assert isinstance(done.exception, ThermoeError), done.output
    assert done.exception.where == "--set"
    assert not (tmp_path / "out").exists()


# -- the meter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_ticks": "x"},
        {"min_ticks": 0},
        {"min_ticks": NAN},
        {"repeatability_rel_sd": NAN},
        {"repeatability_rel_sd": -1},
        {"telemetry": "of"},
        {"telemetry": None},
        {"source": None},
        {"source": 5},
        {"source": "replay"},
        {"source": "nvmll"},
    ],
    ids=str,
)
def test_a_meter_of_wrong_arguments(wrong: dict[str, Any]) -> None:
    assert_refused(lambda: EnergyMeter(**wrong).open())


def test_an_unknown_source_is_told_of_auto_and_off() -> None:
    assert_refused(lambda: open_source("of"), "auto", "off", "did you mean 'off'?")


@pytest.mark.parametrize("tokens", ["x", [1], 10**400, 1j], ids=["text", "list", "huge", "complex"])
def test_tokens_that_are_no_number(tokens: Any) -> None:
    with EnergyMeter("simulated") as meter:
        assert_refused(lambda: meter.window("w", tokens=tokens))
        for window in (meter.window("w"), meter.window("w", edges="sampled"), meter.aligned_window("w", min_s=1)):
            with window:
                assert_refused(lambda window=window: window.count(tokens))
        meter.begin_window("named")
        assert_refused(lambda: meter.end_window("named", tokens=tokens))


def test_tokens_may_be_a_tensor_and_stay_on_its_device() -> None:
    with EnergyMeter("simulated") as meter, meter.window("w") as window:
        window.count(torch.tensor(3))
        window.count(4)
    assert window.result.tokens == 7


@pytest.mark.parametrize("length_s", [0, -1, NAN, "x", None])
def test_an_idle_reference_of_no_length(length_s: Any) -> None:
    with EnergyMeter("simulated") as meter:
        assert_refused(lambda: meter.measure_idle(length_s))
        assert meter.results() == []


def test_a_window_that_was_never_entered() -> None:
    with EnergyMeter("simulated") as meter:
        for window in (meter.window("w"), meter.aligned_window("w", min_s=1)):
            assert_refused(lambda window=window: window.__exit__(None, None, None), "never entered")
            assert_refused(window.cancel, "never entered")


@pytest.mark.parametrize("source", ["nvmll", 5])
def test_a_callback_with_an_unknown_source(source: Any) -> None:
    assert_refused(lambda: EnergyCallback(source), "EnergyCallback(source=...)")


# -- the fit ---------------------------------------------------------------------------------------------------------

ROWS = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 1.0}, {"a": 3.0, "b": 5.0}]


@pytest.mark.parametrize(
    ("first", "observed", "more"),
    [
        ({"a": NAN}, [3, 3, 8], {}),
        ({"a": INF}, [3, 3, 8], {}),
        ({"a": "x"}, [3, 3, 8], {}),
        ({"a": -1}, [3, 3, 8], {}),
        ({"a": 1}, [3, None, 8], {}),
        ({"a": 1}, [3, "x", 8], {}),
        ({"a": 1}, [3, 0, 8], {}),
        ({"a": 1}, [3, 3], {}),
        ({"a": 1}, [3, 3, 8], {"rel_sd": 0}),
        ({"a": 1}, [3, 3, 8], {"rel_sd": NAN}),
        ({"a": 1}, [3, 3, 8], {"priors": {"a": (1, 0)}}),
        ({"a": 1}, [3, 3, 8], {"priors": {"a": (NAN, 1)}}),
        ({"a": 1}, [3, 3, 8], {"units": {}}),
    ],
    ids=str,
)
def test_what_cannot_be_fitted(first: dict[str, Any], observed: list[Any], more: dict[str, Any]) -> None:
    rows = [first, *ROWS[1:]]
    assert_refused(lambda: fit_terms(rows, observed, **{"units": {"a": "J", "b": "J"}, **more}), "fit_terms")


def test_a_column_of_zeros_or_a_copy_of_another_is_not_identified() -> None:
    for second in (0.0, 2.0):
        rows = [{"a": x, "b": second * x} for x in (1.0, 2.0, 3.0)]
        fit = fit_terms(rows, [3, 6, 9], units={"a": "J", "b": "J"})
        assert not fit.terms["b"].identified
        assert fit.predict(rows) == pytest.approx([3, 6, 9])


# -- adapter and accuracy --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=0)
    return convert_to_moe(GPT2LMHeadModel(config).eval(), num_experts=4, top_k=2)


TOKENS = torch.arange(16).view(2, 8)
NO_TOKENS = [TOKENS[0], TOKENS[:0], TOKENS[:, :1], TOKENS.float(), TOKENS.tolist(), None]


@pytest.mark.parametrize(
    "wrong",
    [{name: value} for name in ("lr", "max_grad_norm", "min_tokens") for value in (-1, NAN, INF, "x", None, True)]
    + [{name: value} for name in ("anchor", "held_frac", "bucket") for value in (-1, NAN, INF, "x", 1.1, True)]
    + [{"anchor": 0}, {"max_grad_norm": 0}, {"min_tokens": 1.5}, {"held_frac": 1}, {"held_frac": None}]
    + [{"seed": 1.5}, {"seed": None}, {"min_gain_per_j": -1}, {"percentiles": (95, 20)}, {"percentiles": 5}]
    + [{"safeguards": {}}, {"optimizer": "sgd"}, {"objective": "next"}, {"layers": "some"}, {"layers": [9]}]
    + [{"layers": []}, {"layers": 1.5}],
    ids=str,
)
def test_an_adapter_of_wrong_settings(moe: Any, wrong: dict[str, Any]) -> None:
    """A negative norm would climb the loss, and one that is not a number would spoil the fast weights."""
    assert_refused(lambda: RouterAdapter(moe, **wrong), f"adapt.{next(iter(wrong))}")
    assert all(layer.router.fast is None for _, layer in moe_layers(moe))


@pytest.mark.parametrize("rows", NO_TOKENS, ids=["row", "none", "short", "float", "list", "nothing"])
def test_rows_that_hold_nothing_to_predict(moe: Any, rows: Any) -> None:
    with RouterAdapter(moe) as adapter:
        assert_refused(lambda: adapter.score_and_learn(rows), "input_ids")
        assert adapter.updates == 0
    assert_refused(lambda: perplexity(moe, rows), "rows")
    assert_refused(lambda: routing_accuracy(moe, [rows]), "batches")


def test_a_closed_adapter(moe: Any) -> None:
    with RouterAdapter(moe) as adapter:
        pass
    assert_refused(lambda: adapter.score_and_learn(TOKENS), "closed")


@pytest.mark.parametrize("wrong", [{"tau": -1}, {"tau": NAN}, {"tau": INF}, {"chooser": "rooter"}], ids=str)
def test_a_yardstick_that_judges_nothing(moe: Any, wrong: dict[str, Any]) -> None:
    assert_refused(lambda: routing_accuracy(moe, [TOKENS], **wrong))


def test_a_layer_that_the_forward_does_not_reach_is_left_out(moe: Any) -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = moe, convert_to_moe(_dense(), num_experts=4, top_k=2)

        def forward(self, rows: torch.Tensor) -> Any:
            return self.used(rows)

    assert set(routing_accuracy(Half(), [TOKENS])) == {f"used.transformer.h.{i}.mlp" for i in range(2)}


def _dense() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16)).eval()


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_that_is_none(moe: Any, size: int) -> None:
    assert_refused(lambda: perplexity(moe, TOKENS, batch_size=size), "batch_size")


@pytest.mark.parametrize(
    "arguments",
    [
        {"router": None},
        {"router": 5},
        {"router": {"transformer.h.0.mlp": None}},
        {"router": {}},
        {"router": "topk", "layers": []},
        {"router": "topk", "layers": 5},
        {"router": "topk", "layers": "0"},
    ],
)
def test_set_router_refuses_what_it_cannot_use(arguments: dict[str, Any]) -> None:
    model = tiny_moe()
    before = [module.router for _, module in routed_modules(model)]
    with pytest.raises(ThermoeError) as caught:
        set_router(model, **arguments)
    assert caught.value.where and caught.value.accepted and caught.value.fix
    assert [module.router for _, module in routed_modules(model)] == before
    with pytest.raises(ThermoeError):
        set_router(None, "topk")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"num_experts": "8"},
        {"num_experts": 4, "top_k": 2.5},
        {"top_k": "2"},
        {"layers": "01"},
        {"layers": 30},
        {"layers": ["a"]},
        {"layers": [True]},
        {"router": None},
        {"router": ["x"]},
    ],
)
def test_convert_to_moe_refuses_what_it_cannot_use(options: dict[str, Any]) -> None:
    with pytest.raises(ThermoeError) as caught:
        convert_to_moe(tiny_gpt2(), **options)
    assert caught.value.where and caught.value.accepted and caught.value.fix
