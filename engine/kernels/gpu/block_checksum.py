"""The 64-bit checksum that GPUs compute while they copy a block, and its reference in numpy. Knows no triton."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PAIR_BYTES = 8
# Of keys: Philox's Weyl increments. One starts the other's sequence, lest key(2 j + 1) be twice key(j) every now and
# then: mixing by shifts and products nearly keeps a factor of 2. The multipliers and shifts of the mixers are those of
# MurmurHash3's finalisers (Appleby, public domain), of 32 bits cut short and of 64 bits whole.
FIRST, WEYL = 0xBB67AE85, 0x9E3779B9
KEY_MULTIPLIER = 0x85EBCA6B
LENGTH_MULTIPLIER = 0x9E3779B97F4A7C15
FINAL_MULTIPLIERS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


def block_checksum_reference(data: bytes | bytearray | memoryview) -> int:
    """An unsigned 64-bit checksum of a block, which guards against mishaps, not against forgery.

    NH (Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message Authentication", CRYPTO 1999) with
    keys that are fixed by the position. The data are n bytes, a multiple of 8: 32-bit words w_0, w_1, ..., little
    endian. All of it is unsigned.

        key(j)  = y ^ (y >> 13)   with  y = KEY_MULTIPLIER * (x ^ (x >> 16)) mod 2^32,
                                        x = FIRST + WEYL * j mod 2^32
        sum     = over all i:  ((w_2i + key(2i)) mod 2^32) * ((w_2i+1 + key(2i+1)) mod 2^32)   mod 2^64
        result  = mix(sum ^ (LENGTH_MULTIPLIER * n mod 2^64))
        mix(h)  : h ^= h >> 33, h *= FINAL_MULTIPLIERS[0], h ^= h >> 33, h *= FINAL_MULTIPLIERS[1], h ^= h >> 33

    A sum over pairs may be taken in any order and in parts: pairs in vector lanes, parts in threads or in programs of a
    GPU. The mixer maps different sums to different results, so two blocks of a length agree only where their sums do.
    One changed word always changes the sum, except where the other word of its pair meets its own key's negative.

    Raises ValueError where the length is no multiple of 8.
    """
    size = memoryview(data).nbytes
    if size % PAIR_BYTES:
        raise ValueError(f"{size} bytes: the checksum is of multiples of {PAIR_BYTES} bytes")
    words = np.frombuffer(data, dtype="<u4")
    keyed = (words + keys(len(words))).reshape(-1, 2).astype(np.uint64)
    total = int(np.sum(keyed[:, 0] * keyed[:, 1], dtype=np.uint64))
    return _mix(total ^ LENGTH_MULTIPLIER * size & _ALL)


def keys(count: int) -> npt.NDArray[np.uint32]:
    """The first `count` keys."""
    x = np.arange(count, dtype=np.uint32) * np.uint32(WEYL) + np.uint32(FIRST)
    y = (x ^ x >> np.uint32(16)) * np.uint32(KEY_MULTIPLIER)
    return y ^ y >> np.uint32(13)


_ALL = 2**64 - 1


def _mix(h: int) -> int:
    for multiplier in FINAL_MULTIPLIERS:
        h = (h ^ h >> 33) * multiplier & _ALL
    return h ^ h >> 33
