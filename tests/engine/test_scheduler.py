"""The scheduler under a runner whose tokens show every bookkeeping error (scripted_runner.py)."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId
from baton.sampling import SamplingParams
from engine.messages import (
    Abort,
    AddRequest,
    BlocksEvicted,
    BlocksStored,
    Commit,
    CommitPrefix,
    DropLanding,
    DropPrefix,
    EndReason,
    FreeQuarantined,
    Lend,
    MoveAway,
    Offered,
    ReleaseOffer,
    Reserved,
    Sealed,
    Task,
    Tokens,
)
from engine.pacing import Pace, Pacer
from engine.plan import MoveKind
from engine.step_cost import Coefficients
from tests.engine.scheduler_harness import BLOCK, Harness, RestlessClock, prompt_of
from tests.engine.scripted_runner import continuation, next_token

ROOT = root_hash(b"model")


@pytest.fixture(autouse=True, params=["one by one", "overlapped"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Harness, "overlap", request.param == "overlapped")


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


def test_a_shared_prefix_is_hit_and_not_computed_again():
    h = Harness()
    first = h.add("a", prompt_of(33))
    h.run()
    computed = h.runner.computed_tokens
    second = h.add("b", prompt_of(33))
    h.run()
    assert (h.cached[first], h.cached[second]) == (0, 32)
    assert h.runner.computed_tokens - computed == 1 + 4
    assert h.tokens[first] == h.tokens[second]


def test_of_a_fully_cached_prompt_one_token_is_computed_in_a_copy_of_the_last_block():
    h = Harness()
    h.add("a", prompt_of(32))
    h.run()
    before = h.runner.computed_tokens
    again = h.add("b", prompt_of(32))
    h.run()
    assert h.cached[again] == 31
    assert h.runner.computed_tokens - before == 1 + 4
    assert h.runner.moves == {MoveKind.COPY: 1}
    assert h.tokens[again] == continuation(prompt_of(32), 5)
    assert h.idle()


def test_a_block_that_two_requests_end_in_is_written_by_neither():
    h = Harness()
    first, second = (h.add(name, prompt_of(32), count=9) for name in "ab")
    h.run()
    third = h.add("c", prompt_of(32), count=9)
    h.step()
    before = dict(h.runner.kv[h.pool.find(block_hashes(ROOT, prompt_of(32), BLOCK)[-1], prompt_of(32)[-BLOCK:])])
    h.run()
    assert h.runner.kv[h.pool.find(block_hashes(ROOT, prompt_of(32), BLOCK)[-1], prompt_of(32)[-BLOCK:])] == before
    for request in (first, second, third):
        assert h.tokens[request] == continuation(prompt_of(32), 9)


def test_without_room_for_a_copy_the_last_block_is_computed_again():
    h = Harness(blocks=8, max_len=32)
    h.add("a", prompt_of(28), count=1)
    h.run()
    again = h.add("b", prompt_of(28), count=4)
    h.run()
    assert h.tokens[again] == continuation(prompt_of(28), 4)
    assert h.idle()


def test_a_block_computed_again_takes_the_name_over_so_that_its_children_have_a_parent():
    h = Harness(blocks=16)
    h.add("a", prompt_of(32), count=1)
    h.run()
    h.add("b", prompt_of(32), count=10)
    h.run()
    third = h.add("c", prompt_of(32) + continuation(prompt_of(32), 8) + [7], count=1)
    h.run()
    assert h.cached[third] == 40
    assert h.pool.counts().cached == 10, "no block is kept for a content that another one has"


def test_prompts_that_begin_alike_wait_for_the_first_one_and_hit_what_it_has_computed():
    h = Harness(budget=200)
    prompts = [prompt_of(40) + prompt_of(8, seed=10 + i) for i in range(5)]
    alike = [h.add(str(i), prompt, count=3) for i, prompt in enumerate(prompts)]
    other = h.add("other", prompt_of(12, seed=99), count=3)
    h.run()
    assert [h.cached[request] for request in alike] == [0, 40, 40, 40, 40]
    assert h.runner.computed_tokens == 48 + 4 * 8 + 12 + 6 * 2
    assert [h.tokens[request] for request in alike] == [continuation(prompt, 3) for prompt in prompts]
    first_told = [e.id for e in h.events if isinstance(e, Tokens) and e.index == 0]
    assert first_told == [alike[0], other, *alike[1:]], "who waits holds nobody up, and keeps its place"
    assert h.idle()


def test_who_waits_for_a_prefix_goes_on_when_nobody_computes_it_any_more():
    h = Harness(budget=8)
    first = h.add("a", prompt_of(40), count=3)
    second = h.add("b", prompt_of(40), count=3)
    for _ in range(3):
        h.step()
    h.engine.handle(Abort(first, EndReason.CANCELLED))
    h.run()
    assert h.tokens[second] == continuation(prompt_of(40), 3)
    assert 8 <= h.cached[second] < 40
    assert h.idle()


def test_without_a_cache_nobody_waits_for_a_prefix():
    h = Harness(budget=200, caching=False)
    requests = [h.add(name, prompt_of(40), count=3) for name in "ab"]
    h.run()
    assert h.runner.largest_step == 80
    assert [h.tokens[request] for request in requests] == [continuation(prompt_of(40), 3)] * 2


def test_other_salts_share_nothing():
    h = Harness()
    h.add("a", prompt_of(33), salt=b"tenant 1")
    h.run()
    other = h.add("b", prompt_of(33), salt=b"tenant 2")
    h.run()
    assert h.cached[other] == 0


def test_without_prefix_caching_nothing_is_hit():
    h = Harness(caching=False)
    h.add("a", prompt_of(33))
    h.run()
    again = h.add("b", prompt_of(33))
    h.run()
    assert h.cached[again] == 0
    assert h.pool.counts().free == h.pool.num_blocks


def test_preemption_keeps_every_stream_exact():
    h = Harness(blocks=20, seqs=8, max_len=64)
    requests = [(h.add(f"r{i}", prompt_of(12, seed=i), count=30), prompt_of(12, seed=i)) for i in range(8)]
    h.run()
    assert h.scheduler.counters.preemptions > 0, "the pool was meant to be too small"
    for request, prompt in requests:
        assert h.tokens[request] == continuation(prompt, 30)
    assert h.idle()


KNOWN = Coefficients(token=1e-3)
"""Of a machine where computing a token again costs a millisecond."""


def short_of_blocks(monkeypatch: pytest.MonkeyPatch, swap: int, swap_seconds: float) -> Harness:
    """Eight requests in a pool for three, each answered as if alone."""
    pace = Pace(math.inf, 1000, KNOWN, swap_seconds)
    pacer = Pacer()
    monkeypatch.setattr(pacer, "pace", lambda: pace)
    h = Harness(blocks=20, seqs=8, max_len=64, swap=swap, pacer=pacer)
    requests = [(h.add(f"r{i}", prompt_of(12, seed=i), count=30), prompt_of(12, seed=i)) for i in range(8)]
    h.run()
    assert h.scheduler.counters.preemptions > 0, "the pool was meant to be too small"
    for request, prompt in requests:
        assert h.tokens[request] == continuation(prompt, 30)
    assert h.idle()
    return h


def test_what_is_swapped_out_comes_back_without_being_computed_again(monkeypatch: pytest.MonkeyPatch):
    h = short_of_blocks(monkeypatch, swap=200, swap_seconds=1e-6)
    assert h.runner.moves[MoveKind.SWAP_OUT] > 0
    assert 0 < h.runner.moves[MoveKind.SWAP_IN] <= h.runner.moves[MoveKind.SWAP_OUT]
    assert h.runner.computed_tokens == 8 * (12 + 29)


def test_what_is_cheaper_to_compute_again_is_not_swapped(monkeypatch: pytest.MonkeyPatch):
    h = short_of_blocks(monkeypatch, swap=200, swap_seconds=1.0)
    assert not h.runner.moves
    assert h.runner.computed_tokens > 8 * (12 + 29)


def test_what_finds_no_room_in_host_memory_is_computed_again(monkeypatch: pytest.MonkeyPatch):
    h = short_of_blocks(monkeypatch, swap=5, swap_seconds=1e-6)
    assert h.runner.moves[MoveKind.SWAP_OUT] > 0
    assert h.runner.computed_tokens > 8 * (12 + 29)


def test_an_abort_while_swapped_out_frees_the_host_memory(monkeypatch: pytest.MonkeyPatch):
    pace = Pace(math.inf, 1000, KNOWN, 1e-6)
    pacer = Pacer()
    monkeypatch.setattr(pacer, "pace", lambda: pace)
    h = Harness(blocks=12, seqs=8, max_len=48, swap=200, pacer=pacer)
    requests = [h.add(f"r{i}", prompt_of(12, seed=i), count=30) for i in range(3)]
    while not h.scheduler.load().swapped:
        assert h.step()
    for request in requests:
        h.engine.handle(Abort(request))
    h.run()
    assert h.idle()
    assert len(h.ended) == 3


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


def land(h: Harness, request: AttemptId, prompt: list[int]) -> None:
    """Does what a transfer does: fills the reserved blocks."""
    reserved = h.of(Reserved, request)[0]
    for position, token in enumerate(prompt):
        if position // BLOCK >= reserved.first_missing:
            h.runner.kv[reserved.blocks[position // BLOCK].index][position % BLOCK] = token


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


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_course_of_events_is_exact_and_leaks_nothing(data: st.DataObject):
    clock = RestlessClock(random.Random(data.draw(st.integers(0, 10**6)))) if data.draw(st.booleans()) else None
    budget = data.draw(st.integers(1, 16)) if clock is None else 40
    h = Harness(
        blocks=data.draw(st.integers(10, 24)),
        seqs=4,
        budget=budget,
        max_len=40,
        clock=clock,
        swap=data.draw(st.sampled_from((0, 3, 40))),
    )
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    heads = [prompt_of(16, seed=s) for s in range(2)]
    prompts: dict[AttemptId, list[int]] = {}
    aborted: set[AttemptId] = set()
    names: set[bytes] = set()
    peers: list[AttemptId] = []
    for number in range(60):
        action = rng.random()
        if action < 0.3 and number < 45:
            head = rng.choice(heads)[: rng.choice((rng.randrange(17), 16))]
            prompt = head + prompt_of(rng.randrange(12), seed=number) or [1]
            task = rng.choice(list(Task))
            fetch = rng.choice((0, 2, 9)) if task is not Task.RECEIVE else 0
            prompts[h.add(f"r{number}", prompt, count=rng.randrange(1, 10), task=task, fetch=fetch)] = prompt
        elif action < 0.36 and prompts:
            request = rng.choice(list(prompts))
            if request not in h.ended:
                aborted.add(request)
            h.engine.handle(Abort(request))
        elif action < 0.4 and prompts:
            h.engine.handle(MoveAway(rng.choice(list(prompts))))
        elif action < 0.44:
            peers.append(AttemptId("peer", number))
            h.engine.handle(Lend(peers[-1], tuple(block_hashes(ROOT, rng.choice(heads), BLOCK))))
        else:
            h.step()
        h.take_events()
        settle(h, prompts, rng, finish=False)
        if peers and rng.random() < 0.2:
            h.engine.handle(ReleaseOffer(peers.pop()))
    for peer in peers:
        h.engine.handle(ReleaseOffer(peer))
    for _ in range(400):
        settle(h, prompts, rng, finish=True)
        if not h.step() and set(h.ended) == set(prompts):
            break
    settle(h, prompts, rng, finish=True)
    assert set(h.ended) == set(prompts), "a request has had no terminal reply"
    for request, prompt in prompts.items():
        got = h.tokens[request]
        assert got == continuation(prompt, len(got))
        if h.ended[request].reason is EndReason.CANCELLED:
            assert request in aborted
    assert h.idle()
    parents = {}
    for request, prompt in prompts.items():
        chain = block_hashes(ROOT, prompt + h.tokens[request], BLOCK)
        parents |= dict(zip(chain, [ROOT, *chain], strict=False))
    for event in h.events:
        if isinstance(event, BlocksStored):
            for name in event.hashes:
                assert name not in names
                assert parents[name] in {ROOT, *names}, "stored before its parent"
                names.add(name)
        elif isinstance(event, BlocksEvicted):
            for name in event.hashes:
                names.remove(name)
                assert name not in {parents[n] for n in names}, "evicted before its children"
    assert len(names) == h.pool.counts().cached


def settle(h: Harness, prompts: dict[AttemptId, list[int]], rng: random.Random, finish: bool):
    """Ends some transfers, or all of them: what the workers' handoff and admission do."""
    for request, prompt in prompts.items():
        if not finish and rng.random() < 0.7:
            continue
        if h.of(Offered, request) and request in h.ended:
            h.engine.handle(ReleaseOffer(request))
        reserved = h.of(Reserved, request)
        if reserved and request not in h.fetched and h.task[request] is not Task.RECEIVE:
            settle_prefix(h, request, prompt, rng)
        elif reserved and request not in h.ended and not h.tokens[request] and h.task[request] is Task.RECEIVE:
            if rng.random() < 0.3:
                h.engine.handle(DropLanding(request, rng.random() < 0.5))
            else:
                land(h, request, prompt)
                h.engine.handle(Commit(request, next_token(prompt)))
        if request in h.ended or (request in h.fetched and rng.random() < 0.5):
            h.engine.handle(FreeQuarantined(request))
    h.take_events()


def settle_prefix(h: Harness, request: AttemptId, prompt: list[int], rng: random.Random) -> None:
    """Some of what was to be fetched comes, or nothing, or nobody knows."""
    h.fetched.add(request)
    reserved = h.of(Reserved, request)[0]
    if rng.random() < 0.2:
        h.engine.handle(DropPrefix(request))
        return
    end = rng.randint(reserved.first_missing, len(reserved.blocks))
    if request not in h.ended:
        for position in range(reserved.first_missing * BLOCK, end * BLOCK):
            h.runner.kv[reserved.blocks[position // BLOCK].index][position % BLOCK] = prompt[position]
    h.engine.handle(CommitPrefix(request, end))
