"""Steps of the same shape, recorded once and replayed: one launch instead of hundreds, which a host cannot issue as
fast as a GPU carries them out.

A graph repeats what it has recorded with the addresses that it has seen. So whatever a step reads and writes lies in
buffers that stay, one set a bucket, and a batch is filled up to the next bucket's size with rows that do nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

from engine.device import Device, Graph

Buffers = TypeVar("Buffers")


def bucket_sizes(most: int) -> tuple[int, ...]:
    """Ascending up to `most`. Steps of an eighth, at least 8 from 8 on: a decode's time depends on the batch little
    enough that no more than that is wasted on padding, and each graph takes memory and time to record."""
    sizes = [size for size in (1, 2, 4, 8) if size < most]
    while sizes and sizes[-1] >= 8 and (after := sizes[-1] + max(8, sizes[-1] // 8 // 8 * 8)) < most:
        sizes.append(after)
    return (*sizes, most)


class Graphs(Generic[Buffers]):
    """Of one step function, one a bucket."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._recorded: dict[int, tuple[Buffers, Graph]] = {}

    def record(
        self, device: Device, buffers: Callable[[int], Buffers], body: Callable[[Buffers], None]
    ) -> Iterator[int]:
        """Yields each size behind its recording. The largest first: smaller ones then find memory that it has left."""
        for size in reversed(self.sizes):
            own = buffers(size)
            body(own)
            self._recorded[size] = own, device.capture(partial(body, own))
            yield size

    def fitting(self, num_rows: int) -> tuple[int, Buffers, Graph] | None:
        """The smallest that takes so many rows; None: there is none, and the step is to be run without."""
        at = bisect.bisect_left(self.sizes, num_rows)
        if at == len(self.sizes) or self.sizes[at] not in self._recorded:
            return None
        return (self.sizes[at], *self._recorded[self.sizes[at]])
