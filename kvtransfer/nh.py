"""NH (baton/nh.py) on a host, in numpy: of blocks that no device of ours sums, and for tests of the kernels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from baton.nh import FINAL_MULTIPLIERS, FIRST, KEY_MULTIPLIER, LENGTH_MULTIPLIER, PAIR_BYTES, WEYL

_SIZES = 4
"""Of blocks whose keys are kept. They take as much memory as a block of each, and longer to make than to use."""
_PIECE_WORDS = 1 << 16
"""At a time: what is made of them stays in a cache, and in memory that was touched before."""
_ALL = 2**64 - 1
_FIRST_OF_PAIR, _TO_SECOND = np.uint64(2**32 - 1), np.uint64(32)


def nh_checksum(block: bytes | bytearray | memoryview) -> int:
    """Of a whole block. Raises ValueError where the length is no multiple of 8."""
    size = memoryview(block).nbytes
    if size % PAIR_BYTES:
        raise ValueError(f"{size} bytes: the checksum is of multiples of {PAIR_BYTES} bytes")
    words, total = np.frombuffer(block, dtype="<u4"), 0
    its_keys = keys(len(words))
    keyed = np.empty(min(len(words), _PIECE_WORDS), dtype="<u4")
    firsts = np.empty(len(keyed) // 2, dtype="<u8")
    for start in range(0, len(words), _PIECE_WORDS):
        piece = words[start : start + _PIECE_WORDS]
        pairs = np.add(piece, its_keys[start : start + _PIECE_WORDS], out=keyed[: len(piece)]).view("<u8")
        first = np.bitwise_and(pairs, _FIRST_OF_PAIR, out=firsts[: len(pairs)])
        pairs >>= _TO_SECOND
        pairs *= first
        total += int(np.sum(pairs))
    return _mix(total & _ALL ^ LENGTH_MULTIPLIER * size & _ALL)


@lru_cache(maxsize=_SIZES)
def keys(count: int) -> npt.NDArray[np.uint32]:
    """The first `count` keys. Kept for the next block of this size: not to be changed."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(WEYL) + np.uint32(FIRST)
    y = (x ^ x >> np.uint32(16)) * np.uint32(KEY_MULTIPLIER)
    made = y ^ y >> np.uint32(13)
    made.flags.writeable = False
    return made


def _mix(h: int) -> int:
    for multiplier in FINAL_MULTIPLIERS:
        h = (h ^ h >> 33) * multiplier & _ALL
    return h ^ h >> 33
