"""The fault-injecting proxy itself: what it carries, and each way in which it does not."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.faults.proxy import Direction, Proxy
from tests.faults.sockets import free_ports

HOST = "127.0.0.1"
BOTH = frozenset(Direction)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def echoing() -> AsyncIterator[tuple[Proxy, Streams]]:
    """A server that echoes, a proxy in front of it, and a connection by `me`."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    rng = random.Random(1)
    server = await asyncio.start_server(echo, HOST, 0)
    (port,) = free_ports(rng, 1, [HOST])
    proxy = Proxy((HOST, port), server.sockets[0].getsockname(), lambda _: "me", rng)
    await proxy.start()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        yield proxy, (reader, writer)
    finally:
        writer.close()
        await proxy.close()
        server.close()


async def said(streams: Streams, data: bytes) -> bytes:
    reader, writer = streams
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 5)


async def rest(streams: Streams) -> bytes:
    """All that still comes, be it cut off or ended."""
    got = b""
    try:
        while data := await asyncio.wait_for(streams[0].read(65536), 5):
            got += data
    except ConnectionError:
        pass
    return got


async def test_it_carries_both_ways_and_passes_the_end_on() -> None:
    async with echoing() as (proxy, streams):
        data = random.Random(2).randbytes(1 << 20)
        assert await said(streams, data) == data
        streams[1].write_eof()
        assert await rest(streams) == b""
        await gone(proxy)


async def test_a_cut_resets_what_is_open_and_lets_new_ones_in() -> None:
    async with echoing() as (proxy, streams):
        assert await said(streams, b"hello") == b"hello"
        proxy.cut("somebody else")
        assert await said(streams, b"hello") == b"hello"
        proxy.cut("me")
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await said(streams, b"hello")
        await gone(proxy)
        again = await asyncio.open_connection(HOST, streams[1].get_extra_info("peername")[1])
        assert await said(again, b"hello") == b"hello"
        again[1].close()


async def test_a_torn_connection_breaks_in_the_middle_of_a_message() -> None:
    async with echoing() as (proxy, streams):
        assert await said(streams, b"hello") == b"hello"
        proxy.tear()
        streams[1].write(b"0123456789")
        assert b"0123456789".startswith(await rest(streams))
        await gone(proxy)


async def test_a_half_closed_direction_ends_and_the_other_goes_on() -> None:
    async with echoing() as (proxy, streams):
        assert await said(streams, b"hello") == b"hello"
        proxy.half_close(Direction.REPLIES)
        streams[1].write(b"into the void")
        assert await rest(streams) == b""
        assert proxy.open == 1, "what is asked still passes"


@pytest.mark.parametrize("directions", [BOTH, frozenset({Direction.REPLIES})])
async def test_what_is_stalled_comes_when_healed_and_nothing_closes(directions: frozenset[Direction]) -> None:
    async with echoing() as (proxy, streams):
        assert await said(streams, b"hello") == b"hello"
        proxy.stall(directions, "me")
        streams[1].write(b"late")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(streams[0].read(1), 0.2)
        proxy.heal("me")
        assert await asyncio.wait_for(streams[0].readexactly(4), 5) == b"late"


async def test_a_server_that_is_not_there_is_a_reset() -> None:
    rng = random.Random(3)
    at, nobody = free_ports(rng, 2, [HOST])
    proxy = Proxy((HOST, at), (HOST, nobody), lambda _: "me", rng)
    await proxy.start()
    streams = await asyncio.open_connection(HOST, at)
    assert await rest(streams) == b""
    streams[1].close()
    await proxy.close()


async def gone(proxy: Proxy) -> None:
    async with asyncio.timeout(5):
        while proxy.open:  # noqa: ASYNC110 - a connection's end has no event to wait for
            await asyncio.sleep(0.01)
