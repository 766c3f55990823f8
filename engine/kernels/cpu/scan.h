/* What reads every token of a row of logits, for one instruction set. sampling.c includes this once for each, with
 *
 *   NAME(x)  the name of x in this instance
 *   LANES    float32 values of a vector: 4 or 8
 *
 * A row is read in blocks of BLOCK tokens, the last one filled up with -inf. What is compared is
 * x = (logit - the largest) / temperature, which is <= 0 and the same float32 in every instance.
 */

#define vf NAME(scan_vf)
#define vi NAME(scan_vi)
#define vu NAME(scan_vu)
#define vh NAME(scan_vh)
#define vq NAME(scan_vq)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint64_t vq __attribute__((vector_size(4 * LANES)));

#define splat NAME(scan_splat)
#define load_f NAME(scan_load_f)
#define load_as_float NAME(scan_load_as_float)
#define larger NAME(scan_larger)
#define any_of NAME(scan_any_of)
#define exp2_of NAME(scan_exp2_of)
#define product NAME(scan_product)
#define words_of NAME(words_of)
#define block_of NAME(block_of)
#define largest_of_dtype NAME(largest_of_dtype)
#define find_dtype NAME(find_dtype)
#define tally_dtype NAME(tally_dtype)
#define tally NAME(tally)
#define weigh_dtype NAME(weigh_dtype)
#define race_dtype NAME(race_dtype)
#define largest_in NAME(largest_in)
#define find NAME(find)
#define store_words NAME(store_words)
#define weigh NAME(weigh)
#define race NAME(race)

INLINE vf splat(float x) { return x - (vf){0}; }

INLINE vf load_f(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf load_as_float(const void *row, int64_t column, const int dtype) {
    if (dtype == FLOAT32) return load_f((const float *)row + column);
    vh raw;
    memcpy(&raw, (const uint16_t *)row + column, sizeof raw);
    vi bits = __builtin_convertvector(raw, vi);
    if (dtype == BFLOAT16) return (vf)(bits << 16);
    vf value = (vf)((bits & 0x7fff) << 13) * 0x1p112f; /* subnormals too */
    vi special = (bits & 0x7c00) == 0x7c00;            /* infinities and NaN keep the highest exponent */
    return (vf)((vi)value | (special & 0x7f800000) | (bits & 0x8000) << 16);
}

/* Where one is NaN: b. */
INLINE vf larger(vf a, vf b) {
#if LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi mask = a > b;
    return (vf)(((vi)a & mask) | ((vi)b & ~mask));
#endif
}

INLINE int any_of(vi mask) {
#if LANES == 8
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    const vq halves = (vq)mask;
    return (halves[0] | halves[1]) != 0;
#endif
}

/* 2^x for x <= 0: see tile.h. */
INLINE vf exp2_of(vf x) {
    const float magic = 0x1.8p23f;
    x = larger(splat(-127.0f), x);
    vf shifted = x + magic;
    vf f = x - (shifted - magic);
    vf y = splat(0x1.41d324p-13f);
    y = y * f + 0x1.5f456ap-10f;
    y = y * f + 0x1.3b2dbcp-7f;
    y = y * f + 0x1.c6aed4p-5f;
    y = y * f + 0x1.ebfbdap-3f;
    y = y * f + 0x1.62e430p-1f;
    y = y * f + 1.0f;
    return y * (vf)(((vi)shifted - (vi)splat(magic) + 127) << 23);
}

/* Of the lower 32 bits of each lane. */
INLINE vq product(vq a, uint32_t b) {
#if LANES == 8
    return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xffffffff) * b;
#endif
}

/* Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) keyed by the seed; the counter is position and quad. Words of
 * LANES quads from `quad` on, in the order of the tokens. A lane has 64 bits for 32: the upper ones may be anything, as
 * the products leave them out. Two vectors go through the rounds together, each waiting for its own products. */
