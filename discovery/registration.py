"""A worker's presence in Redis: its record and its block set, both under a lease that the heartbeat renews.

One task does all the talking, so heartbeats and block events never cross. It holds an account of its own of every
block (discovery.mirror); whatever Redis loses, by restart, flush, eviction or a lease that ran out while this
process was paused, is noticed at the next heartbeat and published again. It never blocks its callers, never raises
into them, and owns neither the Redis client nor any block.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from baton.clock import Clock, MonotonicClock
from baton.errors import ConfigError
from baton.ids import BlockHash
from discovery.keys import Keys
from discovery.mirror import BlockMirror
from discovery.outage import Outage, describe
from discovery.records import MAX_RECORD_BYTES, WorkerRecord
from discovery.scripts import DEREGISTER

log = logging.getLogger(__name__)

HEARTBEATS_PER_LEASE = 3
_INDEX_LEASE_MS = 3_600_000  # outlives any heartbeat; a system that is gone leaves nothing behind
_MIN_TIMEOUT_SECONDS = 0.5


@dataclass(slots=True)
class RegistrationStats:
    heartbeats: int = 0
    batches: int = 0
    """Round trips that carried block events."""
    republished: int = 0
    """Times the whole block set was published again."""
    reregistered: int = 0
    """Times the record was found missing."""


class Registration:
    """
    redis: from `discovery.connect`; the caller's to close, after `stop`.
    heartbeat_seconds: record and block set vanish by themselves after three without one.
    flush_seconds: block events are gathered for so long before they are sent.
    max_blocks: most blocks accounted for; more are not published. About 200 bytes each.
    max_batch: most block events of one round trip.
    """

    def __init__(
        self,
        redis: Redis,
        record: WorkerRecord,
        *,
        namespace: str = "baton",
        heartbeat_seconds: float = 1.0,
        flush_seconds: float = 0.02,
        max_blocks: int = 1 << 20,
        max_batch: int = 4096,
        clock: Clock | None = None,
    ) -> None:
        self.record = record
        self.stats = RegistrationStats()
        self._redis = redis
        self._keys = Keys(namespace)
        self._json = record.to_json()
        self._record_key = self._keys.worker(record.id)
        self._blocks_key = self._keys.blocks(record.id, record.incarnation)
        self._heartbeat_seconds = heartbeat_seconds
        self._lease_ms = max(1, round(HEARTBEATS_PER_LEASE * heartbeat_seconds * 1000))
        self._timeout = max(heartbeat_seconds, _MIN_TIMEOUT_SECONDS)
        self._flush_seconds = flush_seconds
        self._max_batch = max_batch
        self._clock = clock or MonotonicClock()
        self._mirror = BlockMirror(max_blocks)
        self._outage = Outage(log, f"worker {record.id}", "serving goes on, others cannot find its blocks")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._next_beat = 0.0
        self._next_flush = 0.0
        self._num_in_flight = 0
        self._registered = False
        self._rival_named = False
        self._in_sync = False
        """The published set is the mirror's, less what is pending."""
        self._clear_first = False
        """The next batch begins a published set anew."""
        self._doubted_until = 0.0
        """What was on its way when Redis was lost may still be carried out, behind what is published since: then the
        set is published once more. A wrong one of the right size would never be noticed."""

    @property
    def connected(self) -> bool:
        """Whether Redis answered last time."""
        return self._outage.connected

    @property
    def num_blocks(self) -> int:
        """Blocks held, as far as they are accounted for."""
        return len(self._mirror)

    @property
    def num_pending(self) -> int:
        """Block events that Redis has not confirmed."""
        return self._mirror.pending + self._num_in_flight

    @property
    def num_dropped(self) -> int:
        """Blocks that were not accounted for because `max_blocks` were."""
        return self._mirror.dropped

    async def start(self) -> None:
        """Registers, if Redis answers within a heartbeat, and keeps at it in the background in any case."""
        assert self._task is None, "a registration starts once"
        await self._turn()
        self._task = asyncio.create_task(self._run(), name=f"registration {self.record.id}")

    async def stop(self) -> None:
        """Takes the record and the block set out of Redis. If that fails, their lease runs out."""
        if self._task is None:
            return
        task, self._task = self._task, None
        self._stopping = True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        keys = [self._record_key, self._keys.workers, self._blocks_key]
        try:
            async with asyncio.timeout(self._timeout):
                await DEREGISTER(self._redis, keys, self._json, self.record.id)
        except Exception as error:  # whatever Redis did, the worker is going
            log.info("worker %s: not taken out of Redis (%s); its lease runs out", self.record.id, describe(error))

    def stored(self, hashes: Iterable[BlockHash]) -> None:
        """Blocks that can be hit from now on, parents before children. From the event loop only; never waits."""
        self._mirror.stored(hashes)
        self._wake.set()

    def evicted(self, hashes: Iterable[BlockHash]) -> None:
        """Blocks that can't be hit any more. From the event loop only; never waits."""
        self._mirror.evicted(hashes)
        self._wake.set()

    async def _run(self) -> None:
        while not self._stopping:  # should a client library swallow the cancellation
            await self._until_due()
            await self._turn()

    async def _until_due(self) -> None:
        """Until the next heartbeat, or until there are block events and they have been gathered for long enough."""
        if not self._in_sync:  # block events wait for a heartbeat that gets through
            await asyncio.sleep(self._next_beat - self._clock.now())
            return
        if not self._mirror.pending:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._next_beat - self._clock.now()):
                    await self._wake.wait()
            except TimeoutError:
                return  # the heartbeat is due
            self._next_flush = max(self._next_flush, self._clock.now() + self._flush_seconds)
        due = self._clock.now() if self._mirror.pending >= self._max_batch else self._next_flush
        await asyncio.sleep(min(due, self._next_beat) - self._clock.now())

    async def _turn(self) -> None:
        """A heartbeat if one is due, and a batch of block events if there are any."""
        talked = False
        try:
            async with asyncio.timeout(self._timeout):
                if self._clock.now() >= self._next_beat:
                    talked = True
                    self._next_beat = self._clock.now() + self._heartbeat_seconds
                    await self._beat()
                if self._in_sync and (self._mirror.pending or self._clear_first):
                    talked = True
                    await self._flush()
        except Exception as error:  # Redis may answer anything at all; this task outlives it
            self._in_sync = False  # what was on its way may or may not have arrived
            self._doubted_until = self._clock.now() + self._lease_ms / 1000
            self._num_in_flight = 0
            self._mirror.restart()
            self._outage.lost(error)
        else:
            if talked:
                self._outage.found()

    async def _beat(self) -> None:
        pipe = self._redis.pipeline(transaction=False)
        pipe.getrange(self._record_key, 0, MAX_RECORD_BYTES)
        pipe.set(self._record_key, self._json, px=self._lease_ms)
        pipe.sadd(self._keys.workers, self.record.id)
        pipe.pexpire(self._keys.workers, _INDEX_LEASE_MS)
        pipe.pexpire(self._blocks_key, self._lease_ms)
        pipe.scard(self._blocks_key)
        before, written, indexed, _, _, num_published = await pipe.execute(raise_on_error=False)
        if isinstance(written, Exception):
            raise written
        if isinstance(indexed, ResponseError) and "WRONGTYPE" in str(indexed):
            await self._redis.unlink(self._keys.workers)  # nobody's index; the next heartbeats build one
            indexed = await self._redis.sadd(self._keys.workers, self.record.id)
        if isinstance(indexed, Exception):
            raise indexed
        await self._judge_predecessor(before)
        self.stats.heartbeats += 1
        doubted = 0 < self._doubted_until <= self._clock.now()
        if not self._in_sync or doubted or num_published != self._mirror.published:
            if doubted:
                self._doubted_until = 0.0
            if self._registered and len(self._mirror):
                self.stats.republished += 1
                log.debug("worker %s: publishing all %d blocks again", self.record.id, len(self._mirror))
            self._mirror.restart()
            self._clear_first = True
            self._in_sync = True
        self._registered = True

    async def _judge_predecessor(self, before: Any) -> None:
        """`before` is what stood in the record's place: this record, nothing, or another incarnation's."""
        if before == self._json:
            return
        if not isinstance(before, bytes):  # a key of another type; it has been overwritten
            return
        if not before:
            if self._registered:
                self.stats.reregistered += 1
                log.info("worker %s: Redis had lost its record; registered again", self.record.id)
            return
        try:
            other = WorkerRecord.from_json(before)
        except ConfigError:  # nor is this a record
            return
        if other.id != self.record.id or other.incarnation == self.record.incarnation:
            return
        if not self._registered:  # this worker before its restart
            await self._redis.unlink(self._keys.blocks(other.id, other.incarnation))
        elif not self._rival_named:
            self._rival_named = True
            log.error(
                "worker id %s is used by this process (%s, pid %d) and by another (%s, pid %d); ids must be unique",
                self.record.id,
                self.record.address,
                self.record.pid,
                other.address,
                other.pid,
            )

    async def _flush(self) -> None:
        """One batch. A transaction, so that the set never stands without a lease, nor half changed."""
        batch = self._mirror.take(self._max_batch)
        self._num_in_flight = len(batch.remove) + len(batch.add)
        pipe = self._redis.pipeline(transaction=True)
        if self._clear_first:
            pipe.unlink(self._blocks_key)
        if batch.remove:
            pipe.srem(self._blocks_key, *batch.remove)
        if batch.add:
            pipe.sadd(self._blocks_key, *batch.add)
        pipe.pexpire(self._blocks_key, self._lease_ms)
        pipe.scard(self._blocks_key)
        num_published = (await pipe.execute())[-1]
        self._num_in_flight = 0
        self._clear_first = False
        self._next_flush = self._clock.now() + self._flush_seconds
        self.stats.batches += 1
        # A set that is not what it should be is noticed again at the next heartbeat, and published anew then:
        # once a heartbeat at most, whatever Redis says.
        self._in_sync = num_published == self._mirror.published
