"""Several steps from one batch: how it is cut, what a part is given, what it costs, and what stays as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from thermoe.adapt import forwards, learner
from thermoe.adapt.learning_parts import choices, of_rows, parts_of, replayed
from thermoe.adapt.objectives import LearnBatch, Proposal
from thermoe.adapt.reading import rows_interact
from thermoe.adapt.safeguards import Safeguards
from thermoe.adapt.test_time import RouterAdapter
from thermoe.errors import ConfigError, ThermoeError
from thermoe.evaluation import sequence_nll
from thermoe.moe.layer import collect_routing, moe_layers
from thermoe.routers.base import Router
from thermoe.routers.swap import set_router
from thermoe.testing import random_tokens, tiny_moe

OFF = Safeguards.none()
#: Routers for which the choice for a sequence depends on the others of its batch.
TOGETHER: dict[str, tuple[str, dict[str, Any]]] = {
    "priced": ("priced", {"price": 0.1, "open_cost": [0.5] * 8, "group_by_position": True}),
    "distortion": (
        "priced",
        {"price": 0.2, "open_cost": [3.0] * 8, "group_by_position": True, "benefit": "distortion"},
    ),
    "opened": ("oea", {"group_by_position": True}),
    "expert choice": ("expert_choice", {}),
    "capacity": ("topk", {"eval_capacity_factor": 0.6}),
}


def _model(kind: str | None = None) -> nn.Module:
    model = tiny_moe(top_k=3, gate="renormalized")
    if kind is not None:
        name, options = TOGETHER[kind]
        set_router(model, name, **options)
    return model


def _adapter(model: nn.Module, **settings: Any) -> RouterAdapter:
    return RouterAdapter(model, **{"bucket": None, "lr": 1e-2, **settings})


def _watched(adapter: RouterAdapter) -> list[tuple[LearnBatch, Proposal]]:
    """Return a list that gets what the objective is given, and what it makes of it."""
    seen: list[tuple[LearnBatch, Proposal]] = []
    objective: Any = adapter._learner.live.objective
    learn: Callable[[LearnBatch], Proposal] = objective.learn

    def watch(batch: LearnBatch) -> Proposal:
        seen.append((batch, learn(batch)))
        return seen[-1][1]

    objective.learn = watch
    return seen


def _ids(model: nn.Module) -> list[Tensor]:
    return [decision.expert_index.clone() for decision in collect_routing(model).values()]


def _routers(model: nn.Module) -> list[Router]:
    return [layer.router for _, layer in moe_layers(model)]


# -- the parts ---------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=1, max_size=20),
    steps=st.integers(1, 30),
    seed=st.text("ab/", max_size=5),
)
def test_every_row_with_something_to_learn_is_in_one_part(rows: list[float], steps: int, seed: str) -> None:
    weights = torch.zeros(len(rows), 5)
    weights[:, 2] = torch.tensor(rows)
    parts, wanted = parts_of(weights, steps, seed), [i for i, weight in enumerate(rows) if weight > 0]
    assert sorted(row for part in parts for row in part) == wanted
    assert len(parts) == max(1, min(steps, len(wanted)))
    if wanted:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert parts == parts_of(weights, steps, seed), "the same parts in every run"


def test_parts_are_drawn_by_the_seed() -> None:
    weights = torch.ones(16, 5)
    drawn = [parts_of(weights, 4, str(seed)) for seed in range(5)]
    assert len({str(parts) for parts in drawn}) == 5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 50])
def test_the_objective_gets_the_parts_and_nothing_that_is_held_back(steps: int) -> None:
    ids = random_tokens(8, 12)
    with _adapter(_model(), steps=steps, held_frac=0.25) as adapter:
        seen = _watched(adapter)
        assert adapter.score_and_learn(ids).learned
    assert len(seen) == min(steps, 6)
    rows = torch.cat([batch.input_ids[batch.rows] for batch, _ in seen])
    assert len(rows) == 6 and len(rows.unique(dim=0)) == 6
    assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in ids.tolist()}
    if steps > 1:
        assert all(batch.rows.all() for batch, _ in seen), "no forward over rows that teach nothing"


# -- replay ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("kind", TOGETHER)
def test_replayed_rows_are_routed_as_in_their_batch(kind: str, padded: bool) -> None:
    model, ids, rows = _model(kind), random_tokens(6, 10), [1, 4]
    assert rows_interact(_routers(model))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:], mask[3, 4:] = 0, 0
    whole = model(ids, attention_mask=mask).logits
    chosen, routed = choices(model, (6, 10)), _ids(model)
    assert chosen is not None
    real = mask[rows].bool()
    expected = [index.view(6, 10, -1)[rows].flatten(0, 1) for index in routed]
    with replayed(model, None if chosen is None else of_rows(chosen, torch.tensor(rows))):
        logits = model(ids[rows], attention_mask=mask[rows]).logits
    assert all(torch.equal(a, b) for a, b in zip(_ids(model), expected, strict=True))
    torch.testing.assert_close(logits[real], whole[rows][real], rtol=1e-5, atol=1e-5)
    assert all(router.replay is None for router in _routers(model))
    alone = model(ids[rows], attention_mask=mask[rows]).logits
    found = [index[real.flatten()] for index in _ids(model)]
    wanted = [index[real.flatten()] for index in expected]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not torch.allclose(alone[real], whole[rows][real], rtol=1e-5, atol=1e-5), "by themselves they are not"


def test_the_gradient_reaches_the_router_through_what_is_replayed() -> None:
    model, ids = _model("priced"), random_tokens(4, 10)
    model(ids)
    chosen = choices(model, (4, 10))
    with replayed(model, of_rows(chosen, torch.tensor([0, 2]))):
        model(ids[[0, 2]]).logits.square().mean().backward()
    assert all(float(router.weight.grad.norm()) > 0 for router in _routers(model))


def test_routers_choose_again_afterwards_even_after_an_error() -> None:
    model, ids = _model("priced"), random_tokens(4, 10)
    with torch.no_grad():
        before = model(ids).logits
    chosen = choices(model, (4, 10))
    with pytest.raises(KeyError), replayed(model, of_rows(chosen, torch.tensor([0]))):
        assert all(router.replay is not None for router in _routers(model))
        raise KeyError
    assert all(router.replay is None for router in _routers(model))
    with replayed(model, None):
        assert all(router.replay is None for router in _routers(model))
    assert chosen is not None
    with pytest.raises(IndexError), replayed(model, of_rows(chosen, torch.tensor([7]))):
        pass
    assert all(router.replay is None for router in _routers(model)), "nor where it could not be set"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_rows_that_cannot_be_told_are_not_replayed() -> None:
    model = _model("priced")
    assert choices(model, (4, 10)) == [None, None], "nothing was routed yet"
    model(random_tokens(4, 10))
    assert choices(model, (4, 9)) is None and choices(model, (5, 10)) is None
    found = choices(model, (4, 10))
    assert found is not None and all(ids is not None and ids.shape[:2] == (4, 10) for ids in found)


# -- what a part teaches -----------------------------------------------------------------------------------------------


def _mean_gradient(seen: list[tuple[LearnBatch, Proposal]]) -> list[Tensor]:
    whole = sum(proposal.weight for _, proposal in seen)
    parts = [[g * (proposal.weight / whole) for g in proposal.gradients or []] for _, proposal in seen]
    return [torch.stack(same).sum(0) for same in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", [None, "priced", "capacity"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_the_gradients_of_the_parts_are_that_of_the_batch(kind: str | None, weighted: bool) -> None:
    """At fast weights that stay: the mean by weight, under routing that is that of the whole batch."""
    ids = random_tokens(7, 12)
    weights = torch.rand(7, 12, generator=torch.Generator().manual_seed(1)) if weighted else None
    found = []
    for steps in (1, 3):
        with _adapter(_model(kind), lr=0.0, steps=steps, safeguards=OFF, learn_on="served") as adapter:
            seen = _watched(adapter)
            adapter.score_and_learn(ids, weights=weights)
            assert len(seen) == steps and not any(p.any() for p in adapter.parameters())
            found.append(_mean_gradient(seen))
    for one, parts in zip(*found, strict=True):
        assert float(one.norm()) > 1e-4
        torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-6)


def test_each_part_is_read_with_what_the_part_before_taught() -> None:
    with _adapter(_model(), steps=4, safeguards=OFF, lr=0.1) as adapter:
        seen = _watched(adapter)
        adapter.score_and_learn(random_tokens(8, 12))
        read = [float(batch.nll.detach().sum()) for batch, _ in seen]
    model, as_trained = _model(), []
    with torch.no_grad():
        for batch, _ in seen:
            as_trained.append(float(sequence_nll(model(batch.input_ids).logits, batch.input_ids).sum()))
    assert read[0] == pytest.approx(as_trained[0], rel=1e-6)
    assert all(abs(one - two) > 1e-3 for one, two in zip(read[1:], as_trained[1:], strict=True))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_say(steps: int, side: str) -> None:
    ids, model = random_tokens(4, 16), _model()
    pad = (5, 0) if side == "left" else (0, 5)
    padded, mask = F.pad(ids, pad, value=3), F.pad(torch.ones_like(ids), pad, value=0)
    ends = []
    for given_ids in ((ids,), (padded, mask)):
        with _adapter(model, safeguards=OFF, steps=steps) as adapter:
            assert adapter.score_and_learn(*given_ids).learned
            ends.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert float((ends[0] - ends[1]).norm()) < 1e-3 * float(ends[0].norm())


@pytest.mark.parametrize("steps", [1, 4])
def test_text_that_is_held_back_or_generated_has_no_say(steps: int) -> None:
    """It is in the forward of the part, but neither in the gradient nor in what the step is measured by."""
    ids, model = random_tokens(1, 24), _model()
    weights = torch.ones(1, 24)
    weights[:, 14:] = 0
    ends = []
    for rows in (ids, torch.where(weights > 0, ids, random_tokens(1, 24, seed=9))):
        with _adapter(model, safeguards=OFF, steps=steps) as adapter:
            assert adapter.score_and_learn(rows, weights=weights).learned
            ends.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    assert float((ends[0] - ends[1]).norm()) < 1e-3 * float(ends[0].norm())


# -- what is scored, and what stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "priced"])
def test_what_is_scored_does_not_depend_on_the_number_of_steps(kind: str | None) -> None:
    model, ids = _model(kind), random_tokens(8, 12)
    with torch.no_grad():
        frozen = sequence_nll(model(ids).logits, ids)
        served = _ids(model)
    for steps in (1, 2, 4):
        with _adapter(model, steps=steps, safeguards=Safeguards(judge_tokens=5)) as adapter:
            step = adapter.score_and_learn(ids)
            assert torch.equal(step.sequence_nll, frozen) and not step.sequence_nll.requires_grad
            # On record is what was served, not what was learned from afterwards.
            assert all(torch.equal(a, b) for a, b in zip(_ids(model), served, strict=True))
            assert all(router.replay is None for router in _routers(model))


@pytest.mark.parametrize(("steps", "graphs"), [(1, [True]), (4, [False, True, True, True, True])])
def test_scoring_keeps_no_graph_that_nobody_uses(
    steps: int, graphs: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, score = [], learner.token_nll

    def watch(*given_args: Any) -> Any:
        nll, vocabulary = score(*given_args)
        found.append(nll.requires_grad)
        return nll, vocabulary

    for module in (learner, forwards):
        monkeypatch.setattr(module, "token_nll", watch)
    with _adapter(_model(), steps=steps, safeguards=OFF) as adapter:
        adapter.score_and_learn(random_tokens(8, 12))
    assert found == graphs


def test_a_run_depends_on_no_global_generator_and_moves_none() -> None:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        states = torch.random.get_rng_state(), random.getstate()
        with _adapter(_model(), steps=4) as adapter:
            scores = [adapter.score_and_learn(random_tokens(8, 12, seed=number)).sequence_nll for number in range(3)]
            ends.append([*scores, *(p.detach().clone() for p in adapter.parameters())])
        assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


# -- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TOGETHER))
@pytest.mark.parametrize("learn_on", ["served", "unsteered", "both"])
def test_steps_learn_on_what_was_served_or_on_each_tokens_own_choice(kind: str, learn_on: str) -> None:
    model, ids = _model(kind), random_tokens(8, 12)
    with torch.no_grad():
        model(ids)
    served = {name: d.expert_index.view(8, 12, -1) for name, d in collect_routing(model).items()}
    given: list[dict[str, Tensor]] = []
    with _adapter(model, lr=0.0, steps=4, safeguards=OFF, learn_on=learn_on) as adapter:
        objective: Any = adapter._learner.live.objective
        learn = objective.learn
        layers = dict(moe_layers(model))
        forward = {name: layer.router.forward for name, layer in layers.items()}
        answers: dict[str, Any] = {}

        def noting(name: str) -> Any:
            def route(*args: Any) -> Any:
                answers[name] = forward[name](*args)
                return answers[name]

            return route

        def watch(batch: LearnBatch) -> Proposal:
            rows = [ids.tolist().index(row) for row in batch.input_ids.tolist()]
            found = {}
            for name, decision in answers.items():
                own = decision.logits.topk(3, -1).indices.sort().values
                chosen = decision.expert_index.sort().values
                as_served = served[name][rows].flatten(0, 1).sort().values
                found[name] = torch.tensor([torch.equal(chosen, as_served), torch.equal(chosen, own)])
            given.append(found)
            return learn(batch)

        objective.learn = watch
        for name, layer in layers.items():
            layer.router.forward = noting(name)  # type: ignore[method-assign]
        assert adapter.score_and_learn(ids).verdict == "skipped", "a step of length 0"
        for layer in layers.values():
            del layer.router.forward
            assert layer.router.replay is None and not layer.router.unsteered
    free = {"served": [False] * 4, "unsteered": [True] * 4, "both": [False, True, False, True]}[learn_on]
    for found, without in zip(given, free, strict=True):
        for as_served, own in found.values():
            assert own if without else as_served
    assert any(not own for found in given for _, own in found.values()) or learn_on == "unsteered"


@pytest.mark.parametrize("value", ["free", None, 3, True])
def test_a_choice_to_learn_on_that_there_is_not(value: Any) -> None:
    with pytest.raises(ThermoeError, match="served"):
        RouterAdapter(_model(), learn_on=value)


@pytest.mark.parametrize("kind", [None, "priced"])
def test_parts_cost_twice_their_forwards_and_are_one_piece_of_work(kind: str | None) -> None:
    model, ids = _model(kind), random_tokens(8, 12)
    with _adapter(model, lr=0.0, steps=4, safeguards=OFF, learn_on="served") as adapter:
        seen, account = _watched(adapter), adapter._learner.live.account
        for count in (1, 2):
            step = adapter.score_and_learn(ids)
            assert adapter.ledger.counts["update"] == count and sum(adapter.ledger.counts.values()) == count
        (*_, work) = adapter.ledger.take()
        assert work.kind == "update" and work.tokens == ids.numel()
        assert work.energy_j == pytest.approx(step.learning_j, rel=1e-12)
        # The same forwards once more, the routing that of the whole batch where rows are routed together.
        forwards_j = 0.0
        for batch, _ in seen[4:]:
            rows = [ids.tolist().index(row) for row in batch.input_ids.tolist()]
            with torch.no_grad():
                model(ids)
                chosen = choices(model, (8, 12)) if kind else None
                with replayed(model, None if chosen is None else of_rows(chosen, torch.tensor(rows))):
                    model(batch.input_ids)
            forwards_j += account.costs.last_forward_j(batch.input_ids.numel())
        assert step.learning_j == pytest.approx(2 * forwards_j, rel=1e-12) and forwards_j > 0
    with _adapter(model, lr=0.0, steps=1, safeguards=OFF) as adapter:
        step = adapter.score_and_learn(ids)
        served_j = adapter._learner.live.account.costs.last_forward_j(ids.numel())
        assert step.learning_j == pytest.approx(served_j, rel=1e-12), "of one step, its backward alone"


@pytest.mark.parametrize("kind", [None, "priced"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_no_update_costs_more_than_it_was_let_in_for(kind: str | None, steps: int) -> None:
    with _adapter(_model(kind), bucket=0.5, steps=steps, safeguards=OFF, by_text=False) as adapter:
        bounds: list[float] = []
        allows = adapter.bucket.allows
        adapter.bucket.allows = lambda most_j: bounds.append(most_j) or allows(most_j)  # type: ignore[method-assign]
        learned = 0
        for number in range(8):
            step = adapter.score_and_learn(random_tokens(8, 12, seed=number))
            assert step.learning_j <= bounds[-1]
            learned += step.learned
            assert step.learned or "no credit" in (step.reason or "")
        assert len(bounds) >= 8 and learned > 0


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, True, "4", None, float("nan")])
def test_a_number_of_steps_that_is_none(value: object) -> None:
    model = _model()
    with pytest.raises(ConfigError, match="steps") as error:
        RouterAdapter(model, steps=value)  # type: ignore[arg-type]
    assert "integer of at least 1" in error.value.accepted and error.value.fix
    assert all(router.fast is None for router in _routers(model))


@pytest.mark.parametrize("value", ["yes", 1, 0, None])
def test_a_switch_that_is_none(value: object) -> None:
    with pytest.raises(ConfigError, match="by_text") as error:
        RouterAdapter(_model(), by_text=value)  # type: ignore[arg-type]
    assert "True or False" in error.value.accepted and error.value.fix


@pytest.mark.parametrize("value", [0, 0.0, 2, -0.5, 1.0001, float("nan"), float("inf"), True, "0.9", None])
def test_a_retreat_that_is_none(value: object) -> None:
    with pytest.raises(ConfigError, match="retreat") as error:
        Safeguards(retreat=value)  # type: ignore[arg-type]
    assert "above 0 and at most 1" in error.value.accepted and error.value.fix


@pytest.mark.parametrize("value", ["sgd", "", "Natural", None, 3])
def test_an_optimizer_that_is_none(value: object) -> None:
    model = _model()
    with pytest.raises(ThermoeError, match="optimizer") as error:
        RouterAdapter(model, optimizer=value)  # type: ignore[arg-type]
    assert "natural" in str(error.value) and "adamw" in str(error.value)
    assert all(router.fast is None for router in _routers(model)), "nothing is left on the model"
    with RouterAdapter(model, bucket=None) as adapter:
        assert adapter.score_and_learn(random_tokens(4, 12)).learned


# -- when something breaks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_a_part_that_breaks_leaves_nothing_half_done(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out: the error comes through, and what was learned is as before the batch."""
    model, ids = _model("priced"), random_tokens(8, 12)
    with _adapter(model, steps=4) as adapter:
        if not first:
            assert adapter.score_and_learn(random_tokens(8, 12, seed=1)).learned
        before = [p.detach().clone() for p in adapter.parameters()]
        had_base, rate = adapter._learner.state.base is not None, adapter.lr
        moments = [tensor.clone() for tensor in adapter._learner.live.optimizer.state_tensors()]
        calls, score = [], learner.token_nll

        def breaks(*given_args: Any) -> Any:
            calls.append(None)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("no memory")
            return score(*given_args)

        with monkeypatch.context() as patch:
            patch.setattr(learner, "token_nll", breaks)
            patch.setattr(forwards, "token_nll", breaks)
            with pytest.raises(torch.OutOfMemoryError):
                adapter.score_and_learn(ids)
        assert len(calls) == 4 and all(router.replay is None for router in _routers(model))
        assert all(torch.equal(p, b) for p, b in zip(adapter.parameters(), before, strict=True))
        after = adapter._learner.live.optimizer.state_tensors()
        assert len(after) == len(moments) and all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
        assert (adapter._learner.state.base is not None) == had_base and adapter.lr == rate
        spent_j = adapter.ledger.energy_j
        assert adapter.ledger.counts["update"] == (1 if first else 2), "what two parts took was spent all the same"
        assert adapter.score_and_learn(ids).learned and adapter.ledger.energy_j > spent_j > 0
