"""Names blocks by content: a chained hash over everything that a block's KV depends on.

The hash of block i is SHA-256 over the hash of block i-1, then the block's token ids as little-endian uint32.
The root, which stands before block 0, is SHA-256 over a fixed seed and the three extras: the model's
fingerprint, the adapter and the tenant's salt. So two blocks have one name only if the same model, adapter
and tenant saw the same tokens from the first on; nobody can make two different blocks share a name.

Torch-free: router and engine use the same functions.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from sys import byteorder

from baton.ids import BlockHash

_SEED = b"baton.block.v1"
HASH_BYTES = 32


def root_hash(model_fingerprint: bytes, *, adapter: str = "", salt: bytes = b"") -> BlockHash:
    """What block 0 is chained to. Its length precedes each part, so parts cannot run into each other."""
    digest = hashlib.sha256(_SEED)
    for part in (model_fingerprint, adapter.encode(), salt):
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return BlockHash(digest.digest())


def chain_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of the block behind `parent` that holds `token_ids`: a full block, or a prompt's last, part full."""
    packed = array("I", token_ids)
    if byteorder == "big":
        packed.byteswap()
    return BlockHash(hashlib.sha256(parent + packed.tobytes()).digest())


def block_hashes(
    root: BlockHash, token_ids: Sequence[int], block_size: int, *, partial: bool = False
) -> list[BlockHash]:
    """Hashes of all full blocks of `token_ids`, and with `partial` of the part full one behind them."""
    hashes: list[BlockHash] = []
    parent = root
    end = len(token_ids) if partial else len(token_ids) - len(token_ids) % block_size
    for start in range(0, end, block_size):
        parent = chain_hash(parent, token_ids[start : min(start + block_size, end)])
        hashes.append(parent)
    return hashes
