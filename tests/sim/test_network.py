"""The network in memory: in order and once, unless a scenario says otherwise; and what cuts and deaths do to a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any

import grpc
import pytest

from sim.loop import Node, VirtualLoop
from sim.network import KEEPALIVE_SECONDS, Network, Server
from sim.scenario import Delays
from sim.trace import Trace

PATH = "/test.Echo/Echo"


async def echo(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


class Rig:
    """One who calls and one who echoes."""

    def __init__(self, repeats: float = 0.0) -> None:
        self.loop = VirtualLoop(lambda: 0.001)
        self.broken: list[str] = []
        trace = Trace(lambda: self.loop.now, story=False)
        delays = Delays(usual=0.01, slow=1.0, slow_share=0.1, thread=0.001, repeat_share=repeats)
        self.network = Network(self.loop, Random(1), delays, trace, self.broken.append)
        self.near, self.far = Node("near"), Node("far")
        handler = grpc.stream_stream_rpc_method_handler(echo, lambda data: data, lambda data: data)  # type: ignore[arg-type]
        Server(self.network, self.far, "far:1").add_registered_method_handlers("test.Echo", {"Echo": handler})

    def run(self, work: Callable[[Any], Awaitable[None]]) -> None:
        """`work` is given an open call."""

        async def main() -> None:
            call = self.network.open_channel("far:1").stream_stream(PATH, lambda data: data, lambda data: data)()
            await work(call)

        self.loop.run_until_complete(self.near.context.run(self.loop.create_task, main()))
        self.loop.bury([self.near, self.far])
        assert not self.broken


def numbered(count: int) -> list[bytes]:
    return [b"%d" % number for number in range(count)]


def test_messages_arrive_once_and_in_order_however_long_each_takes() -> None:
    async def work(call: Any) -> None:
        for message in numbered(50):
            await call.write(message)
        await call.done_writing()
        got = []
        while (message := await call.read()) is not grpc.aio.EOF:
            got.append(message)
        assert got == numbered(50)

    Rig().run(work)


def test_some_arrive_twice_where_the_scenario_says_so() -> None:
    async def work(call: Any) -> None:
        for message in numbered(50):
            await call.write(message)
        await call.done_writing()
        got = []
        while (message := await call.read()) is not grpc.aio.EOF:
            got.append(message)
        assert len(got) > 50
        assert list(dict.fromkeys(got)) == numbered(50)

    Rig(repeats=0.2).run(work)


def test_a_cut_holds_messages_up_until_it_is_over() -> None:
    rig = Rig()

    async def work(call: Any) -> None:
        await call.write(b"before")
        assert await call.read() == b"before"
        rig.network.cut("far", "near", 5.0, resets=False)
        over_at = rig.loop.now + 5.0
        await call.write(b"during")
        assert await call.read() == b"during"
        assert over_at < rig.loop.now < over_at + 3.0

    rig.run(work)


def test_a_cut_that_resets_breaks_what_was_under_way() -> None:
    rig = Rig()

    async def work(call: Any) -> None:
        rig.network.cut("near", "far", 5.0, resets=True)
        with pytest.raises(grpc.aio.AioRpcError, match="connection reset"):
            await call.read()

    rig.run(work)


def test_a_peer_that_is_silent_for_too_long_is_given_up() -> None:
    rig = Rig()

    async def work(call: Any) -> None:
        rig.network.cut("near", "far", 60.0, resets=False)
        with pytest.raises(grpc.aio.AioRpcError, match="keepalive"):
            await call.read()
        assert KEEPALIVE_SECONDS <= rig.loop.now < KEEPALIVE_SECONDS + 2.0

    rig.run(work)


def test_a_death_is_heard_of_and_then_nobody_listens() -> None:
    rig = Rig()

    async def work(call: Any) -> None:
        rig.far.dead = True
        rig.network.died(rig.far, silently=False)
        with pytest.raises(grpc.aio.AioRpcError, match="the peer died"):
            await call.read()
        again = rig.network.open_channel("far:1").stream_stream(PATH, None, None)()
        with pytest.raises(grpc.aio.AioRpcError, match="failed to connect"):
            await again.read()

    rig.run(work)


def test_a_client_that_cancels_ends_the_servers_side_too() -> None:
    rig = Rig()

    async def work(call: Any) -> None:
        await call.write(b"before")
        assert await call.read() == b"before"
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()
        await rig.loop.pause(2.0)
        assert not rig.network.calls

    rig.run(work)
