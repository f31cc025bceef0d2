"""Every registered router on a live model: put on, trained, saved, loaded, taken off; and one from another package."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from thermoe import cli
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import RoutingError
from thermoe.evaluation import routing_accuracy
from thermoe.moe.decision import RoutingContext
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.moe.losses import routing_loss
from thermoe.routers.base import ROUTERS, Router
from thermoe.routers.swap import build_router, set_router
from thermoe.testing import _NoHostReads, check_router, random_tokens, tiny_moe

IDS = random_tokens(3, 10)
#: Options under which a setting differs from the default's path.
OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid_bias": {"gamma": 0.05},
    "top_p": {"theta": 0.5, "target_k": 1.5},
    "oea": {"k0": 1},
    "null": {"num_zero": 1, "num_identity": 1},
    "fixed": {"experts": [6, 1]},
    "hash": {"seed": 3},
    "round_robin": {"offset": 2},
}


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def _routers(model: nn.Module) -> list[Router]:
    routers = [layer.router for _, layer in moe_layers(model)]
    assert all(isinstance(router, Router) for router in routers)
    return routers  # type: ignore[return-value]


def _train(model: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        decisions = collect_routing(model)
        balance = routing_loss(decisions.values(), {"switch": 0.005, "z_loss": 5e-4})
        (loss + balance).backward()
        for name, layer in moe_layers(model):
            layer.router.observe(decisions[name])
        optimizer.step()
        optimizer.zero_grad()
        for router in _routers(model):
            router.after_step()
    model.eval()


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_live_model_takes_every_router_and_gives_it_back(name: str) -> None:
    model = tiny_moe()
    before = _logits(model)
    replaced = set_router(model, name, top_k=3, **OPTIONS.get(name, {}))
    assert not torch.equal(_logits(model), before)
    set_router(model, replaced)
    assert torch.equal(_logits(model), before)
    set_router(model, name, **OPTIONS.get(name, {}))
    set_router(model, "topk")  # and by name: the slow weights have gone the whole way
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_trains_and_comes_back_from_the_disk(name: str, tmp_path: Path) -> None:
    model = tiny_moe()
    set_router(model, name, top_k=3, **OPTIONS.get(name, {}))
    start = [copy.deepcopy(router.state_dict()) for router in _routers(model)]
    _train(model, 3)
    for router, old in zip(_routers(model), start, strict=True):
        for key, value in router.named_parameters():
            assert not torch.equal(value, old[key]), f"{key} has not moved"
            assert torch.isfinite(value).all()
        moved = [key for key in router.adaptive if not torch.equal(getattr(router, key), old[key])]
        assert set(moved) == set(router.adaptive)
    trained = _logits(model)
    model.save_pretrained(tmp_path)
    # A copy out of the mapped file: how matrix products round depends on where their operands lie.
    loaded = copy.deepcopy(type(model).from_pretrained(tmp_path))
    assert torch.equal(_logits(loaded), trained)
    for router, twin in zip(_routers(model), _routers(loaded), strict=True):
        assert type(router) is type(twin) and router.options() == twin.options()
        assert all(torch.equal(value, twin.state_dict()[key]) for key, value in router.state_dict().items())


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_the_language_loss_alone_reaches_every_routers_scores(name: str) -> None:
    """The gate learns even where the choice does not; for the adaptive and zero-compute parts see their own tests."""
    model = tiny_moe().train()
    set_router(model, name, top_k=3, **OPTIONS.get(name, {}))
    model(IDS, labels=IDS).loss.backward()
    for router in _routers(model):
        assert router.weight.grad is not None and float(router.weight.grad.norm()) > 1e-6


@pytest.mark.parametrize("name", sorted(name for name in ROUTERS if ROUTERS.get(name).adaptive))
def test_what_has_adapted_stays_precise_in_half_precision(name: str, tmp_path: Path) -> None:
    model = tiny_moe().bfloat16()
    set_router(model, name, **OPTIONS.get(name, {}))
    for router in _routers(model):
        for key in router.adaptive:
            getattr(router, key).fill_(1 / 3)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for router in _routers(loaded):
        assert router.weight.dtype == torch.bfloat16
        for key in router.adaptive:
            assert torch.equal(getattr(router, key), torch.full_like(getattr(router, key), 1 / 3))
            assert getattr(router, key).dtype == torch.float32


@pytest.mark.parametrize("name", sorted(name for name in ROUTERS if ROUTERS.get(name).adaptive))
def test_another_option_keeps_what_has_adapted(name: str) -> None:
    model = tiny_moe()
    set_router(model, name, **OPTIONS.get(name, {}))
    _train(model, 2)
    learned = [{key: getattr(router, key).clone() for key in router.adaptive} for router in _routers(model)]
    set_router(model, name, gate="probability")
    for router, old in zip(_routers(model), learned, strict=True):
        assert router.gate == "probability"
        assert all(torch.equal(getattr(router, key), value) for key, value in old.items())


def test_an_option_that_sets_adaptive_state_wins() -> None:
    model = tiny_moe()
    set_router(model, "top_p", theta=0.5)
    set_router(model, "top_p", theta=0.8)
    assert all(float(router.theta) == pytest.approx(0.8) for router in _routers(model))


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_generates_or_says_why_not(name: str) -> None:
    model = tiny_moe()
    set_router(model, name, **OPTIONS.get(name, {}))
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if not ROUTERS.get(name).causal:
        with pytest.raises(RoutingError, match="cannot generate") as error:
            model.generate(IDS, **settings)
        assert error.value.where and error.value.accepted and error.value.fix
        return
    assert model.generate(IDS, **settings).shape == (3, 16)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_a_repeated_forward_decides_the_same(name: str) -> None:
    """Gradient checkpointing runs a layer again in the backward pass: the gradients must be those of the first run."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_moe().train()
        torch.manual_seed(2)
        set_router(model, name, top_k=3, **OPTIONS.get(name, {}))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_can_be_judged_and_adapted_at_test_time(name: str) -> None:
    model = tiny_moe()
    set_router(model, name, **OPTIONS.get(name, {}))
    own = routing_accuracy(model, [IDS])
    assert len(own) == 2 and all(0 <= layer.overlap <= 1 and layer.tokens > 0 for layer in own.values())
    assert len(routing_accuracy(model, [IDS], chooser="random")) == 2
    best = routing_accuracy(model, [IDS], chooser="oracle")
    assert all(layer.overlap == 1 and layer.regret == 0 for layer in best.values())
    with RouterAdapter(model) as adapter:
        assert adapter.score_and_learn(IDS).learned
        assert torch.isfinite(_logits(model)).all()


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_adapting_waits_for_no_device(name: str) -> None:
    router = build_router(name, 16, 8, 3, OPTIONS.get(name, {})).train()
    ids = torch.arange(24)
    decision = router(torch.randn(24, 16), RoutingContext(2, 12, ids % 5 != 0, ids, ids % 12))
    with _NoHostReads():
        router.observe(decision)
        router.observe(decision)
        router.after_step()
        router.after_step()


