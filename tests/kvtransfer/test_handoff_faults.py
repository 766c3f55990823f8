"""Every way in which a handoff fails or is cancelled, over a real gRPC server: both sides hold nothing behind it."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from baton.clock import ManualClock
from baton.errors import (
    HandoffFailed,
    LeaseExpired,
    PeerLost,
    RequestCancelled,
    TransferRefused,
    VerifyFailed,
)
from baton.ids import AttemptId, Generation
from kvtransfer.lifetimes import DestinationState, SourceState
from kvtransfer.memory import HostMemory
from kvtransfer.transports.fake import FakeNetwork, Faults
from tests.kvtransfer.handing_over import TRANSPORTS, claimed, idle, start
from tests.kvtransfer.rig import fill, holds, make_rig, take, until


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
