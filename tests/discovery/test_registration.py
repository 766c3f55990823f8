from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys

import pytest
from redis.asyncio import Redis

from discovery import Directory, EmbeddedRedis, Registration
from discovery.keys import BLOCK_NAME_BYTES, Keys, block_name
from tests.discovery.conftest import eventually
from tests.discovery.makers import block, blocks, blocks_key, names, record

ME = record()


async def test_a_started_worker_is_listed_with_a_lease(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=2.0)
    await registration.start()
    assert await Directory(redis, namespace=namespace).workers() == [ME]
    assert 4000 < await redis.pttl(Keys(namespace).worker(ME.id)) <= 6000
    await registration.stop()


async def test_heartbeats_keep_record_and_blocks_beyond_the_lease(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=0.4)
    await registration.start()
    registration.stored(blocks(5))
    await eventually(lambda: registration.stats.heartbeats >= 6, "six heartbeats, twice the lease")
    assert await redis.smembers(blocks_key(namespace, ME)) == names(blocks(5))
    assert registration.stats.reregistered == 0
    assert registration.stats.republished == 0
    assert registration.stats.batches == 2  # the empty set's, at the start, and the one that carried the blocks
    await registration.stop()


async def test_stop_takes_record_and_blocks_away_at_once(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0)
    await registration.start()
    registration.stored(blocks(5))
    await eventually(lambda: redis.exists(blocks_key(namespace, ME)), "blocks are published")
    await registration.stop()
    await registration.stop()  # twice is harmless
    assert await redis.keys(f"{{{namespace}}}*") == []


async def test_a_late_stop_leaves_the_next_incarnation_alone(redis: Redis, namespace: str) -> None:
    old = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0)
    await old.start()
    successor = record(incarnation=8)
    new = Registration(redis, successor, namespace=namespace, heartbeat_seconds=60.0)
    await new.start()
    await old.stop()
    assert await Directory(redis, namespace=namespace).workers() == [successor]
    await new.stop()


async def test_a_restarted_worker_removes_its_predecessors_blocks(redis: Redis, namespace: str) -> None:
    old = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0)
    await old.start()
    old.stored(blocks(5))
    await eventually(lambda: redis.exists(blocks_key(namespace, ME)), "blocks are published")
    successor = record(incarnation=8)
    new = Registration(redis, successor, namespace=namespace, heartbeat_seconds=60.0)
    await new.start()
    assert not await redis.exists(blocks_key(namespace, ME))
    await new.stop()
    await old.stop()


