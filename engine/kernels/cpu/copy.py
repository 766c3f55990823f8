"""Blocks from one pool in host memory to another, with their checksums, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.kernels.cpu.library import Kernel


class BlockCopier:
    """Thread-safe; without the interpreter lock while it copies."""

    def __init__(self, kernel: Kernel) -> None:
        self._copy = kernel.library.baton_copy_and_sum
        self._least: int = kernel.library.baton_copy_least()
        self._isa = int(kernel.isa)

    def takes(self, block_bytes: int) -> bool:
        """Shorter blocks have another checksum than is computed here."""
        return block_bytes >= self._least

    def __call__(
        self,
        source: memoryview,
        target: memoryview,
        block_bytes: int,
        pairs: Sequence[tuple[int, int]],
        *,
        summed: bool,
    ) -> list[int]:
        """Copies blocks from the first place, in `source`, to the second, in `target`. Returns the XXH3-64 of each as it
        was written; without `summed`, nothing."""
        assert self.takes(block_bytes), f"blocks of {block_bytes} bytes; at least {self._least}"
        places = np.array(pairs, np.int64).reshape(-1, 2)
        for pool, of_pool in ((source, places[:, 0]), (target, places[:, 1])):
            inside = (of_pool >= 0) & ((of_pool + 1) * block_bytes <= len(pool))
            assert inside.all(), f"blocks {of_pool[~inside]} are not in a pool of {len(pool)} bytes"
        sums = np.empty(len(places) if summed else 0, np.uint64)
        data, into = np.frombuffer(source, np.uint8), np.frombuffer(target, np.uint8)
        self._copy(
            data.ctypes.data,
            into.ctypes.data,
            block_bytes,
            places.ctypes.data,
            len(places),
            sums.ctypes.data if summed else None,
            self._isa,
        )
        return [int(checksum) for checksum in sums]
