/* One work item of paged attention with AMX, which multiplies squares: 16 x 16 outputs, 32 bfloat16 deep, at once.
 * amx_narrow.h has the items of few queries, as most of a decode are.
 *
 * In the scores a position is a row and a query a column. So keys are read where they lie in the pool, and the softmax
 * runs down columns, LANES queries at once, without sums across a vector. The weights are turned to rows of pairs of
 * positions then, which meet values in the same pairs.
 */

#include "vector.h"
#include "pack.h"
#include "result.h"

enum { SIDE = 16, DEPTH = 32, HALF = SIDE / 2 };

typedef struct {
    uint32_t queries[MAX_HEAD_DIM / 2 * ROWS]; /* [pairs of a row][ROWS] */
    char copy[2][RUN * MAX_HEAD_DIM * 2];      /* of runs that have to be gathered */
    uint32_t values[TILE / 2 * MAX_HEAD_DIM];  /* [pairs of positions][head_dim] */
    float scores[2][TILE * ROWS];              /* [TILE][ROWS], of a tile and of the next one */
    uint32_t weights[ROWS * TILE / 2];         /* [ROWS][pairs of positions] */
    float sums[ROWS * MAX_HEAD_DIM];           /* [ROWS][head_dim] */
    float largest[ROWS], total[ROWS], scale[ROWS];
    int32_t from[ROWS], to[ROWS]; /* positions that a row sees */
} __attribute__((aligned(64))) Squares;

/* Positions of a tile that has `left` before it, in whole depths. */
INLINE int padded(int left) { return left < TILE ? (left + DEPTH - 1) / DEPTH * DEPTH : TILE; }

/* The eight tile registers: rows of each, and bytes of a row. */
INLINE void configure(const uint8_t rows[8], const uint8_t row_bytes[8]) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = row_bytes[i], shape.rows[i] = rows[i];
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

/* Scores of 32 positions for 16 columns, or for 32 where `both`: to `to`, the first one's place. */
INLINE void score(const uint32_t *queries, const char *low, const char *high, float *to, int head_dim, const int both) {
    _tile_zero(0);
    _tile_zero(1);
    if (both) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int d = 0; d < head_dim; d += DEPTH, queries += DEPTH / 2 * ROWS) {
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
    _tile_stored(0, to, 4 * ROWS);
    _tile_stored(1, to + SIDE * ROWS, 4 * ROWS);
    if (both) {
        _tile_stored(2, to + SIDE, 4 * ROWS);
        _tile_stored(3, to + SIDE * ROWS + SIDE, 4 * ROWS);
    }
}

/* Scores of the first `count` positions of a tile. */
INLINE void score_tile(Squares *m, float *scores, const Tile *found, const Call *call, const Item *item, int tile,
                       int count, int columns) {
    const int head_dim = (int)call->batch->head_dim;
    for (int run = 0; run < count / RUN; run += 2, scores += 2 * RUN * ROWS) {
        const char *low = keys_of(found, m->copy[0], call, item, tile, run);
        const char *high = keys_of(found, m->copy[1], call, item, tile, run + 1);
        int r = 0;
        for (; r + 2 * SIDE <= columns; r += 2 * SIDE) score(m->queries + r, low, high, scores + r, head_dim, 1);
        if (r < columns) score(m->queries + r, low, high, scores + r, head_dim, 0);
    }
}

/* 2^(x c) for x <= 0 and c > 0, within 7.5e-5 of it, relatively, which is little beside the rounding to bfloat16 that
 * comes next; close to 0 for x at or below `lowest`, -126 / c. As exp2_of, with the polynomial of degree 3. */
INLINE vf coarse_exp2(vf x, vf c, vf lowest) {
    const vf magic = splat(0x1.8p23f);
    x = larger(lowest, x);
    const vf shifted = x * c + magic, f = x * c - (shifted - magic);
    vf y = splat(0x1.c3f760p-5f);
    y = y * f + 0x1.f0de1cp-3f;
    y = y * f + 0x1.62f31ap-1f;
    y = y * f + 0x1.fff692p-1f;
    return (vf)((vi)y + ((vi)shifted << 23));
}

/* Scores of 16 columns to weights 2^((score - largest) c). `masked`: not all of these positions are seen by all.
 * `ahead`: keys that are read soon. */
