"""The network below gRPC's generated stubs, in memory: serialised messages, in order within a stream, each after a
drawn delay; streams that break, peers that die or fall silent. Stubs, servicers and all above are production's own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import grpc

from sim.loop import NODE, Node, VirtualLoop
from sim.trace import Trace

_NEXT = 1e-9
"""Seconds between two messages of a stream at the least."""

KEEPALIVE_SECONDS = 10.0
"""After so long a silent peer is given up, by both sides' pings."""


class End:
    """The last thing on a stream: gRPC's status."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        self.code = code
        self.details = details

    def error(self) -> grpc.aio.AioRpcError:
        return grpc.aio.AioRpcError(self.code, grpc.aio.Metadata(), grpc.aio.Metadata(), self.details)


class Network:
    def __init__(
        self, loop: VirtualLoop, draw: Random, delay: Callable[[], float], trace: Trace, broken: Callable[[str], None]
    ) -> None:
        self.loop = loop
        self.draw = draw
        self.delay = delay
        self.trace = trace
        self.broken = broken
        self.servers: dict[str, Server] = {}
        self.calls: dict[Call, None] = {}
        """Under way."""

    def open_channel(self, address: str, options: Sequence[tuple[str, int]] = ()) -> Any:
        """Keeps the contract of baton.rpc.OpenChannel."""
        return Channel(self, address)

    def died(self, node: Node, silently: bool) -> None:
        """A process that is killed has its kernel say so; a host that is lost says nothing."""
        seconds = KEEPALIVE_SECONDS if silently else self.delay()
        self.loop.call_later(seconds, self._lose, node, "the peer died", context=_NOBODY)

    def paused(self, node: Node) -> None:
        self.loop.call_later(KEEPALIVE_SECONDS, self._lose_if_paused, node, context=_NOBODY)

    def _lose_if_paused(self, node: Node) -> None:
        if node.paused:
            self._lose(node, "keepalive ping timed out")

    def _lose(self, node: Node, why: str) -> None:
        for call in [c for c in self.calls if node in (c.client, c.server)]:
            call.break_off(why)


_NOBODY = Node("network").context


class Server:
    """What generated code registers services at."""

    def __init__(self, network: Network, node: Node) -> None:
        self.node = node
        self.methods: dict[str, Any] = {}
        self._network = network

    def listen(self, address: str) -> None:
        self._network.servers[address] = self

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        for name, handler in handlers.items():
            self.methods[f"/{service}/{name}"] = handler


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
        return lambda: self._call(path, request_serializer, response_deserializer)

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        async def ask(request: Any, timeout: float) -> Any:
            call = self._call(path, request_serializer, response_deserializer)
            try:
                async with asyncio.timeout(timeout):
                    await call.write(request)
                    return await call.read()
            except TimeoutError:
                raise End(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded").error() from None
            finally:
                call.cancel()

        return ask

    def _call(self, path: str, serialize: Any, deserialize: Any) -> Call:
        call = Call(self._network, self._address, path, serialize, deserialize)
        self._calls.append(call)
        return call


class _Way:
    """One direction of a call."""

    def __init__(self, network: Network, call: Call, receiver: Node) -> None:
        self._network = network
        self._call = call
        self._receiver = receiver
        self._arrived: deque[bytes | End] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._last = network.loop.time()
        self._life = 0
        self.ended = False
        """Its end has arrived."""

    def send(self, item: bytes | End) -> None:
        loop = self._network.loop
        self._last = max(self._last + _NEXT, loop.time() + self._network.delay())  # timers of one moment have no order
        loop.call_at(self._last, self._arrive, item, self._life, context=self._receiver.context)

    def cut(self, end: End, *, lose: bool) -> None:
        """Nothing follows but `end`; with `lose`, what is under way is gone."""
        self._life += lose
        self.send(end)

    def put(self, item: bytes | End) -> None:
        if self.ended:
            return
        self.ended = isinstance(item, End)
        self._arrived.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> bytes | End:
        while not self._arrived:
            self._waiter = self._network.loop.create_future()
            await self._waiter
        return self._arrived[0] if isinstance(self._arrived[0], End) else self._arrived.popleft()

    def _arrive(self, item: bytes | End, life: int) -> None:
        if life != self._life or self.ended:
            return
        call = self._call
        data = item if isinstance(item, bytes) else item.code.name.encode()
        self._network.trace.count(
            f"{call.path} {call.client.name} {self._receiver.name} ".encode() + data,
            lambda: call.told(item, self._receiver),
        )
        self.put(item)


_CANCELLED = End(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")


class Call:
    """The client's side, and under `_serve` the server's."""

    def __init__(self, network: Network, address: str, path: str, serialize: Any, deserialize: Any) -> None:
        client = NODE.get()
        assert client is not None, "a call is some process's"
        self.client, self.path = client, path
        self._network, self._serialize, self._deserialize = network, serialize, deserialize
        self._to_client = _Way(network, self, client)
        server = network.servers.get(address)
        self.server = server.node if server is not None else None
        self._to_server: _Way | None = None
        self._serving: asyncio.Task[None] | None = None
        self._broken = False
        if server is None or server.node.dead:
            self._to_client.send(End(grpc.StatusCode.UNAVAILABLE, "failed to connect"))
            return
        network.calls[self] = None
        self._to_server = _Way(network, self, server.node)
        self._handler = server.methods[path]
        network.loop.call_later(network.delay(), self._begin, context=server.node.context)

    # --- the client's side

    async def read(self) -> Any:
        item = await self._to_client.get()
        if isinstance(item, bytes):
            return self._deserialize(item)
        if item is _CANCELLED:
            raise asyncio.CancelledError
        if item.code is grpc.StatusCode.OK:
            return grpc.aio.EOF
        raise item.error()

    async def write(self, message: Any) -> None:
        if self._to_client.ended:
            raise asyncio.InvalidStateError("the call is over")
        if self._to_server is not None:
            self._to_server.send(self._serialize(message))

    async def done_writing(self) -> None:
        if self._to_server is not None and not self._to_client.ended:
            self._to_server.send(End())

    def cancel(self) -> bool:
        if self._to_client.ended:
            return False
        self._to_client.put(_CANCELLED)
        self._end_server("the client cancelled", lose=self._network.draw.random() < 0.5)
        return True

    async def code(self) -> grpc.StatusCode:
        item = await self._to_client.get()
        assert isinstance(item, End)
        return item.code

    # --- the server's side

    def _begin(self) -> None:
        if not self._broken:
            self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        handler = self._handler
        try:
            if handler.stream_stream is not None:
                async for response in handler.stream_stream(_Requests(self), None):
                    self._to_client.send(handler.response_serializer(response))
            else:
                response = await handler.unary_unary(await anext(_Requests(self)), None)
                self._to_client.send(handler.response_serializer(response))
            self._to_client.send(End())
        except StopAsyncIteration:
            pass
        except Exception as error:
            self._network.broken(f"{self.path} raised {error!r}")
            self._to_client.send(End(grpc.StatusCode.UNKNOWN, repr(error)))
        finally:
            self._network.calls.pop(self, None)

    def _end_server(self, why: str, *, lose: bool) -> None:
        self._network.calls.pop(self, None)
        if self._to_server is None or self._broken or self.server is None:
            return
        self._broken = True
        self._to_server.cut(End(), lose=lose)
        loop = self._network.loop
        loop.call_at(self._to_server._last, self._cancel_serving, context=self.server.context)

    def _cancel_serving(self) -> None:
        if self._serving is not None:
            self._serving.cancel()

    def request(self, data: bytes) -> Any:
        return self._handler.request_deserializer(data)

    # --- faults

    def break_off(self, why: str) -> None:
        """Both sides hear of it, each in its time, if they live."""
        lose = self._network.draw.random() < 0.7
        self._to_client.cut(End(grpc.StatusCode.UNAVAILABLE, why), lose=lose)
        self._end_server(why, lose=lose)

    def told(self, item: bytes | End, receiver: Node) -> str:
        """A line for the story: who says what to whom. What only tells of load is left out."""
        to_server = receiver is self.server and receiver is not self.client
        sender = self.client if to_server else self.server
        name = sender.name if sender is not None else "nobody"
        if isinstance(item, End):
            ok = item.code is grpc.StatusCode.OK
            return "" if ok else f"{name} → {receiver.name}: {item.code.name} ({item.details})"
        message = self.request(item) if to_server else self._deserialize(item)
        said = _words(message)
        return f"{name} → {receiver.name}: {said}" if said else ""


class _Requests:
    """What a servicer iterates over."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        assert self._call._to_server is not None
        item = await self._call._to_server.get()
        if isinstance(item, End):
            raise StopAsyncIteration
        return self._call.request(item)


