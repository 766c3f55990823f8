"""The data server against peers that are broken, slow or hostile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import PeerLost, PortInUse
from baton.ids import TransferId, new_transfer_id
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import HostMemory
from kvtransfer.threads import Threads
from kvtransfer.transports import frames
from kvtransfer.transports.base import Fetched, Want
from kvtransfer.transports.tcp import TcpConnection
from kvtransfer.transports.tcp_server import TcpServer
from tests.kvtransfer.rig import make_pool, until

BIG = 1 << 20


@dataclass
class Served:
    server: TcpServer
    memory: HostMemory
    permit: ReadPermit
    transfer_id: TransferId

    def dial(self) -> socket.socket:
        host, _, port = self.server.endpoint().address.decode().rpartition(":")
        return socket.create_connection((host, int(port)), timeout=5)

    def request(self, *indices: int) -> bytes:
        wants = [Want(i, self.memory.generation(i), 0) for i in indices]
        return frames.pack_request(self.transfer_id, self.memory.block_bytes, wants)

    def still_serves(self) -> bool:
        with self.dial() as sock:
            sock.sendall(self.request(1))
            data = bytearray()
            size = frames.REPLY.size + 2 + self.memory.block_bytes
            while len(data) < size:
                got = sock.recv(65536)
                if not got:
                    return False
                data += got
            return len(data) == size


def serve(memory: HostMemory, **limits: float) -> Served:
    permits, permit, transfer_id = ReadPermits(), ReadPermit(Gate()), new_transfer_id()
    for index in range(memory.num_blocks):
        permit.allow(index, 0)
    permits.grant(transfer_id, permit)
    return Served(TcpServer(memory, permits, **limits), memory, permit, transfer_id)  # type: ignore[arg-type]  # floats


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = serve(make_pool(), request_seconds=0.2, send_seconds=0.5)
    yield made
    made.server.close()


def hung_up(sock: socket.socket) -> bool:
    """Reads to the end; True where that comes."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


@settings(max_examples=40, deadline=None)
@given(garbage=st.binary(min_size=frames.REQUEST.size, max_size=200))
def test_garbage_ends_its_connection_and_nothing_else(served: Served, garbage: bytes) -> None:
    with served.dial() as sock:
        sock.sendall(garbage)
        assert hung_up(sock)
    assert served.still_serves()


@pytest.mark.parametrize("length", [1, 20, frames.REQUEST.size, frames.REQUEST.size + 5])
def test_half_a_request_is_waited_for_no_longer_than_allowed(served: Served, length: int) -> None:
    with served.dial() as sock:
        sock.sendall(served.request(1, 2)[:length])
        assert hung_up(sock)
    assert served.still_serves()


def test_a_peer_that_hangs_up_in_the_middle_of_a_request_is_forgotten(served: Served) -> None:
    for length in range(0, 60, 7):
        with served.dial() as sock:
            sock.sendall(served.request(1, 2)[:length])
    assert served.still_serves()


def test_blocks_of_another_size_are_malformed(served: Served) -> None:
    with served.dial() as sock:
        sock.sendall(frames.pack_request(served.transfer_id, 64, [Want(1, 0, 0)]))
        reply = sock.recv(frames.REPLY.size)
        assert frames.parse_reply(reply, 1) is frames.ReplyStatus.MALFORMED
        assert hung_up(sock)


def test_indices_outside_the_pool_are_refused(served: Served) -> None:
    with served.dial() as sock:
        sock.sendall(frames.pack_request(served.transfer_id, 4096, [Want(2**63, 0, 0), Want(64, 0, 0)]))
        data = b""
        while len(data) < frames.REPLY.size + 4:
            data += sock.recv(100)
    assert frames.parse_statuses(data[frames.REPLY.size :]) == [frames.BlockStatus.REFUSED] * 4
    assert served.still_serves()


async def test_a_reader_that_does_not_read_holds_the_set_only_as_long_as_one_send_may_take() -> None:
    served = serve(HostMemory.create(64, BIG), send_seconds=0.3)
    drained = threading.Event()
    try:
        with served.dial() as sock:
            sock.sendall(served.request(*range(64)))
            await until(lambda: served.permit.gate.in_flight == 1)
            assert not served.permit.gate.close(drained.set)
            assert not drained.is_set()
            await until(drained.is_set)
    finally:
        served.server.close()


async def test_connections_are_bounded() -> None:
    served = serve(make_pool(), max_connections=2)
    try:
        first, second = served.dial(), served.dial()
        await until(lambda: served.server.connections == 2)
        with served.dial() as third:
            assert hung_up(third)
        first.close()
        await until(lambda: served.server.connections == 1)
        assert served.still_serves()
        second.close()
    finally:
        served.server.close()