INLINE void words_of(const Race *r, int64_t quad, vu words[4]) {
#if LANES == 8
    const vq order = {0, 2, 1, 3}; /* which two interleavings within halves of the vector put right */
#else
    const vq order = {0, 1};
#endif
    const vq zero = {0}, low = zero + 0xffffffff;
    vq c0[2], c1[2], c2[2], c3[2];
    for (int i = 0; i < 2; i++) {
        c0[i] = zero + (r->position & 0xffffffff);
        c1[i] = zero + (r->position >> 32);
        c2[i] = order + (uint64_t)(quad + i * LANES / 2);
        c3[i] = zero;
    }
#pragma GCC unroll 10
    for (int round = 0; round < ROUNDS; round++) {
        vq keys[2];
        memcpy(&keys[0], r->keys[round][0], sizeof(vq));
        memcpy(&keys[1], r->keys[round][1], sizeof(vq));
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const vq p0 = product(c0[i], 0xD2511F53), p1 = product(c2[i], 0xCD9E8D57);
            c0[i] = p1 >> 32 ^ (c1[i] ^ keys[0]);
            c2[i] = p0 >> 32 ^ (c3[i] ^ keys[1]);
            c1[i] = p1;
            c3[i] = p0;
        }
    }
    for (int i = 0; i < 2; i++) {
        const vq c01 = (c0[i] & low) | c1[i] << 32, c23 = (c2[i] & low) | c3[i] << 32;
#if LANES == 8
        words[2 * i] = (vu)SHUFFLE(vq, c01, c23, 0, 4, 2, 6);
        words[2 * i + 1] = (vu)SHUFFLE(vq, c01, c23, 1, 5, 3, 7);
#else
        words[2 * i] = (vu)SHUFFLE(vq, c01, c23, 0, 2);
        words[2 * i + 1] = (vu)SHUFFLE(vq, c01, c23, 1, 3);
#endif
    }
}

static int64_t store_words(const Race *r, int64_t quad, uint32_t *to) {
    vu words[4];
    words_of(r, quad, words);
    memcpy(to, words, sizeof words);
    return 4 * LANES;
}

/* Where the logits of tokens [index * BLOCK, (index + 1) * BLOCK) are: `padded`, if there are not as many. */
INLINE const char *block_of(const Row *row, int64_t index, char *padded) {
    const int size = row->dtype == FLOAT32 ? 4 : 2;
    const char *block = row->logits + index * BLOCK * size;
    const int64_t left = row->count - index * BLOCK;
    if (left >= BLOCK) return block;
    memcpy(padded, block, left * size);
    for (int64_t i = left; i < BLOCK; i++) put_least(padded, i, row->dtype);
    return padded;
}

#define FOR_DTYPE(dtype, f, ...)                         \
    ((dtype) == FLOAT32    ? f(__VA_ARGS__, FLOAT32)     \
     : (dtype) == BFLOAT16 ? f(__VA_ARGS__, BFLOAT16)    \
                           : f(__VA_ARGS__, FLOAT16))

INLINE float largest_of_dtype(const void *block, const int dtype) {
    float lanes[LANES];
    vf largest[2] = {splat(-INFINITY), splat(-INFINITY)};
    vi not_a_number = {0};
    for (int i = 0; i < BLOCK; i += 2 * LANES)
        for (int j = 0; j < 2; j++) {
            const vf x = load_as_float(block, i + j * LANES, dtype);
            not_a_number |= x != x;
            largest[j] = larger(x, largest[j]);
        }
    if (any_of(not_a_number)) return NAN;
    largest[0] = larger(largest[0], largest[1]);
    memcpy(lanes, largest, sizeof lanes);
    for (int i = 1; i < LANES; i++)
        if (lanes[i] > lanes[0]) lanes[0] = lanes[i];
    return lanes[0];
}

/* NaN where any of them is. */
static NOINLINE float largest_in(const Row *row, int64_t index) {
    char padded[4 * BLOCK];
    return FOR_DTYPE(row->dtype, largest_of_dtype, block_of(row, index, padded));
}

INLINE int64_t find_dtype(const void *block, float logit, const int dtype) {
    for (int from = 0; from < BLOCK; from += LANES) {
        const vf logits = load_as_float(block, from, dtype);
        float x[LANES];
        memcpy(x, &logits, sizeof x);
        for (int i = 0; i < LANES; i++)
            if (x[i] == logit || (logit != logit && x[i] != x[i])) return from + i;
    }
    return 0;
}

/* The first token of a block with this logit, or with NaN for NaN. */
static NOINLINE int64_t find(const Row *row, int64_t index, float logit) {
    char padded[4 * BLOCK];
    return index * BLOCK + FOR_DTYPE(row->dtype, find_dtype, block_of(row, index, padded), logit);
}

