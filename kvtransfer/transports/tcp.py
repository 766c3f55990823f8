"""The puller's side of the tcp transport: a pool of connections to one source's data server.

One fetch has one socket for itself, in a thread, with blocking calls: on a loopback that is several times as fast as an
event loop's streams. A fetch that is cancelled shuts its socket down, which wakes its thread at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor

from baton.errors import PeerLost, TransferRefused
from baton.ids import TransferId
from kvtransfer.checksum import PIECE_BYTES, Xxh3
from kvtransfer.gate import Gate
from kvtransfer.memory import PoolMemory
from kvtransfer.transports import frames
from kvtransfer.transports.base import Fetched, Want, landed_right, right
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus
from kvtransfer.transports.sockets import MAX_BUFFERS, receive, receive_bytes, send
from kvtransfer.transports.tcp_server import NAME

__all__ = ["NAME", "TcpConnection"]

CONNECT_SECONDS = 3.0
BLOCK_SECONDS = 5.0
"""For the reply's header and for each block, or piece of small ones: after so long the source is taken for lost."""
MAX_IDLE_SOCKETS = 4
_FETCHES = 8  # at once, each with a socket
_FETCHED = {
    BlockStatus.SENT: Fetched.LANDED,
    BlockStatus.STALE: Fetched.STALE,
    BlockStatus.REFUSED: Fetched.REFUSED,
}


