"""What only cuda_ipc does, on memory that stands in for a device's: tests/worker/test_device_memory.py has a device."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from baton.errors import ConfigError, TransferRefused
from baton.ids import new_transfer_id
from kvtransfer.gate import Gate
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Fetched, Want, runs
from kvtransfer.transports.chooser import Connector
from kvtransfer.transports.cuda_ipc import CudaIpcConnection, DeviceHandle, cuda_ipc_endpoint
from kvtransfer.transports.offers import offer_memory
from tests.kvtransfer.rig import make_pool, until
from tests.kvtransfer.staged import StagedMemory


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads.create()
    yield threads
    threads.close()


def address_of(memory: StagedMemory) -> bytes:
    endpoint = cuda_ipc_endpoint(memory)
    assert endpoint is not None
    return endpoint.address


def test_runs_are_neighbours_on_both_sides() -> None:
    pairs = [(4, 0), (5, 1), (6, 2), (8, 3), (9, 9), (10, 10), (10, 11)]
    assert list(runs(pairs)) == [(4, 0, 3), (8, 3, 1), (9, 9, 2), (10, 11, 1)]
    assert list(runs([])) == []


def test_a_pool_that_the_device_does_not_give_out_is_not_offered() -> None:
    class Private(StagedMemory):
        def export(self) -> DeviceHandle | None:
            return None

    allowed = ("cuda_ipc", "shm")
    assert [e.transport for e in offer_memory(StagedMemory(make_pool()), allowed, print)] == ["cuda_ipc"]
    assert offer_memory(Private(make_pool()), (*allowed, "tcp"), print) == []
    assert [e.transport for e in offer_memory(make_pool(), allowed, print)] == ["shm"]


def test_a_worker_whose_pool_its_transport_can_never_reach_does_not_start() -> None:
    with pytest.raises(ConfigError, match=r"--transport cuda_ipc can't reach .* in host memory; auto and tcp can"):
        offer_memory(make_pool(), ("cuda_ipc",), print)
    for name in ("shm", "nixl"):
        with pytest.raises(ConfigError, match=f"--transport {name} can't reach .* in device memory"):
            offer_memory(StagedMemory(make_pool()), (name,), print)


async def test_auto_copies_within_a_device_and_goes_another_way_from_host_memory(threads: Threads) -> None:
    source = StagedMemory(make_pool())
    endpoints = offer_memory(source, ("cuda_ipc", "shm", "tcp"), print)
    connector = Connector(StagedMemory(make_pool()), threads)
    name, _ = await connector.open(endpoints)
    assert name == "cuda_ipc"
    await connector.close()
    with pytest.raises(TransferRefused, match="cuda_ipc: this worker's pool is not in device memory"):
        await Connector(make_pool(), threads).open(endpoints)


async def test_another_device_of_this_host_is_refused(threads: Threads) -> None:
    address = address_of(StagedMemory(make_pool(), b"another device.."))
    with pytest.raises(TransferRefused, match="on another GPU"):
        await CudaIpcConnection.connect(address, StagedMemory(make_pool()), threads.memory)


async def test_nothing_is_mapped_for_a_source_that_cannot_prove_itself(threads: Threads) -> None:
    memory = StagedMemory(make_pool())
    address = address_of(StagedMemory(make_pool()))
    for spoiled in (address[:-1] + bytes([address[-1] ^ 1]), address[:100], address + b"?"):
        with pytest.raises(TransferRefused):
            await CudaIpcConnection.connect(spoiled, memory, threads.memory)
    assert memory.mapped == []


async def test_a_pool_stays_mapped_until_the_last_copy_has_ended_even_if_nobody_waits_for_it(threads: Threads) -> None:
    memory, gate, copying, go_on = StagedMemory(make_pool()), Gate(), threading.Event(), threading.Event()
    connection = await CudaIpcConnection.connect(address_of(StagedMemory(make_pool())), memory, threads.memory)

    def stand_still(index: int) -> None:
        copying.set()
        assert go_on.wait(10)

    memory.on_write = stand_still
    fetch = asyncio.create_task(connection.fetch(new_transfer_id(), [Want(0, 0, 0), Want(5, 0, 5)], gate))
    await until(copying.is_set)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    await connection.close()
    assert not memory.mapped[0].closed
    assert gate.in_flight == 1
    go_on.set()
    await until(lambda: memory.mapped[0].closed)
    assert gate.in_flight == 0


async def test_a_connection_that_is_closed_while_idle_unmaps_at_once(threads: Threads) -> None:
    memory = StagedMemory(make_pool())
    connection = await CudaIpcConnection.connect(address_of(StagedMemory(make_pool())), memory, threads.memory)
    assert await connection.fetch(new_transfer_id(), [Want(0, 0, 0)], Gate()) == [Fetched.LANDED]
    await connection.close()
    assert memory.mapped[0].closed
