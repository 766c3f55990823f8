"""Which request holds which blocks: every take, hold and drop of the pool on a request's behalf. Pure bookkeeping.

The scheduler decides when; this file knows how, so that a block's whole life can be read here and in block_pool.py.
"""

from __future__ import annotations

from baton.hashing import chain_hash
from baton.ids import AttemptId, BlockIndex, BlockRef
from engine.block_pool import BlockPool, Hold
from engine.request import Request


class Holdings:
    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._offered: dict[AttemptId, list[BlockIndex]] = {}
        self._quarantined: dict[AttemptId, list[BlockIndex]] = {}

    # --- blocks of a request that computes

    def reserve(self, request: Request, *, hold: Hold, reusable_tokens: int, growth: int) -> bool:
        """Blocks for all tokens known: those of a cached prefix of at most `reusable_tokens`, and new ones as `hold`.
        False, and nothing held, where that would leave fewer than `growth` blocks to give out."""
        hits = self._find_prefix(request, reusable_tokens)
        missing = -(-len(request.tokens) // self._block_size) - len(hits)
        if missing + growth > self._pool.available - self._pool.unheld(hits):
            return False
        self._pool.hold(hits, Hold.ACTIVE)
        request.blocks = hits + self._pool.take(missing, hold)
        request.num_hit_blocks = len(hits)
        request.num_computed = len(hits) * self._block_size
        return True

    def grow(self, request: Request) -> tuple[BlockIndex, ...] | None:
        """Blocks for tokens that came since; None where the pool has none to give."""
        missing = -(-len(request.tokens) // self._block_size) - len(request.blocks)
        if missing > self._pool.available:
            return None
        taken = self._pool.take(missing, Hold.ACTIVE)
        request.blocks += taken
        return tuple(taken)

    def computed(self, request: Request, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens is there: blocks that it fills can be hit from now on."""
        size = self._block_size
        first = request.num_computed // size
        request.num_computed = num_tokens
        request.extend_hashes(num_tokens, size)
        for position in range(first, num_tokens // size):
            tokens = request.tokens[position * size : (position + 1) * size]
            parent = request.blocks[position - 1] if position else None
            self._pool.publish(request.blocks[position], request.hashes[position], tokens, parent)

    def release(self, request: Request) -> None:
        """Ends the request's own hold; what is computed stays cached until the space is needed."""
        self._pool.drop(request.blocks, Hold.ACTIVE)
        request.blocks = []
        request.num_computed = 0

    def refs(self, request: Request) -> tuple[BlockRef, ...]:
        """The request's blocks with their generations and hashes; the last block's may be that of a part full one."""
        size = self._block_size
        request.extend_hashes(len(request.tokens), size)
        hashes = list(request.hashes)
        if tail := request.tokens[len(hashes) * size :]:
            hashes.append(chain_hash(request.last_hash, tail))
        return tuple(map(self._pool.ref, request.blocks, hashes))

    def _find_prefix(self, request: Request, at_most: int) -> list[BlockIndex]:
        size = self._block_size
        request.extend_hashes(at_most, size)
        hits: list[BlockIndex] = []
        for position, block_hash in enumerate(request.hashes[: at_most // size]):
            block = self._pool.find(block_hash, request.tokens[position * size : (position + 1) * size])
            if block is None:
                break
            hits.append(block)
        return hits

    # --- blocks that another worker may read

    def offer(self, request: Request) -> None:
        self._pool.hold(request.blocks, Hold.OFFERED)
        self._offered[request.id] = list(request.blocks)

    def end_offer(self, request_id: AttemptId) -> bool:
        """False: there is no such offer."""
        blocks = self._offered.pop(request_id, None)
        if blocks is not None:
            self._pool.drop(blocks, Hold.OFFERED)
        return blocks is not None

    # --- blocks that a transfer writes

    def commit(self, request: Request) -> None:
        """What has landed is verified: from here on it is as if computed here."""
        self._pool.move(request.blocks[request.num_hit_blocks :], Hold.LANDING, Hold.ACTIVE)
        self.computed(request, len(request.tokens))

    def drop_landing(self, request: Request, *, in_flight: bool) -> None:
        """What has landed is not wanted. In flight, a writer may still come: the blocks are quarantined."""
        landing = request.blocks[request.num_hit_blocks :]
        del request.blocks[request.num_hit_blocks :]
        if in_flight:
            self._pool.move(landing, Hold.LANDING, Hold.QUARANTINED)
            self._quarantined[request.id] = landing
        else:
            self._pool.drop(landing, Hold.LANDING)

    def end_quarantine(self, request_id: AttemptId) -> bool:
        """False: there is nothing quarantined under this id."""
        blocks = self._quarantined.pop(request_id, None)
        if blocks is not None:
            self._pool.drop(blocks, Hold.QUARANTINED)
        return blocks is not None
