/* A step's batch over a pool, and where in the pool its keys and values are.
 *
 * The pool is [num_blocks, num_layers, 2 (K, V), num_kv_heads, block_size, head_dim].
 */

#pragma once

#include "common.h"

enum { MAX_HEAD_DIM = 256 };
enum { ROW, START, COUNT, SLOT }; /* of a span */

/* Mirrored by library.py. */
typedef struct {
    char *pool;
    const int32_t *tables; /* block tables, one a slot */
    int64_t table_stride;
    const int32_t *spans; /* [num_spans][4], by ascending ROW */
    int64_t num_spans, num_tokens;
    int64_t num_layers, num_kv_heads, block_size, head_dim, dtype;
    int64_t isa;
    Team team;
} Batch;

/* Bytes from one to the next, in the pool. */
typedef struct {
    int64_t row, head, layer, block; /* row: a position of a head; head: its keys, or its values, of a block */
} Steps;

static inline Steps steps_of(const Batch *b) {
    Steps s = {.row = b->head_dim * (b->dtype == FLOAT32 ? 4 : 2)};
    s.head = b->block_size * s.row;
    s.layer = 2 * b->num_kv_heads * s.head;
    s.block = b->num_layers * s.layer;
    return s;
}
