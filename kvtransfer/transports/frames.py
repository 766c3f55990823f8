"""The frames of the tcp transport. Pure: bytes in, values out.

    request   header, then (index, generation) of each wanted block
    reply     header, then a status byte for each wanted block, then the bytes of those that are SENT, then the statuses
              once more

The statuses at the end are looked up after the bytes went out: a block that became another one meanwhile is STALE. All
numbers are little-endian. Every count has a bound, and nothing is allocated for a frame before its header is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from baton.ids import TransferId
from kvtransfer.transports.base import MAX_FETCH_BLOCKS, Want

REQUEST = struct.Struct("<4sHHIQ16s")  # magic, version, zero, count, block_bytes, transfer id
WANTED = struct.Struct("<QQ")  # index, generation
REPLY = struct.Struct("<4sHHI")  # magic, version, reply status, count
_REQUEST_MAGIC = b"BTKQ"
_REPLY_MAGIC = b"BTKR"
_VERSION = 1


class ReplyStatus(IntEnum):
    """What the source says to a request as a whole; blocks follow only an OK."""

    OK = 0
    UNKNOWN_TRANSFER = 1
    MALFORMED = 2


class BlockStatus(IntEnum):
    """The higher of two tells what became of a block."""

    SENT = 0
    STALE = 1
    REFUSED = 2


class FrameError(Exception):
    """Bytes that are no frame. Caught where they came in: the connection ends, nothing else happens."""


class Request(NamedTuple):
    transfer_id: TransferId
    block_bytes: int
    num_blocks: int


def pack_request(transfer_id: TransferId, block_bytes: int, wants: Sequence[Want]) -> bytes:
    head = REQUEST.pack(_REQUEST_MAGIC, _VERSION, 0, len(wants), block_bytes, transfer_id)
    return head + b"".join(WANTED.pack(want.source, want.generation) for want in wants)


def parse_request(header: bytes | bytearray | memoryview) -> Request:
    """Of a request's header, REQUEST.size bytes. Raises FrameError."""
    magic, version, zero, count, block_bytes, transfer_id = REQUEST.unpack(header)
    if magic != _REQUEST_MAGIC or version != _VERSION or zero != 0:
        raise FrameError(f"not a request of version {_VERSION}")
    if not 0 < count <= MAX_FETCH_BLOCKS:
        raise FrameError(f"a request for {count} blocks; between 1 and {MAX_FETCH_BLOCKS} will do")
    return Request(TransferId(transfer_id), block_bytes, count)


def parse_wanted(body: bytes | bytearray | memoryview) -> list[tuple[int, int]]:
    """(index, generation) of each wanted block; `body` holds whole entries."""
    return [(index, generation) for index, generation in WANTED.iter_unpack(body)]


def pack_reply(status: ReplyStatus, count: int) -> bytes:
    return REPLY.pack(_REPLY_MAGIC, _VERSION, status, count)


def parse_reply(header: bytes | bytearray | memoryview, count: int) -> ReplyStatus:
    """Of a reply's header, REPLY.size bytes, to a request for `count` blocks. Raises FrameError."""
    magic, version, status, its_count = REPLY.unpack(header)
    if magic != _REPLY_MAGIC or version != _VERSION:
        raise FrameError(f"not a reply of version {_VERSION}")
    try:
        reply = ReplyStatus(status)
    except ValueError:
        raise FrameError(f"a reply with unknown status {status}") from None
    if its_count != (count if reply is ReplyStatus.OK else 0):
        raise FrameError(f"a reply of {its_count} blocks to a request for {count}")
    return reply


def parse_statuses(data: bytes | bytearray | memoryview) -> list[BlockStatus]:
    """One of each byte. Raises FrameError."""
    try:
        return [BlockStatus(status) for status in data]
    except ValueError:
        raise FrameError("a block with an unknown status") from None
