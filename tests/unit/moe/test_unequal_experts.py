"""Experts of unequal widths, kept in blocks, equal the same experts kept one by one, in output and every gradient."""

from __future__ import annotations

import ast
import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from thermoe.errors import ConfigError
from thermoe.moe.dispatch import BACKENDS, expand_to_blocks, run_experts
from thermoe.moe.experts import MAX_BLOCKS, Experts, split_widths
from thermoe.moe.layer import MoELayer
from thermoe.routers.topk import TopKRouter

T, K, D, WIDTH = 11, 3, 16, 8
BLOCKS = (3, 1, 2, 1)
E, G = len(BLOCKS), sum(BLOCKS)
ON_CPU = [name for name in BACKENDS if name not in ("auto", "fused", "decode")]
FORMS: dict[str, dict[str, Any]] = {
    "gated": {"gated": True, "activation": "silu"},
    "ungated with biases": {"gated": False, "activation": "gelu_new", "up_bias": True},
    "gated with biases": {"gated": True, "activation": "silu", "up_bias": True},
}


def in_blocks(form: str, dtype: torch.dtype = torch.float32, blocks: tuple[int, ...] = BLOCKS) -> Experts:
    experts = Experts(len(blocks), D, WIDTH, **FORMS[form], blocks=blocks).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    return experts


def one_by_one(experts: Experts) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """Return (up, bias, down) of each expert as one wide network: all gate rows, then all up rows."""
    wide, start = [], 0
    halves = 2 if experts.gated else 1
    for m in experts.blocks:
        part = slice(start, start + m)
        up = experts.up_weight[part].view(m, halves, WIDTH, D).transpose(0, 1).reshape(-1, D)
        bias = None
        if experts.up_bias is not None:
            bias = experts.up_bias[part].view(m, halves, WIDTH).transpose(0, 1).reshape(-1)
        down = experts.down_proj[part].transpose(0, 1).reshape(D, -1)
        wide.append((up, bias, down))
        start += m
    return wide


