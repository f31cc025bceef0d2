"""The load of a whole optimiser step: over micro-batches, over ranks, and without waiting for the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from loss_cases import E, T, decide, gradient, random_logits
from torch import Tensor, distributed

from thermoe.errors import ConfigError, RoutingError
from thermoe.moe.decision import RoutingDecision
from thermoe.moe.global_load import GlobalLoad
from thermoe.moe.losses import load_std_loss, routing_loss, switch_loss
from thermoe.moe.stats import StatsAccumulator, read_sums

RANKS = 2


def _share(*decisions: RoutingDecision) -> Tensor:
    counts = torch.stack([decision.counts for decision in decisions]).sum(0)
    return counts / counts.sum()


def _added(loads: GlobalLoad, decision: RoutingDecision) -> Tensor:
    loads.add([decision])
    return loads.shares()[0]


def test_two_micro_batches_give_the_load_of_both() -> None:
    first, second = decide(random_logits()), decide(random_logits(3.0))
    loads = GlobalLoad()
    loads.start_step()
    assert loads.shares() == []
    torch.testing.assert_close(_added(loads, first), _share(first))
    torch.testing.assert_close(_added(loads, second), _share(first, second))
    loads.start_step()
    torch.testing.assert_close(_added(loads, second), _share(second), msg="a step begins with nothing")


def test_f_is_global_and_p_local() -> None:
    """Of all micro-batches the last one sees f of the whole batch, and its gradient goes through its own P alone."""
    layers = [(random_logits(), random_logits(3.0)) for _ in range(2)]
    loads = GlobalLoad()
    loads.start_step()
    for part in range(2):
        logits = [layer[part] for layer in layers]
        decisions = [decide(z) for z in logits]
        loads.add(decisions)
        loss = routing_loss(decisions, {"switch": 1.0, "load_std": 0.5}, loads=loads)
    expected = torch.zeros(())
    for (before, now), decision in zip(layers, decisions, strict=True):
        f = _share(decide(before), decide(now))
        expected = expected + (switch_loss(decision, f) + 0.5 * load_std_loss(decision, f))
        p = decision.probabilities.mean(0)
        torch.testing.assert_close(switch_loss(decision, f), E * (f * p).sum())
        torch.testing.assert_close(load_std_loss(decision, f), E * f.square().sum() - 1)
    assert loss is not None
    torch.testing.assert_close(loss, expected)
    for z in logits:
        torch.testing.assert_close(gradient(loss, z), gradient(expected, z))
    alone = routing_loss(decisions, {"switch": 1.0, "load_std": 0.5})
    assert alone is not None and abs(float(alone.detach() - loss.detach())) > 1e-3


def test_without_other_micro_batches_it_is_the_batch_of_its_own() -> None:
    logits = random_logits()
    terms = {"switch": 1.0, "z_loss": 0.1, "entropy": 0.1}
    loads = GlobalLoad()
    loads.add([decide(logits)])
    with_loads = routing_loss([decide(logits)], terms, loads=loads)
    without = routing_loss([decide(logits)], terms)
    torch.testing.assert_close(with_loads, without)


def test_memory_keeps_a_part_of_the_steps_before() -> None:
    first, second = decide(random_logits()), decide(random_logits(3.0))
    loads = GlobalLoad(memory=0.5)
    loads.start_step()
    loads.add([first])
    loads.start_step()
    counts = 0.5 * first.counts + second.counts
    resumed = GlobalLoad(memory=0.5)
    resumed.load_state_dict(loads.state_dict())
    torch.testing.assert_close(_added(loads, second), counts / counts.sum())
    torch.testing.assert_close(_added(resumed, second), counts / counts.sum())
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="memory is"):
            GlobalLoad(memory=bad)


def test_layers_may_differ_in_size_but_not_from_call_to_call() -> None:
    large, small = decide(random_logits()), decide(random_logits(experts=4))
    loads = GlobalLoad()
    loads.add([large, small])
    assert [share.numel() for share in loads.shares()] == [E, 4]
    assert routing_loss([large, small], {"switch": 1.0}, loads=loads) is not None
    for uncounted in ([small, large], [large]):
        with pytest.raises(RoutingError, match=r"loads of 2"):
            routing_loss(uncounted, {"switch": 1.0}, loads=loads)
    with pytest.raises(RoutingError, match="layers of"):
        loads.add([large])


def test_a_batch_of_padding_alone_has_no_load() -> None:
    padding = decide(random_logits(), mask=torch.zeros(T, dtype=torch.bool))
    assert (_added(GlobalLoad(), padding) == 0).all()


def test_it_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = decide(random_logits())
    loads = GlobalLoad()

    def wait(*_: object, **__: object) -> None:
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, name, wait)
    loads.start_step()
    for _ in range(2):
        loads.add([decision, decision])
        routing_loss([decision, decision], {"switch": 1.0, "load_std_root": 0.5, "switch_hf": 0.1}, loads=loads)


def _parts() -> list[list[Tensor]]:
    """Logits of two micro-batches for each rank, the same in every process."""
    torch.manual_seed(3)
    return [[random_logits(1.0 + rank + part).detach() for part in range(2)] for rank in range(RANKS)]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    loads, accumulator = GlobalLoad(), StatsAccumulator()
    losses = []
    for z in _parts()[rank]:
        decision = decide(z)
        loads.add([decision])
        losses.append(routing_loss([decision], {"switch": 1.0}, loads=loads))
        accumulator.add(decision)
    (sums,) = read_sums([accumulator], across_ranks=True)
    assert sums is not None
    stats = accumulator.summarise(sums)
    assert stats is not None
    torch.save({"losses": losses, "load": stats.load, "tokens": stats.tokens}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_one_load(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=RANKS)
    parts = [[decide(z) for z in of_rank] for of_rank in _parts()]
    everything = [decision for of_rank in parts for decision in of_rank]
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        for part in range(2):
            f = _share(*(of_rank[i] for of_rank in parts for i in range(part + 1)))
            torch.testing.assert_close(found["losses"][part], switch_loss(parts[rank][part], f))
        assert found["load"] == pytest.approx(_share(*everything).tolist())
        assert found["tokens"] == T * 2 * RANKS