INLINE void tally_dtype(const void *block, const Row *row, const Sought *s, uint32_t *buckets, const int dtype) {
    for (int from = 0; from < BLOCK; from += LANES) {
        const vf x = (load_as_float(block, from, dtype) - row->largest) / row->temperature;
        const vi key = (vi)x & 0x7fffffff, in = (key <= s->limit) & (key >> s->prefix_shift == s->prefix);
        if (!any_of(in)) continue;
        const vi bucket = key >> s->shift & s->mask;
        for (int i = 0; i < LANES; i++) buckets[bucket[i]] -= in[i];
    }
}

/* Counts a block's tokens that are among those sought in their buckets. */
static NOINLINE void tally(const Row *row, int64_t index, const Sought *s, uint32_t *buckets) {
    char padded[4 * BLOCK];
    FOR_DTYPE(row->dtype, tally_dtype, block_of(row, index, padded), row, s, buckets);
}

INLINE void weigh_dtype(const void *block, const Row *row, const float *from, int64_t *masses, const int bounds,
                        const int dtype) {
    vf sums[BOUNDS] = {{0}};
    for (int i = 0; i < BLOCK; i += LANES) {
        const vf x = (load_as_float(block, i, dtype) - row->largest) / row->temperature, mass = exp2_of(x * LOG2_E);
        for (int j = 0; j < bounds; j++) sums[j] += (vf)((vi)mass & (x >= from[j]));
    }
    for (int j = 0; j < bounds; j++) {
        float sum = 0;
        for (int i = 0; i < LANES; i++) sum += sums[j][i];
        masses[j] += (int64_t)(sum * UNIT);
    }
}

/* Adds the masses of a block's tokens from each of the bounds on. */
static NOINLINE void weigh(const Row *row, int64_t index, const float *from, int64_t *masses, int64_t bounds) {
    char padded[4 * BLOCK];
    const char *block = block_of(row, index, padded);
    if (bounds == 1)
        FOR_DTYPE(row->dtype, weigh_dtype, block, row, from, masses, 1);
    else
        FOR_DTYPE(row->dtype, weigh_dtype, block, row, from, masses, BOUNDS);
}

INLINE void race_dtype(const void *block, const Row *row, int64_t first, const Race *r, Best *best, const int dtype) {
    for (int from = 0; from < BLOCK; from += 4 * LANES) {
        vf x[4];
        vu words[4];
        vi in[4], any = {0};
        for (int i = 0; i < 4; i++) {
            x[i] = (load_as_float(block, from + i * LANES, dtype) - row->largest) / row->temperature;
            any |= in[i] = x[i] >= best->floor;
        }
        if (!any_of(any)) continue;
        words_of(r, (first + from) / 4, words);
        any ^= any;
        for (int i = 0; i < 4; i++) {
            /* 1 + f >= 2^f, as bits of a float: 2^23 steps an octave, and some for rounding. */
            const vf steps = larger(x[i], splat(-64.0f)) * (LOG2_E * 0x1p23f) + (127 * 0x1p23f + 512);
            const vf most = (vf)__builtin_convertvector(steps, vi);
            const vf least = __builtin_convertvector((vi)(~words[i] >> 1), vf) * best->pace;
            any |= in[i] &= most >= least;
        }
        if (!any_of(any)) continue;
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < LANES; j++)
                if (in[i][j]) arrive(best, first + from + i * LANES + j, x[i][j], words[i][j]);
    }
}

/* The best of `best` and a block's tokens. Few are looked at closely: an upper bound of exp(x) and a lower one of the
 * exponentially distributed number (-log(u) >= 1 - u) tell that the others come later. */
static NOINLINE void race(const Row *row, int64_t index, const Race *r, Best *best) {
    char padded[4 * BLOCK];
    FOR_DTYPE(row->dtype, race_dtype, block_of(row, index, padded), row, index * BLOCK, r, best);
}

#undef FOR_DTYPE
#undef vf
#undef vi
#undef vu
#undef vh
#undef vq
#undef splat
#undef load_f
#undef load_as_float
#undef larger
#undef any_of
#undef exp2_of
#undef product
#undef words_of
#undef block_of
#undef largest_of_dtype
#undef find_dtype
#undef tally_dtype
#undef tally
#undef weigh_dtype
#undef race_dtype
#undef largest_in
#undef find
#undef store_words
#undef weigh
#undef race
#undef NAME
#undef LANES