async def test_an_idle_connection_that_the_server_closed_is_replaced_unseen() -> None:
    served, threads, destination = serve(make_pool(), idle_seconds=0.05), Threads.create(), make_pool()
    connection = TcpConnection.connect(served.server.endpoint().address, destination, threads.network)
    try:
        for _ in range(3):
            assert await connection.fetch(served.transfer_id, [Want(1, 0, 1)], Gate()) == [Fetched.LANDED]
            await until(lambda: served.server.connections == 0)
    finally:
        await connection.close()
        served.server.close()
        threads.close()


async def test_a_server_that_falls_silent_is_lost_after_the_timeout() -> None:
    """It accepts and says nothing, as a stopped process does."""
    threads, destination, gate = Threads.create(), make_pool(), Gate()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = TcpConnection(
            "127.0.0.1", silent.getsockname()[1], destination, threads.network, block_seconds=0.1
        )
        with pytest.raises(PeerLost, match="timed out"):
            await connection.fetch(new_transfer_id(), [Want(1, 0, 1)], gate)
        assert gate.in_flight == 0
        assert not connection.alive
    threads.close()


async def test_cancelling_a_fetch_from_a_silent_server_wakes_its_thread_at_once() -> None:
    threads, destination, gate = Threads.create(), make_pool(), Gate()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connection = TcpConnection("127.0.0.1", silent.getsockname()[1], destination, threads.network, block_seconds=60)
        fetch = asyncio.create_task(connection.fetch(new_transfer_id(), [Want(1, 0, 1)], gate))
        await until(lambda: gate.in_flight == 1)
        accepted, _ = silent.accept()
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        await until(lambda: gate.in_flight == 0)
        accepted.close()
    threads.close()


class Impostor:
    """Listens, reads one request, and answers it with `answer`, a piece every `pause` seconds; then it hangs up."""

    def __init__(self, answer: bytes, piece: int = 1 << 20, pause: float = 0.0) -> None:
        self._answer, self._piece, self._pause = answer, piece, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with sock, contextlib.suppress(OSError):  # the puller may have had enough
            sock.recv(65536)
            for start in range(0, len(self._answer), self._piece):
                sock.sendall(self._answer[start : start + self._piece])
                time.sleep(self._pause)

    def close(self) -> None:
        self._thread.join(5)
        self._listener.close()


async def fetch_from(impostor: Impostor, wants: int, seconds: float = 5.0) -> list[Fetched]:
    """What a puller makes of its answer. The gate is always left."""
    threads, gate = Threads.create(), Gate()
    connection = TcpConnection("127.0.0.1", impostor.port, make_pool(), threads.network, block_seconds=seconds)
    try:
        return await connection.fetch(new_transfer_id(), [Want(at, 0, at) for at in range(wants)], gate)
    finally:
        assert gate.in_flight == 0
        await connection.close()
        threads.close()
        impostor.close()


async def test_a_server_that_answers_garbage_is_lost() -> None:
    with pytest.raises(PeerLost, match="not a reply of version 1"):
        await fetch_from(Impostor(b"HTTP/1.1 400 Bad Request\r\n\r\n"), 1)


WHOLE = frames.pack_reply(frames.ReplyStatus.OK, 2) + bytes(2) + bytes(2 * 4096) + bytes(2)


@pytest.mark.parametrize("length", [0, 1, frames.REPLY.size, frames.REPLY.size + 1, 100, 4096 + 100, len(WHOLE) - 1])
async def test_a_server_that_hangs_up_in_the_middle_of_a_reply_is_lost(length: int) -> None:
    assert await fetch_from(Impostor(WHOLE), 2) == [Fetched.LANDED] * 2
    with pytest.raises(PeerLost, match=r"hung up in the middle|reset"):
        await fetch_from(Impostor(WHOLE[:length]), 2)


async def test_a_server_that_sends_a_little_now_and_then_is_lost_after_the_timeout() -> None:
    started = time.monotonic()
    with pytest.raises(PeerLost, match="timed out"):
        await fetch_from(Impostor(WHOLE[:200], piece=1, pause=0.02), 2, seconds=0.2)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("at", [0, 4, 6, 8, frames.REPLY.size, len(WHOLE) - 1])
async def test_a_reply_with_a_spoiled_byte_is_no_landing(at: int) -> None:
    spoiled = WHOLE[:at] + bytes([WHOLE[at] ^ 0x40]) + WHOLE[at + 1 :]
    with pytest.raises(PeerLost, match=r"not a reply|unknown status|blocks to a request"):
        await fetch_from(Impostor(spoiled), 2)


def test_an_address_that_is_not_ours_is_a_clear_error() -> None:
    with pytest.raises(PortInUse, match=r"can't listen on 203\.0\.113\.7"):
        TcpServer(make_pool(), ReadPermits(), host="203.0.113.7")