class TcpConnection:
    fetch_bytes = 16 << 20

    def __init__(
        self,
        host: str,
        port: int,
        memory: PoolMemory,
        executor: Executor,
        *,
        connect_seconds: float = CONNECT_SECONDS,
        block_seconds: float = BLOCK_SECONDS,
    ) -> None:
        self._peer = (host, port)
        self._memory = memory
        self._executor = executor
        self._connect_seconds = connect_seconds
        self._block_seconds = block_seconds
        self.slots = asyncio.Semaphore(_FETCHES)
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._closed = False
        self._lost = False

    @classmethod
    def connect(
        cls, address: bytes, memory: PoolMemory, executor: Executor, *, block_seconds: float = BLOCK_SECONDS
    ) -> TcpConnection:
        """Sockets are opened as they are needed. Raises TransferRefused where `address` is not `host:port`."""
        host, colon, port = address.decode("ascii", "replace").rpartition(":")
        if not (host and colon and len(host) <= 255 and port.isdigit() and 0 < int(port) < 65536):
            raise TransferRefused(f"the tcp address is {address[:64]!r}; it must be host:port")
        return cls(host.strip("[]"), int(port), memory, executor, block_seconds=block_seconds)

    @property
    def alive(self) -> bool:
        return not (self._lost or self._closed)

    async def fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        if not wants:
            return []
        call = _Call()
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._fetch, transfer_id, wants, gate, call)
        except asyncio.CancelledError:
            call.stop()
            raise

    async def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for sock in idle:
            sock.close()

    def _fetch(self, transfer_id: TransferId, wants: Sequence[Want], gate: Gate, call: _Call) -> list[Fetched]:
        request = frames.pack_request(transfer_id, self._memory.block_bytes, wants)
        with gate.passing() as admitted:
            if not admitted:
                raise TransferRefused("the landing was given up")
            if self._closed:
                raise PeerLost(f"the connection to {self._name} is closed")
            try:
                sock, reply = self._ask(request, len(wants), call)
                try:
                    results = self._results(sock, reply, wants, gate)
                except BaseException:
                    sock.close()
                    raise
            except (OSError, EOFError, FrameError) as error:
                self._lost = not call.stopped
                raise PeerLost(f"the source's data server at {self._name} failed: {error}") from None
            call.finish()
            self._put_back(sock)
            return results

    def _ask(self, request: bytes, count: int, call: _Call) -> tuple[socket.socket, ReplyStatus]:
        """Sends the request and hears whether it is granted. The socket then is this call's alone."""
        pooled = self._take()
        if pooled is not None:
            with contextlib.suppress(ConnectionError, EOFError):  # the source closed it while it lay idle
                return pooled, self._ask_on(pooled, request, count, call)
        fresh = socket.create_connection(self._peer, timeout=self._connect_seconds)
        fresh.settimeout(None)  # each call brings its own
        fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return fresh, self._ask_on(fresh, request, count, call)

    def _ask_on(self, sock: socket.socket, request: bytes, count: int, call: _Call) -> ReplyStatus:
        try:
            call.begin(sock)
            send(sock, [request], time.monotonic() + self._block_seconds)
            return frames.parse_reply(self._receive(sock, frames.REPLY.size), count)
        except BaseException:
            sock.close()
            raise

    def _results(self, sock: socket.socket, reply: ReplyStatus, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        match reply:
            case ReplyStatus.UNKNOWN_TRANSFER:
                raise TransferRefused(f"the data server at {self._name} knows of no such claimed block set (any more)")
            case ReplyStatus.MALFORMED:
                raise TransferRefused(f"the data server at {self._name} finds the request malformed")
            case ReplyStatus.OK:
                return self._land(sock, wants, gate)

    def _land(self, sock: socket.socket, wants: Sequence[Want], gate: Gate) -> list[Fetched]:
        before = frames.parse_statuses(self._receive(sock, len(wants)))
        coming = [at for at, status in enumerate(before) if status is BlockStatus.SENT]
        results = [_FETCHED[status] for status in before]
        good, most = list[bool](), max(1, min(PIECE_BYTES // self._memory.block_bytes, MAX_BUFFERS))
        for start in range(0, len(coming), most):
            if gate.closed:
                raise TransferRefused("the landing was given up")
            good += self._land_group(sock, [wants[at] for at in coming[start : start + most]])
        after = frames.parse_statuses(self._receive(sock, len(wants)))
        good = good or landed_right(self._memory, [wants[at] for at in coming])
        for at, whole in zip(coming, good, strict=True):
            results[at] = Fetched.LANDED if whole else Fetched.DAMAGED
        return [
            result if status is BlockStatus.SENT else _FETCHED[max(b, status)]
            for result, b, status in zip(results, before, after, strict=True)
        ]

    def _land_group(self, sock: socket.socket, wants: Sequence[Want]) -> list[bool]:
        """Receives blocks that together are about a piece, or one that is larger. Which of them have the checksum that
        is wanted, summed while a cache has them; nothing of a pool that the host can't reach, which is asked once a
        fetch."""
        deadline = time.monotonic() + self._block_seconds
        views = [self._memory.view(want.destination) for want in wants]
        blocks = [memoryview(bytearray(self._memory.block_bytes)) if view is None else view for view in views]
        if self._memory.block_bytes > PIECE_BYTES and views[0] is not None:
            return [right(wants[0], self._receive_large(sock, views[0], deadline))]
        receive(sock, blocks, deadline)
        staged = [(want, block) for want, view, block in zip(wants, views, blocks, strict=True) if view is None]
        for want, block in staged:
            self._memory.write(want.destination, block)
        return [] if staged else landed_right(self._memory, wants)

    def _receive_large(self, sock: socket.socket, block: memoryview, deadline: float) -> int:
        """Of a pool in host memory, piece by piece. The block's checksum."""
        checksum = Xxh3()
        for start in range(0, len(block), PIECE_BYTES):
            piece = block[start : start + PIECE_BYTES]
            receive(sock, [piece], deadline)
            checksum.add(piece)
        return checksum.result()

    def _receive(self, sock: socket.socket, size: int) -> bytearray:
        return receive_bytes(sock, size, time.monotonic() + self._block_seconds)

    def _take(self) -> socket.socket | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _put_back(self, sock: socket.socket) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE_SOCKETS:
                self._idle.append(sock)
                return
        sock.close()

    @property
    def _name(self) -> str:
        return f"{self._peer[0]}:{self._peer[1]}"


class _Call:
    """One fetch, as the event loop and its thread both see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.stopped = False

    def begin(self, sock: socket.socket) -> None:
        """The thread uses `sock` from now on. Raises EOFError where nobody wants the fetch any more."""
        with self._lock:
            if self.stopped:
                raise EOFError("the fetch was cancelled")
            self._socket = sock

    def finish(self) -> None:
        """The socket goes on to other fetches: `stop` must not reach it."""
        with self._lock:
            self._socket = None

    def stop(self) -> None:
        """Wakes the thread, whatever it waits for on its socket."""
        with self._lock:
            self.stopped = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # it has just broken by itself
                    self._socket.shutdown(socket.SHUT_RDWR)
