"""A source and a puller in one process: small pools, real gRPC, real transports, or the fake one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from baton.clock import Clock, MonotonicClock
from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId, BlockIndex, BlockRef, Generation, Incarnation, WorkerId
from baton.layout import KVLayout
from baton.metrics import Metrics, TransferMetrics
from baton.v1.transfer_pb2_grpc import add_TransferServicer_to_server
from kvtransfer.checksum import ChecksumKind
from kvtransfer.destination import OnVerified, Puller
from kvtransfer.gate import ReadPermits
from kvtransfer.memory import HostMemory, PoolMemory
from kvtransfer.refusal import Refusals
from kvtransfer.service import TransferService
from kvtransfer.source import SourceLedger
from kvtransfer.threads import Threads
from kvtransfer.ticket import Ticket
from kvtransfer.transports.base import Endpoint
from kvtransfer.transports.chooser import Connector
from kvtransfer.transports.fake import FakeNetwork
from kvtransfer.transports.offers import offer_memory
from kvtransfer.transports.tcp_server import TcpServer
from tests.kvtransfer.staged import StagedMemory
from worker.unreadable import UnreadableAsEmpty

LAYOUT = KVLayout(2, 2, 16, 8, "float32", b"m" * 16)  # 4 KiB a block
NUM_BLOCKS = 64
INCARNATION = Incarnation(77)
SOURCE_ID, PULLER_ID = WorkerId("prefill-0"), WorkerId("decode-0")


def pattern(index: int, generation: int) -> bytes:
    """What a test writes into a block: different for every use of every block."""
    return (index * 1_000_003 + generation * 7919).to_bytes(8, "little") * (LAYOUT.block_bytes // 8)


def make_pool(num_blocks: int = NUM_BLOCKS) -> HostMemory:
    return HostMemory.create(num_blocks, LAYOUT.block_bytes)


def pool_of(memory: HostMemory, kind: ChecksumKind) -> PoolMemory:
    """As a worker has it whose pool is of that kind."""
    return memory if kind is ChecksumKind.XXH3 else StagedMemory(memory, kind=kind)


def take(memory: HostMemory, indices: Sequence[int]) -> list[BlockRef]:
    """Allocates blocks as an engine's pool would; their hashes are those of one made-up prompt."""
    hashes = block_hashes(root_hash(b"m"), range(16 * len(indices)), 16)
    refs = []
    for index, block_hash in zip(indices, hashes, strict=True):
        memory.generations[index] += 1
        refs.append(BlockRef(BlockIndex(index), Generation(memory.generations[index]), block_hash))
    return refs


def fill(memory: HostMemory, refs: Sequence[BlockRef]) -> None:
    for ref in refs:
        memory.write(ref.index, memoryview(pattern(ref.index, ref.generation)))


