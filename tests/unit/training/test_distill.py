"""Recovery training after conversion: taught by the dense model, which learns nothing itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_tools import ROWS, train
from transformers import TrainingArguments

from thermoe.errors import ConfigError
from thermoe.moe.layer import moe_layers
from thermoe.routers.base import Router
from thermoe.testing import tiny_gpt2, tiny_moe
from thermoe.training.distill import Distiller
from thermoe.training.trainer import MoETrainer, TokenRows

RECOVERY: dict[str, Any] = {"random_k": True, "ramp_frac": 0.5, "balance": {"switch": 0.01}, "lr": 1e-2}


def pair(**weights: float) -> tuple[Any, Any, Distiller]:
    dense, student = tiny_gpt2(), tiny_moe(num_experts=8, top_k=4)
    return dense, student, Distiller(dense, student, **weights)


def test_with_all_experts_the_student_is_its_teacher_and_both_terms_are_0() -> None:
    dense, student = tiny_gpt2(), tiny_moe(num_experts=8, top_k=8)
    distiller = Distiller(dense, student)
    with distiller.watching():
        logits = student(input_ids=ROWS).logits
    terms = distiller.terms({"input_ids": ROWS, "labels": ROWS}, logits)
    assert float(terms["distill_kl"].detach()) == pytest.approx(0, abs=1e-5)
    assert float(terms["distill_layer_mse"].detach()) == pytest.approx(0, abs=1e-8)


def test_the_terms_are_their_definitions() -> None:
    dense, student, distiller = pair()
    outputs: dict[str, list[torch.Tensor]] = {"dense": [], "student": []}
    for block, (_, layer) in zip(dense.transformer.h, moe_layers(student), strict=True):
        block.mlp.register_forward_hook(lambda m, a, out: outputs["dense"].append(out))
        layer.register_forward_hook(lambda m, a, out: outputs["student"].append(out))
    with distiller.watching():
        logits = student(input_ids=ROWS).logits
    terms = distiller.terms({"input_ids": ROWS}, logits)
    with torch.no_grad():
        p, q = dense(ROWS).logits.softmax(-1), student(ROWS).logits.softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    assert float(terms["distill_kl"].detach()) == pytest.approx(float(kl.detach()), rel=1e-4)
    both = zip(outputs["student"][:2], outputs["dense"][:2], strict=True)
    errors = [F.mse_loss(y, t) / t.square().mean() for y, t in both]
    assert float(terms["distill_layer_mse"].detach()) == pytest.approx(float(sum(errors).detach() / 2), rel=1e-4)


def test_the_loss_falls_and_the_teacher_stays_as_it_is(tmp_path: Path) -> None:
    dense, student, distiller = pair()
    before = copy.deepcopy(dense.state_dict())
    _, rows = train(student, tmp_path, steps=40, log_every=10, distiller=distiller, **RECOVERY)
    kl = [row["distill_kl"] for row in rows if row["kind"] == "train"]
    assert kl[-1] < 0.5 * kl[0]
    for row in rows:
        if row["kind"] == "train":
            taught = row["distill_kl"] + 0.1 * row["distill_layer_mse"] + row["balance_loss"]
            assert row["loss"] == pytest.approx(taught, rel=1e-4)
            assert row["lm_loss"] > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in dense.parameters())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert not dense.training


def test_the_weight_of_the_next_token_loss_counts(tmp_path: Path) -> None:
    _, student, distiller = pair(kl=0.5, layer_mse=0.0, lm=2.0)
    _, rows = train(student, tmp_path, steps=2, gradient_accumulation_steps=2, distiller=distiller, balance={})
    row = next(row for row in rows if row["kind"] == "train")
    assert row["loss"] == pytest.approx(0.5 * row["distill_kl"] + 2 * row["lm_loss"], rel=1e-5)


def test_only_the_routers_learn_when_the_rest_is_frozen(tmp_path: Path) -> None:
    _, student, distiller = pair()
    before = copy.deepcopy(student.state_dict())
    train(student, tmp_path, steps=20, trainable="routers", distiller=distiller, **RECOVERY)
    after = student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.h.{i}.mlp.router.{part}" for i in range(2) for part in ("weight", "ramp")}


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    """The distillation is a mean over tokens, so two halves of a batch teach what the batch does."""
    gradients = []
    for parts in (1, 2):
        _, student, distiller = pair()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
            max_grad_norm=0,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
            use_cpu=True,
        )
        taken: dict[str, torch.Tensor] = {}
        trainer = MoETrainer(
            student, arguments, train_dataset=TokenRows(ROWS[:4]), balance={}, distiller=Distiller(tiny_gpt2(), student)
        )
        distiller.close()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        trainer.optimizer = optimizer
        optimizer.register_step_pre_hook(
            lambda *_, taken=taken, student=student: taken.update(
                {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
            )
        )
        trainer.train()
        gradients.append(taken)
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        if not name.endswith("router.weight"):
            torch.testing.assert_close(value, gradients[1][name], rtol=2e-2, atol=1e-3)


def test_hooks_come_off() -> None:
    dense, student, distiller = pair()
    hooked = [module for model in (dense, student) for module in model.modules() if module._forward_hooks]
    assert len(hooked) == 4
    distiller.close()
    assert not any(module._forward_hooks for module in hooked)


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        Distiller(tiny_gpt2(vocab_size=98), tiny_moe())
    with pytest.raises(ConfigError, match="number of blocks"):
        Distiller(tiny_gpt2(n_layer=3), tiny_moe())
    with pytest.raises(ConfigError, match="no MoE layer"):
        Distiller(tiny_gpt2(), tiny_gpt2())


def test_a_dense_model_has_no_router_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no router to train"):
        train(tiny_gpt2(), tmp_path, trainable="routers")
    assert not any(isinstance(module, Router) for module in tiny_gpt2().modules())