PLUGIN = '''
import torch
from thermoe.routers.base import Router


class LastRouter(Router):
    """The experts with the highest ids."""

    def select(self, logits, probabilities, context):
        top_k = self.active_top_k or self.top_k
        last = torch.arange(self.num_experts - 1, self.num_experts - 1 - top_k, -1, device=logits.device)
        return last.expand(logits.shape[0], -1)
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a distribution with a router of its own, for the time of a test."""
    (tmp_path / "last_router.py").write_text(PLUGIN)
    info = tmp_path / "last_router-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: last-router\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[thermoe.routers]\nlast = last_router:LastRouter\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ROUTERS, "_entries", dict(ROUTERS._entries))
    monkeypatch.setattr(ROUTERS, "_plugins_read", False)
    monkeypatch.delitem(sys.modules, "last_router", raising=False)
    return "last"


def test_another_package_adds_a_router(plugin: str, tmp_path: Path) -> None:
    listed = CliRunner().invoke(cli.app, ["list", "routers"])
    assert listed.exit_code == 0 and plugin in listed.stdout.split()
    check_router(lambda: build_router(plugin, 16, 8, 3))
    model = tiny_moe()
    set_router(model, plugin)
    logits = _logits(model)
    model.save_pretrained(tmp_path / "model")
    loaded = copy.deepcopy(type(model).from_pretrained(tmp_path / "model"))
    assert torch.equal(_logits(loaded), logits)
    assert type(_routers(loaded)[0]).__name__ == "LastRouter"


def test_without_it_the_name_is_unknown() -> None:
    assert "last" not in ROUTERS
    assert {"topk", "noisy_topk", "sigmoid_bias", "expert_choice", "top_p", "threshold", "oea", "sinkhorn"} <= set(
        ROUTERS
    )
    assert {"hash", "random", "round_robin", "fixed", "null", "mass_keep", "priced"} <= set(ROUTERS)
