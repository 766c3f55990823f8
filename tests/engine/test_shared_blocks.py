"""Prefixes that are fetched, blocks that are lent, and streams that move away, under the scripted runner."""

from __future__ import annotations

import pytest

from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId
from engine.messages import (
    Abort,
    CommitPrefix,
    DropPrefix,
    EndReason,
    FreeQuarantined,
    Lend,
    Lent,
    MoveAway,
    Offered,
    ReleaseOffer,
    Reserved,
    Sealed,
    Task,
)
from tests.engine.scheduler_harness import BLOCK, Harness, prompt_of
from tests.engine.scripted_runner import continuation, next_token

ROOT = root_hash(b"model")


@pytest.fixture(autouse=True, params=["one by one", "overlapped"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Harness, "overlap", request.param == "overlapped")


def land_prefix(h: Harness, request: AttemptId, prompt: list[int], num_blocks: int) -> None:
    """Does what a transfer does: fills the reserved blocks before position `num_blocks`."""
    reserved = h.of(Reserved, request)[-1]
    for position in range(reserved.first_missing * BLOCK, num_blocks * BLOCK):
        h.runner.kv[reserved.blocks[position // BLOCK].index][position % BLOCK] = prompt[position]


@pytest.mark.parametrize("num_blocks", [0, 2, 5])
def test_what_of_a_prefix_comes_is_not_computed_and_the_rest_is(num_blocks: int) -> None:
    h, prompt = Harness(), prompt_of(22)
    request = h.add("a", prompt, fetch=5)
    h.run()
    assert [len(r.blocks) for r in h.of(Reserved, request)] == [5]
    assert h.pool.counts().landing == 5
    assert h.runner.steps == 0
    land_prefix(h, request, prompt, num_blocks)
    h.engine.handle(CommitPrefix(request, num_blocks))
    h.run()
    assert h.tokens[request] == continuation(prompt, 5)
    assert h.cached[request] == num_blocks * BLOCK
    assert h.runner.computed_tokens == 22 - num_blocks * BLOCK + 4
    assert h.idle()


def test_only_what_is_not_cached_is_fetched_and_nothing_where_all_is() -> None:
    h, prompt = Harness(), prompt_of(22)
    h.add("first", prompt[:9], count=1)
    h.run()
    request = h.add("a", prompt, fetch=5)
    h.run()
    assert h.of(Reserved, request)[0].first_missing == 2
    assert h.pool.counts().landing == 3
    land_prefix(h, request, prompt, 5)
    h.engine.handle(CommitPrefix(request, 5))
    h.run()
    again = h.add("b", prompt, fetch=5)
    h.run()
    assert not h.of(Reserved, again)
    assert h.tokens[request] == h.tokens[again] == continuation(prompt, 5)


def test_one_token_is_left_to_be_computed_however_much_another_holds() -> None:
    h, prompt = Harness(), prompt_of(20)
    request = h.add("a", prompt, fetch=5)
    h.run()
    assert len(h.of(Reserved, request)[0].blocks) == 4


def test_a_prefix_that_a_writer_may_still_reach_is_quarantined_and_the_request_goes_on_with_other_blocks() -> None:
    h, prompt = Harness(blocks=12), prompt_of(22)
    request = h.add("a", prompt, fetch=5)
    h.run()
    left = {block.index for block in h.of(Reserved, request)[0].blocks}
    h.engine.handle(DropPrefix(request))
    assert h.pool.counts().quarantined == 5
    h.run()
    assert h.tokens[request] == continuation(prompt, 5)
    assert not left & set(h.pool._cached), "computed into blocks that may still be written"
    h.engine.handle(FreeQuarantined(request))
    assert h.idle()


def test_where_no_other_blocks_are_left_it_waits_for_those_in_quarantine() -> None:
    h, prompt = Harness(blocks=8), prompt_of(22)
    request = h.add("a", prompt, fetch=5)
    h.run()
    h.engine.handle(DropPrefix(request))
    h.run()
    assert request not in h.ended
    assert not h.tokens[request]
    h.engine.handle(FreeQuarantined(request))
    h.run()
    assert h.tokens[request] == continuation(prompt, 5)
    assert len(h.of(Reserved, request)) == 1, "a fetch is tried once"


def test_an_abort_while_a_prefix_lands_quarantines_what_lands_and_frees_the_rest() -> None:
    h = Harness()
    request = h.add("a", prompt_of(22), fetch=3)
    h.run()
    h.engine.handle(Abort(request, EndReason.DEADLINE, "too late"))
    h.take_events()
    assert h.ended[request].reason is EndReason.DEADLINE
    counts = h.pool.counts()
    assert (counts.quarantined, counts.active) == (3, 0)
    h.engine.handle(CommitPrefix(request, 3))  # too late, and changes nothing
    h.engine.handle(FreeQuarantined(request))
    assert h.idle()


def test_a_prefill_offers_when_its_own_prefix_has_come() -> None:
    h, prompt = Harness(), prompt_of(22)
    request = h.add("a", prompt, task=Task.PREFILL, fetch=4)
    h.run()
    assert not h.of(Offered, request)
    land_prefix(h, request, prompt, 4)
    h.engine.handle(CommitPrefix(request, 4))
    h.run()
    assert [len(offered.blocks) for offered in h.of(Offered, request)] == [6]
    assert [sealed.end for sealed in h.of(Sealed, request)] == [4, 6]
    assert h.tokens[request] == [next_token(prompt)]
    h.engine.handle(ReleaseOffer(request))
    assert h.idle()


def test_cached_blocks_are_lent_by_name_from_the_first_on_and_held_until_released() -> None:
    h, prompt = Harness(blocks=8), prompt_of(22)
    h.add("a", prompt, count=1)
    h.run()
    peer, names = AttemptId("peer", 1), block_hashes(ROOT, prompt, BLOCK)
    h.engine.handle(Lend(peer, (*names[:3], bytes(32), *names[3:])))  # type: ignore[arg-type]  # nobody's name
    h.take_events()
    lent = h.of(Lent, peer)[0].blocks
    assert [block.hash for block in lent] == names[:3]
    assert h.pool.counts().offered == 3
    other = h.add("b", prompt_of(22, seed=1), count=2)  # takes 6 of 8 blocks
    h.run()
    assert other not in h.ended, "it would have to take what is lent"
    h.engine.handle(ReleaseOffer(peer))
    h.run()
    assert h.tokens[other] == continuation(prompt_of(22, seed=1), 2)
    assert h.idle()


def test_nothing_is_held_for_what_is_not_here_or_is_lent_already() -> None:
    h, prompt = Harness(), prompt_of(22)
    h.add("a", prompt, count=1)
    h.run()
    names = tuple(block_hashes(ROOT, prompt, BLOCK))
    strange = tuple(block_hashes(root_hash(b"model", salt=b"another tenant"), prompt, BLOCK))
    for peer, asked in (("x", strange), ("y", names), ("y", names)):
        h.engine.handle(Lend(AttemptId(peer, 1), asked))
    h.take_events()
    assert [len(event.blocks) for event in h.events if isinstance(event, Lent)] == [0, 5, 0]
    assert h.pool.counts().offered == 5
    h.engine.handle(ReleaseOffer(AttemptId("y", 1)))
    assert h.idle()


def test_a_stream_that_moves_offers_what_it_has_filled_and_goes_on_from_there() -> None:
    h, prompt = Harness(), prompt_of(22)
    request = h.add("a", prompt, count=20)
    for _ in range(8):
        h.step()
    said = len(h.tokens[request])
    h.engine.handle(MoveAway(request))
    h.run()
    assert h.ended[request].reason is EndReason.MOVED
    offered = h.of(Offered, request)[0]
    known = prompt + h.tokens[request]
    assert said == len(h.tokens[request]), "a token that was under way is drawn again elsewhere"
    assert len(offered.blocks) == (len(known) - 1) // BLOCK
    assert offered.num_tokens == len(offered.blocks) * BLOCK
    assert [block.hash for block in offered.blocks] == block_hashes(ROOT, known, BLOCK)[: len(offered.blocks)]
    kept = [h.runner.kv[block.index] for block in offered.blocks]
    assert [kept[p // BLOCK][p % BLOCK] for p in range(offered.num_tokens)] == known[: offered.num_tokens]
    assert h.pool.counts().offered == len(offered.blocks)
    h.engine.handle(ReleaseOffer(request))
    assert h.idle()


def test_one_that_has_computed_nothing_moves_with_nothing() -> None:
    h = Harness(seqs=1)
    running = h.add("a", prompt_of(22), count=20)
    waiting = h.add("b", prompt_of(22, seed=1))
    fetching = h.add("c", prompt_of(22, seed=2), fetch=3)
    h.step()
    for request in (waiting, fetching):
        h.engine.handle(MoveAway(request))
    h.run()
    assert {h.ended[r].reason for r in (waiting, fetching)} == {EndReason.MOVED}
    assert not h.of(Offered, waiting) + h.of(Offered, fetching)
    assert h.tokens[running] == continuation(prompt_of(22), 20)
    assert h.idle()


def test_one_whose_prefix_lands_moves_with_nothing_and_leaves_what_may_be_written() -> None:
    h = Harness()
    request = h.add("a", prompt_of(22), fetch=3)
    h.run()
    h.engine.handle(MoveAway(request))
    h.take_events()
    assert h.ended[request].reason is EndReason.MOVED
    assert h.pool.counts().quarantined == 3
    h.engine.handle(FreeQuarantined(request))
    assert h.idle()
