"""Sources that lay a prompt's blocks out in their own way, and the puller of one destination, over real transports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from baton.clock import MonotonicClock
from baton.ids import AttemptId, BlockIndex, BlockRef, Generation, WorkerId
from baton.layout import KVLayout
from baton.metrics import Metrics, TransferMetrics
from kvtransfer.checksum import ChecksumKind
from kvtransfer.convert import Array
from kvtransfer.destination import Puller
from kvtransfer.landing import Landing
from kvtransfer.memory import HostMemory
from kvtransfer.reservation import Prompt
from kvtransfer.threads import Threads
from kvtransfer.ticket import Ticket
from kvtransfer.transports.chooser import Connector
from kvtransfer.transports.fake import FakeNetwork
from tests.kvtransfer.rig import PULLER_ID, Source, make_source, pool_of, until
from tests.kvtransfer.test_relayout import MODEL, array, as_dtype, blocks_of, kv_of, lay, ranks

TRANSPORTS = ("shm", "tcp", "fake")
ID = AttemptId("req-1", 0)
NUM_TOKENS = 131
PROMPT = Prompt(tuple(n * 7 % 1000 for n in range(NUM_TOKENS)), b"tenant")


def refs(memory: HostMemory, layout: KVLayout, indices: Sequence[int]) -> list[BlockRef]:
    found = []
    for index, name in zip(indices, PROMPT.names(layout), strict=True):
        memory.generations[index] += 1
        found.append(BlockRef(BlockIndex(index), Generation(memory.generations[index]), name))
    return found


@dataclass
class Pair:
    """Sources, one a rank, that offer a prompt's KV, and the puller of one destination."""

    sources: list[Source]
    layouts: list[KVLayout]
    puller: Puller
    layout: KVLayout
    pool: HostMemory
    kv: Array
    metrics: Metrics
    network: FakeNetwork
    offered: list[list[BlockRef]]
    tickets: list[Ticket] = field(default_factory=list)
    reserved: list[BlockRef] = field(default_factory=list)

    def offer(self, id: AttemptId = ID) -> None:
        """The same blocks, once more."""
        self.tickets = [
            source.ledger.offer(id, blocks, NUM_TOKENS)
            for source, blocks in zip(self.sources, self.offered, strict=True)
        ]

    def seal(self, share: float = 1.0, id: AttemptId = ID) -> None:
        for source, layout in zip(self.sources, self.layouts, strict=True):
            source.ledger.seal(id, int(blocks_of(NUM_TOKENS, layout) * share))

    def prefilled(self, id: AttemptId = ID, token: int = 4711) -> None:
        for source in self.sources:
            source.ledger.prefilled(id, token)

    def land(self, first_missing: int = 0, id: AttemptId = ID, **changes: Any) -> Landing:
        """Attempts have blocks of their own, behind each other."""
        count = blocks_of(NUM_TOKENS, self.layout)
        places = range(id.attempt * count, (id.attempt + 1) * count)
        self.reserved = refs(self.pool, self.layout, places[::-1])
        first, *others = self.tickets
        given = {"prompt": PROMPT, "shards": others} | changes
        return self.puller.land(first, id, self.reserved, first_missing, **given)

    def holds(self, first_missing: int = 0) -> bool:
        """Whether each missing block is as if it had been laid out here, and no other was touched."""
        wanted = lay(as_dtype(self.kv, self.layouts[0].dtype, self.layout.dtype), self.layout, len(self.reserved))
        for position, ref in enumerate(self.reserved):
            tokens = min(self.layout.block_size, NUM_TOKENS - position * self.layout.block_size)
            ours = array(self.pool, ref.index, self.layout)[..., :tokens, :]
            theirs = array(wanted, position, self.layout)[..., :tokens, :]
            if position < first_missing:
                theirs = np.zeros_like(theirs)
            if not (ours.view(np.uint8) == theirs.view(np.uint8)).all():
                return False
        return True

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def idle(self) -> None:
        """Both sides hold nothing, nor does staging."""
        await until(lambda: not self.puller.counts())
        for source in self.sources:
            assert await source.ledger.drain(10)
        stagings = self.puller._arrivals._stagings._by_size.values()
        await until(lambda: all(staging.idle for staging in stagings))


@asynccontextmanager
async def make_pair(
    transport: str,
    source: KVLayout,
    destination: KVLayout,
    network: FakeNetwork | None = None,
    *,
    attempts: int = 1,
    lease_seconds: float = 5.0,
    kinds: tuple[ChecksumKind, ChecksumKind] = (ChecksumKind.XXH3, ChecksumKind.XXH3),
) -> AsyncIterator[Pair]:
    """`kinds`: of the sources' checksums, and of the puller's."""
    metrics, threads, network = Metrics(), Threads.create(), network or FakeNetwork()
    transfers = TransferMetrics(metrics)
    kv = kv_of(NUM_TOKENS, source.dtype)
    async with AsyncExitStack() as stack:
        stack.callback(threads.close)
        sources = [
            await stack.enter_async_context(
                make_source(
                    transfers, threads, network, memory=lay(kv, layout, blocks_of(NUM_TOKENS, layout)),
                    layout=layout, lease_seconds=lease_seconds, kind=kinds[0],
                    worker_id=WorkerId(f"prefill-{layout.tp_rank}"), name=f"rank {layout.tp_rank}",
                )
            )
            for layout in ranks(source)
        ]  # fmt: skip
        pool = HostMemory.create(attempts * blocks_of(NUM_TOKENS, destination), destination.block_bytes)
        reaches = pool_of(pool, kinds[1])
        puller = Puller(
            memory=reaches, layout=destination, worker_id=PULLER_ID, threads=threads, clock=MonotonicClock(),
            connector=Connector(reaches, threads, setting=transport, network=network), metrics=transfers,
        )  # fmt: skip
        stack.push_async_callback(puller.close)
        offered = [
            refs(one.memory, layout, range(blocks_of(NUM_TOKENS, layout)))
            for one, layout in zip(sources, ranks(source), strict=True)
        ]
        pair = Pair(sources, ranks(source), puller, destination, pool, kv, metrics, network, offered)
        pair.offer()
        yield pair


def of(**changes: Any) -> KVLayout:
    return replace(MODEL, **changes)
