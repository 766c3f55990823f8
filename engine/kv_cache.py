"""The KV pool's memory: one tensor, block-major; and swap slots of the same form in host memory. Which block holds what
is the block pool's to know, not ours."""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

from baton.errors import ConfigError
from baton.layout import KVLayout
from engine.memory import MemoryRoom
from engine.plan import Move, MoveKind


class KVCache:
    """`tensor` is `[num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]`, contiguous."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device | str = "cpu",
        buffer: memoryview | None = None,
        num_swap_slots: int = 0,
    ) -> None:
        """Memory of its own on `device`, or, on a CPU, the writable `buffer` of at least `num_blocks` blocks."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        shape = (num_blocks, *layout.block_shape)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        self._swap = _swap_space((num_swap_slots, *layout.block_shape), dtype, self.device)
        if buffer is None:
            self.tensor = torch.zeros(shape, dtype=dtype, device=self.device)
            return
        needed = num_blocks * layout.block_bytes
        assert self.device.type == "cpu", f"a host buffer cannot be the pool of {self.device}"
        assert buffer.nbytes >= needed, f"buffer of {buffer.nbytes} bytes for {num_blocks} blocks of {needed} bytes"
        self.tensor = torch.frombuffer(buffer, dtype=dtype, count=self.tensor_elements).view(shape)

    @property
    def tensor_elements(self) -> int:
        elements = self.num_blocks
        for size in self.layout.block_shape:
            elements *= size
        return elements

    def move(self, move: Move) -> None:
        """Copies a whole block, as one of the device's operations: the host does not wait for it, nor touch swap slots
        itself."""
        source = self._swap if move.kind is MoveKind.SWAP_IN else self.tensor
        target = self._swap if move.kind is MoveKind.SWAP_OUT else self.tensor
        target[move.target].copy_(source[move.source], non_blocking=True)

    def poison(self, index: int) -> None:
        """Fills a block with NaN, so that a test sees whoever reads it."""
        self.tensor[index].fill_(float("nan"))

    @property
    def blocks(self) -> Tensor:
        """Their bytes, `[num_blocks, layout.block_bytes]` uint8: a view."""
        return self.tensor.view(self.num_blocks, -1).view(torch.uint8)

    def bytes_of(self, index: int, count: int = 1) -> Tensor:
        """Those of neighbouring blocks, `[count * layout.block_bytes]` uint8: a view."""
        return self.blocks[index : index + count].view(-1)


def _swap_space(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """In host memory, of any content. What nobody has touched costs nothing, but where a device is to reach it."""
    if device.type == "cuda" or not shape[0]:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda" and shape[0] > 0)
    # Not torch.zeros, which writes all its pages, nor torch.empty, which may come with pages that others have left.
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def choose_num_blocks(layout: KVLayout, wanted: int, *, max_num_seqs: int, max_model_len: int, room: MemoryRoom) -> int:
    """`wanted`, or, where that is 0, as many blocks as `max_num_seqs` of full length need, within what memory allows.

    Raises ConfigError where those that are wanted do not fit, or not even one.
    """
    if wanted:
        if wanted * layout.block_bytes > room.left:
            raise ConfigError(
                f"{wanted} KV blocks take {wanted * layout.block_bytes >> 20} MiB, and {room.left >> 20} MiB of memory "
                f"are left on {room.device}; give at most --kv-blocks={room.left // layout.block_bytes}"
            )
        return wanted
    if room.for_pool < layout.block_bytes:
        raise ConfigError(
            f"{max(0, room.for_pool) >> 20} MiB of memory are left for the KV pool on {room.device}, and one block "
            f"takes {layout.block_bytes} bytes{room.advice}"
        )
    return min(max_num_seqs * -(-max_model_len // layout.block_size), room.for_pool // layout.block_bytes)
