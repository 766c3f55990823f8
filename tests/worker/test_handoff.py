"""A prefill worker's side of the handoff: its blocks die when the ledger says so, and not before."""

from __future__ import annotations

import asyncio

import pytest

from baton.ids import WorkerId
from baton.v1 import worker_pb2
from kvtransfer.source import Claimant, ClaimRequest
from kvtransfer.ticket import Ticket
from prefill_worker.handoff import Handoff
from tests.engine.scripted_runner import next_token
from tests.worker.rig import LEASE, Rig, make_rig, proto_id

PROMPT = [n % 50 for n in range(3, 25)]
PREFILL = worker_pb2.TASK_PREFILL


@pytest.fixture
async def rig() -> Rig:
    return make_rig(Handoff)


def claim(rig: Rig) -> Claimant:
    ticket = Ticket.from_proto(rig.events("ticket")[0].ticket)
    return rig.ledger.claim(
        ClaimRequest(ticket.transfer_id, ticket.incarnation, ticket.id, ticket.layout, 0, WorkerId("d"))
    )


async def test_the_answer_begins_with_the_ticket_and_ends_with_one_token(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(3)
    kinds = [event.WhichOneof("event") for event in rig.told]
    assert kinds == ["ticket", "tokens", "ended"]
    assert rig.tokens() == [next_token(PROMPT)]
    assert rig.end() == worker_pb2.END_REASON_PREFILLED
    assert rig.pool.counts().offered == 6
    assert rig.core.open_attempts, "its blocks are still offered"


async def test_released_blocks_go_back_to_the_pool(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(1)
    claimant = claim(rig)
    await rig.turn(2)
    assert await rig.ledger.announcement(claimant) is not None
    rig.ledger.release(claimant)
    assert rig.load.available_blocks == 26
    await rig.settle()
    rig.assert_idle()
    assert rig.pool.counts().cached == 5, "full blocks stay to be hit"
    assert rig.load.available_blocks == 32, "the router hears of it although nothing else happened"


async def test_an_answer_of_one_token_stays_to_be_pulled(rig: Rig) -> None:
    """Else its puller is refused, and the router, should it hear of that before the token, tries again in vain."""
    rig.submit(PREFILL, PROMPT, count=1)
    await rig.turn(1)
    claimant = claim(rig)
    await rig.turn(2)
    assert rig.end() == worker_pb2.END_REASON_LENGTH
    assert await rig.ledger.announcement(claimant) is not None
    rig.ledger.release(claimant)
    await rig.settle()
    rig.assert_idle()


async def test_nobody_comes_and_the_lease_frees_the_blocks(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(3)
    rig.clock.advance(LEASE)
    rig.ledger.reap()
    await rig.settle()
    rig.assert_idle()


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("claimed", [False, True])
async def test_a_cancel_at_any_moment_ends_it_once_and_frees_all(rig: Rig, turns: int, claimed: bool) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(turns)
    if claimed and rig.events("ticket"):
        claim(rig)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    await rig.settle()
    reason = worker_pb2.END_REASON_PREFILLED if turns >= 2 else worker_pb2.END_REASON_CANCELLED
    assert rig.end() == reason
    rig.assert_idle()


async def test_a_cancel_frees_an_answer_of_one_token(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT, count=1)
    await rig.turn(3)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    await rig.settle()
    rig.assert_idle()


@pytest.mark.parametrize("steps", [0, 1, 2])
async def test_a_cancel_that_crosses_the_engines_news_frees_all(rig: Rig, steps: int) -> None:
    rig.submit(PREFILL, PROMPT)
    news = rig.compute_unheard(steps)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    news()
    await rig.settle()
    rig.assert_idle()


async def test_a_broken_session_gives_its_offers_up(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(3)
    rig.core.close_session(rig.session)
    await rig.settle()
    rig.assert_idle()


async def test_drain_waits_for_blocks_that_are_still_to_be_pulled(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(3)
    draining = asyncio.create_task(rig.core.drain(30))
    await asyncio.sleep(0.01)
    assert not draining.done()
    rig.ledger.release(claim(rig))
    await rig.settle()
    await draining
    rig.assert_idle()


async def test_a_prefill_worker_takes_no_ticket(rig: Rig) -> None:
    rig.submit(PREFILL, PROMPT)
    await rig.turn(1)
    ticket = rig.events("ticket")[0].ticket
    rig.say(handoff=worker_pb2.Handoff(id=proto_id(), ticket=ticket))
    await rig.settle()
    rig.assert_idle()
