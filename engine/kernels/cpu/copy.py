"""Blocks from one pool in host memory to another, with their checksums, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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
        """Copies blocks from the first place, in `source`, to the second, in `target`. Returns the XXH3-64 of each as
        it was written; without `summed`, nothing."""
        assert self.takes(block_bytes), f"blocks of {block_bytes} bytes; at least {self._least}"
        places = np.array(pairs, np.int64)
        sums = np.empty(len(pairs) if summed else 0, np.uint64)
        copied = self._copy(
            _address(np.frombuffer(source, np.uint8)),
            len(source) // block_bytes,
            _address(np.frombuffer(target, np.uint8)),
            len(target) // block_bytes,
            block_bytes,
            _address(places),
            len(pairs),
            _address(sums) if summed else None,
            self._isa,
        )
        assert copied == len(pairs), f"{pairs[copied]} is not in a pool of {len(source)} and one of {len(target)} bytes"
        return [int(checksum) for checksum in sums]


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