INLINE void weigh(Squares *m, float *scores, const char *const *ahead, int tile, int count, int r, int head_dim,
                  float c, const int masked) {
    scores += r;
    const vf before = load_f(m->largest + r);
    vi from, to;
    memcpy(&from, m->from + r, sizeof from);
    memcpy(&to, m->to + r, sizeof to);
    vf most[4] = {before, before, before, before};
    for (int p = 0; p < count; p++) {
        vf s = load_f(scores + p * ROWS);
        if (masked) {
            const vi position = (vi){0} + (tile + p), seen = (position >= from) & (position < to);
            s = (vf)(((vi)s & seen) | ((vi)splat(-INFINITY) & ~seen));
            memcpy(scores + p * ROWS, &s, sizeof s);
        }
        most[p % 4] = larger(s, most[p % 4]);
    }
    const vf now = larger(larger(most[0], most[1]), larger(most[2], most[3])), lowest = splat(-126 / c);
    const __m512i together = (__m512i)(vu){0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005,
                                           0x160006, 0x170007, 0x180008, 0x190009, 0x1a000a, 0x1b000b,
                                           0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f};
    vf total[2] = {splat(0), splat(0)};
    for (int part = 0; part < count; part += DEPTH) {
        vi pairs[LANES];
        for (int i = 0; i < SIDE; i++) {
            const int p = part + 2 * i;
            if (r == 0) ask_for(ahead[p / RUN], 2 * head_dim * (p % RUN), 4 * head_dim);
            /* Scores first: of large ones only the difference is exact. */
            const vf even = coarse_exp2(load_f(scores + p * ROWS) - now, splat(c), lowest);
            const vf odd = coarse_exp2(load_f(scores + (p + 1) * ROWS) - now, splat(c), lowest);
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
            pairs[i] = (vi)_mm512_permutexvar_epi16(together, rounded);
            total[0] += (vf)(pairs[i] << 16); /* the sum is of what is multiplied with the values: rounded weights */
            total[1] += (vf)(pairs[i] & (int32_t)0xffff0000);
        }
        transpose(pairs);
        for (int i = 0; i < SIDE; i++) memcpy(m->weights + (r + i) * (TILE / 2) + part / 2, &pairs[i], sizeof pairs[i]);
    }
    const vf scale = exp2_of((before - now) * c);
    total[0] += load_f(m->total + r) * scale + total[1];
    memcpy(m->largest + r, &now, sizeof now);
    memcpy(m->total + r, &total[0], sizeof total[0]);
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

INLINE void add_tile(Squares *m, int count, int columns, int head_dim) {
    for (int d = 0; d < head_dim; d += 2 * SIDE) {
        int r = 0;
        for (; r + 2 * SIDE <= columns; r += 2 * SIDE) add_values(m, count, r, d, head_dim, 1);
        if (r < columns) add_values(m, count, r, d, head_dim, 0);
    }
}

static NOINLINE void attend_wide(const Call *call, const Item *item) {
    const Batch *batch = call->batch;
    const int32_t *span = batch->spans + 4 * item->span;
    const int head_dim = (int)batch->head_dim, rows = item->tokens * item->heads;
    const int columns = (rows + SIDE - 1) / SIDE * SIDE;
    const float c = call->scale * LOG2_E;
    Squares m;
    Tile found[3]; /* a tile and the two behind it */

    configure((const uint8_t[8]){SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE},
              (const uint8_t[8]){64, 64, 64, 64, 64, 64, 64, 64});
    const int begin = item->first / TILE * TILE;
    for (int i = 0; i < 3; i++) find_tile(&found[i], call, item, begin + i * TILE);
    for (int i = 0; i < RUNS; i++) {
        ask_for(found[0].values[i], 0, 2 * RUN * head_dim);
        ask_for(found[1].keys[i], 0, 2 * RUN * head_dim);
    }
    pack_columns(&m, call, item, span[ROW], rows, head_dim);
    see(&m, call, item, span[START], columns);
    memset(m.sums, 0, sizeof(float) * columns * head_dim);
    for (int r = 0; r < columns; r++) m.largest[r] = NOTHING_YET, m.total[r] = 0;
    const int all_from = m.from[rows - 1], all_to = m.to[0]; /* what all rows see: later ones begin and end later */
    score_tile(&m, m.scores[0], &found[0], call, item, begin, padded(item->last - begin), columns);
    for (int tile = begin, turn = 0; tile < item->last; tile += TILE, turn++) {
        const int count = padded(item->last - tile), left = item->last - tile - TILE;
        Tile *now = &found[turn % 3], *next = &found[(turn + 1) % 3], *later = &found[(turn + 2) % 3];
        for (int i = 0; i < count / RUN; i++)
            pack_values(m.values + i * (RUN / 2) * head_dim, values_of(now, m.copy[0], call, item, tile, i),
                        next->values[i], head_dim, BFLOAT16, 1);
        const int masked = tile < all_from || tile + count > all_to;
        for (int r = 0; r < columns; r += SIDE) {
            if (masked)
                weigh(&m, m.scores[turn % 2], later->keys, tile, count, r, head_dim, c, 1);
            else
                weigh(&m, m.scores[turn % 2], later->keys, tile, count, r, head_dim, c, 0);
            rescale(&m, r, head_dim);
        }
        /* Before the weights are multiplied: what was stored just now cannot be loaded to a square at once. */
        if (left > 0)
            score_tile(&m, m.scores[(turn + 1) % 2], next, call, item, tile + TILE, padded(left), columns);
        add_tile(&m, count, columns, head_dim);
        find_tile(now, call, item, tile + 3 * TILE);
    }
    _tile_release();
    finish(call, item, m.sums, m.largest, m.total, BFLOAT16);
}

#include "amx_narrow.h"

static NOINLINE void NAME(attend_squares)(const Call *call, const Item *item) {
    if (item->tokens * item->heads <= HALF && item->last - item->first / TILE * TILE <= SPLIT)
        attend_narrow(call, item);
    else
        attend_wide(call, item);
}
