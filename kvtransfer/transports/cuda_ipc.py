"""Blocks of a process on the same host and the same GPU, copied within the device.

The source gives out a handle of CUDA's for its pool; the puller maps it and copies, and the source has no part in it.
Its generations lie in memory that is shared as that of shm is, nonce and all, and each copy is framed by two looks at
them. What holds of shm holds here: the source does not check what is read, nor know when.

Knows no CUDA: the pool's own class copies and maps (`DevicePool`). Nothing of an address is trusted or unpickled: its
fields have fixed sizes, and who gave it is proven by memory that only such a process can have.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from baton.errors import TransferRefused
from baton.ids import TransferId
from kvtransfer.gate import Gate
from kvtransfer.memory import HostMemory, PoolMemory, PoolShape
from kvtransfer.transports.base import Endpoint, Fetched, Want, copied_right, fetched
from kvtransfer.transports.shm import Neighbour, shm_endpoint

NAME = "cuda_ipc"
HANDLE_BYTES = 64
UUID_BYTES = 16
COPY_BYTES = 64 << 20
"""Of one copy at most, but for a block that is larger; between two, the gate is looked at."""
_ADDRESS = struct.Struct("<Hxxxxxx16s64sQQQ")  # version, device, handle, offset, num_blocks, block_bytes; then shm's
_VERSION = 1
_FETCHES = 2  # at once


class DeviceHandle(NamedTuple):
    """By which another process maps a pool in device memory."""

    device_uuid: bytes
    handle: bytes
    """CUDA's, of the allocation that the pool lies in."""
    offset: int
    """In bytes, of the pool in that."""


class PeerBlocks(ABC):
    """Another process's pool, mapped here."""

    @abstractmethod
    def copy(self, pairs: Sequence[tuple[int, int]], *, summed: bool) -> list[int]:
        """Copies blocks from the first place, in its pool, to the second, in ours. When it returns, they are there.
        Returns the checksum of each as it was written, by our pool's kind; without `summed`, nothing."""

    @abstractmethod
    def close(self) -> None:
        """Unmaps it. No copy may be under way."""


class DevicePool(ABC):
    """A PoolMemory of a device. Thread-safe, as that is."""

    @property
    @abstractmethod
    def shared_generations(self) -> HostMemory:
        """Where its generations are, for others of this host to read; of its blocks there are none in it."""

    @abstractmethod
    def export(self) -> DeviceHandle | None:
        """None where the device can't give it to others."""

    @abstractmethod
    def map_peer(self, handle: DeviceHandle, shape: PoolShape) -> PeerBlocks:
        """Raises TransferRefused where it is of another device or can't be mapped."""


def cuda_ipc_endpoint(memory: PoolMemory) -> Endpoint | None:
    """Where others on this host and device find `memory`; None where they can't."""
    if not isinstance(memory, DevicePool):
        return None
    handle = memory.export()
    if handle is None:
        return None
    head = _ADDRESS.pack(_VERSION, *handle, memory.num_blocks, memory.block_bytes)
    return Endpoint(NAME, head + shm_endpoint(memory.shared_generations).address)


class CudaIpcConnection:
    fetch_bytes = 128 << 20

    def __init__(self, source: Neighbour, blocks: PeerBlocks, memory: PoolMemory, executor: Executor) -> None:
        """For `connect` alone."""
        self._source = source
        self._blocks: PeerBlocks | None = blocks
        self._memory = memory
        self._executor = executor
        self.slots = asyncio.Semaphore(_FETCHES)
        self._users = 0

    @classmethod
    async def connect(cls, address: bytes, memory: PoolMemory, executor: Executor) -> CudaIpcConnection:
        """Raises TransferRefused where the source's memory can't be reached from here."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(executor, cls._open, address, memory, executor)

    @classmethod
    def _open(cls, address: bytes, memory: PoolMemory, executor: Executor) -> CudaIpcConnection:
        if not isinstance(memory, DevicePool):
            raise TransferRefused("this worker's pool is not in device memory")
        if len(address) <= _ADDRESS.size:
            raise TransferRefused(f"a cuda_ipc address has more than {_ADDRESS.size} bytes, not {len(address)}")
        version, uuid, handle, offset, num_blocks, block_bytes = _ADDRESS.unpack_from(address)
        if version != _VERSION:
            raise TransferRefused(f"the cuda_ipc address has version {version}, not {_VERSION}")
        shape = PoolShape(num_blocks, block_bytes)
        shape.check("the cuda_ipc address")
        if block_bytes != memory.block_bytes:
            raise TransferRefused(f"the source's blocks have {block_bytes} bytes, this pool's {memory.block_bytes}")
        source = Neighbour(address[_ADDRESS.size :])  # before anything of the rest is used: it proves whose it is
        if source.memory.num_blocks != num_blocks:
            raise TransferRefused(f"the source has {source.memory.num_blocks} generations for {num_blocks} blocks")
        return cls(source, memory.map_peer(DeviceHandle(uuid, handle, offset), shape), memory, executor)

    @property
    def alive(self) -> bool:
        return self._blocks is not None and self._source.alive

    async def fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        blocks, num_blocks = self._blocks, self._source.memory.num_blocks
        if blocks is None:
            raise TransferRefused("the connection to the source's memory is closed")
        for want in wants:
            if not 0 <= want.source < num_blocks:
                raise TransferRefused(f"the source's pool has {num_blocks} blocks, not block {want.source}")
        self._users += 1
        loop = asyncio.get_running_loop()
        copying = loop.run_in_executor(self._executor, self._copy, blocks, wants, gate)
        copying.add_done_callback(lambda _: self._leave(blocks))
        return await asyncio.shield(copying)

    async def close(self) -> None:
        """Unmapped when the last copy under way has ended."""
        blocks, self._blocks = self._blocks, None
        if blocks is not None and not self._users:
            await asyncio.get_running_loop().run_in_executor(self._executor, blocks.close)

    def _leave(self, blocks: PeerBlocks) -> None:
        self._users -= 1
        if self._blocks is None and not self._users:
            with contextlib.suppress(RuntimeError):  # the threads have ended with the process
                self._executor.submit(blocks.close)

    def _copy(self, blocks: PeerBlocks, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        results: list[Fetched] = []
        for group in self._groups(wants):
            with gate.passing() as admitted:
                if not admitted:
                    raise TransferRefused("the landing was given up")
                before = [self._source.memory.generation(want.source) for want in group]
                good = copied_right(blocks.copy, group)
                after = [self._source.memory.generation(want.source) for want in group]
                results += map(fetched, group, before, after, good)
        return results

    def _groups(self, wants: Sequence[Want]) -> Iterator[Sequence[Want]]:
        most = max(1, COPY_BYTES // self._memory.block_bytes)
        for start in range(0, len(wants), most):
            yield wants[start : start + most]
