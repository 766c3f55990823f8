/* Tokens from logits on a CPU: what engine/sampler.py defines, without sorting a vocabulary or copying it.
 *
 * A row's blocks are looked through for their largest logits. That answers a greedy row, and tells which blocks need
 * not be read again.
 *
 * Top-k: the bits of a float of one sign are in the order of its size, so a count by the upper ones, then one by the
 * next within the deciding bucket, then one by the last, give the least value that is kept.
 *
 * Top-p: all race first. The winner stays if the tokens above it have less than their share of the mass; else it and
 * all that are not above it leave, and the others race again. That gives the winner among those that top-p keeps, and
 * mostly at the first attempt, without a look at where its edge is.
 *
 * Tokens that tie with the last one kept are kept: in both cases those of the same x. In the reference, top-p has those
 * of the same float32 probability, which x less than 1e-7 apart can share.
 *
 * Masses are added as whole numbers: their sum is the same in every order, so what a row draws depends neither on its
 * company nor on threads.
 *
 * sampling.py mirrors Drawing and Params. scan.h has what is done to every token.
 */

#include "common.h"

enum { BLOCK = 256, BUCKETS = 2048, BOUNDS = 5, ROUNDS = 10 };
enum { SLICE = 64, MAX_SLICES = 64 }; /* SLICE: least blocks of a thread's part of a row */

#define LOG2_E 1.44269504088896341f
#define UNIT 0x1p36f /* whole numbers of mass for exp(0): enough for the sum of 2^26 tokens */

/* Top-p often keeps nothing below one of these. */
static const float likely[BOUNDS - 1] = {-2, -4, -8, -14};

typedef struct {
    uint64_t seed, position;
    float temperature; /* 0: greedy */
    float top_p;
    int64_t top_k; /* 0: all */
} Params;

typedef struct {
    char *logits; /* [rows, vocab_size]; banned ones are overwritten */
    int64_t row_stride, rows, vocab_size, dtype, isa;
    const Params *params;  /* one a row; NULL: all are greedy */
    const int32_t *banned; /* [num_banned][2]: row, token */
    int64_t num_banned;
    float *maxima;   /* workspace, [rows][blocks of the vocabulary] */
    int64_t *tokens; /* [rows], the result */
    Team team;
} Drawing;

typedef struct {
    const char *logits;
    int64_t count, dtype;
    const float *maxima; /* of its blocks; NULL: unknown */
    float largest, temperature;
} Row;

/* Tokens by the bits of -x, which ascend from the best: those up to `limit` whose upper bits are `prefix`. */
typedef struct {
    int32_t limit, prefix, prefix_shift, shift, mask;
} Sought;

typedef struct {
    uint64_t position, keys[ROUNDS][2][4]; /* of Philox: each round's of the seed's halves, in every lane */
} Race;

typedef struct {
    double speed; /* 1 / time of arrival; 0: nobody's yet */
    int64_t token;
    float x;
    float least; /* x that may win */
    float floor; /* less than this cannot win, whatever its number */
    float pace;  /* a token of p and word w is later than `token` where p < pace * ((2^32 - 1 - w) >> 1) */
} Best;

static void put_least(void *logits, int64_t at, int64_t dtype) {
    if (dtype == FLOAT32)
        ((float *)logits)[at] = -INFINITY;
    else
        ((uint16_t *)logits)[at] = dtype == BFLOAT16 ? 0xff80 : 0xfc00;
}

static Race race_of(uint64_t seed, uint64_t position) {
    Race race = {.position = position};
    /* A half at a time: GCC 12 gives both the first one's increment where they advance together. */
    for (int half = 0; half < 2; half++)
        for (uint32_t i = 0; i < ROUNDS; i++)
            for (int lane = 0; lane < 4; lane++)
                race.keys[i][half][lane] = (uint32_t)(seed >> 32 * half) + i * (half ? 0xBB67AE85 : 0x9E3779B9);
    return race;
}

/* Token of x and random word arrives. Of two at the same time, the first in the vocabulary wins. */
static void arrive(Best *best, int64_t token, float x, uint32_t word) {
    const double speed = exp((double)x) / -log((word + 0.5) * 0x1p-32);
    if (x < best->least || speed < best->speed || (speed == best->speed && token >= best->token)) return;
    best->speed = speed;
    best->token = token;
    best->x = x;
    best->pace = (float)(speed * 0x1p-31 * (1 - 1e-6));
    const float slowest = (float)(log(speed) - 33 * 0.6931471805599453 - 1e-3); /* -log(u) > 2^-33 */
    best->floor = slowest > best->least ? slowest : best->least;
}

#define NAME(x) x##_generic
#define LANES 4
#include "scan.h"

#if defined(__x86_64__)

BEGIN_TARGET("avx2,fma")
#define NAME(x) x##_avx2
#define LANES 8
#include "scan.h"
END_TARGET

