"""Landings of blocks that the source lays out differently, over real transports: what comes in is what was computed,
nothing unverified reaches the pool, and staging is given back whatever happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from baton.clock import MonotonicClock
from baton.errors import LayoutMismatch, PeerLost, RequestCancelled, TransferRefused, VerifyFailed
from baton.ids import AttemptId, BlockIndex, BlockRef, Generation, WorkerId
from baton.layout import KVLayout
from baton.metrics import Metrics, TransferMetrics
from kvtransfer import staging
from kvtransfer.checksum import ChecksumKind
from kvtransfer.convert import Array
from kvtransfer.destination import Puller
from kvtransfer.landing import Landing
from kvtransfer.lifetimes import DestinationState, SourceState
from kvtransfer.memory import HostMemory
from kvtransfer.relayout import Relayout
from kvtransfer.reservation import Prompt
from kvtransfer.threads import Threads
from kvtransfer.ticket import Ticket
from kvtransfer.transports.chooser import Connector
from kvtransfer.transports.fake import FakeNetwork, Faults
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


DIFFERENT = [
    pytest.param(of(block_size=8), of(block_size=16), id="8 to 16"),
    pytest.param(of(block_size=16), of(block_size=32), id="16 to 32"),
    pytest.param(of(block_size=32), of(block_size=16), id="32 to 16"),
    pytest.param(of(block_size=12), of(block_size=16), id="12 to 16"),
    pytest.param(of(dtype="float32"), of(dtype="bfloat16"), id="float32 to bfloat16"),
    pytest.param(of(dtype="bfloat16"), of(dtype="float32"), id="bfloat16 to float32"),
    pytest.param(of(dtype="float16", block_size=8), of(dtype="bfloat16"), id="float16 of 8 to bfloat16 of 16"),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("source", "destination"), DIFFERENT)
async def test_blocks_are_re_laid_while_the_source_still_computes(
    transport: str, source: KVLayout, destination: KVLayout
) -> None:
    async with make_pair(transport, source, destination) as pair:
        landing = pair.land()
        for share in (0.3, 0.7):
            pair.seal(share)
            sealed = int(blocks_of(NUM_TOKENS, source) * share) * source.block_bytes
            await until(lambda sealed=sealed: pair.metric("baton_kv_relaid_bytes_total") == sealed)
        assert landing.state is DestinationState.LANDING
        pair.prefilled()
        landed = await landing.done()
        blocks = blocks_of(NUM_TOKENS, source)
        assert (landed.first_token, landed.blocks, landed.transport) == (4711, blocks, transport)
        assert landed.bytes == blocks * source.block_bytes
        assert landed.own_dtype == (source.dtype == destination.dtype)
        assert pair.holds()
        assert pair.metric("baton_kv_relaid_bytes_total") == landed.bytes
        await pair.idle()
        assert pair.sources[0].terminal == [ID]


async def test_equal_layouts_are_not_staged() -> None:
    async with make_pair("shm", MODEL, MODEL) as pair:
        landing = pair.land()
        pair.prefilled()
        assert (await landing.done()).own_dtype
        assert pair.holds()
        assert not pair.puller._arrivals._stagings._by_size
        assert pair.metric("baton_kv_relaid_bytes_total") == 0


@pytest.mark.parametrize(("first_missing", "moved"), [(1, 9), (2, 8), (5, 5), (8, 2), (9, 0)])
async def test_of_a_block_that_straddles_the_cached_prefix_only_what_is_missing_is_used(
    first_missing: int, moved: int
) -> None:
    async with make_pair("shm", of(block_size=14), of(block_size=15)) as pair:
        landing = pair.land(first_missing)
        pair.prefilled()
        assert (await landing.done()).blocks == moved
        assert pair.holds(first_missing)
        await pair.idle()


# --- shares of the heads


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("to_size", [1, 2, 4])
@pytest.mark.parametrize("from_size", [1, 2, 4])
async def test_any_degree_of_tensor_parallelism_lands_in_any_other(
    from_size: int, to_size: int, transport: str
) -> None:
    """Each rank of the destination pulls from each rank of the source that holds heads of its own."""
    source, destination = of(tp_size=from_size, block_size=8), of(tp_size=to_size)
    for layout in ranks(destination):
        async with make_pair(transport, source, layout) as pair:
            keep = [bool(set(rank.heads) & set(layout.heads)) for rank in pair.layouts]
            for name in ("sources", "layouts", "tickets"):
                setattr(pair, name, [item for item, kept in zip(getattr(pair, name), keep, strict=True) if kept])
            landing = pair.land()
            pair.prefilled()
            landed = await landing.done()
            assert landed.transport == transport
            assert landed.blocks == blocks_of(NUM_TOKENS, source) * len(pair.sources)
            assert pair.holds()
            await pair.idle()


async def test_one_source_gives_each_rank_its_heads_under_a_ticket_of_its_own() -> None:
    source = of(block_size=8)
    one, two = ranks(of(tp_size=2))
    async with make_pair("tcp", source, one) as pair, make_pair("tcp", source, two) as other:
        rank = AttemptId("req-1.1", 0)
        landings = [pair.land()]
        pair.offer(rank)
        other.tickets = pair.tickets
        landings.append(other.land(id=rank))
        pair.prefilled(ID)
        pair.prefilled(rank)
        for landing in landings:
            await landing.done()
        assert pair.holds()
        assert other.holds()
        assert await pair.sources[0].ledger.drain(10)


async def test_a_landing_of_shards_commits_only_when_all_of_them_have_landed() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land()
        pair.sources[0].ledger.prefilled(ID, 1)
        await until(lambda: pair.metric("baton_kv_relaid_bytes_total") == 9 * pair.layouts[0].block_bytes)
        await asyncio.sleep(0.05)
        assert landing.state is DestinationState.LANDING
        pair.sources[1].ledger.prefilled(ID, 1)
        await landing.done()
        assert pair.holds()
        await pair.idle()


async def test_the_lease_of_a_shard_that_is_done_is_kept_while_another_computes() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL, lease_seconds=0.15) as pair:
        reapers = [asyncio.create_task(source.ledger.run_reaper()) for source in pair.sources]
        landing = pair.land()
        pair.sources[0].ledger.prefilled(ID, 1)
        await asyncio.sleep(0.6)  # four leases
        assert [source.ledger.counts() for source in pair.sources] == [{SourceState.CLAIMED: 1}] * 2
        pair.sources[1].ledger.prefilled(ID, 1)
        await landing.done()
        for reaper in reapers:
            reaper.cancel()


async def test_a_shard_that_is_lost_ends_the_landing_and_frees_the_other() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land()
        pair.seal()
        await until(lambda: pair.metric("baton_kv_relaid_bytes_total") > 0)
        await pair.sources[1].server.stop(None)
        with pytest.raises(PeerLost, match="prefill-1 at 127"):
            await landing.done()
        await landing.drained()
        assert landing.state is DestinationState.FREE
        assert await pair.sources[0].ledger.drain(10)


async def test_shards_that_drew_different_tokens_are_not_committed() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land()
        for number, source in enumerate(pair.sources):
            source.ledger.prefilled(ID, number)
        with pytest.raises(VerifyFailed, match=r"different first tokens: 0, 1"):
            await landing.done()
        await pair.idle()


async def test_heads_that_no_ticket_offers_are_named_before_anything_is_claimed() -> None:
    async with make_pair("shm", of(tp_size=2), MODEL) as pair:
        landing = pair.land(shards=[])
        with pytest.raises(LayoutMismatch, match=r"decode-0 can't use the blocks of prefill-0 at 127.*KV head 2"):
            await landing.done()
        assert pair.sources[0].ledger.counts() == {SourceState.OFFERED: 1}


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_layers": 3}, "the number of layers is 2 at the source, 3 at the destination"),
        ({"num_kv_heads": 8}, "the number of KV heads is 4 at the source, 8 at the destination"),
        ({"head_dim": 4}, "the width of a head is 3 at the source, 4 at the destination"),
        ({"model_fingerprint": b"n" * 16}, "the model's fingerprint is 6d6d6d6d6d6d6d6d at the source, 6e6e"),
    ],
)
async def test_what_cannot_be_matched_is_refused_by_name_before_anything_is_claimed(
    changes: dict[str, Any], said: str
) -> None:
    async with make_pair("shm", MODEL, of(**changes)) as pair:
        with pytest.raises(LayoutMismatch, match=said):
            await pair.land().done()
        assert pair.sources[0].ledger.counts() == {SourceState.OFFERED: 1}


@pytest.mark.parametrize(
    "prompt",
    [
        replace(PROMPT, salt=b"another tenant"),
        replace(PROMPT, token_ids=(*PROMPT.token_ids[:-1], 999)),
        replace(PROMPT, token_ids=PROMPT.token_ids[:-8]),
    ],
)
async def test_blocks_of_another_prompt_or_tenant_are_not_pulled(prompt: Prompt) -> None:
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        with pytest.raises(VerifyFailed, match=r"is offered as|the prompt has 16"):
            await pair.land(prompt=prompt).done()
        assert pair.sources[0].ledger.counts() == {SourceState.OFFERED: 1}


async def test_blocks_of_another_size_need_the_prompt_to_be_told_by() -> None:
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        with pytest.raises(LayoutMismatch, match="have 8 tokens, these 16, and the prompt"):
            await pair.land(prompt=None).done()


async def test_blocks_too_large_to_stage_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STAGING_BYTES", 1000)
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        with pytest.raises(TransferRefused, match=r"has 1536 bytes, and can't be re-laid: at most 1000 are staged"):
            await pair.land().done()


async def test_stagings_are_few_and_the_longest_unused_makes_room() -> None:
    memory = HostMemory.create(1, MODEL.block_bytes)
    threads = Threads.create()
    stagings = staging.Stagings(Connector(memory, threads))
    for block_size in range(1, 20):
        async with stagings.use(of(block_size=block_size)) as one:
            assert one.memory.block_bytes == of(block_size=block_size).block_bytes
            assert len(stagings._by_size) <= staging.MAX_STAGINGS
    async with AsyncExitStack() as stack:
        for block_size in range(1, 5):
            await stack.enter_async_context(stagings.use(of(block_size=block_size)))
        async with stagings.use(of(block_size=2)):
            pass
        with pytest.raises(TransferRefused, match="blocks of 4 other sizes are being re-laid"):
            await stack.enter_async_context(stagings.use(of(block_size=9)))
    async with stagings.use(of(block_size=9)):
        assert of(block_size=1).block_bytes not in stagings._by_size, "the longest unused"
    await stagings.close()
    threads.close()


# --- what goes wrong on the way


KINDS = pytest.mark.parametrize("kinds", list(product(ChecksumKind, repeat=2)))


@KINDS
async def test_a_damaged_block_is_pulled_again_and_never_reaches_the_pool(
    kinds: tuple[ChecksumKind, ChecksumKind],
) -> None:
    network = FakeNetwork(3, Faults(corrupt=0.1, duplicate=0.3))
    async with make_pair("fake", of(block_size=4), MODEL, network, kinds=kinds) as pair:
        landing = pair.land()
        pair.prefilled()
        await landing.done()
        assert pair.holds()
        assert pair.metric("baton_kv_verify_failures_total", reason="checksum") > 0
        await pair.idle()


@KINDS
async def test_what_stays_damaged_is_never_re_laid(kinds: tuple[ChecksumKind, ChecksumKind]) -> None:
    network = FakeNetwork(faults=Faults(corrupt=1.0))
    async with make_pair("fake", of(block_size=8), MODEL, network, kinds=kinds) as pair:
        landing = pair.land()
        pair.prefilled()
        with pytest.raises(VerifyFailed, match="another checksum than it was announced with"):
            await landing.done()
        assert bytes(pair.pool.blocks) == bytes(len(pair.pool.blocks)), "the pool was not written to"
        await pair.idle()


async def test_a_value_that_does_not_fit_fails_the_landing_by_name() -> None:
    async with make_pair("shm", MODEL, of(dtype="float16")) as pair:
        array(pair.sources[0].memory, 3, MODEL)[0, 0, 0, 0, 0] = 1e6
        landing = pair.land()
        pair.prefilled()
        with pytest.raises(VerifyFailed, match="block 3 holds float32 values that are infinite in float16"):
            await landing.done()
        assert landing.state is DestinationState.FREE
        await pair.idle()


async def test_a_write_in_flight_keeps_its_staging_but_not_the_pools_blocks() -> None:
    """It can't reach them: they may be used again at once."""
    let_it_land = asyncio.Event()
    late = 0

    async def sleep(seconds: float) -> None:
        nonlocal late
        if seconds:
            late += 1
            await let_it_land.wait()

    network = FakeNetwork(faults=Faults(delay=1.0, straggle=1.0), sleep=sleep)
    async with make_pair("fake", of(block_size=NUM_TOKENS), MODEL, network) as pair:
        landing = pair.land()
        pair.prefilled()
        await until(lambda: late == 1)
        landing.cancel()
        assert landing.state is DestinationState.FREE
        with pytest.raises(RequestCancelled):
            await landing.done()
        await until(lambda: late == 2)  # the fetch is over, its write is not
        [stage] = pair.puller._arrivals._stagings._by_size.values()
        assert not stage.idle
        let_it_land.set()
        await pair.idle()
        assert bytes(pair.pool.blocks) == bytes(len(pair.pool.blocks))


