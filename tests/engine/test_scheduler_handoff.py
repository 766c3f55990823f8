"""The scheduler where a prompt is computed elsewhere: what is offered, sealed, landed, committed and let go."""

from __future__ import annotations

import math

import pytest

from engine.messages import (
    Abort,
    BlocksStored,
    Commit,
    DropLanding,
    EndReason,
    FreeQuarantined,
    MoveAway,
    Offered,
    ReleaseOffer,
    Reserved,
    Sealed,
    Task,
)
from engine.pacing import Pace, Pacer
from engine.plan import MoveKind
from tests.engine.scheduler_harness import KNOWN, Harness, land, prompt_of
from tests.engine.scripted_runner import continuation, next_token

pytestmark = pytest.mark.usefixtures("steps")


def test_prefill_offers_before_it_computes_and_seals_in_order():
    h = Harness(budget=8)
    request = h.add("a", prompt_of(22), task=Task.PREFILL)
    h.run()
    kinds = [type(e) for e in h.events if not isinstance(e, BlocksStored)]
    assert kinds[0] is Offered
    offered, seals = h.of(Offered, request)[0], [s.end for s in h.of(Sealed, request)]
    assert (len(offered.blocks), offered.num_tokens) == (6, 22)
    assert seals == [2, 4, 6]
    assert h.tokens[request] == continuation(prompt_of(22), 1)
    assert h.ended[request].reason is EndReason.PREFILLED
    assert h.pool.counts().offered == 6, "the blocks stay until the transfer is over"
    h.engine.handle(ReleaseOffer(request))
    assert h.idle()


def test_aborted_prefill_keeps_its_blocks_until_the_offer_is_released():
    h = Harness(budget=8)
    request = h.add("a", prompt_of(22), task=Task.PREFILL)
    h.step()
    h.engine.handle(Abort(request))
    h.take_events()
    assert h.ended[request].reason is EndReason.CANCELLED, "told at once"
    h.run()
    assert h.pool.counts().offered == 6
    h.engine.handle(ReleaseOffer(request))
    assert h.idle()


def test_received_blocks_are_read_only_after_commit():
    h, prompt = Harness(), prompt_of(22)
    request = h.add("a", prompt, count=6, task=Task.RECEIVE)
    h.run()
    assert h.pool.counts().landing == 6
    assert h.runner.steps == 0
    land(h, request, prompt)
    h.engine.handle(Commit(request, next_token(prompt)))
    h.run()
    assert h.tokens[request] == continuation(prompt, 6)
    assert h.runner.computed_tokens == 5, "the prompt was not computed here"
    again = h.add("b", prompt)
    h.run()
    assert h.cached[again] == 20, "what has landed can be hit"
    assert h.idle()


def test_what_landed_in_other_values_serves_its_own_stream_alone():
    h, prompt = Harness(), prompt_of(22)
    h.add("before", prompt[:8])
    h.run()
    request = h.add("a", prompt, count=6, task=Task.RECEIVE)
    h.run()
    land(h, request, prompt)
    h.engine.handle(Commit(request, next_token(prompt), shareable=False))
    h.run()
    assert h.tokens[request] == continuation(prompt, 6)
    again = h.add("b", prompt)
    h.run()
    assert h.cached[again] == 8, "what was computed here before can still be hit"
    once_more = h.add("c", prompt)
    h.run()
    assert h.cached[once_more] == 20, "and so can what is computed anew"
    assert h.idle()


@pytest.mark.parametrize("shareable", [True, False])
def test_what_landed_in_other_values_is_not_offered_to_whoever_goes_on_with_the_stream(shareable: bool):
    h, prompt = Harness(), prompt_of(22)
    h.add("before", prompt[:8])
    h.run()
    request = h.add("a", prompt, count=6, task=Task.RECEIVE)
    h.run()
    land(h, request, prompt)
    h.engine.handle(Commit(request, next_token(prompt), shareable=shareable))
    h.step()
    h.engine.handle(MoveAway(request))
    h.run()
    assert h.ended[request].reason is EndReason.MOVED
    assert len(h.of(Offered, request)[0].blocks) == (5 if shareable else 2), "2 were computed here before"
    h.engine.handle(ReleaseOffer(request))
    assert h.idle()


@pytest.mark.parametrize("swap", [0, 200])
def test_other_values_are_still_others_when_they_come_back_from_host_memory(monkeypatch: pytest.MonkeyPatch, swap: int):
    pacer = Pacer()
    monkeypatch.setattr(pacer, "pace", lambda: Pace(math.inf, 1000, KNOWN, 1e-6))
    h, prompt = Harness(blocks=20, seqs=8, max_len=64, swap=swap, pacer=pacer), prompt_of(22)
    older = h.add("older", prompt_of(12, seed=1), count=48)
    h.step()
    request = h.add("a", prompt, count=30, task=Task.RECEIVE)
    while not h.of(Reserved, request):
        h.step()
    land(h, request, prompt)
    h.engine.handle(Commit(request, next_token(prompt), shareable=False))
    h.run()
    assert h.tokens[older] == continuation(prompt_of(12, seed=1), 48)
    assert h.tokens[request] == continuation(prompt, 30)
    assert h.scheduler.counters.preemptions > 0, "the pool was meant to be too small"
    assert (h.runner.moves[MoveKind.SWAP_IN] > 0) == (swap > 0)
    again = h.add("b", prompt)
    h.run()
    assert h.cached[again] == (0 if swap else 20), "what is computed again is this engine's own"
    assert h.idle()


def test_receive_asks_only_for_what_is_not_cached():
    h, prompt = Harness(), prompt_of(22)
    h.add("a", prompt)
    h.run()
    request = h.add("b", prompt, count=3, task=Task.RECEIVE)
    h.run()
    assert h.of(Reserved, request)[0].first_missing == 5
    land(h, request, prompt)
    h.engine.handle(Commit(request, next_token(prompt)))
    h.run()
    assert h.tokens[request] == continuation(prompt, 3)


@pytest.mark.parametrize("in_flight", [False, True])
def test_dropped_landing_frees_only_what_no_writer_can_reach(in_flight: bool):
    h = Harness()
    request = h.add("a", prompt_of(22), task=Task.RECEIVE)
    h.run()
    h.engine.handle(DropLanding(request, in_flight, message="peer lost"))
    h.take_events()
    assert h.ended[request].reason is EndReason.HANDOFF_FAILED
    assert h.pool.counts().quarantined == (6 if in_flight else 0)
    h.engine.handle(FreeQuarantined(request))
    assert h.idle()


def test_abort_during_landing_quarantines():
    h = Harness()
    request = h.add("a", prompt_of(22), task=Task.RECEIVE)
    h.run()
    h.engine.handle(Abort(request, EndReason.DEADLINE, "too late"))
    h.take_events()
    assert h.ended[request].reason is EndReason.DEADLINE
    assert h.pool.counts().quarantined == 6
    h.engine.handle(Commit(request, 1))  # the verified landing comes too late and changes nothing
    assert h.pool.counts().quarantined == 6
    h.engine.handle(FreeQuarantined(request))
    assert h.idle()
