from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from baton.ids import Incarnation, WorkerId
from discovery import Directory, EmbeddedRedis, connect
from discovery.keys import Keys, block_name
from tests.discovery.makers import block, blocks, false_server, names

FAR = 30.0  # a bound that only defects reach, where the test is not about time
W0 = (WorkerId("w0"), Incarnation(1))


def directory(redis: Redis, namespace: str) -> Directory:
    return Directory(redis, namespace=namespace, lookup_timeout_seconds=FAR)


async def publish(redis: Redis, namespace: str, worker: tuple[WorkerId, Incarnation], *held: int) -> None:
    key = Keys(namespace).blocks(*worker)
    await redis.unlink(key)
    if held:
        await redis.sadd(key, *(block_name(block(i)) for i in held))


def path_to(node: int) -> list[int]:
    """From the root of a binary tree; the parent of n is n // 2."""
    path = [node]
    while path[0] > 1:
        path.insert(0, path[0] // 2)
    return path


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leaves=st.lists(st.lists(st.integers(1, 4000), max_size=6), min_size=1, max_size=5),
    asked=st.integers(1, 4000),
)
async def test_counts_equal_a_brute_force_model_over_prefix_closed_sets(
    server: EmbeddedRedis, namespace: str, leaves: list[list[int]], asked: int
) -> None:
    redis = await connect(server.url, timeout_seconds=FAR)
    held = [{n for leaf in worker for n in path_to(leaf)} for worker in leaves]
    workers = [(WorkerId(f"w{i}"), Incarnation(i + 1)) for i in range(len(held))]
    for worker, nodes in zip(workers, held, strict=True):
        await publish(redis, namespace, worker, *nodes)
    prompt = path_to(asked)
    expected: dict[WorkerId, int] = {}
    for (worker_id, _), nodes in zip(workers, held, strict=True):
        count = next((i for i, n in enumerate(prompt) if n not in nodes), len(prompt))
        if count:
            expected[worker_id] = count
    assert await directory(redis, namespace).longest_prefix([block(n) for n in prompt], workers) == expected
    await redis.aclose()


@pytest.mark.parametrize("total", [1, 2, 3, 7, 8, 512])
async def test_every_length_of_a_chain_is_found(redis: Redis, namespace: str, total: int) -> None:
    lengths = sorted({0, 1, 2, 3, total // 2, total - 1, total} & set(range(total + 1)))
    for length in lengths:
        await publish(redis, namespace, W0, *range(length))
        found = await directory(redis, namespace).longest_prefix(blocks(total), [W0])
        assert found == ({W0[0]: length} if length else {})


async def test_a_lookup_is_one_round_trip_for_any_number_of_workers(redis: Redis, namespace: str) -> None:
    workers = [(WorkerId(f"w{i}"), Incarnation(1)) for i in range(16)]
    for i, worker in enumerate(workers):
        await publish(redis, namespace, worker, *range(30 * i))
    asking = directory(redis, namespace)
    await asking.longest_prefix(blocks(512), workers)  # the first one may have to send the script
    commands: list[str] = []
    async with redis.monitor() as monitor:
        found = await asking.longest_prefix(blocks(512), workers)
        await redis.echo("end")
        while (seen := await monitor.next_command())["command"] != "ECHO end":
            if seen["client_type"] != "lua" and namespace in seen["command"]:
                commands.append(seen["command"].split()[0])
    assert found == {f"w{i}": 30 * i for i in range(1, 16)}
    assert commands == ["EVALSHA"]


async def test_a_server_that_forgot_the_script_is_given_it_again(own_redis: Redis, namespace: str) -> None:
    await publish(own_redis, namespace, W0, *range(5))
    asking = directory(own_redis, namespace)
    for _ in range(2):
        await own_redis.script_flush()
        assert await asking.longest_prefix(blocks(10), [W0]) == {"w0": 5}


async def test_another_incarnations_blocks_do_not_count(redis: Redis, namespace: str) -> None:
    await publish(redis, namespace, W0, *range(5))
    assert await directory(redis, namespace).longest_prefix(blocks(10), [(W0[0], Incarnation(2))]) == {}


async def test_nothing_asked_is_answered_without_asking(redis: Redis, namespace: str) -> None:
    asking = directory(redis, namespace)
    assert await asking.longest_prefix([], [W0]) == {}
    assert await asking.longest_prefix(blocks(3), []) == {}
    assert asking.stats.lookups == 0


async def test_a_key_of_another_type_counts_as_empty(redis: Redis, namespace: str) -> None:
    w1 = (WorkerId("w1"), Incarnation(1))
    await redis.set(Keys(namespace).blocks(*W0), "not a set")
    await publish(redis, namespace, w1, *range(4))
    assert await directory(redis, namespace).longest_prefix(blocks(9), [W0, w1]) == {"w1": 4}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(held=st.sets(st.integers(0, 40)))
async def test_a_set_with_holes_gives_a_count_within_bounds(
    server: EmbeddedRedis, namespace: str, held: set[int]
) -> None:
    redis = await connect(server.url, timeout_seconds=FAR)
    await publish(redis, namespace, W0, *held)
    found = await directory(redis, namespace).longest_prefix(blocks(30), [W0])
    assert 0 <= found.get(W0[0], 0) <= 30
    assert (found == {}) == (0 not in held)
    await redis.aclose()


async def test_many_lookups_at_once_are_all_answered(redis: Redis, namespace: str) -> None:
    await publish(redis, namespace, W0, *range(100))
    asking = directory(redis, namespace)
    found = await asyncio.gather(*(asking.longest_prefix(blocks(n), [W0]) for n in range(1, 200)))
    assert [f[W0[0]] for f in found] == [min(n, 100) for n in range(1, 200)]


@pytest.mark.parametrize(
    "reply",
    [
        b":5\r\n",
        b"*0\r\n",
        b"*2\r\n:1\r\n:2\r\n",
        b"*1\r\n$3\r\nabc\r\n",
        b"*1\r\n*1\r\n:1\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n:-9\r\n",
        b"*1\r\n:999999999\r\n",
        b"*-1\r\n",
        b"-ERR no\r\n",
        b"-NOSCRIPT for ever\r\n",
        b"-OOM memory\r\n",
        b"$5\r\nhello\r\n",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"",
    ],
)
async def test_any_lie_is_no_more_than_a_wrong_hint(namespace: str, reply: bytes) -> None:
    answer: Callable[[list[bytes]], bytes] = lambda command: b"+PONG\r\n" if command[0] == b"PING" else reply  # noqa: E731  the type is the point
    async with false_server(answer) as url:
        redis = await connect(url, timeout_seconds=FAR)
        asking = directory(redis, namespace)
        found = await asking.longest_prefix(blocks(4), [W0])
        assert found in ({}, {"w0": 4})
        assert await asking.workers() == []
        await redis.aclose()


def test_names_in_the_makers_are_distinct() -> None:
    assert len(names(blocks(100))) == 100
