"""How blocks are copied on this machine: compiled, where that can be had."""

from __future__ import annotations

from collections.abc import Sequence

from engine.kernels.cpu.copy import BlockCopier
from engine.kernels.cpu.library import load_kernel
from kvtransfer.checksum import Copier, copy_blocks
from kvtransfer.memory import HostMemory, PoolMemory


def block_copier(memory: PoolMemory) -> Copier:
    """For pulls into `memory`, and into the staging of blocks of another layout, of whatever size those are."""
    kernel = load_kernel() if isinstance(memory, HostMemory) else None
    return copy_blocks if kernel is None else _Compiled(BlockCopier(kernel))


class _Compiled:
    def __init__(self, copier: BlockCopier) -> None:
        self._copier = copier

    def __call__(
        self,
        source: memoryview,
        target: memoryview,
        block_bytes: int,
        pairs: Sequence[tuple[int, int]],
        *,
        summed: bool,
    ) -> list[int]:
        copy: Copier = self._copier if block_bytes >= self._copier.least else copy_blocks
        return copy(source, target, block_bytes, pairs, summed=summed)
