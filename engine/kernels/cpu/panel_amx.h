/* Products of rows with panels of bfloat16 weights by AMX, for linear.c: 16 x 16 sums, 32 products deep, at once.
 *
 * A panel has STRIP columns, and lies in memory as AMX takes it, from end to end: for each depth of k two squares of
 * weights, in which a row is a pair of k and holds both weights of each column. Rows of x are taken where they lie, a
 * strip of 32 at a time.
 */

#include "vector.h"

enum {
    SQUARE = 16,
    SQUARE_DEPTH = 32,
    STRIP = 2 * SQUARE,
    SQUARE_BYTES = SQUARE * SQUARE_DEPTH * 2,
    DEPTH_LINES = 2 * SQUARE_BYTES / 64, /* of the cache, that a depth of a panel has */
    AMX_ROWS = 256,                      /* of x in a part, and */
    AMX_DEPTH = 1280, /* of k at once: so much of x stays in the second cache while panels go by */
    AMX_PANELS = 8,   /* most of a part */
    AMX_AHEAD = 8192, /* bytes: two multiplications take less time than memory */
};

typedef struct {
    const Product *product;
    int64_t parts_of_rows, rows_a_part, panels_a_part;
} AmxProduct;

/* What to ask memory for meanwhile: so many lines for each depth. */
typedef struct {
    const char *at;
    int lines;
} Ask;

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

/* sums [STRIP][STRIP] of 16 rows of x with a panel, or of 32 where `both`; behind the `first` k they are added to.
 *
 * What is multiplied next is loaded as soon as its register is free: a processor sees less far ahead where two threads
 * share a core.
 */
INLINE void amx_multiply(float *sums, const uint16_t *x, int64_t x_stride, const char *panel, int64_t depth, Ask ask,
                         const int both, const int first) {
    const uint16_t *lower = x + SQUARE * x_stride;
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        if (both) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, 4 * STRIP);
        _tile_loadd(1, sums + SQUARE, 4 * STRIP);
        if (both) {
            _tile_loadd(2, sums + SQUARE * STRIP, 4 * STRIP);
            _tile_loadd(3, sums + SQUARE * STRIP + SQUARE, 4 * STRIP);
        }
    }
    _tile_loadd(4, x, 2 * x_stride);
    _tile_loadd(6, panel, 64);
    _tile_loadd(7, panel + SQUARE_BYTES, 64);
    if (both) _tile_loadd(5, lower, 2 * x_stride);
    for (int64_t k = SQUARE_DEPTH; k < depth; k += SQUARE_DEPTH) {
        for (int line = 0; line < ask.lines; line++, ask.at += 64) __builtin_prefetch(ask.at, 0, 2);
        panel += 2 * SQUARE_BYTES;
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(4, x + k, 2 * x_stride);
        if (both) _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(6, panel, 64);
        if (both) _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(7, panel + SQUARE_BYTES, 64);
        if (both) _tile_loadd(5, lower + k, 2 * x_stride);
    }
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stored(0, sums, 4 * STRIP);
    _tile_stored(1, sums + SQUARE, 4 * STRIP);
    if (both) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_stored(2, sums + SQUARE * STRIP, 4 * STRIP);
        _tile_stored(3, sums + SQUARE * STRIP + SQUARE, 4 * STRIP);
    }
}

/* The first `count` of SQUARE, which may be none: a panel's second half can lie behind the last feature. */
INLINE vf amx_bias(const uint16_t *bias, int count) {
    const __mmask16 mask = count >= SQUARE ? 0xffff : count > 0 ? (__mmask16)((1u << count) - 1) : 0;
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(bias ? mask : 0, bias)), 16);
}