#define ON_ISA(isa, f, ...) ((isa) >= AVX2 ? f##_avx2(__VA_ARGS__) : f##_generic(__VA_ARGS__))
#else
#define ON_ISA(isa, f, ...) f##_generic(__VA_ARGS__)
#endif

/* One row, in slices of blocks that depend on the vocabulary alone. */
typedef struct {
    const Drawing *drawing;
    Team team; /* of the slices */
    Row row;
    float *maxima;
    int64_t slice_blocks;
    Sought sought;
    uint32_t buckets[BUCKETS];
    float bounds[BOUNDS]; /* the first is the least */
    int64_t num_bounds, masses[BOUNDS];
    Race race;
    Best start, best[MAX_SLICES];
} Work;

static int64_t blocks_of(int64_t count) { return (count + BLOCK - 1) / BLOCK; }

static int64_t num_slices(const Work *w) { return (blocks_of(w->row.count) + w->slice_blocks - 1) / w->slice_blocks; }

static int64_t slice_end(const Work *w, int64_t slice) {
    const int64_t end = (slice + 1) * w->slice_blocks, blocks = blocks_of(w->row.count);
    return end < blocks ? end : blocks;
}

static float scaled(const Row *row, float logit) { return (logit - row->largest) / row->temperature; }

static int32_t key_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

static float x_of(int32_t key) {
    float x;
    memcpy(&x, &key, 4);
    return -x;
}

static void look_part(const void *what, int64_t slice) {
    const Work *w = what;
    for (int64_t b = slice * w->slice_blocks; b < slice_end(w, slice); b++)
        w->maxima[b] = ON_ISA(w->drawing->isa, largest_in, &w->row, b);
}

/* Whether a block's largest tells that none of those sought is in it. */
static int has_none(const Row *row, int64_t block, const Sought *s) {
    if (!row->maxima) return 0;
    const int32_t key = key_of(scaled(row, row->maxima[block]));
    return key > s->limit || key >> s->prefix_shift > s->prefix;
}

static void tally_part(const void *what, int64_t slice) {
    Work *w = (Work *)what;
    const int shared = w->team.threads > 1;
    uint32_t own[BUCKETS], *buckets = shared ? memset(own, 0, sizeof own) : w->buckets;
    for (int64_t b = slice * w->slice_blocks; b < slice_end(w, slice); b++)
        if (!has_none(&w->row, b, &w->sought)) ON_ISA(w->drawing->isa, tally, &w->row, b, &w->sought, buckets);
    for (int i = 0; shared && i < BUCKETS; i++)
        if (own[i]) __atomic_fetch_add(&w->buckets[i], own[i], __ATOMIC_RELAXED);
}

/* The k-th largest x, which is known not to be below `bound`. */
static float kth_largest(Work *w, int64_t k, float bound) {
    Sought *s = &w->sought;
    *s = (Sought){key_of(bound), 0, 31, 20, BUCKETS - 1};
    for (int64_t before = 0;;) {
        memset(w->buckets, 0, sizeof w->buckets);
        share_out(&w->team, tally_part, w, num_slices(w));
        int32_t bucket = 0;
        while (before + w->buckets[bucket] < k) before += w->buckets[bucket++];
        s->prefix = s->prefix << (s->prefix_shift - s->shift) | bucket;
        if (s->shift == 0) return x_of(s->prefix);
        s->prefix_shift = s->shift;
        s->shift -= 10;
        s->mask = (1 << 10) - 1;
    }
}

/* At least k of the blocks' largest are not below what this returns, so at least k tokens are not. */
static float bound_of_top_k(Work *w, int64_t k) {
    const Row row = w->row;
    const int64_t blocks = blocks_of(row.count);
    if (k > blocks) return -INFINITY;
    w->row = (Row){(const char *)row.maxima, blocks, FLOAT32, NULL, row.largest, row.temperature};
    const float bound = kth_largest(w, k, -INFINITY);
    w->row = row;
    return bound;
}

static void weigh_part(const void *what, int64_t slice) {
    Work *w = (Work *)what;
    int64_t masses[BOUNDS] = {0};
    for (int64_t b = slice * w->slice_blocks; b < slice_end(w, slice); b++)
        if (scaled(&w->row, w->maxima[b]) >= w->bounds[0])
            ON_ISA(w->drawing->isa, weigh, &w->row, b, w->bounds, masses, w->num_bounds);
    for (int i = 0; i < w->num_bounds; i++) __atomic_fetch_add(&w->masses[i], masses[i], __ATOMIC_RELAXED);
}

/* Fills in the masses from each of the bounds on. */
static void weigh_all(Work *w, int64_t num_bounds) {
    w->num_bounds = num_bounds;
    memset(w->masses, 0, sizeof w->masses);
    share_out(&w->team, weigh_part, w, num_slices(w));
}

