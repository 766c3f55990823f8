"""One contract for every transport: what fetch promises to those who build on it. transport_rigs.py has a class for
each; test_transport_peers.py is about sources in processes of their own, that are killed and stopped."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from baton.errors import HandoffFailed, PeerLost, TransferRefused
from baton.ids import TransferId, new_transfer_id
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.threads import Threads
from kvtransfer.transports.base import Connection, Endpoint, Fetched, Want
from tests.kvtransfer.rig import LAYOUT, make_pool, pattern, until
from tests.kvtransfer.staged import StagedMemory
from tests.kvtransfer.transport_rigs import RIGS, TransportRig

ASKING = [name for name, rig in RIGS.items() if rig.asks_source]


@dataclass
class Way:
    """One connection between two pools, and the set that may be read over it."""

    rig: TransportRig
    endpoint: Endpoint
    connection: Connection
    source: HostMemory
    staged_source: StagedMemory
    destination: HostMemory
    staged_destination: StagedMemory
    reaches: PoolMemory
    """Of the two destinations, the one that the connection lands in."""
    transfer_id: TransferId
    permit: ReadPermit
    permits: ReadPermits

    def allow(self, *indices: int) -> None:
        for index in indices:
            self.source.generations[index] += 1
            self.source.write(index, memoryview(pattern(index, self.source.generations[index])))
            self.permit.allow(index, self.source.generations[index])

    def want(self, source: int, destination: int) -> Want:
        """As a pull wants it: it knows what the block's checksum was when it was sealed."""
        generation = self.source.generations[source]
        return Want(source, generation, destination, self.reaches.checksum_kind.of(pattern(source, generation)))

    async def fetch(self, *wants: Want, gate: Gate | None = None) -> list[Fetched]:
        return await self.connection.fetch(self.transfer_id, wants, gate or Gate())

    def landed(self, want: Want) -> bool:
        return bytes(self.destination.read(want.destination)) == pattern(want.source, want.generation)


@asynccontextmanager
async def make_way(transport: str, threads: Threads, staged: bool) -> AsyncIterator[Way]:
    rig = RIGS[transport]()
    source, destination, permits = make_pool(), make_pool(), ReadPermits()
    staged_source, staged_destination = StagedMemory(source), StagedMemory(destination)
    permit = ReadPermit(Gate())
    transfer_id = new_transfer_id()
    permits.grant(transfer_id, permit)
    endpoint = rig.serve(staged_source if staged else source, permits)
    reaches: PoolMemory = staged_destination if staged else destination
    connection = await rig.connect(endpoint, reaches, threads)
    yield Way(
        rig,
        endpoint,
        connection,
        source,
        staged_source,
        destination,
        staged_destination,
        reaches,
        transfer_id,
        permit,
        permits,
    )
    await connection.close()
    rig.close()


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads.create()
    yield threads
    threads.close()