def _words(message: Any) -> str:
    match message.DESCRIPTOR.name:
        case "KeepRequest":
            return "keep"
        case "LendRequest":
            return f"lend {message.request_id}#{message.attempt} {len(message.hashes)} blocks"
    kind = message.WhichOneof("message")
    if kind is None:
        return "nothing"
    body = getattr(message, kind)
    match kind:
        case "step":
            return ", ".join(filter(None, map(_event_words, body.events)))
        case "submit":
            task = {1: "PREFILL", 2: "RECEIVE", 3: "LOCAL"}.get(body.task, str(body.task))
            return f"submit {_id(body.id)} {task}, {len(body.token_ids)} tokens"
        case "handoff" | "cancel":
            return f"{kind} {_id(body.id)}"
        case "claim":
            return f"claim {body.request_id.partition('~')[0]}#{body.attempt} from block {body.first_block}"
        case "sealed":
            return f"sealed {', '.join(str(b.position) for b in body.blocks)}"
        case "refused":
            return f"refused: {body.message}"
        case _:
            return str(kind)


def _event_words(event: Any) -> str:
    kind = event.WhichOneof("event")
    if kind == "tokens":
        return f"{_id(event.id)} tokens {event.tokens.index}+{len(event.tokens.token_ids)}"
    if kind == "ended":
        return f"{_id(event.id)} ended, reason {event.ended.reason} {event.ended.message}".rstrip()
    return f"{_id(event.id)} {kind}"


def _id(id: Any) -> str:
    return f"{id.request_id.partition('~')[0]}#{id.attempt}"
