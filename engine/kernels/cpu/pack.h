/* Rows of keys, values and queries to what a matrix product reads, for one instruction set of each_isa.h.
 *
 * Words of 32 bits are what all matrices here are made of: a float32, or a pair of bfloat16 where DOT is used.
 */

#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif

#define transpose NAME(transpose)
#define pack_keys NAME(pack_keys)
#define pack_values NAME(pack_values)
#define pack_queries NAME(pack_queries)

/* Interleaving each half with the other, log2(LANES) times, transposes a square of words. */
INLINE void transpose(vi square[LANES]) {
    for (int stage = 1; stage < LANES; stage *= 2) {
        vi next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = SHUFFLE(vi, square[i], square[i + LANES / 2], LOW);
            next[2 * i + 1] = SHUFFLE(vi, square[i], square[i + LANES / 2], HIGH);
        }
        memcpy(square, next, sizeof next);
    }
}

/* A run of keys to a run of columns of `to` [words of a row][TILE]; asks for `ahead`, a later run, meanwhile. */
INLINE void pack_keys(uint32_t *to, const char *run, const char *ahead, int head_dim, const int dtype, const int dot) {
    const int row = head_dim * (dtype == FLOAT32 ? 4 : 2), words = dot ? head_dim / 2 : head_dim;
    for (int p = 0; p < RUN; p += LANES, run += LANES * row) {
        ask_for(ahead, p * row, LANES * row);
        for (int w = 0; w < words; w += LANES) {
            vi square[LANES];
            for (int i = 0; i < LANES; i++)
                square[i] = (vi)(dot ? load_f(run + i * row + 4 * w) : load_as_float(run + i * row, w, dtype));
            transpose(square);
            for (int i = 0; i < LANES; i++) memcpy(to + (w + i) * TILE + p, &square[i], sizeof square[i]);
        }
    }
}

/* A run of values to `to` [RUN][head_dim], or to [RUN / 2][head_dim] pairs of positions. */
INLINE void pack_values(uint32_t *to, const char *run, const char *ahead, int head_dim, const int dtype,
                        const int dot) {
    const int row = head_dim * (dtype == FLOAT32 ? 4 : 2);
    for (int p = 0; p < RUN; p += 2, run += 2 * row, to += dot ? head_dim : 2 * head_dim) {
        ask_for(ahead, p * row, 2 * row);
#if DOT
        if (dot) {
            const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                   22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
            for (int d = 0; d < head_dim; d += 16) {
                __m256i even = _mm256_loadu_si256((const void *)(run + 2 * d));
                __m256i odd = _mm256_loadu_si256((const void *)(run + row + 2 * d));
                __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
                _mm512_storeu_si512(to + d, _mm512_permutexvar_epi16(order, both));
            }
            continue;
        }
#endif
        for (int i = 0; i < 2; i++)
            for (int d = 0; d < head_dim; d += LANES) {
                vf v = load_as_float(run + i * row, d, dtype);
                memcpy(to + i * head_dim + d, &v, sizeof v);
            }
    }
}

/* Query rows of the item, token by token, head by head. */
INLINE void pack_queries(uint32_t *to, const Call *call, const Item *item, int first_row, int head_dim, const int dtype,
                         const int dot) {
    const int size = dtype == FLOAT32 ? 4 : 2;
    for (int t = 0; t < item->tokens; t++)
        for (int h = 0; h < item->heads; h++) {
            const char *row = call->query + ((int64_t)(first_row + item->token + t) * call->query_stride +
                                             (int64_t)(item->head + h) * head_dim) * size;
            if (dot) {
                memcpy(to, row, 2 * head_dim);
                to += head_dim / 2;
                continue;
            }
            for (int d = 0; d < head_dim; d += LANES) {
                vf v = load_as_float(row, d, dtype);
                memcpy(to + d, &v, sizeof v);
            }
            to += head_dim;
        }
}

#undef LOW
#undef HIGH