def need(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips where the machine lacks something. NIXL's own choice between processes of one host would be to copy their
    memory, stopped or dead; tcp is the harder case, for there the source has to answer."""
    missing = RIGS[transport].missing()
    if missing:
        pytest.skip(missing)
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setenv("UCX_TLS", "tcp,self")


@pytest.fixture(params=RIGS)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    need(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["", "staged"])
async def way(request: pytest.FixtureRequest, transport: str, threads: Threads) -> AsyncIterator[Way]:
    async with make_way(transport, threads, request.param) as made:
        yield made


@pytest.fixture
async def staged_way(transport: str, threads: Threads) -> AsyncIterator[Way]:
    async with make_way(transport, threads, True) as made:
        yield made


@pytest.fixture(params=ASKING)
async def asking_way(
    request: pytest.FixtureRequest, threads: Threads, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Way]:
    """Of a transport whose source answers each read."""
    need(request.param, monkeypatch)
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


async def test_a_block_may_be_fetched_again_twice_at_once_and_to_two_places(way: Way) -> None:
    way.allow(3, 4)
    wants = [way.want(3, 8), way.want(4, 9), way.want(3, 20), way.want(4, 9)]
    for _ in range(2):
        assert await way.fetch(*wants) == [Fetched.LANDED] * 4
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

    if way.rig.asks_source:
        way.staged_source.on_read = lambda index: reuse_if(index, 2)
    else:  # the puller reads without the source's doing
        way.staged_destination.on_write = lambda index: reuse_if(index, 9)
    wants = [way.want(1, 1), way.want(2, 9)]
    assert await way.fetch(*wants) == [Fetched.LANDED, Fetched.STALE]


async def test_what_sums_up_to_something_else_is_damaged_and_its_neighbours_are_not(way: Way) -> None:
    way.allow(1, 2, 3)
    wants = [way.want(i, i) for i in (1, 2, 3)]
    way.source.write(2, memoryview(pattern(2, 77)))  # behind its seal
    assert await way.fetch(*wants) == [Fetched.LANDED, Fetched.DAMAGED, Fetched.LANDED]
    assert await way.fetch(*(want._replace(checksum=None) for want in wants)) == [Fetched.LANDED] * 3


async def test_a_pool_that_sums_its_own_blocks_is_not_read_back(staged_way: Way) -> None:
    way, read = staged_way, list[int]()
    way.allow(*range(10))
    way.staged_destination.on_read = read.append
    wants = [way.want(i, i) for i in range(10)]
    wrong = wants[3]._replace(checksum=1)
    assert await way.fetch(*wants, wrong) == [Fetched.LANDED] * 10 + [Fetched.DAMAGED]
    assert not read


@pytest.mark.parametrize("staged", [False, True], ids=["", "staged"])
async def test_large_blocks_land_whole_and_are_summed_whole(transport: str, threads: Threads, staged: bool) -> None:
    """Larger than the pieces that are summed, and no multiple of them."""
    rig, size = RIGS[transport](), 1_700_008
    source, destination, permits = HostMemory.create(8, size), HostMemory.create(8, size), ReadPermits()
    reaches: PoolMemory = StagedMemory(destination) if staged else destination
    permit, transfer_id = ReadPermit(Gate()), new_transfer_id()
    permits.grant(transfer_id, permit)
    data = [random.Random(index).randbytes(size) for index in range(8)]
    for index in range(8):
        source.write(index, memoryview(data[index]))
        permit.allow(index, 0)
    connection = await rig.connect(rig.serve(source, permits), reaches, threads)
    sum_of = reaches.checksum_kind.of
    wants = [Want(s, 0, d, sum_of(data[s])) for s, d in zip(range(8), (3, 1, 2, 0, 7, 6, 4, 5), strict=True)]
    wants[4] = wants[4]._replace(checksum=1)
    results = await connection.fetch(transfer_id, wants, Gate())
    assert results == [Fetched.LANDED] * 4 + [Fetched.DAMAGED] + [Fetched.LANDED] * 3
    assert all(bytes(destination.read(want.destination)) == data[want.source] for want in wants)
    await connection.close()
    rig.close()


async def test_a_closed_gate_lets_nothing_be_written(way: Way) -> None:
    way.allow(1)
    gate = Gate()
    assert gate.close(lambda: None)
    with pytest.raises(TransferRefused, match="given up"):
        await way.fetch(way.want(1, 1), gate=gate)
    assert bytes(way.destination.read(1)) == bytes(4096)


async def test_a_gate_that_closes_in_the_middle_drains_and_nothing_is_written_behind_it(staged_way: Way) -> None:
    way = staged_way
    way.allow(*range(40))
    gate, drained = Gate(), threading.Event()

    def close(index: int) -> None:
        if not gate.closed:
            assert not gate.close(drained.set)

    way.staged_destination.on_write = close
    with suppress(TransferRefused):  # or all of it was on its way already
        assert set(await way.fetch(*(way.want(i, i) for i in range(40)), gate=gate)) == {Fetched.LANDED}
    await until(drained.is_set)
    written: list[int] = []
    way.staged_destination.on_write = written.append
    await asyncio.sleep(0.05)
    assert written == []


async def test_after_a_fetch_nobody_is_inside_the_gate(way: Way) -> None:
    way.allow(*range(20))
    gate = Gate()
    await way.fetch(*[way.want(i, i) for i in range(20)], gate=gate)
    assert gate.in_flight == 0


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


async def test_blocks_that_the_source_does_not_have_are_refused(way: Way) -> None:
    way.allow(1)
    outside = Want(64, 0, 2)
    if way.rig.asks_source:
        assert await way.fetch(way.want(1, 1), outside) == [Fetched.LANDED, Fetched.REFUSED]
    else:
        with pytest.raises(TransferRefused, match="has 64 blocks, not"):
            await way.fetch(way.want(1, 1), outside)
    assert bytes(way.destination.read(2)) == bytes(4096)


async def test_what_is_not_offered_is_not_given_out(asking_way: Way) -> None:
    way = asking_way
    way.allow(1, 3)
    way.source.write(2, memoryview(b"secret!!" * 512))
    assert await way.fetch(*[way.want(1, 1), Want(2, 0, 2), way.want(3, 3)]) == [
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


async def test_a_set_that_ends_in_the_middle_of_a_fetch_waits_for_it_and_gives_no_more_out(asking_way: Way) -> None:
    way = asking_way
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


async def test_a_reader_that_is_slow_holds_the_source_no_longer_than_allowed(transport: str, threads: Threads) -> None:
    """It does not read on, for as long as it likes; the set ends, and the source has its blocks back soon."""
    rig, size = RIGS[transport](), 1 << 20
    source, permits = HostMemory.create(32, size), ReadPermits()
    destination = StagedMemory(HostMemory.create(32, size))
    permit, transfer_id = ReadPermit(Gate()), new_transfer_id()
    permits.grant(transfer_id, permit)
    for index in range(32):
        permit.allow(index, 0)
    stuck, go_on, gate = threading.Event(), threading.Event(), Gate()

    def stand_still(index: int) -> None:
        stuck.set()
        assert go_on.wait(20)

    connection = await rig.connect(rig.serve(source, permits), destination, threads)
    if transport == "fake":  # its pullers and sources share one thread; a write that blocks would block the test
        go_on.set()
    destination.on_write = stand_still
    fetch = asyncio.create_task(connection.fetch(transfer_id, [Want(i, 0, i) for i in range(32)], gate))
    await until(stuck.is_set)
    drained = threading.Event()
    if permit.gate.close(drained.set):
        drained.set()
    await until(drained.is_set, 5.0)
    go_on.set()
    for result in await asyncio.gather(fetch, return_exceptions=True):
        assert isinstance(result, (list, PeerLost)), result
    await until(lambda: gate.in_flight == 0)
    await connection.close()
    rig.close()


async def test_a_source_that_dies_is_lost_and_the_gate_drains(asking_way: Way) -> None:
    way = asking_way
    way.allow(*range(50))
    gate, reached = Gate(), threading.Event()

    def read_slowly(index: int) -> None:
        reached.set()
        time.sleep(0.002)  # so that it dies in the middle, however fast the machine is

    way.staged_source.on_read = read_slowly
    fetch = asyncio.create_task(way.fetch(*[way.want(i, i) for i in range(50)] * 40, gate=gate))
    await until(reached.is_set)
    way.rig.close()
    with pytest.raises(PeerLost, match="source"):
        await fetch
    assert not way.connection.alive
    await until(lambda: gate.in_flight == 0)
    with pytest.raises(PeerLost):
        await way.fetch(way.want(1, 1))


async def test_another_incarnation_at_the_same_address_is_never_taken_for_the_first(way: Way, threads: Threads) -> None:
    """Its blocks have the same places and generations."""
    way.allow(*range(8))
    wants = [way.want(i, i)._replace(checksum=None) for i in range(8)]
    assert await way.fetch(*wants) == [Fetched.LANDED] * 8
    way.rig.close()
    way.source.close()
    other = make_pool()
    permits, permit = ReadPermits(), ReadPermit(Gate())
    permits.grant(new_transfer_id(), permit)
    for index in range(8):
        other.generations[index] = way.source.generations[index]
        other.write(index, memoryview(b"another!" * (LAYOUT.block_bytes // 8)))
        permit.allow(index, other.generations[index])
    again = way.rig.serve_again(way.endpoint, other, permits)
    old = way.connection
    for reach in (lambda: asyncio.sleep(0, old), lambda: way.rig.connect(again, way.reaches, threads)):
        way.destination.blocks[:] = bytes(len(way.destination.blocks))
        try:
            connection = await reach()
            results = await connection.fetch(way.transfer_id, wants, Gate())
        except HandoffFailed:
            continue
        else:  # what is mapped still are the first one's bytes
            assert all(result is not Fetched.LANDED or way.landed(w) for w, result in zip(wants, results, strict=True))
            assert connection is old
        finally:
            assert b"another!" not in bytes(way.destination.blocks)


async def fetch_from(way: Way, address: bytes, memory: PoolMemory, threads: Threads) -> list[Fetched]:
    connection = await way.rig.connect(Endpoint(way.rig.name, address), memory, threads)
    return await connection.fetch(way.transfer_id, [way.want(1, 1)], Gate())


async def test_an_address_that_was_spoiled_leads_nowhere(way: Way, threads: Threads) -> None:
    way.allow(1)
    for address in way.rig.spoiled(way.endpoint.address):
        with pytest.raises(HandoffFailed):
            await fetch_from(way, address, way.reaches, threads)
    assert bytes(way.destination.read(1)) == bytes(4096)


async def test_blocks_of_another_size_are_refused(way: Way, threads: Threads) -> None:
    small: PoolMemory = HostMemory.create(4, 64)
    if isinstance(way.reaches, StagedMemory):
        small = StagedMemory(HostMemory.create(4, 64))
    with pytest.raises(TransferRefused, match=r"blocks have 4096 bytes, this pool's 64|malformed"):
        await fetch_from(way, way.endpoint.address, small, threads)


async def test_a_closed_connection_refuses(way: Way) -> None:
    way.allow(1)
    await way.connection.close()
    assert not way.connection.alive
    with pytest.raises(HandoffFailed):
        await way.fetch(way.want(1, 1))
    assert bytes(way.destination.read(1)) == bytes(4096)
