"""The network below gRPC's generated stubs, in memory: who listens where, who is cut off from whom, and how long a
message takes. One call is sim/call.py's. Stubs, servicers, interceptors and all above are production's own."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

import grpc

from sim.call import Call, End, Served
from sim.loop import NODE, Node, VirtualLoop
from sim.scenario import Delays
from sim.trace import Trace

KEEPALIVE_SECONDS = 10.0
"""After so long a silent peer is given up, by both sides' pings."""


class Network:
    def __init__(
        self, loop: VirtualLoop, draw: Random, delays: Delays, trace: Trace, broken: Callable[[str], None]
    ) -> None:
        self.loop = loop
        self.draw = draw
        self.delay = partial(delays.network, draw)
        self.repeats = delays.repeat_share
        self.trace = trace
        self.broken = broken
        self.servers: dict[str, Server] = {}
        self.calls: dict[Call, None] = {}
        """Under way."""
        self.quiet_at = 0.0
        """When all that is under way will have arrived."""
        self.asked: Counter[str] = Counter()
        """Calls that there were, by path."""
        self._cuts: dict[frozenset[str], float] = {}

    def open_channel(self, address: str, options: Sequence[tuple[str, int]] = ()) -> Any:
        """Keeps the contract of baton.rpc.OpenChannel."""
        return Channel(self, address)

    # --- who cannot hear whom

    def cut(self, one: str, other: str, seconds: float, resets: bool) -> None:
        """Between two places all messages are held up. What is silent for as long as keepalive allows is given up;
        with `resets`, what was under way is gone when they hear each other again."""
        pair = frozenset((one, other))
        self._cuts[pair] = max(self._cuts.get(pair, 0.0), self.loop.now + seconds)
        if seconds > KEEPALIVE_SECONDS:
            self.loop.later(KEEPALIVE_SECONDS, self._lose_between, pair, "keepalive ping timed out", node=_NOBODY)
        elif resets:
            self.loop.later(seconds, self._lose_between, pair, "connection reset", node=_NOBODY)

    def cut_until(self, one: str, other: str) -> float:
        """When they hear each other again; in the past where they do."""
        return self._cuts.get(frozenset((one, other)), 0.0) if self._cuts else 0.0

    def is_cut(self, one: str, other: str) -> bool:
        return self.cut_until(one, other) > self.loop.now

    def _lose_between(self, pair: frozenset[str], why: str) -> None:
        for call in list(self.calls):
            if call.server is not None and {call.client.place, call.server.place} == pair:
                call.break_off(why)

    # --- who lives

    def died(self, node: Node, silently: bool) -> None:
        """A process that is killed has its kernel say so; a host that is lost says nothing."""
        seconds = KEEPALIVE_SECONDS if silently else self.delay()
        self.loop.later(seconds, self._lose, node, "the peer died", node=_NOBODY)

    def paused(self, node: Node) -> None:
        self.loop.later(KEEPALIVE_SECONDS, self._lose_if_paused, node, node=_NOBODY)

    def _lose_if_paused(self, node: Node) -> None:
        if node.paused:
            self._lose(node, "keepalive ping timed out")

    def _lose(self, node: Node, why: str) -> None:
        for call in [c for c in self.calls if node in (c.client, c.server)]:
            call.break_off(why)


_NOBODY = Node("network")


class Server:
    """What generated code registers services at."""

    def __init__(
        self, network: Network, node: Node, address: str, interceptor: grpc.aio.ServerInterceptor | None = None
    ) -> None:
        self.node = node
        self._interceptor = interceptor
        self.methods: dict[str, Any] = {}
        network.servers[address] = self

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        for name, handler in handlers.items():
            self.methods[f"/{service}/{name}"] = handler

    async def handler(self, path: str) -> Any:
        async def continuation(details: Any) -> Any:
            return self.methods[path]

        if self._interceptor is None:
            return self.methods[path]
        return await self._interceptor.intercept_service(continuation, _Details(path))  # type: ignore[arg-type]  # gRPC's has no constructor


class _Details:
    """grpc.HandlerCallDetails."""

    def __init__(self, method: str) -> None:
        self.method = method


class Channel:
    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._calls: list[Call] = []

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        repeats = self._network.repeats
        return lambda: self._call(path, request_serializer, response_deserializer, repeats=repeats)

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def ask(request: Any, timeout: float | None = None) -> Call:
            call = self._call(path, request_serializer, response_deserializer, timeout)
            call.send(request)
            return call

        return ask

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        async def ask(request: Any, timeout: float) -> Any:
            call = self._call(path, request_serializer, response_deserializer, timeout)
            try:
                async with asyncio.timeout(timeout):
                    call.send(request)
                    return await call.read()
            except TimeoutError:
                raise End(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded").error() from None
            finally:
                call.cancel()

        return ask

    def _call(
        self, path: str, serialize: Any, deserialize: Any, timeout: float | None = None, repeats: float = 0.0
    ) -> Call:
        client, server = NODE.get(), self._network.servers.get(self._address)
        assert client is not None, "a call is some process's"
        served = None
        if server is not None and not server.node.dead:
            served = Served(server.node, partial(server.handler, path), server.methods[path].request_deserializer)
        call = Call(self._network, client, served, path, serialize, deserialize, timeout, repeats)
        self._network.asked[path] += 1
        self._calls.append(call)
        return call
