"""Blocks of a process anywhere that NIXL reaches, by one-sided reads: RDMA where there is a network card for it.

The source registers its pool, header and generations and all, and has no part in what follows: the puller reads the
generations, the blocks, and the generations once more: a block that was given to another use meanwhile is stale. With
the generations it reads the pool's nonce, lest another pool at the same place answer for one that is gone.

A read that was given up may still be answered, by a peer that was stopped and goes on. So one agent serves one peer
alone; with the first read that fails the connection is lost, its agent is taken down, and only then the gate is left.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

from baton.errors import ConfigError, PeerLost, TransferRefused
from baton.ids import TransferId
from kvtransfer.gate import Gate
from kvtransfer.memory import GENERATION_BYTES, NONCE_BYTES, HostMemory, PoolMemory
from kvtransfer.transports.base import Fetched, Want, fetched, landed_right
from kvtransfer.transports.nixl_agent import NAME, NixlAgent, NixlFailed, Piece
from kvtransfer.transports.nixl_source import NixlPeer

__all__ = ["NAME", "NixlConnection"]

READ_SECONDS = 5.0
"""For one read: after so long without its end, the source is taken for lost."""
READ_BYTES = 4 << 20
"""Of one read at most, but for a block that is larger; between two, the gate is looked at."""
_FETCHES = 2  # at once


class NixlConnection:
    fetch_bytes = 16 << 20

    def __init__(self, peer: NixlPeer, memory: PoolMemory, executor: Executor, *, read_seconds: float) -> None:
        """For `connect` alone. Blocks; raises ConfigError where NIXL can't be used."""
        self._peer = peer
        self._memory = memory
        self._executor = executor
        self._seconds = read_seconds
        self.slots = asyncio.Semaphore(_FETCHES)
        self._agent = NixlAgent(serves=False)
        self._lock = threading.Lock()
        self._users = 0
        self._lost = False
        self._closed = False
        self._ending = False
        self._ended = threading.Event()
        self._safe = False
        """After `_ended`: the agent is gone for certain."""

    @classmethod
    async def connect(
        cls, address: bytes, memory: PoolMemory, executor: Executor, *, read_seconds: float = READ_SECONDS
    ) -> NixlConnection:
        """Raises TransferRefused where the address is none or the blocks differ in size, PeerLost where that pool does
        not answer."""
        peer = NixlPeer.parse(address)
        if peer.shape.block_bytes != memory.block_bytes:
            raise TransferRefused(
                f"the source's blocks have {peer.shape.block_bytes} bytes, this pool's {memory.block_bytes}"
            )

        def open_it() -> NixlConnection:
            try:
                connection = cls(peer, memory, executor, read_seconds=read_seconds)
            except ConfigError as error:  # which is for those who start a worker
                raise TransferRefused(error.message) from None
            connection._meet()
            return connection

        return await asyncio.get_running_loop().run_in_executor(executor, open_it)

    @property
    def alive(self) -> bool:
        """That a peer has gone is noticed by the next read."""
        return not (self._lost or self._closed)

    async def fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        num_blocks = self._peer.shape.num_blocks
        for want in wants:
            if not 0 <= want.source < num_blocks:
                raise TransferRefused(f"the source's pool has {num_blocks} blocks, not block {want.source}")
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._fetch, wants, gate)

    async def close(self) -> None:
        """Fetches under way run out; the last takes the agent down."""
        with self._lock:
            self._closed = True
            last = self._is_last()
        if last:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._end)

    # --- the agent's life

    def _meet(self) -> None:
        with self._using():
            if isinstance(self._memory, HostMemory):
                self._agent.register(self._memory.address, self._memory.shape.bytes)
            self._agent.meet(self._peer.metadata)
            self._generations([])

    @contextmanager
    def _using(self) -> Iterator[None]:
        """Around every use of the agent. With a failure the connection is lost, and nobody gets out before the agent's
        end."""
        with self._lock:
            if self._lost or self._closed:
                raise PeerLost("the connection to the source's memory is closed")
            self._users += 1
        try:
            yield
        except NixlFailed as error:
            self._lost = True
            raise PeerLost(f"the source's memory can't be read by NIXL: {error}") from None
        finally:
            with self._lock:
                self._users -= 1
                last = self._is_last()
            if last:
                self._end()
            elif self._lost:
                self._ended.wait()

    def _is_last(self) -> bool:
        """Whether the caller, in the lock, is to end the agent: True once."""
        if self._users or self._ending or not (self._lost or self._closed):
            return False
        self._ending = True
        return True

    def _end(self) -> None:
        try:
            self._safe = self._agent.destroy()
        finally:
            self._ended.set()

    # --- the bytes

    def _fetch(self, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        with gate.passing() as admitted:
            if not admitted:
                raise TransferRefused("the landing was given up")
            try:
                with self._using():
                    return self._read(wants, gate)
            finally:
                if self._ended.is_set() and not self._safe:
                    gate.stay()  # for ever: nobody can tell when these blocks may be used again

    def _read(self, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        if not wants:
            return []
        before, good = self._generations(wants), list[bool]()
        most = max(1, READ_BYTES // self._memory.block_bytes)
        for start in range(0, len(wants), most):
            if gate.closed:
                raise TransferRefused("the landing was given up")
            good += self._land(wants[start : start + most])
        after = self._generations(wants)
        return list(map(fetched, wants, before, after, good))

    def _generations(self, wants: Sequence[Want]) -> Sequence[int]:
        """The present ones of these blocks, of the pool that was offered and of no other."""
        address, shape = self._peer.address, self._peer.shape
        with self._agent.lend(NONCE_BYTES + GENERATION_BYTES * len(wants)) as scratch:
            places = range(scratch.address + NONCE_BYTES, scratch.address + len(scratch.view), GENERATION_BYTES)
            pieces = [Piece(scratch.address, address + shape.nonce, NONCE_BYTES)] + [
                Piece(place, address + shape.generation(want.source), GENERATION_BYTES)
                for place, want in zip(places, wants, strict=True)
            ]
            self._wait_for(pieces)
        if scratch.view[:NONCE_BYTES] != self._peer.nonce:
            raise NixlFailed("another pool is there than the one that was offered")
        return struct.unpack(f"<{len(wants)}Q", scratch.view[NONCE_BYTES:])

    def _land(self, wants: Sequence[Want]) -> list[bool]:
        """Which of them have the checksum that is wanted."""
        memory, size = self._memory, self._memory.block_bytes
        remote = [self._peer.address + self._peer.shape.block(want.source) for want in wants]
        if isinstance(memory, HostMemory):
            local = [memory.block_address(want.destination) for want in wants]
            self._wait_for([Piece(to, of, size) for to, of in zip(local, remote, strict=True)])
            return landed_right(memory, wants)
        with self._agent.lend(size * len(wants)) as scratch:
            local = [scratch.address + size * at for at in range(len(wants))]
            self._wait_for([Piece(to, of, size) for to, of in zip(local, remote, strict=True)])
        for at, want in enumerate(wants):
            memory.write(want.destination, scratch.view[size * at : size * (at + 1)])
        return landed_right(memory, wants)

    def _wait_for(self, pieces: Sequence[Piece]) -> None:
        self._agent.read(pieces, self._seconds, lambda: self._lost)
