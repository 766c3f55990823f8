from __future__ import annotations

import asyncio
import contextlib

import pytest
import uvloop
from redis.asyncio import Redis

from baton.clock import ManualClock
from discovery import Directory, EmbeddedRedis, Registration, WorkerRecord, connect
from discovery.keys import Keys
from tests.discovery.conftest import eventually
from tests.discovery.makers import blocks, record

A, B = record("a"), record("b", role=record().role)


async def put(redis: Redis, namespace: str, *workers: WorkerRecord) -> None:
    keys = Keys(namespace)
    for worker in workers:
        await redis.set(keys.worker(worker.id), worker.to_json())
        await redis.sadd(keys.workers, worker.id)


async def test_workers_are_listed_by_id(redis: Redis, namespace: str) -> None:
    await put(redis, namespace, B, A)
    directory = Directory(redis, namespace=namespace)
    assert await directory.workers() == [A, B]
    assert directory.records == [A, B]


async def test_namespaces_do_not_see_each_other(redis: Redis, namespace: str) -> None:
    await put(redis, namespace, A)
    await put(redis, namespace + "-2", B)
    assert await Directory(redis, namespace=namespace).workers() == [A]
    assert await Directory(redis, namespace=namespace + "-2").workers() == [B]


async def test_the_list_is_one_round_trip(redis: Redis, namespace: str) -> None:
    await put(redis, namespace, *(record(f"w{i}") for i in range(50)))
    directory = Directory(redis, namespace=namespace)
    await directory.workers()
    commands: list[str] = []
    async with redis.monitor() as monitor:
        assert len(await directory.workers()) == 50
        await redis.echo("end")
        while (seen := await monitor.next_command())["command"] != "ECHO end":
            if seen["client_type"] != "lua" and namespace in seen["command"]:
                commands.append(seen["command"].split()[0])
    assert commands == ["EVALSHA"]


async def test_an_id_whose_record_expired_leaves_the_index(redis: Redis, namespace: str) -> None:
    await put(redis, namespace, A, B)
    await redis.unlink(Keys(namespace).worker(B.id))
    assert await Directory(redis, namespace=namespace).workers() == [A]
    assert await redis.smembers(Keys(namespace).workers) == {b"a"}


async def test_lying_records_are_dropped_counted_and_named_once(
    redis: Redis, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(namespace)
    await put(redis, namespace, A)
    lies = {
        "no-json": b"{",
        "someone-else": record("a", address="evil:1").to_json(),
        "too-long": b'{"id":"' + b"x" * 100_000 + b'"}',
        "bad-port": record("bad-port").to_json().replace(b":7001", b":99999"),
        "binary": bytes(range(256)),
    }
    for worker, raw in lies.items():
        await redis.sadd(keys.workers, worker)
        await redis.set(f"{keys.worker_prefix}{worker}", raw)
    await redis.sadd(keys.workers, b"\xff\xfe", "hash")
    await redis.hset(f"{keys.worker_prefix}hash", "a", "b")
    directory = Directory(redis, namespace=namespace)
    assert await directory.workers() == [A]
    assert directory.stats.bad_records == len(lies) + 1
    assert await directory.workers() == [A]
    assert len([r for r in caplog.records if "dropped a worker record" in r.getMessage()]) == 1


async def test_an_index_and_epoch_of_another_type_are_an_empty_list(redis: Redis, namespace: str) -> None:
    await redis.set(Keys(namespace).workers, "lie")
    await redis.sadd(Keys(namespace).epoch, "lie")
    directory = Directory(redis, namespace=namespace)
    assert await directory.workers() == []
    assert directory.connected


async def test_the_background_refresh_tells_watchers_of_each_change(redis: Redis, namespace: str) -> None:
    directory = Directory(redis, namespace=namespace, refresh_seconds=0.02)
    await directory.start()
    async with asyncio.timeout(20), contextlib.aclosing(directory.watch()) as watch:
        assert await anext(watch) == []
        await put(redis, namespace, A)
        assert await anext(watch) == [A]
        await put(redis, namespace, B)
        assert await anext(watch) == [A, B]
        await redis.unlink(Keys(namespace).worker(A.id))
        assert await anext(watch) == [B]
    await directory.stop()
    await directory.stop()


async def test_workers_linger_when_redis_lost_its_data_and_go_when_it_did_not(own_redis: Redis, namespace: str) -> None:
    clock = ManualClock()
    directory = Directory(own_redis, namespace=namespace, linger_seconds=3.0, clock=clock)
    await put(own_redis, namespace, A, B)
    assert await directory.workers() == [A, B]
    await own_redis.flushall()
    assert await directory.workers() == [A, B]
    await put(own_redis, namespace, B)
    clock.advance(2.9)
    assert await directory.workers() == [A, B]
    clock.advance(0.2)
    assert await directory.workers() == [B]
    await own_redis.unlink(Keys(namespace).worker(B.id))
    assert await directory.workers() == []


def test_all_of_it_runs_on_uvloop(server: EmbeddedRedis, namespace: str) -> None:
    async def main() -> None:
        redis = await connect(server.url)
        registration = Registration(redis, A, namespace=namespace)
        directory = Directory(redis, namespace=namespace, lookup_timeout_seconds=20.0)
        await registration.start()
        await directory.start()
        registration.stored(blocks(40))
        await eventually(lambda: registration.num_pending == 0, "all is told")

        async def found() -> bool:
            return await directory.longest_prefix(blocks(100), [(A.id, A.incarnation)]) == {"a": 40}

        await eventually(found, "the prefix is found")
        assert directory.records == [A]
        await directory.stop()
        await registration.stop()
        await redis.aclose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
