"""The contract with the source in a process of its own: killed with -9 in mid-fetch, stopped and continued."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import pytest

from baton.errors import HandoffFailed, PeerLost
from baton.ids import TransferId
from kvtransfer.checksum import xxh3_checksum
from kvtransfer.gate import Gate
from kvtransfer.memory import HostMemory
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Connection, Endpoint, Fetched, Want
from tests.kvtransfer.rig import until
from tests.kvtransfer.staged import StagedMemory
from tests.kvtransfer.transport_process import BLOCK_BYTES, GENERATION, NUM_BLOCKS, block
from tests.kvtransfer.transport_rigs import PATIENCE, RIGS

ROOT = Path(__file__).resolve().parents[2]
BOUND = 10 * PATIENCE
"""Seconds in which a gate must have drained, whatever the source does."""
LONG = [Want(index, GENERATION, index, xxh3_checksum(block(index))) for _ in range(20) for index in range(NUM_BLOCKS)]
"""320 MiB: a fetch that lasts long enough for something to happen in the middle of it."""


@dataclass
class Peer:
    process: subprocess.Popen[str]
    transport: str
    connection: Connection
    transfer_id: TransferId
    memory: HostMemory
    """This side's."""

    async def fetch(self, wants: list[Want], gate: Gate) -> list[Fetched]:
        return await self.connection.fetch(self.transfer_id, wants, gate)

    def began(self) -> bool:
        """Whether any of the first block is here."""
        return self.memory.blocks[0] != 0

    def whole(self, wants: list[Want]) -> bool:
        return all(bytes(self.memory.read(want.destination)) == block(want.source) for want in wants)


@pytest.fixture(params=[name for name, rig in RIGS.items() if rig.has_processes])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    missing = RIGS[request.param].missing()
    if missing:
        pytest.skip(missing)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    return str(request.param)


@pytest.fixture
def process(transport: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kvtransfer.transport_process", transport],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    if process.poll() is None:
        process.kill()  # a stopped one, too
    process.communicate()


@pytest.fixture
async def peer(process: subprocess.Popen[str], transport: str) -> AsyncIterator[Peer]:
    told = json.loads(cast("IO[str]", process.stdout).readline())
    threads, memory = Threads.create(), HostMemory.create(NUM_BLOCKS, BLOCK_BYTES)
    lands_in = StagedMemory(memory, kind=memory.checksum_kind) if transport == "cuda_ipc" else memory
    endpoint = Endpoint(transport, bytes.fromhex(told["address"]))
    connection = await RIGS[transport]().connect(endpoint, lands_in, threads)
    yield Peer(process, transport, connection, TransferId(bytes.fromhex(told["transfer_id"])), memory)
    await connection.close()
    threads.close()


async def outcome(fetch: asyncio.Task[list[Fetched]]) -> list[Fetched] | PeerLost:
    """Of a fetch whose source may have gone: never an error of another kind, and never later than allowed."""
    async with asyncio.timeout(BOUND):
        try:
            return await fetch
        except PeerLost as lost:
            return lost


async def test_blocks_land_from_another_process(peer: Peer) -> None:
    wants = LONG[:NUM_BLOCKS]
    assert await peer.fetch(wants, Gate()) == [Fetched.LANDED] * NUM_BLOCKS
    assert peer.whole(wants)
    assert peer.connection.alive


async def test_a_source_killed_in_mid_fetch_is_lost_or_had_given_everything(peer: Peer) -> None:
    gate = Gate()
    fetch = asyncio.create_task(peer.fetch(LONG, gate))
    await until(peer.began)
    peer.process.send_signal(signal.SIGKILL)
    result = await outcome(fetch)
    await until(lambda: gate.in_flight == 0, BOUND)
    peer.process.wait(5)
    if RIGS[peer.transport].asks_source:
        assert isinstance(result, PeerLost)
    if not isinstance(result, PeerLost):
        assert result == [Fetched.LANDED] * len(LONG)
        assert peer.whole(LONG)
    if peer.connection.alive:  # one that learns of it by the next fetch
        with pytest.raises(HandoffFailed):
            await peer.fetch(LONG[:1], Gate())
    assert not peer.connection.alive


async def test_a_stopped_source_costs_the_timeout_and_what_it_does_later_reaches_nobody(peer: Peer) -> None:
    gate = Gate()
    fetch = asyncio.create_task(peer.fetch(LONG, gate))
    await until(peer.began)
    peer.process.send_signal(signal.SIGSTOP)
    result = await outcome(fetch)
    await until(lambda: gate.in_flight == 0, BOUND)
    if RIGS[peer.transport].asks_source:
        assert isinstance(result, PeerLost)
    if not isinstance(result, PeerLost):  # whose memory could be read all the same
        assert result == [Fetched.LANDED] * len(LONG)
        assert peer.whole(LONG)
    peer.memory.blocks[:] = b"n" * len(peer.memory.blocks)  # the blocks' next user
    peer.process.send_signal(signal.SIGCONT)
    await asyncio.sleep(1)
    assert bytes(peer.memory.blocks).count(b"n") == len(peer.memory.blocks)


async def test_a_source_that_stands_still_from_the_first_is_given_up_in_time(peer: Peer) -> None:
    peer.process.send_signal(signal.SIGSTOP)
    gate = Gate()
    result = await outcome(asyncio.create_task(peer.fetch(LONG[:4], gate)))
    await until(lambda: gate.in_flight == 0, BOUND)
    if RIGS[peer.transport].asks_source:
        assert isinstance(result, PeerLost)
    peer.memory.blocks[:] = b"n" * len(peer.memory.blocks)
    peer.process.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.5)
    assert bytes(peer.memory.blocks).count(b"n") == len(peer.memory.blocks)
