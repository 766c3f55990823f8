"""How blocks are copied on this machine: compiled, where that can be had."""

from __future__ import annotations

from engine.kernels.cpu.copy import BlockCopier
from engine.kernels.cpu.library import load_kernel
from kvtransfer.checksum import Copier, copy_blocks
from kvtransfer.memory import HostMemory, PoolMemory


def block_copier(memory: PoolMemory) -> Copier:
    """For pulls into `memory`."""
    kernel = load_kernel() if isinstance(memory, HostMemory) else None
    if kernel is None:
        return copy_blocks
    copier = BlockCopier(kernel)
    return copier if copier.takes(memory.block_bytes) else copy_blocks
