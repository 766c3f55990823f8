"""A pool that the host can't reach, as one in device memory: no views, only copies, and blocks that it sums itself.
Another process maps it as it would map a device's; so what cuda_ipc does is seen without a device."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence

from baton.errors import TransferRefused
from kvtransfer.checksum import ChecksumKind
from kvtransfer.memory import HostMemory, PoolShape
from kvtransfer.transports.cuda_ipc import HANDLE_BYTES, DeviceHandle, DevicePool, PeerBlocks

DEVICE = b"a device of ours"
_HANDLE = struct.Struct("<II16s")  # pid, fd, nonce


class StagedMemory(DevicePool):
    """`on_read` and `on_write` let a test act in the middle of a transfer; they are told the block's place. What is
    summed is not read."""

    def __init__(self, memory: HostMemory, device: bytes = DEVICE, kind: ChecksumKind = ChecksumKind.NH) -> None:
        self.memory = memory
        self.device = device
        self.checksum_kind = kind
        self.on_read: Callable[[int], None] = lambda index: None
        self.on_write: Callable[[int], None] = lambda index: None
        self.mapped: list[Mapped] = []

    @property
    def num_blocks(self) -> int:
        return self.memory.num_blocks

    @property
    def block_bytes(self) -> int:
        return self.memory.block_bytes

    def generation(self, index: int) -> int:
        return self.memory.generation(index)

    def view(self, index: int, count: int = 1) -> memoryview | None:
        return None

    def read(self, index: int, count: int = 1) -> memoryview:
        data = memoryview(bytes(self.memory.read(index, count)))
        for read in range(index, index + count):
            self.on_read(read)
        return data

    def write(self, index: int, data: memoryview) -> None:
        self.on_write(index)
        self.memory.write(index, data)

    def checksums(self, indices: Sequence[int]) -> list[int]:
        return [self.checksum_kind.of(self.memory.view(index)) for index in indices]

    @property
    def shared_generations(self) -> HostMemory:
        return self.memory

    def export(self) -> DeviceHandle | None:
        handle = _HANDLE.pack(os.getpid(), self.memory.fd, self.memory.nonce)
        return DeviceHandle(self.device, handle.ljust(HANDLE_BYTES, b"\0"), 0)

    def map_peer(self, handle: DeviceHandle, shape: PoolShape) -> PeerBlocks:
        if handle.device_uuid != self.device:
            raise TransferRefused("the source's pool is on another GPU")
        peer = HostMemory.attach(*_HANDLE.unpack_from(handle.handle))
        assert peer.shape == shape
        mapped = Mapped(self, peer)
        self.mapped.append(mapped)
        return mapped


class Mapped(PeerBlocks):
    def __init__(self, memory: StagedMemory, peer: HostMemory) -> None:
        self._memory = memory
        self._peer = peer
        self.closed = False

    def copy(self, pairs: Sequence[tuple[int, int]], *, summed: bool) -> list[int]:
        assert not self.closed
        for source, destination in pairs:
            self._memory.write(destination, self._peer.view(source))
            assert not self.closed, "unmapped in the middle of a copy"
        return self._memory.checksums([destination for _, destination in pairs]) if summed else []

    def close(self) -> None:
        self.closed = True
