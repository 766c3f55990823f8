"""The whole handoff in one process, over a real gRPC server: how it goes well, and every way in which it fails."""

from __future__ import annotations

import asyncio
import socket
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
    PeerLost,
    RequestCancelled,
    TransferRefused,
    VerifyFailed,
)
from baton.ids import AttemptId, BlockHash, BlockRef, Generation, Incarnation
from kvtransfer.landing import Landing
from kvtransfer.lifetimes import DestinationState, SourceState
from kvtransfer.memory import HostMemory
from kvtransfer.transports.fake import FakeNetwork, Faults
from tests.kvtransfer.rig import LAYOUT, Rig, fill, holds, make_rig, take, until

TRANSPORTS = ("shm", "tcp", "fake")


def start(rig: Rig, count: int = 8, *, sealed: bool = True, first_missing: int = 0) -> tuple[AttemptId, Landing]:
    id, blocks, ticket = rig.offer(count)
    fill(rig.source, blocks)
    if sealed:
        rig.ledger.seal(id, count)
    return id, rig.puller.land(ticket, id, rig.reserve(count), first_missing)


async def claimed(rig: Rig) -> None:
    await until(lambda: rig.puller.counts() == {DestinationState.LANDING: 1})


async def idle(rig: Rig) -> None:
    """Both sides hold nothing: what must be true after every failure."""
    await until(lambda: not rig.puller.counts())
    assert await rig.ledger.drain(10)
    for state in ("offered", "claimed", "reserved", "landing", "verifying", "quarantined"):
        assert rig.metric("baton_kv_transfers", state=state) == 0


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


# --- what a puller refuses before it asks


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


# --- what the source refuses


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


# --- what goes wrong on the way


async def test_a_damaged_block_is_pulled_again() -> None:
    network = FakeNetwork(3, Faults(corrupt=0.1, duplicate=0.3))
    async with make_rig("fake", network=network) as rig:
        id, blocks, ticket = rig.offer(40)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 1)
        reserved = rig.reserve(40)
        assert (await rig.puller.pull(ticket, id, reserved, 0)).blocks == 40
        assert holds(rig.destination, reserved, blocks)
        assert rig.metric("baton_kv_verify_failures_total", reason="checksum") > 0


async def test_a_block_that_stays_damaged_is_never_committed() -> None:
    async with make_rig("fake", network=FakeNetwork(faults=Faults(corrupt=1.0))) as rig:
        id, landing = start(rig, 2)
        rig.ledger.prefilled(id, 1)
        with pytest.raises(
            VerifyFailed, match="another checksum than it was announced with, and had when pulled again"
        ):
            await landing.done()
        assert landing.state is DestinationState.FREE
        assert rig.metric("baton_kv_verify_failures_total", reason="checksum") == 4
        assert rig.metric("baton_kv_transfers_ended_total", state="committed") == 0
        await idle(rig)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_block_that_changed_after_it_was_sealed_is_never_committed(transport: str) -> None:
    async with make_rig(transport) as rig:
        id, blocks, ticket = rig.offer(4)
        fill(rig.source, blocks)
        landing = rig.puller.land(ticket, id, rig.reserve(4), 0)
        rig.source.generations[blocks[3].index] += 1  # reused under the source's feet
        rig.ledger.prefilled(id, 1)
        with pytest.raises(VerifyFailed, match="no longer of generation 1"):
            await landing.done()
        await idle(rig)
        assert rig.metric("baton_kv_verify_failures_total", reason="generation") == 1


async def test_a_source_that_dies_while_its_last_blocks_move_is_lost() -> None:
    network = FakeNetwork(faults=Faults(delay=0.01))
    async with make_rig("fake", network=network) as rig:
        _, landing = start(rig, 40)
        await claimed(rig)
        source = network.find("source")
        assert source is not None
        source.die()
        with pytest.raises(PeerLost, match="fake source source"):
            await landing.done()
        await idle(rig)


