"""Where the blocks of one pull arrive: at once in the pool, or in staging, to be re-laid once they are verified.

    room ──► fetched, and verified in the arrival's memory ──► settle

Bytes of another layout reach the pool only when they are verified. Those of the same layout are there before, in blocks
that nobody reads until they are committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from baton.errors import TransferRefused
from kvtransfer.gate import Gate
from kvtransfer.memory import PoolMemory
from kvtransfer.relayout import Relayout
from kvtransfer.staging import Staging
from kvtransfer.threads import Threads
from kvtransfer.transports.chooser import Connector


@dataclass(frozen=True, slots=True)
class Room:
    """For one fetch."""

    places: Mapping[int, int]
    """By position in the ticket: which block of the arrival's memory is to be filled."""
    gate: Gate
    """Every writer to these blocks passes through it."""


class Arrival(Protocol):
    @property
    def memory(self) -> PoolMemory:
        """Its blocks have the size of the source's."""

    @property
    def connector(self) -> Connector:
        """Whose connections write to `memory`."""

    @property
    def first_block(self) -> int:
        """Position in the ticket of the first block that is needed."""

    def room(self, positions: Sequence[int]) -> AbstractAsyncContextManager[Room]:
        """Waits for room, which it takes back on leaving: what has not settled by then is lost."""

    async def settle(self, room: Room, positions: Sequence[int]) -> None:
        """What came at these positions is verified: the pool may have it. Raises a HandoffFailed."""


@dataclass(frozen=True, slots=True)
class InPlace:
    """Of blocks that the source lays out as this worker does."""

    memory: PoolMemory
    connector: Connector
    destination: Sequence[int]
    first_block: int
    gate: Gate
    """The landing's."""

    @asynccontextmanager
    async def room(self, positions: Sequence[int]) -> AsyncIterator[Room]:
        yield Room({position: self.destination[position] for position in positions}, self.gate)

    async def settle(self, room: Room, positions: Sequence[int]) -> None:
        """They are where they belong."""


class Relaid:
    """Of blocks of another layout."""

    def __init__(self, relayout: Relayout, staging: Staging, gate: Gate, threads: Threads) -> None:
        """`gate` is the landing's."""
        self.memory: PoolMemory = staging.memory
        self.connector = staging.connector
        self.first_block = relayout.first_block
        self._relayout = relayout
        self._staging = staging
        self._gate = gate
        self._threads = threads

    @asynccontextmanager
    async def room(self, positions: Sequence[int]) -> AsyncIterator[Room]:
        async with self._staging.slots(len(positions)) as (slots, gate):
            yield Room(dict(zip(positions, slots, strict=True)), gate)

    async def settle(self, room: Room, positions: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads.memory, self._relay, room, positions)

    def _relay(self, room: Room, positions: Sequence[int]) -> None:
        # Both gates on this thread: one that is cancelled before it begins has entered neither, and one that has begun
        # keeps its slots until it is done.
        with room.gate.passing() as lent, self._gate.passing() as admitted:
            if not (lent and admitted):
                raise TransferRefused("the landing was given up")
            self._relayout.relay({position: self.memory.read(room.places[position]) for position in positions})
