"""Names for things. Each is one word, the same in code, proto, metrics and docs (docs/glossary.md)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple, NewType

TokenId = NewType("TokenId", int)
BlockIndex = NewType("BlockIndex", int)
"""Place of a block in one worker's pool."""
Generation = NewType("Generation", int)
"""How often a block of the pool has been allocated: tells its present use from earlier ones."""
BlockHash = NewType("BlockHash", bytes)
"""32 bytes that name a block by everything its KV depends on (baton.hashing)."""
WorkerId = NewType("WorkerId", str)
Incarnation = NewType("Incarnation", int)
"""New at every start of a process: messages from before a restart are strangers."""
TransferId = NewType("TransferId", bytes)
"""16 random bytes. Who knows them may pull the set, so they appear in no log."""


class AttemptId(NamedTuple):
    """A try at a request. A higher attempt makes the lower ones strangers."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


@dataclass(frozen=True, slots=True)
class BlockRef:
    """One use of one block of a pool."""

    index: BlockIndex
    generation: Generation
    hash: BlockHash


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(63) | 1)  # never 0, which is what an unset field reads as


def new_transfer_id() -> TransferId:
    return TransferId(secrets.token_bytes(16))


def new_request_id() -> str:
    return f"req-{secrets.token_hex(8)}"
