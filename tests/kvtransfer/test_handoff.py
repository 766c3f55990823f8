"""The whole handoff in one process, over a real gRPC server: how it goes well, and what either side refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

from baton.clock import ManualClock
from baton.errors import (
    HandoffFailed,
    InternalError,
    LayoutMismatch,
    LeaseExpired,
    TransferRefused,
    VerifyFailed,
)
from baton.ids import AttemptId, BlockHash, BlockRef, Incarnation
from kvtransfer.lifetimes import DestinationState, SourceState
from tests.kvtransfer.handing_over import TRANSPORTS, claimed, idle, start
from tests.kvtransfer.rig import LAYOUT, fill, holds, make_rig, take, until


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_land_while_the_source_still_computes(transport: str) -> None:
    async with make_rig(transport) as rig:
        id, blocks, ticket = rig.offer(12)
        reserved = rig.reserve(12)
        landing = rig.puller.land(ticket, id, reserved, 0)
        assert rig.puller.counts() == {DestinationState.RESERVED: 1}
        for end in (5, 9):
            fill(rig.source, blocks[:end])
            rig.ledger.seal(id, end)
            await until(partial(holds, rig.destination, reserved[:end], blocks[:end]))
        assert rig.puller.counts() == {DestinationState.LANDING: 1}
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 4711)
        landed = await landing.done()
        assert (landed.first_token, landed.blocks, landed.bytes) == (4711, 12, 12 * 4096)
        assert landed.transport == transport
        assert landing.state is DestinationState.COMMITTED
        assert not landing.in_flight
        await landing.drained()
        assert holds(rig.destination, reserved, blocks)
        await idle(rig)
        assert rig.terminal == [id]
        assert rig.metric("baton_kv_transfer_bytes_total", transport=transport) == 12 * 4096
        assert rig.metric("baton_kv_transfer_seconds_count", transport=transport) == 1
        assert rig.metric("baton_kv_transfers_ended_total", state="released") == 1
        assert rig.metric("baton_kv_transfers_ended_total", state="committed") == 1


async def test_what_is_told_of_a_verified_set_may_still_change_it() -> None:
    told: list[tuple[AttemptId, list[BlockRef], int, dict[DestinationState, int]]] = []

    def damage(id: AttemptId, blocks: Sequence[BlockRef], first_missing: int) -> None:
        told.append((id, list(blocks), first_missing, rig.puller.counts()))
        rig.destination.write(blocks[5].index, memoryview(bytes(LAYOUT.block_bytes)))

    async with make_rig(on_verified=damage) as rig:
        id, blocks, ticket = rig.offer(8)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 1)
        reserved = rig.reserve(8)
        landing = rig.puller.land(ticket, id, reserved, 3)
        await landing.done()
        assert told == [(id, reserved, 3, {DestinationState.VERIFYING: 1})]
        assert bytes(rig.destination.read(reserved[5].index)) == bytes(LAYOUT.block_bytes)
        assert holds(rig.destination, reserved[6:], blocks[6:])
        await idle(rig)


async def test_a_set_is_given_up_where_telling_of_it_fails() -> None:
    def fail(id: AttemptId, blocks: Sequence[BlockRef], first_missing: int) -> None:
        raise ValueError("no donor")

    async with make_rig(on_verified=fail) as rig:
        id, landing = start(rig)
        rig.ledger.prefilled(id, 1)
        with pytest.raises(InternalError, match="no donor"):
            await landing.done()
        assert landing.state is DestinationState.FREE
        await idle(rig)


async def test_auto_takes_shared_memory_on_one_host_and_tcp_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async with make_rig("auto") as rig:
        _, landing = start(rig)
        rig.ledger.prefilled(landing.id, 1)
        assert (await landing.done()).transport == "shm"
    async with make_rig("auto") as rig:
        monkeypatch.setattr("kvtransfer.transports.shm._boot_id", lambda: bytes(16))
        _, landing = start(rig)
        rig.ledger.prefilled(landing.id, 1)
        assert (await landing.done()).transport == "tcp"


async def test_what_the_puller_has_is_not_moved() -> None:
    async with make_rig() as rig:
        id, landing = start(rig, 8, first_missing=6)
        rig.ledger.prefilled(id, 5)
        assert (await landing.done()).blocks == 2
        assert bytes(rig.destination.read(7)) == bytes(4096)  # position 0


async def test_a_puller_that_has_all_blocks_only_fetches_the_token() -> None:
    async with make_rig() as rig:
        id, landing = start(rig, 8, first_missing=8)
        rig.ledger.prefilled(id, 5)
        landed = await landing.done()
        assert (landed.first_token, landed.blocks, landed.transport) == (5, 0, "")
        await idle(rig)


async def test_pulls_at_once_commit_each_its_own() -> None:
    async with make_rig("tcp") as rig:
        pulls = []
        for number in range(12):
            id, place = AttemptId("many", number), range(number * 5, number * 5 + 5)
            blocks, reserved = take(rig.source, place), take(rig.destination, place)
            fill(rig.source, blocks)
            landing = rig.puller.land(rig.ledger.offer(id, blocks, 80), id, reserved, 0)
            pulls.append((landing, blocks, reserved))
        for landing, _, _ in pulls:
            rig.ledger.prefilled(landing.id, landing.id.attempt)
        for landing, blocks, reserved in pulls:
            assert (await landing.done()).first_token == landing.id.attempt
            assert holds(rig.destination, reserved, blocks)
        await idle(rig)


async def test_a_lease_is_renewed_as_long_as_the_source_computes() -> None:
    async with make_rig(lease_seconds=0.15) as rig:
        reaper = asyncio.create_task(rig.ledger.run_reaper())
        id, landing = start(rig)
        await asyncio.sleep(0.6)  # four leases: the prompt is long
        assert rig.ledger.counts() == {SourceState.CLAIMED: 1}
        rig.ledger.prefilled(id, 3)
        assert (await landing.done()).first_token == 3
        reaper.cancel()


@pytest.mark.parametrize(
    ("error", "said", "changes"),
    [
        (
            LayoutMismatch,
            "the number of layers is 24 at the source, 2 at the destination",
            {"layout": replace(LAYOUT, num_layers=24)},
        ),
        (TransferRefused, "for req-9#0; the blocks are reserved for req-1#0", {"id": AttemptId("req-9", 0)}),
        (VerifyFailed, "names 3 blocks of 16 tokens for 64 tokens", {"blocks": 3}),
        (VerifyFailed, "names 3 blocks of 16 tokens; the prompt has 4", {"blocks": 3, "num_tokens": 48}),
        (VerifyFailed, "block 1 is offered as 6868686868686868; expected is", {"hash": 1}),
    ],
)
async def test_a_ticket_for_other_blocks_is_not_claimed(
    error: type[HandoffFailed], said: str, changes: dict[str, object]
) -> None:
    async with make_rig() as rig:
        id, _, ticket = rig.offer(4)
        if "blocks" in changes:
            changes |= {"blocks": ticket.blocks[:3]}
        if "hash" in changes:
            other = replace(ticket.blocks[1], hash=BlockHash(b"h" * 32))
            changes = {"blocks": (ticket.blocks[0], other, *ticket.blocks[2:])}
        landing = rig.puller.land(replace(ticket, **changes), id, rig.reserve(4), 0)  # type: ignore[arg-type]  # made above
        with pytest.raises(error) as caught:
            await landing.done()
        assert said in caught.value.message
        assert landing.state is DestinationState.FREE
        assert not landing.in_flight
        assert rig.ledger.counts() == {SourceState.OFFERED: 1}


async def test_a_reservation_that_was_given_away_is_not_written() -> None:
    async with make_rig() as rig:
        id, _, ticket = rig.offer(4)
        reserved = rig.reserve(4)
        rig.destination.generations[reserved[2].index] += 1
        with pytest.raises(VerifyFailed, match="given to another use"):
            await rig.puller.pull(ticket, id, reserved, 0)


async def test_a_restarted_source_refuses_the_ticket_of_its_former_life() -> None:
    async with make_rig(incarnation=Incarnation(78)) as rig:
        id, _, ticket = rig.offer(4)
        with pytest.raises(TransferRefused, match="of incarnation 77, this is 78 of prefill-0"):
            await rig.puller.pull(replace(ticket, incarnation=Incarnation(77)), id, rig.reserve(4), 0)
        assert rig.metric("baton_kv_refused_total", reason="stale_incarnation") == 1


async def test_an_offer_that_expired_is_refused_as_expired() -> None:
    clock = ManualClock()
    async with make_rig(clock=clock) as rig:
        id, _, ticket = rig.offer(4)
        clock.advance(6)
        with pytest.raises(LeaseExpired, match=r"prefill-0 at 127.*the lease of the block set ran out"):
            await rig.puller.pull(ticket, id, rig.reserve(4), 0)
        await idle(rig)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_abort_in_the_middle_of_a_pull_ends_it_and_frees_both_sides(transport: str) -> None:
    async with make_rig(transport) as rig:
        id, landing = start(rig, 8)
        await claimed(rig)
        rig.ledger.abort(id)
        with pytest.raises(TransferRefused, match=r"gave the request up|give block|no such claimed"):
            await landing.done()
        await landing.drained()
        assert landing.state is DestinationState.FREE
        await idle(rig)
        assert rig.terminal == [id]
