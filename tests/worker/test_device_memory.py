"""A pool in device memory, and the handoff within a device between two processes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import pytest

from baton.errors import TransferRefused
from baton.ids import new_transfer_id
from kvtransfer.checksum import block_checksum
from kvtransfer.gate import Gate
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Fetched, Want
from kvtransfer.transports.cuda_ipc import CudaIpcConnection
from tests.kvtransfer.rig import until
from tests.worker.device_process import GENERATION, LAYOUT, block, make_memory

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.gpu


class Source:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.worker.device_process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = bytes.fromhex(self._said())

    def reuse(self, index: int) -> None:
        stdin = cast("IO[str]", self.process.stdin)
        stdin.write(f"{index}\n")
        stdin.flush()
        assert self._said() == "done"

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def _said(self) -> str:
        return cast("IO[str]", self.process.stdout).readline().strip()


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.end()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads.create()
    yield threads
    threads.close()


def want(index: int, destination: int) -> Want:
    data = memoryview(block(index).numpy())  # type: ignore[arg-type]
    return Want(index, GENERATION, destination, block_checksum(data))


async def test_blocks_go_byte_exact_from_process_to_process_within_the_device(source: Source, threads: Threads) -> None:
    memory = make_memory(128)
    connection = await CudaIpcConnection.connect(source.address, memory, threads.memory)
    places = random.Random(3).sample(range(128), 64)
    wants = [want(index, place) for index, place in zip(range(64), places, strict=True)]
    gate = Gate()
    assert await connection.fetch(new_transfer_id(), wants, gate) == [Fetched.LANDED] * 64
    assert gate.in_flight == 0
    for one in wants:
        assert bytes(memory.read(one.destination)) == block(one.source).numpy().tobytes()
    untouched = next(index for index in range(128) if index not in places)
    assert bytes(memory.read(untouched)) == bytes(LAYOUT.block_bytes)
    await connection.close()


async def test_a_block_that_the_source_gave_to_another_use_is_stale(source: Source, threads: Threads) -> None:
    connection = await CudaIpcConnection.connect(source.address, make_memory(8), threads.memory)
    source.reuse(2)
    results = await connection.fetch(new_transfer_id(), [want(index, index) for index in range(4)], Gate())
    assert results == [Fetched.LANDED, Fetched.LANDED, Fetched.STALE, Fetched.LANDED]
    wrong = want(1, 1)._replace(checksum=1)
    assert await connection.fetch(new_transfer_id(), [wrong], Gate()) == [Fetched.DAMAGED]
    await connection.close()


async def test_two_connections_to_one_source_end_one_by_one(source: Source, threads: Threads) -> None:
    memory = make_memory(8)
    first = await CudaIpcConnection.connect(source.address, memory, threads.memory)
    second = await CudaIpcConnection.connect(source.address, memory, threads.memory)
    await first.close()
    assert await second.fetch(new_transfer_id(), [want(1, 1)], Gate()) == [Fetched.LANDED]
    await second.close()


async def test_a_killed_source_is_noticed_and_nothing_false_lands(source: Source, threads: Threads) -> None:
    memory = make_memory(64)
    connection = await CudaIpcConnection.connect(source.address, memory, threads.memory)
    source.process.kill()
    source.process.wait(10)
    await until(lambda: not connection.alive)
    await connection.close()
    with pytest.raises(TransferRefused):
        await CudaIpcConnection.connect(source.address, memory, threads.memory)


def test_neighbours_are_read_and_written_in_one_go() -> None:
    memory = make_memory(8)
    data = b"".join(block(index).numpy().tobytes() for index in range(3))
    memory.write(4, memoryview(bytearray(data)))
    assert bytes(memory.read(4, 3)) == data
    assert memory.view(4) is None
