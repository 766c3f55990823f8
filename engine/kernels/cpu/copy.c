/* Copies a block and takes its checksum in the same pass over memory.
 *
 * The checksum is XXH3 of 64 bits, seed 0, of inputs longer than 240 bytes, as its specification has it
 * (https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md); kvtransfer takes it of blocks with a library. Eight
 * sums go over stripes of 64 bytes, with a key that moves on by 8 bytes a stripe, and are mixed behind every 16th.
 *
 * Whole cache lines are written past the caches: a block that has landed is read later, and to write it through them
 * would first fetch from memory what it overwrites, a third of all the traffic.
 */

#include "common.h"

enum { STRIPE = 64, STRIPES = 16, MIX_KEY = 128, LAST_KEY = 121, MERGE_KEY = 11, LEAST = 241, AHEAD = 1024 };

static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5, LAST_MIX = 0x165667919E3779F9;

/* The specification's default secret. */
static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

INLINE uint64_t word(const uint8_t *bytes) {
    uint64_t value;
    memcpy(&value, bytes, 8); /* little-endian, as all machines are that we know */
    return value;
}

INLINE void add_generic(uint64_t *sums, const uint8_t *data, const uint8_t *key) {
    for (int i = 0; i < 8; i++) {
        uint64_t value = word(data + 8 * i), keyed = value ^ word(key + 8 * i);
        sums[i ^ 1] += value;
        sums[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
}

INLINE void mix_generic(uint64_t *sums) {
    for (int i = 0; i < 8; i++) sums[i] = (sums[i] ^ sums[i] >> 47 ^ word(SECRET + MIX_KEY + 8 * i)) * PRIME32_1;
}

INLINE uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* `sums` over all stripes but the last, which ends with the data and may overlap the one before. */
static uint64_t result(uint64_t *sums, const uint8_t *data, int64_t size) {
    add_generic(sums, data + size - STRIPE, SECRET + LAST_KEY);
    uint64_t sum = (uint64_t)size * PRIME64_1;
    for (int i = 0; i < 8; i += 2)
        sum += folded(sums[i] ^ word(SECRET + MERGE_KEY + 8 * i), sums[i + 1] ^ word(SECRET + MERGE_KEY + 8 * i + 8));
    sum = (sum ^ sum >> 37) * LAST_MIX;
    return sum ^ sum >> 32;
}

static void start(uint64_t *sums) {
    const uint64_t first[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(sums, first, sizeof first);
}

static uint64_t copy_generic(const uint8_t *data, uint8_t *target, int64_t size) {
    uint64_t sums[8];
    int64_t stripes = (size - 1) / STRIPE;
    start(sums);
    for (int64_t i = 0; i < stripes; i++) {
        /* Summed is what was written, whatever becomes of the source meanwhile. */
        memcpy(target + i * STRIPE, data + i * STRIPE, STRIPE);
        add_generic(sums, target + i * STRIPE, SECRET + i % STRIPES * 8);
        if (i % STRIPES == STRIPES - 1) mix_generic(sums);
    }
    memcpy(target + stripes * STRIPE, data + stripes * STRIPE, size - stripes * STRIPE);
    return result(sums, target, size);
}

#if defined(__x86_64__)
BEGIN_TARGET("avx2,fma")

INLINE __m256i added_avx2(__m256i sums, __m256i data, const uint8_t *key) {
    __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256((const __m256i *)key));
    __m256i products = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(sums, _mm256_add_epi64(products, _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2))));
}

INLINE __m256i mixed_avx2(__m256i sums, const uint8_t *key) {
    const __m256i prime = _mm256_set1_epi64x((int64_t)PRIME32_1);
    __m256i x = _mm256_xor_si256(sums, _mm256_srli_epi64(sums, 47));
    x = _mm256_xor_si256(x, _mm256_loadu_si256((const __m256i *)key));
    __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(x, prime), high);
}

/* `target` on a cache line. */
static uint64_t copy_avx2(const uint8_t *data, uint8_t *target, int64_t size) {
    uint64_t sums[8];
    int64_t stripes = (size - 1) / STRIPE;
    start(sums);
    __m256i low = _mm256_loadu_si256((__m256i *)sums), high = _mm256_loadu_si256((__m256i *)(sums + 4));
    for (int64_t i = 0; i < stripes; i += STRIPES) {
        int64_t most = stripes - i < STRIPES ? stripes - i : STRIPES;
        for (int64_t j = 0; j < most; j++) {
            const uint8_t *at = data + (i + j) * STRIPE, *key = SECRET + 8 * j;
            __m256i *to = (__m256i *)(target + (i + j) * STRIPE);
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            __m256i a = _mm256_loadu_si256((const __m256i *)at), b = _mm256_loadu_si256((const __m256i *)at + 1);
            _mm256_stream_si256(to, a);
            _mm256_stream_si256(to + 1, b);
            low = added_avx2(low, a, key);
            high = added_avx2(high, b, key + 32);
        }
        if (most < STRIPES) break;
        low = mixed_avx2(low, SECRET + MIX_KEY);
        high = mixed_avx2(high, SECRET + MIX_KEY + 32);
    }
    _mm256_storeu_si256((__m256i *)sums, low);
    _mm256_storeu_si256((__m256i *)(sums + 4), high);
    memcpy(target + stripes * STRIPE, data + stripes * STRIPE, size - stripes * STRIPE);
    _mm_sfence(); /* before anyone is told that they are there; and the last stripe is read back */
    return result(sums, target, size);
}

static void only_copy_avx2(const uint8_t *data, uint8_t *target, int64_t size) {
    int64_t lines = size / STRIPE;
    for (int64_t i = 0; i < lines; i++) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(data + i * STRIPE));
        __m256i b = _mm256_loadu_si256((const __m256i *)(data + i * STRIPE + 32));
        _mm256_stream_si256((__m256i *)(target + i * STRIPE), a);
        _mm256_stream_si256((__m256i *)(target + i * STRIPE + 32), b);
    }
    memcpy(target + lines * STRIPE, data + lines * STRIPE, size - lines * STRIPE);
    _mm_sfence();
}

END_TARGET
#endif

/* The shortest block that baton_copy_and_sum takes. */
int64_t baton_copy_least(void) { return LEAST; }

/* Copies blocks of `size` bytes, those at places `pairs[2 i]` of `from` to places `pairs[2 i + 1]` of `to`, and tells the
 * checksum of each as it was written; without `checksums` it copies alone. The pools have so many blocks. Returns how many
 * were copied: all, or those before the first that is outside of its pool. */
int64_t baton_copy_and_sum(
    const uint8_t *from, int64_t from_blocks, uint8_t *to, int64_t to_blocks, int64_t size, const int64_t *pairs,
    int64_t count, uint64_t *checksums, int64_t isa
) {
    for (int64_t i = 0; i < count; i++) {
        int64_t first = pairs[2 * i], second = pairs[2 * i + 1];
        if (first < 0 || first >= from_blocks || second < 0 || second >= to_blocks) return i;
        const uint8_t *data = from + first * size;
        uint8_t *target = to + second * size;
#if defined(__x86_64__)
        if (isa >= AVX2 && (uintptr_t)target % STRIPE == 0) {
            if (checksums)
                checksums[i] = copy_avx2(data, target, size);
            else
                only_copy_avx2(data, target, size);
            continue;
        }
#endif
        if (checksums)
            checksums[i] = copy_generic(data, target, size);
        else
            memcpy(target, data, size);
    }
    return count;
}
