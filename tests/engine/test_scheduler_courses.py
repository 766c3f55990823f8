"""The scheduler, whatever is asked of it in whatever order."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.hashing import block_hashes
from baton.ids import AttemptId
from engine.messages import (
    Abort,
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
    Task,
)
from tests.engine.scheduler_harness import BLOCK, ROOT, Harness, RestlessClock, land, prompt_of
from tests.engine.scripted_runner import continuation, next_token

pytestmark = pytest.mark.usefixtures("steps")


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
