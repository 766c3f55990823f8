"""One gRPC call in memory: messages are serialised, in order within a direction, each after a drawn delay; it ends
once for each side, whatever breaks. The client's side is the object itself, the server's is what it calls."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import grpc

from sim.loop import Node
from sim.words import words

if TYPE_CHECKING:
    from sim.network import Network

_NEXT = 1e-9
"""Seconds between two messages of a stream at the least."""


class End:
    """The last thing on a stream: gRPC's status."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> None:
        self.code = code
        self.details = details

    def error(self) -> grpc.aio.AioRpcError:
        return grpc.aio.AioRpcError(self.code, grpc.aio.Metadata(), grpc.aio.Metadata(), self.details)


_CANCELLED = End(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")


class Served(NamedTuple):
    node: Node
    handler: Callable[[], Awaitable[Any]]
    read_request: Callable[[bytes], Any]


class _Way:
    """One direction of a call."""

    def __init__(self, network: Network, call: Call, sender: Node, receiver: Node) -> None:
        self._network = network
        self._call = call
        self._sender = sender
        self._receiver = receiver
        self._arrived: deque[bytes | End] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._last = network.loop.now
        self._life = 0
        self.ended = False
        """Its end has arrived."""

    def send(self, item: bytes | End) -> None:
        network = self._network
        begins = max(network.loop.now, network.cut_until(self._sender.place, self._receiver.place))
        self._schedule(item, begins)
        if self._call.repeats and isinstance(item, bytes) and network.draw.random() < self._call.repeats:
            self._schedule(item, begins)

    def cut(self, end: End, *, lose: bool) -> float:
        """Nothing follows but `end`, which the receiver hears from its own side, when this says; with `lose`, what is
        under way is gone."""
        self._life += lose
        return self._schedule(end, self._network.loop.now)

    def _schedule(self, item: bytes | End, begins: float) -> float:
        network = self._network
        self._last = max(self._last + _NEXT, begins + network.delay())  # in order
        network.quiet_at = max(network.quiet_at, self._last)
        network.loop.at(self._last, self._arrive, item, self._life, node=self._receiver)
        return self._last

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
            f"{call.path} {self._sender.name} {self._receiver.name} ".encode() + data,
            lambda: call.told(item, self._sender, self._receiver),
        )
        self.put(item)


class Call:
    def __init__(
        self,
        network: Network,
        client: Node,
        served: Served | None,
        path: str,
        serialize: Any,
        deserialize: Any,
        timeout: float | None,
        repeats: float,
    ) -> None:
        """`served`: None where nobody listens. `repeats`: the share of its messages that arrive twice."""
        self.client, self.path, self.repeats = client, path, repeats
        self._network, self._serialize, self._deserialize = network, serialize, deserialize
        self._deadline = None if timeout is None else network.loop.now + timeout
        self.server = served.node if served is not None else None
        self._to_client = _Way(network, self, served.node if served is not None else client, client)
        self._to_server: _Way | None = None
        self._serving: asyncio.Task[None] | None = None
        self._broken = False
        if served is None:
            self._to_client.cut(End(grpc.StatusCode.UNAVAILABLE, "failed to connect"), lose=False)
            return
        network.calls[self] = None
        self._to_server = _Way(network, self, client, served.node)
        self._handler, self._read_request = served.handler, served.read_request
        begins = max(network.loop.now, network.cut_until(client.place, served.node.place)) + network.delay()
        network.loop.at(begins, self._begin, node=served.node)

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
        self.send(message)

    def send(self, message: Any) -> None:
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
        try:
            handler = await self._handler()
            assert self._to_server is not None
            requests = _Requests(self._to_server, handler.request_deserializer)
            if handler.stream_stream is not None:
                async for response in handler.stream_stream(requests, None):
                    self._to_client.send(handler.response_serializer(response))
            elif handler.unary_stream is not None:
                await handler.unary_stream(await anext(requests), _Context(self, handler.response_serializer))
            else:
                response = await handler.unary_unary(await anext(requests), None)
                self._to_client.send(handler.response_serializer(response))
            self._to_client.send(End())
        except StopAsyncIteration:
            pass
        except _Aborted as aborted:
            self._to_client.send(aborted.end)
        except Exception as error:
            self._network.broken(f"{self.path} raised {error!r}")
            self._to_client.send(End(grpc.StatusCode.UNKNOWN, repr(error)))
        finally:
            self._network.calls.pop(self, None)

    def _end_server(self, why: str, *, lose: bool) -> None:
        self._network.calls.pop(self, None)
        if self._to_server is None or self._broken:
            return
        self._broken = True
        self._network.loop.at(self._to_server.cut(End(), lose=lose), self._cancel_serving, node=self.server)

    def _cancel_serving(self) -> None:
        if self._serving is not None:
            self._serving.cancel()

    # --- faults

    def break_off(self, why: str) -> None:
        """Both sides hear of it, each in its time, if they live."""
        lose = self._network.draw.random() < 0.7
        self._to_client.cut(End(grpc.StatusCode.UNAVAILABLE, why), lose=lose)
        self._end_server(why, lose=lose)

    def told(self, item: bytes | End, sender: Node, receiver: Node) -> str:
        """A line for the story: who says what to whom."""
        if isinstance(item, End):
            ok = item.code is grpc.StatusCode.OK
            return "" if ok else f"{sender.name} → {receiver.name}: {item.code.name} ({item.details})"
        read = self._read_request if receiver is self.server else self._deserialize
        message = read(item)
        said = words(message)
        return f"{sender.name} → {receiver.name}: {said}" if said else ""


class _Requests:
    """What a servicer iterates over. No generator: what becomes of one that is left half-way is the collector's."""

    def __init__(self, way: _Way, deserialize: Any) -> None:
        self._way = way
        self._deserialize = deserialize

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        item = await self._way.get()
        if isinstance(item, End):
            raise StopAsyncIteration
        return self._deserialize(item)


class _Aborted(Exception):
    def __init__(self, end: End) -> None:
        super().__init__(end.details)
        self.end = end


class _Context:
    """What a servicer that writes asks of grpc.aio.ServicerContext."""

    def __init__(self, call: Call, serialize: Any) -> None:
        self._call = call
        self._serialize = serialize

    def time_remaining(self) -> float | None:
        """The client itself waits patiently behind it: that the router keeps it is to be seen."""
        deadline = self._call._deadline
        return None if deadline is None else deadline - self._call._network.loop.now

    async def write(self, message: Any) -> None:
        self._call._to_client.send(self._serialize(message))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        raise _Aborted(End(code, details))