/* The one rounding, of sums [rows][STRIP]. */
INLINE void amx_store(const Weight *weight, uint16_t *y, const float *sums, int64_t column, int rows) {
    const int64_t left = weight->out_features - column;
    const int columns = (int)(left < STRIP ? left : STRIP);
    const __mmask32 mask = columns < STRIP ? (1u << columns) - 1 : ~0u;
    const uint16_t *bias = weight->bias ? weight->bias + column : NULL;
    const vf low = amx_bias(bias, columns), high = amx_bias(bias ? bias + SQUARE : NULL, columns - SQUARE);
    for (int r = 0; r < rows; r++, y += weight->out_features, sums += STRIP) {
        const __m512 first = (__m512)(load_f(sums) + low), second = (__m512)(load_f(sums + SQUARE) + high);
        _mm512_mask_storeu_epi16(y + column, mask, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
}

/* The same where half of a panel's columns are gates of the other half. These too are rounded: as if they had been stored
 * and read again. */
INLINE void amx_store_gated(const Weight *weight, uint16_t *y, const float *sums, int64_t column, int rows) {
    const int64_t half = weight->out_features / 2;
    const uint16_t *bias = weight->bias ? weight->bias + column / 2 : NULL;
    const vf low = amx_bias(bias, SQUARE), high = amx_bias(bias ? bias + half : NULL, SQUARE);
    for (int r = 0; r < rows; r++, y += half, sums += STRIP) {
        const __m512 first = (__m512)(load_f(sums) + low), second = (__m512)(load_f(sums + SQUARE) + high);
        uint16_t rounded[STRIP];
        _mm512_storeu_si512(rounded, (__m512i)_mm512_cvtne2ps_pbh(second, first));
        const vf gate = load_as_float(rounded, 0, BFLOAT16), up = load_as_float(rounded, SQUARE, BFLOAT16);
        store_float(y, column / 2, silu_times(gate, up), BFLOAT16);
    }
}

/* `rows` rows with one panel, [k, k + depth) of it. The first strip waits for what comes from memory, unless the strips
 * of the panel before, in the cache as they were, had time to ask for it: `cold`, `next`. */
INLINE void amx_panel(const Product *product, float *sums, int64_t first_row, int rows, int64_t panel, int64_t k,
                      int64_t depth, int cold, int next) {
    const Weight *weight = product->weight;
    const int64_t in = weight->in_features, y_stride = weight->out_features / (weight->gated ? 2 : 1);
    const char *from = (const char *)(weight->panels + (panel * in + k) * STRIP), *asked = from + in * STRIP * 2;
    const int strips = (rows + STRIP - 1) / STRIP;
    amx_configure(SQUARE, SQUARE);
    for (int s = 0; s < strips; s++, sums += depth < in ? STRIP * STRIP : 0) {
        const int some = rows - s * STRIP < STRIP ? rows - s * STRIP : STRIP;
        if (some < STRIP) amx_configure(some < SQUARE ? some : SQUARE, some > SQUARE ? some - SQUARE : 0);
        const uint16_t *x = product->x + (first_row + s * STRIP) * product->x_stride + k;
        Ask ask = {from + AMX_AHEAD, cold ? DEPTH_LINES : 0};
        if (s > 0) {
            ask = (Ask){asked, next ? (DEPTH_LINES + strips - 2) / (strips - 1) : 0};
            asked += ask.lines * 64 * (depth / SQUARE_DEPTH - 1);
        }
        if (some > SQUARE && k == 0)
            amx_multiply(sums, x, product->x_stride, from, depth, ask, 1, 1);
        else if (some > SQUARE)
            amx_multiply(sums, x, product->x_stride, from, depth, ask, 1, 0);
        else if (k == 0)
            amx_multiply(sums, x, product->x_stride, from, depth, ask, 0, 1);
        else
            amx_multiply(sums, x, product->x_stride, from, depth, ask, 0, 0);
        if (k + depth < in) continue;
        uint16_t *y = product->y + (first_row + s * STRIP) * y_stride;
        if (weight->gated)
            amx_store_gated(weight, y, sums, panel * STRIP, some);
        else
            amx_store(weight, y, sums, panel * STRIP, some);
    }
}

static NOINLINE void amx_part(const void *what, int64_t index) {
    const AmxProduct *amx = what;
    const Product *product = amx->product;
    float sums[AMX_PANELS * AMX_ROWS * STRIP] __attribute__((aligned(64)));
    const int64_t first_row = index % amx->parts_of_rows * amx->rows_a_part, rows_left = product->num_rows - first_row;
    const int rows = (int)(rows_left < amx->rows_a_part ? rows_left : amx->rows_a_part);
    const int64_t first_panel = index / amx->parts_of_rows * amx->panels_a_part;
    const int64_t panels_left = panels_of(product->weight) - first_panel;
    const int panels = (int)(panels_left < amx->panels_a_part ? panels_left : amx->panels_a_part);
    const int64_t in = product->weight->in_features, most = rows > STRIP ? AMX_DEPTH : in;
    const int64_t cuts = (in + most - 1) / most, even = (in / SQUARE_DEPTH + cuts - 1) / cuts * SQUARE_DEPTH;
    const int64_t panel_sums = cuts > 1 ? AMX_ROWS * STRIP : 0; /* those of a panel go on at the next cut */
    for (int64_t k = 0; k < in; k += even)
        for (int p = 0; p < panels; p++)
            amx_panel(product, sums + p * panel_sums, first_row, rows, first_panel + p, k, in - k < even ? in - k : even,
                      p == 0 || rows <= STRIP, p + 1 < panels);
    _tile_release();
}

/* All of them, by whoever is free. */
static void amx_product(const Product *product, const Team *team) {
    const int64_t panels = panels_of(product->weight), num_rows = product->num_rows;
    const int64_t strips = (num_rows + STRIP - 1) / STRIP, most = AMX_ROWS / STRIP;
    AmxProduct amx = {product, (strips + most - 1) / most};
    amx.rows_a_part = (strips + amx.parts_of_rows - 1) / amx.parts_of_rows * STRIP;
    amx.panels_a_part = panels * amx.parts_of_rows / (PARTS_A_THREAD * team->threads);
    if (amx.panels_a_part > AMX_PANELS) amx.panels_a_part = AMX_PANELS;
    if (amx.panels_a_part < 1) amx.panels_a_part = 1;
    share_out(team, amx_part, &amx, (panels + amx.panels_a_part - 1) / amx.panels_a_part * amx.parts_of_rows);
}
