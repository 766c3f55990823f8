/* Vectors of float32 for one instruction set of each_isa.h, and what all kernels do with them. */

#define LOG2_E 1.44269504088896341f

#define vf NAME(vf)
#define vi NAME(vi)
#define vh NAME(vh)
#define vu NAME(vu)

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

#define load_f NAME(load_f)
#define splat NAME(splat)
#define larger NAME(larger)
#define across NAME(across)
#define largest_of NAME(largest_of)
#define sum_of NAME(sum_of)
#define exp2_of NAME(exp2_of)
#define silu_times NAME(silu_times)
#define load_halves NAME(load_halves)
#define load_as_float NAME(load_as_float)
#define store_float NAME(store_float)

INLINE vf load_f(const void *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vf splat(float x) { return x - (vf){0}; }

/* Where one is NaN: b. */
INLINE vf larger(vf a, vf b) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    vi mask = a > b;
    return (vf)(((vi)a & mask) | ((vi)b & ~mask));
#endif
}

/* Each lane with the one that is `far` away, a constant below LANES and a power of two. */
INLINE vf across(vf v, const int far) {
#if LANES == 16
    if (far == 8) return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e);
    if (far == 4) return (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1);
    return (vf)(far == 2 ? _mm512_permute_ps((__m512)v, 0x4e) : _mm512_permute_ps((__m512)v, 0xb1));
#elif LANES == 8
    if (far == 4) return (vf)_mm256_permute2f128_ps((__m256)v, (__m256)v, 1);
    return (vf)(far == 2 ? _mm256_permute_ps((__m256)v, 0x4e) : _mm256_permute_ps((__m256)v, 0xb1));
#else
    if (far == 2) return SHUFFLE(vf, v, v, 2, 3, 0, 1);
    return SHUFFLE(vf, v, v, 1, 0, 3, 2);
#endif
}

INLINE float largest_of(vf v) {
#if LANES == 16
    v = larger(v, across(v, 8));
#endif
#if LANES >= 8
    v = larger(v, across(v, 4));
#endif
    v = larger(v, across(v, 2));
    return larger(v, across(v, 1))[0];
}

INLINE float sum_of(vf v) {
#if LANES == 16
    v += across(v, 8);
#endif
#if LANES >= 8
    v += across(v, 4);
#endif
    v += across(v, 2);
    return v[0] + v[1];
}

/* 2^x for x <= 0, within 1.1e-7 of it, relatively; 0 for x below -126.5; NaN stays NaN. x = n + f with n whole and
 * |f| <= 1/2; 2^f by the polynomial of degree 6 with the least relative error there (1.9e-9 before rounding). */
INLINE vf exp2_of(vf x) {
    const float magic = 0x1.8p23f; /* adding it rounds to a whole number, which is then in the low bits */
    x = larger(splat(-127.0f), x);
    vf shifted = x + magic;
    vf f = x - (shifted - magic);
    vf y = splat(0x1.41d324p-13f);
    y = y * f + 0x1.5f456ap-10f;
    y = y * f + 0x1.3b2dbcp-7f;
    y = y * f + 0x1.c6aed4p-5f;
    y = y * f + 0x1.ebfbdap-3f;
    y = y * f + 0x1.62e430p-1f;
    y = y * f + 1.0f;
    return y * (vf)(((vi)shifted - (vi)splat(magic) + 127) << 23);
}

/* silu(gate) * up. silu(x) = x / (1 + e^-x), with no positive exponent. */
INLINE vf silu_times(vf gate, vf up) {
    const vi negative = gate < 0;
    const vf small = exp2_of((vf)((vi)gate | INT32_MIN) * LOG2_E); /* e^-|x| */
    const vf above = (vf)(((vi)small & negative) | ((vi)splat(1) & ~negative));
    return gate * above / (1 + small) * up;
}

/* In one instruction where there is one: compilers make four of a conversion of vectors. */
INLINE vi load_halves(const uint16_t *from) {
#if LANES == 16
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
#elif LANES == 8
    return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)from));
#else
    vh raw;
    memcpy(&raw, from, sizeof raw);
    return __builtin_convertvector(raw, vi);
#endif
}

INLINE vf load_as_float(const void *row, int64_t column, const int dtype) {
    if (dtype == FLOAT32) return load_f((const float *)row + column);
    const vi bits = load_halves((const uint16_t *)row + column);
    if (dtype == BFLOAT16) return (vf)(bits << 16);
    vf value = (vf)((bits & 0x7fff) << 13) * 0x1p112f; /* subnormals too */
    vi special = (bits & 0x7c00) == 0x7c00;            /* infinities and NaN keep the highest exponent */
    return (vf)((vi)value | (special & 0x7f800000) | (bits & 0x8000) << 16);
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
INLINE void store_float(void *row, int64_t column, vf x, const int dtype) {
    if (dtype == FLOAT32) {
        memcpy((float *)row + column, &x, sizeof x);
        return;
    }
    const vu bits = (vu)x, size = bits & 0x7fffffff, not_a_number = (vu)(x != x);
    vu rounded;
    if (dtype == BFLOAT16) {
        rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        rounded = (rounded & ~not_a_number) | (not_a_number & 0x7fc0);
    } else {
        const vu normal = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
        const vu subnormal = (vu)((vf)size + 0.5f) - 0x3f000000; /* adding 1/2 rounds to the last place of a half */
        const vu is_small = (vu)(size < 0x38800000), is_large = (vu)(size >= 0x47800000);
        rounded = (subnormal & is_small) | (normal & ~is_small);
        rounded = (rounded & ~is_large) | (is_large & 0x7c00);
        rounded = (rounded & ~not_a_number) | (not_a_number & 0x7e00);
        rounded |= bits >> 16 & 0x8000;
    }
    const vh half = __builtin_convertvector(rounded, vh);
    memcpy((uint16_t *)row + column, &half, sizeof half);
}
