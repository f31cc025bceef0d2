"""What the Trainer logs, when routers are called, and the options that must not change what is computed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from training_tools import HELD, ROWS, assert_same_weights, biased_moe, routers, train

from thermoe.convergence import judge_convergence
from thermoe.errors import ConfigError, MachineError
from thermoe.evaluation import perplexity
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.moe.losses import routing_loss
from thermoe.moe.stats import StatsAccumulator
from thermoe.testing import random_tokens, tiny_gpt2, tiny_moe
from thermoe.training.callbacks import energy_fields
from thermoe.training.loop import check_precision
from thermoe.training.monitor import make_monitor, over_layers
from thermoe.training.settings import TrainSettings
from thermoe.training.trainer import TokenRows, Validation, full_top_k, validate


def of(rows: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == kind]


def test_losses_add_up_and_each_term_is_logged_unweighted(tmp_path: Path) -> None:
    model = tiny_moe(top_k=2)
    twin = tiny_moe(top_k=2).train()
    _, rows = train(model, tmp_path, ROWS[:4], steps=1, log_every=1, gradient_accumulation_steps=2)
    (row,) = of(rows, "train")
    assert row["loss"] == pytest.approx(row["lm_loss"] + row["balance_loss"], rel=1e-6)
    assert row["balance_loss"] == pytest.approx(2 * (0.3 * row["aux_switch"] + 0.05 * row["aux_z_loss"]), rel=1e-5)
    language = float(twin(input_ids=ROWS[:4], labels=ROWS[:4]).loss.detach())
    assert row["lm_loss"] == pytest.approx(language, rel=1e-5)
    z_loss = routing_loss(collect_routing(twin).values(), {"z_loss": 1.0})
    assert z_loss is not None
    assert row["aux_z_loss"] == pytest.approx(float(z_loss.detach()) / 2, rel=1e-4), "a mean over both layers"


def test_statistics_cover_every_token_since_the_last_log_once(tmp_path: Path) -> None:
    model = tiny_moe(top_k=3, capacity_factor=1.0)
    seen: list[Any] = []
    for _, layer in moe_layers(model):
        layer.router.register_forward_hook(lambda m, a, decision: seen.append((m, decision.detach())) and None)
    _, rows = train(model, tmp_path, ROWS[:8], steps=4, log_every=2, gradient_accumulation_steps=2)
    loads = of(rows, "load")
    assert [(row["step"], row["layer"]) for row in loads] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    for position, router in enumerate(routers(model)):
        mine = [decision for module, decision in seen if module is router]
        assert len(mine) == 8
        for index, half in enumerate((mine[:4], mine[4:])):
            accumulator = StatsAccumulator()
            for decision in half:
                accumulator.add(decision, fixed_k=True)
            expected = accumulator.result()
            assert expected is not None
            row = loads[2 * index + position]
            assert {key: row[key] for key in expected.as_dict()} == expected.as_dict()
            kept = sum(float(decision.active.sum()) for decision in half)
            assert row["drop_rate"] == pytest.approx(1 - kept / (2 * 4 * 16 * 3))
            assert row["drop_rate"] > 0
    for step in (2, 4):
        (row,) = [row for row in of(rows, "train") if row["step"] == step]
        layers = [load for load in loads if load["step"] == step]
        assert row["max_vio"] == max(load["max_vio"] for load in layers)
        # Dead experts are not told from idle ones by so few tokens: unknown, not 0.
        assert "dead_experts" not in row and all(load["dead_experts"] is None for load in layers)


def test_a_collapsed_layer_raises_an_alarm_in_the_rows(tmp_path: Path) -> None:
    model = tiny_moe(top_k=1)
    with torch.no_grad():
        for _, layer in moe_layers(model):
            layer.router.weight.zero_()  # ties, which top-k gives to one expert
    _, rows = train(model, tmp_path, random_tokens(64, 16), steps=24, log_every=6, batch_size=64, lr=1e-9, balance={})
    alarms = of(rows, "alarm")
    assert {row["layer"] for row in alarms} == {name for name, _ in moe_layers(model)}
    assert all(row["alarm"] == "ties" and row["layer"] in row["text"] for row in alarms)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "dataloader_num_workers"])
def test_an_option_of_speed_changes_no_result_and_counts_nothing_twice(option: str, tmp_path: Path) -> None:
    plain, other = biased_moe(temperature=0.7), biased_moe(temperature=0.7)
    torch.manual_seed(0)
    _, rows = train(plain, tmp_path / "a", steps=6, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    _, more = train(other, tmp_path / "b", steps=6, gradient_accumulation_steps=2, **{option: 1})
    for first, second in zip(rows, more, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value)
    assert [router.observed for router in routers(plain)] == [router.observed for router in routers(other)]
    for (name, mine), theirs in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_the_routing_losses_reach_the_routers_under_gradient_checkpointing(tmp_path: Path) -> None:
    """With balance terms alone on a model whose gate passes no gradient, only they can move a router."""
    model = tiny_moe(top_k=8)
    before = [router.weight.detach().clone() for router in routers(model)]
    train(model, tmp_path, steps=3, gradient_checkpointing=True, balance={"switch": 1.0}, weight_decay=0.0)
    assert all(not torch.equal(b, r.weight) for b, r in zip(before, routers(model), strict=True))


def test_routers_observe_each_micro_batch_and_step_after_each_step(tmp_path: Path) -> None:
    model = biased_moe()
    steps: list[int] = []
    first = routers(model)[0]
    move = first.after_step
    first.after_step = lambda: (steps.append(first.observed), move())
    train(model, tmp_path, ROWS[:12], steps=5, gradient_accumulation_steps=2)
    assert steps == [2, 4, 6, 8, 10]


def test_routers_are_not_asked_while_validating(tmp_path: Path) -> None:
    model = biased_moe()
    train(model, tmp_path, ROWS[:12], steps=2, eval_every=1, validation=Validation(HELD, 1.0, 2))
    assert routers(model)[0].observed == 2


def test_validation_reads_all_experts_and_gives_bits_per_byte() -> None:
    model = tiny_moe(top_k=3)
    for router in routers(model):
        router.active_top_k = 1
    found = validate(model.train(), Validation(HELD, 2.5, 2))
    assert model.training
    assert [router.active_top_k for router in routers(model)] == [1, 1]
    with full_top_k(model):
        expected = perplexity(model.eval(), HELD)
    assert found["ppl"] == pytest.approx(expected, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(math.log2(expected) / 2.5, rel=1e-6)


def test_bf16_trains_in_autocast_and_leaves_the_model_in_float32(tmp_path: Path) -> None:
    model = biased_moe()
    kinds: set[torch.dtype] = set()
    layer = next(layer for _, layer in moe_layers(model))
    layer.register_forward_hook(lambda m, a, out: kinds.add(m.last_routing.logits.dtype))
    _, rows = train(model, tmp_path, steps=20, log_every=10, bf16=True, lr=1e-2)
    losses = [row["loss"] for row in of(rows, "train")]
    assert losses[1] < losses[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert kinds == {torch.float32}  # a router scores in float32 under autocast too
    fresh = biased_moe(9)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(HELD).logits, model(HELD).logits)  # nothing of the autocast is left around the model
    reference = biased_moe()
    _, exact = train(reference, tmp_path, steps=20, log_every=10, lr=1e-2)
    expected = [row["loss"] for row in of(exact, "train")]
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != expected


def test_bf16_on_a_device_without_it_is_refused() -> None:
    with pytest.raises(MachineError, match="bfloat16") as caught:
        check_precision(TrainSettings(bf16=True), torch.device("mps"))
    assert caught.value.where == "training.bf16" and caught.value.accepted and caught.value.fix
    check_precision(TrainSettings(bf16=True), torch.device("cpu"))


class _Reads(TorchFunctionMode):
    """Counts what would wait for a GPU and is asked for by code of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
            self.count += "thermoe" in Path(sys._getframe(1).f_code.co_filename).parts
        return func(*args, **(kwargs or {}))


