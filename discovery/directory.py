"""What the router knows of the workers through Redis: who is there, and who holds most of a prompt.

All of it is hint. The list is the last one known while Redis is away; a lookup that takes too long answers {}.
It never raises after construction, and owns neither the Redis client nor the truth about a worker, which only the
worker's own session tells.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import redis.exceptions
from redis.asyncio import Redis

from baton.clock import Clock, MonotonicClock
from baton.errors import ConfigError
from baton.ids import BlockHash, Incarnation, WorkerId
from discovery.keys import BLOCK_NAME_BYTES, Keys, joined_names
from discovery.outage import Outage
from discovery.records import MAX_RECORD_BYTES, WorkerRecord
from discovery.scripts import LIST_WORKERS, LONGEST_PREFIX

log = logging.getLogger(__name__)

_MAX_WORKERS = 4096
_MAX_LOOKUP_BLOCKS = 1 << 16  # a million tokens at block size 16; 1 MiB on the wire
_MAX_LOOKUP_FAILURES = 3


class _BadReply(Exception):
    """Redis answered with something that no script of ours returns."""


@dataclass(slots=True)
class DirectoryStats:
    refreshes: int = 0
    refresh_failures: int = 0
    bad_records: int = 0
    """Records dropped because they were none, counted at every refresh that met them."""
    lookups: int = 0
    lookup_timeouts: int = 0
    lookup_failures: int = 0
    lookups_skipped: int = 0
    """Answered {} at once because Redis was known to be away."""


class Directory:
    """
    redis: from `discovery.connect`; the caller's to close, after `stop`.
    refresh_seconds: how often `records` is brought up to date once `start` was called.
    refresh_timeout_seconds, lookup_timeout_seconds: the longest that `workers` and `longest_prefix` take.
    linger_seconds: for so long after Redis lost its data or came back, workers that it does not list yet stay
        listed. At least two heartbeats.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        namespace: str = "baton",
        refresh_seconds: float = 0.5,
        refresh_timeout_seconds: float = 1.0,
        lookup_timeout_seconds: float = 0.05,
        linger_seconds: float = 3.0,
        clock: Clock | None = None,
    ) -> None:
        self.stats = DirectoryStats()
        self._redis = redis
        self._keys = Keys(namespace)
        self._refresh_seconds = refresh_seconds
        self._refresh_timeout = refresh_timeout_seconds
        self._lookup_timeout = lookup_timeout_seconds
        self._linger_seconds = linger_seconds
        self._clock = clock or MonotonicClock()
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._changed = asyncio.Event()
        self._epoch: bytes | None = None
        self._linger_until = float("-inf")
        self._outage = Outage(log, "directory", "keeping the last known workers and placing without prefix hints")
        self._lookup_failures_in_row = 0
        self._bad_named = False
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether Redis answered lately."""
        return self._outage.connected

    @property
    def records(self) -> list[WorkerRecord]:
        """The workers last known, by id. Asks nobody."""
        return [self._records[worker] for worker in sorted(self._records)]

    async def start(self) -> None:
        """Fetches the list once and keeps it up to date in the background."""
        assert self._task is None, "a directory starts once"
        await self.workers()
        self._task = asyncio.create_task(self._run(), name="directory refresh")

    async def stop(self) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def workers(self) -> list[WorkerRecord]:
        """The workers that Redis lists now, by id; the last known ones if it does not answer. One round trip."""
        keys = [self._keys.workers, self._keys.epoch]
        arguments = (self._keys.worker_prefix, MAX_RECORD_BYTES, _MAX_WORKERS, secrets.token_hex(8))
        self.stats.refreshes += 1
        try:
            async with asyncio.timeout(self._refresh_timeout):
                reply = await LIST_WORKERS(self._redis, keys, *arguments)
            epoch, listed = self._read(reply)
        except Exception as error:  # Redis may answer anything at all; the last known list stands
            self.stats.refresh_failures += 1
            self._outage.lost(error)
        else:
            self._update(epoch, listed)
            self._outage.found()
            self._lookup_failures_in_row = 0
        return self.records

    async def watch(self) -> AsyncGenerator[list[WorkerRecord], None]:
        """The list as it is now, then again whenever it has changed; changes between two looks are one."""
        while True:
            changed = self._changed
            yield self.records
            await changed.wait()

    async def longest_prefix(
        self, hashes: Sequence[BlockHash], workers: Sequence[tuple[WorkerId, Incarnation]]
    ) -> dict[WorkerId, int]:
        """How many of a prompt's leading blocks each worker is said to hold; a worker that holds none is left out.
        One round trip; {} if it takes longer than `lookup_timeout_seconds` or Redis is away."""
        if not hashes or not workers:
            return {}
        if not self.connected:  # the refresh finds out when it is back; requests do not wait for that
            self.stats.lookups_skipped += 1
            return {}
        self.stats.lookups += 1
        hashes = hashes[:_MAX_LOOKUP_BLOCKS]
        keys = [self._keys.blocks(worker, incarnation) for worker, incarnation in workers]
        try:
            async with asyncio.timeout(self._lookup_timeout):
                counts = await LONGEST_PREFIX(self._redis, keys, joined_names(hashes), BLOCK_NAME_BYTES)
            if not isinstance(counts, list) or len(counts) != len(keys):
                raise _BadReply(f"lookup over {len(keys)} workers answered {counts!r:.80}")
            held = {
                worker: min(count, len(hashes))
                for (worker, _), count in zip(workers, counts, strict=True)
                if isinstance(count, int) and count > 0
            }
        except Exception as error:  # whatever it was, the request is placed without the hint
            if isinstance(error, TimeoutError | redis.exceptions.TimeoutError):
                self.stats.lookup_timeouts += 1
            else:
                self.stats.lookup_failures += 1
            self._lookup_failures_in_row += 1
            if self._lookup_failures_in_row >= _MAX_LOOKUP_FAILURES:
                self._outage.lost(error)
            return {}
        self._lookup_failures_in_row = 0
        return held

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            await self.workers()

    def _read(self, reply: object) -> tuple[bytes, dict[WorkerId, WorkerRecord]]:
        """Checks all that came. Bad records are dropped and counted."""
        if not isinstance(reply, list) or len(reply) % 2 == 0 or not all(isinstance(item, bytes) for item in reply):
            raise _BadReply(f"list of workers is {reply!r:.80}")
        listed: dict[WorkerId, WorkerRecord] = {}
        for key_id, raw in zip(reply[1::2], reply[2::2], strict=True):
            try:
                record = WorkerRecord.from_json(raw)
                if record.id.encode() != key_id:
                    raise ConfigError(f"record under {key_id!r:.80} is of worker {record.id!r}; it must be its own")
            except ConfigError as error:
                self.stats.bad_records += 1
                if not self._bad_named:
                    self._bad_named = True
                    log.warning("directory: dropped a worker record: %s (further ones are only counted)", error)
                continue
            listed[record.id] = record
        return reply[0], listed

    def _update(self, epoch: bytes, listed: dict[WorkerId, WorkerRecord]) -> None:
        """Takes the list over. An empty Redis says nothing about the workers, so then those known linger."""
        now = self._clock.now()
        if not self.connected or (self._epoch is not None and epoch != self._epoch):
            self._linger_until = now + self._linger_seconds
        self._epoch = epoch
        records = self._records | listed if now < self._linger_until else listed
        if records != self._records:
            self._records = records
            self._changed.set()
            self._changed = asyncio.Event()
