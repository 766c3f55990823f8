"""The checksum by which a landed block is compared with the one that was sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from kvtransfer.memory import PoolMemory

PIECE_BYTES = 256 << 10
"""What is moved before it is summed: a part of a core's own cache, in which it is found again."""


class Checksum:
    """XXH3-64 over one block's bytes as they come, an unsigned 64-bit number. It guards against mishaps, not against
    forgery."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, data: bytes | memoryview) -> None:
        self._state.update(data)

    def result(self) -> int:
        return int(self._state.intdigest())


def block_checksum(data: bytes | memoryview) -> int:
    """Of a whole block at once."""
    return int(xxhash.xxh3_64_intdigest(data))


def pool_checksums(memory: PoolMemory, indices: Sequence[int]) -> list[int]:
    """Checksums of the blocks at `indices`, in their order. Reads the memory: for threads, inside a gate."""
    return [block_checksum(memory.read(index)) for index in indices]


def copy(data: memoryview, target: memoryview) -> None:
    """numpy copies as fast as memcpy and without the interpreter lock, which a memoryview's assignment keeps."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))


def copy_and_sum(data: memoryview, target: memoryview) -> int:
    """Copies a block and returns the checksum of the copy."""
    checksum = Checksum()
    for start in range(0, len(data), PIECE_BYTES):
        piece = target[start : start + PIECE_BYTES]
        copy(data[start : start + PIECE_BYTES], piece)
        checksum.add(piece)
    return checksum.result()
