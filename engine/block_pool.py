"""Owns which block of the pool is whose. Pure bookkeeping: no torch, no bytes, no network.

A block is *held* for a reason, by any number of holders; without a hold it is CACHED where it has a name that can be
hit, else FREE. A block that is taken gets a new generation, which tells its present use from earlier ones.

    FREE ──take──► held (ACTIVE | OFFERED | LANDING | QUARANTINED) ──drop──► CACHED or FREE
    CACHED ──hold──► ACTIVE                  CACHED ──take, least recently used first──► held

Names stay prefix-closed: a parent is published before its children and evicted after them, because holders hold
whole chains from the root and drop them from the tail.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Protocol

from baton.errors import InternalError
from baton.ids import BlockHash, BlockIndex, BlockRef, Generation
from engine.messages import BlockCounts, BlocksEvicted, BlocksStored


class Hold(IntEnum):
    """Why a block is kept. A block with several kinds of hold counts for the metrics as the last of them here."""

    OFFERED = 0
    """Another worker may read it."""
    ACTIVE = 1
    """A request here reads or writes it."""
    LANDING = 2
    """A transfer writes it; nobody may read it."""
    QUARANTINED = 3
    """A transfer that is over may still write it; nobody may read it."""


_HOLDS = tuple(Hold)
_LAST_FIRST = tuple(reversed(Hold))  # made once: iterating over an Enum is slow


class Generations(Protocol):
    """A counter a block: a list, or memory that other processes watch."""

    def __getitem__(self, block: int, /) -> int: ...

    def __setitem__(self, block: int, generation: int, /) -> None: ...


class BlockPool:
    def __init__(
        self,
        num_blocks: int,
        *,
        enable_prefix_caching: bool = True,
        generations: Generations | None = None,
        on_take: Callable[[BlockIndex], None] | None = None,
    ) -> None:
        """`generations` is written on every take, so that others can watch it through shared memory. `on_take` is told
        of each block whose old content is void, before its new holder sees it."""
        self.num_blocks = num_blocks
        self._caching = enable_prefix_caching
        self._generations: Generations = [0] * num_blocks if generations is None else generations
        self._on_take = on_take
        self._free: deque[BlockIndex] = deque(BlockIndex(i) for i in range(num_blocks))
        self._cached: OrderedDict[BlockIndex, None] = OrderedDict()  # least recently used first
        self._holds: tuple[list[int], ...] = tuple([0] * num_blocks for _ in _HOLDS)
        self._held_as = [0] * len(_HOLDS)  # blocks by the state they count as
        self._by_hash: dict[BlockHash, BlockIndex] = {}
        self._names: list[tuple[BlockHash, tuple[int, ...]] | None] = [None] * num_blocks
        self._events: list[tuple[type[BlocksStored | BlocksEvicted], list[BlockHash]]] = []

    # --- what there is

    @property
    def is_caching(self) -> bool:
        """Whether blocks that nobody holds can still be hit."""
        return self._caching

    @property
    def available(self) -> int:
        """Blocks that `take` could give out."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        held = self._held_as
        return BlockCounts(
            free=len(self._free),
            cached=len(self._cached),
            active=held[Hold.ACTIVE],
            offered=held[Hold.OFFERED],
            landing=held[Hold.LANDING],
            quarantined=held[Hold.QUARANTINED],
        )

    def unheld(self, blocks: Iterable[BlockIndex]) -> int:
        """How many of these, all of them named, only stay as long as their space is not needed."""
        return sum(block in self._cached for block in blocks)

    def ref(self, block: BlockIndex, block_hash: BlockHash) -> BlockRef:
        return BlockRef(block, Generation(self._generations[block]), block_hash)

    def find(self, block_hash: BlockHash, token_ids: Sequence[int]) -> BlockIndex | None:
        """The block of that name, if its tokens are really these."""
        block = self._by_hash.get(block_hash)
        if block is None:
            return None
        name = self._names[block]
        if name is None or name[0] != block_hash:
            raise InternalError(f"block {block} is listed under a name it does not bear")
        return block if name[1] == tuple(token_ids) else None

    def find_named(self, block_hash: BlockHash) -> BlockIndex | None:
        """The block of that name, for one who knows its tokens by the name alone."""
        return self._by_hash.get(block_hash)

    # --- holds

    def take(self, count: int, hold: Hold) -> list[BlockIndex]:
        """`count` blocks of void content; evicts cached ones where no free ones are left."""
        if count > self.available:
            raise InternalError(f"{count} blocks taken of {self.available} available")
        taken = [self._free.popleft() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._generations[block] += 1
            if self._on_take is not None:
                self._on_take(block)
            self._holds[hold][block] = 1
        self._held_as[hold] += count
        return taken

    def hold(self, blocks: Iterable[BlockIndex], hold: Hold) -> None:
        for block in blocks:
            before = self._state(block)
            if before is None and block not in self._cached:
                raise InternalError(f"block {block} is free and cannot be held")
            self._holds[hold][block] += 1
            self._account(block, before)

    def drop(self, blocks: Sequence[BlockIndex], hold: Hold) -> None:
        """Ends one hold of each; the last ones are let go first, so that leaves are evicted before their parents."""
        for block in reversed(blocks):
            before = self._state(block)
            if self._holds[hold][block] == 0:
                raise InternalError(f"block {block} has no {hold.name} hold to drop")
            self._holds[hold][block] -= 1
            self._account(block, before)

    def move(self, blocks: Sequence[BlockIndex], source: Hold, target: Hold) -> None:
        self.hold(blocks, target)
        self.drop(blocks, source)

    # --- names

    def publish(
        self, block: BlockIndex, block_hash: BlockHash, token_ids: Sequence[int], parent: BlockIndex | None
    ) -> None:
        """Makes a full block, held by its caller like its `parent` before it, findable.

        Of two blocks of one content one has the name: where nobody holds the other, it moves to this one and the other
        is freed, else this one stays nameless. A block whose parent is nameless stays so too: a name is never left
        behind by the names before it.
        """
        if not self._caching or self._names[block] is not None:
            return
        if parent is not None and self._names[parent] is None:
            return
        twin = self._by_hash.get(block_hash)
        if twin is None:
            self._note(BlocksStored, block_hash)
        elif twin in self._cached:
            del self._cached[twin]
            self._names[twin] = None
            self._free.append(twin)
        else:
            return
        self._by_hash[block_hash] = block
        self._names[block] = (block_hash, tuple(token_ids))

    def drain_events(self) -> list[BlocksStored | BlocksEvicted]:
        """What has become findable, and no longer so, since the last call; in order."""
        events, self._events = self._events, []
        return [kind(tuple(hashes)) for kind, hashes in events]

    def _evict(self) -> BlockIndex:
        block, _ = self._cached.popitem(last=False)
        name = self._names[block]
        assert name is not None, "cached blocks have names"
        self._names[block] = None
        del self._by_hash[name[0]]
        self._note(BlocksEvicted, name[0])
        return block

    def _note(self, kind: type[BlocksStored | BlocksEvicted], block_hash: BlockHash) -> None:
        if self._events and self._events[-1][0] is kind:
            self._events[-1][1].append(block_hash)
        else:
            self._events.append((kind, [block_hash]))

    # --- states

    def _state(self, block: BlockIndex) -> Hold | None:
        for hold in _LAST_FIRST:
            if self._holds[hold][block]:
                return hold
        return None

    def _account(self, block: BlockIndex, before: Hold | None) -> None:
        after = self._state(block)
        if after == before:
            return
        if before is None:
            del self._cached[block]
        else:
            self._held_as[before] -= 1
        if after is not None:
            self._held_as[after] += 1
        elif self._names[block] is not None:
            self._cached[block] = None
        else:
            self._free.append(block)
