"""The whole handoff in one process, over a real gRPC server, by each transport."""

from __future__ import annotations

from functools import partial

import pytest

from kvtransfer.lifetimes import DestinationState
from tests.kvtransfer.rig import fill, holds, make_rig, until

TRANSPORTS = ("shm", "tcp", "fake")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_blocks_land_while_the_source_still_computes(transport: str) -> None:
    async with make_rig(transport) as rig:
        id, blocks, ticket = rig.offer(12)
        reserved = rig.reserve(12)
        landing = rig.puller.land(ticket, id, reserved, 0)
        assert landing.state is DestinationState.RESERVED
        for end in (5, 9):
            fill(rig.source, blocks[:end])
            rig.ledger.seal(id, end)
            await until(partial(holds, rig.destination, reserved[:end], blocks[:end]))
        assert landing.state is DestinationState.LANDING
        fill(rig.source, blocks)
        rig.ledger.prefilled(id, 4711)
        landed = await landing.done()
        assert (landed.first_token, landed.blocks, landed.bytes) == (4711, 12, 12 * 4096)
        assert landed.transport == transport
        assert landing.state is DestinationState.COMMITTED
        assert not landing.in_flight
        assert holds(rig.destination, reserved, blocks)
        assert await rig.ledger.drain(5)
        assert rig.terminal == [id]
        assert rig.metric("baton_kv_transfer_bytes_total", transport=transport) == 12 * 4096
        assert rig.metric("baton_kv_transfers_ended_total", state="released") == 1
        assert rig.metric("baton_kv_transfers_ended_total", state="committed") == 1
