"""A real Valkey for all tests, and one of its own for each test that breaks it. Tests keep apart by namespace."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from inspect import isawaitable

import pytest
from redis.asyncio import Redis

from discovery import EmbeddedRedis, connect

DEADLINE_SECONDS = 20.0


async def eventually(condition: Callable[[], object | Awaitable[object]], what: str) -> object:
    """Polls until `condition` holds, and returns what it gave. Fails after a deadline that only defects reach."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        value = condition()
        if isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"never happened: {what}"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as running:
        yield running


@pytest.fixture
def own_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as running:
        yield running


@pytest.fixture
def namespace() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
async def redis(server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = await connect(server.url, timeout_seconds=10.0)
    yield client
    await client.aclose()


@pytest.fixture
async def own_redis(own_server: EmbeddedRedis) -> AsyncIterator[Redis]:
    client = await connect(own_server.url, timeout_seconds=10.0)
    yield client
    await client.aclose()
