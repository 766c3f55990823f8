/* Element-wise work on single rows, for one instruction set of each_isa.h.
 *
 * All arithmetic is float32. What is stored in 16 bits is rounded once, at its end; a residual sum is rounded before it
 * is normed, so that what is normed is what the next layer adds to.
 */

#include "vector.h"

#define STEP 16 /* all sizes are multiples of it: a vector or more of every instruction set */

#define add_norm_row NAME(add_norm_row)
#define gate_row NAME(gate_row)
#define rotate_head NAME(rotate_head)

/* hidden += delta, unless that is NULL; out = hidden / rms(hidden) * weight. */
INLINE void add_norm_row(char *hidden, const char *delta, const char *weight, char *out, int64_t size, float eps,
                         const int dtype) {
    vf squares[STEP / LANES] = {{0}};
    for (int64_t column = 0; column < size; column += STEP)
        for (int i = 0; i < STEP / LANES; i++) {
            const int64_t at = column + i * LANES;
            vf x = load_as_float(hidden, at, dtype);
            if (delta) {
                store_float(hidden, at, x + load_as_float(delta, at, dtype), dtype);
                x = load_as_float(hidden, at, dtype);
            }
            squares[i] += x * x;
        }
    for (int i = 1; i < STEP / LANES; i++) squares[0] += squares[i];
    const float scale = 1 / sqrtf(sum_of(squares[0]) / (float)size + eps);
    for (int64_t at = 0; at < size; at += LANES)
        store_float(out, at, load_as_float(hidden, at, dtype) * scale * load_as_float(weight, at, dtype), dtype);
}

/* silu(gate) * up, of gate [size] and up behind it. */
INLINE void gate_row(const char *gate_up, char *out, int64_t size, const int dtype) {
    for (int64_t at = 0; at < size; at += LANES) {
        const vf gate = load_as_float(gate_up, at, dtype), up = load_as_float(gate_up, size + at, dtype);
        store_float(out, at, silu_times(gate, up), dtype);
    }
}

/* One head: normed where `weight` is not NULL, then each pair (i, i + head_dim / 2) turned by its angle. May be done in
 * place. */
INLINE void rotate_head(const char *from, char *to, const float *cos, const float *sin, const char *weight, float eps,
                        const int head_dim, const int dtype) {
    float x[MAX_HEAD_DIM] __attribute__((aligned(64))), turned[MAX_HEAD_DIM] __attribute__((aligned(64)));
    vf squares = splat(0);
    for (int d = 0; d < head_dim; d += LANES) {
        const vf v = load_as_float(from, d, dtype);
        squares += v * v;
        memcpy(x + d, &v, sizeof v);
    }
    if (weight) {
        const float scale = 1 / sqrtf(sum_of(squares) / (float)head_dim + eps);
        for (int d = 0; d < head_dim; d += LANES) {
            const vf v = load_f(x + d) * scale * load_as_float(weight, d, dtype);
            memcpy(x + d, &v, sizeof v);
        }
    }
    const int half = head_dim / 2;
    int d = 0;
    for (; d + LANES <= half; d += LANES) {
        const vf first = load_f(x + d), second = load_f(x + half + d), c = load_f(cos + d), s = load_f(sin + d);
        const vf one = first * c - second * s, other = second * c + first * s;
        memcpy(turned + d, &one, sizeof one);
        memcpy(turned + half + d, &other, sizeof other);
    }
    for (; d < half; d++) {
        turned[d] = x[d] * cos[d] - x[half + d] * sin[d];
        turned[half + d] = x[half + d] * cos[d] + x[d] * sin[d];
    }
    for (d = 0; d < head_dim; d += LANES) store_float(to, d, load_f(turned + d), dtype);
}

/* The loops over rows; with a dtype for each, as a constant. */
#define EACH_DTYPE(dtype, CALL)           \
    switch (dtype) {                      \
    case FLOAT32: CALL(FLOAT32); break;   \
    case BFLOAT16: CALL(BFLOAT16); break; \
    default: CALL(FLOAT16);               \
    }

static void NAME(add_norm)(const AddNorm *a, int64_t from, int64_t to) {
    const int64_t bytes = a->size * size_of(a->setting->dtype);
#define ADD_NORM(dtype)                                                                                           \
    for (int64_t r = from; r < to; r++)                                                                           \
    add_norm_row(a->hidden + r * bytes, a->delta ? a->delta + r * bytes : NULL, a->weight, a->out + r * bytes,    \
                 a->size, a->eps, dtype)
    EACH_DTYPE(a->setting->dtype, ADD_NORM)
#undef ADD_NORM
}

static void NAME(gate)(const Gate *g, int64_t from, int64_t to) {
    const int64_t bytes = g->size * size_of(g->setting->dtype);
#define GATE(dtype) \
    for (int64_t r = from; r < to; r++) gate_row(g->gate_up + 2 * r * bytes, g->out + r * bytes, g->size, dtype)
    EACH_DTYPE(g->setting->dtype, GATE)
#undef GATE
}

/* Heads [0, count) of `from`, to `to` with `step` bytes from head to head. */
static void NAME(rotate)(const Write *w, int64_t token, const char *from, char *to, int64_t step, int64_t count,
                         const char *weight) {
    const int head_dim = (int)w->batch->head_dim, half = head_dim / 2;
    const float *cos = w->cos + token * half, *sin = w->sin + token * half;
    const int64_t bytes = head_dim * size_of(w->batch->dtype);
#define ROTATE(dtype)                   \
    for (int64_t h = 0; h < count; h++) \
    rotate_head(from + h * bytes, to + h * step, cos, sin, weight, w->norm_eps, head_dim, dtype)
    EACH_DTYPE(w->batch->dtype, ROTATE)
#undef ROTATE
}
#undef EACH_DTYPE
#undef STEP
