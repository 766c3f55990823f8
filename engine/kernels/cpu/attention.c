/* Paged attention on a CPU: a mixed batch of decodes and prefill chunks over block tables.
 *
 * Work is cut into items of one sequence, one KV head, at most ROWS query rows and, where all of a sequence's queries
 * fit into one item, SPLIT positions: cost follows the tokens that are there. How a sequence is cut depends on the
 * sequence alone, so neither its company in the batch nor the number of threads changes a bit of its result. Positions
 * outside of what an item sees are never read. tile.h has the arithmetic, and amx.h that of processors with AMX.
 */

#include "batch.h"

enum { ROWS = 64, TILE = 64, RUN = 16, RUNS = TILE / RUN, SPLIT = 256, AT_ONCE = 2 };

#define NOTHING_YET -1e30f /* finite, so that nothing minus nothing is not NaN */

typedef struct {
    int32_t span, kv_head;
    int32_t token, tokens; /* of the span's queries */
    int32_t head, heads;   /* query heads */
    int32_t first, last;   /* positions */
    int32_t partial;       /* where several items share their queries: this one's first row of partials; else -1 */
    int32_t parts;         /* in the first of those: how many they are; else 0 */
} Item;

typedef struct {
    const Batch *batch;
    int64_t layer, window, num_heads;
    float scale;
    const char *query;
    int64_t query_stride; /* elements from token to token */
    char *output;         /* [num_tokens, num_heads, head_dim] */
    Item *items;
    int64_t num_items;
    float *partials; /* [rows][head_dim + 2]: weighted sum of values, largest score, sum of weights */
} Call;

/* What is read of a tile: runs of keys, and of values, that lie behind each other. NULL: these have to be gathered. */
typedef struct {
    const char *keys[RUNS], *values[RUNS];
} Tile;

static const char nothing[RUN * MAX_HEAD_DIM * 4];

static const char *row_of(const Call *call, const Item *item, int position) {
    const Batch *b = call->batch;
    const Steps steps = steps_of(b);
    const int32_t *table = b->tables + b->spans[4 * item->span + SLOT] * b->table_stride;
    const int block_size = (int)b->block_size;
    return b->pool + table[position / block_size] * steps.block + call->layer * steps.layer +
           item->kv_head * steps.head + position % block_size * steps.row;
}

static void find_tile(Tile *found, const Call *call, const Item *item, int tile) {
    const int64_t to_values = call->batch->num_kv_heads * steps_of(call->batch).head;
    for (int i = 0; i < RUNS; i++) {
        const int p = tile + i * RUN;
        found->keys[i] = found->values[i] = p < item->last ? NULL : nothing;
        if (p < item->first || p + RUN > item->last || call->batch->block_size % RUN) continue;
        found->keys[i] = row_of(call, item, p);
        found->values[i] = found->keys[i] + to_values;
    }
}

/* A run at `run`; where that is NULL, the run from `position` on is put together at `to`: rows of zeros for positions
 * that the item does not see. `offset`: from a position's key to what is wanted. */
static const char *gathered(const char *run, char *to, const Call *call, const Item *item, int position,
                            int64_t offset) {
    if (run) return run;
    const int64_t row = steps_of(call->batch).row;
    for (int i = 0; i < RUN; i++, position++) {
        const int seen = position >= item->first && position < item->last;
        memcpy(to + i * row, seen ? row_of(call, item, position) + offset : nothing, row);
    }
    return to;
}

static const char *keys_of(const Tile *found, char *copy, const Call *call, const Item *item, int tile, int run) {
    return gathered(found->keys[run], copy, call, item, tile + run * RUN, 0);
}

static const char *values_of(const Tile *found, char *copy, const Call *call, const Item *item, int tile, int run) {
    const int64_t offset = call->batch->num_kv_heads * steps_of(call->batch).head;
    return gathered(found->values[run], copy, call, item, tile + run * RUN, offset);
}

/* Brings to the cache what is read soon of a run, if that is known already. */
INLINE void ask_for(const char *run, int64_t from, int64_t bytes) {
    if (run)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(run + from + i);
}

#define EACH_ISA "tile.h"
#include "each_isa.h"

#if HAS_AMX
BEGIN_TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define NAME(x) x##_amx
#define LANES 16
#define DOT 1
#include "amx.h"
#undef NAME
#undef LANES
#undef DOT
END_TARGET
#endif

