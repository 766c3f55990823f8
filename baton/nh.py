"""NH, the block checksum that devices compute: what it is. numpy's is kvtransfer/nh.py, the GPUs' is
engine/kernels/gpu/blocks.py.

An unsigned 64-bit number, which guards against mishaps, not against forgery.

NH (Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC: Fast and Secure Message Authentication", CRYPTO 1999) with keys
that are fixed by the position. The data are n bytes, a multiple of 8: 32-bit words w_0, w_1, ..., little endian. All
of it is unsigned.

    key(j)  = y ^ (y >> 13)   with  y = KEY_MULTIPLIER * (x ^ (x >> 16)) mod 2^32,
                                    x = FIRST + WEYL * j mod 2^32
    sum     = over all i:  ((w_2i + key(2i)) mod 2^32) * ((w_2i+1 + key(2i+1)) mod 2^32)   mod 2^64
    result  = mix(sum ^ (LENGTH_MULTIPLIER * n mod 2^64))
    mix(h)  : h ^= h >> 33, h *= FINAL_MULTIPLIERS[0], h ^= h >> 33, h *= FINAL_MULTIPLIERS[1], h ^= h >> 33

A sum over pairs may be taken in any order and in parts: pairs in vector lanes, parts in threads or in programs of a
GPU. The mixer maps different sums to different results, so two blocks of a length agree only where their sums do. One
changed word always changes the sum, except where the other word of its pair meets its own key's negative.
"""

PAIR_BYTES = 8
# Of keys: Philox's Weyl increments. One starts the other's sequence, lest key(2 j + 1) be twice key(j) every now and
# then: mixing by shifts and products nearly keeps a factor of 2. The multipliers and shifts of the mixers are those of
# MurmurHash3's finalisers (Appleby, public domain), of 32 bits cut short and of 64 bits whole.
FIRST, WEYL = 0xBB67AE85, 0x9E3779B9
KEY_MULTIPLIER = 0x85EBCA6B
LENGTH_MULTIPLIER = 0x9E3779B97F4A7C15
FINAL_MULTIPLIERS = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)