static void race_part(const void *what, int64_t slice) {
    Work *w = (Work *)what;
    Best best = w->start;
    for (int64_t b = slice * w->slice_blocks; b < slice_end(w, slice); b++)
        if (scaled(&w->row, w->maxima[b]) >= best.floor) ON_ISA(w->drawing->isa, race, &w->row, b, &w->race, &best);
    w->best[slice] = best;
}

/* The winner of those not below `least`. */
static Best first_to_arrive(Work *w, float least, int64_t best_block) {
    w->start = (Best){0, w->row.count, 0, least, least > -1e30f ? least : -1e30f, 0};
    /* With the likeliest first, most of the others are seen to be late without a look at their numbers. */
    ON_ISA(w->drawing->isa, race, &w->row, best_block, &w->race, &w->start);
    share_out(&w->team, race_part, w, num_slices(w));
    Best best = w->best[0];
    for (int64_t i = 1; i < num_slices(w); i++) {
        const Best *b = &w->best[i];
        if (b->speed > best.speed || (b->speed == best.speed && b->token < best.token)) best = *b;
    }
    return best;
}

/* Top-p keeps a token that has less than its share of the mass before it, and the best. */
static int64_t sample_top_p(Work *w, double share, float least, int64_t best_block) {
    w->bounds[0] = least;
    for (int i = 1; i < BOUNDS; i++) w->bounds[i] = likely[i - 1] > least ? likely[i - 1] : least;
    weigh_all(w, BOUNDS);
    share *= (double)w->masses[0];
    for (int i = BOUNDS - 1; i > 0; i--)
        if ((double)w->masses[i] >= share) least = w->bounds[i];
    for (;;) {
        const Best best = first_to_arrive(w, least, best_block);
        if (best.x == 0) return best.token;
        w->bounds[0] = x_of(key_of(best.x) - 1); /* the next float above */
        weigh_all(w, 1);
        if ((double)w->masses[0] < share) return best.token;
        least = w->bounds[0];
    }
}

static int64_t sample(Work *w, const Params *p, int64_t best_block) {
    float least = -INFINITY;
    w->row.temperature = p->temperature;
    w->race = race_of(p->seed, p->position);
    if (0 < p->top_k && p->top_k < w->row.count) least = kth_largest(w, p->top_k, bound_of_top_k(w, p->top_k));
    if (p->top_p < 1) return sample_top_p(w, p->top_p, least, best_block);
    return first_to_arrive(w, least, best_block).token;
}

static void draw_row(const Drawing *d, int64_t index, Team team) {
    const int size = d->dtype == FLOAT32 ? 4 : 2;
    const int64_t blocks = blocks_of(d->vocab_size), part = (blocks + MAX_SLICES - 1) / MAX_SLICES;
    Work w;
    w.drawing = d;
    w.team = team;
    w.maxima = d->maxima + index * blocks;
    w.slice_blocks = part > SLICE ? part : SLICE;
    w.row = (Row){d->logits + index * d->row_stride * size, d->vocab_size, d->dtype, w.maxima, 0, 1};
    share_out(&team, look_part, &w, num_slices(&w));
    int64_t best = 0;
    for (int64_t b = 0; b < blocks && w.maxima[best] == w.maxima[best]; b++)
        if (!(w.maxima[b] <= w.maxima[best])) best = b;
    w.row.largest = w.maxima[best];
    const Params *p = d->params ? d->params + index : NULL;
    if (!p || p->temperature == 0)
        d->tokens[index] = ON_ISA(d->isa, find, &w.row, best, w.row.largest);
    else
        d->tokens[index] = isfinite(w.row.largest) ? sample(&w, p, best) : 0;
}

static void row_part(const void *what, int64_t index) { draw_row(what, index, (Team){1, NULL}); }

/* Floats of workspace. */
int64_t baton_draw_workspace(int64_t rows, int64_t vocab_size) { return rows * blocks_of(vocab_size); }

/* One token a row. The largest is the first of equals, and NaN is larger than all, as in torch. A row that is sampled
 * and whose largest is not finite gives 0, as it does there. */
void baton_draw(const Drawing *d) {
    for (int64_t i = 0; i < d->num_banned; i++) {
        const int32_t *banned = d->banned + 2 * i;
        put_least(d->logits, banned[0] * d->row_stride + banned[1], d->dtype);
    }
    if (d->rows >= 2 * d->team.threads)
        share_out(&d->team, row_part, d, d->rows);
    else
        for (int64_t i = 0; i < d->rows; i++) draw_row(d, i, d->team);
}

/* The random words of LANES quads, four each, for the tests. Returns how many words they are. */
int64_t baton_words(int64_t isa, uint64_t seed, uint64_t position, int64_t quad, uint32_t *words) {
    const Race race = race_of(seed, position);
    return ON_ISA(isa, store_words, &race, quad, words);
}
