"""The source's side of the tcp transport: a data server with threads of its own.

It gives out sealed blocks of claimed sets, to whoever knows the transfer id, and nothing else. Each send passes
through the set's gate, so that the set's end waits for it; each send has a timeout, so that the wait ends. What it
can't parse ends the connection.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence

from baton.errors import PortInUse
from kvtransfer.gate import ReadPermit, ReadPermits
from kvtransfer.memory import PoolMemory
from kvtransfer.refusal import RefusalReason, Refusals
from kvtransfer.transports import frames
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus
from kvtransfer.transports.sockets import MAX_BUFFERS, neighbours, receive, receive_bytes, send

log = logging.getLogger(__name__)

NAME = "tcp"
MAX_CONNECTIONS = 256
SEND_SECONDS = 5.0
"""For one request: a reader that is slower holds the source's blocks, so it is dropped."""
REQUEST_SECONDS = 5.0
"""From a request's first byte to its last."""
IDLE_SECONDS = 60.0
"""Between two requests."""
MAX_RUN_BYTES = 4 << 20
"""Sent in one call at most."""
_CLOSE_SECONDS = 1.0


class TcpServer:
    def __init__(
        self,
        memory: PoolMemory,
        permits: ReadPermits,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str = "",
        refusals: Refusals | None = None,
        send_seconds: float = SEND_SECONDS,
        request_seconds: float = REQUEST_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Listens from now on, on a free port where `port` is 0. Raises PortInUse where that can't be."""
        self._memory = memory
        self._permits = permits
        self._refusals = refusals
        self._send_seconds = send_seconds
        self._request_seconds = request_seconds
        self._idle_seconds = idle_seconds
        self._max_connections = max_connections
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=64)
        except OSError as error:
            raise PortInUse(f"the data server can't listen on {host}: {error.strerror or error}") from None
        self._host = advertise_host or host
        self._port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, name="kvtransfer-tcp-accept", daemon=True)
        self._acceptor.start()

    def endpoint(self) -> Endpoint:
        return Endpoint(NAME, f"{self._host}:{self._port}".encode())

    @property
    def connections(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        """Ends every connection. Sends under way fail at once, and soon nobody here reads the pool any more."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            connections = dict(self._connections)
        for sock in (self._listener, *connections):
            with contextlib.suppress(OSError):  # it may have ended by itself
                sock.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in (self._acceptor, *connections.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = self._listener.accept()
            except OSError:
                if self._closing.is_set():
                    return
                log.warning("the data server could not accept a connection", exc_info=True)
                self._closing.wait(0.1)  # out of descriptors, most likely: others have to end first
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="kvtransfer-tcp", daemon=True)
            with self._lock:
                welcome = not self._closing.is_set() and len(self._connections) < self._max_connections
                if welcome:
                    self._connections[sock] = thread
                    thread.start()  # inside the lock, so that whoever closes can join it
            if not welcome:
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._answer(sock):
                pass
        except FrameError as error:
            self._refused(RefusalReason.MALFORMED, str(error))
        except (OSError, EOFError) as error:
            log.debug("a data connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.pop(sock, None)
            sock.close()

    def _answer(self, sock: socket.socket) -> bool:
        """One request. False where the peer has hung up between two."""
        first = bytearray(1)
        try:
            receive(sock, [memoryview(first)], time.monotonic() + self._idle_seconds)
        except EOFError:
            return False
        deadline = time.monotonic() + self._request_seconds
        try:
            header = first + _rest(sock, frames.REQUEST.size - 1, deadline)
            request = frames.parse_request(header)
            if request.block_bytes != self._memory.block_bytes:
                raise FrameError(f"blocks of {request.block_bytes} bytes; here they have {self._memory.block_bytes}")
        except FrameError:
            with contextlib.suppress(OSError):  # it may be gone
                self._reply(sock, ReplyStatus.MALFORMED)
            raise
        wanted = frames.parse_wanted(_rest(sock, request.num_blocks * frames.WANTED.size, deadline))
        permit = self._permits.get(request.transfer_id)
        if permit is None:
            self._refused(RefusalReason.UNKNOWN_TRANSFER, "there is no such claimed block set (any more)")
            self._reply(sock, ReplyStatus.UNKNOWN_TRANSFER)
        else:
            self._send_blocks(sock, permit, wanted)
        return True

    def _reply(self, sock: socket.socket, status: ReplyStatus) -> None:
        send(sock, [frames.pack_reply(status, 0)], time.monotonic() + self._send_seconds)

    def _send_blocks(self, sock: socket.socket, permit: ReadPermit, wanted: Sequence[tuple[int, int]]) -> None:
        deadline = time.monotonic() + self._send_seconds
        with permit.gate.passing() as admitted:
            before = [self._status(permit, block) if admitted else BlockStatus.REFUSED for block in wanted]
            head = frames.pack_reply(ReplyStatus.OK, len(wanted)) + bytes(before)
            sent = [index for (index, _), status in zip(wanted, before, strict=True) if status is BlockStatus.SENT]
            send(sock, [head], deadline, more=True)
            most = max(1, min(MAX_RUN_BYTES // self._memory.block_bytes, MAX_BUFFERS))
            for start in range(0, len(sent), most):
                runs = neighbours(sent[start : start + most], most)
                send(sock, [self._memory.read(first, count) for first, count in runs], deadline, more=True)
            after = bytes(self._status(permit, block) for block in wanted)
        send(sock, [after], deadline)
        if admitted and BlockStatus.REFUSED in before:
            self._refused(RefusalReason.MALFORMED, "blocks were asked for that the set does not have sealed")

    def _refused(self, reason: RefusalReason, message: str) -> None:
        if self._refusals is not None:
            self._refusals.note(reason, message)

    def _status(self, permit: ReadPermit, block: tuple[int, int]) -> BlockStatus:
        index, generation = block
        if permit.gate.closed or not permit.covers(index, generation):
            return BlockStatus.REFUSED
        return BlockStatus.SENT if self._memory.generation(index) == generation else BlockStatus.STALE


def _rest(sock: socket.socket, size: int, deadline: float) -> bytearray:
    """Of a request that has begun. Raises FrameError where it does not come in time, or only half."""
    try:
        return receive_bytes(sock, size, deadline)
    except (EOFError, TimeoutError) as error:
        raise FrameError(f"half a request: {error}") from None
