/* y = x wᵀ + bias for 16-bit weights, with AMX or where there is no 16-bit arithmetic: x, w and bias bfloat16 or
 * float16, sums float32, one rounding at the end.
 *
 * Weights are packed once, at load, into panels of two vectors of columns (of y), still in 16 bits, the last panel filled
 * up with zeros. Work is cut into parts of some neighbouring panels and at most ROWS (AMX_ROWS) rows of x, which threads
 * take as they come to it: they are not equally fast where other machines share their cores.
 *
 * Every element of y is the sum of its products in the order of k, one fused multiply-add a product, from 0, whatever
 * strips, panels, cuts of k and threads it is computed in. So neither a row's place in the batch, nor its company, nor
 * the number of threads changes a bit of its result.
 *
 * linear.py mirrors Weight. panel.h has the arithmetic for vectors, panel_amx.h that for AMX.
 */

#include "common.h"

#if defined(__x86_64__)

#include <cpuid.h>

enum {
    ROWS = 84,   /* of x in a part: full strips of 6 and of 14; a weight that comes from memory serves so many */
    DEPTH = 384, /* of k, where several strips share a panel: 12 or 24 kB of weights stay in the first cache */
    FLOATS = ROWS * (DEPTH + 16),
    PART_PANELS = 8, /* most of a part */
    MOST_PANELS = 4, /* at once */
    AHEAD = 4096, /* bytes, of what one strip needs next: beyond what the processor would fetch by itself */
    SUMS = PART_PANELS * 32,
    PARTS_A_THREAD = 4, /* wanted, so that all threads end at about the same time */
};

typedef struct {
    uint16_t *panels;
    const uint16_t *bias; /* or NULL */
    int64_t in_features, out_features;
    int64_t dtype, isa;
    int64_t gated; /* 1: the first half of the features are gates of the second, and y is silu(gate) * up */
} Weight;

typedef struct {
    const Weight *weight;
    const uint16_t *x;
    uint16_t *y;
    int64_t num_rows, x_stride; /* elements */
    int64_t blocks, panels_a_part;
} Product;

BEGIN_TARGET("avx2,fma,f16c")
#define NAME(x) x##_avx2
#define LANES 8
#define MOST_ROWS 6
#include "panel.h"
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define NAME(x) x##_avx512
#define LANES 16
#define MOST_ROWS 14
#include "panel.h"
END_TARGET

static int64_t lanes_of(const Weight *weight) { return weight->isa >= AVX512 ? 16 : 8; }

static int64_t panels_of(const Weight *weight) {
    const int64_t width = 2 * lanes_of(weight);
    return (weight->out_features + width - 1) / width;
}

#if HAS_AMX
BEGIN_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define NAME(x) x##_amx
#define LANES 16
#define DOT 1
#include "panel_amx.h"
#undef NAME
#undef LANES
#undef DOT
END_TARGET
#endif

/* Whether the weight is in AMX's squares. */
static int in_squares(const Weight *weight) {
#if HAS_AMX
    return weight->isa >= AMX && weight->dtype == BFLOAT16 && weight->in_features % SQUARE_DEPTH == 0;
#else
    (void)weight;
    return 0;
#endif
}

/* Where weight k of column `column` is in a panel: at the sum of two places. A panel of vectors is [in_features][WIDTH].
 * There two bfloat16 make a word, of columns that are LANES apart: the lower one is a float32 when it is shifted up, the
 * higher one when the lower one is masked. */
INLINE int64_t place_of_column(const Weight *weight, int64_t column) {
#if HAS_AMX
    if (in_squares(weight)) return column / SQUARE * SQUARE * SQUARE_DEPTH + column % SQUARE * 2;
#endif
    const int64_t lanes = lanes_of(weight);
    return weight->dtype == BFLOAT16 ? column % lanes * 2 + column / lanes : column;
}

INLINE int64_t place_of_k(int64_t k, int64_t width, const int squares) {
#if HAS_AMX
    if (squares) return k / SQUARE_DEPTH * SQUARE_DEPTH * width + k % SQUARE_DEPTH / 2 * 2 * SQUARE + k % 2;
#endif
    (void)squares;
    return k * width;
}

