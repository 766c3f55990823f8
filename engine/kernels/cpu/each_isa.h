/* Includes EACH_ISA, a header's name in quotes, once for each instruction set, with
 *
 *   NAME(x)  the name of x in this instance
 *   LANES    float32 values of a vector: 4, 8 or 16
 *   DOT      1 where two bfloat16 products are added to a float32 in one instruction (dpbf16)
 *
 * That header defines its names by NAME, each time anew: `#define f NAME(f)` may stand again where it says the same.
 */

#define NAME(x) x##_generic
#define LANES 4
#define DOT 0
#include EACH_ISA
#undef NAME
#undef LANES
#undef DOT

#if defined(__x86_64__)

BEGIN_TARGET("avx2,fma")
#define NAME(x) x##_avx2
#define LANES 8
#define DOT 0
#include EACH_ISA
#undef NAME
#undef LANES
#undef DOT
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define NAME(x) x##_avx512
#define LANES 16
#define DOT 0
#include EACH_ISA
#undef NAME
#undef LANES
#undef DOT
END_TARGET

BEGIN_TARGET("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define NAME(x) x##_avx512_bf16
#define LANES 16
#define DOT 1
#include EACH_ISA
#undef NAME
#undef LANES
#undef DOT
END_TARGET

#endif
