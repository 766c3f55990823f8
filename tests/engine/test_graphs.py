"""Which batch sizes are recorded, and what a recording may depend on."""

from __future__ import annotations

import pytest
import torch

from engine.graphs import Graphs, bucket_sizes
from tests.engine.fake_device import FakeDevice


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (9, (1, 2, 4, 8, 9)),
        (32, (1, 2, 4, 8, 16, 24, 32)),
        (256, (1, 2, 4, 8, *range(16, 129, 8), *range(144, 193, 16), 216, 240, 256)),
    ],
)
def test_buckets_waste_an_eighth_at_most(most: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(most) == sizes


def test_a_batch_gets_the_smallest_graph_that_takes_it() -> None:
    graphs: Graphs[torch.Tensor] = Graphs((1, 4, 8))
    assert graphs.fitting(1) is None, "nothing is recorded yet"
    assert list(graphs.record(FakeDevice(), torch.zeros, lambda buffers: None)) == [8, 4, 1]
    assert [found[0] if (found := graphs.fitting(n)) else None for n in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, None]


def test_a_replay_reads_and_writes_the_buffers_of_its_size() -> None:
    graphs: Graphs[torch.Tensor] = Graphs((2, 3))

    def step(buffers: torch.Tensor) -> None:
        buffers.add_(1).mul_(2)

    assert list(graphs.record(FakeDevice(), torch.zeros, step)) == [3, 2]
    for size in (2, 3):
        found = graphs.fitting(size)
        assert found is not None
        _, buffers, graph = found
        buffers.fill_(5)
        graph.replay()
        assert buffers.tolist() == [12] * size


def test_the_fake_device_catches_a_host_that_waits_while_it_records() -> None:
    with pytest.raises(AssertionError, match="the host waits"):
        FakeDevice().capture(lambda: print(torch.ones(1).sum().item()))
