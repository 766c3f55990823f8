"""Streams that are asked to move, whenever that is: they end with what they have, once, and no block is lost."""

from __future__ import annotations

import asyncio

import pytest

from baton.hashing import block_hashes, root_hash
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from kvtransfer.ticket import Ticket
from tests.engine.scripted_runner import continuation
from tests.worker.rig import BLOCK, FINGERPRINT, Rig, make_rig, proto_id
from tests.worker.sharing import LOCAL, MOMENTS, PROMPT, Moment, let_go, writing
from tests.worker.test_admission import landing as received


async def streaming(rig: Rig) -> None:
    rig.submit(LOCAL, PROMPT, count=20)
    await rig.turn(6)
    assert rig.tokens()


def move(rig: Rig) -> None:
    rig.say(move=worker_pb2.Move(id=proto_id()))


@pytest.fixture
async def decoder() -> Rig:
    return make_rig(Admission)


async def test_a_stream_that_moves_ends_with_a_ticket_for_what_it_has_computed(decoder: Rig) -> None:
    await streaming(decoder)
    move(decoder)
    move(decoder)  # a repeat
    await decoder.settle()
    assert decoder.end() == worker_pb2.END_REASON_MOVED
    ticket = Ticket.from_proto(decoder.events("ticket")[0].ticket)
    known = PROMPT + decoder.tokens()
    assert [block.hash for block in ticket.blocks] == block_hashes(root_hash(FINGERPRINT), known[:-1], BLOCK)
    assert decoder.core.open_attempts, "its blocks are still offered"
    draining = asyncio.create_task(decoder.core.drain(30))
    await asyncio.sleep(0.01)
    assert not draining.done(), "whoever goes on has not come yet"
    decoder.ledger.abort(ticket.id)
    await decoder.settle()
    await draining
    decoder.assert_idle()


async def test_the_one_who_takes_it_on_fetches_by_that_ticket_without_asking(decoder: Rig) -> None:
    await streaming(decoder)
    move(decoder)
    await decoder.settle()
    ticket = decoder.events("ticket")[0].ticket
    known = PROMPT + decoder.tokens()
    other = make_rig(Admission)
    other.submit(LOCAL, known, attempt=1, count=3, prefix=worker_pb2.PrefixSource(ticket=ticket))
    await other.turn()
    assert not other.puller.asked
    assert other.pool.counts().landing == len(ticket.blocks)
    other.puller.commit(known[: len(ticket.blocks) * BLOCK])
    await other.settle()
    assert other.tokens() == continuation(known, 3)
    assert other.runner.computed_tokens == len(known) - len(ticket.blocks) * BLOCK + 2
    other.assert_idle()


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_cancel_behind_a_move_leaves_nothing_offered(decoder: Rig, turns: int) -> None:
    await streaming(decoder)
    move(decoder)
    await decoder.turn(turns)
    decoder.say(cancel=worker_pb2.Cancel(id=proto_id()))
    await decoder.settle()
    assert decoder.end() == worker_pb2.END_REASON_MOVED
    decoder.assert_idle()


async def test_what_lands_is_committed_before_it_moves(decoder: Rig) -> None:
    await received(decoder)
    move(decoder)
    await decoder.turn()
    assert not decoder.events("ended")
    decoder.puller.commit(PROMPT)
    await decoder.settle()
    assert decoder.end() == worker_pb2.END_REASON_MOVED
    assert len(Ticket.from_proto(decoder.events("ticket")[0].ticket).blocks) == 5
    await let_go(decoder)
    decoder.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_request_whose_prefix_is_on_its_way_moves_with_nothing(decoder: Rig, moment: Moment) -> None:
    decoder.task = LOCAL  # type: ignore[attr-defined]
    await moment(decoder)
    move(decoder)
    await decoder.turn(3)
    decoder.puller.answered.set()
    if moment is writing:
        decoder.puller.landings[-1].gate.leave()
        await asyncio.sleep(0)
    await decoder.settle()
    assert decoder.end() == worker_pb2.END_REASON_MOVED
    assert not decoder.events("ticket")
    decoder.assert_idle()


async def test_a_move_of_what_is_over_is_counted_and_does_nothing(rig: Rig) -> None:
    move(rig)
    await rig.settle()
    assert not rig.told
    rig.assert_idle()
