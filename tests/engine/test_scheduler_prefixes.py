"""The scheduler shares prefixes: what is cached is hit, and what is under way is waited for."""

from __future__ import annotations

import pytest

from baton.hashing import block_hashes
from engine.messages import (
    Abort,
    EndReason,
    Tokens,
)
from engine.plan import MoveKind
from tests.engine.scheduler_harness import BLOCK, ROOT, Harness, prompt_of
from tests.engine.scripted_runner import continuation

pytestmark = pytest.mark.usefixtures("steps")


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
