"""Fetching, lending and moving, in workers of both roles: whatever happens when, one terminal reply, no block lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from baton.errors import PeerLost, RequestCancelled
from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId, WorkerId
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from kvtransfer.landing import Landing
from kvtransfer.lend import LendRequest
from kvtransfer.lifetimes import DestinationState
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.source import ClaimRequest
from kvtransfer.ticket import Ticket
from prefill_worker.handoff import Handoff
from tests.engine.scripted_runner import continuation, next_token
from tests.worker.rig import BLOCK, FINGERPRINT, LEASE, Rig, make_rig, proto_id
from tests.worker.test_admission import landing as received
from worker import fetching, lending
from worker.lending import MAX_LENT

PROMPT = [n % 50 for n in range(3, 25)]
NAMES = block_hashes(root_hash(FINGERPRINT), PROMPT, BLOCK)
HOLDER = worker_pb2.PrefixSource(worker_id="h", address="127.0.0.1:2", incarnation=9, num_blocks=5)
LOCAL, PREFILL = worker_pb2.TASK_LOCAL, worker_pb2.TASK_PREFILL
TASKS = {Admission: LOCAL, Handoff: PREFILL}
Moment = Callable[[Rig], Awaitable[None]]


@pytest.fixture(params=[Admission, Handoff])
async def rig(request: pytest.FixtureRequest) -> Rig:
    rig = make_rig(request.param)
    rig.task = TASKS[request.param]  # type: ignore[attr-defined]
    return rig


def submit(rig: Rig, prefix: worker_pb2.PrefixSource = HOLDER) -> AttemptId:
    return rig.submit(rig.task, PROMPT, prefix=prefix)  # type: ignore[attr-defined]


def land(rig: Rig) -> None:
    rig.puller.commit(PROMPT[: rig.puller.lends * BLOCK])


async def let_go(rig: Rig) -> None:
    """What a prefill has offered is pulled."""
    for attempt in rig.ledger.live():
        rig.ledger.abort(attempt)
    await rig.settle()


def check_answer(rig: Rig, computed: int) -> None:
    local = rig.task == LOCAL  # type: ignore[attr-defined]
    assert rig.tokens() == (continuation(PROMPT, 5) if local else [next_token(PROMPT)])
    assert rig.runner.computed_tokens == computed + (4 if local else 0)


async def submitted(rig: Rig) -> None:
    submit(rig)


async def asking(rig: Rig) -> None:
    """Blocks are reserved, and the lender has not answered."""
    submit(rig)
    await rig.turn()
    assert rig.puller.asked == [NAMES]
    assert rig.pool.counts().landing == 5


async def landing(rig: Rig) -> None:
    await asking(rig)
    rig.puller.lends = 4
    rig.puller.answered.set()
    await rig.turn()
    rig.puller.landings[-1].land()


async def writing(rig: Rig) -> None:
    await landing(rig)
    assert rig.puller.landings[-1].gate.enter()


async def landed(rig: Rig) -> None:
    """Committed by the landing; neither worker nor engine know yet."""
    await landing(rig)
    land(rig)


MOMENTS: list[Moment] = [submitted, asking, landing, writing, landed]


async def test_what_another_lends_is_not_computed(rig: Rig) -> None:
    await landed(rig)
    await rig.settle()
    check_answer(rig, 22 - 4 * BLOCK)
    assert [event.landed.blocks for event in rig.events("landed")] == [4]
    cached = [event.tokens.cached_tokens for event in rig.events("tokens")]
    assert cached[0] == 4 * BLOCK
    await let_go(rig)
    rig.assert_idle()


async def test_nobody_is_asked_for_what_is_cached_here(rig: Rig) -> None:
    rig.submit(rig.task, PROMPT, attempt=7)  # type: ignore[attr-defined]
    await rig.settle()
    await let_go(rig)
    rig.told.clear()
    submit(rig)
    await rig.settle()
    assert not rig.puller.asked
    assert rig.events("ended")
    await let_go(rig)
    rig.assert_idle()


async def test_a_lender_that_has_nothing_costs_a_question(rig: Rig) -> None:
    await asking(rig)
    rig.puller.answered.set()
    await rig.settle()
    check_answer(rig, 22)
    await let_go(rig)
    rig.assert_idle()


@pytest.mark.parametrize("moment", [landing, writing])
async def test_a_source_that_is_lost_costs_what_it_would_have_saved(rig: Rig, moment: Moment) -> None:
    await moment(rig)
    rig.puller.landings[-1].fail(PeerLost("the source is gone"))
    await rig.settle()
    check_answer(rig, 22)
    if moment is writing:
        assert rig.pool.counts().quarantined == 5
        rig.puller.landings[-1].gate.leave()
        await asyncio.sleep(0)
        await rig.settle()
    await let_go(rig)
    rig.assert_idle()


@pytest.mark.parametrize("moment", [landing, writing])
async def test_a_source_that_falls_silent_is_not_waited_for_until_its_lease_ends(
    rig: Rig, moment: Moment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SILENCE_SECONDS", 0.01)
    await moment(rig)
    with pytest.raises(RequestCancelled, match=r"no block has come for 0\.01 s"):
        await rig.puller.landings[-1].done()
    await rig.settle()
    check_answer(rig, 22)
    if moment is writing:
        rig.puller.landings[-1].gate.leave()
        await asyncio.sleep(0)
        await rig.settle()
    await let_go(rig)
    rig.assert_idle()


async def test_a_slow_source_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SILENCE_SECONDS", 0.001)
    await landing(rig)
    coming = rig.puller.landings[-1]
    blocks = itertools.count(1)
    monkeypatch.setattr(Landing, "arrived", property(lambda _: next(blocks)), raising=False)  # one more at each look
    await asyncio.sleep(0.05)
    assert coming.state is DestinationState.LANDING
    land(rig)
    await rig.settle()
    check_answer(rig, 22 - 4 * BLOCK)
    await let_go(rig)
    rig.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_cancel_at_any_moment_ends_it_once_and_frees_all(rig: Rig, moment: Moment, turns: int) -> None:
    await moment(rig)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    await rig.turn(turns)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))  # a repeat
    await rig.turn(3)
    rig.puller.answered.set()
    if moment is writing:
        assert rig.pool.counts().quarantined == 5, "a writer may still come"
        rig.puller.landings[-1].gate.leave()
        await asyncio.sleep(0)
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_CANCELLED
    rig.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("steps", [1, 2, 6])
async def test_a_cancel_that_crosses_the_engines_news_frees_all(rig: Rig, moment: Moment, steps: int) -> None:
    await moment(rig)
    news = rig.compute_unheard(steps)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    news()
    rig.puller.answered.set()
    if moment is writing:
        rig.puller.landings[-1].gate.leave()
    await rig.settle()
    assert len(rig.events("ended")) == 1
    rig.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_lost_router_at_any_moment(rig: Rig, moment: Moment) -> None:
    await moment(rig)
    rig.core.close_session(rig.session)
    await rig.turn(3)
    rig.puller.answered.set()
    if moment is writing:
        rig.puller.landings[-1].gate.leave()
        await asyncio.sleep(0)
    await rig.settle()
    rig.assert_idle()


async def test_what_was_lent_while_nobody_wanted_it_any_more_is_released(rig: Rig) -> None:
    await asking(rig)
    rig.puller.lends = 3
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    await rig.turn(2)
    assert rig.end() == worker_pb2.END_REASON_CANCELLED
    rig.puller.answered.set()
    await rig.settle()
    assert [len(ticket.blocks) for ticket in rig.puller.released] == [3]
    assert not rig.puller.landings
    rig.assert_idle()


async def test_a_hint_that_cannot_be_read_is_none(rig: Rig) -> None:
    broken = worker_pb2.PrefixSource(num_blocks=3)
    broken.ticket.num_tokens = 1
    submit(rig, broken)
    await rig.settle()
    check_answer(rig, 22)
    await let_go(rig)
    rig.assert_idle()


# --- lending


def ask(rig: Rig, names: list[bytes], peer: int = 1, **changes: object) -> asyncio.Task[Ticket]:
    request = {
        "incarnation": 7,
        "id": AttemptId("peer", peer),
        "layout_fingerprint": rig.ledger.layout.fingerprint,
        "worker_id": WorkerId("other"),
        "hashes": tuple(names),
    } | changes
    return asyncio.create_task(rig.lending.lend(LendRequest(**request)))  # type: ignore[arg-type]


async def cached(rig: Rig) -> None:
    rig.submit(rig.task, PROMPT, attempt=7)  # type: ignore[attr-defined]
    await rig.settle()
    await let_go(rig)


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


# --- moving


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
