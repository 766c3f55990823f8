"""One contract for every transport: what fetch promises to those who build on it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from baton.errors import PeerLost, TransferRefused
from baton.ids import TransferId, new_transfer_id
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Connection, Fetched, Want
from kvtransfer.transports.fake import FakeNetwork, Faults
from kvtransfer.transports.shm import ShmConnection, shm_endpoint
from kvtransfer.transports.tcp import TcpConnection
from kvtransfer.transports.tcp_server import TcpServer
from tests.kvtransfer.rig import make_pool, pattern, until

TRANSPORTS = ("shm", "tcp", "fake")


class StagedMemory:
    """A pool that the host can't reach, as one in device memory: no views, only copies. `on_read` and `on_write` let a
    test act in the middle of a transfer, `block` holds it up."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.on_read: Callable[[int], None] = lambda index: None
        self.on_write: Callable[[int], None] = lambda index: None

    @property
    def num_blocks(self) -> int:
        return self.memory.num_blocks

    @property
    def block_bytes(self) -> int:
        return self.memory.block_bytes

    def generation(self, index: int) -> int:
        return self.memory.generation(index)

    def view(self, index: int, count: int = 1) -> memoryview | None:
        return None

    def read(self, index: int, count: int = 1) -> memoryview:
        data = memoryview(bytes(self.memory.read(index, count)))
        for read in range(index, index + count):
            self.on_read(read)
        return data

    def write(self, index: int, data: memoryview) -> None:
        self.on_write(index)
        self.memory.write(index, data)


@dataclass
class Way:
    """One connection between two pools, and the set that may be read over it."""

    connection: Connection
    source: HostMemory
    staged_source: StagedMemory
    destination: HostMemory
    staged_destination: StagedMemory
    transfer_id: TransferId
    permit: ReadPermit
    permits: ReadPermits
    kill: Callable[[], Awaitable[None]] | None
    """Ends the source; None where a fetch can't feel it (shm: memory stays, the control stream tells)."""

    def allow(self, *indices: int) -> None:
        for index in indices:
            self.source.generations[index] += 1
            self.source.write(index, memoryview(pattern(index, self.source.generations[index])))
            self.permit.allow(index, self.source.generations[index])

    def want(self, source: int, destination: int) -> Want:
        return Want(source, self.source.generations[source], destination)

    async def fetch(self, *wants: Want, gate: Gate | None = None) -> list[Fetched]:
        return await self.connection.fetch(self.transfer_id, wants, gate or Gate())

    def landed(self, want: Want) -> bool:
        return bytes(self.destination.read(want.destination)) == pattern(want.source, want.generation)


@asynccontextmanager
async def make_way(transport: str, threads: Threads, staged: bool) -> AsyncIterator[Way]:
    source, destination, permits = make_pool(), make_pool(), ReadPermits()
    staged_source, staged_destination = StagedMemory(source), StagedMemory(destination)
    read: PoolMemory = staged_source if staged else source
    write: PoolMemory = staged_destination if staged else destination
    permit = ReadPermit(Gate())
    transfer_id = new_transfer_id()
    permits.grant(transfer_id, permit)
    server: TcpServer | None = None
    connection: Connection
    kill: Callable[[], Awaitable[None]] | None = None
    if transport == "shm":
        connection = await ShmConnection.connect(shm_endpoint(source).address, write, threads.memory)
    elif transport == "tcp":
        server = TcpServer(read, permits)

        async def kill_server() -> None:
            server.close()

        connection = TcpConnection.connect(server.endpoint().address, write, threads.network)
        kill = kill_server
    else:
        network = FakeNetwork(faults=Faults(delay=0.001, duplicate=0.5))
        fake = network.add("source", read, permits)

        async def kill_fake() -> None:
            fake.die()

        connection = network.connect(fake.endpoint().address, write)
        kill = kill_fake
    yield Way(
        connection,
        source,
        staged_source,
        destination,
        staged_destination,
        transfer_id,
        permit,
        permits,
        kill,
    )
    await connection.close()
    if server is not None:
        server.close()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads.create()
    yield threads
    threads.close()


@pytest.fixture(params=[(t, s) for t in TRANSPORTS for s in (False, True)], ids=lambda p: f"{p[0]}{'-staged' * p[1]}")
async def way(request: pytest.FixtureRequest, threads: Threads) -> AsyncIterator[Way]:
    transport, staged = request.param
    async with make_way(transport, threads, staged) as made:
        yield made


