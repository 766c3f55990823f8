"""A worker's own account of the blocks that it holds, and what of it Redis has not been told yet.

Pure data, no I/O. What is pending is the difference between what is held and what is published, so it cannot grow
beyond their sizes, however long Redis is away and however often blocks come and go.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from baton.ids import BlockHash
from discovery.keys import block_name


@dataclass(frozen=True, slots=True)
class Batch:
    """One round trip's worth. Told in this order, what is published stays prefix-closed at every moment."""

    remove: list[bytes]
    """Leaf first."""
    add: list[bytes]
    """Root first."""


class BlockMirror:
    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._held: dict[bytes, int] = {}  # name -> when it was first told of; parents stand before their children
        self._add: dict[bytes, None] = {}
        self._remove: dict[bytes, int] = {}
        self._next = 0
        self.published = 0
        """Size of the published set once every batch that was taken has arrived."""
        self.dropped = 0
        """Blocks not taken in because `max_blocks` were held."""

    def __len__(self) -> int:
        return len(self._held)

    @property
    def pending(self) -> int:
        return len(self._add) + len(self._remove)

    def stored(self, hashes: Iterable[BlockHash]) -> None:
        """Blocks that are held from now on, parents before children."""
        for block_hash in hashes:
            name = block_name(block_hash)
            if name in self._held:
                continue
            if len(self._held) >= self._max_blocks:
                self.dropped += 1
                continue
            came = self._remove.pop(name, None)
            if came is None:
                self._add[name] = None
                came, self._next = self._next, self._next + 1
            # Else it is published still, and so may its children be: it keeps its place before them.
            self._held[name] = came

    def evicted(self, hashes: Iterable[BlockHash]) -> None:
        """Blocks that are held no more."""
        for block_hash in hashes:
            name = block_name(block_hash)
            came = self._held.pop(name, None)
            if came is None:
                continue
            if name in self._add:
                del self._add[name]
            else:
                self._remove[name] = came

    def take(self, limit: int) -> Batch:
        """At most `limit` pending changes, no longer pending. If they may not have arrived, call `restart`."""
        # What came last goes first: children come after their parents, so leaves go before them.
        removals = heapq.nlargest(limit, self._remove, key=self._remove.__getitem__)
        for name in removals:
            del self._remove[name]
        additions = list(islice(self._add, limit - len(removals)))
        for name in additions:
            del self._add[name]
        self.published += len(additions) - len(removals)
        return Batch(removals, additions)

    def restart(self) -> None:
        """Nothing is published: all that is held is pending again."""
        self._add = dict.fromkeys(self._held)
        self._remove.clear()
        self.published = 0
