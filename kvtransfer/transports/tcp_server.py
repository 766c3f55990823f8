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

from baton.errors import PortInUse
from kvtransfer.gate import ReadPermit, ReadPermits
from kvtransfer.memory import PoolMemory
from kvtransfer.transports import frames
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus

log = logging.getLogger(__name__)

NAME = "tcp"
MAX_CONNECTIONS = 256
SEND_SECONDS = 5.0
"""For one block: a reader that is slower holds the source's blocks, so it is dropped."""
REQUEST_SECONDS = 5.0
"""From a request's first byte to its last."""
IDLE_SECONDS = 60.0
"""Between two requests."""


class TcpServer:
    def __init__(
        self,
        memory: PoolMemory,
        permits: ReadPermits,
        *,
        host: str = "127.0.0.1",
        advertise_host: str = "",
        send_seconds: float = SEND_SECONDS,
        request_seconds: float = REQUEST_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Listens on a free port from now on. Raises PortInUse where `host` can't be listened on."""
        self._memory = memory
        self._permits = permits
        self._send_seconds = send_seconds
        self._request_seconds = request_seconds
        self._idle_seconds = idle_seconds
        self._max_connections = max_connections
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, 0), family=family, backlog=64)
        except OSError as error:
            raise PortInUse(f"the data server can't listen on {host}: {error.strerror or error}") from None
        self._host = advertise_host or host
        self._port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._closing = threading.Event()
        self._acceptor = threading.Thread(target=self._accept, name="kvtransfer-tcp-accept", daemon=True)
        self._acceptor.start()

    def endpoint(self) -> Endpoint:
        return Endpoint(NAME, f"{self._host}:{self._port}".encode())

    @property
    def connections(self) -> int:
        return len(self._connections)

    def close(self) -> None:
        """Ends every connection. Sends under way fail at once."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            connections = list(self._connections)
        for sock in (self._listener, *connections):
            with contextlib.suppress(OSError):  # it may have ended by itself
                sock.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(timeout=1.0)
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
            with self._lock:
                welcome = not self._closing.is_set() and len(self._connections) < self._max_connections
                if welcome:
                    self._connections.add(sock)
            if welcome:
                threading.Thread(target=self._serve, args=(sock,), name="kvtransfer-tcp", daemon=True).start()
            else:
                sock.close()

    def _serve(self, sock: socket.socket) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._answer(sock):
                pass
        except FrameError as error:
            log.info("dropped a data connection: %s", error)
        except (OSError, EOFError) as error:
            log.debug("a data connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    def _answer(self, sock: socket.socket) -> bool:
        """One request. False where the peer has hung up between two."""
        header = bytearray(frames.REQUEST.size)
        sock.settimeout(self._idle_seconds)
        got = sock.recv_into(header)
        if not got:
            return False
        deadline = time.monotonic() + self._request_seconds
        receive(sock, memoryview(header)[got:], deadline)
        try:
            request = frames.parse_request(header)
            if request.block_bytes != self._memory.block_bytes:
                raise FrameError(f"blocks of {request.block_bytes} bytes; here they have {self._memory.block_bytes}")
        except FrameError:
            sock.settimeout(self._send_seconds)
            sock.sendall(frames.pack_reply(ReplyStatus.MALFORMED, 0))
            raise
        body = bytearray(request.num_blocks * frames.WANTED.size)
        receive(sock, memoryview(body), deadline)
        sock.settimeout(self._send_seconds)
        permit = self._permits.get(request.transfer_id)
        if permit is None:
            sock.sendall(frames.pack_reply(ReplyStatus.UNKNOWN_TRANSFER, 0))
            return True
        sock.sendall(frames.pack_reply(ReplyStatus.OK, request.num_blocks), socket.MSG_MORE)
        for index, generation in frames.parse_wanted(body):
            self._send_block(sock, permit, index, generation)
        return True

    def _send_block(self, sock: socket.socket, permit: ReadPermit, index: int, generation: int) -> None:
        with permit.gate.passing() as admitted:
            if not admitted or not permit.covers(index, generation):  # the set may have ended since the last block
                sock.sendall(frames.STATUS.pack(BlockStatus.REFUSED))
            elif self._memory.generation(index) != generation:
                sock.sendall(frames.STATUS.pack(BlockStatus.STALE))
            else:
                sock.sendall(frames.STATUS.pack(BlockStatus.SENT), socket.MSG_MORE)
                sock.sendall(self._memory.read(index), socket.MSG_MORE)
                same = self._memory.generation(index) == generation
                sock.sendall(frames.STATUS.pack(BlockStatus.SENT if same else BlockStatus.STALE))


def receive(sock: socket.socket, into: memoryview, deadline: float) -> None:
    """Fills `into`. Raises EOFError where the peer hangs up first, TimeoutError past the monotonic `deadline`."""
    while into:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        got = sock.recv_into(into)
        if not got:
            raise EOFError("the peer hung up in the middle of a message")
        into = into[got:]
