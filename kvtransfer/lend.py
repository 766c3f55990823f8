"""Blocks asked for by name: the request as it is checked, and whoever answers it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from baton.errors import TransferRefused
from baton.hashing import HASH_BYTES
from baton.ids import AttemptId, BlockHash, WorkerId
from baton.v1 import transfer_pb2 as pb
from kvtransfer.refusal import Refusal, RefusalReason
from kvtransfer.ticket import (
    FINGERPRINT_BYTES,
    MAX_BLOCKS,
    MAX_REQUEST_ID,
    MAX_WORKER_ID,
    Ticket,
    check_length,
    check_name,
)


@dataclass(frozen=True, slots=True)
class LendRequest:
    """See `LendRequest` in transfer.proto."""

    incarnation: int
    id: AttemptId
    layout_fingerprint: bytes
    worker_id: WorkerId
    hashes: tuple[BlockHash, ...]

    @classmethod
    def from_proto(cls, message: pb.LendRequest) -> LendRequest:
        """Raises Refusal(MALFORMED), naming what is wrong."""
        try:
            check_length("layout_fingerprint", message.layout_fingerprint, FINGERPRINT_BYTES)
            check_name("request_id", message.request_id, MAX_REQUEST_ID)
            check_name("worker_id", message.worker_id, MAX_WORKER_ID)
            if not 0 < len(message.hashes) <= MAX_BLOCKS:
                raise TransferRefused(f"{len(message.hashes)} blocks are asked for; 1 to {MAX_BLOCKS} may be")
            for position, block_hash in enumerate(message.hashes):
                check_length(f"hash of block {position}", block_hash, HASH_BYTES)
            if len(set(message.hashes)) != len(message.hashes):
                raise TransferRefused("a block is asked for twice; each may be once")
        except TransferRefused as error:
            raise Refusal(RefusalReason.MALFORMED, error.message) from None
        return cls(
            incarnation=message.incarnation,
            id=AttemptId(message.request_id, message.attempt),
            layout_fingerprint=message.layout_fingerprint,
            worker_id=WorkerId(message.worker_id),
            hashes=tuple(map(BlockHash, message.hashes)),
        )


Lender = Callable[[LendRequest], Awaitable[Ticket]]
"""Offers those of the blocks, from the first on, that are here. Raises Refusal."""


async def lend_nothing(request: LendRequest) -> Ticket:
    """For a source without a cache."""
    raise Refusal(RefusalReason.NOT_HELD, "this source lends nothing")
