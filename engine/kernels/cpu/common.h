/* What all kernels share: dtypes, instruction sets, conversions, and threads.
 *
 * No kernel starts a thread: work is shared out among those that the caller's OpenMP runtime lends, through the address
 * of its GOMP_parallel.
 */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { GENERIC, AVX2, AVX512, AVX512_BF16, AMX }; /* each includes those before it */

/* Whether this compiler knows AMX; and the system, which must be asked for it, is one that we know how to ask. */
#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define HAS_AMX 1
#else
#define HAS_AMX 0
#endif

#if defined(__x86_64__)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif
#define PRAGMA(x) _Pragma(#x)
#endif

/* Mirrored by library.py. */
typedef struct {
    int64_t threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel, or NULL */
} Team;

/* Parts of a job, taken one after the other by whoever is free. */
typedef struct {
    void (*part)(const void *what, int64_t index);
    const void *what;
    int64_t count, taken;
} Job;

static inline void take_parts(void *argument) {
    Job *job = argument;
    for (int64_t i; (i = __atomic_fetch_add(&job->taken, 1, __ATOMIC_RELAXED)) < job->count;) job->part(job->what, i);
}

/* Always to as many threads as torch's own regions have: a team that changes its size is made anew. */
static inline void share_out(const Team *team, void (*part)(const void *, int64_t), const void *what, int64_t count) {
    Job job = {part, what, count, 0};
    if (team->parallel && team->threads > 1 && count > 1)
        team->parallel(take_parts, &job, (unsigned)team->threads, 0);
    else
        take_parts(&job);
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline uint16_t to_float16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7e00;
    if (bits >= 0x47800000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* subnormal: adding 1/2 rounds it to the last place of a half */
        float value;
        memcpy(&value, &bits, 4);
        value += 0.5f;
        memcpy(&bits, &value, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
