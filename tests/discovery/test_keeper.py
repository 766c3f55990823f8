"""`python -m discovery`: the process that keeps the embedded Redis for `baton up`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.system.harness import ROOT, children, running_now, until


@pytest.fixture
async def keeper() -> AsyncIterator[tuple[asyncio.subprocess.Process, Redis]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "discovery", stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    words = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()
    assert words[:3] == ["baton", "redis", "ready"]
    redis = Redis.from_url(words[3].removeprefix("url="))
    yield process, redis
    await redis.aclose()
    if process.returncode is None:
        process.kill()
        await process.wait()


async def test_a_killed_server_comes_back_on_its_port(keeper: tuple[asyncio.subprocess.Process, Redis]) -> None:
    process, redis = keeper
    assert await redis.ping()
    [server] = children(process.pid)
    os.kill(server, signal.SIGKILL)

    async def answers() -> bool:
        try:
            return bool(await redis.ping()) and children(process.pid) != [server]
        except (OSError, RedisError):
            return False

    await until(answers, 20, lambda: "the server did not come back")


async def test_sigterm_ends_keeper_and_server_at_any_moment() -> None:
    async def once(number: int) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "discovery", stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        assert process.stdout is not None
        await process.stdout.readline()
        [server] = children(process.pid)
        await asyncio.sleep(number * 0.013)  # the moments are spread over a turn of its loop
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert not running_now(server)

    await asyncio.gather(*(once(number) for number in range(8)))
