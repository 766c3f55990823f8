"""The simulator's Redis answers what a real one does: the same commands and scripts to both, from one seed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from random import Random
from typing import Any

import pytest
from redis.asyncio import Redis

from discovery import EmbeddedRedis, connect
from discovery.keys import Keys, block_name, joined_names
from discovery.scripts import DEREGISTER, LIST_WORKERS, LONGEST_PREFIX
from sim.loop import VirtualLoop
from sim.redis import SimRedis, SimRedisClient
from tests.discovery.makers import block

KEYS = Keys("compared")
MINUTE = 60_000


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as running:
        yield running


@pytest.fixture
async def real(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = await connect(server.url, timeout_seconds=10.0)
    await client.flushall()
    yield client
    await client.aclose()


class Both:
    """Asks both, and holds one to the other."""

    def __init__(self, real: Redis) -> None:
        self.real: Any = real
        self.loop = VirtualLoop(lambda: 0.0)
        self.ours: Any = SimRedisClient(SimRedis(self.loop, lambda: 0.001), "here")

    async def pipe(self, *commands: tuple[Any, ...], transaction: bool = False) -> list[Any]:
        answers = []
        for client in (self.real, self.ours):
            pipe = client.pipeline(transaction=transaction)
            for name, *arguments in commands:
                named = {"px": arguments.pop()} if name == "set" else {}
                getattr(pipe, name)(*arguments, **named)
            answers.append(await self._run(client, pipe.execute()))
        assert answers[0] == answers[1], commands
        return answers[0]  # type: ignore[no-any-return]

    async def script(self, script: Any, keys: list[str], *arguments: Any) -> Any:
        real, ours = [await self._run(client, script(client, keys, *arguments)) for client in (self.real, self.ours)]
        if script is LIST_WORKERS:  # in no order
            real, ours = [[a[0], sorted(zip(a[1::2], a[2::2], strict=True))] for a in (real, ours)]
        assert real == ours, script
        return ours

    async def _run(self, client: Any, asking: Any) -> Any:
        if client is self.real:
            return await asking
        return await asyncio.to_thread(self.loop.run_until_complete, asking)


@pytest.fixture
def both(real: Redis) -> Iterator[Both]:
    both = Both(real)
    yield both
    both.loop.close()


async def test_heartbeats_and_lists(both: Both) -> None:
    draw = Random("heartbeats")
    epoch = ("epoch-word",)
    for _ in range(60):
        worker = f"w{draw.randrange(4)}"
        record = f"record {draw.randrange(3)} of {worker}".encode()
        blocks = f"{{compared}}:blocks:{worker}:1"
        match draw.randrange(5):
            case 0 | 1:
                await both.pipe(
                    ("getrange", KEYS.worker(worker), 0, 4096),  # type: ignore[arg-type]
                    ("set", KEYS.worker(worker), record, MINUTE),  # type: ignore[arg-type]
                    ("sadd", KEYS.workers, worker),
                    ("pexpire", KEYS.workers, MINUTE),
                    ("pexpire", blocks, MINUTE),
                    ("scard", blocks),
                )
            case 2:
                await both.script(DEREGISTER, [KEYS.worker(worker), KEYS.workers, blocks], record, worker)  # type: ignore[arg-type]
            case 3:
                await both.pipe(("unlink", KEYS.worker(worker)))  # type: ignore[arg-type]  # its lease ran out
            case _:
                await both.script(LIST_WORKERS, [KEYS.workers, KEYS.epoch], KEYS.worker_prefix, 4096, 9, *epoch)


async def test_block_sets_and_longest_prefixes(both: Both) -> None:
    draw = Random("blocks")
    keys = [f"{{compared}}:blocks:w{number}:1" for number in range(3)]
    for _ in range(80):
        key, names = draw.choice(keys), [block_name(block(draw.randrange(12))) for _ in range(3)]
        change = draw.choice((("sadd", key, *names), ("srem", key, *names), ("unlink", key)))
        await both.pipe(change, ("pexpire", key, MINUTE), ("scard", key), transaction=True)
        wanted = [block(number) for number in range(draw.randrange(1, 12))]
        await both.script(LONGEST_PREFIX, keys, joined_names(wanted), 16)


async def test_what_has_a_lease_is_gone_behind_it(both: Both) -> None:
    store = both.ours._server.store
    store.set("lease", b"held", px=1000)
    assert store.string("lease") == b"held"
    both.loop.now += 1.0
    assert store.string("lease") == b""
    assert store.pexpire("lease", 1000) is False