def test_nothing_of_ours_is_read_between_two_logs(tmp_path: Path) -> None:
    """The backend "dense" reads nothing; transformers itself looks at the position ids once per forward."""
    counts = []
    for accumulate, steps in ((1, 3), (4, 3), (1, 6)):
        model = biased_moe()
        for _, layer in moe_layers(model):
            layer.backend = "dense"
        with _Reads() as reads:
            train(model, tmp_path, ROWS[:12], steps=steps, log_every=steps, gradient_accumulation_steps=accumulate)
        counts.append(reads.count)
    assert counts[0] == counts[1] == counts[2] > 0


def test_a_loss_that_a_foreign_block_brings_along_is_added_and_logged(tmp_path: Path) -> None:
    model = tiny_gpt2()
    own = {"aux_native": (0.5, lambda module: module.transformer.wte.weight.square().mean())}
    _, rows = train(model, tmp_path, ROWS[:4], steps=1, log_every=1, own_losses=own, gradient_accumulation_steps=2)
    (row,) = of(rows, "train")
    expected = float(tiny_gpt2().transformer.wte.weight.detach().square().mean())
    assert row["aux_native"] == pytest.approx(expected, rel=1e-6)
    assert row["loss"] == pytest.approx(row["lm_loss"] + 0.5 * expected, rel=1e-6)


