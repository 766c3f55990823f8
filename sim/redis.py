"""What discovery does, without Redis: records under a time to live, block sets, and the router's view of both.

All of it is hint, so all of it may be late, stale, away or lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

from baton.ids import BlockHash, Incarnation, WorkerId
from discovery.records import WorkerRecord

HEARTBEAT_SECONDS = 0.5
_MISSED = 3
_REFRESH_SECONDS = 0.25
_LINGER_SECONDS = 1.5


class SimRedis:
    def __init__(self) -> None:
        self.up = True
        self.epoch = 0
        self.records: dict[WorkerId, tuple[WorkerRecord, float]] = {}
        self.blocks: dict[tuple[WorkerId, Incarnation], frozenset[BlockHash]] = {}

    def lose_all(self) -> None:
        self.epoch += 1
        self.records.clear()
        self.blocks.clear()


class SimRegistration:
    """A worker's heartbeat, which tells of its blocks as they were then. Implements worker.core.BlockEvents."""

    def __init__(self, redis: SimRedis, record: WorkerRecord) -> None:
        self._redis = redis
        self._record = record
        self._held: dict[BlockHash, None] = {}

    def stored(self, hashes: Iterable[BlockHash]) -> None:
        self._held.update(dict.fromkeys(hashes))

    def evicted(self, hashes: Iterable[BlockHash]) -> None:
        for block_hash in hashes:
            self._held.pop(block_hash, None)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        self._task.cancel()
        known = self._redis.records.get(self._record.id)
        if self._redis.up and known is not None and known[0].incarnation == self._record.incarnation:
            del self._redis.records[self._record.id]

    async def _run(self) -> None:
        loop, record, redis = asyncio.get_running_loop(), self._record, self._redis
        while True:
            known = redis.records.get(record.id)
            newer = known is not None and known[0].incarnation != record.incarnation and known[1] > loop.time()
            if redis.up and not (newer and self._held):
                redis.records[record.id] = (record, loop.time() + _MISSED * HEARTBEAT_SECONDS)
                redis.blocks[record.id, record.incarnation] = frozenset(self._held)
            await asyncio.sleep(HEARTBEAT_SECONDS)


class SimDirectory:
    """Implements router.workers.Directory."""

    def __init__(self, redis: SimRedis, delay: float) -> None:
        self._redis = redis
        self._delay = delay
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._changed = asyncio.Event()
        self._epoch = 0
        self._linger_until = 0.0

    @property
    def connected(self) -> bool:
        return self._redis.up

    async def run(self) -> None:
        loop, redis = asyncio.get_running_loop(), self._redis
        while True:
            now = loop.time()
            if not redis.up or redis.epoch != self._epoch:
                self._epoch, self._linger_until = redis.epoch, now + _LINGER_SECONDS
            if redis.up:
                listed = {id: record for id, (record, until) in redis.records.items() if until > now}
                records = self._records | listed if now < self._linger_until else listed
                if records != self._records:
                    self._records = records
                    self._changed.set()
                    self._changed = asyncio.Event()
            await asyncio.sleep(_REFRESH_SECONDS)

    async def watch(self) -> AsyncIterator[list[WorkerRecord]]:
        while True:
            changed = self._changed
            yield [self._records[id] for id in sorted(self._records)]
            await changed.wait()

    async def longest_prefix(
        self, hashes: Sequence[BlockHash], workers: Sequence[tuple[WorkerId, Incarnation]]
    ) -> dict[WorkerId, int]:
        await asyncio.sleep(self._delay)
        if not self._redis.up:
            return {}
        counts: dict[WorkerId, int] = {}
        for worker in workers:
            held = self._redis.blocks.get((worker[0], worker[1]), frozenset())
            count = next((at for at, block_hash in enumerate(hashes) if block_hash not in held), len(hashes))
            if count:
                counts[worker[0]] = count
        return counts
