"""The ways to divide a dense network among experts, beyond their exactness."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from thermoe import collect_routing, convert_to_moe
from thermoe.errors import ConfigError, ConversionError, ThermoeError
from thermoe.models.classes import placed_layers
from thermoe.models.families import FFNWeights
from thermoe.models.neurons import divide_neurons, largest_neurons
from thermoe.routers.topk import TopKRouter


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=1, eos_token_id=2)).eval()


def ffn(neurons: int = 24, gated: bool = True) -> FFNWeights:
    gate = torch.randn(neurons, 8) if gated else None
    return FFNWeights(up=torch.randn(neurons, 8), up_bias=None, gate=gate, down=torch.randn(8, neurons), down_bias=None)


IDS = torch.randint(3, 50, (3, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grouping", ["contiguous", "clustered"])
@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_a_division_holds_every_neuron_once(grouping: str, parts: int, gated: bool) -> None:
    among = torch.arange(24)
    divided = divide_neurons(ffn(gated=gated), among, parts, grouping)  # type: ignore[arg-type]
    assert divided.shape == (parts, 24 // parts)
    assert torch.equal(divided.flatten().sort().values, among)
    again = divide_neurons(ffn(gated=gated), among, parts, grouping)  # type: ignore[arg-type]
    assert again.shape == divided.shape


def test_clusters_find_planted_groups() -> None:
    directions = F.normalize(torch.randn(4, 8), dim=1)
    label = torch.arange(32) % 4  # interleaved, so that contiguous parts would be wrong
    rows = 3 * directions[label] + 0.1 * torch.randn(32, 8)
    network = FFNWeights(up=rows, up_bias=None, down=torch.randn(8, 32), down_bias=None)
    divided = divide_neurons(network, torch.arange(32), 4, "clustered")
    assert all(len(set(label[part].tolist())) == 1 for part in divided)
    assert torch.equal(divided, divide_neurons(network, torch.arange(32), 4, "clustered"))


def test_the_shared_part_takes_the_largest_neurons() -> None:
    network = ffn(24)
    network.up[[3, 17]] *= 50
    always, rest = largest_neurons(network, 2)
    assert always.tolist() == [3, 17]
    assert sorted([*always.tolist(), *rest.tolist()]) == list(range(24))


def test_the_shared_part_is_always_on_and_saved(tmp_path: Path) -> None:
    moe = convert_to_moe(dense(), num_experts=4, top_k=1, shared_size=16)
    layer = placed_layers(moe)[0]
    assert layer.shared is not None
    assert (layer.shared.intermediate_size, layer.experts.intermediate_size) == (16, 8)
    moe.save_pretrained(tmp_path)
    loaded = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad():
        before = moe(IDS).logits
        assert torch.equal(loaded(IDS).logits, before)
        layer.shared.down_proj.zero_()
        assert float((moe(IDS).logits - before).abs().max()) > 1e-4


def test_noise_and_new_neurons_make_copies_differ() -> None:
    same, noisy, fresh = (
        placed_layers(convert_to_moe(dense(), num_experts=4, top_k=2, method="copy", **options))[0].experts
        for options in ({}, {"noise": 0.1}, {"reinit_frac": 0.5})
    )
    assert torch.equal(same.up_weight[0], same.up_weight[3])
    spread = (noisy.up_weight[0] - noisy.up_weight[3]).std() / same.up_weight.std()
    assert 0.1 < float(spread) < 0.2  # two independent draws of 0.1
    changed = (fresh.up_weight != same.up_weight).any(-1)  # (E, 2F): neurons drawn anew
    assert 0.3 < float(changed.float().mean()) < 0.7
    gate, up = changed.chunk(2, dim=1)
    down = (fresh.down_proj != same.down_proj).any(1)
    assert torch.equal(gate, up)
    assert torch.equal(gate, down)
    assert not torch.equal(changed[0], changed[1])


def test_virtual_takes_whole_copies() -> None:
    moe = convert_to_moe(dense(), num_experts=6, top_k=4, method="virtual", groups=2)
    with torch.no_grad():
        moe(IDS)
    for decision in collect_routing(moe).values():
        copies = decision.expert_index.sort(-1).values.view(-1, 2, 2)
        assert torch.equal(copies[..., 1] - copies[..., 0], torch.ones_like(copies[..., 0]))
        assert (copies[..., 0] % 2 == 0).all()
        assert torch.allclose(decision.weights.sum(-1), torch.ones(IDS.numel()))


def test_groups_of_a_router_must_divide() -> None:
    with pytest.raises(ConfigError, match="group_size is 3"):
        TopKRouter(16, 6, 4, group_size=3)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k no multiple of the shards": ({"method": "virtual", "groups": 2, "top_k": 3}, "multiple of 2"),
    "shards that do not divide E": ({"method": "virtual", "groups": 3}, "divisor of 4"),
    "groups elsewhere": ({"groups": 2}, "method='virtual'"),
    "a shared part elsewhere": ({"method": "copy", "shared_size": 8}, "method='partition'"),
    "everything shared": ({"shared_size": 48}, "0 to 47"),
    "a rest that does not divide": ({"shared_size": 7}, "41 neurons"),
    "negative noise": ({"method": "copy", "noise": -1.0}, "at least 0"),
    "too many new neurons": ({"method": "copy", "reinit_frac": 1.5}, "0 to 1"),
    "noise on a partition": ({"noise": 0.1}, "method='copy'"),
    "unknown grouping": ({"neurons": "clusterd"}, "did you mean 'clustered'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    options, said = REFUSED[case]
    with pytest.raises(ThermoeError) as caught:
        convert_to_moe(dense(), num_experts=4, **options)
    error = caught.value
    assert said in str(error)
    assert error.what and error.where and error.accepted and error.fix
    assert isinstance(error, (ConversionError, ConfigError))
