/* One work item of paged attention with AMX, which multiplies squares: 16 x 16 outputs, 32 bfloat16 deep, at once.
 *
 * In the scores a position is a row and a query a column. So keys are read where they lie in the pool, and the softmax
 * runs down columns, LANES queries at once, without sums across a vector. The weights are turned to rows of pairs of
 * positions then, which meet values in the same pairs.
 */

#include "vector.h"
#include "pack.h"
#include "result.h"

enum { SIDE = 16, DEPTH = 32 };

typedef struct {
    uint32_t queries[MAX_HEAD_DIM / 2 * ROWS]; /* [pairs of a row][ROWS] */
    uint16_t keys[2 * SIDE * MAX_HEAD_DIM];    /* of positions that do not lie behind each other */
    uint32_t values[TILE / 2 * MAX_HEAD_DIM];  /* [pairs of positions][head_dim] */
    float scores[TILE * ROWS];                 /* [TILE][ROWS] */
    uint32_t weights[ROWS * TILE / 2];         /* [ROWS][pairs of positions] */
    float sums[ROWS * MAX_HEAD_DIM];           /* [ROWS][head_dim] */
    float largest[ROWS], total[ROWS], scale[ROWS];
    int32_t from[ROWS], to[ROWS]; /* positions that a row sees */
} __attribute__((aligned(64))) Squares;

/* All eight tile registers as 16 rows of 64 bytes. */
INLINE void configure(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = SIDE;
    _tile_loadconfig(&shape);
}

/* The item's rows as columns; columns behind the last are zero. */
INLINE void pack_columns(Squares *m, const Call *call, const Item *item, int first_row, int rows, int head_dim) {
    for (int r = 0; r < rows; r += SIDE)
        for (int pair = 0; pair < head_dim / 2; pair += SIDE) {
            vi square[LANES];
            for (int i = 0; i < SIDE; i++) {
                const int64_t token = first_row + item->token + (r + i) / item->heads;
                const int64_t head = item->head + (r + i) % item->heads;
                square[i] = (vi){0};
                if (r + i < rows)
                    memcpy(&square[i], call->query + 2 * (token * call->query_stride + head * head_dim) + 4 * pair, 64);
            }
            transpose(square);
            for (int i = 0; i < SIDE; i++) memcpy(m->queries + (pair + i) * ROWS + r, &square[i], 64);
        }
}

INLINE void see(Squares *m, const Call *call, const Item *item, int start, int columns) {
    for (int r = 0; r < columns; r++) {
        const int position = start + item->token + r / item->heads;
        m->from[r] = item->first;
        if (call->window && position - (int)call->window + 1 > item->first)
            m->from[r] = position - (int)call->window + 1;
        m->to[r] = position < item->last ? position + 1 : item->last;
    }
}

/* Sixteen keys: where they are, if they lie behind each other; else a copy. */
INLINE const char *keys_of(char *const *rows, uint16_t *copy, int head_dim) {
    int together = 1;
    for (int i = 1; i < SIDE; i++) together &= rows[i] - rows[i - 1] == 2 * head_dim;
    if (together) return rows[0];
    for (int i = 0; i < SIDE; i++) memcpy(copy + i * head_dim, rows[i], 2 * head_dim);
    return (const char *)copy;
}

/* Scores of 32 positions for 16 columns, or for 32 where `both`. */
INLINE void score(Squares *m, const char *low, const char *high, int p, int r, int head_dim, const int both) {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int d = 0; d < head_dim; d += DEPTH) {
        const uint32_t *queries = m->queries + d / 2 * ROWS + r;
        _tile_loadd(4, low + 2 * d, 2 * head_dim);
        _tile_loadd(5, high + 2 * d, 2 * head_dim);
        _tile_loadd(6, queries, 4 * ROWS);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (both) {
            _tile_loadd(7, queries + SIDE, 4 * ROWS);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float *to = m->scores + p * ROWS + r;
    _tile_stored(0, to, 4 * ROWS);
    _tile_stored(1, to + SIDE * ROWS, 4 * ROWS);
    if (both) {
        _tile_stored(2, to + SIDE, 4 * ROWS);
        _tile_stored(3, to + SIDE * ROWS + SIDE, 4 * ROWS);
    }
}

/* Scores of 16 columns to weights 2^((score - largest) c). `masked`: not all of these positions are seen by all. */
INLINE void weigh(Squares *m, const Rows *next, int tile, int count, int r, int head_dim, float c, const int masked) {
    float *scores = m->scores + r;
    const vf before = load_f(m->largest + r);
    vi from, to;
    memcpy(&from, m->from + r, sizeof from);
    memcpy(&to, m->to + r, sizeof to);
    vf most = before;
    for (int p = 0; p < count; p++) {
        vf s = load_f(scores + p * ROWS);
        if (masked) {
            const vi position = (vi){0} + (tile + p), seen = (position >= from) & (position < to);
            s = (vf)(((vi)s & seen) | ((vi)splat(-INFINITY) & ~seen));
            memcpy(scores + p * ROWS, &s, sizeof s);
        }
        most = larger(s, most);
    }
    vf total = splat(0);
    for (int part = 0; part < count; part += DEPTH) {
        vi pairs[LANES];
        for (int i = 0; i < SIDE; i++) {
            const int p = part + 2 * i;
            if (r == 0)
                for (int byte = 0; byte < 2 * head_dim; byte += 64) {
                    __builtin_prefetch(next->keys[p] + byte);
                    __builtin_prefetch(next->keys[p + 1] + byte);
                    __builtin_prefetch(next->values[p] + byte);
                    __builtin_prefetch(next->values[p + 1] + byte);
                }
            /* Scores first: of large ones only the difference is exact. */
            const vf even = exp2_of((load_f(scores + p * ROWS) - most) * c);
            const vf odd = exp2_of((load_f(scores + (p + 1) * ROWS) - most) * c);
            const vi low = (vi)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
            const vi high = (vi)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd)) << 16;
            pairs[i] = low | high;
            total += (vf)(low << 16); /* the sum is of what is multiplied with the values: the rounded weights */
            total += (vf)high;
        }
        transpose(pairs);
        for (int i = 0; i < SIDE; i++) memcpy(m->weights + (r + i) * (TILE / 2) + part / 2, &pairs[i], sizeof pairs[i]);
    }
    const vf scale = exp2_of((before - most) * c);
    total += load_f(m->total + r) * scale;
    memcpy(m->largest + r, &most, sizeof most);
    memcpy(m->total + r, &total, sizeof total);
    memcpy(m->scale + r, &scale, sizeof scale);
}

