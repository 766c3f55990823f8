/* One work item of paged attention, for one instruction set of each_isa.h.
 *
 * Both matrix products of attention are done by one small GEMM over packed tiles of TILE positions. A tile is packed
 * once for all the query rows of the item, so each key and value is read from the pool once a group of heads.
 */

#include "vector.h"
#include "pack.h"
#include "result.h"

#define MOST_VECTORS (LANES == 16 ? 4 : 2)

#define product_part NAME(product_part)
#define product_rows NAME(product_rows)
#define product NAME(product)
#define softmax_row NAME(softmax_row)

/* R rows and V vectors of c = a b, or of c = scale c + a b where scale is not NULL: a [rows][lda], b [depth][ldb]. */
INLINE void product_part(const uint32_t *a, int lda, const uint32_t *b, int ldb, float *c, int ldc, int depth,
                         const float *scale, const int dot, const int R, const int V) {
    vf sums[6][MOST_VECTORS];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = scale ? load_f(c + r * ldc + v * LANES) * scale[r] : splat(0);
    for (int i = 0; i < depth; i++) {
        vf row[MOST_VECTORS];
        for (int v = 0; v < V; v++) row[v] = load_f(b + (int64_t)i * ldb + v * LANES);
        for (int r = 0; r < R; r++) {
            float word;
            memcpy(&word, a + r * lda + i, 4);
#if DOT
            if (dot) {
                __m512bh pair = (__m512bh)_mm512_set1_ps(word);
                for (int v = 0; v < V; v++)
                    sums[r][v] = (vf)_mm512_dpbf16_ps((__m512)sums[r][v], pair, (__m512bh)row[v]);
                continue;
            }
#endif
            for (int v = 0; v < V; v++) sums[r][v] += word * row[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) memcpy(c + r * ldc + v * LANES, &sums[r][v], sizeof(vf));
}

INLINE void product_rows(const uint32_t *a, int lda, const uint32_t *b, int ldb, float *c, int ldc, int columns,
                         int depth, const float *scale, const int dot, const int R) {
    int n = 0;
#if LANES == 16
    for (; n + 4 * LANES <= columns; n += 4 * LANES)
        product_part(a, lda, b + n, ldb, c + n, ldc, depth, scale, dot, R, 4);
#endif
    for (; n + 2 * LANES <= columns; n += 2 * LANES)
        product_part(a, lda, b + n, ldb, c + n, ldc, depth, scale, dot, R, 2);
    for (; n < columns; n += LANES) product_part(a, lda, b + n, ldb, c + n, ldc, depth, scale, dot, R, 1);
}

/* Rows in even parts of at most six: 7 as 4 and 3, which are faster than 6 and 1. */
static void product(const uint32_t *a, int lda, const uint32_t *b, int ldb, float *c, int ldc, int rows, int columns,
                    int depth, const float *scale, int dot) {
    for (int parts = (rows + 5) / 6; parts; parts--) {
        const int part = (rows + parts - 1) / parts;
#define PART(R)                                                                                  \
    case R:                                                                                      \
        if (DOT && dot)                                                                          \
            product_rows(a, lda, b, ldb, c, ldc, columns, depth, scale, 1, R);                   \
        else                                                                                     \
            product_rows(a, lda, b, ldb, c, ldc, columns, depth, scale, 0, R);                   \
        break
        switch (part) {
            PART(1);
            PART(2);
            PART(3);
            PART(4);
            PART(5);
            PART(6);
        }
#undef PART
        a += part * lda, c += part * ldc, rows -= part;
        if (scale) scale += part;
    }
}

/* Scores to weights 2^((score - largest) c), as bfloat16 pairs where `dot`; those outside [from, to) count for nothing.
 * Returns what the sums so far are to be multiplied with. */
INLINE float softmax_row(float *scores, uint32_t *weights, int count, int from, int to, float c, float *largest,
                         float *sum, const int dot) {
    vi column;
    for (int i = 0; i < LANES; i++) column[i] = i;
    vf most = splat(*largest);
    for (int p = 0; p < count; p += LANES) {
        vf s = load_f(scores + p);
        if (p < from || p + LANES > to) {
            vi seen = (column + p >= from) & (column + p < to);
            s = (vf)(((vi)s & seen) | ((vi)splat(-INFINITY) & ~seen));
            memcpy(scores + p, &s, sizeof s);
        }
        most = larger(s, most);
    }
    const float before = *largest, now = largest_of(most);
    vf total = splat(0);
    for (int p = 0; p < count; p += LANES) {
        vf w = exp2_of((load_f(scores + p) - now) * c); /* scores first: of large ones only the difference is exact */
#if DOT
        if (dot) { /* the sum is of what is multiplied with the values: the rounded weights */
            __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)w);
            _mm256_storeu_si256((void *)(weights + p / 2), rounded);
            total += (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
            continue;
        }
#endif
        memcpy(weights + p, &w, sizeof w);
        total += w;
    }
    const float scale = exp2_of(splat((before - now) * c))[0];
    *largest = now;
    *sum = *sum * scale + sum_of(total);
    return scale;
}

/* The loop over tiles; dtype and dot are constants where it is called. */
INLINE void NAME(attend)(const Call *call, const Item *item, const int dtype, const int dot) {
    const Batch *batch = call->batch;
    const int32_t *span = batch->spans + 4 * item->span;
    const int head_dim = (int)batch->head_dim, rows = item->tokens * item->heads;
    const int words = dot ? head_dim / 2 : head_dim;
    uint32_t queries[ROWS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    uint32_t keys[TILE * MAX_HEAD_DIM] __attribute__((aligned(64)));
    uint32_t values[TILE * MAX_HEAD_DIM] __attribute__((aligned(64)));
    uint32_t weights[ROWS * TILE] __attribute__((aligned(64)));
    float scores[ROWS * TILE] __attribute__((aligned(64)));
    float sums[ROWS * MAX_HEAD_DIM] __attribute__((aligned(64)));
    float largest[ROWS], total[ROWS], scale[ROWS];
    char copy[RUN * MAX_HEAD_DIM * 4];
    Tile found[2];

    pack_queries(queries, call, item, span[ROW], head_dim, dtype, dot);
    memset(sums, 0, sizeof(float) * rows * head_dim);
    for (int r = 0; r < rows; r++) largest[r] = NOTHING_YET, total[r] = 0;
    const float c = call->scale * LOG2_E;
    const int begin = item->first / TILE * TILE;
    find_tile(&found[0], call, item, begin);
    for (int tile = begin, turn = 0; tile < item->last; tile += TILE, turn ^= 1) {
        const int here = item->last - tile < TILE ? item->last - tile : TILE;
        const int runs = (here + RUN - 1) / RUN, count = runs * RUN;
        const Tile *now = &found[turn], *next = &found[turn ^ 1];
        find_tile(&found[turn ^ 1], call, item, tile + TILE);
        for (int i = 0; i < runs; i++)
            pack_keys(keys + i * RUN, keys_of(now, copy, call, item, tile, i), next->keys[i], head_dim, dtype, dot);
        product(queries, words, keys, TILE, scores, TILE, rows, count, words, NULL, dot);
        for (int r = 0; r < rows; r++) {
            const int position = span[START] + item->token + r / item->heads;
            int from = item->first, to = position + 1;
            if (call->window && position - (int)call->window + 1 > from) from = position - (int)call->window + 1;
            if (to > item->last) to = item->last;
            scale[r] = softmax_row(scores + r * TILE, weights + r * (dot ? TILE / 2 : TILE), count, from - tile,
                                   to - tile, c, &largest[r], &total[r], dot);
        }
        for (int i = 0; i < runs; i++)
            pack_values(values + i * RUN * (dot ? head_dim / 2 : head_dim), values_of(now, copy, call, item, tile, i),
                        next->values[i], head_dim, dtype, dot);
        product(weights, dot ? TILE / 2 : TILE, values, head_dim, sums, head_dim, rows, head_dim,
                dot ? count / 2 : count, scale, dot);
    }
    finish(call, item, sums, largest, total, dtype);
}

/* Functions of their own: inlined into one, their arrays would add up on the stack. */
static NOINLINE void NAME(attend_float32)(const Call *call, const Item *item) {
    NAME(attend)(call, item, FLOAT32, 0);
}
static NOINLINE void NAME(attend_float16)(const Call *call, const Item *item) {
    NAME(attend)(call, item, FLOAT16, 0);
}
static NOINLINE void NAME(attend_bfloat16)(const Call *call, const Item *item) {
    NAME(attend)(call, item, BFLOAT16, 0);
}
#if DOT
static NOINLINE void NAME(attend_pairs)(const Call *call, const Item *item) { NAME(attend)(call, item, BFLOAT16, 1); }
#endif

static void NAME(attend_item)(const Call *call, const Item *item) {
    if (call->batch->dtype == FLOAT32)
        NAME(attend_float32)(call, item);
    else if (call->batch->dtype == FLOAT16)
        NAME(attend_float16)(call, item);
#if DOT
    else if (call->batch->head_dim % 32 == 0) /* whole vectors of pairs */
        NAME(attend_pairs)(call, item);
#endif
    else
        NAME(attend_bfloat16)(call, item);
}

#undef MOST_VECTORS
