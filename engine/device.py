"""What runs behind the host: a queue of operations, marks in it, and recordings of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place in the queue."""

    def wait(self) -> None:
        """Until the device has come there. Others may hold the interpreter meanwhile."""

    def seconds_since(self, earlier: Mark) -> float:
        """Of the device's time. Both have been waited for."""


class Graph(Protocol):
    def replay(self) -> None:
        """Queues what was recorded."""


class Device(Protocol):
    def mark(self) -> Mark: ...

    def pinned(self, *shape: int) -> Tensor:
        """Zeros, int64, in host memory that the device reads and writes by itself."""

    def capture(self, body: Callable[[], None]) -> Graph:
        """Records what `body` queues. It has been called before, so that nothing is set up for the first time in it."""


class Cuda:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def mark(self) -> CudaMark:
        return CudaMark()

    def pinned(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, pin_memory=True)

    def capture(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            body()
        return graph


class CudaMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch gives it no types
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, CudaMark), "marks of two devices"
        return float(earlier._event.elapsed_time(self._event)) / 1000