static void product_part(const void *what, int64_t index) {
    const Product *product = what;
    const int64_t block = index % product->blocks, first_panel = index / product->blocks * product->panels_a_part;
    const int64_t first_row = block * product->num_rows / product->blocks;
    const int rows = (int)((block + 1) * product->num_rows / product->blocks - first_row);
    const int64_t left = panels_of(product->weight) - first_panel;
    const int panels = (int)(left < product->panels_a_part ? left : product->panels_a_part);
    if (product->weight->isa >= AVX512)
        panel_part_avx512(product, first_row, rows, first_panel, panels);
    else
        panel_part_avx2(product, first_row, rows, first_panel, panels);
}

/* y [num_rows, out_features], or half of it where the weight is gated, of x, whose rows are x_stride elements apart. Gated
 * are only weights in squares, of a multiple of 2 SQUARE features. */
void baton_linear(const Weight *weight, const Team *team, const uint16_t *x, int64_t x_stride, int64_t num_rows,
                  uint16_t *y) {
    Product product = {weight, x, y, num_rows, x_stride, (num_rows + ROWS - 1) / ROWS, PART_PANELS};
#if HAS_AMX
    if (in_squares(weight)) {
        if (num_rows) amx_product(&product, team);
        return;
    }
#endif
    const int64_t panels = panels_of(weight);
    if (panels * product.blocks < PART_PANELS * PARTS_A_THREAD * team->threads) product.panels_a_part = MOST_PANELS;
    const int64_t groups = (panels + product.panels_a_part - 1) / product.panels_a_part;
    share_out(team, product_part, &product, groups * product.blocks);
}

typedef struct {
    const Weight *weight;
    const uint16_t *rows;
} Packing;

/* Which row of the weight is in a panel's column. Where it is gated, a panel has SQUARE gates and then what is theirs. */
static int64_t row_of(const Weight *weight, int64_t panel, int64_t column) {
    const int64_t width = 2 * lanes_of(weight);
    if (!weight->gated) return panel * width + column;
    return column / lanes_of(weight) * (weight->out_features / 2) + panel * lanes_of(weight) + column % lanes_of(weight);
}

static void pack_part(const void *what, int64_t panel) {
    const Packing *packing = what;
    const Weight *w = packing->weight;
    const int64_t width = 2 * lanes_of(w), in = w->in_features;
    const int squares = in_squares(w);
    for (int64_t column = 0; column < width; column++) {
        const int64_t row = row_of(w, panel, column);
        uint16_t *to = w->panels + panel * in * width + place_of_column(w, column);
        if (row >= w->out_features)
            for (int64_t k = 0; k < in; k++) to[place_of_k(k, width, squares)] = 0;
        else
            for (int64_t k = 0; k < in; k++) to[place_of_k(k, width, squares)] = packing->rows[row * in + k];
    }
}

int64_t baton_linear_packed_size(const Weight *weight) {
    return panels_of(weight) * weight->in_features * 2 * lanes_of(weight);
}

/* Fills the weight's panels, baton_linear_packed_size elements, from its rows [out_features, in_features]. */
void baton_linear_pack(const Weight *weight, const Team *team, const uint16_t *rows) {
    const Packing packing = {weight, rows};
    share_out(team, pack_part, &packing, panels_of(weight));
}

typedef struct {
    const Weight *weight;
    const int64_t *indices;
    uint16_t *rows;
} Unpacking;

static void unpack_part(const void *what, int64_t i) {
    const Unpacking *unpacking = what;
    const Weight *w = unpacking->weight;
    const int64_t width = 2 * lanes_of(w), in = w->in_features, row = unpacking->indices[i];
    const int squares = in_squares(w);
    const uint16_t *from = w->panels + row / width * in * width + place_of_column(w, row % width);
    for (int64_t k = 0; k < in; k++) unpacking->rows[i * in + k] = from[place_of_k(k, width, squares)];
}

/* The rows that were packed, of `count` indices. Returns 0, and does nothing, where one of these is of no row. */
int64_t baton_linear_unpack(const Weight *weight, const Team *team, const int64_t *indices, int64_t count,
                            uint16_t *rows) {
    for (int64_t i = 0; i < count; i++)
        if (indices[i] < 0 || indices[i] >= weight->out_features) return 0;
    const Unpacking unpacking = {weight, indices, rows};
    share_out(team, unpack_part, &unpacking, count);
    return 1;
}

#endif

/* Whether AVX2 here comes with what float16 needs, as everywhere but in some virtual machine. */
int64_t baton_has_f16c(void) {
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
#else
    return 0;
#endif
}