async def test_re_laying_in_progress_keeps_the_pools_blocks_quarantined(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    relay = Relayout.relay

    def slow(self: Relayout, staged: Mapping[int, memoryview]) -> None:
        begun.set()
        assert go_on.wait(10)
        relay(self, staged)

    monkeypatch.setattr(Relayout, "relay", slow)
    async with make_pair("shm", of(block_size=8), MODEL) as pair:
        landing = pair.land()
        pair.prefilled()
        await until(begun.is_set)
        landing.cancel()
        assert landing.in_flight
        with pytest.raises(RequestCancelled):
            await landing.done()
        [stage] = pair.puller._arrivals._stagings._by_size.values()
        await until(lambda: not stage.users)
        assert not stage.idle, "it is still read from"
        assert landing.in_flight
        go_on.set()
        await landing.drained()
        assert landing.state is DestinationState.FREE
        await pair.idle()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_storm_of_cancels_leaves_neither_blocks_nor_staging_behind(transport: str) -> None:
    async with make_pair(transport, of(block_size=8), MODEL, attempts=40) as pair:
        for attempt in range(1, 40):
            id = AttemptId("storm", attempt)
            pair.offer(id)
            landing = pair.land(id=id)
            pair.prefilled(id)
            for _ in range(attempt % 8):
                await asyncio.sleep(0.0005)
            landing.cancel()
            await landing.drained()
            for source in pair.sources:
                source.ledger.abort(id)
        pair.sources[0].ledger.abort(ID)
        await pair.idle()


async def test_landings_wait_for_staging_one_behind_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    source = of(block_size=8)
    monkeypatch.setattr(staging, "STAGING_BYTES", 20 * source.block_bytes)  # a landing takes 17
    async with make_pair("tcp", source, MODEL, attempts=6) as pair:
        landings = []
        for attempt in range(6):
            id = AttemptId("req-1", attempt)
            if attempt:
                pair.offer(id)
            landings.append((pair.land(id=id), pair.reserved))
            pair.prefilled(id)
        for landing, reserved in landings:
            await landing.done()
            pair.reserved = reserved
            assert pair.holds()
        await pair.idle()


async def test_a_puller_is_told_once_what_is_re_laid(caplog: pytest.LogCaptureFixture) -> None:
    async with make_pair("shm", of(block_size=8), of(dtype="bfloat16"), attempts=2) as pair:
        for attempt in range(2):
            id = AttemptId("req-1", attempt)
            if attempt:
                pair.offer(id)
            landing = pair.land(id=id)
            pair.prefilled(id)
            await landing.done()
    said = [record.message for record in caplog.records if "re-laid" in record.message]
    assert len(said) == 1
    assert "re-laid on their way in: block size 8 to 16, dtype float32 to bfloat16; values are rounded" in said[0]
