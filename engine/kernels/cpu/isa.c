/* Which instruction set the kernels may use here. */

#include "common.h"

#if HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Whether the processor has AMX for bfloat16 and Linux lets this process use it: its registers are large, so they have
 * to be asked for. */
static int may_use_amx(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d & AMX_BF16) && (d & AMX_TILE) && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
#else
static int may_use_amx(void) { return 0; }
#endif

/* The best that this machine has; each includes those before it. */
int64_t baton_best_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return GENERIC;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    if (!__builtin_cpu_supports("avx512bf16")) return AVX512;
    return may_use_amx() ? AMX : AVX512_BF16;
#else
    return GENERIC;
#endif
}
