from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.ids import BlockHash
from discovery.keys import block_name
from discovery.mirror import BlockMirror
from tests.discovery.makers import block, blocks, names


class PrefixTree(RuleBasedStateMachine):
    """An engine that seals parents first and evicts children first, and a Redis that applies or loses batches."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = BlockMirror(max_blocks=1000)
        self.held: list[int] = []  # node 0 is the root; the parent of n is (n - 1) // 2
        self.published: set[bytes] = set()

    @rule(node=st.integers(0, 30))
    def store_path(self, node: int) -> None:
        path = [node]
        while path[0] > 0:
            path.insert(0, (path[0] - 1) // 2)
        self.mirror.stored([block(n) for n in path])
        self.held += [n for n in path if n not in self.held]

    @rule(pick=st.randoms(use_true_random=False))
    def evict_a_leaf(self, pick: random.Random) -> None:
        leaves = [n for n in self.held if not {2 * n + 1, 2 * n + 2} & set(self.held)]
        if leaves:
            leaf = pick.choice(leaves)
            self.held.remove(leaf)
            self.mirror.evicted([block(leaf)])

    @rule(limit=st.integers(1, 8))
    def flush(self, limit: int) -> None:
        batch = self.mirror.take(limit)
        assert len(batch.remove) + len(batch.add) <= limit
        for name in batch.remove:
            self.published.remove(name)
            self.check_closed()
        for name in batch.add:
            assert name not in self.published
            self.published.add(name)
            self.check_closed()

    @rule()
    def lose_everything(self) -> None:
        self.published.clear()
        self.mirror.restart()

    def check_closed(self) -> None:
        for node in range(1, 31):
            if block_name(block(node)) in self.published:
                assert block_name(block((node - 1) // 2)) in self.published, "a child outlived its parent"

    @invariant()
    def counts_agree(self) -> None:
        assert self.mirror.published == len(self.published)
        assert len(self.mirror) == len(self.held)
        assert self.mirror.pending <= len(self.held) + len(self.published)

    def teardown(self) -> None:
        while self.mirror.pending:
            self.flush(5)
        assert self.published == names([block(n) for n in self.held])


TestPrefixTree = PrefixTree.TestCase


def test_a_block_that_came_and_went_unseen_is_never_told() -> None:
    mirror = BlockMirror(max_blocks=10)
    mirror.stored(blocks(3))
    mirror.evicted(blocks(3))
    assert mirror.pending == 0


def test_a_block_that_went_and_came_back_unseen_is_never_told() -> None:
    mirror = BlockMirror(max_blocks=10)
    mirror.stored(blocks(3))
    mirror.take(10)
    mirror.evicted(blocks(3))
    mirror.stored(blocks(3))
    assert mirror.pending == 0
    assert mirror.published == 3


def test_eviction_is_told_leaf_first_even_if_reported_root_first() -> None:
    mirror = BlockMirror(max_blocks=10)
    mirror.stored(blocks(4))
    mirror.take(10)
    mirror.evicted(blocks(4))
    assert mirror.take(2).remove == [block_name(block(3)), block_name(block(2))]


def test_a_block_that_came_back_is_still_told_after_its_children_when_it_goes() -> None:
    mirror = BlockMirror(max_blocks=10)
    mirror.stored(blocks(3))
    mirror.take(10)
    mirror.evicted([block(2), block(1)])
    mirror.stored([block(1)])
    mirror.evicted([block(1)])
    assert mirror.take(1).remove == [block_name(block(2))]


def test_memory_is_bounded_and_overflow_counted() -> None:
    mirror = BlockMirror(max_blocks=100)
    mirror.stored(blocks(1000))
    assert len(mirror) == 100
    assert mirror.pending == 100
    assert mirror.dropped == 900
    mirror.evicted(blocks(50, 100))
    mirror.stored(blocks(2000, 2010))
    assert len(mirror) == 60


@given(rounds=st.integers(1, 50))
def test_churn_while_nobody_listens_does_not_grow_the_queue(rounds: int) -> None:
    mirror = BlockMirror(max_blocks=1000)
    mirror.stored(blocks(20))
    mirror.take(1000)
    for i in range(rounds):
        mirror.evicted(blocks(20))
        mirror.stored(blocks(100 * i, 100 * i + 30))
        mirror.evicted(blocks(100 * i, 100 * i + 30))
        mirror.stored(blocks(20))
    assert mirror.pending == 0


def test_unknown_evictions_and_repeats_are_harmless() -> None:
    mirror = BlockMirror(max_blocks=10)
    mirror.evicted([BlockHash(b"?" * 32)])
    mirror.stored([block(1), block(1)])
    mirror.stored([block(1)])
    assert mirror.take(10).add == [block_name(block(1))]
