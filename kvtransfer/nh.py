"""NH (baton/nh.py) on a host, in numpy: of blocks that no device of ours sums, and for tests of the kernels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from baton.nh import FINAL_MULTIPLIERS, FIRST, KEY_MULTIPLIER, LENGTH_MULTIPLIER, PAIR_BYTES, WEYL

_SIZES = 4
"""Of blocks whose keys are kept. They take as much memory as a block of each, and longer to make than to use."""
_ALL = 2**64 - 1


def nh_checksum(block: bytes | bytearray | memoryview) -> int:
    """Of a whole block. Takes scratch memory of one and a half times its size. Raises ValueError where the length is
    no multiple of 8."""
    size = memoryview(block).nbytes
    if size % PAIR_BYTES:
        raise ValueError(f"{size} bytes: the checksum is of multiples of {PAIR_BYTES} bytes")
    words = np.frombuffer(block, dtype="<u4")
    pairs = (words + keys(len(words))).view("<u8")
    firsts = pairs & np.uint64(2**32 - 1)
    pairs >>= np.uint64(32)
    pairs *= firsts
    total = int(np.sum(pairs, dtype=np.uint64))
    return _mix(total ^ LENGTH_MULTIPLIER * size & _ALL)


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
