"""A decode worker's side of the handoff: whatever happens at whatever moment, one terminal reply and no block lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from baton.errors import PeerLost
from baton.sampling import SamplingParams
from baton.v1 import transfer_pb2, worker_pb2
from decode_worker.admission import Admission
from tests.engine.scripted_runner import continuation
from tests.worker.rig import Rig, make_rig, proto_id, ticket_for

PROMPT = [n % 50 for n in range(3, 25)]
RECEIVE = worker_pb2.TASK_RECEIVE


@pytest.fixture
async def rig() -> Rig:
    return make_rig(Admission)


def hand_over(rig: Rig, ticket: transfer_pb2.Ticket | None = None) -> None:
    rig.say(handoff=worker_pb2.Handoff(id=proto_id(), ticket=ticket or ticket_for(PROMPT)))


async def parked(rig: Rig) -> None:
    rig.submit(RECEIVE, PROMPT)


async def queued(rig: Rig) -> None:
    await parked(rig)
    hand_over(rig)


async def reserved(rig: Rig) -> None:
    await queued(rig)
    await rig.turn()
    assert rig.pool.counts().landing == 6


async def landing(rig: Rig) -> None:
    await reserved(rig)
    rig.puller.landings[-1].land()


async def writing(rig: Rig) -> None:
    await landing(rig)
    assert rig.puller.landings[-1].gate.enter()


async def verified(rig: Rig) -> None:
    """Committed by the landing; neither admission nor engine know yet."""
    await landing(rig)
    rig.puller.commit(PROMPT)


async def decoding(rig: Rig) -> None:
    await verified(rig)
    await rig.turn(2)
    assert rig.tokens()


MOMENTS = [parked, queued, reserved, landing, writing, verified, decoding]


async def test_a_good_handoff_goes_on_from_the_first_token(rig: Rig) -> None:
    await verified(rig)
    await rig.settle()
    assert rig.tokens() == continuation(PROMPT, 5)
    assert rig.end() == worker_pb2.END_REASON_LENGTH
    landed = rig.events("landed")[0].landed
    assert (landed.blocks, landed.transport) == (6, "shm")
    assert rig.runner.computed_tokens == 4, "the prompt was not computed again"
    rig.assert_idle()


@pytest.mark.parametrize("own_dtype", [True, False])
async def test_what_another_dtype_computed_is_not_cached_for_others(rig: Rig, own_dtype: bool) -> None:
    await landing(rig)
    rig.puller.own_dtype = own_dtype
    rig.puller.commit(PROMPT)
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_LENGTH
    assert (rig.pool.counts().cached > 0) == own_dtype
    rig.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_cancel_at_any_moment_ends_it_once_and_frees_all(
    rig: Rig, moment: Callable[[Rig], Awaitable[None]], turns: int
) -> None:
    await moment(rig)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    await rig.turn(turns)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))  # a repeat
    await rig.turn(3)
    if moment is writing:
        assert rig.pool.counts().quarantined == 6, "a writer may still come"
        rig.puller.landings[-1].gate.leave()
        await asyncio.sleep(0)
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_CANCELLED
    rig.assert_idle()


@pytest.mark.parametrize("moment", [queued, reserved, verified, decoding])
@pytest.mark.parametrize("steps", [1, 2, 6])
async def test_a_cancel_that_crosses_the_engines_news_frees_all(
    rig: Rig, moment: Callable[[Rig], Awaitable[None]], steps: int
) -> None:
    await moment(rig)
    news = rig.compute_unheard(steps)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    news()
    await rig.settle()
    assert rig.end() in (worker_pb2.END_REASON_CANCELLED, worker_pb2.END_REASON_LENGTH)
    rig.assert_idle()


async def test_a_cancel_that_crosses_the_reservation_frees_all_however_fast_the_pull_would_be(rig: Rig) -> None:
    await queued(rig)
    news = rig.compute_unheard(1)
    rig.say(cancel=worker_pb2.Cancel(id=proto_id()))
    news()
    for landing in rig.puller.landings:  # all of it within the step that the engine is at
        landing.land()
        rig.puller.commit(PROMPT)
        await asyncio.sleep(0.01)
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_CANCELLED
    rig.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_deadline_at_any_moment(rig: Rig, moment: Callable[[Rig], Awaitable[None]]) -> None:
    submit = rig.submit
    rig.submit = lambda *a, **k: submit(*a, **k, deadline=1000.0)  # type: ignore[method-assign]  # every moment submits
    await moment(rig)
    rig.pass_deadlines()
    await rig.turn(2)
    if moment is writing:
        rig.puller.landings[-1].gate.leave()
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_DEADLINE
    rig.assert_idle()


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_broken_session_frees_what_its_requests_hold(
    rig: Rig, moment: Callable[[Rig], Awaitable[None]]
) -> None:
    await moment(rig)
    rig.core.close_session(rig.session)
    if moment is writing:
        await rig.turn(2)
        rig.puller.landings[-1].gate.leave()
    await rig.settle()
    rig.assert_idle()


@pytest.mark.parametrize("moment", [reserved, landing])
async def test_a_failed_landing_is_reported_and_freed(rig: Rig, moment: Callable[[Rig], Awaitable[None]]) -> None:
    await moment(rig)
    rig.puller.landings[-1].fail(PeerLost("p is gone"))
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_HANDOFF_FAILED
    assert rig.events("ended")[0].ended.message == "p is gone"
    rig.assert_idle()


async def test_a_failed_landing_with_a_writer_is_quarantined_until_it_has_gone(rig: Rig) -> None:
    await writing(rig)
    rig.puller.landings[-1].fail(PeerLost("p is gone"))
    await rig.turn(3)
    assert rig.end() == worker_pb2.END_REASON_HANDOFF_FAILED, "the router need not wait for the writer"
    assert rig.pool.counts().quarantined == 6
    rig.puller.landings[-1].gate.leave()
    await rig.settle()
    rig.assert_idle()


async def test_while_there_is_no_room_the_offer_is_kept(rig: Rig) -> None:
    rig = make_rig(Admission, blocks=8)
    long = rig.submit(worker_pb2.TASK_LOCAL, PROMPT, attempt=9, count=9)
    await rig.turn(3)
    rig.submit(RECEIVE, PROMPT[::-1])
    hand_over(rig, ticket_for(PROMPT[::-1]))
    await rig.turn(2)
    assert len(rig.puller.kept) == 1
    assert not rig.puller.landings
    rig.core.receive(rig.session, worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(id=proto_id(long.attempt))))
    await rig.turn(2)
    assert rig.puller.landings


async def test_an_offer_that_is_over_while_waiting_is_a_failed_handoff(rig: Rig) -> None:
    rig = make_rig(Admission, blocks=8)
    rig.submit(worker_pb2.TASK_LOCAL, PROMPT, attempt=9, count=9)
    await rig.turn(3)
    rig.submit(RECEIVE, PROMPT[::-1])
    hand_over(rig, ticket_for(PROMPT[::-1]))
    await rig.turn(1)
    rig.puller.offer_over.set()
    await rig.settle()
    ends = {event.id.attempt: event.ended.reason for event in rig.events("ended")}
    assert ends == {0: worker_pb2.END_REASON_HANDOFF_FAILED, 9: worker_pb2.END_REASON_LENGTH}
    rig.assert_idle()


async def test_a_ticket_for_other_tokens_fails_the_handoff_and_holds_nothing(rig: Rig) -> None:
    rig.submit(RECEIVE, PROMPT)
    hand_over(rig, ticket_for(PROMPT[:-3]))
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_HANDOFF_FAILED
    rig.assert_idle()


async def test_a_malformed_ticket_fails_the_handoff(rig: Rig) -> None:
    rig.submit(RECEIVE, PROMPT)
    hand_over(rig, transfer_pb2.Ticket(transfer_id=b"short"))
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_HANDOFF_FAILED
    rig.assert_idle()


async def test_a_request_longer_than_the_model_is_refused(rig: Rig) -> None:
    rig.submit(worker_pb2.TASK_LOCAL, [1] * 64)
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_INVALID
    assert "64 tokens" in rig.events("ended")[0].ended.message
    rig.assert_idle()


async def test_a_first_token_outside_the_vocabulary_fails_the_handoff(rig: Rig) -> None:
    await landing(rig)
    rig.puller.commit(PROMPT, first_token=2**31)
    await rig.settle()
    assert rig.end() == worker_pb2.END_REASON_HANDOFF_FAILED
    rig.assert_idle()


async def test_a_defect_in_one_requests_handling_ends_that_request_alone(rig: Rig) -> None:
    broken = rig.puller.land
    rig.puller.land = lambda *a: 1 // 0
    rig.submit(RECEIVE, PROMPT)
    hand_over(rig)
    other = rig.submit(worker_pb2.TASK_LOCAL, PROMPT[:5], attempt=1)
    await rig.settle()
    rig.puller.land = broken
    ends = {event.id.attempt: event.ended.reason for event in rig.events("ended")}
    assert ends == {0: worker_pb2.END_REASON_UNAVAILABLE, other.attempt: worker_pb2.END_REASON_LENGTH}
    rig.assert_idle()


async def test_repeats_and_strangers_change_nothing(rig: Rig) -> None:
    await queued(rig)
    hand_over(rig)
    rig.submit(RECEIVE, PROMPT)
    rig.say(handoff=worker_pb2.Handoff(id=proto_id(5), ticket=ticket_for(PROMPT, 5)))
    rig.say(cancel=worker_pb2.Cancel(id=proto_id(6)))
    rig.say()
    await rig.turn(2)
    assert len(rig.puller.landings) == 1
    rig.puller.commit(PROMPT)
    await rig.settle()
    assert rig.tokens() == continuation(PROMPT, 5)
    stale = [
        rig.metrics.registry.get_sample_value("baton_stale_messages_total", {"kind": kind})
        for kind in ("submit", "handoff", "cancel", "unknown")
    ]
    assert stale == [1, 1, 1, 1]
    rig.assert_idle()


async def test_drain_lets_streams_end_and_refuses_new_ones(rig: Rig) -> None:
    await decoding(rig)
    draining = asyncio.create_task(rig.core.drain(5))
    await asyncio.sleep(0)
    rig.submit(RECEIVE, PROMPT, attempt=1)
    await rig.settle()
    await draining
    ends = {event.id.attempt: event.ended.reason for event in rig.events("ended")}
    assert ends == {0: worker_pb2.END_REASON_LENGTH, 1: worker_pb2.END_REASON_UNAVAILABLE}
    rig.assert_idle()


async def test_drain_ends_what_does_not_end_by_itself(rig: Rig) -> None:
    await writing(rig)
    await rig.core.drain(0.01)
    await rig.turn(1)
    assert rig.end() == worker_pb2.END_REASON_UNAVAILABLE
    rig.puller.landings[-1].gate.leave()
    await rig.settle()
    rig.assert_idle()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": worker_pb2.TASK_PREFILL}, "task is prefill; this worker takes receive and local"),
        ({"task": 77}, "task is 77"),
        ({"id": worker_pb2.AttemptId(request_id="r" * 300)}, "300 characters"),
        ({"sampling": SamplingParams(temperature=1.0).to_proto()}, "seed"),
        ({"token_ids": []}, "prompt tokens"),
        ({"token_ids": [50]}, "vocabulary"),
        ({"num_prompt_tokens": 9}, "9 prompt tokens"),
    ],
)
async def test_what_no_engine_could_do_is_refused_at_once(rig: Rig, changes: dict, words: str) -> None:
    fields = {"id": proto_id(), "task": RECEIVE, "token_ids": [1], "num_prompt_tokens": 1} | changes
    rig.say(submit=worker_pb2.Submit(**fields))  # and the engine, which has nothing to do, takes no step
    assert rig.end() == worker_pb2.END_REASON_INVALID
    assert words in rig.events("ended")[0].ended.message
    rig.assert_idle()
