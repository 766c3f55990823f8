"""The checksum by which a landed block is compared with the one that was sent."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from kvtransfer.memory import PoolMemory


def block_checksum(data: bytes | memoryview) -> int:
    """XXH3-64 over one block's bytes, an unsigned 64-bit number. It guards against mishaps, not against forgery."""
    return int(xxhash.xxh3_64_intdigest(data))


def pool_checksums(memory: PoolMemory, indices: Sequence[int]) -> list[int]:
    """Checksums of the blocks at `indices`, in their order. Reads the memory: for threads, inside a gate."""
    return [block_checksum(memory.read(index)) for index in indices]
