"""What only a GPU can show: grouped products, no host synchronisation, CUDA graphs, compilation, real joules."""

from __future__ import annotations

import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from thermoe import RouterAdapter, convert_to_moe, set_router
from thermoe.moe.dispatch import run_dense, run_grouped
from thermoe.moe.experts import Experts
from thermoe.moe.layer import MoELayer
from thermoe.routers.swap import build_router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _layer(router: str = "topk", **options: object) -> MoELayer:
    torch.manual_seed(0)
    experts = Experts(16, 64, 32, activation="gelu_new", gated=False, up_bias=True)
    layer = MoELayer(build_router(router, 64, 16, 4, options), experts, output_bias=True)
    with torch.no_grad():
        layer.router.weight.mul_(10)
        experts.up_bias.normal_()
    return layer.cuda().bfloat16().eval()


@pytest.mark.parametrize("gated", [False, True])
def test_grouped_products_equal_the_reference(gated: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(8, 64, 32, gated=gated, up_bias=True, down_bias=True).cuda().bfloat16()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(0, 9, (50, 3), device="cuda")
    index[:, 0] = torch.where(index[:, 0] == 5, 8, index[:, 0])
    index = torch.where(index == 5, 8, index)  # expert 5 stays empty
    weights = torch.rand(50, 3, device="cuda", dtype=torch.bfloat16) * (index < 8)
    weights.requires_grad_(True)
    results = []
    for run in (run_grouped, run_dense):
        out = run(x, index, weights, experts)
        gradients = torch.autograd.grad(out.float().square().sum(), [x, weights, *experts.parameters()])
        results.append((out, *gradients))
    for fast, reference in zip(*results, strict=True):
        assert torch.isfinite(fast).all()
        scale = reference.float().abs().max().clamp(min=1e-3)
        assert float((fast.float() - reference.float()).abs().max() / scale) < 2e-2


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("topk", {}),
        ("topk", {"eval_capacity_factor": 1.0}),
        ("priced", {"price": 0.05, "open_cost": [4.0] * 16}),
        ("random", {}),
    ],
)
def test_forward_never_waits_for_the_host(router: str, options: dict[str, object]) -> None:
    layer = _layer(router, **options)
    x = torch.randn(16, 1, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_sees_a_new_price() -> None:
    layer = _layer("priced", open_cost=[2.0] * 16)
    x = torch.randn(16, 1, 64, device="cuda", dtype=torch.bfloat16)
    outputs = {}
    with torch.no_grad():
        for price in (0.0, 0.05, 0.2):
            layer.router.set_price(price)
            outputs[price] = layer(x).clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        for price in (0.2, 0.0, 0.05):
            layer.router.set_price(price)
            graph.replay()
            assert torch.equal(captured, outputs[price])
    assert not torch.equal(outputs[0.0], outputs[0.2])


@pytest.mark.parametrize("router", ["topk", "priced"])
def test_forward_compiles_as_one_graph(router: str) -> None:
    layer = _layer(router)
    x = torch.randn(4, 32, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        eager = layer(x)
        compiled = torch.compile(layer, fullgraph=True)(x)
    assert float((compiled - eager).abs().max()) < 3e-2 * float(eager.abs().max())


def _tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).cuda().eval()


def test_conversion_is_exact_on_the_gpu() -> None:
    dense = _tiny_gpt2()
    tokens = torch.randint(0, 300, (4, 32), device="cuda")
    moe = convert_to_moe(dense, num_experts=8, top_k=8)
    with torch.no_grad():
        assert float((moe(tokens).logits - dense(tokens).logits).abs().max()) < 1e-5
        baseline = convert_to_moe(dense, num_experts=8, top_k=3)
        before = baseline(tokens).logits
        set_router(baseline, "priced")
        assert torch.equal(baseline(tokens).logits, before)


def test_adapting_on_the_gpu_learns() -> None:
    moe = convert_to_moe(_tiny_gpt2(), num_experts=8, top_k=3)
    for block in moe.transformer.h:
        block.mlp.router.ramp.fill_(1.0)
    tokens = torch.randint(0, 300, (8, 32), device="cuda")
    with RouterAdapter(moe, lr=3e-2, anchor=1.0, bucket=None) as adapter:
        losses = [float(adapter.score_and_learn(tokens).sequence_nll.mean()) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_the_meter_reads_real_joules() -> None:
    from thermoe.telemetry import EnergyMeter

    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    with EnergyMeter() as meter:
        with meter.window("matmul", tokens=1000) as window:
            end = time.monotonic() + 3.0
            while time.monotonic() < end:
                for _ in range(50):
                    a @ a
                torch.cuda.synchronize()
        result, described = window.result, meter.describe()
    assert result.provenance == "measured", result.reason
    assert described["energy_j"]["provenance"] == "measured"
    assert result.energy_j is not None
    assert 50 < result.energy_j / result.duration_s < 1200
    assert result.j_per_token == pytest.approx(result.energy_j / 1000)
