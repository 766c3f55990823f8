/* What becomes of an item's sums, for one instruction set of each_isa.h. */

#define store NAME(store)
#define finish NAME(finish)
#define merge_as NAME(merge_as)

INLINE void store(const Call *call, int64_t row, int64_t head, const float *sums, float divisor, const int dtype) {
    const int head_dim = (int)call->batch->head_dim;
    const int64_t at = (row * call->num_heads + head) * head_dim;
    const float factor = 1 / divisor;
    for (int d = 0; d < head_dim; d += LANES) store_float(call->output, at + d, load_f(sums + d) * factor, dtype);
}

/* Leaves an item's results: in the output, or among the partials. */
INLINE void finish(const Call *call, const Item *item, const float *sums, const float *largest, const float *total,
                   const int dtype) {
    const int head_dim = (int)call->batch->head_dim;
    const int64_t first_row = call->batch->spans[4 * item->span + ROW] + item->token;
    for (int r = 0; r < item->tokens * item->heads; r++, sums += head_dim) {
        if (item->partial < 0) {
            store(call, first_row + r / item->heads, item->head + r % item->heads, sums, total[r], dtype);
            continue;
        }
        float *partial = call->partials + (int64_t)(item->partial + r) * (head_dim + 2);
        memcpy(partial, sums, sizeof(float) * head_dim);
        partial[head_dim] = largest[r];
        partial[head_dim + 1] = total[r];
    }
}

/* Puts together what the items of one query left. */
INLINE void merge_as(const Call *call, const Item *item, const int dtype) {
    const int head_dim = (int)call->batch->head_dim, rows = item->tokens * item->heads;
    const int64_t length = head_dim + 2, next_part = rows * length;
    const int64_t first_row = call->batch->spans[4 * item->span + ROW] + item->token;
    for (int r = 0; r < rows; r++) {
        const float *part = call->partials + (item->partial + r) * length;
        float sums[MAX_HEAD_DIM] = {0}, total = 0, largest = NOTHING_YET;
        for (int i = 0; i < item->parts; i++)
            if (part[i * next_part + head_dim] > largest) largest = part[i * next_part + head_dim];
        for (int i = 0; i < item->parts; i++, part += next_part) {
            const float weight = expf((part[head_dim] - largest) * call->scale);
            total += weight * part[head_dim + 1];
            for (int d = 0; d < head_dim; d += LANES) {
                const vf sum = load_f(sums + d) + weight * load_f(part + d);
                memcpy(sums + d, &sum, sizeof sum);
            }
        }
        store(call, first_row + r / item->heads, item->head + r % item->heads, sums, total, dtype);
    }
}

static NOINLINE void NAME(merge)(const Call *call, const Item *item) {
    switch (call->batch->dtype) {
    case FLOAT32: merge_as(call, item, FLOAT32); break;
    case BFLOAT16: merge_as(call, item, BFLOAT16); break;
    default: merge_as(call, item, FLOAT16);
    }
}
