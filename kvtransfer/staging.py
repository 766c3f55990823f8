"""Where blocks of another layout land, and are verified, before they are re-laid into the pool.

Owned by the event loop. A staging has a bounded number of slots of one size, lent to one fetch at a time, and the
connections that bring blocks into them. A slot is lent again only when nobody can write to it any more, which its
lending's own gate tells: a fetch that was given up harms neither the pool's blocks nor the next fetch.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from baton.errors import TransferRefused
from baton.layout import KVLayout
from kvtransfer.gate import Gate
from kvtransfer.memory import HostMemory
from kvtransfer.transports.base import MAX_FETCH_BLOCKS
from kvtransfer.transports.chooser import Connector

log = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
"""Of one staging: a full fetch for each that a transport makes at once. Taken as it is first used."""
_MAX_SLOTS = 2 * MAX_FETCH_BLOCKS
MAX_STAGINGS = 4
"""Sizes of foreign blocks that are staged at once."""


class Staging:
    def __init__(self, block_bytes: int, connector: Connector) -> None:
        """Of blocks of at most STAGING_BYTES. `connector` is the pool's: here is another like it."""
        self.memory = HostMemory.create(min(STAGING_BYTES // block_bytes, _MAX_SLOTS), block_bytes)
        self.memory.close()  # no other process is to map it
        self.connector = connector.beside(self.memory)
        self.users = 0
        self._free = list(range(self.memory.num_blocks))
        self._turn = asyncio.Lock()
        self._given_back = asyncio.Event()

    @property
    def idle(self) -> bool:
        """Nobody uses it, and no writer is left."""
        return not self.users and len(self._free) == self.memory.num_blocks

    @asynccontextmanager
    async def slots(self, count: int) -> AsyncIterator[tuple[list[int], Gate]]:
        """Lends `count` slots, at most all there are, and the gate for whoever writes to them. First come, first
        served. Who has slots waits for no more of them, and a fetch ends by its transport's timeouts: the wait ends."""
        async with self._turn:
            while len(self._free) < count:
                self._given_back.clear()
                await self._given_back.wait()
            lent, self._free = self._free[:count], self._free[count:]  # neighbours, as far as there are: one copy
        gate = Gate()
        try:
            yield lent, gate
        finally:
            if gate.close(partial(self._hop, asyncio.get_running_loop(), lent)):
                self._take_back(lent)

    def _hop(self, loop: asyncio.AbstractEventLoop, slots: list[int]) -> None:
        """On the last writer's thread."""
        try:
            loop.call_soon_threadsafe(self._take_back, slots)
        except RuntimeError:  # the loop is closed: the process ends, and its staging with it
            log.debug("the last writer of a staging outlived the event loop")

    def _take_back(self, slots: list[int]) -> None:
        self._free = sorted(self._free + slots)
        self._given_back.set()


class Stagings:
    """A puller's, one for each size of blocks that it re-lays, made when the first comes."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self._by_size: OrderedDict[int, Staging] = OrderedDict()

    @asynccontextmanager
    async def use(self, layout: KVLayout) -> AsyncIterator[Staging]:
        """For blocks of `layout`. Raises TransferRefused where they are too large, or of too many sizes at once."""
        if layout.block_bytes > STAGING_BYTES:
            raise TransferRefused(
                f"a block of the source has {layout.block_bytes} bytes, and can't be re-laid: at most {STAGING_BYTES} "
                "are staged; give it a smaller --block-size"
            )
        staging, unused = self._by_size.get(layout.block_bytes), None
        if staging is None:
            if len(self._by_size) >= MAX_STAGINGS:
                unused = self._drop_unused()
            staging = self._by_size[layout.block_bytes] = Staging(layout.block_bytes, self._connector)
        self._by_size.move_to_end(layout.block_bytes)
        staging.users += 1
        try:
            if unused is not None:
                await unused.connector.close()
            yield staging
        finally:
            staging.users -= 1

    async def sweep(self) -> None:
        """Lets go of dead sources."""
        for staging in list(self._by_size.values()):
            await staging.connector.sweep()

    def _drop_unused(self) -> Staging:
        """The longest unused."""
        for size, staging in self._by_size.items():
            if staging.idle:
                return self._by_size.pop(size)
        raise TransferRefused(f"blocks of {MAX_STAGINGS} other sizes are being re-laid; try again later")

    async def close(self) -> None:
        while self._by_size:
            await self._by_size.popitem()[1].connector.close()
