"""Which request holds which blocks and swap slots: every take, hold and drop on a request's behalf. Pure bookkeeping.

The scheduler decides when; this file knows how, so that a block's whole life can be read here, in block_pool.py and in
swap.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.hashing import chain_hash
from baton.ids import AttemptId, BlockHash, BlockIndex, BlockRef
from engine.block_pool import BlockPool, Hold
from engine.plan import Move, MoveKind, SwapSlot
from engine.request import Request
from engine.swap import SwapPool


class Holdings:
    def __init__(self, pool: BlockPool, swap: SwapPool, block_size: int) -> None:
        self._pool = pool
        self._swap = swap
        self._block_size = block_size
        self._coming: dict[BlockHash, Request] = {}
        """Full blocks of prompts that are being computed, by whom."""
        self._offered: dict[AttemptId, list[BlockIndex]] = {}
        self._quarantined: dict[AttemptId, list[BlockIndex]] = {}

    # --- blocks of a request that computes

    def reserve(self, request: Request, *, hold: Hold, reusable_tokens: int, growth: int) -> tuple[Move, ...] | None:
        """Blocks for all tokens known: those of a cached prefix of at most `reusable_tokens`, and new ones as `hold`.
        None, and nothing held, where that would leave fewer than `growth` blocks to give out.

        The moves that come with it bring KV into the new blocks: what was swapped out, or a copy of the one cached
        block that the request would have to write to. `moved` is to be called when they are done.
        """
        hits = self._find_prefix(request, reusable_tokens)
        shared = self._find_shared_last(request, hits, reusable_tokens) if hold is Hold.ACTIVE else []
        if not self._fits(request, [*hits, *shared], len(hits), growth):
            shared = []
            if not self._fits(request, hits, len(hits), growth):
                return None
        self._pool.hold([*hits, *shared], Hold.ACTIVE)
        request.blocks = hits + self._pool.take(self._blocks_of(len(request.tokens)) - len(hits), hold)
        request.num_hit_blocks = len(hits)
        request.num_landing_blocks = len(request.blocks) - len(hits) if hold is Hold.LANDING else 0
        request.num_computed = request.num_planned = len(hits) * self._block_size
        if shared:
            self.forget_swapped(request)
        if not request.swapped:
            request.shareable = True  # what is not found is computed here, or lands anew
        if hold is Hold.ACTIVE and request.shareable:
            self._announce(request)
        if shared:
            request.num_planned = reusable_tokens
            return (Move(MoveKind.COPY, shared[0], request.blocks[-1]),)
        return self._swap_in(request)

    def is_coming(self, request: Request, reusable_tokens: int) -> bool:
        """Whether the first block that the request would have to compute is being computed by another."""
        position = len(self._find_prefix(request, reusable_tokens))
        return position < reusable_tokens // self._block_size and request.hashes[position] in self._coming

    def grow(self, request: Request) -> tuple[BlockIndex, ...] | None:
        """Blocks for tokens that came since, or are being drawn; None where the pool has none to give."""
        missing = self._blocks_of(request.num_tokens) - len(request.blocks)
        if missing <= 0:
            return ()
        if missing > self._pool.available:
            return None
        taken = self._pool.take(missing, Hold.ACTIVE)
        request.blocks += taken
        return tuple(taken)

    def computed(self, request: Request, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is there: blocks that it fills can be hit from now on, where they may
        be shared."""
        size = self._block_size
        first, end = request.num_computed // size, num_tokens // size
        request.num_computed = num_tokens
        if first == end:
            return
        request.extend_hashes(num_tokens, size)
        for position in range(first, end):
            if request.shareable:
                tokens = request.tokens[position * size : (position + 1) * size]
                parent = request.blocks[position - 1] if position else None
                self._pool.publish(request.blocks[position], request.hashes[position], tokens, parent)
        self._no_longer_coming(request, request.hashes[first:end])

    def release(self, request: Request) -> None:
        """Ends the request's own hold; what is computed stays cached until the space is needed."""
        self._pool.drop(request.blocks, Hold.ACTIVE)
        self._no_longer_coming(request, request.hashes[request.num_computed // self._block_size :])
        request.blocks = []
        request.num_computed = request.num_planned = 0

    def refs(self, request: Request) -> tuple[BlockRef, ...]:
        """The request's blocks with their generations and hashes; the last block's may be that of a part full one."""
        size = self._block_size
        request.extend_hashes(len(request.tokens), size)
        hashes = list(request.hashes)
        if tail := request.tokens[len(hashes) * size :]:
            hashes.append(chain_hash(request.last_hash, tail))
        return tuple(map(self._pool.ref, request.blocks, hashes))

    def _announce(self, request: Request) -> None:
        if self._pool.is_caching:
            request.extend_hashes(len(request.tokens), self._block_size)
            for block_hash in request.hashes[request.num_hit_blocks :]:
                self._coming.setdefault(block_hash, request)

    def _no_longer_coming(self, request: Request, hashes: Sequence[BlockHash]) -> None:
        for block_hash in hashes:
            if self._coming.get(block_hash) is request:
                del self._coming[block_hash]

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _fits(self, request: Request, held: list[BlockIndex], num_hits: int, growth: int) -> bool:
        missing = self._blocks_of(len(request.tokens)) - num_hits
        return missing + growth <= self._pool.available - self._pool.unheld(held)

    def _find_prefix(self, request: Request, at_most: int) -> list[BlockIndex]:
        request.extend_hashes(at_most, self._block_size)
        hits: list[BlockIndex] = []
        for position in range(at_most // self._block_size):
            block = self._find(request, position)
            if block is None:
                break
            hits.append(block)
        return hits

    def _find(self, request: Request, position: int) -> BlockIndex | None:
        size = self._block_size
        return self._pool.find(request.hashes[position], request.tokens[position * size : (position + 1) * size])

    def _find_shared_last(self, request: Request, hits: list[BlockIndex], reusable_tokens: int) -> list[BlockIndex]:
        """The cached block of the request's last tokens, where all are cached: one has to be computed again to draw
        from, and its KV must not be written to a block that others read."""
        num_blocks, rest = divmod(len(request.tokens), self._block_size)
        if rest or len(hits) != num_blocks - 1 or reusable_tokens != len(request.tokens) - 1:
            return []
        request.extend_hashes(len(request.tokens), self._block_size)
        found = self._find(request, num_blocks - 1)
        return [] if found is None else [found]

    # --- KV that moves within this host

    def can_swap_out(self, request: Request) -> bool:
        return 0 < self._blocks_of(request.num_planned) <= self._swap.available

    def swap_out(self, request: Request) -> tuple[Move, ...]:
        """To be done before the request's blocks are released."""
        assert not request.swapped, f"{request.id} is swapped out twice"
        request.num_swapped = request.num_planned
        request.swapped = self._swap.take(self._blocks_of(request.num_planned))
        return tuple(
            Move(MoveKind.SWAP_OUT, block, slot)
            for block, slot in zip(request.blocks, request.swapped, strict=False)  # the last block may hold nothing yet
        )

    def _swap_in(self, request: Request) -> tuple[Move, ...]:
        """Of what was swapped out: that which is not in the prefix cache anyway."""
        if not request.swapped:
            return ()
        hits = request.num_hit_blocks
        targets = request.blocks[hits : len(request.swapped)]
        self._swap.free(request.swapped[:hits])
        moves = tuple(
            Move(MoveKind.SWAP_IN, slot, block)
            for slot, block in zip(request.swapped[hits:], targets, strict=True)
        )  # fmt: skip
        request.num_planned = max(request.num_planned, request.num_swapped)
        request.swapped, request.num_swapped = [], 0
        return moves

    def forget_swapped(self, request: Request) -> None:
        self._swap.free(request.swapped)
        request.swapped, request.num_swapped = [], 0

    def moved(self, moves: Sequence[Move]) -> None:
        """They are done: what they read is not needed any more. What was swapped out stays its request's."""
        for move in moves:
            if move.kind is MoveKind.COPY:
                self._pool.drop([BlockIndex(move.source)], Hold.ACTIVE)
            elif move.kind is MoveKind.SWAP_IN:
                self._swap.free([SwapSlot(move.source)])

    # --- blocks that another worker may read

    def offer(self, request: Request, num_blocks: int) -> None:
        """The request's first `num_blocks`."""
        self._hold_offered(request.id, request.blocks[:num_blocks])

    def lend(self, request_id: AttemptId, hashes: Sequence[BlockHash]) -> tuple[BlockRef, ...]:
        """Holds those of the named blocks, from the first on, that are here. Empty, and nothing held, where there are
        none, or where the id has an offer already."""
        blocks: list[BlockIndex] = []
        for block_hash in hashes if request_id not in self._offered else ():
            block = self._pool.find_named(block_hash)
            if block is None:
                break
            blocks.append(block)
        if blocks:
            self._hold_offered(request_id, blocks)
        return tuple(map(self._pool.ref, blocks, hashes))

    def has_offer(self, request_id: AttemptId) -> bool:
        return request_id in self._offered

    def _hold_offered(self, request_id: AttemptId, blocks: list[BlockIndex]) -> None:
        self._pool.hold(blocks, Hold.OFFERED)
        self._offered[request_id] = blocks

    def end_offer(self, request_id: AttemptId) -> bool:
        """False: there is no such offer."""
        blocks = self._offered.pop(request_id, None)
        if blocks is not None:
            self._pool.drop(blocks, Hold.OFFERED)
        return blocks is not None

    # --- blocks that a transfer writes

    def expect(self, request: Request, end: int) -> None:
        """Of the request's blocks, those before position `end` that were not found are to be landed in."""
        landing = request.blocks[request.num_hit_blocks : end]
        request.num_landing_blocks = len(landing)
        self._pool.move(landing, Hold.ACTIVE, Hold.LANDING)

    def commit(self, request: Request, num_blocks: int, *, shareable: bool) -> None:
        """What has landed in the blocks before position `num_blocks` is verified: from here on it is as if computed
        here, but that it may not be for others. In the blocks behind nothing will land any more."""
        request.shareable = shareable
        self._pool.move(self._take_landing(request), Hold.LANDING, Hold.ACTIVE)
        request.num_planned = min(num_blocks * self._block_size, len(request.tokens))
        self.computed(request, request.num_planned)

    def drop_landing(self, request: Request, *, in_flight: bool) -> None:
        """What has landed is not wanted. In flight, a writer may still come: the blocks are quarantined. Those behind
        them go with it: a request has no gaps."""
        behind = request.blocks[request.num_hit_blocks + request.num_landing_blocks :]
        landing = self._take_landing(request)
        del request.blocks[request.num_hit_blocks :]
        self._pool.drop(behind, Hold.ACTIVE)
        if in_flight:
            self._pool.move(landing, Hold.LANDING, Hold.QUARANTINED)
            self._quarantined[request.id] = landing
        else:
            self._pool.drop(landing, Hold.LANDING)

    def _take_landing(self, request: Request) -> list[BlockIndex]:
        first = request.num_hit_blocks
        landing = request.blocks[first : first + request.num_landing_blocks]
        request.num_landing_blocks = 0
        return landing

    def end_quarantine(self, request_id: AttemptId) -> bool:
        """False: there is nothing quarantined under this id."""
        blocks = self._quarantined.pop(request_id, None)
        if blocks is not None:
            self._pool.drop(blocks, Hold.QUARANTINED)
        return blocks is not None
