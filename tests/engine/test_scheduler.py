"""The scheduler under a runner whose tokens show every bookkeeping error (scripted_runner.py)."""

from __future__ import annotations

import pytest

from baton.ids import AttemptId
from baton.sampling import SamplingParams
from engine.messages import (
    Abort,
    AddRequest,
    Commit,
    EndReason,
    FreeQuarantined,
    Offered,
    ReleaseOffer,
    Task,
    Tokens,
)
from tests.engine.scheduler_harness import Harness, prompt_of
from tests.engine.scripted_runner import continuation

pytestmark = pytest.mark.usefixtures("steps")


def test_one_request_gets_its_tokens_and_leaves_the_pool_idle():
    h = Harness()
    request = h.add("a", prompt_of(10), count=7)
    h.run()
    assert h.tokens[request] == continuation(prompt_of(10), 7)
    assert h.ended[request].reason is EndReason.LENGTH
    assert h.idle()


def test_a_step_mixes_prefill_chunks_and_decodes_within_the_budget():
    h = Harness(budget=8)
    short = h.add("short", prompt_of(4), count=20)
    h.step()
    long = h.add("long", prompt_of(40, seed=1), count=3)
    before = len(h.tokens[short])
    h.step()
    assert len(h.tokens[short]) == before + 1, "the open stream goes on while the long prompt is computed"
    h.run()
    assert h.runner.largest_step <= 8
    assert h.tokens[long] == continuation(prompt_of(40, seed=1), 3)
    assert h.tokens[short] == continuation(prompt_of(4), 20)


def test_stop_token_ends_the_stream_but_not_before_min_tokens():
    prompt = prompt_of(9)
    want = continuation(prompt, 12)
    stop = want[5]
    h = Harness()
    at_once, later = AttemptId("a", 0), AttemptId("b", 0)
    for request, least in ((at_once, 0), (later, 7)):
        sampling = SamplingParams(max_tokens=12, min_tokens=least, stop_token_ids=(stop,), seed=0)
        h.engine.handle(AddRequest(request, Task.LOCAL, tuple(prompt), 9, sampling))
    h.run()
    assert h.tokens[at_once] == want[: want.index(stop) + 1]
    assert h.ended[at_once].reason is EndReason.STOP
    assert len(h.tokens[later]) >= 7, "the scheduler ends no stream before min_tokens"


def test_resumed_request_counts_from_where_it_was():
    prompt, want = prompt_of(10), continuation(prompt_of(10), 9)
    h = Harness()
    request = AttemptId("a", 3)
    sampling = SamplingParams(max_tokens=9, seed=0)
    h.tokens[request] = list(want[:4])
    h.engine.handle(AddRequest(request, Task.LOCAL, (*prompt, *want[:4]), len(prompt), sampling))
    h.run()
    assert h.tokens[request] == want
    assert h.of(Tokens, request)[0].index == 4


def test_a_full_pool_makes_requests_wait_and_serves_them_when_it_empties():
    h = Harness(blocks=8, max_len=32)
    offered = h.add("a", prompt_of(24), task=Task.PREFILL)
    waiting = h.add("b", prompt_of(20, seed=1), task=Task.PREFILL)
    h.run()
    assert not h.of(Offered, waiting)
    h.engine.handle(ReleaseOffer(offered))
    h.run()
    assert h.of(Offered, waiting)


def test_too_long_a_request_is_refused_with_both_numbers():
    h = Harness(max_len=32)
    request = h.add("a", prompt_of(32))
    h.step()
    assert h.ended[request].reason is EndReason.INVALID
    assert "32" in h.ended[request].message
    assert "31" in h.ended[request].message


def test_repeats_and_strangers_change_nothing():
    h = Harness()
    request = h.add("a", prompt_of(10))
    h.add("a", prompt_of(10))
    for command in (ReleaseOffer(request), Commit(request, 1), FreeQuarantined(request), Abort(AttemptId("x", 0))):
        h.engine.handle(command)
    h.run()
    assert h.scheduler.counters.stale_commands == 5
    assert h.tokens[request] == continuation(prompt_of(10), 5)
