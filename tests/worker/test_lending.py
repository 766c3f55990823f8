"""Lending cached blocks, in workers of both roles: until they are released, and to nobody who has gone."""

from __future__ import annotations

import asyncio

import pytest

from baton.ids import AttemptId, WorkerId
from kvtransfer.lend import LendRequest
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.source import ClaimRequest
from kvtransfer.ticket import Ticket
from tests.worker.rig import BLOCK, LEASE, Rig
from tests.worker.sharing import NAMES, cached, let_go
from worker import lending
from worker.lending import MAX_LENT


def ask(rig: Rig, names: list[bytes], peer: int = 1, **changes: object) -> asyncio.Task[Ticket]:
    request = {
        "incarnation": 7,
        "id": AttemptId("peer", peer),
        "layout_fingerprint": rig.ledger.layout.fingerprint,
        "worker_id": WorkerId("other"),
        "hashes": tuple(names),
    } | changes
    return asyncio.create_task(rig.lending.lend(LendRequest(**request)))  # type: ignore[arg-type]


async def lent(rig: Rig) -> Ticket:
    await cached(rig)
    asking = ask(rig, NAMES)
    await asyncio.sleep(0)
    await rig.turn()
    return await asking


async def test_cached_blocks_are_lent_until_they_are_released(rig: Rig) -> None:
    ticket = await lent(rig)
    assert [block.hash for block in ticket.blocks] == NAMES
    assert ticket.num_tokens == 5 * BLOCK
    assert rig.pool.counts().offered == 5
    claimant = rig.ledger.claim(ClaimRequest(ticket.transfer_id, 7, ticket.id, ticket.layout, 0, WorkerId("other")))
    sealed = await rig.ledger.announcement(claimant)
    assert isinstance(sealed, list)
    assert len(sealed) == 5
    rig.ledger.release(claimant)
    await rig.settle()
    rig.assert_idle()


async def test_a_lease_ends_what_nobody_comes_for(rig: Rig) -> None:
    await lent(rig)
    rig.clock.advance(LEASE)
    rig.ledger.reap()
    await rig.settle()
    rig.assert_idle()


async def test_a_repeat_gets_the_same_ticket(rig: Rig) -> None:
    ticket = await lent(rig)
    assert await ask(rig, NAMES) == ticket
    assert rig.pool.counts().offered == 5
    await let_go(rig)
    rig.assert_idle()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"incarnation": 8}, RefusalReason.STALE_INCARNATION),
        ({"layout_fingerprint": bytes(16)}, RefusalReason.LAYOUT_MISMATCH),
        ({"hashes": (bytes(32),)}, RefusalReason.NOT_HELD),
    ],
)
async def test_what_is_not_here_or_is_meant_for_another_is_refused(
    rig: Rig, changes: dict[str, object], reason: RefusalReason
) -> None:
    await cached(rig)
    asking = ask(rig, NAMES, **changes)
    await asyncio.sleep(0)
    await rig.turn()
    with pytest.raises(Refusal) as refusal:
        await asking
    assert refusal.value.reason is reason
    rig.assert_idle()


async def test_a_lender_has_a_limit(rig: Rig) -> None:
    await cached(rig)
    asking = [ask(rig, NAMES, peer) for peer in range(MAX_LENT + 1)]
    await asyncio.sleep(0)
    await rig.turn()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert sum(isinstance(answer, Refusal) for answer in answers) == 1
    await let_go(rig)
    rig.assert_idle()


@pytest.mark.parametrize("heard", [True, False], ids=["heard before the offer", "heard behind it"])
async def test_for_one_who_has_gone_nothing_is_held(rig: Rig, heard: bool) -> None:
    await cached(rig)
    asking = ask(rig, NAMES)
    repeat = ask(rig, NAMES)
    await asyncio.sleep(0)
    asking.cancel()
    if heard:
        await asyncio.sleep(0)
    await rig.settle()
    await asyncio.gather(repeat, return_exceptions=True)
    assert rig.ledger.live() == ()
    rig.assert_idle()


async def test_an_engine_that_is_slow_to_answer_lends_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "ANSWER_SECONDS", 0.01)
    await cached(rig)
    with pytest.raises(Refusal):
        await ask(rig, NAMES)
    await rig.settle()
    rig.assert_idle()


async def test_a_drain_waits_for_what_is_lent_and_lends_no_more(rig: Rig) -> None:
    ticket = await lent(rig)
    draining = asyncio.create_task(rig.core.drain(30))
    await asyncio.sleep(0.01)
    assert not draining.done()
    with pytest.raises(Refusal):
        await ask(rig, NAMES, 2)
    rig.ledger.abort(ticket.id)
    await rig.settle()
    await draining
    rig.assert_idle()


async def test_a_drain_waits_for_what_is_being_lent(rig: Rig) -> None:
    await cached(rig)
    asking = ask(rig, NAMES)
    await asyncio.sleep(0)
    draining = asyncio.create_task(rig.core.drain(30))
    await asyncio.sleep(0.01)
    assert not draining.done(), "the engine has not said what it has"
    await rig.turn()
    ticket = await asking
    await asyncio.sleep(0.01)
    assert not draining.done()
    rig.ledger.abort(ticket.id)
    await rig.settle()
    await draining
    rig.assert_idle()
