"""Blocks of a process on the same host, read from its memory directly.

The puller maps the source's pool for reading and copies. The source has no part in it and learns of it by the release
alone, so each copy is framed by two looks at the generations: a block that was given to another use meanwhile is stale.
"""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from baton.errors import TransferRefused
from baton.ids import TransferId
from kvtransfer.checksum import Copier, copy_blocks
from kvtransfer.gate import Gate
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.transports.base import Endpoint, Fetched, Want, copied_right, fetched, landed_right, runs

NAME = "shm"
_ADDRESS = struct.Struct("<HxxIII16s16s")  # version, pid, fd, uid, boot id, nonce
_VERSION = 1
GROUP_BYTES = 8 << 20
"""Copied in one go; then the gate is looked at."""
_FETCHES = 2  # at once: more threads copy no faster
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def shm_endpoint(memory: HostMemory) -> Endpoint:
    """Where others on this host find `memory`."""
    address = _ADDRESS.pack(_VERSION, os.getpid(), memory.fd, os.getuid(), _boot_id(), memory.nonce)
    return Endpoint(NAME, address)


class Neighbour:
    """A process of this host whose shared memory is mapped here."""

    def __init__(self, address: bytes) -> None:
        """Maps the memory that `shm_endpoint` tells of. Raises TransferRefused where it can't be reached from here:
        another host or user, or the process is gone."""
        if len(address) != _ADDRESS.size:
            raise TransferRefused(f"a shm address has {_ADDRESS.size} bytes, not {len(address)}")
        version, pid, fd, uid, boot_id, nonce = _ADDRESS.unpack(address)
        if version != _VERSION:
            raise TransferRefused(f"the shm address has version {version}, not {_VERSION}")
        if boot_id != _boot_id():
            raise TransferRefused("the source runs on another host")
        if uid != os.getuid() and os.getuid() != 0:
            raise TransferRefused(f"the source runs as user {uid}, this process as {os.getuid()}")
        self._pid = pid
        self._started = _start_time(pid)
        self.memory = HostMemory.attach(pid, fd, nonce)

    @property
    def alive(self) -> bool:
        """A mapping keeps a dead process's memory, so this is to be asked now and then."""
        return self._started is not None and _start_time(self._pid) == self._started


class ShmConnection:
    fetch_bytes = 8 << 20

    def __init__(self, source: Neighbour, memory: PoolMemory, executor: Executor, copier: Copier) -> None:
        """For `connect` alone."""
        self._source: Neighbour | None = source
        self._memory = memory
        self._executor = executor
        self._copier = copier
        self.slots = asyncio.Semaphore(_FETCHES)

    @classmethod
    async def connect(
        cls, address: bytes, memory: PoolMemory, executor: Executor, copier: Copier = copy_blocks
    ) -> ShmConnection:
        """Raises TransferRefused where the source's memory can't be reached from here."""
        source = await asyncio.get_running_loop().run_in_executor(executor, Neighbour, address)
        if source.memory.block_bytes != memory.block_bytes:
            raise TransferRefused(
                f"the source's blocks have {source.memory.block_bytes} bytes, this pool's {memory.block_bytes}"
            )
        return cls(source, memory, executor, copier)

    @property
    def alive(self) -> bool:
        return self._source is not None and self._source.alive

    async def fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        if self._source is None:
            raise TransferRefused("the connection to the source's memory is closed")
        source = self._source.memory
        for want in wants:
            if not 0 <= want.source < source.num_blocks:
                raise TransferRefused(f"the source's pool has {source.num_blocks} blocks, not block {want.source}")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._copy, source, wants, gate)

    async def close(self) -> None:
        self._source = None  # unmapped when the last copy under way has ended

    def _copy(self, source: HostMemory, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        results: list[Fetched] = []
        most = max(1, GROUP_BYTES // source.block_bytes)
        for start in range(0, len(wants), most):
            group = wants[start : start + most]
            with gate.passing() as admitted:
                if not admitted:
                    raise TransferRefused("the landing was given up")
                before = [source.generation(want.source) for want in group]
                good = self._copy_group(source, group)
                after = [source.generation(want.source) for want in group]
            results += map(fetched, group, before, after, good)
        return results

    def _copy_group(self, source: HostMemory, wants: Sequence[Want]) -> Sequence[bool]:
        """Which of them have landed with the checksum that is wanted."""
        if isinstance(self._memory, HostMemory):
            return copied_right(partial(self._copier, source.blocks, self._memory.blocks, source.block_bytes), wants)
        pairs = [(want.source, want.destination) for want in wants]
        for first, destination, count in runs(pairs):
            self._memory.write(destination, source.view(first, count))
        return landed_right(self._memory, wants)


def _boot_id() -> bytes:
    """Names this boot of this kernel, in 16 bytes; zeros where the kernel does not tell."""
    try:
        return bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", ""))[:16].ljust(16, b"\0")
    except (OSError, ValueError):
        return bytes(16)


def _start_time(pid: int) -> str | None:
    """When the process began, by which it is told from a later one of the same id; None where there is none."""
    try:
        # behind the command's name, which is in parentheses and may hold anything, the 20th field
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
