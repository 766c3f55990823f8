"""Where the blocks of one pull arrive: at once in the pool, or in staging, to be re-laid once they are verified.

    room ──► fetched, and verified in the arrival's memory ──► settle

Bytes of another layout reach the pool only when they are verified. Those of the same layout are there before, in blocks
that nobody reads until they are committed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

from baton.errors import LayoutMismatch, TransferRefused
from baton.ids import WorkerId
from baton.layout import KVLayout, differences, rounds
from kvtransfer.gate import Gate
from kvtransfer.memory import PoolMemory
from kvtransfer.relayout import Relayout, Share, shares
from kvtransfer.reservation import Reservation
from kvtransfer.staging import Staging, Stagings
from kvtransfer.threads import Threads
from kvtransfer.ticket import Ticket
from kvtransfer.transports.chooser import Connector

log = logging.getLogger(__name__)

_MAX_NOTED = 1024


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


class Arrivals:
    """Of one puller: how the blocks of each source arrive. Owns the connections and the stagings."""

    def __init__(
        self, memory: PoolMemory, layout: KVLayout, worker_id: WorkerId, connector: Connector, threads: Threads
    ) -> None:
        self._memory = memory
        self._layout = layout
        self._worker_id = worker_id
        self._connector = connector
        self._threads = threads
        self._stagings = Stagings(connector)
        self._relaid_from: set[tuple[WorkerId, bytes]] = set()

    def shares(self, tickets: Sequence[Ticket]) -> list[Share]:
        """What each gives. Raises LayoutMismatch."""
        try:
            return shares([ticket.layout for ticket in tickets], self._layout)
        except LayoutMismatch as error:
            sources = ", ".join(f"{ticket.worker_id} at {ticket.address}" for ticket in tickets)
            raise LayoutMismatch(f"{self._worker_id} can't use the blocks of {sources}: {error.message}") from None

    @asynccontextmanager
    async def arrival(
        self, share: Share, ticket: Ticket, reservation: Reservation, gate: Gate, lock: Lock
    ) -> AsyncIterator[Arrival]:
        """Of one pull. `gate` and `lock` are the landing's. Raises TransferRefused where there is no staging for it."""
        places = [int(block.index) for block in reservation.blocks]
        if share.as_it_is:
            yield InPlace(self._memory, self._connector, places, reservation.first_missing, gate)
            return
        relayout = Relayout(share, self._memory, places, reservation.first_missing, ticket.num_tokens, lock)
        async with self._stagings.use(share.source) as staging:
            self._note_relaying(ticket)
            yield Relaid(relayout, staging, gate, self._threads)

    async def sweep(self) -> None:
        """Lets go of sources that died, whose memory a mapping would keep."""
        await self._connector.sweep()
        await self._stagings.sweep()

    async def close(self) -> None:
        await self._connector.close()
        await self._stagings.close()

    def _note_relaying(self, ticket: Ticket) -> None:
        """Once a source: what is done to its blocks, and what that costs in exactness."""
        source = (ticket.worker_id, ticket.layout.fingerprint)
        if source in self._relaid_from:
            return
        if len(self._relaid_from) >= _MAX_NOTED:
            self._relaid_from.clear()
        self._relaid_from.add(source)
        rounding = rounds(ticket.layout, self._layout)
        log.warning(
            "blocks of %s at %s are re-laid on their way in: %s%s",
            ticket.worker_id, ticket.address, differences(ticket.layout, self._layout),
            f"; values are rounded to {self._layout.dtype}" if rounding else "; no value changes",
        )  # fmt: skip
