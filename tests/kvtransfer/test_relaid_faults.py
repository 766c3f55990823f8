"""What goes wrong while blocks are re-laid: nothing unverified reaches the pool, and staging is given back whatever
happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from itertools import product

import pytest

from baton.errors import RequestCancelled, VerifyFailed
from baton.ids import AttemptId
from kvtransfer import staging
from kvtransfer.checksum import ChecksumKind
from kvtransfer.lifetimes import DestinationState
from kvtransfer.relayout import Relayout
from kvtransfer.transports.fake import FakeNetwork, Faults
from tests.kvtransfer.relaid_rig import ID, NUM_TOKENS, TRANSPORTS, make_pair, of
from tests.kvtransfer.rig import until
from tests.kvtransfer.test_relayout import MODEL, array

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
