/* Items of no more than HALF query rows, as many as share a key head in a decode, and no more than SPLIT positions.
 *
 * All scores come first, then all weights, then the sum: nothing is scaled again, and no multiplication waits for the
 * one before. Squares are half as wide as elsewhere: a vector of scores has two positions of 8 columns, and the softmax
 * half the work. Of the weights of TILE positions one square has those of the pairs 0, 2, 4, ... and another those of 1,
 * 3, 5, ...; values are read in the same order. Tiles are whole: positions behind the last one weigh nothing, and their
 * keys and values are zeros.
 */

enum { TILES = SPLIT / TILE };

typedef struct {
    float scores[SPLIT * HALF];                 /* [SPLIT][HALF] */
    uint32_t weights[TILES][2 * HALF * SIDE];   /* of each tile [2 HALF][TILE / 4]: even pairs of a column, odd ones */
    uint32_t values[SPLIT / 2 * MAX_HEAD_DIM];  /* [pairs of positions][head_dim] */
} __attribute__((aligned(64))) Halves;

/* The other half's lanes in their places. */
INLINE vf other_half(vf v) { return across(v, HALF); }

/* Both halves of what a vector of 8 numbers has. */
INLINE vi twice(const void *eight) { return (vi)_mm512_broadcast_i64x4(_mm256_loadu_si256(eight)); }

/* Of a tile, to `to` [TILE][HALF]. */
INLINE void score_narrow(const uint32_t *queries, const char *const keys[RUNS], float *to, int head_dim) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < head_dim; d += DEPTH, queries += DEPTH / 2 * ROWS) {
        _tile_loadd(7, queries, 4 * ROWS);
        _tile_loadd(4, keys[0] + 2 * d, 2 * head_dim);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(5, keys[1] + 2 * d, 2 * head_dim);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(6, keys[2] + 2 * d, 2 * head_dim);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(4, keys[3] + 2 * d, 2 * head_dim);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, to, 4 * HALF);
    _tile_stored(1, to + RUN * HALF, 4 * HALF);
    _tile_stored(2, to + 2 * RUN * HALF, 4 * HALF);
    _tile_stored(3, to + 3 * RUN * HALF, 4 * HALF);
}

/* The largest scores of 8 columns, twice; those of positions that a row does not see become -infinity. */
INLINE vf largest_narrow(const Squares *m, float *scores, int first, int count, const int masked) {
    const vi from = twice(m->from), to = twice(m->to), second = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    vf most[4] = {splat(NOTHING_YET), splat(NOTHING_YET), splat(NOTHING_YET), splat(NOTHING_YET)};
    for (int p = 0; p < count; p += 2) {
        vf s = load_f(scores + p * HALF);
        if (masked) {
            const vi position = second + (first + p), seen = (position >= from) & (position < to);
            s = (vf)(((vi)s & seen) | ((vi)splat(-INFINITY) & ~seen));
            memcpy(scores + p * HALF, &s, sizeof s);
        }
        most[p / 2 % 4] = larger(s, most[p / 2 % 4]);
    }
    const vf most_of_all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
    return larger(most_of_all, other_half(most_of_all));
}

/* Scores of a tile to weights 2^((score - largest) c); returns the weights' sums, the halves apart. Asks for `ahead`,
 * values, meanwhile. */
INLINE vf weigh_narrow(uint32_t *to, const float *scores, const char *const ahead[RUNS], int head_dim, vf now, float c) {
    /* Of four positions of 8 columns: a column's first two beside each other, then its last two. */
    const __m512i together = (__m512i)(vu){0x080000, 0x090001, 0x0a0002, 0x0b0003, 0x0c0004, 0x0d0005,
                                           0x0e0006, 0x0f0007, 0x180010, 0x190011, 0x1a0012, 0x1b0013,
                                           0x1c0014, 0x1d0015, 0x1e0016, 0x1f0017};
    const vf lowest = splat(-126 / c);
    vf total[2] = {splat(0), splat(0)};
    vi pairs[LANES];
    for (int i = 0; i < SIDE; i++) {
        const int p = 4 * i;
        ask_for(ahead[p / RUN], 2 * head_dim * (p % RUN), 8 * head_dim);
        /* Scores first: of large ones only the difference is exact. */
        const vf low = coarse_exp2(load_f(scores + p * HALF) - now, splat(c), lowest);
        const vf high = coarse_exp2(load_f(scores + (p + 2) * HALF) - now, splat(c), lowest);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        pairs[i] = (vi)_mm512_permutexvar_epi16(together, rounded);
        total[0] += (vf)(pairs[i] << 16); /* the sum is of what is multiplied with the values: rounded weights */
        total[1] += (vf)(pairs[i] & (int32_t)0xffff0000);
    }
    transpose(pairs);
    memcpy(to, pairs, sizeof pairs);
    return total[0] + total[1];
}

