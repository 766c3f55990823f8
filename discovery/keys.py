"""Every key name that Baton uses in Redis. No other file spells one.

    {ns}:worker:ID               string   the worker's record, JSON; lives three heartbeats
    {ns}:workers                 set      ids of all workers; those without a record are dropped by who reads it
    {ns}:blocks:ID:INCARNATION   set      names of the blocks that the worker holds; lives three heartbeats
    {ns}:epoch                   string   a random word; another one, or none, means that Redis lost its data

The braces are Redis Cluster's hash tag: all keys of a system are in one slot, so that a script may touch several
of them there, too. Nothing is lost by it: a system's whole directory is some megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from baton.errors import ConfigError
from baton.ids import BlockHash, Incarnation, WorkerId

BLOCK_NAME_BYTES = 16
_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Keys:
    """The keys of one system. Raises ConfigError for a namespace that would not do in a key."""

    def __init__(self, namespace: str) -> None:
        if not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(
                f"namespace is {namespace!r}; it must be 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'"
            )
        self._prefix = f"{{{namespace}}}"
        self.workers = f"{self._prefix}:workers"
        self.epoch = f"{self._prefix}:epoch"
        self.worker_prefix = f"{self._prefix}:worker:"
        """What stands before the id in `worker`."""

    def worker(self, worker: WorkerId) -> str:
        return f"{self.worker_prefix}{worker}"

    def blocks(self, worker: WorkerId, incarnation: Incarnation) -> str:
        return f"{self._prefix}:blocks:{worker}:{incarnation}"


def block_name(block_hash: BlockHash) -> bytes:
    """The first 16 of the hash's 32 bytes: what stands for a block in Redis, at half the memory.

    Safe because it is a hint. Two blocks of one name are not to be met by chance (2^-64 for four billion blocks),
    and whoever makes some on purpose gains a request placed where its prefix is not cached: the worker compares
    full hashes and token ids before it uses a block.
    """
    return block_hash[:BLOCK_NAME_BYTES]


def joined_names(block_hashes: Iterable[BlockHash]) -> bytes:
    """Names one behind the other, 16 bytes each: one argument to a script, however many there are."""
    return b"".join([block_hash[:BLOCK_NAME_BYTES] for block_hash in block_hashes])