static void attend_item(const Call *call, const Item *item) {
    switch (call->batch->isa) {
#if HAS_AMX
    case AMX:
        if (call->batch->dtype == BFLOAT16 && call->batch->head_dim % DEPTH == 0) {
            attend_squares_amx(call, item);
            break;
        } /* else as without it */
#endif
#if defined(__x86_64__)
    case AVX512_BF16: attend_item_avx512_bf16(call, item); break;
    case AVX512: attend_item_avx512(call, item); break;
    case AVX2: attend_item_avx2(call, item); break;
#endif
    default: attend_item_generic(call, item);
    }
}

/* Chunks come last in a batch and are the longest items: they are begun first. A decode's heads lie behind each other
 * in the pool, and are read so. */
static void attend_part(const void *what, int64_t index) {
    const Call *call = what;
    const int64_t end = call->num_items - index * AT_ONCE, begin = end > AT_ONCE ? end - AT_ONCE : 0;
    for (int64_t i = begin; i < end; i++) attend_item(call, &call->items[i]);
}

static void merge_part(const void *what, int64_t index) {
    const Call *call = what;
    const Item *item = &call->items[index];
    if (!item->parts) return;
    switch (call->batch->isa) {
#if defined(__x86_64__)
    case AMX:
    case AVX512_BF16:
    case AVX512: merge_avx512(call, item); break;
    case AVX2: merge_avx2(call, item); break;
#endif
    default: merge_generic(call, item);
    }
}

/* Cuts the batch into items, which are stored where `items` is not NULL. Returns how many they are, and in `partials`
 * how many rows of partial results they leave. */
static int64_t cut(const Batch *b, int64_t window, int64_t num_heads, Item *items, int64_t *partials) {
    const int group = (int)(num_heads / b->num_kv_heads), heads = group < ROWS ? group : ROWS;
    const int tokens = ROWS / heads;
    int64_t count = 0, rows = 0;
    for (int64_t s = 0; s < b->num_spans; s++) {
        const int32_t start = b->spans[4 * s + START], length = b->spans[4 * s + COUNT];
        const int64_t begin = count;
        const int by_part = length <= tokens && heads == group; /* the key heads of one part behind each other */
        for (int kv_head = 0; kv_head < b->num_kv_heads; kv_head++)
            for (int head = 0; head < group; head += heads)
                for (int token = 0; token < length; token += tokens) {
                    Item item = {(int32_t)s, kv_head, token, tokens, kv_head * group + head, heads, 0, 0, -1, 0};
                    if (length - token < tokens) item.tokens = length - token;
                    if (group - head < heads) item.heads = group - head;
                    const int32_t end = start + token + item.tokens;
                    int32_t first = 0;
                    if (window && start + token >= window) first = (int32_t)(start + token - window + 1);
                    const int32_t origin = first / SPLIT * SPLIT;
                    const int parts = length <= tokens ? (end - origin + SPLIT - 1) / SPLIT : 1;
                    for (int i = 0; i < parts; i++, count++) {
                        item.first = i ? origin + i * SPLIT : first;
                        item.last = i + 1 < parts ? origin + (i + 1) * SPLIT : end;
                        item.parts = parts > 1 && i == 0 ? parts : 0;
                        if (parts > 1) {
                            item.partial = (int32_t)rows;
                            rows += item.tokens * item.heads;
                        }
                        if (items) items[by_part ? begin + i * b->num_kv_heads + kv_head : count] = item;
                    }
                }
    }
    *partials = rows;
    return count;
}

static int64_t items_bytes(int64_t count) { return (count * (int64_t)sizeof(Item) + 63) / 64 * 64; }

/* Bytes of workspace that baton_attend needs for the batch. */
int64_t baton_attend_workspace(const Batch *b, int64_t window, int64_t num_heads) {
    int64_t rows, count = cut(b, window, num_heads, NULL, &rows);
    return items_bytes(count) + rows * (b->head_dim + 2) * (int64_t)sizeof(float);
}

/* Causal softmax attention of the spans' queries to what is written of their sequences, themselves included; only to
 * the last `window` positions where that is not 0. Rows of the output that belong to no span are left alone. */
void baton_attend(const Batch *b, int64_t layer, int64_t window, int64_t num_heads, float scale, const char *query,
                  int64_t query_stride, char *output, char *workspace) {
    Call call = {b, layer, window, num_heads, scale, query, query_stride, output, (Item *)workspace, 0, NULL};
    int64_t rows;
    call.num_items = cut(b, window, num_heads, call.items, &rows);
    call.partials = (float *)(workspace + items_bytes(call.num_items));
    share_out(&b->team, attend_part, &call, (call.num_items + AT_ONCE - 1) / AT_ONCE);
    if (rows) share_out(&b->team, merge_part, &call, call.num_items);
}