/* Weights times values of all tiles to 64 columns of the sums, or to 32. */
INLINE void sum_narrow(float *sums, const Halves *h, int tiles, int d, int head_dim, const int all) {
    const int64_t stride = 4 * head_dim;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int tile = 0; tile < tiles; tile++)
        for (int odd = 0; odd < 2; odd++) {
            const uint32_t *values = h->values + (tile * TILE / 2 + odd) * head_dim + d;
            _tile_loadd(7, h->weights[tile] + odd * HALF * SIDE, 4 * SIDE);
            _tile_loadd(4, values, 2 * stride);
            _tile_dpbf16ps(0, 7, 4);
            _tile_loadd(5, values + SIDE, 2 * stride);
            _tile_dpbf16ps(1, 7, 5);
            if (!all) continue;
            _tile_loadd(6, values + 2 * SIDE, 2 * stride);
            _tile_dpbf16ps(2, 7, 6);
            _tile_loadd(4, values + 3 * SIDE, 2 * stride);
            _tile_dpbf16ps(3, 7, 4);
        }
    _tile_stored(0, sums + d, stride);
    _tile_stored(1, sums + d + SIDE, stride);
    if (!all) return;
    _tile_stored(2, sums + d + 2 * SIDE, stride);
    _tile_stored(3, sums + d + 3 * SIDE, stride);
}

static NOINLINE void attend_narrow(const Call *call, const Item *item) {
    const int32_t *span = call->batch->spans + 4 * item->span;
    const int head_dim = (int)call->batch->head_dim, rows = item->tokens * item->heads;
    const int begin = item->first / TILE * TILE, tiles = (item->last - begin + TILE - 1) / TILE;
    const float c = call->scale * LOG2_E;
    Squares m;
    Halves h;
    Tile found[TILES];

    for (int t = 0; t < tiles; t++) find_tile(&found[t], call, item, begin + t * TILE);
    for (int i = 0; i < RUNS; i++) ask_for(found[0].keys[i], 0, 2 * RUN * head_dim);
    pack_columns(&m, call, item, span[ROW], rows, head_dim);
    see(&m, call, item, span[START], HALF);

    configure((const uint8_t[8]){SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE},
              (const uint8_t[8]){32, 32, 32, 32, 64, 64, 64, 32}); /* scores, keys, queries */
    for (int t = 0; t < tiles; t++) {
        const char *keys[RUNS];
        char copies[RUNS][RUN * MAX_HEAD_DIM * 2];
        for (int i = 0; i < RUNS; i++) {
            keys[i] = keys_of(&found[t], copies[i], call, item, begin + t * TILE, i);
            if (t + 1 < tiles) ask_for(found[t + 1].keys[i], 0, 2 * RUN * head_dim);
        }
        score_narrow(m.queries, keys, h.scores + t * TILE * HALF, head_dim);
    }

    const int all_from = m.from[rows - 1], all_to = m.to[0]; /* what all rows see: later ones begin and end later */
    const int count = tiles * TILE, masked = begin < all_from || begin + count > all_to;
    const vf now = masked ? largest_narrow(&m, h.scores, begin, count, 1) : largest_narrow(&m, h.scores, begin, count, 0);
    vf total = splat(0);
    for (int t = 0; t < tiles; t++)
        total += weigh_narrow(h.weights[t], h.scores + t * TILE * HALF, found[t].values, head_dim, now, c);
    total += other_half(total);
    memcpy(m.largest, &now, sizeof(float) * HALF);
    memcpy(m.total, &total, sizeof(float) * HALF);

    for (int t = 0; t < tiles; t++)
        for (int i = 0; i < RUNS; i++)
            pack_values(h.values + (t * TILE + i * RUN) / 2 * head_dim,
                        values_of(&found[t], m.copy[0], call, item, begin + t * TILE, i), NULL, head_dim, BFLOAT16, 1);
    configure((const uint8_t[8]){HALF, HALF, HALF, HALF, SIDE, SIDE, SIDE, HALF},
              (const uint8_t[8]){64, 64, 64, 64, 64, 64, 64, 64}); /* sums, values, weights */
    int d = 0;
    for (; d + 4 * SIDE <= head_dim; d += 4 * SIDE) sum_narrow(m.sums, &h, tiles, d, head_dim, 1);
    if (d < head_dim) sum_narrow(m.sums, &h, tiles, d, head_dim, 0);
    _tile_release();
    finish(call, item, m.sums, m.largest, m.total, BFLOAT16);
}
