"""A TCP proxy on loopback that breaks what passes through it, in the ways in which networks do.

It knows who dialled, so that a fault can be of one pair of parts and spare the others. It understands nothing of what
it carries. All faults end with `heal`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Callable
from enum import Enum

_CHUNK = 64 * 1024
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that makes a close a reset

ANYBODY = ""
"""In the place of a client's name: all of them."""

Address = tuple[str, int]


class Direction(Enum):
    REQUESTS = "requests"
    """From who dialled to the server."""
    REPLIES = "replies"


class _Connection:
    def __init__(self, client: str, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.client = client
        self.torn = False
        """It breaks in the middle of what comes next."""
        self.ended: set[Direction] = set()
        self.towards = {Direction.REPLIES: near, Direction.REQUESTS: far}

    def abort(self) -> None:
        for writer in self.towards.values():
            _reset(writer)


class Proxy:
    def __init__(self, at: Address, to: Address, who: Callable[[Address], str], rng: random.Random) -> None:
        """`who` names the client that dialled from an address."""
        self._at = at
        self._to = to
        self._who = who
        self._rng = rng
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stalled: set[tuple[str, Direction]] = set()
        self._delays: dict[str, float] = {}
        self._changed = asyncio.Event()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, *self._at)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in set(self._connections):
            connection.abort()
        for task in set(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def open(self) -> int:
        return len(self._connections)

    # --- faults

    def cut(self, client: str = ANYBODY) -> None:
        """Open connections are reset, whatever is on its way."""
        for connection in self._of(client):
            connection.abort()

    def tear(self, client: str = ANYBODY) -> None:
        """Open connections pass on half of what comes next, and are reset then."""
        for connection in self._of(client):
            connection.torn = True

    def half_close(self, direction: Direction, client: str = ANYBODY) -> None:
        """One direction of the open connections ends as if its sender had hung up; the other goes on."""
        for connection in self._of(client):
            if direction not in connection.ended:
                connection.ended.add(direction)
                with contextlib.suppress(OSError):
                    connection.towards[direction].write_eof()

    def stall(self, directions: frozenset[Direction], client: str = ANYBODY) -> None:
        """Until healed nothing passes, and nothing closes either: as a network that drops every packet."""
        self._stalled |= {(client, direction) for direction in directions}

    def delay(self, seconds: float, client: str = ANYBODY) -> None:
        """Until healed each piece takes up to so much longer."""
        self._delays[client] = seconds

    def heal(self, client: str = ANYBODY) -> None:
        self._stalled = {(name, direction) for name, direction in self._stalled if name != client}
        self._delays.pop(client, None)
        self._changed.set()
        self._changed = asyncio.Event()

    def _of(self, client: str) -> list[_Connection]:
        return [c for c in self._connections if client in (ANYBODY, c.client)]

    # --- what passes

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except OSError:
            _reset(writer)  # nobody listens there
        except asyncio.CancelledError:  # the proxy closes; asyncio's streams would log it
            _reset(writer)
        finally:
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = self._who(writer.get_extra_info("peername"))
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        connection = _Connection(client, writer, far_writer)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._pump(connection, Direction.REQUESTS, reader),
                self._pump(connection, Direction.REPLIES, far_reader),
            )
        finally:
            self._connections.discard(connection)
            for each in (writer, far_writer):
                each.close()

    async def _pump(self, connection: _Connection, direction: Direction, source: asyncio.StreamReader) -> None:
        target = connection.towards[direction]
        try:
            while data := await source.read(_CHUNK):
                await self._passage(connection.client, direction)
                if direction in connection.ended:
                    continue  # into the void, as what is sent to one who has stopped to listen
                if connection.torn:
                    target.write(data[: len(data) // 2])
                    await target.drain()
                    break
                target.write(data)
                await target.drain()
            else:
                await self._passage(connection.client, direction)
                if direction not in connection.ended:
                    connection.ended.add(direction)
                    target.write_eof()
                return
        except (OSError, RuntimeError):  # reset by one side, or closed by the other direction's end
            pass
        connection.abort()

    async def _passage(self, client: str, direction: Direction) -> None:
        while not self._stalled.isdisjoint({(ANYBODY, direction), (client, direction)}):
            await self._changed.wait()
        longest = max(self._delays.get(ANYBODY, 0.0), self._delays.get(client, 0.0))
        if longest:
            await asyncio.sleep(self._rng.uniform(0.0, longest))


def _reset(writer: asyncio.StreamWriter) -> None:
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