/* What 16 rows have summed up so far, in units of the new largest score. */
INLINE void rescale(Squares *m, int r, int head_dim) {
    int changed = 0;
    for (int i = 0; i < SIDE; i++) changed |= m->scale[r + i] != 1;
    if (!changed) return;
    for (int i = 0; i < SIDE; i++)
        for (int d = 0; d < head_dim; d += LANES) {
            float *sum = m->sums + (r + i) * head_dim + d;
            const vf scaled = load_f(sum) * m->scale[r + i];
            memcpy(sum, &scaled, sizeof scaled);
        }
}

/* Adds weights times values to the sums of 16 rows, or of 32 where `both`, in 32 columns. */
INLINE void add_values(Squares *m, int count, int r, int d, int head_dim, const int both) {
    float *sums = m->sums + r * head_dim + d;
    const int64_t stride = 4 * head_dim;
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + SIDE, stride);
    if (both) {
        _tile_loadd(2, sums + SIDE * head_dim, stride);
        _tile_loadd(3, sums + SIDE * head_dim + SIDE, stride);
    }
    for (int p = 0; p < count; p += DEPTH) {
        const uint32_t *weights = m->weights + r * (TILE / 2) + p / 2, *values = m->values + p / 2 * head_dim + d;
        _tile_loadd(4, weights, 2 * TILE);
        _tile_loadd(6, values, stride);
        _tile_loadd(7, values + SIDE, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, weights + SIDE * (TILE / 2), 2 * TILE);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, stride);
    _tile_stored(1, sums + SIDE, stride);
    if (both) {
        _tile_stored(2, sums + SIDE * head_dim, stride);
        _tile_stored(3, sums + SIDE * head_dim + SIDE, stride);
    }
}

static NOINLINE void NAME(attend_squares)(const Call *call, const Item *item) {
    const Batch *batch = call->batch;
    const int32_t *span = batch->spans + 4 * item->span;
    const int head_dim = (int)batch->head_dim, rows = item->tokens * item->heads;
    const int columns = (rows + SIDE - 1) / SIDE * SIDE, last_pair = columns / SIDE % 2 ? columns - SIDE : columns;
    const float c = call->scale * LOG2_E;
    Squares m;
    Rows seen[2];

    configure();
    pack_columns(&m, call, item, span[ROW], rows, head_dim);
    see(&m, call, item, span[START], columns);
    memset(m.sums, 0, sizeof(float) * columns * head_dim);
    for (int r = 0; r < columns; r++) m.largest[r] = NOTHING_YET, m.total[r] = 0;
    const int all_from = m.from[rows - 1], all_to = m.to[0]; /* what all rows see: later ones begin and end later */
    const int begin = item->first / TILE * TILE;
    find_rows(&seen[0], call, item, begin);
    for (int tile = begin, turn = 0; tile < item->last; tile += TILE, turn ^= 1) {
        const int here = item->last - tile < TILE ? item->last - tile : TILE;
        const int count = (here + DEPTH - 1) / DEPTH * DEPTH;
        const Rows *now = &seen[turn], *next = &seen[turn ^ 1];
        find_rows(&seen[turn ^ 1], call, item, tile + TILE);
        for (int p = 0; p < count; p += 2 * SIDE) {
            const char *low = keys_of(now->keys + p, m.keys, head_dim);
            const char *high = keys_of(now->keys + p + SIDE, m.keys + SIDE * MAX_HEAD_DIM, head_dim);
            for (int r = 0; r < last_pair; r += 2 * SIDE) score(&m, low, high, p, r, head_dim, 1);
            if (last_pair < columns) score(&m, low, high, p, last_pair, head_dim, 0);
        }
        const int masked = tile < all_from || tile + count > all_to;
        for (int r = 0; r < columns; r += SIDE) {
            if (masked)
                weigh(&m, next, tile, count, r, head_dim, c, 1);
            else
                weigh(&m, next, tile, count, r, head_dim, c, 0);
            rescale(&m, r, head_dim);
        }
        pack_values(m.values, now->values, NULL, count, head_dim, BFLOAT16, 1);
        for (int d = 0; d < head_dim; d += 2 * SIDE) {
            for (int r = 0; r < last_pair; r += 2 * SIDE) add_values(&m, count, r, d, head_dim, 1);
            if (last_pair < columns) add_values(&m, count, last_pair, d, head_dim, 0);
        }
    }
    _tile_release();
    finish(call, item, m.sums, m.largest, m.total, BFLOAT16);
}
