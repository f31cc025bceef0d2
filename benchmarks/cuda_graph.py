"""A step recorded into a CUDA graph, as decoding runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Return the replay of ``run``; what it returned stays alive, for the graph writes there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
