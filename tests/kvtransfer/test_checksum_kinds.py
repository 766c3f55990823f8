"""Blocks are sealed with the checksum that their source's pool takes fast, and compared by it wherever they land."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from baton.errors import RequestCancelled, VerifyFailed
from kvtransfer.checksum import ChecksumKind, xxh3_checksum
from kvtransfer.lifetimes import DestinationState
from kvtransfer.nh import nh_checksum
from kvtransfer.transports.fake import FakeNetwork, Faults
from tests.kvtransfer.rig import Rig, fill, holds, make_rig, pattern, until
from tests.kvtransfer.staged import StagedMemory

HOST, DEVICE = ChecksumKind.XXH3, ChecksumKind.NH
KINDS = [(HOST, HOST), (DEVICE, DEVICE), (HOST, DEVICE), (DEVICE, HOST)]
WAYS = [(transport, kinds) for transport in ("tcp", "fake") for kinds in KINDS]
WAYS += [("shm", (HOST, HOST)), ("shm", (HOST, DEVICE)), ("cuda_ipc", (DEVICE, DEVICE))]


def named(given: object) -> str:
    return "-".join(kind.value for kind in given) if isinstance(given, tuple) else str(given)


every_way = pytest.mark.parametrize(("transport", "kinds"), WAYS, ids=named)
every_pair = pytest.mark.parametrize("kinds", KINDS, ids=named)


async def idle(rig: Rig) -> None:
    await until(lambda: not rig.puller.counts())
    assert await rig.ledger.drain(10)


@every_way
async def test_blocks_land_whichever_kinds_the_two_sides_have(
    transport: str, kinds: tuple[ChecksumKind, ChecksumKind]
) -> None:
    async with make_rig(transport, kinds=kinds) as rig:
        id, blocks, ticket = rig.offer(12)
        assert ticket.checksum_kind is kinds[0]
        fill(rig.source, blocks)
        reserved = rig.reserve(12)
        rig.ledger.prefilled(id, 1)
        landed = await rig.puller.pull(ticket, id, reserved, 2)
        assert (landed.blocks, landed.transport) == (10, transport)
        assert holds(rig.destination, reserved[2:], blocks[2:])
        assert rig.metric("baton_kv_verify_failures_total", reason="checksum") == 0
        await idle(rig)


@every_pair
async def test_a_damaged_block_is_pulled_again(kinds: tuple[ChecksumKind, ChecksumKind]) -> None:
    network = FakeNetwork(3, Faults(corrupt=0.1, duplicate=0.3))
    async with make_rig("fake", network=network, kinds=kinds) as rig:
        id, blocks, ticket = rig.offer(40)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 1)
        reserved = rig.reserve(40)
        await rig.puller.pull(ticket, id, reserved, 0)
        assert holds(rig.destination, reserved, blocks)
        assert rig.metric("baton_kv_verify_failures_total", reason="checksum") > 0
        await idle(rig)


@every_way
async def test_what_is_not_what_was_sealed_is_never_committed(
    transport: str, kinds: tuple[ChecksumKind, ChecksumKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with make_rig(transport, kinds=kinds) as rig:
        id, blocks, ticket = rig.offer(4)
        fill(rig.source, blocks)
        sum_them = rig.ledger._memory.checksums

        def sum_and_damage(indices: Sequence[int]) -> list[int]:
            sums = sum_them(indices)
            for index in indices:
                rig.source.write(index, memoryview(pattern(index, 77)))
            return sums

        monkeypatch.setattr(rig.ledger._memory, "checksums", sum_and_damage)
        rig.ledger.prefilled(id, 1)
        with pytest.raises(VerifyFailed, match=f"by {transport} has another checksum .* had when pulled again"):
            await rig.puller.pull(ticket, id, rig.reserve(4), 0)
        assert rig.metric("baton_kv_verify_failures_total", reason="checksum") == 8
        assert rig.metric("baton_kv_transfers_ended_total", state="committed") == 0
        await idle(rig)


async def test_a_ticket_that_names_the_wrong_kind_leads_to_no_block() -> None:
    """Whatever it says, nothing is committed that was not compared."""
    for says, kinds in ((HOST, (DEVICE, HOST)), (DEVICE, (HOST, DEVICE))):
        async with make_rig("tcp", kinds=kinds) as rig:
            id, blocks, ticket = rig.offer(4)
            fill(rig.source, blocks)
            rig.ledger.prefilled(id, 1)
            with pytest.raises(VerifyFailed, match="another checksum than it was announced with"):
                await rig.puller.pull(replace(ticket, checksum_kind=says), id, rig.reserve(4), 0)
            await idle(rig)


async def test_a_landing_that_ends_while_the_host_sums_waits_for_it() -> None:
    async with make_rig("tcp", kinds=(HOST, DEVICE)) as rig:
        assert isinstance(rig.pool, StagedMemory)
        summing, go_on = threading.Event(), threading.Event()

        def stand_still(index: int) -> None:
            summing.set()
            assert go_on.wait(10)

        rig.pool.on_read = stand_still
        id, blocks, ticket = rig.offer(4)
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 1)
        landing = rig.puller.land(ticket, id, rig.reserve(4), 0)
        await asyncio.to_thread(summing.wait, 10)
        landing.cancel()
        with pytest.raises(RequestCancelled):
            await landing.done()
        assert rig.puller.counts() == {DestinationState.QUARANTINED: 1}
        go_on.set()
        await landing.drained()
        assert landing.state is DestinationState.FREE
        await idle(rig)


@pytest.mark.parametrize(("kind", "checksum"), [(HOST, xxh3_checksum), (DEVICE, nh_checksum)])
def test_a_block_has_one_checksum_of_a_kind_in_whatever_it_lies(
    kind: ChecksumKind, checksum: Callable[[bytes], int]
) -> None:
    data = pattern(3, 4)
    for same in (data, memoryview(bytearray(data)), memoryview(np.frombuffer(data, np.uint8))):
        assert kind.of(same) == checksum(data)
