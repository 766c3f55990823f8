"""Fetching what another lends, in workers of both roles: whatever happens when, one terminal reply, no block lost."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from baton.errors import PeerLost, RequestCancelled
from baton.v1 import worker_pb2
from kvtransfer.landing import Landing
from kvtransfer.lifetimes import DestinationState
from tests.engine.scripted_runner import continuation, next_token
from tests.worker.rig import BLOCK, Rig, proto_id
from tests.worker.sharing import (
    LOCAL,
    MOMENTS,
    PROMPT,
    Moment,
    asking,
    land,
    landed,
    landing,
    let_go,
    submit,
    writing,
)
from worker import fetching


def check_answer(rig: Rig, computed: int) -> None:
    local = rig.task == LOCAL  # type: ignore[attr-defined]
    assert rig.tokens() == (continuation(PROMPT, 5) if local else [next_token(PROMPT)])
    assert rig.runner.computed_tokens == computed + (4 if local else 0)


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