@pytest.fixture(params=TRANSPORTS)
async def staged_way(request: pytest.FixtureRequest, threads: Threads) -> AsyncIterator[Way]:
    async with make_way(request.param, threads, True) as made:
        yield made


async def test_any_subset_in_any_order_lands_where_it_is_wanted(way: Way) -> None:
    way.allow(*range(40))
    draw = random.Random(5)
    for size in (1, 7, 40):
        sources, destinations = draw.sample(range(40), size), draw.sample(range(64), size)
        wants = [way.want(s, d) for s, d in zip(sources, destinations, strict=True)]
        assert await way.fetch(*wants) == [Fetched.LANDED] * size
        assert all(way.landed(want) for want in wants)


async def test_neighbours_in_both_pools_land_whole(way: Way) -> None:
    way.allow(*range(10, 30))
    wants = [way.want(10 + i, 40 + i) for i in range(20)]
    assert await way.fetch(*wants) == [Fetched.LANDED] * 20
    assert all(way.landed(want) for want in wants)
    assert bytes(way.destination.read(39)) == bytes(way.destination.read(60)) == bytes(4096)


async def test_a_block_may_be_fetched_again_and_to_two_places(way: Way) -> None:
    way.allow(3, 4)
    wants = [way.want(3, 8), way.want(4, 9), way.want(3, 20)]
    for _ in range(2):
        assert await way.fetch(*wants) == [Fetched.LANDED] * 3
        assert all(way.landed(want) for want in wants)


async def test_many_fetches_at_once_do_not_mix(way: Way) -> None:
    way.allow(*range(60))
    batches = [[way.want(s, s) for s in range(start, start + 5)] for start in range(0, 60, 5)]
    results = await asyncio.gather(*(way.fetch(*batch) for batch in batches))
    assert results == [[Fetched.LANDED] * 5] * 12
    assert all(way.landed(want) for batch in batches for want in batch)


async def test_nothing_wanted_is_nothing_done(way: Way) -> None:
    assert await way.fetch() == []


async def test_a_block_of_another_generation_is_stale_and_its_neighbours_are_not(way: Way) -> None:
    way.allow(1, 2, 3)
    wants = [way.want(i, i) for i in (1, 2, 3)]
    way.source.generations[2] += 1
    assert await way.fetch(*wants) == [Fetched.LANDED, Fetched.STALE, Fetched.LANDED]


async def test_a_block_that_is_reused_in_the_middle_of_its_copy_is_stale(staged_way: Way) -> None:
    way = staged_way
    way.allow(1, 2)

    def reuse_if(index: int, when: int) -> None:
        if index == when:
            way.source.generations[2] += 1

    if isinstance(way.connection, ShmConnection):  # which reads without the source's doing
        way.staged_destination.on_write = lambda index: reuse_if(index, 9)
    else:
        way.staged_source.on_read = lambda index: reuse_if(index, 2)
    wants = [way.want(1, 1), way.want(2, 9)]
    assert await way.fetch(*wants) == [Fetched.LANDED, Fetched.STALE]


async def test_a_closed_gate_lets_nothing_be_written(way: Way) -> None:
    way.allow(1)
    gate = Gate()
    assert gate.close(lambda: None)
    with pytest.raises(TransferRefused, match="given up"):
        await way.fetch(way.want(1, 1), gate=gate)
    assert bytes(way.destination.read(1)) == bytes(4096)


async def test_after_a_fetch_nobody_is_inside_the_gate(way: Way) -> None:
    way.allow(*range(20))
    gate = Gate()
    await way.fetch(*[way.want(i, i) for i in range(20)], gate=gate)
    assert gate.in_flight == 0


@pytest.mark.parametrize("transport", ["tcp", "fake"])
async def test_what_is_not_offered_is_not_given_out(transport: str, threads: Threads) -> None:
    async with make_way(transport, threads, False) as way:
        way.allow(1, 3)
        way.source.write(2, memoryview(b"secret!!" * 512))
        assert await way.fetch(*[way.want(i, i) for i in (1, 2, 3)]) == [
            Fetched.LANDED,
            Fetched.REFUSED,
            Fetched.LANDED,
        ]
        assert bytes(way.destination.read(2)) == bytes(4096)
        with pytest.raises(TransferRefused, match="knows of no such claimed block set"):
            await way.connection.fetch(new_transfer_id(), [way.want(1, 1)], Gate())
        way.permits.withdraw(way.transfer_id)
        with pytest.raises(TransferRefused, match="knows of no such claimed block set"):
            await way.fetch(way.want(1, 1))


