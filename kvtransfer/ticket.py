"""The ticket: what a source tells of the blocks that it offers, and its form on the wire.

What comes from the network is checked here, field by field, before anything else looks at it. A transfer id is a
secret, so no message and no repr of this file shows one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.errors import TransferRefused
from baton.hashing import HASH_BYTES
from baton.ids import (
    AttemptId,
    BlockHash,
    BlockIndex,
    BlockRef,
    Generation,
    Incarnation,
    TransferId,
    WorkerId,
)
from baton.layout import KVLayout
from baton.nh import PAIR_BYTES
from baton.v1 import transfer_pb2 as pb
from kvtransfer.checksum import ChecksumKind

TRANSFER_ID_BYTES = 16
FINGERPRINT_BYTES = 16
MAX_BLOCKS = 65536
MAX_ADDRESS = 512
MAX_WORKER_ID = 256
MAX_REQUEST_ID = 256
MAX_LEASE_SECONDS = 3600.0
_ON_THE_WIRE = {ChecksumKind.XXH3: pb.CHECKSUM_KIND_XXH3, ChecksumKind.NH: pb.CHECKSUM_KIND_NH}
_FROM_THE_WIRE = {pb.CHECKSUM_KIND_UNSPECIFIED: ChecksumKind.XXH3} | {on: kind for kind, on in _ON_THE_WIRE.items()}


@dataclass(frozen=True, slots=True)
class Ticket:
    """An offer of blocks. Names them before they are full."""

    transfer_id: TransferId = field(repr=False)
    worker_id: WorkerId
    address: str
    """`host:port` of the source's gRPC server."""
    incarnation: Incarnation
    layout: KVLayout
    """Of the source's blocks."""
    blocks: tuple[BlockRef, ...]
    """In the order of the prompt; places and generations are the source's."""
    lease_seconds: float
    num_tokens: int
    id: AttemptId
    checksum_kind: ChecksumKind
    """By which the blocks will be announced."""

    @classmethod
    def from_proto(cls, message: pb.Ticket) -> Ticket:
        """Raises TransferRefused, naming what is wrong and what would be right, or LayoutMismatch: see KVLayout."""
        check_length("transfer_id", message.transfer_id, TRANSFER_ID_BYTES)
        check_length("layout_fingerprint", message.layout_fingerprint, FINGERPRINT_BYTES)
        check_name("worker_id", message.worker_id, MAX_WORKER_ID)
        check_name("request_id", message.request_id, MAX_REQUEST_ID)
        check_name("address", message.address, MAX_ADDRESS)
        host, colon, port = message.address.rpartition(":")
        if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise _wrong("address", repr(message.address), "host:port")
        if not message.incarnation:
            raise _wrong("incarnation", message.incarnation, "the source's, never 0")
        layout = KVLayout.from_proto(message.layout, message.layout_fingerprint)
        lease_seconds = message.lease_ms / 1000
        if not 0 < lease_seconds <= MAX_LEASE_SECONDS:
            raise _wrong("lease", f"{lease_seconds:g} s", f"above 0 and at most {MAX_LEASE_SECONDS:g} s")
        if not 0 < len(message.blocks) <= MAX_BLOCKS:
            raise _wrong("number of blocks", len(message.blocks), f"between 1 and {MAX_BLOCKS}")
        if message.num_tokens < len(message.blocks):
            raise _wrong("num_tokens", message.num_tokens, f"at least one a block, {len(message.blocks)}")
        checksum_kind = _FROM_THE_WIRE.get(message.checksum_kind)
        if checksum_kind is None:
            known = " or ".join(f"{on} ({kind.value})" for kind, on in _ON_THE_WIRE.items())
            raise _wrong("checksum_kind", message.checksum_kind, known)
        if checksum_kind is ChecksumKind.NH and layout.block_bytes % PAIR_BYTES:
            raise _wrong("checksum_kind", "NH", f"XXH3 for blocks of {layout.block_bytes} bytes")
        blocks = tuple(
            BlockRef(BlockIndex(b.index), Generation(b.generation), BlockHash(b.hash)) for b in message.blocks
        )
        for position, block in enumerate(blocks):
            check_length(f"hash of block {position}", block.hash, HASH_BYTES)
        if len({block.index for block in blocks}) != len(blocks):
            raise _wrong("blocks", "a list that names one block twice", "each block once")
        return cls(
            transfer_id=TransferId(message.transfer_id),
            worker_id=WorkerId(message.worker_id),
            address=message.address,
            incarnation=Incarnation(message.incarnation),
            layout=layout,
            blocks=blocks,
            lease_seconds=lease_seconds,
            num_tokens=message.num_tokens,
            id=AttemptId(message.request_id, message.attempt),
            checksum_kind=checksum_kind,
        )

    def to_proto(self) -> pb.Ticket:
        return pb.Ticket(
            transfer_id=self.transfer_id,
            worker_id=self.worker_id,
            address=self.address,
            incarnation=self.incarnation,
            layout_fingerprint=self.layout.fingerprint,
            layout=self.layout.to_proto(),
            blocks=[pb.TicketBlock(index=b.index, generation=b.generation, hash=b.hash) for b in self.blocks],
            lease_ms=to_ms(self.lease_seconds),
            num_tokens=self.num_tokens,
            request_id=self.id.request_id,
            attempt=self.id.attempt,
            checksum_kind=_ON_THE_WIRE[self.checksum_kind],
        )


def to_ms(seconds: float) -> int:
    """A duration for the wire; never 0, which is what an unset field reads as."""
    return max(1, round(seconds * 1000))


def check_length(name: str, value: bytes, right: int) -> None:
    if len(value) != right:
        raise _wrong(name, f"{len(value)} bytes long", f"{right} bytes")


def check_name(name: str, value: str, most: int) -> None:
    if not 0 < len(value) <= most:
        raise _wrong(name, f"{len(value)} characters long", f"between 1 and {most} characters")


def _wrong(name: str, value: object, right: str) -> TransferRefused:
    return TransferRefused(f"malformed: {name} is {value}; it must be {right}")
