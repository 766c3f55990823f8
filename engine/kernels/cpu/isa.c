/* Which instruction set the kernels may use here. */

#include "common.h"

/* The best of GENERIC, AVX2, AVX512 and AVX512_BF16 that this machine has; each includes those before it. */
int64_t baton_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return GENERIC;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    return __builtin_cpu_supports("avx512bf16") ? AVX512_BF16 : AVX512;
#else
    return GENERIC;
#endif
}