def test_epochs_become_steps(tmp_path: Path) -> None:
    rows = ROWS[:14]
    assert TrainSettings(epochs=1.5, batch_size=4).for_rows(14).steps == 5  # three full batches an epoch
    assert TrainSettings(epochs=1, batch_size=4, gradient_accumulation_steps=2).for_rows(14).steps == 4
    outcome, _ = train(tiny_gpt2(), tmp_path, rows, epochs=2.0)
    assert outcome.steps == 6


def test_an_equal_seed_gives_equal_weights(tmp_path: Path) -> None:
    first, second = biased_moe(), biased_moe()
    train(first, tmp_path / "a", steps=3)
    train(second, tmp_path / "b", steps=3)
    assert_same_weights(first, second)


def test_validation_every_so_many_steps_needs_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no held-out text"):
        train(tiny_gpt2(), tmp_path, eval_every=2)


def test_rows_are_fetched_a_batch_at_a_time_in_any_integer_type() -> None:
    rows = TokenRows(ROWS.to(torch.int32))
    batch = rows.__getitems__([3, 1])
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], ROWS[[3, 1]]) and torch.equal(batch["labels"], ROWS[[3, 1]])
    assert torch.equal(rows[2]["input_ids"], ROWS[2])


def test_a_model_without_routers_has_no_monitor_and_no_figures() -> None:
    assert make_monitor(tiny_gpt2()) is None and over_layers([]) == {}


def test_an_energy_row_has_one_provenance_and_no_number_that_was_not_measured() -> None:
    assert energy_fields({"loss": 1.0, "thermal/gpu_temp_c": 40.0}) == {}
    logs = {"simulated/energy/energy_j": 5.0, "simulated/energy/total_j": 9.0, "thermal/gpu_temp_c": 40.0}
    assert energy_fields(logs) == {"energy_j": 5.0, "total_j": 9.0, "provenance": "simulated"}


def test_a_training_that_has_converged_stops_where_that_is_asked_for(tmp_path: Path) -> None:
    validation = Validation(HELD, 4.0, 4)
    still = {"lr": 1e-12, "steps": 60, "eval_every": 1, "warmup_steps": 0, "schedule": "constant", "balance": {}}
    stopped, rows = train(tiny_moe(), tmp_path / "a", validation=validation, stop_when_converged=True, **still)
    curve = [(row["step"], row["nll"]) for row in of(rows, "eval")]
    assert stopped.steps < 60 and judge_convergence(curve).converged and not judge_convergence(curve[:-1]).converged
    whole, _ = train(tiny_moe(), tmp_path / "b", validation=validation, **still)
    assert whole.steps == 60
    with pytest.raises(ConfigError, match="eval_every"):
        TrainSettings(stop_when_converged=True).check()
