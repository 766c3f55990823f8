"""The data server of the tcp transport, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from baton.ids import TransferId
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import HostMemory
from kvtransfer.refusal import Refusals
from kvtransfer.transports import frames
from kvtransfer.transports.base import Want
from kvtransfer.transports.frames import BlockStatus, FrameError, ReplyStatus
from kvtransfer.transports.tcp_server import TcpServer
from tests.fuzz.doors import BLOCKS, Broken, unless
from tests.fuzz.mutator import Mutator
from tests.kvtransfer.rig import LAYOUT, fill, pattern, take


class DataPortDoor:
    """One set is claimed, and all but its last block are sealed. A connection for each request."""

    name = "data port"

    def __init__(self, memory: HostMemory, refusals: Refusals) -> None:
        permits, self._permit = ReadPermits(), ReadPermit(Gate())
        self._blocks = take(memory, range(40, 40 + BLOCKS))
        fill(memory, self._blocks)
        self._sealed = {(int(block.index), int(block.generation)) for block in self._blocks[:-1]}
        for index, generation in self._sealed:
            self._permit.allow(index, generation)
        self._transfer_id = TransferId(bytes(range(16)))
        permits.grant(self._transfer_id, self._permit)
        self._server = TcpServer(memory, permits, refusals=refusals)
        host, _, port = self._server.endpoint().address.decode().rpartition(":")
        self._address = (host, int(port))

    def close(self) -> None:
        self._server.close()

    async def knock(self, mutator: Mutator) -> None:
        said = mutator.data(self._request(range(BLOCKS)))
        got = await asyncio.to_thread(self._exchange, said)
        head, body = got[: frames.REPLY.size], got[frames.REPLY.size :]
        if len(got) < LAYOUT.block_bytes:
            return  # a refusal or two, or statuses without blocks
        try:
            request = frames.parse_request(said[: frames.REQUEST.size])
            reply = frames.parse_reply(head, request.num_blocks)
        except FrameError as error:
            raise Broken(f"{len(body)} bytes for what is no request, or in what is no reply: {error}") from None
        unless(reply is ReplyStatus.OK, "bytes behind a refusal")
        unless(request.transfer_id == self._transfer_id, "bytes for one who does not know the transfer id")
        end = frames.REQUEST.size + request.num_blocks * frames.WANTED.size
        self._check(frames.parse_wanted(said[frames.REQUEST.size : end]), body)

    def _check(self, wanted: list[tuple[int, int]], body: bytes) -> None:
        count = len(wanted)
        statuses = frames.parse_statuses(body[:count])
        sent = [block for block, status in zip(wanted, statuses, strict=True) if status is BlockStatus.SENT]
        unless(set(sent) <= self._sealed, f"{sent} were given out")
        right = b"".join(pattern(*block) for block in sent)
        unless(body[count : count + len(right)] == right, "other bytes than those of the blocks")

    def _request(self, positions: range) -> bytes:
        wants = [Want(int(self._blocks[p].index), int(self._blocks[p].generation), 0) for p in positions]
        return frames.pack_request(self._transfer_id, LAYOUT.block_bytes, wants)

    def _exchange(self, data: bytes) -> bytes:
        got = b""
        with socket.create_connection(self._address, timeout=10) as sock, contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                got += piece
        return got

    async def rest(self) -> None:
        async with asyncio.timeout(10):
            while self._server.connections:  # noqa: ASYNC110 - they end in threads
                await asyncio.sleep(0.001)
        unless(self._permit.gate.in_flight == 0, "a send is left")
        got = await asyncio.to_thread(self._exchange, self._request(range(BLOCKS - 1)))
        unless(len(got) > (BLOCKS - 1) * LAYOUT.block_bytes, "an honest request gets no blocks")