def holds(memory: HostMemory, refs: Sequence[BlockRef], source: Sequence[BlockRef]) -> bool:
    """Whether the blocks `refs` have the bytes that the `source` blocks were filled with."""
    return all(
        bytes(memory.read(ref.index)) == pattern(origin.index, origin.generation)
        for ref, origin in zip(refs, source, strict=True)
    )


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Returns as soon as `condition` holds; fails where it does not within `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in threads and shared memory
            await asyncio.sleep(0.001)


@dataclass
class Rig:
    ledger: SourceLedger
    source: HostMemory
    puller: Puller
    destination: HostMemory
    pool: PoolMemory
    """The destination, as its worker has it."""
    permits: ReadPermits
    connector: Connector
    address: str
    server: grpc.aio.Server
    service: TransferService
    data_server: TcpServer
    metrics: Metrics
    """Both sides'."""
    transfer_metrics: TransferMetrics
    terminal: list[AttemptId] = field(default_factory=list)

    def offer(self, count: int, attempt: int = 0) -> tuple[AttemptId, list[BlockRef], Ticket]:
        id = AttemptId("req-1", attempt)
        blocks = take(self.source, range(2, 2 + count))
        return id, blocks, self.ledger.offer(id, blocks, count * 16)

    def reserve(self, count: int) -> list[BlockRef]:
        return take(self.destination, range(count - 1, -1, -1))  # in another order than the source's

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@dataclass
class Source:
    """One worker that offers blocks."""

    ledger: SourceLedger
    memory: HostMemory
    permits: ReadPermits
    address: str
    server: grpc.aio.Server
    service: TransferService
    data_server: TcpServer
    terminal: list[AttemptId]


@asynccontextmanager
async def make_source(
    metrics: TransferMetrics,
    threads: Threads,
    network: FakeNetwork,
    *,
    memory: HostMemory,
    layout: KVLayout = LAYOUT,
    worker_id: WorkerId = SOURCE_ID,
    incarnation: Incarnation = INCARNATION,
    lease_seconds: float = 5.0,
    clock: Clock | None = None,
    claim_seconds: float = 5.0,
    name: str = "source",
    transport: str = "shm",
    kind: ChecksumKind = ChecksumKind.XXH3,
) -> AsyncIterator[Source]:
    pool, permits = pool_of(memory, kind), ReadPermits()
    terminal: list[AttemptId] = []
    server = grpc.aio.server(interceptors=[UnreadableAsEmpty()])
    port = server.add_insecure_port("127.0.0.1:0")
    address = f"127.0.0.1:{port}"
    ledger = SourceLedger(
        memory=pool,
        layout=layout,
        worker_id=worker_id,
        address=address,
        incarnation=incarnation,
        lease_seconds=lease_seconds,
        on_terminal=terminal.append,
        clock=clock or MonotonicClock(),
        metrics=metrics,
        executor=threads.memory,
        permits=permits,
    )
    data_server = TcpServer(pool, permits, send_seconds=1.0, request_seconds=1.0, refusals=Refusals(metrics))
    closers: list[Callable[[], None]] = []
    endpoints: list[Endpoint] = [
        *offer_memory(pool, ("shm", "tcp", transport), closers.append),
        data_server.endpoint(),
        network.add(name, pool, permits).endpoint(),
    ]
    service = TransferService(ledger, lambda: endpoints, metrics, claim_seconds=claim_seconds)
    add_TransferServicer_to_server(service, server)
    await server.start()
    try:
        yield Source(ledger, memory, permits, address, server, service, data_server, terminal)
    finally:
        await server.stop(None)
        data_server.close()
        for close in closers:
            close()


@asynccontextmanager
async def make_rig(
    transport: str = "shm",
    *,
    lease_seconds: float = 5.0,
    clock: Clock | None = None,
    puller_clock: Clock | None = None,
    network: FakeNetwork | None = None,
    incarnation: Incarnation = INCARNATION,
    layout: KVLayout = LAYOUT,
    claim_seconds: float = 5.0,
    on_verified: OnVerified | None = None,
    kinds: tuple[ChecksumKind, ChecksumKind] = (ChecksumKind.XXH3, ChecksumKind.XXH3),
) -> AsyncIterator[Rig]:
    """`layout` is the puller's; the source's is LAYOUT. `kinds`: the source's, and the puller's."""
    memory, destination = make_pool(), HostMemory.create(NUM_BLOCKS, layout.block_bytes)
    pool = pool_of(destination, kinds[1])
    metrics, threads = Metrics(), Threads.create()
    transfer_metrics, network = TransferMetrics(metrics), network or FakeNetwork()
    connector = Connector(pool, threads, setting=transport, network=network)
    puller = Puller(
        memory=pool,
        layout=layout,
        worker_id=PULLER_ID,
        connector=connector,
        threads=threads,
        clock=puller_clock or MonotonicClock(),
        metrics=transfer_metrics,
        on_verified=on_verified,
    )
    async with make_source(
        transfer_metrics,
        threads,
        network,
        memory=memory,
        incarnation=incarnation,
        lease_seconds=lease_seconds,
        clock=clock,
        claim_seconds=claim_seconds,
        transport=transport,
        kind=kinds[0],
    ) as source:
        try:
            yield Rig(
                source.ledger, memory, puller, destination, pool, source.permits, connector, source.address,
                source.server, source.service, source.data_server, metrics, transfer_metrics, source.terminal,
            )  # fmt: skip
        finally:
            await puller.close()
    threads.close()
