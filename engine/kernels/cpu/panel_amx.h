/* Products of rows with panels of bfloat16 weights by AMX, for linear.c: 16 x 16 sums, 32 products deep, at once.
 *
 * A panel has SQUARE + SQUARE columns, and lies in memory as AMX takes it, from end to end: for each DEPTH of k two
 * squares of weights, in which a row is a pair of k and holds both weights of each column. Rows of x are taken where
 * they lie.
 */

enum {
    SQUARE = 16,
    SQUARE_DEPTH = 32,
    STRIP_BYTES = 2 * SQUARE * SQUARE_DEPTH * 2, /* of a panel, for each depth */
    AMX_ROWS = 256,  /* of x in a part, and */
    AMX_DEPTH = 1280, /* of k at once: so much of x stays in the second cache while panels go by */
    AMX_PANELS = 4, /* most of a part */
    AMX_AHEAD = 8192, /* bytes: two multiplications take less time than memory */
};

/* Registers 0 to 3 are sums, 4 and 5 rows of x, `upper` and `lower` of them, 6 and 7 weights. */
INLINE void amx_configure(int upper, int lower) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 64, shape.rows[i] = SQUARE;
    shape.rows[0] = shape.rows[1] = shape.rows[4] = (uint8_t)upper;
    shape.rows[2] = shape.rows[3] = shape.rows[5] = (uint8_t)(lower ? lower : SQUARE);
    _tile_loadconfig(&shape);
}

/* sums [32][32] of 16 rows with a panel, or of 32 where `both`; behind the `first` k they are added to. `ask`: the panel
 * comes from memory. */
INLINE void amx_multiply(float *sums, const uint16_t *x, int64_t x_stride, const char *panel, int64_t depth,
                         const int both, const int first, const int ask) {
    const uint16_t *lower = x + SQUARE * x_stride;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (both) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, 4 * 2 * SQUARE);
        _tile_loadd(1, sums + SQUARE, 4 * 2 * SQUARE);
        if (both) {
            _tile_loadd(2, sums + 2 * SQUARE * SQUARE, 4 * 2 * SQUARE);
            _tile_loadd(3, sums + 2 * SQUARE * SQUARE + SQUARE, 4 * 2 * SQUARE);
        }
    }
    for (int64_t k = 0; k < depth; k += SQUARE_DEPTH, panel += STRIP_BYTES) {
        if (ask)
            for (int line = 0; line < STRIP_BYTES; line += 64) __builtin_prefetch(panel + AMX_AHEAD + line);
        _tile_loadd(6, panel, 64);
        _tile_loadd(7, panel + STRIP_BYTES / 2, 64);
        _tile_loadd(4, x + k, 2 * x_stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, lower + k, 2 * x_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * 2 * SQUARE);
    _tile_stored(1, sums + SQUARE, 4 * 2 * SQUARE);
    if (both) {
        _tile_stored(2, sums + 2 * SQUARE * SQUARE, 4 * 2 * SQUARE);
        _tile_stored(3, sums + 2 * SQUARE * SQUARE + SQUARE, 4 * 2 * SQUARE);
    }
}

/* The one rounding. */
INLINE void amx_store(uint16_t *y, int64_t y_stride, const float *sums, const uint16_t *bias, int rows, int columns) {
    const __mmask32 mask = columns < 2 * SQUARE ? (1u << columns) - 1 : ~0u;
    const __m512i none = _mm512_maskz_loadu_epi16(bias ? mask : 0, bias);
    const __m512 low = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(none)), 16);
    const __m512 high = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(none, 1)), 16);
    for (int r = 0; r < rows; r++, y += y_stride, sums += 2 * SQUARE) {
        const __m512 first = _mm512_add_ps(_mm512_load_ps(sums), low);
        const __m512 second = _mm512_add_ps(_mm512_load_ps(sums + SQUARE), high);
        _mm512_mask_storeu_epi16(y, mask, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

/* The part's rows with one panel, [k, k + depth) of it. */
INLINE void amx_rows(const Product *product, float *sums, int64_t first_row, int rows, int64_t panel, int64_t k,
                     int64_t depth) {
    const Weight *weight = product->weight;
    const int64_t in = weight->in_features, x_stride = product->x_stride, last = k + depth == in;
    const int64_t column = panel * 2 * SQUARE, left = weight->out_features - column;
    const char *from = (const char *)(weight->panels + (panel * in + k) * 2 * SQUARE);
    amx_configure(SQUARE, SQUARE);
    for (int r = 0; r < rows; r += 2 * SQUARE, sums += 4 * SQUARE * SQUARE) {
        const int some = rows - r < 2 * SQUARE ? rows - r : 2 * SQUARE;
        if (some < 2 * SQUARE) amx_configure(some < SQUARE ? some : SQUARE, some > SQUARE ? some - SQUARE : 0);
        const uint16_t *x = product->x + (first_row + r) * x_stride + k;
        switch ((some > SQUARE) << 2 | (k == 0) << 1 | (r == 0)) {
#define CASE(both, first, ask)                                                  \
    case (both) << 2 | (first) << 1 | (ask):                                    \
        amx_multiply(sums, x, x_stride, from, depth, both, first, ask);         \
        break
            CASE(0, 0, 0);
            CASE(0, 0, 1);
            CASE(0, 1, 0);
            CASE(0, 1, 1);
            CASE(1, 0, 0);
            CASE(1, 0, 1);
            CASE(1, 1, 0);
            CASE(1, 1, 1);
#undef CASE
        }
        if (last)
            amx_store(product->y + (first_row + r) * weight->out_features + column, weight->out_features, sums,
                      weight->bias ? weight->bias + column : NULL, some, (int)(left < 2 * SQUARE ? left : 2 * SQUARE));
    }
}

static NOINLINE void amx_part(const Product *product, int64_t first_row, int rows, int64_t first_panel, int panels) {
    float sums[AMX_PANELS][AMX_ROWS * 2 * SQUARE] __attribute__((aligned(64)));
    const int64_t in = product->weight->in_features, most = rows > 2 * SQUARE ? AMX_DEPTH : in;
    const int64_t cuts = (in + most - 1) / most, even = (in / SQUARE_DEPTH + cuts - 1) / cuts * SQUARE_DEPTH;
    for (int64_t k = 0; k < in; k += even)
        for (int p = 0; p < panels; p++)
            amx_rows(product, sums[p], first_row, rows, first_panel + p, k, in - k < even ? in - k : even);
    _tile_release();
}