@pytest.mark.parametrize("transport", ["tcp", "fake"])
async def test_a_set_that_ends_in_the_middle_of_a_fetch_waits_for_it_and_gives_no_more_out(
    transport: str, threads: Threads
) -> None:
    async with make_way(transport, threads, True) as way:
        way.allow(*range(10))
        drained: list[str] = []

        def end(index: int) -> None:
            if not way.permit.gate.closed:
                assert not way.permit.gate.close(lambda: drained.append("drained"))
                assert not drained

        way.staged_source.on_read = end
        results = await way.fetch(*[way.want(i, i) for i in range(10)])
        assert results.count(Fetched.LANDED) <= 1  # the one under way
        assert results.count(Fetched.REFUSED) >= 9
        await until(lambda: drained == ["drained"])


@pytest.mark.parametrize("transport", ["tcp", "fake"])
async def test_a_source_that_dies_is_lost_and_the_gate_drains(transport: str, threads: Threads) -> None:
    async with make_way(transport, threads, True) as way:
        assert way.kill is not None
        way.allow(*range(50))
        gate, reached = Gate(), threading.Event()
        way.staged_source.on_read = lambda index: reached.set()
        fetch = asyncio.create_task(way.fetch(*[way.want(i, i) for i in range(50)] * 40, gate=gate))
        await until(reached.is_set)
        await way.kill()
        with pytest.raises(PeerLost, match="source"):
            await fetch
        assert not way.connection.alive
        await until(lambda: gate.in_flight == 0)
        with pytest.raises(PeerLost):
            await way.fetch(way.want(1, 1))


async def test_a_cancelled_fetch_leaves_the_gate_soon_and_the_connection_usable(way: Way) -> None:
    way.allow(*range(50))
    gate = Gate()
    fetch = asyncio.create_task(way.fetch(*[way.want(i, i) for i in range(50)] * 40, gate=gate))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    await until(lambda: gate.in_flight == 0)
    want = way.want(1, 1)
    assert await way.fetch(want) == [Fetched.LANDED]
    assert way.landed(want)


async def test_shm_refuses_addresses_that_are_not_of_this_host(threads: Threads) -> None:
    source, destination = make_pool(), make_pool()
    address = bytearray(shm_endpoint(source).address)
    for spoil, complaint in (
        (slice(16, 17), "another host"),
        (slice(0, 1), "version"),
        (slice(40, 41), "another pool"),
    ):
        spoiled = bytearray(address)
        spoiled[spoil] = bytes([spoiled[spoil.start] ^ 1])
        with pytest.raises(TransferRefused, match=complaint):
            await ShmConnection.connect(bytes(spoiled), destination, threads.memory)
    with pytest.raises(TransferRefused, match="has 48 bytes, not 3"):
        await ShmConnection.connect(b"abc", destination, threads.memory)


async def test_shm_refuses_a_source_with_blocks_of_another_size(threads: Threads) -> None:
    with pytest.raises(TransferRefused, match="source's blocks have 4096 bytes, this pool's 64"):
        await ShmConnection.connect(shm_endpoint(make_pool()).address, HostMemory.create(4, 64), threads.memory)


async def test_fake_faults_repeat_with_their_seed(threads: Threads) -> None:
    async def run(seed: int) -> tuple[list[float], bytes]:
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        network = FakeNetwork(seed, Faults(delay=3, corrupt=0.3, duplicate=0.3), sleep)
        source, destination, permits = make_pool(), make_pool(), ReadPermits()
        permit, transfer_id = ReadPermit(Gate()), TransferId(bytes(16))
        permits.grant(transfer_id, permit)
        for index in range(20):
            permit.allow(index, 0)
        connection = network.connect(network.add("s", source, permits).endpoint().address, destination)
        await connection.fetch(transfer_id, [Want(i, 0, i) for i in range(20)], Gate())
        return waits, bytes(destination.blocks)

    first, again, other = await run(1), await run(1), await run(2)
    assert first == again
    assert first != other
    assert len(first[0]) > 20  # some were sent twice
    assert any(first[1])  # some were damaged
