/* Products of rows with panels of weights, for one instruction set. linear.c includes this once for each, with
 *
 *   NAME(x)    the name of x in this instance
 *   LANES      float32 values of a vector: 8 or 16
 *   MOST_ROWS  of a strip: with two vectors of sums each, what the registers hold
 *
 * Weights become float32 in registers, at each use: two cheap instructions a panel's row of bfloat16 beside twelve
 * and more that multiply, and half of the bytes of float32 to fetch from wherever they are.
 */

#define vf NAME(vf)
#define vi NAME(vi)
#define WIDTH (2 * LANES)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

#define load_f NAME(panel_load_f)
#define halves NAME(panel_halves)
#define to_halves NAME(panel_to_halves)
#define multiply_add NAME(multiply_add)
#define weights_of NAME(weights_of)
#define as_floats NAME(as_floats)
#define as_many_floats NAME(as_many_floats)
#define widen NAME(widen)
#define narrow NAME(narrow)
#define multiply NAME(multiply)
#define strip NAME(strip)
#define strips NAME(strips)
#define panel_part NAME(panel_part)

INLINE vf load_f(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

#if LANES == 16
INLINE vf halves(const uint16_t *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p)); }
INLINE void to_halves(uint16_t *p, vf v) { _mm256_storeu_si256((void *)p, _mm512_cvtps_ph((__m512)v, 0)); }
INLINE vf multiply_add(vf a, float b, vf c) {
    return (vf)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
}
#else
INLINE vf halves(const uint16_t *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)); }
INLINE void to_halves(uint16_t *p, vf v) { _mm_storeu_si128((void *)p, _mm256_cvtps_ph((__m256)v, 0)); }
INLINE vf multiply_add(vf a, float b, vf c) {
    return (vf)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
}
#endif

/* A row of a panel: columns [0, LANES) and [LANES, WIDTH). */
INLINE void weights_of(vf row[2], const uint16_t *panel, const int dtype) {
    if (dtype == FLOAT16) {
        row[0] = halves(panel), row[1] = halves(panel + LANES);
        return;
    }
    vi both;
    memcpy(&both, panel, sizeof both);
    row[0] = (vf)(both << 16);
    row[1] = (vf)(both & (int32_t)0xffff0000);
}

INLINE vf as_floats(const uint16_t *x, const int dtype) {
    if (dtype == FLOAT16) return halves(x);
    uint16_t raw __attribute__((vector_size(2 * LANES)));
    memcpy(&raw, x, sizeof raw);
    return (vf)(__builtin_convertvector(raw, vi) << 16);
}

/* As much of x as there is, and zeros. */
INLINE vf as_many_floats(const uint16_t *x, int64_t count, const int dtype) {
    uint16_t some[LANES] = {0};
    memcpy(some, x, 2 * (size_t)count);
    return as_floats(some, dtype);
}

/* `count` of x to float32; up to LANES - 1 zeros follow them. */
INLINE void widen(float *to, const uint16_t *x, int64_t count, const int dtype) {
    for (; count > 0; count -= LANES, to += LANES, x += LANES) {
        vf value = count < LANES ? as_many_floats(x, count, dtype) : as_floats(x, dtype);
        memcpy(to, &value, sizeof value);
    }
}

/* The one rounding: `count` sums, and the bias where there is one. */
INLINE void narrow(uint16_t *y, const float *sums, const uint16_t *bias, int64_t count, const int dtype) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i < LANES ? count - i : LANES;
        vf value = load_f(sums + i);
        if (bias) value += as_many_floats(bias + i, left, dtype);
        uint16_t rounded[LANES];
        if (dtype == FLOAT16) {
            to_halves(rounded, value);
        } else {
            vi bits = (vi)value, odd = bits >> 16 & 1, nan = value != value;
            bits = (bits + 0x7fff + odd) & ~nan;
            bits = bits >> 16 | (nan & 0x7fc0);
            for (int lane = 0; lane < LANES; lane++) rounded[lane] = (uint16_t)bits[lane];
        }
        memcpy(y + i, rounded, 2 * (size_t)left);
    }
}

/* sums += x panels, of R rows and P neighbouring panels. Meanwhile asks for what is at `ahead`, `ask` bytes a k, and for
 * as much of what is there of the other panels. */
INLINE void multiply(float *sums, const float *x, int64_t x_stride, const uint16_t *panel, int64_t panel_stride,
                     int64_t depth, const char *ahead, int64_t ask, const int dtype, const int R, const int P) {
    vf sum[MOST_ROWS][2 * MOST_PANELS];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * P; v++) sum[r][v] = load_f(sums + r * SUMS + v * LANES);
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            if (p && R > 2) __asm__ volatile("" ::: "memory"); /* x is read again: registers are full */
            vf row[2];
            __builtin_prefetch(ahead + p * panel_stride * 2 + k * ask);
            weights_of(row, panel + p * panel_stride + k * WIDTH, dtype);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const float factor = x[r * x_stride + k];
                sum[r][2 * p] = multiply_add(row[0], factor, sum[r][2 * p]);
                sum[r][2 * p + 1] = multiply_add(row[1], factor, sum[r][2 * p + 1]);
            }
        }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * P; v++) memcpy(sums + r * SUMS + v * LANES, &sum[r][v], sizeof(vf));
}

