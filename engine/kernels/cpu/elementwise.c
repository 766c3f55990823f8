/* What lies between a decoder's matrix products, each in one pass: residual sum and RMS norm, rotary embedding and KV
 * write, gated activation.
 *
 * A row's result depends on nothing but the row: rows are shared out among threads, never cut. rows.h has the
 * arithmetic.
 */

#include "batch.h"

/* What is worth handing to another thread: some ten microseconds' work. One row never is. */
enum { PART_VALUES = 16384 };

/* Mirrored by library.py. */
typedef struct {
    int64_t dtype, isa;
    Team team;
} Setting;

typedef struct {
    const Setting *setting;
    char *hidden;
    const char *delta, *weight;
    char *out;
    int64_t num_rows, size;
    float eps;
} AddNorm;

typedef struct {
    const Setting *setting;
    const char *gate_up;
    char *out;
    int64_t num_rows, size;
} Gate;

typedef struct {
    const Batch *batch;
    int64_t layer;
    const char *key, *value;
    int64_t key_stride, value_stride; /* elements from token to token */
    char *query; /* rotated in place, as keys are on their way; or NULL, and the rest is not used */
    int64_t num_heads;
    const float *cos, *sin;            /* [num_tokens, head_dim / 2] */
    const char *query_norm, *key_norm; /* [head_dim], or NULL */
    float norm_eps;
} Write;

static inline int64_t size_of(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

#define EACH_ISA "rows.h"
#include "each_isa.h"

typedef struct {
    void (*add_norm)(const AddNorm *, int64_t from, int64_t to);
    void (*gate)(const Gate *, int64_t from, int64_t to);
    void (*rotate)(const Write *, int64_t token, const char *from, char *to, int64_t step, int64_t count,
                   const char *weight);
} RowKernels;

static const RowKernels kernels[] = {
    [GENERIC] = {add_norm_generic, gate_generic, rotate_generic},
#if defined(__x86_64__)
    [AVX2] = {add_norm_avx2, gate_avx2, rotate_avx2},
    [AVX512] = {add_norm_avx512, gate_avx512, rotate_avx512},
    [AVX512_BF16] = {add_norm_avx512_bf16, gate_avx512_bf16, rotate_avx512_bf16},
    [AMX] = {add_norm_avx512_bf16, gate_avx512_bf16, rotate_avx512_bf16},
#endif
};

/* Rows of a part, of `size` values each. */
static int64_t part_rows(int64_t size) { return (PART_VALUES + size - 1) / size; }

static int64_t num_parts(int64_t num_rows, int64_t size) {
    return (num_rows + part_rows(size) - 1) / part_rows(size);
}

static void add_norm_part(const void *what, int64_t index) {
    const AddNorm *a = what;
    const int64_t rows = part_rows(a->size), from = index * rows;
    kernels[a->setting->isa].add_norm(a, from, at_most(from + rows, a->num_rows));
}

/* hidden += delta, where that is not NULL; out = rms_norm(hidden) * weight. All [num_rows, size] but weight, [size]. */
void baton_add_norm(const Setting *setting, char *hidden, const char *delta, const char *weight, char *out,
                    int64_t num_rows, int64_t size, float eps) {
    const AddNorm a = {setting, hidden, delta, weight, out, num_rows, size, eps};
    share_out(&setting->team, add_norm_part, &a, num_parts(num_rows, size));
}

static void gate_part(const void *what, int64_t index) {
    const Gate *g = what;
    const int64_t rows = part_rows(g->size), from = index * rows;
    kernels[g->setting->isa].gate(g, from, at_most(from + rows, g->num_rows));
}

/* silu(gate) * up, [num_rows, size], of [num_rows, 2 size]: gate and, behind it, up. */
void baton_gate(const Setting *setting, const char *gate_up, char *out, int64_t num_rows, int64_t size) {
    const Gate g = {setting, gate_up, out, num_rows, size};
    share_out(&setting->team, gate_part, &g, num_parts(num_rows, size));
}

/* `key` is where the position's first key goes in the pool. */
static void write_token(const Write *w, int64_t token, char *key, const Steps *steps) {
    const Batch *b = w->batch;
    const int64_t size = size_of(b->dtype);
    const char *from = w->key + token * w->key_stride * size, *value = w->value + token * w->value_stride * size;
    char *to = key + b->num_kv_heads * steps->head;
    for (int64_t h = 0; h < b->num_kv_heads; h++) memcpy(to + h * steps->head, value + h * steps->row, steps->row);
    if (w->query) {
        char *query = w->query + token * w->key_stride * size;
        const RowKernels *k = &kernels[b->isa];
        k->rotate(w, token, from, key, steps->head, b->num_kv_heads, w->key_norm);
        k->rotate(w, token, query, query, steps->row, w->num_heads, w->query_norm);
    } else {
        for (int64_t h = 0; h < b->num_kv_heads; h++) memcpy(key + h * steps->head, from + h * steps->row, steps->row);
    }
}

static int64_t token_values(const Write *w) {
    return (w->num_heads + 2 * w->batch->num_kv_heads) * w->batch->head_dim;
}

static void write_part(const void *what, int64_t index) {
    const Write *w = what;
    const Batch *b = w->batch;
    const Steps steps = steps_of(b);
    const int64_t tokens = part_rows(token_values(w)), from = index * tokens, to = from + tokens;
    for (int64_t s = 0; s < b->num_spans; s++) {
        const int32_t *span = b->spans + 4 * s, *table = b->tables + span[SLOT] * b->table_stride;
        int64_t token = span[ROW] > from ? span[ROW] : from;
        const int64_t end = at_most(span[ROW] + span[COUNT], to);
        for (; token < end; token++) {
            const int64_t position = span[START] + token - span[ROW];
            char *block = b->pool + table[position / b->block_size] * steps.block + w->layer * steps.layer;
            write_token(w, token, block + position % b->block_size * steps.row, &steps);
        }
    }
}

/* Puts keys and values, each [num_tokens, num_kv_heads, head_dim], where the spans' positions are. */
void baton_write(const Batch *b, int64_t layer, const char *key, int64_t key_stride, const char *value,
                 int64_t value_stride) {
    const Write w = {b, layer, key, value, key_stride, value_stride, NULL, 0, NULL, NULL, NULL, NULL, 0};
    share_out(&b->team, write_part, &w, num_parts(b->num_tokens, token_values(&w)));
}

/* Of qkv [num_tokens, num_heads + 2 num_kv_heads, head_dim]: rotates queries in place, and puts rotated keys and values
 * where the spans' positions are. Query and key heads are normed before, where query_norm and key_norm, [head_dim], are
 * not NULL. `stride`: elements from token to token; cos and sin: [num_tokens, head_dim / 2]. */
void baton_rotate_and_write(const Batch *b, int64_t layer, int64_t num_heads, char *qkv, int64_t stride,
                            const float *cos, const float *sin, const char *query_norm, const char *key_norm,
                            float norm_eps) {
    const int64_t head = b->head_dim * size_of(b->dtype);
    const char *key = qkv + num_heads * head, *value = key + b->num_kv_heads * head;
    const Write w = {b,         layer, key, value,      stride,   stride,  qkv,
                     num_heads, cos,   sin, query_norm, key_norm, norm_eps};
    share_out(&b->team, write_part, &w, num_parts(b->num_tokens, token_values(&w)));
}