async def test_two_processes_of_one_id_are_named_once(
    redis: Redis, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    twins = [
        Registration(redis, record(incarnation=i, pid=i), namespace=namespace, heartbeat_seconds=0.05) for i in (7, 8)
    ]
    for twin in twins:
        await twin.start()
    await eventually(lambda: all(twin.stats.heartbeats > 5 for twin in twins), "both had some heartbeats")
    complaints = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert 1 <= len(complaints) <= 2
    assert "decode-0 is used by this process" in complaints[0]
    for twin in twins:
        await twin.stop()


WORKER = """
import asyncio, sys
from discovery import Registration, connect
from tests.discovery.makers import blocks, record

async def main():
    redis = await connect(sys.argv[1])
    registration = Registration(redis, record(), namespace=sys.argv[2], heartbeat_seconds=0.3)
    await registration.start()
    registration.stored(blocks(5000))
    while registration.num_pending:
        await asyncio.sleep(0.01)
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


async def test_a_killed_worker_vanishes_as_one(server: EmbeddedRedis, redis: Redis, namespace: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in [os.getcwd(), *sys.path] if p)}
    command = [sys.executable, "-c", WORKER, server.url, namespace]
    worker = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=environment)
    assert worker.stdout is not None
    assert await worker.stdout.readline() == b"ready\n"
    assert await Directory(redis, namespace=namespace).workers() == [ME]
    assert await redis.scard(blocks_key(namespace, ME)) == 5000
    worker.kill()
    await worker.wait()
    sizes: set[int] = set()

    async def gone() -> bool:
        sizes.add(await redis.scard(blocks_key(namespace, ME)))
        return not await redis.exists(Keys(namespace).worker(ME.id), blocks_key(namespace, ME))

    await eventually(gone, "the lease runs out")
    assert sizes <= {5000, 0}
    assert await Directory(redis, namespace=namespace).workers() == []
    assert not await redis.exists(Keys(namespace).workers), "the index still names it"


async def test_many_events_travel_in_few_batches(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0)
    await registration.start()
    for i in range(0, 20_000, 50):
        registration.stored(blocks(i, i + 50))
    registration.evicted(blocks(15_000, 20_000))
    await eventually(lambda: registration.num_pending == 0, "all is told")
    assert await redis.smembers(blocks_key(namespace, ME)) == names(blocks(15_000))
    assert registration.stats.batches <= 6
    await registration.stop()


async def test_blocks_are_published_root_first_and_taken_back_leaf_first(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0, max_batch=3)
    await registration.start()
    told: dict[str, list[int]] = {"SADD": [], "SREM": []}
    async with redis.monitor() as monitor:
        registration.stored(blocks(10))
        await eventually(lambda: registration.num_pending == 0, "stored blocks are told")
        registration.evicted(reversed(blocks(4, 10)))
        await eventually(lambda: registration.num_pending == 0, "evicted blocks are told")
        await registration.stop()
        while (seen := (await monitor.next_command())["command"]).split()[0] not in ("EVALSHA", "EVAL"):
            words = seen.split()
            if words[0] in told and words[1] == blocks_key(namespace, ME):
                assert len(words) <= 2 + 3, "a batch over the bound"
                told[words[0]] += [int(word) for word in words[2:]]
    assert told == {"SADD": list(range(10)), "SREM": [9, 8, 7, 6, 5, 4]}


async def test_a_block_set_never_stands_without_a_lease(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0, flush_seconds=0.0)
    await registration.start()
    key = blocks_key(namespace, ME)
    for i in range(100):
        registration.stored([block(i)])
        await redis.unlink(key)  # what a lease that runs out between two flushes does
        assert await redis.pttl(key) != -1
    await registration.stop()


async def test_what_others_do_to_the_set_is_mended_at_a_heartbeat(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=0.1)
    await registration.start()
    registration.stored(blocks(100))
    key = blocks_key(namespace, ME)

    async def right() -> bool:
        return await redis.type(key) == b"set" and await redis.smembers(key) == names(blocks(100))

    await eventually(right, "published")
    await redis.srem(key, block_name(block(50)))
    await eventually(right, "a lost member is back")
    await redis.sadd(key, b"x" * BLOCK_NAME_BYTES)
    await eventually(right, "a false member is gone")
    await redis.set(key, "no set at all")
    await eventually(right, "a key of another type is replaced")
    for other in (Keys(namespace).workers, Keys(namespace).worker(ME.id)):
        await redis.unlink(other)
        await redis.hset(other, "no", "thing")
    directory = Directory(redis, namespace=namespace, linger_seconds=0.0)

    async def listed() -> bool:
        return await directory.workers() == [ME]

    await eventually(listed, "index and record are replaced")
    await registration.stop()


async def test_the_mirror_is_bounded(redis: Redis, namespace: str) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=60.0, max_blocks=1000)
    await registration.start()
    registration.stored(blocks(10_000))
    assert (registration.num_blocks, registration.num_pending, registration.num_dropped) == (1000, 1000, 9000)
    await eventually(lambda: registration.num_pending == 0, "all is told")
    await registration.stop()


def test_a_record_is_written_as_one_line_of_json() -> None:
    assert re.fullmatch(rb'\{"id":"decode-0",.*"model_fingerprint":"[0-9a-f]+"\}', ME.to_json())


async def test_what_was_under_way_when_redis_was_lost_does_not_stay_in_a_set_of_the_right_size(
    redis: Redis, namespace: str
) -> None:
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=0.1)
    await registration.start()
    registration.stored(blocks(5))
    beat, key = registration._beat, blocks_key(namespace, ME)

    async def lose() -> None:
        registration._beat = beat  # type: ignore[method-assign]  # lost once
        raise ConnectionError("lost")

    registration._beat = lose  # type: ignore[method-assign]  # stands for Redis, which is lost
    await eventually(lambda: registration.stats.republished == 1, "published anew")
    await redis.srem(key, block_name(block(2)))
    await redis.sadd(key, b"x" * BLOCK_NAME_BYTES)

    async def right() -> bool:
        return await redis.smembers(key) == names(blocks(5))

    await eventually(right, "published once more when all that was late has come")
    await registration.stop()