def naive(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
    """One token and one slot at a time, on whole experts."""
    networks, rows = one_by_one(experts), []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            if ids[t, k] < experts.num_experts:
                up, bias, down = networks[int(ids[t, k])]
                hidden = up @ x[t] if bias is None else up @ x[t] + bias
                row = row + weights[t, k] * (down @ experts.activate(hidden))
        rows.append(row)
    return torch.stack(rows)


ROUTES = {
    "distinct experts": lambda: torch.rand(T, E).argsort(-1)[:, :K],
    "some without an expert": lambda: torch.rand(T, E + 2).argsort(-1)[:, :K].clamp(max=E),
    "an expert twice": lambda: torch.randint(0, E, (T, K)).index_fill(1, torch.tensor([0, 2]), 0),
    "the widest for all": lambda: torch.zeros(T, K, dtype=torch.long),
    "no expert": lambda: torch.full((T, K), E),
    "more slots than experts": lambda: torch.randint(0, E + 1, (T, E + 3)),
}


def inputs(route: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = ROUTES[route]()
    weights = torch.where(ids < E, torch.rand(ids.shape, dtype=dtype) + 0.1, torch.zeros((), dtype=dtype))
    return torch.randn(T, D, dtype=dtype).requires_grad_(), ids, weights.requires_grad_()


def with_gradients(run: Any, experts: Experts, x: Tensor, weights: Tensor) -> list[Tensor]:
    out = run()
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [x, weights, *experts.parameters()]
    if not out.requires_grad:  # the loop has visited no expert
        return [out, *map(torch.zeros_like, wanted)]
    return [out.detach(), *torch.autograd.grad((out * seed).sum(), wanted, materialize_grads=True, allow_unused=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_every_backend_equals_the_experts_one_by_one(backend: str, route: str, form: str) -> None:
    experts = in_blocks(form)
    x, ids, weights = inputs(route)
    found = with_gradients(lambda: run_experts(x, ids, weights, experts, backend=backend), experts, x, weights)
    if route == "no expert":
        assert all((value == 0).all() for value in found)
        return
    expected = with_gradients(lambda: naive(x, ids, weights, experts), experts, x, weights)
    live = ids < E  # the reference reads no weight of an empty slot; here its gradient is exactly 0
    assert (found[2][~live] == 0).all()
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_right_in_double_precision(form: str) -> None:
    experts = in_blocks(form, torch.float64)
    x, ids, weights = inputs("some without an expert", torch.float64)

    def run(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        return run_experts(x, ids, weights, experts, backend="loop")

    assert torch.autograd.gradcheck(run, (x, weights, *experts.parameters()), fast_mode=True)
    torch.testing.assert_close(run(x, weights), naive(x, ids, weights, experts), atol=1e-12, rtol=1e-12)


@given(
    blocks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    tokens=st.integers(1, 4),
    slots=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_expansion_gives_each_slot_its_blocks(blocks: list[int], tokens: int, slots: int, seed: int) -> None:
    experts = Experts(len(blocks), 2, 1, blocks=blocks)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, len(blocks) + 1, (tokens, slots), generator=generator)
    weights = torch.rand(tokens, slots, generator=generator)
    found, repeated = expand_to_blocks(ids, weights, experts.block_table)
    assert found.shape == repeated.shape == (tokens, slots * max(blocks))
    starts = [sum(blocks[:e]) for e in range(len(blocks))]
    for t in range(tokens):
        expected = [
            (starts[e] + j, float(weights[t, k]))
            for k, e in enumerate(ids[t].tolist())
            if e < len(blocks)
            for j in range(blocks[e])
        ]
        live = found[t] < sum(blocks)
        assert list(zip(found[t][live].tolist(), repeated[t][live].tolist(), strict=True)) == expected
        assert (found[t][~live] == sum(blocks)).all() and (repeated[t][~live] == 0).all()


def test_one_block_each_is_the_same_bit_for_bit() -> None:
    plain, blocks = Experts(E, D, WIDTH), Experts(E, D, WIDTH, blocks=(1,) * E)
    blocks.load_state_dict(plain.state_dict(), strict=False)
    x, ids, weights = inputs("some without an expert")
    for backend in ON_CPU:
        assert torch.equal(
            run_experts(x, ids, weights, plain, backend=backend), run_experts(x, ids, weights, blocks, backend=backend)
        )
    assert set(plain.state_dict()) == {"gate_up_proj", "down_proj"}, "experts of one width are saved as ever"
    assert set(blocks.state_dict()) == {"gate_up_proj", "down_proj", "block_table"}


@pytest.mark.parametrize("form", FORMS)
def test_all_experts_on_all_tokens(form: str) -> None:
    experts, x = in_blocks(form), torch.randn(5, D)
    together = experts.forward_all(x)
    assert together.shape == (E, 5, D)
    assert experts.forward_blocks(x).shape == (G, 5, D)
    for e in range(E):
        alone = naive(x, torch.full((5, 1), e), torch.ones(5, 1), experts)
        torch.testing.assert_close(together[e], alone, atol=1e-5, rtol=1e-5)


def test_sizes_are_those_of_the_experts_one_by_one() -> None:
    experts = Experts(E, D, WIDTH, up_bias=True, blocks=BLOCKS)
    singles = [Experts(1, D, WIDTH * m, up_bias=True) for m in BLOCKS]
    assert experts.num_experts == E and experts.num_blocks == G
    assert experts.widths == (24, 8, 16, 8)
    assert experts.up_weight.shape == (G, 2 * WIDTH, D) and experts.down_proj.shape == (G, D, WIDTH)
    assert experts.parameters_by_expert == tuple(single.parameters_per_expert for single in singles)
    assert experts.flops_per_pair_by_expert == tuple(single.flops_per_pair for single in singles)
    assert experts.bytes_by_expert == tuple(single.bytes_per_expert for single in singles)
    assert sum(experts.parameters_by_expert) == sum(p.numel() for p in experts.parameters())
    assert "widths=(24, 8, 16, 8)" in repr(experts)


@pytest.mark.parametrize("name", ["parameters_per_expert", "flops_per_pair", "bytes_per_expert"])
def test_no_one_number_stands_for_experts_that_differ(name: str) -> None:
    with pytest.raises(ConfigError, match="the experts differ") as caught:
        getattr(Experts(E, D, WIDTH, blocks=BLOCKS), name)
    assert caught.value.where == name and "by_expert" in str(caught.value.fix) and caught.value.accepted
    assert getattr(Experts(2, D, WIDTH, blocks=(2, 2)), name) == getattr(Experts(2, D, 2 * WIDTH), name)


def test_shapes_follow_from_the_table_alone() -> None:
    """On the meta device there are no values to read, as in a CUDA graph there is no host to read them."""
    table = Experts(E, D, WIDTH, blocks=BLOCKS).block_table.to("meta")
    ids, weights = torch.zeros(T, K, dtype=torch.long, device="meta"), torch.ones(T, K, device="meta")
    for value in expand_to_blocks(ids, weights, table):
        assert value.shape == (T, K * max(BLOCKS))


def test_a_layer_compiles_as_one_graph() -> None:
    layer = MoELayer(TopKRouter(D, E, 2), in_blocks("gated")).eval()
    x = torch.randn(2, 5, D)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    assert layer.last_routing is not None and layer.last_routing.num_experts == E
    assert layer.last_routing.counts.shape == (E,)


def test_runs_repeat_bit_for_bit_and_copies_agree() -> None:
    experts = in_blocks("gated")
    x, ids, weights = inputs("distinct experts")
    before = run_experts(x, ids, weights, experts)
    assert torch.equal(run_experts(x, ids, weights, experts), before)
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        assert torch.equal(run_experts(x, ids, weights, other), before)
    half = experts.to(torch.bfloat16)
    assert half.block_table.dtype == torch.int64
    assert torch.isfinite(run_experts(x.bfloat16(), ids, weights.bfloat16(), half)).all()


def test_weights_are_not_read_as_those_of_other_widths() -> None:
    state = in_blocks("gated").state_dict()
    other = Experts(E, D, WIDTH, blocks=(1, 3, 2, 1))  # tensors of the same shapes
    before = other.gate_up_proj.detach().clone()
    with pytest.raises(RuntimeError, match="blocks are those of other widths"):
        other.load_state_dict(state, strict=False)
    assert torch.equal(other.gate_up_proj, before)
    assert other.block_table.tolist() == other.table_rows()
    same = Experts(E, D, WIDTH, blocks=BLOCKS)
    same.load_state_dict(state)
    assert torch.equal(same.gate_up_proj, state["gate_up_proj"])


def test_an_empty_shell_gets_its_table_back() -> None:
    with torch.device("meta"):
        shell = Experts(E, D, WIDTH, blocks=BLOCKS)
    shell.to_empty(device="cpu")
    shell.reset_parameters()
    assert shell.block_table.tolist() == shell.table_rows() == in_blocks("gated").table_rows()


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_widths_become_whole_blocks(widths: list[int]) -> None:
    try:
        block, blocks = split_widths(widths)
    except ConfigError as error:
        assert sum(widths) > MAX_BLOCKS
        assert error.where and error.accepted
        _, _, given_fix = str(error.fix).partition("use ")
        if given_fix:  # what it proposes must be accepted, of the same sum, and as many
            nearer = ast.literal_eval(given_fix)
            assert sum(nearer) == sum(widths) and len(nearer) == len(widths)
            assert sum(split_widths(nearer)[1]) <= MAX_BLOCKS
        return
    assert tuple(m * block for m in blocks) == tuple(widths)
    assert sum(blocks) <= MAX_BLOCKS


def test_too_many_blocks_name_widths_that_would_do() -> None:
    with pytest.raises(ConfigError, match="makes 2048 blocks") as caught:
        split_widths([1025, 511, 512])
    assert caught.value.fix == "use [1024, 512, 512]"
    with pytest.raises(ConfigError, match="makes 2053 blocks") as caught:
        split_widths([1029, 511, 513])  # a prime number of neurons
    assert "multiples of" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks": (1, 2)}, "for 4 experts"),
        ({"blocks": (1, 2, 0, 1)}, "at least 1"),
        ({"blocks": (1000, 20, 3, 1)}, "1023 in all"),
        ({"blocks": BLOCKS, "down_bias": True}, "once per block"),
    ],
)
def test_refusals(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experts(E, D, WIDTH, **change)
    assert said in str(caught.value)
    assert caught.value.what and caught.value.where and caught.value.accepted and caught.value.fix


@pytest.mark.parametrize("widths", [[], [4, 0], [4, -1], [4, 2.0], [True, 4]])
def test_widths_are_whole_numbers(widths: list[Any]) -> None:
    with pytest.raises(ConfigError, match="widths are"):
        split_widths(widths)