async def test_a_source_whose_stream_breaks_is_lost_at_once() -> None:
    async with make_rig(lease_seconds=60) as rig:
        _, landing = start(rig, sealed=False)  # else a fetch may be under way, and the blocks quarantined until it ends
        await claimed(rig)
        await rig.server.stop(None)
        async with asyncio.timeout(5):
            with pytest.raises(PeerLost, match="prefill-0 at 127"):
                await landing.done()
        assert landing.state is DestinationState.FREE


async def test_a_source_that_cannot_read_its_own_blocks_ends_the_pull(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(memory: HostMemory, indices: list[int]) -> list[int]:
        raise RuntimeError("device lost")

    monkeypatch.setattr(HostMemory, "checksums", fail)
    async with make_rig(lease_seconds=60) as rig:
        _, landing = start(rig)
        with pytest.raises(PeerLost, match="ended the stream before the pull was complete"):
            await landing.done()
        assert "device lost" in caplog.text


async def test_nobody_at_the_tickets_address_is_a_lost_peer() -> None:
    async with make_rig() as rig:
        id, _, ticket = rig.offer(4)
        with pytest.raises(PeerLost, match="can't be reached"):
            await rig.puller.pull(replace(ticket, address="127.0.0.1:1"), id, rig.reserve(4), 0)


async def test_a_source_that_falls_silent_costs_one_lease_by_the_pullers_own_clock() -> None:
    """It accepts connections and answers nothing, as a stopped process does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with make_rig() as rig:
            id, _, ticket = rig.offer(4)
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            ticket = replace(ticket, address=address, lease_seconds=0.2)
            with pytest.raises(LeaseExpired, match=r"did not answer within the lease of 0\.2 s"):
                await rig.puller.pull(ticket, id, rig.reserve(4), 0)


async def test_blocks_that_landed_after_the_lease_ran_out_are_not_committed() -> None:
    """The renewals that would have told are still on their way: only the puller's own clock knows."""
    clock = ManualClock()
    async with make_rig(puller_clock=clock, lease_seconds=3600) as rig:
        id, landing = start(rig)
        await claimed(rig)
        await until(lambda: rig.metric("baton_kv_transfer_bytes_total", transport="shm") == 8 * 4096)
        clock.advance(3600)
        rig.ledger.prefilled(id, 1)
        with pytest.raises(LeaseExpired):
            await landing.done()
        assert landing.state is DestinationState.FREE


async def test_no_transport_in_common_says_what_both_can() -> None:
    async with make_rig() as rig:
        rig.connector.names = ("nixl",)
        _, landing = start(rig)
        with pytest.raises(TransferRefused, match=r"the source offers fake, shm, tcp, this worker can \('nixl',\)"):
            await landing.done()
        assert landing.state is DestinationState.FREE
        await idle(rig)


# --- cancelling


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_cancel_is_felt_at_once_and_reaches_the_source(transport: str) -> None:
    async with make_rig(transport, lease_seconds=60) as rig:
        id, landing = start(rig, 8, sealed=False)
        await claimed(rig)
        landing.cancel()
        assert landing.state is DestinationState.FREE
        with pytest.raises(RequestCancelled):
            await landing.done()
        await landing.drained()
        await idle(rig)
        assert rig.terminal == [id]
        landing.cancel()


async def test_a_cancel_before_the_claim_frees_without_quarantine() -> None:
    async with make_rig() as rig:
        _, landing = start(rig)
        landing.cancel()
        assert landing.state is DestinationState.FREE
        with pytest.raises(RequestCancelled):
            await landing.done()
        assert rig.ledger.counts() == {SourceState.OFFERED: 1}


async def test_a_cancel_after_the_commit_changes_nothing() -> None:
    async with make_rig() as rig:
        id, landing = start(rig)
        rig.ledger.prefilled(id, 1)
        await landing.done()
        landing.cancel()
        assert landing.state is DestinationState.COMMITTED
        await idle(rig)
        assert rig.metric("baton_kv_transfers_ended_total", state="released") == 1


async def test_a_write_in_flight_keeps_the_destination_quarantined_until_it_has_landed() -> None:
    let_it_land = asyncio.Event()
    late = 0

    async def sleep(seconds: float) -> None:
        nonlocal late
        if seconds:
            late += 1
            await let_it_land.wait()

    network = FakeNetwork(faults=Faults(delay=1.0, straggle=1.0), sleep=sleep)
    async with make_rig("fake", network=network) as rig:
        id, blocks, ticket = rig.offer(1)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 1)
        reserved = rig.reserve(1)
        landing = rig.puller.land(ticket, id, reserved, 0)
        await until(lambda: late == 1)
        landing.cancel()
        assert landing.in_flight
        with pytest.raises(RequestCancelled):
            await landing.done()
        await until(lambda: late == 2)  # the fetch is over, its write is not
        assert rig.puller.counts() == {DestinationState.QUARANTINED: 1}
        assert rig.metric("baton_kv_transfers", state="quarantined") == 1
        assert not holds(rig.destination, reserved, blocks)
        let_it_land.set()
        await landing.drained()
        assert holds(rig.destination, reserved, blocks)  # it did land, where nobody had been let in
        assert landing.state is DestinationState.FREE
        await idle(rig)