/* Few rows take several panels at once, where there are: a sum can only be added to every fourth cycle. Returns how many
 * panels it took. */
INLINE int strip(float *sums, const float *x, int64_t x_stride, const uint16_t *panel, int64_t panel_stride,
                 int64_t depth, const char *ahead, int64_t ask, int rows, int panels, const int dtype) {
#define STRIP(R, P)                                                              \
    case R:                                                                      \
        if (P > 1 && panels >= P) {                                              \
            multiply(sums, x, x_stride, panel, panel_stride, depth, ahead, ask, dtype, R, P); \
            return P;                                                            \
        }                                                                        \
        multiply(sums, x, x_stride, panel, panel_stride, depth, ahead, ask, dtype, R, 1); \
        return 1
    switch (rows) {
        STRIP(1, 4);
        STRIP(2, 2);
        STRIP(3, 2);
        STRIP(4, 1);
        STRIP(5, 1);
        STRIP(6, 1);
#if MOST_ROWS > 6
        STRIP(7, 1);
        STRIP(8, 1);
        STRIP(9, 1);
        STRIP(10, 1);
        STRIP(11, 1);
        STRIP(12, 1);
        STRIP(13, 1);
        STRIP(14, 1);
#endif
    }
#undef STRIP
    __builtin_unreachable();
}

/* `rows` rows in even strips, so that 7 are 4 and 3, which are faster than 6 and 1. */
INLINE void strips(const Product *product, float *sums, float *x, int64_t first_row, int rows, int64_t first_panel,
                   int panels, const int dtype) {
    const Weight *weight = product->weight;
    const int64_t in = weight->in_features, panel_stride = in * WIDTH;
    const int count = (rows + MOST_ROWS - 1) / MOST_ROWS;
    /* One strip needs its weights once, and goes through them from end to end; more find them in a near cache. */
    const int64_t most = count == 1 ? FLOATS / rows / WIDTH * WIDTH - WIDTH : DEPTH;
    const int64_t cuts = (in + most - 1) / most, even = ((in + cuts - 1) / cuts + WIDTH - 1) / WIDTH * WIDTH;
    const int64_t x_stride = even + 16; /* else rows would be in each other's place in the cache for many sizes */
    for (int64_t k = 0; k < in; k += even) {
        const int64_t depth = in - k < even ? in - k : even;
        for (int r = 0; r < rows; r++)
            widen(x + r * x_stride, product->x + (first_row + r) * product->x_stride + k, depth, dtype);
        for (int p = 0, taken = 1; p < panels; p += taken) {
            const uint16_t *panel = weight->panels + (first_panel + p) * panel_stride + k * WIDTH;
            const char *next = (const char *)(panel + panel_stride);
            const int64_t ask = WIDTH * 2 / count;
            for (int s = 0, r = 0, part; s < count; s++, r += part) {
                part = (rows - r + count - s - 1) / (count - s);
                const char *ahead = count == 1 ? (const char *)panel + AHEAD : next + s * ask * depth;
                taken = strip(sums + r * SUMS + p * WIDTH, x + r * x_stride, x_stride, panel, panel_stride, depth,
                              ahead, ask, part, count == 1 ? panels - p : 1, dtype);
            }
        }
    }
}

static NOINLINE void panel_part(const Product *product, int64_t first_row, int rows, int64_t first_panel, int panels) {
    const Weight *weight = product->weight;
    float x[FLOATS] __attribute__((aligned(64))), sums[ROWS * SUMS] __attribute__((aligned(64)));
    memset(sums, 0, sizeof(float) * SUMS * (size_t)rows);
    if (weight->dtype == BFLOAT16)
        strips(product, sums, x, first_row, rows, first_panel, panels, BFLOAT16);
    else
        strips(product, sums, x, first_row, rows, first_panel, panels, FLOAT16);
    const int64_t column = first_panel * WIDTH, left = weight->out_features - column;
    const int64_t columns = left < panels * WIDTH ? left : panels * WIDTH;
    const uint16_t *bias = weight->bias ? weight->bias + column : NULL;
    for (int r = 0; r < rows; r++) {
        uint16_t *y = product->y + (first_row + r) * weight->out_features + column;
        if (weight->dtype == BFLOAT16)
            narrow(y, sums + r * SUMS, bias, columns, BFLOAT16);
        else
            narrow(y, sums + r * SUMS, bias, columns, FLOAT16);
    }
}

#undef vf
#undef vi
#undef WIDTH
#undef load_f
#undef halves
#undef to_halves
#undef multiply_add
#undef weights_of
#undef as_floats
#undef as_many_floats
#undef widen
#undef narrow
#undef multiply
#undef strip
#undef strips
#undef panel_part
#undef NAME
#undef LANES
#undef MOST_ROWS
