"""Redis is killed, restarted, emptied, stopped and replaced by a liar; nobody but the hints suffers."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from redis.asyncio import Redis

from baton.ids import Incarnation, WorkerId
from discovery import Directory, EmbeddedRedis, Registration, connect
from tests.discovery.conftest import eventually
from tests.discovery.makers import blocks, false_server, record

ME = record()
WHO = [(ME.id, ME.incarnation)]


@dataclass
class System:
    server: EmbeddedRedis
    worker_redis: Redis
    registration: Registration
    directory: Directory

    async def found(self) -> int:
        return (await self.directory.longest_prefix(blocks(5000), WHO)).get(ME.id, 0)

    async def finds(self, count: int) -> None:
        async def right() -> bool:
            return await self.found() == count

        await eventually(right, f"the directory finds {count} blocks")

    def kill(self) -> None:
        assert self.server.pid is not None
        os.kill(self.server.pid, signal.SIGKILL)


@pytest.fixture
async def system(own_server: EmbeddedRedis, namespace: str) -> AsyncIterator[System]:
    worker_redis, router_redis = await connect(own_server.url), await connect(own_server.url)
    registration = Registration(worker_redis, ME, namespace=namespace, heartbeat_seconds=0.1, max_batch=500)
    directory = Directory(
        router_redis, namespace=namespace, refresh_seconds=0.05, lookup_timeout_seconds=1.0, linger_seconds=20.0
    )
    await registration.start()
    registration.stored(blocks(3000))
    await directory.start()
    running = System(own_server, worker_redis, registration, directory)
    await running.finds(3000)
    yield running
    await directory.stop()
    await registration.stop()
    await worker_redis.aclose()
    await router_redis.aclose()


async def test_killed_and_restarted_on_its_port_it_is_told_everything_again(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="discovery")
    system.kill()
    await eventually(lambda: not system.directory.connected, "the router notices")
    await eventually(lambda: not system.registration.connected, "the worker notices")
    assert system.directory.records == [ME], "the last known list is kept"
    assert await system.found() == 0
    system.registration.stored(blocks(3000, 3100))
    system.registration.evicted(reversed(blocks(2900, 3100)))
    assert system.directory.records == [ME]
    port = system.server.port
    system.server.start()
    assert system.server.port == port
    await system.finds(2900)
    await eventually(lambda: system.registration.connected, "the worker notices")
    assert system.directory.connected
    assert system.directory.records == [ME]
    assert system.registration.stats.reregistered >= 1
    told = [r.getMessage() for r in caplog.records if "Redis lost" in r.getMessage() or "is back" in r.getMessage()]
    assert len([line for line in told if line.startswith("worker decode-0: Redis lost")]) == 1
    assert len([line for line in told if line.startswith("directory: Redis lost")]) == 1
    assert sum("is back" in line for line in told) == 2


async def test_flushed_it_is_told_everything_again_and_nobody_is_given_up(system: System) -> None:
    lists: set[int] = set()

    async def watch() -> None:
        async for workers in system.directory.watch():
            lists.add(len(workers))

    def republished_since(count: int) -> bool:
        return system.registration.stats.republished > count

    watching = asyncio.create_task(watch())
    for _ in range(3):
        before = system.registration.stats.republished
        await system.worker_redis.flushall()
        await eventually(functools.partial(republished_since, before), "the loss is noticed")
        await system.finds(3000)
    watching.cancel()
    assert lists == {1}


async def test_events_during_an_outage_never_wait_raise_or_pile_up(system: System) -> None:
    system.kill()
    await eventually(lambda: not system.registration.connected, "the worker notices")
    started = time.monotonic()
    for i in range(200):
        system.registration.stored(blocks(10_000 + 50 * i, 10_050 + 50 * i))
        system.registration.evicted(blocks(10_000 + 50 * i, 10_050 + 50 * i))
    assert time.monotonic() - started < 5
    assert system.registration.num_blocks == 3000
    assert system.registration.num_pending <= 3000


async def test_stopped_it_costs_a_lookup_its_timeout_and_then_nothing(
    own_server: EmbeddedRedis, namespace: str
) -> None:
    redis = await connect(own_server.url, timeout_seconds=60.0)
    worker = (WorkerId("w"), Incarnation(1))
    directory = Directory(
        redis,
        namespace=namespace,
        refresh_seconds=0.05,
        refresh_timeout_seconds=1.0,
        lookup_timeout_seconds=0.05,
    )
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGSTOP)
    for _ in range(3):
        started = time.monotonic()
        assert await directory.longest_prefix(blocks(10), [worker]) == {}
        assert 0.04 < time.monotonic() - started < 2.0
    assert directory.stats.lookup_timeouts == 3
    assert not directory.connected
    assert await directory.longest_prefix(blocks(10), [worker]) == {}
    assert (directory.stats.lookups, directory.stats.lookups_skipped) == (3, 1)
    started = time.monotonic()
    await directory.start()  # not held up for longer than its own bound, either
    assert 0.9 < time.monotonic() - started < 5.0
    os.kill(own_server.pid, signal.SIGCONT)
    await eventually(lambda: directory.connected, "the refresh finds it again")
    await directory.stop()
    await redis.aclose()


async def test_late_answers_are_never_taken_for_anothers(system: System) -> None:
    other = (WorkerId("other"), Incarnation(1))
    assert system.server.pid is not None
    for _ in range(3):
        os.kill(system.server.pid, signal.SIGSTOP)
        pending = [asyncio.create_task(system.found()) for _ in range(8)]
        assert await asyncio.gather(*pending) == [0] * 8
        os.kill(system.server.pid, signal.SIGCONT)
        await system.finds(3000)
        assert await system.directory.longest_prefix(blocks(10), [other]) == {}


async def test_a_worker_that_was_paused_beyond_its_lease_comes_back_whole(
    own_redis: Redis, own_server: EmbeddedRedis, namespace: str
) -> None:
    registration = Registration(own_redis, ME, namespace=namespace, heartbeat_seconds=0.1)
    directory = Directory(own_redis, namespace=namespace, lookup_timeout_seconds=20.0, linger_seconds=0.0)
    await registration.start()
    registration.stored(blocks(100))
    await eventually(lambda: registration.num_pending == 0, "all is told")
    time.sleep(0.6)  # noqa: ASYNC251  this very process is what is paused
    registration.stored(blocks(100, 110))

    async def whole() -> bool:
        held = await directory.longest_prefix(blocks(200), WHO)
        return held == {ME.id: 110} and await directory.workers() == [ME]

    await eventually(whole, "record and blocks are back")
    assert registration.stats.republished >= 1
    await registration.stop()


async def test_a_full_server_is_an_outage_and_not_an_error(own_redis: Redis, namespace: str) -> None:
    registration = Registration(own_redis, ME, namespace=namespace, heartbeat_seconds=0.1)
    await registration.start()
    await own_redis.config_set("maxmemory-policy", "noeviction")
    await own_redis.config_set("maxmemory", "1")
    registration.stored(blocks(100))
    await eventually(lambda: not registration.connected, "the worker notices")
    await own_redis.config_set("maxmemory", "0")
    await eventually(lambda: registration.connected and registration.num_pending == 0, "all is told")
    assert await own_redis.dbsize() > 0
    await registration.stop()


@pytest.mark.parametrize("reply", [b"-ERR no\r\n", b":1\r\n", b"+OK\r\n", b"*1\r\n:7\r\n", b"*-1\r\n", b"", b"?\r\n"])
async def test_no_lie_reaches_a_worker(namespace: str, reply: bytes) -> None:
    async with false_server(lambda command: b"+PONG\r\n" if command[0] == b"PING" else reply) as url:
        redis = await connect(url)
        registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=0.02, flush_seconds=0.0)
        await registration.start()
        for i in range(20):
            registration.stored(blocks(10 * i, 10 * i + 10))
            await asyncio.sleep(0.01)  # heartbeats go by; nothing is waited for
        assert registration.num_blocks == 200
        assert registration._task is not None
        assert not registration._task.done()
        await registration.stop()
        await redis.aclose()


async def test_a_worker_starts_though_redis_is_gone_and_registers_when_it_comes(
    own_server: EmbeddedRedis, namespace: str
) -> None:
    redis = await connect(own_server.url)
    own_server.stop()
    registration = Registration(redis, ME, namespace=namespace, heartbeat_seconds=0.1)
    directory = Directory(redis, namespace=namespace)
    await registration.start()
    registration.stored(blocks(10))
    assert await directory.workers() == []
    assert not registration.connected
    own_server.start()

    async def listed() -> bool:
        return await directory.workers() == [ME]

    await eventually(listed, "the worker is listed")
    await registration.stop()
    await redis.aclose()
