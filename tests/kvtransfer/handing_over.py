"""A landing that is started, claimed, and over."""

from __future__ import annotations

from baton.ids import AttemptId
from kvtransfer.landing import Landing
from kvtransfer.lifetimes import DestinationState
from tests.kvtransfer.rig import Rig, fill, until

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