async def test_closing_the_puller_gives_up_what_is_under_way() -> None:
    async with make_rig(lease_seconds=60) as rig:
        landings = []
        for attempt in range(3):
            id = AttemptId("r", attempt)
            ticket = rig.ledger.offer(id, take(rig.source, [attempt]), 16)
            landings.append(rig.puller.land(ticket, id, take(rig.destination, [attempt]), 0))
        await until(lambda: rig.puller.counts() == {DestinationState.LANDING: 3})
        await rig.puller.close()
        for landing in landings:
            with pytest.raises(RequestCancelled, match="the worker stops"):
                await landing.done()
        await idle(rig)


async def test_a_storm_of_cancels_leaves_nothing_behind() -> None:
    async with make_rig("tcp", lease_seconds=60) as rig:
        landings = []
        for attempt in range(60):
            id = AttemptId("storm", attempt)
            blocks = take(rig.source, [attempt])
            fill(rig.source, blocks)
            landing = rig.puller.land(rig.ledger.offer(id, blocks, 16), id, take(rig.destination, [attempt]), 0)
            rig.ledger.prefilled(id, attempt)
            landings.append(landing)
        for number, landing in enumerate(landings):
            if number % 10:
                await asyncio.sleep(0)
                landing.cancel()
        outcomes = await asyncio.gather(*(landing.done() for landing in landings), return_exceptions=True)
        assert all(not isinstance(outcomes[i], BaseException) for i in range(0, 60, 10))
        assert all(isinstance(o, RequestCancelled) or not isinstance(o, BaseException) for o in outcomes)
        for id in rig.ledger.live():  # what was cancelled before its claim, the router cancels here too
            rig.ledger.abort(id)
        await idle(rig)
        assert sorted(rig.terminal) == sorted(landing.id for landing in landings)


async def test_a_generation_is_never_taken_for_an_earlier_one() -> None:
    """A ticket that outlived its blocks names a use of them that is over."""
    async with make_rig() as rig:
        id, blocks, ticket = rig.offer(2)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 1)
        older = tuple(replace(b, generation=Generation(b.generation - 1)) for b in ticket.blocks)
        with pytest.raises(VerifyFailed, match="no longer of generation 0"):
            await rig.puller.pull(replace(ticket, blocks=older), id, rig.reserve(2), 0)


async def test_an_offer_is_kept_for_a_puller_without_room_until_its_source_gives_it_up() -> None:
    async with make_rig("shm", lease_seconds=0.3) as rig:
        id, _, ticket = rig.offer(4)
        keeping = asyncio.create_task(rig.puller.keep(ticket))
        await asyncio.sleep(1.0)  # three leases
        assert rig.ledger.counts() == {SourceState.OFFERED: 1}
        rig.ledger.abort(id)
        with pytest.raises(HandoffFailed, match="gave the request up"):
            await keeping
        await idle(rig)
