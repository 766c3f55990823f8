"""A pool in device memory, and the handoff within a device between two processes."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

import pytest

from baton.errors import InternalError, TransferRefused
from baton.ids import new_transfer_id
from baton.layout import KVLayout
from kvtransfer.checksum import ChecksumKind
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Fetched, Want
from kvtransfer.transports.cuda_ipc import CudaIpcConnection
from kvtransfer.transports.tcp import TcpConnection
from kvtransfer.transports.tcp_server import TcpServer
from tests.kvtransfer.rig import until
from tests.worker.device_process import GENERATION, LAYOUT, block, make_memory
from worker import device_memory
from worker.device_memory import DeviceMemory

ROOT = Path(__file__).resolve().parents[2]
LARGE = KVLayout(32, 8, 16, 128, "bfloat16", b"m" * 16)  # 2 MiB a block: several programs sum one
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


def want(index: int, destination: int, kind: ChecksumKind = ChecksumKind.NH) -> Want:
    return Want(index, GENERATION, destination, kind.of(block(index).numpy().tobytes()))


def filled(num_blocks: int, layout: KVLayout = LAYOUT) -> DeviceMemory:
    memory = make_memory(num_blocks, layout)
    for index in range(num_blocks):
        memory.write(index, memoryview(bytearray(block(index, layout).numpy().tobytes())))
        memory.shared_generations.generations[index] = GENERATION
    return memory


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


async def test_what_lands_within_the_device_is_summed_as_it_is_copied_and_not_read_back(
    source: Source, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make_memory(8)
    connection = await CudaIpcConnection.connect(source.address, memory, threads.memory)
    wants = [want(3, 1), want(5, 2)._replace(checksum=1), want(6, 3)._replace(checksum=None)]
    with monkeypatch.context() as patch:
        patch.setattr(memory, "read", None)
        results = await connection.fetch(new_transfer_id(), wants, Gate())
    assert results == [Fetched.LANDED, Fetched.DAMAGED, Fetched.LANDED]
    for one in wants:
        assert bytes(memory.read(one.destination)) == block(one.source).numpy().tobytes()
    await connection.close()


async def test_without_kernels_blocks_go_the_same_way_and_a_host_sums_them(
    source: Source, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "block_kernels", lambda cache: None)
    memory = make_memory(8)
    assert memory.checksum_kind is ChecksumKind.XXH3
    connection = await CudaIpcConnection.connect(source.address, memory, threads.memory)
    wants = [want(index, index + 1, ChecksumKind.XXH3) for index in range(4)]
    wants[2] = wants[2]._replace(checksum=1)
    results = await connection.fetch(new_transfer_id(), wants, Gate())
    assert results == [Fetched.LANDED, Fetched.LANDED, Fetched.DAMAGED, Fetched.LANDED]
    assert memory.checksums([1, 4]) == [wants[0].checksum, wants[3].checksum]
    await connection.close()


async def test_what_comes_by_tcp_is_summed_on_the_device_by_the_thread_that_lands_it(threads: Threads) -> None:
    source, memory, permits = filled(64), make_memory(64), ReadPermits()
    permit, transfer_id = ReadPermit(Gate()), new_transfer_id()
    permits.grant(transfer_id, permit)
    for index in range(64):
        permit.allow(index, GENERATION)
    server = TcpServer(source, permits)
    connection = TcpConnection.connect(server.endpoint().address, memory, threads.network)
    wants = [want(index, 63 - index) for index in range(64)]
    wants[40] = wants[40]._replace(checksum=1)
    halves = [connection.fetch(transfer_id, half, Gate()) for half in (wants[:32], wants[32:])]
    first, second = await asyncio.gather(*halves)
    assert first == [Fetched.LANDED] * 32
    assert second == [Fetched.LANDED] * 8 + [Fetched.DAMAGED] + [Fetched.LANDED] * 23
    assert all(bytes(memory.read(63 - index)) == block(index).numpy().tobytes() for index in range(64))
    await connection.close()
    server.close()


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


@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["32 KiB", "2 MiB"])
def test_any_blocks_are_summed_where_they_are_by_any_thread(layout: KVLayout) -> None:
    """Threads that never used the device, at once, on a stream that is not theirs."""
    memory = filled(12, layout)
    assert memory.checksum_kind is ChecksumKind.NH
    expected = [ChecksumKind.NH.of(block(index, layout).numpy().tobytes()) for index in range(12)]
    draw = random.Random(7)
    lists = [draw.choices(range(12), k=count) for count in (1, 2, 3, 7, 12, 12, 30, 100)]
    with ThreadPoolExecutor(4) as executor:
        for indices, sums in zip(lists, executor.map(memory.checksums, lists), strict=True):
            assert sums == [expected[index] for index in indices]
    assert memory.checksums([]) == []


def test_blocks_that_are_not_in_a_pool_are_refused_before_a_kernel_reaches_for_them() -> None:
    memory, other = make_memory(8), make_memory(4)
    for outside in (-1, 8):
        with pytest.raises(InternalError, match=f"block {outside} is not in a pool of 8"):
            memory.checksums([0, outside])
    with pytest.raises(InternalError, match="block 4 is not in a pool of 4"):
        memory.copy_from(other.cache.blocks, [(4, 0)], summed=True)
    with pytest.raises(InternalError, match="block 8 is not in a pool of 8"):
        memory.copy_from(other.cache.blocks, [(0, 8)], summed=True)
